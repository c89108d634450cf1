"""Cosmos checkpoints: written in the published layout, read back; and every way to be wrong."""

import dataclasses
import io

import pytest
import torch
from torch import Tensor

from worldloop.engine.dit import DiT, DiTConfig
from worldloop.engine.formats.cosmos import load_cosmos, save_cosmos, to_cosmos
from worldloop.errors import UserError

RATIO = (3.0, 3.0, 1.0)
CHUNK = DiTConfig(
    width=48,
    depth=2,
    heads=2,
    adaln_rank=8,
    context_dim=20,
    rope_ratio_hwt=RATIO,
    rope_dtype="bfloat16",
    action_dim=7,
    action_layout="chunk",
)


def random_dit(config: DiTConfig, seed: int = 0) -> DiT:
    dit = DiT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in dit.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return dit.eval()


def published_file(dit: DiT, prefix: str = "net.") -> dict[str, object]:
    """The layout of the released files, bookkeeping and TransformerEngine leftovers included."""
    extra: dict[str, object] = {
        "pos_embedder.seq": torch.arange(128.0),
        "pos_embedder.dim_spatial_range": torch.zeros(21),
        "pos_embedder.dim_temporal_range": torch.zeros(22),
        "accum_video_sample_counter": torch.tensor(3),
        "accum_image_sample_counter": torch.tensor(3),
        "accum_iteration": torch.tensor(3),
        "accum_train_in_hours": torch.tensor(1.5),
        "t_embedding_norm._extra_state": torch.zeros(0, dtype=torch.uint8),
        "blocks.0.self_attn.q_norm._extra_state": io.BytesIO(),
        "blocks.0.self_attn.k_norm._extra_state": io.BytesIO(b"state"),
        "blocks.1.self_attn.attn_op._extra_state": None,
    }
    return {**to_cosmos(dit, prefix=prefix), **{prefix + k: v for k, v in extra.items()}}


def load(path, **options):
    return load_cosmos(path, dtype=torch.float32, rope_ratio_hwt=RATIO, **options)


def outputs(dit: DiT, **inputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    poses = dit.config.chunk_actions if dit.config.action_layout == "chunk" else 12
    x = torch.randn(1, 16, 3, 4, 6, generator=generator)
    actions = torch.randn(1, poses, 7, generator=generator) if dit.config.action_dim else None
    with torch.no_grad():
        return dit(x, torch.full((1, 3), 0.4), actions, **inputs).sample


@pytest.mark.parametrize(
    "config",
    [
        CHUNK,
        dataclasses.replace(CHUNK, action_layout="per_frame"),
        dataclasses.replace(
            CHUNK,
            action_layout="per_frame",
            context_proj_dim=30,
            rope_dtype="bfloat16_exponents",
        ),
        dataclasses.replace(CHUNK, action_dim=0, depth=3, heads=4),
        dataclasses.replace(CHUNK, action_dim=0, condition_channel=False),
    ],
    ids=["chunk", "per_frame", "predict2.5", "no_actions", "text_to_image"],
)
def test_load_infers_the_config_and_gives_the_same_outputs(config, tmp_path):
    dit = random_dit(config)
    file = tmp_path / "model.pt"
    torch.save(published_file(dit), file)
    loaded = load(file)
    assert loaded.config == config
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    text = {"context": torch.ones(1, 5, 30)} if config.context_proj_dim else {}
    assert torch.equal(outputs(loaded, **text), outputs(dit, **text))


def test_projected_text_cannot_be_left_out():
    config = dataclasses.replace(CHUNK, context_proj_dim=30)
    dit = random_dit(config)
    with pytest.raises(UserError, match="embedding of its"):
        outputs(dit)
    with torch.no_grad():
        once = dit.crossattn_proj(torch.ones(1, 5, 30))
    assert torch.equal(outputs(dit, context=once), outputs(dit, context=torch.ones(1, 5, 30)))


def test_save_and_load_again(tmp_path):
    dit, file = random_dit(CHUNK), tmp_path / "model.pt"
    save_cosmos(dit, file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert torch.equal(outputs(load(file)), outputs(dit))
    loaded = load_cosmos(file, rope_ratio_hwt=RATIO)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_averaged_weights_are_preferred(tmp_path):
    trained, averaged = random_dit(CHUNK, 1), random_dit(CHUNK, 2)
    file = tmp_path / "both.pt"
    torch.save({**published_file(trained), **published_file(averaged, "net_ema.")}, file)
    assert torch.equal(outputs(load(file)), outputs(averaged))
    assert torch.equal(outputs(load(file, weights="net")), outputs(trained))
    save_cosmos(trained, file)
    with pytest.raises(UserError, match=r"no net_ema\.\* keys; load weights='net'"):
        load(file, weights="ema")


def changed(key: str, value: object = None):
    """The published layout with one key replaced, or removed."""

    def change(state: dict[str, object]) -> None:
        state.pop(key, None)
        if value is not None:
            state[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("net.blocks.1.mlp.layer2.weight"), "missing key blocks.1.mlp.layer2.weight"),
        (changed("net.x_embedder.proj.1.weight"), "missing key x_embedder.proj.1.weight"),
        (changed("net.blocks.0.lora.weight", torch.zeros(2)), "unexpected key blocks.0.lora"),
        (changed("optimizer", torch.zeros(2)), "unexpected key optimizer"),
        (changed("net.t_embedding_norm.weight", "text"), "is a str; expected a tensor"),
        (
            changed("net.final_layer.adaln_modulation.2.weight", torch.zeros(96, 9)),
            r"adaln_modulation.2.weight has shape \[96, 9\]; expected \[96, 8\]",
        ),
        (
            changed("net.action_embedder_B_D.fc1.weight", torch.zeros(192, 70)),
            r"takes 70 values; expected 12\*7 \(whole chunk\) or 4\*7",
        ),
        (changed("net.x_embedder.proj.1.weight", torch.zeros(48, 80)), "takes 80 values"),
    ],
)
def test_a_foreign_state_dict_is_refused_by_name(change, message, tmp_path):
    state = published_file(random_dit(CHUNK))
    change(state)
    file = tmp_path / "odd.pt"
    torch.save(state, file)
    with pytest.raises(UserError, match=message) as caught:
        load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


class Payload:
    """A pickled object of a class of our own: code, as far as a loader is concerned."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("absent", "no such file"),
        ("noise", "not a PyTorch checkpoint, or cut short"),
        ("truncated", "not a PyTorch checkpoint, or cut short"),
        ("damaged", "unreadable as a checkpoint"),
        ("code", "unreadable as a checkpoint of plain tensors .*Payload"),
        ("list", "no flat dictionary"),
        ("other", "no keys with prefix 'net.'"),
        ("width", "width 48 is none of"),
    ],
)
def test_a_bad_file_gets_one_line_naming_it(content, message, tmp_path):
    file = tmp_path / "bad.pt"
    dit = random_dit(CHUNK)
    if content == "noise":
        file.write_bytes(b"\x80\x02not a checkpoint" * 50)
    elif content == "truncated":
        save_cosmos(dit, file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif content == "damaged":
        save_cosmos(dit, file)
        data = bytearray(file.read_bytes())
        data[60:400] = bytes(340)  # inside the archive's table of tensors
        file.write_bytes(data)
    elif content == "code":
        torch.save({"net.x": Payload()}, file)
    elif content == "list":
        torch.save([torch.zeros(2)], file)
    elif content == "other":
        torch.save({"model.weight": torch.zeros(2)}, file)
    elif content == "width":
        save_cosmos(dit, file)
    with pytest.raises(UserError, match=message) as caught:
        load_cosmos(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_learned_positions_have_no_place_in_the_layout():
    with pytest.raises(UserError, match="learned_positions"):
        to_cosmos(DiT(dataclasses.replace(CHUNK, learned_positions=(2, 3))))
