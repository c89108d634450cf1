"""The Wan2.1 autoencoder against diffusers, against itself in pieces, and on disk.

Random weights throughout: no checkpoint is opened here. The list of names and shapes is written
out from the published file, not derived from the code.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from worldloop.engine.formats.wan import (
    from_diffusers_key,
    from_diffusers_vae,
    load_wan_vae,
    save_diffusers_vae,
    save_wan_vae,
    to_diffusers_key,
    to_diffusers_vae,
)
from worldloop.engine.vae import PRESETS, Autoencoder, Stream, WanVAE, WanVAEConfig
from worldloop.errors import UserError

TOLERANCE = 1e-5  # relative L2, fp32

SMALL = {
    "8 channels, 4 latent": WanVAEConfig(
        dim=8, latent_channels=4, latent_mean=(0.1, -0.2, 0.3, 0.0), latent_std=(0.5, 1.0, 2.0, 3.0)
    ),
    "16 channels, 16 latent": WanVAEConfig(dim=16),
    "one block, three levels": WanVAEConfig(
        dim=8, multipliers=(1, 3, 2), res_blocks=1, temporal_downsample=(True, True)
    ),
    "temporal first": WanVAEConfig(
        dim=8, multipliers=(1, 2, 2, 1), res_blocks=3, temporal_downsample=(True, False, True)
    ),
}


@pytest.fixture(autouse=True)
def _one_thread_no_grad() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Non-trivial values everywhere, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if name.endswith("gamma"):
            p.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("bias"):
            p.normal_(0, 0.1, generator=generator)
        else:
            # The last convolution is smaller, so that the clamp to [-1,1] hides nothing.
            gain = 0.2 if name in ("decoder.head.2.weight", "decoder.conv_out.weight") else 1.0
            p.normal_(0, gain * p[0].numel() ** -0.5, generator=generator)


def small(config: WanVAEConfig | None = None, seed: int = 0) -> WanVAE:
    vae = WanVAE(config or PRESETS["tiny"]).eval()
    randomise(vae, seed)
    return vae


def video(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got - want).norm() / want.norm()).item()


def assert_same(got: Tensor, want: Tensor) -> None:
    assert error(got, want) <= TOLERANCE


def assert_same_stream(got: Stream, want: Stream) -> None:
    assert got.batch == want.batch
    for a, b in zip(got.encoder + got.decoder, want.encoder + want.decoder, strict=True):
        assert_same(a, b) if b.any() else torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- the published file


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of tokenizer.pth."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def res(name: str, i: int, o: int) -> None:
        shapes[f"{name}.residual.0.gamma"] = (i, 1, 1, 1)
        shapes[f"{name}.residual.3.gamma"] = (o, 1, 1, 1)
        conv(f"{name}.residual.2", o, i, 3, 3, 3)
        conv(f"{name}.residual.6", o, o, 3, 3, 3)
        if i != o:
            conv(f"{name}.shortcut", o, i, 1, 1, 1)

    conv("encoder.conv1", 96, 3, 3, 3, 3)
    for n, i, o in ((0, 96, 96), (1, 96, 96), (3, 96, 192), (4, 192, 192), (6, 192, 384)):
        res(f"encoder.downsamples.{n}", i, o)
    for n in (7, 9, 10):
        res(f"encoder.downsamples.{n}", 384, 384)
    for n, c in ((2, 96), (5, 192), (8, 384)):
        conv(f"encoder.downsamples.{n}.resample.1", c, c, 3, 3)
    conv("encoder.downsamples.5.time_conv", 192, 192, 3, 1, 1)
    conv("encoder.downsamples.8.time_conv", 384, 384, 3, 1, 1)
    for side in ("encoder", "decoder"):
        res(f"{side}.middle.0", 384, 384)
        res(f"{side}.middle.2", 384, 384)
        shapes[f"{side}.middle.1.norm.gamma"] = (384, 1, 1)
        conv(f"{side}.middle.1.to_qkv", 1152, 384, 1, 1)
        conv(f"{side}.middle.1.proj", 384, 384, 1, 1)
    shapes["encoder.head.0.gamma"] = (384, 1, 1, 1)
    conv("encoder.head.2", 32, 384, 3, 3, 3)
    conv("conv1", 32, 32, 1, 1, 1)
    conv("conv2", 16, 16, 1, 1, 1)
    conv("decoder.conv1", 384, 16, 3, 3, 3)
    for n in (0, 1, 2, 5, 6):
        res(f"decoder.upsamples.{n}", 384, 384)
    res("decoder.upsamples.4", 192, 384)
    for n, c in ((8, 192), (9, 192), (10, 192), (12, 96), (13, 96), (14, 96)):
        res(f"decoder.upsamples.{n}", c, c)
    for n, c in ((3, 384), (7, 384), (11, 192)):
        conv(f"decoder.upsamples.{n}.resample.1", c // 2, c, 3, 3)
    conv("decoder.upsamples.3.time_conv", 768, 384, 3, 1, 1)
    conv("decoder.upsamples.7.time_conv", 768, 384, 3, 1, 1)
    shapes["decoder.head.0.gamma"] = (96, 1, 1, 1)
    conv("decoder.head.2", 3, 96, 3, 3, 3)
    return shapes


def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        state = WanVAE(PRESETS["wan2.1"]).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == published_shapes()
    assert len(state) == 194
    assert sum(t.numel() for t in state.values()) == 126_892_531


def test_satisfies_the_protocol() -> None:
    vae: Autoencoder = small()
    assert (vae.spatial, vae.temporal, vae.latent_channels) == (8, 4, 4)


# ---------------------------------------------------------------- against diffusers


def reference(vae: WanVAE) -> Any:
    diffusers = pytest.importorskip("diffusers")
    config, state = to_diffusers_vae(vae)
    model = diffusers.AutoencoderKLWan(**{k: v for k, v in config.items() if k[0] != "_"})
    model.load_state_dict(state, strict=True)
    return model.eval()


def assert_parity(vae: WanVAE, frames: Tensor) -> None:
    theirs = reference(vae)
    mean = torch.tensor(vae.config.latent_mean).view(-1, 1, 1, 1)
    std = torch.tensor(vae.config.latent_std).view(-1, 1, 1, 1)
    want = (theirs.encode(frames).latent_dist.mode() - mean) / std
    got, _ = vae.encode(frames)
    assert_same(got, want)
    latents = noise(*want.shape)
    want = theirs.decode(latents * std + mean).sample
    assert (want.abs() < 1).float().mean() > 0.99 and want.std() > 0.05
    got, _ = vae.decode(latents)
    assert_same(got, want)


@pytest.mark.parametrize("frames", [1, 5, 9, 25])
@pytest.mark.parametrize("name", SMALL)
def test_equals_diffusers(name: str, frames: int) -> None:
    size = (24, 16) if frames < 25 else (8, 16)
    assert_parity(small(SMALL[name]), video(2 if frames == 5 else 1, 3, frames, *size))


def test_equals_diffusers_at_the_published_sizes() -> None:
    with torch.device("meta"):
        vae = WanVAE()
    vae.to_empty(device="cpu")
    statistics = WanVAE(dataclasses.replace(PRESETS["tiny"], dim=1, **_published_statistics()))
    vae.latent_mean, vae.latent_inv_std = statistics.latent_mean, statistics.latent_inv_std
    randomise(vae)
    assert_parity(vae, video(1, 3, 5, 16, 16))


def _published_statistics() -> dict[str, Any]:
    names = ("latent_channels", "latent_mean", "latent_std")
    return {name: getattr(PRESETS["wan2.1"], name) for name in names}


@pytest.mark.parametrize("name", SMALL)
def test_diffusers_names_map_both_ways(name: str) -> None:
    blocks = SMALL[name].res_blocks
    for ours in WanVAE(SMALL[name]).state_dict():
        assert from_diffusers_key(to_diffusers_key(ours, blocks), blocks) == ours


@pytest.mark.parametrize("name", SMALL)
def test_diffusers_folder_round_trip(name: str, tmp_path: Any) -> None:
    vae = small(SMALL[name])
    save_diffusers_vae(vae, tmp_path / "vae")
    again = from_diffusers_vae(tmp_path / "vae")
    assert again.config == vae.config
    for key, tensor in vae.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)
    bare = from_diffusers_vae(to_diffusers_vae(vae)[1])
    assert bare.config.multipliers == vae.config.multipliers
    assert torch.equal(bare.state_dict()["conv2.bias"], vae.state_dict()["conv2.bias"])


def test_reads_what_diffusers_writes(tmp_path: Any) -> None:
    vae = small(SMALL["8 channels, 4 latent"])
    theirs = reference(vae)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = from_diffusers_vae(tmp_path)
    assert again.config == vae.config
    for key, tensor in vae.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [("is_residual", True, "is_residual"), ("colour", 1, "colour"), ("z_dim", 5, "latent_mean")],
)
def test_foreign_diffusers_options_raise(
    tmp_path: Any, option: str, value: object, word: str
) -> None:
    save_diffusers_vae(small(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, option: value}))
    with pytest.raises(UserError, match=word):
        from_diffusers_vae(tmp_path)


# ---------------------------------------------------------------- in pieces


@pytest.mark.parametrize("cuts", [(1, 4, 4, 4), (1, 8, 4), (5, 8), (9, 4)])
def test_encode_in_pieces_equals_whole(cuts: tuple[int, ...]) -> None:
    vae, frames = small(), video(2, 3, 13, 16, 8)
    want, want_stream = vae.encode(frames)
    stream, pieces = vae.new_stream(2), []
    for piece in frames.split(cuts, dim=2):
        latents, stream = vae.encode(piece, stream)
        pieces.append(latents)
    assert_same(torch.cat(pieces, dim=2), want)
    assert_same_stream(stream, want_stream)


@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1), (2, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize("name", SMALL)
def test_decode_in_pieces_equals_whole(name: str, cuts: tuple[int, ...]) -> None:
    vae = small(SMALL[name])
    latents = noise(2, vae.latent_channels, 5, 2, 1)
    want, want_stream = vae.decode(latents)
    stream, pieces = vae.new_stream(), []
    for piece in latents.split(cuts, dim=2):
        frames, stream = vae.decode(piece, stream)
        pieces.append(frames)
    assert_same(torch.cat(pieces, dim=2), want)
    assert_same_stream(stream, want_stream)


@pytest.mark.parametrize("window", [2, 3, 16])
def test_window_changes_no_result(window: int) -> None:
    vae, wide = small(), small(dataclasses.replace(PRESETS["tiny"], window=window))
    frames, latents = video(1, 3, 21, 8, 8), noise(1, 4, 6, 1, 1)
    assert_same(wide.encode(frames)[0], vae.encode(frames)[0])
    assert_same(wide.decode(latents)[0], vae.decode(latents)[0])
    assert_same(wide.decode(latents, only="last")[0], vae.decode(latents)[0][:, :, -1:])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 12, 17])
def test_only_last_is_the_last_frame(name: str, before: int, count: int) -> None:
    """Also after earlier calls, and the stream goes on as if everything had been decoded."""
    vae = small(SMALL[name])
    latents = noise(1, vae.latent_channels, before + count + 2, 1, 1)
    start, past = vae.new_stream(), slice(before, before + count)
    if before:
        _, start = vae.decode(latents[:, :, :before], start)
    full, full_stream = vae.decode(latents[:, :, past], start)
    last, stream = vae.decode(latents[:, :, past], start, only="last")
    assert_same(last, full[:, :, -1:])
    # The last 2 inputs of each convolution, none of them left out.
    assert_same_stream(stream, full_stream)
    want, _ = vae.decode(latents[:, :, -2:], full_stream)
    got, _ = vae.decode(latents[:, :, -2:], stream)
    assert_same(got, want)
    last, _ = vae.decode(latents[:, :, -2:], stream, only="last")
    assert_same(last, want[:, :, -1:])


def test_only_last_leaves_frames_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finest level of a 24-frame chunk: 15 frames reach it, its convolutions make 49 of 168."""
    vae = small(WanVAEConfig(dim=8))
    made: dict[str | None, int] = {None: 0, "last": 0}
    only: Any = None

    def count(_: nn.Module, __: Any, out: Tensor) -> None:
        made[only] += out.shape[2]

    _, stream = vae.decode(noise(1, 16, 1, 1, 1))
    for block in (*vae.decoder.upsamples[12:], vae.decoder.head):
        for layer in block.modules():
            if isinstance(layer, nn.Conv3d):
                layer.register_forward_hook(count)
    for only in (None, "last"):
        vae.decode(noise(1, 16, 6, 1, 1), stream, only=only)
    assert made == {None: 7 * 24, "last": 1 + 3 + 5 + 7 + 9 + 11 + 13}


# ---------------------------------------------------------------- streams


def test_copied_clips_equal_fresh_starts() -> None:
    vae, frames = small(), video(2, 3, 5, 8, 8)
    latents, one = vae.encode(frames)
    _, one = vae.decode(latents, one)
    rows = [0, 0, 0, 1, 1, 1]
    group = one.select(rows)
    assert group.batch == 6
    fresh_latents, fresh = vae.encode(frames[rows])
    _, fresh = vae.decode(fresh_latents, fresh)
    assert_same_stream(group, fresh)
    more_frames, more_latents = video(6, 3, 4, 8, 8, seed=5), noise(6, 4, 2, 1, 1, seed=6)
    assert_same(vae.encode(more_frames, group)[0], vae.encode(more_frames, fresh)[0])
    assert_same(vae.decode(more_latents, group)[0], vae.decode(more_latents, fresh)[0])


def test_select_and_cat() -> None:
    """Clips of different age share a batch: one row leaves, a younger one takes its place."""
    vae, latents = small(), noise(3, 4, 5, 1, 1)
    _, old = vae.decode(latents[:2, :, :3])
    _, young = vae.decode(latents[2:, :, :1])
    both = Stream.cat([old.select([1]), young])
    frames, both = vae.decode(torch.stack([latents[1, :, 3:], latents[2, :, 1:3]]), both)
    assert both.batch == 2
    assert_same(frames[:1], vae.decode(latents[1:2])[0][:, :, -8:])
    assert_same(frames[1:], vae.decode(latents[2:, :, :3])[0][:, :, -8:])
    swapped = both.select(torch.tensor([1, 0, 1]))
    assert swapped.batch == 3 and torch.equal(swapped.decoder[0][0], both.decoder[0][1])
    with pytest.raises(ValueError, match="begun"):
        Stream.cat([old, vae.new_stream(1)])
    assert Stream(batch=2).select([0, 0, 1]).batch == 3 and Stream().select([0]).batch is None
    assert Stream.cat([Stream(batch=2), Stream(batch=1)]).batch == 3


def test_nothing_is_written_to_an_old_stream() -> None:
    vae, latents = small(), noise(1, 4, 4, 1, 1)
    _, stream = vae.decode(latents[:, :, :2])
    copy = stream.map(torch.clone)
    first, _ = vae.decode(latents[:, :, 2:], stream)
    vae.decode(latents[:, :, 2:] + 1, stream, only="last")
    assert all(map(torch.equal, stream.decoder, copy.decoder))
    assert torch.equal(vae.decode(latents[:, :, 2:], stream)[0], first)


def test_streams_keep_only_their_own_memory() -> None:
    vae = small()
    _, stream = vae.encode(video(1, 3, 5, 16, 16))
    _, stream = vae.decode(noise(1, 4, 2, 2, 2), stream)
    for slot in stream.encoder + stream.decoder:
        assert slot.untyped_storage().nbytes() == slot.numel() * slot.element_size()


def test_channels_last_and_bfloat16() -> None:
    vae = small()
    frames, latents = video(2, 3, 9, 16, 16), noise(2, 4, 3, 2, 2)
    z, x = vae.encode(frames)[0], vae.decode(latents)[0]
    vae.channels_last()
    got, stream = vae.encode(frames)
    assert_same(got, z)
    got, stream = vae.decode(latents, stream)
    assert_same(got, x)
    for slot in stream.select([0, 0, 1, 1]).decoder[1:]:
        assert slot.is_contiguous(memory_format=torch.channels_last_3d)
    vae.bfloat16()
    got, stream = vae.encode(frames)
    assert got.dtype == torch.bfloat16 and error(got.float(), z) < 0.05
    got, stream = vae.decode(latents, stream)
    assert got.dtype == torch.bfloat16 and error(got.float(), x) < 0.05
    assert {slot.dtype for slot in stream.encoder + stream.decoder} == {torch.bfloat16}


def test_a_decoder_pass_is_one_graph() -> None:
    """A pass has no graph break, so that back ends can capture it whole."""
    vae, latents = small(), noise(1, 4, 2, 1, 1)
    _, slots = vae.decoder(latents[:, :, :1], ())
    want, want_slots = vae.decoder(latents[:, :, 1:], slots)
    whole = torch.compile(vae.decoder, backend="eager", fullgraph=True, dynamic=False)
    got, got_slots = whole(latents[:, :, 1:], slots)
    assert_same(got, want)
    assert_same_stream(Stream((), got_slots), Stream((), want_slots))


@pytest.mark.parametrize(
    ("frames", "stream", "word"),
    [
        (video(1, 3, 4, 8, 8), None, r"1 \+ 4\*n"),
        (video(1, 3, 5, 8, 8), "begun", r"4\*n frames"),
        (video(1, 3, 1, 12, 8), None, "multiples of 8"),
        (video(1, 4, 1, 8, 8), None, r"\[B,3,T,H,W\]"),
        (video(1, 3, 1, 8, 8).byte(), None, "uint8"),
        (video(3, 3, 4, 8, 8), "begun", "3 clips"),
        (video(1, 3, 4, 16, 8), "begun", "size"),
    ],
)
def test_unfit_frames_raise(frames: Tensor, stream: str | None, word: str) -> None:
    vae = small()
    begun = vae.encode(video(1, 3, 1, 8, 8))[1] if stream else None
    with pytest.raises(ValueError, match=word):
        vae.encode(frames, begun)


def test_unfit_latents_and_configs_raise() -> None:
    vae = small()
    with pytest.raises(ValueError, match=r"\[B,4,T,H,W\]"):
        vae.decode(noise(1, 5, 1, 1, 1))
    with pytest.raises(ValueError, match="at least one latent frame"):
        vae.decode(noise(1, 4, 0, 1, 1))
    with pytest.raises(ValueError, match="only"):
        vae.decode(noise(1, 4, 1, 1, 1), only="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="select its rows first"):
        vae.decode(noise(2, 4, 1, 1, 1), vae.new_stream(3))
    with pytest.raises(ValueError, match="latent_mean"):
        WanVAEConfig(latent_channels=4)
    with pytest.raises(ValueError, match="temporal_downsample"):
        WanVAEConfig(multipliers=(1, 2))


# ---------------------------------------------------------------- .pth files


@pytest.mark.parametrize("name", SMALL)
def test_pth_round_trip(name: str, tmp_path: Any) -> None:
    vae = small(dataclasses.replace(SMALL[name]))
    save_wan_vae(vae, tmp_path / "vae.pth")
    again = load_wan_vae(tmp_path / "vae.pth")
    for field in ("dim", "multipliers", "latent_channels", "res_blocks", "temporal_downsample"):
        assert getattr(again.config, field) == getattr(vae.config, field)
    assert again.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(again.state_dict()[k], t) for k, t in vae.state_dict().items())
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    if vae.latent_channels == 16:
        frames = video(1, 3, 5, 8, 8)
        assert torch.equal(again.encode(frames)[0], vae.encode(frames)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["vae.pth"]


def test_bfloat16_file_gives_a_bfloat16_module(tmp_path: Any) -> None:
    save_wan_vae(small().bfloat16(), tmp_path / "vae.pth")
    vae = load_wan_vae(tmp_path / "vae.pth")
    assert vae.latent_mean.dtype == torch.bfloat16
    assert vae.encode(video(1, 3, 1, 8, 8))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file_raises(share: float, tmp_path: Any) -> None:
    path = tmp_path / "vae.pth"
    save_wan_vae(small(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"vae\.pth: .*(truncated|damaged).*again") as caught:
        load_wan_vae(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"weight": torch.zeros(2)}, r"194 missing: .*1 unexpected: weight"),
        ([1, 2], "flat dict of tensors, found list"),
        ({"state_dict": {}}, "entries state_dict"),
        ({}, "194 missing"),
    ],
)
def test_foreign_pth_raises(content: object, word: str, tmp_path: Any) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"x\.pth: .*{word}") as caught:
        load_wan_vae(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


def test_nearly_right_files_name_the_culprit(tmp_path: Any) -> None:
    state = small().state_dict()
    path = tmp_path / "x.pth"
    missing = {k: t for k, t in state.items() if k != "decoder.middle.1.proj.bias"}
    torch.save({**missing, "extra": torch.zeros(1)}, path)
    with pytest.raises(
        UserError, match=r"1 missing: decoder\.middle\.1\.proj\.bias; 1 unexpected: extra"
    ):
        load_wan_vae(path)
    torch.save({**state, "decoder.head.2.weight": torch.zeros(3, 9, 3, 3, 3)}, path)
    with pytest.raises(UserError, match=r"of another shape: decoder\.head\.2\.weight \[3, 9,"):
        load_wan_vae(path)
    torch.save(to_diffusers_vae(small())[1], path)
    with pytest.raises(UserError, match="call from_diffusers_vae"):
        load_wan_vae(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="plain tensors"):
        load_wan_vae(path)
    with pytest.raises(UserError, match="no such file"):
        load_wan_vae(tmp_path / "y.pth")
    with pytest.raises(UserError, match="config.json"):
        from_diffusers_vae(tmp_path)
