"""World models on disk, published weights, presets, and what is said of bad input."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from worldloop.checkpoint import load_checkpoint
from worldloop.config import config_from_dict, config_to_dict
from worldloop.engine.dit_config import DiTConfig
from worldloop.engine.formats.cosmos import save_cosmos
from worldloop.engine.formats.diffusers import config_to_diffusers, to_diffusers
from worldloop.engine.formats.wan import save_diffusers_vae, save_wan_vae
from worldloop.engine.light_vae import LightVAEConfig, load_autoencoder
from worldloop.engine.vae import PRESETS as WAN_PRESETS
from worldloop.engine.vae import WanVAE, WanVAEConfig
from worldloop.engine.world_config import preset as preset_of
from worldloop.engine.world_config import published_actions
from worldloop.engine.world_model import (
    PRESETS,
    WorldModel,
    WorldModelConfig,
)
from worldloop.errors import UserError
from worldloop.types import ActionSpec

KINDS = ("light", "wan")


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_comes_back_bit_for_bit(small, tmp_path, kind):
    world = small.world_of(kind, env_ids=("PushCube-v1", "PullCube-v1"), trained_steps=7)
    if kind == "light":
        autoencoder = dataclasses.replace(
            world.config.autoencoder, latent_mean=(0.1,) * 16, latent_std=(2.5,) * 16
        )
        world = small.world_of(kind, autoencoder=autoencoder)
    world.save(tmp_path / "world")
    back = WorldModel.from_pretrained(tmp_path / "world")
    assert back.config == world.config and not back.training
    own, theirs = world.state_dict(), back.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[k], theirs[k]) for k in own)
    assert all(p.requires_grad for p in back.dit.parameters())
    inputs = (small.frames_of(1), small.poses_of(1), small.actions_of(1, 16), (1,))
    a, _, _ = small.generate(world, *inputs)
    b, _, _ = small.generate(back, *inputs)
    for x, y in zip(a, b):
        small.assert_same_chunk(x, y, reward=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_configs_survive_json(small, kind):
    config = small.config_of(kind, env_ids=("a", "b"))
    text = json.dumps(config_to_dict(config))
    back = config_from_dict(WorldModelConfig, json.loads(text))
    assert back == config
    assert type(back.autoencoder) is (LightVAEConfig if kind == "light" else WanVAEConfig)
    assert isinstance(back.dit.learned_positions, tuple) and isinstance(back.env_ids, tuple)
    assert back.action_spec.controller == config.action_spec.controller


def test_bf16_runs_and_stays_near(small, tmp_path):
    for kind in KINDS:
        world = small.world_of(kind)
        world.save(tmp_path / kind)
        low = WorldModel.from_pretrained(tmp_path / kind, dtype=torch.bfloat16)
        assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
        inputs = (small.frames_of(2), small.poses_of(2), small.actions_of(2, 16), (1, 2))
        a, _, _ = small.generate(world, *inputs)
        b, _, _ = small.generate(low, *inputs)
        assert np.abs(a[1].frames.astype(int) - b[1].frames).mean() < 8
        for steps in (1, "reference"):
            small.generate(low, *inputs, steps=steps)


def broken(path: Path, how: str) -> Path:
    """A copy of a checkpoint with one thing wrong."""
    copy = path.with_name(f"{path.name}-{how}")
    shutil.copytree(path, copy)
    config = copy / "config.json"
    document = json.loads(config.read_text())
    if how == "truncated":
        file = copy / "dit.safetensors"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "absent":
        (copy / "reward.safetensors").unlink()
    elif how == "foreign":
        torch.save({"a": torch.zeros(3)}, copy / "dit.safetensors")
    elif how == "part":
        del document["files"]["autoencoder"]
    elif how == "unknown":
        document["config"]["dit"]["wdith"] = 64
    elif how == "size":
        document["config"]["dit"]["depth"] = 3
    elif how == "disagree":
        document["config"]["dit"]["latent_channels"] = 8
    elif how == "kind":
        document["kind"] = "policy"
    config.write_text("{" if how == "json" else json.dumps(document))
    return copy


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"dit\.safetensors: truncated"),
        ("absent", r"reward\.safetensors: no such file"),
        ("foreign", r"dit\.safetensors: not a safetensors file"),
        ("part", r"foreign.*|has no 'autoencoder' weights"),
        ("unknown", r"dit\.wdith: unknown key"),
        ("size", r"\(dit\): does not fit DiT: .*missing: blocks\.2"),
        ("disagree", r"dit\.latent_channels is 8; autoencoder\.latent_channels is 16"),
        ("kind", r"config\.json: kind is 'policy', expected 'world_model'"),
        ("json", r"config\.json: not valid JSON"),
    ],
)
def test_broken_checkpoints_give_one_clear_error(small, tmp_path, how, message):
    path = broken(small.world_of().save(tmp_path / "world"), how)
    with pytest.raises(UserError, match=message) as caught:
        WorldModel.from_pretrained(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="preset is '3b'; known: tiny, 2b, 14b"):
        preset_of("3b")
    with pytest.raises(UserError, match="shipped preset"):
        WorldModel.from_pretrained("no-such-model")
    with pytest.raises(UserError, match=r"no config\.json"):
        WorldModel.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no such file"):
        load_autoencoder(tmp_path / "nowhere")


# ---------------------------------------------------------------- bad input


def bad(array: np.ndarray, place, value) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


def test_bad_start_frames_and_poses_are_named(small):
    world = small.world_of()
    frames, poses = small.frames_of(2), small.poses_of(2)
    cases = [
        (frames.astype(np.float32), poses, (1, 2), r"frames is float32"),
        (frames[:, 0], poses, (1, 2), r"frames is uint8 \[2, 1, 32, 32, 3\]"),
        (frames[:, :, :, :16], poses, (1, 2), r"frames is .* expected uint8 \[B,1,1,32,32,3\]"),
        (frames[:0], poses[:0], (), r"frames is uint8 \[0"),
        (frames.tolist(), poses, (1, 2), r"frames is a list"),
        (frames, poses[:1], (1, 2), r"poses has shape \[1, 7\]; expected \[2, 7\]"),
        (frames, poses[:, :6], (1, 2), r"poses has shape"),
        (frames, poses.astype(int), (1, 2), r"poses has dtype int64"),
        (frames, bad(poses, (1, 2), np.nan), (1, 2), r"poses\[1,2\] \(z\) is nan"),
        (frames, bad(poses, (0, 6), np.inf), (1, 2), r"poses\[0,6\] \(gripper\) is inf"),
        (frames, poses, (1,), r"seeds has 1 entries for 2"),
    ]
    for f, p, seeds, message in cases:
        with pytest.raises(UserError, match=message):
            world.start(f, p, seeds)


def test_bad_actions_and_options_are_named_and_leave_the_state_usable(small):
    world = small.world_of()
    actions = small.actions_of(2, 8)
    state = world.start(small.frames_of(2), small.poses_of(2), (1, 2))
    cases = [
        (actions[:, :4], {}, r"actions has shape \[2, 4, 7\]; expected \[2, 8, 7\]"),
        (actions[:1], {}, r"actions has shape \[1, 8, 7\]"),
        (actions[..., :6], {}, r"actions has shape"),
        (actions[0], {}, r"actions has shape"),
        (actions.astype(int), {}, r"actions has dtype int64"),
        (bad(actions, (1, 3, 0), np.nan), {}, r"actions\[1,3,0\] \(x\) is nan"),
        (bad(actions, (0, 7, 6), 1.5), {}, r"actions\[0,7,6\] \(gripper\) is 1.5, outside"),
        (actions, {"decode": "some"}, r"decode is 'some'"),
        (actions, {"steps": 3}, r"steps is 3; expected 1, 2, 4 or 'reference'"),
        (actions, {"steps": "fast"}, r"steps is 'fast'"),
    ]
    for a, options, message in cases:
        with pytest.raises(ValueError, match=message):
            world.step(state, a, **options)
    world.step(state, actions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 1}, "window is 1 latent frames; a chunk has 2"),
        ({"window": 0}, "window is 0"),
        ({"sink": -1}, "sink is -1"),
        ({"held_frames": 0}, "held_frames is 0"),
        ({"reward_threshold": 1.5}, "reward_threshold is 1.5"),
    ],
)
def test_configs_are_checked(small, changes, message):
    with pytest.raises(UserError, match=message):
        small.config_of(**changes)


def test_parts_that_disagree_are_named(small):
    config = small.config_of()
    dit, reward = config.dit, config.reward
    cases = [
        ({"dit": dataclasses.replace(dit, action_dim=6)}, "dit.action_dim is 6; action_spec.dim"),
        ({"dit": dataclasses.replace(dit, learned_positions=(4, 4))}, "dit.learned_positions"),
        ({"dit": dataclasses.replace(dit, actions_per_frame=2)}, "dit.actions_per_frame is 2"),
        ({"dit": dataclasses.replace(dit, action_layout="chunk")}, "action_spec.chunk is 8"),
        ({"reward": dataclasses.replace(reward, frames_per_latent=1)}, "reward.frames_per_latent"),
        ({"reward": dataclasses.replace(reward, latent_channels=4)}, "reward.latent_channels"),
        ({"action_spec": dataclasses.replace(small.SPEC, chunk=6)}, "must be a multiple of 4"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            dataclasses.replace(config, **changes)


# ---------------------------------------------------------------- presets, published weights


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_presets_have_the_published_sizes():
    models = {}
    for name, build in PRESETS.items():
        with torch.device("meta"):
            models[name] = WorldModel(build())
    assert count(models["2b"].dit) == 2_024_923_136
    assert count(models["2b"].autoencoder) == 126_892_531
    assert count(models["14b"].autoencoder) == 126_892_531
    with torch.device("meta"):
        plain = type(models["14b"].dit)(dataclasses.replace(models["14b"].config.dit, action_dim=0))
    hidden, out = 4 * 5120, 5120 + 3 * 5120
    embedder = 2 * (84 * hidden + hidden) + hidden * out + out
    assert count(models["14b"].dit) == count(plain) + embedder
    for name in ("2b", "14b"):
        world = models[name]
        assert world.config.picture == (480, 640)
        assert not world.streams and world.block == 3
        assert config_from_dict(WorldModelConfig, config_to_dict(world.config)) == world.config
    assert models["tiny"].streams and models["tiny"].block == 6
    assert models["tiny"].config.picture == (128, 128)
    total = sum(count(part) for part in models["tiny"].children())
    assert total * 2 < 25e6  # half precision, the whole of it


def test_the_2b_preset_streams_with_poses_per_frame():
    config = PRESETS["2b"]()
    streaming = dataclasses.replace(
        config,
        dit=dataclasses.replace(config.dit, action_layout="per_frame"),
        action_spec=dataclasses.replace(config.action_spec, chunk=24),
    )
    with torch.device("meta"):
        world = WorldModel(streaming)
    assert world.streams and world.block == 6


def published_dit(**changes) -> DiTConfig:
    return DiTConfig(**{
        "width": 48, "depth": 2, "heads": 2, "adaln_rank": 8, "context_dim": 16,
        "latent_channels": 4, "rope_ratio_hwt": (3.0, 3.0, 1.0), "rope_dtype": "bfloat16",
        "action_dim": 7, **changes,
    })  # fmt: skip


def published_parts(small, **changes):
    vae = WanVAE(WAN_PRESETS["tiny"])
    dit = small.world_of().dit.__class__(published_dit(**changes))
    small.randomise(vae, 2, 1.5)
    small.randomise(dit, 1)
    return dit.eval(), vae.eval()


OPTIONS = {
    "picture": (32, 32), "dtype": torch.float32, "rope_ratio_hwt": (3.0, 3.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["chunk", "per_frame"])
def test_cosmos_files_become_a_world_model(small, tmp_path, layout):
    dit, vae = published_parts(small, action_layout=layout)
    save_cosmos(dit, tmp_path / "model.pt")
    save_wan_vae(vae, tmp_path / "tokenizer.pth")
    world = WorldModel.from_cosmos(
        tmp_path / "model.pt", tmp_path / "tokenizer.pth", action_spec=published_actions(),
        **OPTIONS,
    )  # fmt: skip
    assert world.config.dit == dit.config and world.config.autoencoder == vae.config
    for own, loaded in ((dit, world.dit), (vae, world.autoencoder)):
        theirs = loaded.state_dict()
        assert all(torch.equal(t, theirs[k]) for k, t in own.state_dict().items())
    state = world.start(small.frames_of(1), small.poses_of(1), (1,))
    actions = small.actions_of(1, 12)
    for _ in range(2):
        chunk, state = world.step(state, actions, steps="reference")
        assert chunk.frames.shape == (1, 12, 1, 32, 32, 3)
        assert (chunk.reward == 0.5).all()  # no head yet
    if layout == "per_frame":
        world.step(world.start(small.frames_of(1), small.poses_of(1), (1,)), actions, steps=4)
    back = WorldModel.from_pretrained(world.save(tmp_path / "ours"))
    assert back.config == world.config


def test_published_actions_reach_the_embedder_times_20(small):
    dit, vae = published_parts(small)
    spec = published_actions()
    actions = small.actions_of(1, 12)
    seen = []
    dit.action_embedder_B_D.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    config = small.config_of("wan", dit=dit.config, autoencoder=vae.config, action_spec=spec)
    world = WorldModel(config, dit, vae)
    world.step(world.start(small.frames_of(1), small.poses_of(1), (1,)), actions, steps="reference")
    factor = np.array([20] * 6 + [1], np.float32)
    np.testing.assert_allclose(seen[0].reshape(12, 7), actions[0] * factor, rtol=1e-6)


def test_diffusers_folders_become_a_world_model(small, tmp_path):
    dit, vae = published_parts(small, action_dim=0, rope_dtype="float32")
    folder = tmp_path / "pipeline"
    (folder / "transformer").mkdir(parents=True)
    from safetensors.torch import save_file

    state = {k: t.contiguous() for k, t in to_diffusers(dit.state_dict()).items()}
    save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    values = {**config_to_diffusers(dit.config), "_class_name": "CosmosTransformer3DModel"}
    (folder / "transformer" / "config.json").write_text(json.dumps(values))
    save_diffusers_vae(vae, folder / "vae")
    parts = (folder / "transformer", folder / "vae")
    options = {"action_spec": small.SPEC, "picture": (32, 32), "dtype": torch.float32}
    with pytest.raises(UserError, match="transformer: has no action embedder"):
        WorldModel.from_cosmos(*parts, **options)
    world = WorldModel.from_cosmos(*parts, **options, new_actions=True)
    # The new embedder puts out zeros: same numbers as the network without one.
    x, t = torch.randn(1, 4, 3, 4, 4), torch.tensor([0.3])
    with torch.no_grad():
        expected = dit(x, t).sample
        made = world.dit(x, t, torch.randn(1, 8, 7), observed_frames=1).sample
    assert small.relative(made, expected) < 1e-6
    for steps in (4, "reference"):
        state = world.start(small.frames_of(1), small.poses_of(1), (1,))
        chunk, _ = world.step(state, small.actions_of(1, 8), steps=steps)
        assert chunk.frames.shape[1] == 8


def test_published_files_that_do_not_fit_are_refused(small, tmp_path):
    dit, vae = published_parts(small)
    save_cosmos(dit, tmp_path / "model.pt")
    save_wan_vae(vae, tmp_path / "tokenizer.pth")
    good = (tmp_path / "model.pt", tmp_path / "tokenizer.pth")
    spec = published_actions()

    def load(parts=good, action_spec=spec, **changes):
        return WorldModel.from_cosmos(*parts, action_spec=action_spec, **{**OPTIONS, **changes})

    with pytest.raises(UserError, match="picture: height is 24; expected a multiple of 16"):
        load(picture=(24, 32))
    with pytest.raises(UserError, match=r"model\.pt: .*takes 84 values"):
        load(action_spec=ActionSpec(chunk=24))
    with pytest.raises(UserError, match=r"tokenizer\.pth: no keys with prefix"):
        load(parts=(good[1], good[0]))
    with pytest.raises(UserError, match=r"no\.pt: no such file"):
        load(parts=(tmp_path / "no.pt", good[1]))
    with pytest.raises(UserError, match=r"no\.pth"):
        load(parts=(good[0], tmp_path / "no.pth"))
    reward = small.world_of().reward  # made for 16 channels
    with pytest.raises(UserError, match=r"reward\.latent_channels is 16"):
        load(reward=reward)
    raw = good[1].read_bytes()
    good[1].write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match=r"tokenizer\.pth"):
        load()


def test_an_autoencoder_comes_from_its_own_checkpoint_or_a_world_model(small, tmp_path):
    world = small.world_of()
    world.save(tmp_path / "world")
    inside = load_autoencoder(tmp_path / "world")
    for name, value in world.autoencoder.state_dict().items():
        assert torch.equal(inside.state_dict()[name], value), name
    (tmp_path / "other").mkdir()
    text = (tmp_path / "world/config.json").read_text()
    (tmp_path / "other/config.json").write_text(text.replace('"world_model"', '"policy"'))
    with pytest.raises(UserError, match="kind is 'policy', expected 'light_vae'"):
        load_autoencoder(tmp_path / "other")
    assert load_checkpoint(tmp_path / "world").parts.keys() == {"dit", "reward", "autoencoder"}
