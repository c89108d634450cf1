"""The world model against an independent recompute without any cache, and its contracts.

Tolerances are relative L2 in fp32 unless a test says otherwise.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from worldloop.checkpoint import load_checkpoint
from worldloop.config import config_from_dict, config_to_dict
from worldloop.engine import dit_layers
from worldloop.engine.dit_config import DiTConfig
from worldloop.engine.formats.cosmos import save_cosmos
from worldloop.engine.formats.diffusers import config_to_diffusers, to_diffusers
from worldloop.engine.formats.wan import save_diffusers_vae, save_wan_vae
from worldloop.engine.light_vae import LightVAEConfig
from worldloop.engine.sampler import STREAMING_TIMES, derive_seed, noise_for, reference_sample
from worldloop.engine.vae import PRESETS as WAN_PRESETS
from worldloop.engine.vae import WanVAE, WanVAEConfig
from worldloop.engine.world_config import preset as preset_of
from worldloop.engine.world_config import published_actions
from worldloop.engine.world_model import (
    PRESETS,
    WorldModel,
    WorldModelConfig,
    WorldState,
    load_autoencoder,
)
from worldloop.errors import UserError
from worldloop.types import ActionSpec

KINDS = ("light", "wan")
EXACT = 2e-5


# ---------------------------------------------------------------- an independent recompute


def visible(first: int, block: int, frames: int, sink: int, window: int) -> Tensor:
    """Which latent frames each one sees [frames,frames]: its own block, the sink, the window."""
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    mask[0, 0] = True
    for q in range(first, frames):
        start = first + (q - first) // block * block
        mask[q, start : start + block] = True
        mask[q, :sink] = True
        mask[q, max(0, start - window) : start] = True
    return mask


def masked_pass(world, monkeypatch, x: Tensor, t: Tensor, poses: Tensor, mask: Tensor) -> Tensor:
    """One call over all frames since the start, without a cache, under a block mask; x0."""
    tokens = (x.shape[3] // 2) * (x.shape[4] // 2)
    expanded = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        return scores.masked_fill(~expanded, -torch.inf).softmax(-1) @ v

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(dit_layers, "attend", attend)
        out = world.dit(x, t, poses, observed_frames=1, return_kv=False).sample
    if world.config.dit.prediction == "sample":
        return out
    return x - t[:, None, :, None, None] * out


def recomputed(world, monkeypatch, frames, poses, actions, seeds, steps) -> list[Tensor]:
    """The latents of every chunk, from the definition: no ring, no stream, no state."""
    spec, block = world.action_spec, world.block
    pixels = torch.from_numpy(frames[:, 0]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        clean, _ = world.autoencoder.encode(pixels)
    absolute = spec.to_absolute(actions, poses)  # the whole episode at once
    scaled = (absolute - np.array(spec.pose_mean)) / np.array(spec.pose_std)
    conditioning = torch.from_numpy(scaled.astype(np.float32))
    chunks = []
    for k in range(actions.shape[1] // spec.chunk):
        total = clean.shape[2] + block
        mask = visible(1, block, total, world.config.sink, world.config.window)
        shape = (clean.shape[1], block, *clean.shape[3:])
        noise = noise_for([derive_seed(seed, k) for seed in seeds], shape)
        x_t = x0 = noise
        for t, t_next in zip(STREAMING_TIMES[steps], (*STREAMING_TIMES[steps][1:], None)):
            levels = torch.zeros(len(seeds), total)
            levels[:, -block:] = t
            x = torch.cat([clean, x_t], 2)
            part = conditioning[:, : (k + 1) * spec.chunk]
            x0 = masked_pass(world, monkeypatch, x, levels, part, mask)[:, :, -block:]
            if t_next is not None:
                x_t = (1 - t_next) * x0 + t_next * noise
        clean = torch.cat([clean, x0], 2)
        chunks.append(x0)
    return chunks


def generate(world, small, frames, poses, actions, seeds, **options):
    """(chunks, latents) of a rollout through start and step."""
    latents = small.Latents(world)
    state = world.start(frames, poses, seeds)
    out = []
    T = world.action_spec.chunk
    for k in range(actions.shape[1] // T):
        chunk, state = world.step(state, actions[:, k * T : (k + 1) * T], **options)
        out.append(chunk)
    return out, latents.chunks, state


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_rollout_equals_full_recompute(small, monkeypatch, kind, steps):
    world = small.world_of(kind)  # 3 chunks of 2 latent frames: the window is never full
    inputs = (small.frames_of(2), small.poses_of(2), small.actions_of(2, 24))
    _, made, _ = generate(world, small, *inputs, (5, 6), steps=steps)
    expected = recomputed(world, monkeypatch, *inputs, (5, 6), steps)
    assert len(made) == len(expected) == 3
    for a, b in zip(made, expected):
        assert b.std() > 0.1
        assert small.relative(a, b) < EXACT


@pytest.mark.parametrize(("sink", "window"), [(1, 2), (1, 3), (0, 4), (2, 2)])
@pytest.mark.parametrize("prediction", ["sample", "velocity"])
def test_overwriting_the_ring_equals_a_sliding_window(small, monkeypatch, sink, window, prediction):
    config = small.config_of(sink=sink, window=window)
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, prediction=prediction))
    world = small.world_of(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    inputs = (small.frames_of(1), small.poses_of(1), small.actions_of(1, 48))  # 12 latent frames
    _, made, state = generate(world, small, *inputs, (9,), steps=2)
    expected = recomputed(world, monkeypatch, *inputs, (9,), 2)
    assert state.ring.frames == 13 and state.ring.filled == sink + window
    for a, b in zip(made, expected):
        assert small.relative(a, b) < EXACT
    wide = small.world_of(**{
        f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "window"
    }, window=12)  # fmt: skip
    _, unbounded, _ = generate(wide, small, *inputs, (9,), steps=2)
    assert small.relative(made[-1], unbounded[-1]) > 100 * EXACT  # the window is felt


# ---------------------------------------------------------------- fork, select, rows


def assert_same_chunk(a, b, levels: int = 0, reward: float = 1e-5) -> None:
    np.testing.assert_allclose(a.reward, b.reward, rtol=0, atol=reward)
    if a.frames is None:
        assert b.frames is None
    else:
        difference = np.abs(a.frames.astype(int) - b.frames.astype(int))
        assert difference.max() <= levels


@pytest.mark.parametrize("kind", KINDS)
def test_fork_equals_fresh_starts(small, kind):
    world = small.world_of(kind)
    frames, poses, actions = small.frames_of(2), small.poses_of(2), small.actions_of(6, 16)
    seeds = (11, 12, 13, 21, 22, 23)
    forked = world.start(frames, poses, (0, 0)).fork(3, seeds)
    fresh = world.start(np.repeat(frames, 3, 0), np.repeat(poses, 3, 0), seeds)
    assert forked.seeds == fresh.seeds
    for k in range(2):
        part = actions[:, 8 * k : 8 * (k + 1)]
        a, forked = world.step(forked, part)
        b, fresh = world.step(fresh, part)
        assert_same_chunk(a, b, levels=1)
        assert small.relative(forked.last_latent, fresh.last_latent) < EXACT
    assert np.unique(a.reward, axis=0).shape[0] == 6  # six different episodes


def test_fork_in_mid_episode_leaves_the_original_untouched(small):
    world = small.world_of("wan")
    actions = small.actions_of(1, 16)
    _, state = world.step(world.start(small.frames_of(1), small.poses_of(1), (3,)), actions[:, :8])
    copies = state.fork(2)
    assert copies.seeds == (3, 3)
    a, _ = world.step(copies, np.repeat(actions[:, 8:], 2, 0))
    b, _ = world.step(state, actions[:, 8:])
    np.testing.assert_array_equal(a.frames[0], a.frames[1])
    np.testing.assert_allclose(a.reward[:1], b.reward, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="spent|already holds"):
        world.step(state, actions[:, 8:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [2, "reference"])
def test_a_row_does_not_depend_on_its_batch(small, kind, steps):
    world = small.world_of(kind)
    frames, poses, actions = small.frames_of(5), small.poses_of(5), small.actions_of(5, 16)
    seeds = (1, 2, 3, 4, 5)
    together, latents, _ = generate(world, small, frames, poses, actions, seeds, steps=steps)
    for rows in ([3], [4, 0, 3]):
        world.reward._forward_pre_hooks.clear()
        alone, own, _ = generate(
            world, small, frames[rows], poses[rows], actions[rows],
            [seeds[r] for r in rows], steps=steps,
        )  # fmt: skip
        for a, b, x, y in zip(alone, together, own, latents):
            np.testing.assert_allclose(a.reward, b.reward[rows], atol=1e-5, rtol=0)
            assert np.abs(a.frames.astype(int) - b.frames[rows]).max() <= 1
            assert small.relative(x, y[rows]) < 10 * EXACT


def test_select_reorders_rows(small):
    world = small.world_of()
    frames, poses, actions = small.frames_of(3), small.poses_of(3), small.actions_of(3, 8)
    state = world.start(frames, poses, (1, 2, 3))
    picked, _ = world.step(state.select([2, 0]), actions[[2, 0]])
    whole, _ = world.step(state, actions)
    np.testing.assert_allclose(picked.reward, whole.reward[[2, 0]], atol=1e-5, rtol=0)
    for rows in ([], [3], [-1]):
        with pytest.raises(UserError, match="select"):
            state.select(rows)
    for wrong in ({"n": 0}, {"n": 2, "seeds": (1, 2, 3)}):
        with pytest.raises(UserError, match="fork"):
            state.fork(**wrong)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [4, "reference"])
def test_decode_is_lazy_exactly(small, kind, steps):
    world = small.world_of(kind)
    inputs = (small.frames_of(2), small.poses_of(2), small.actions_of(2, 32), (7, 8))
    all_, _, _ = generate(world, small, *inputs, steps=steps, decode="all")
    policy, _, _ = generate(world, small, *inputs, steps=steps, decode="policy")
    none, _, _ = generate(world, small, *inputs, steps=steps, decode="none")
    assert all_[0].frames.shape == (2, 8, 1, small.SIDE, small.SIDE, 3)
    assert all_[0].frames.std() > 5
    for a, p, n in zip(all_, policy, none):
        np.testing.assert_array_equal(p.frames, a.frames[:, -1:])
        assert n.frames is None
        np.testing.assert_array_equal(p.reward, a.reward)
        np.testing.assert_array_equal(n.reward, a.reward)


def test_changing_decode_between_chunks_changes_no_frame(small):
    world = small.world_of("wan")
    inputs = (small.frames_of(1), small.poses_of(1), small.actions_of(1, 32))
    all_, _, _ = generate(world, small, *inputs, (7,))
    state = world.start(*inputs[:2], (7,))
    for k, decode in enumerate(("none", "policy", "none", "all")):
        chunk, state = world.step(state, inputs[2][:, 8 * k : 8 * k + 8], decode=decode)
    np.testing.assert_array_equal(chunk.frames, all_[3].frames)


def test_frames_are_those_of_one_decode_of_the_whole_clip(small):
    world = small.world_of("wan")
    frames = small.frames_of(2)
    inputs = (frames, small.poses_of(2), small.actions_of(2, 24), (1, 2))
    chunks, latents, _ = generate(world, small, *inputs)
    pixels = torch.from_numpy(frames[:, 0]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        first, _ = world.autoencoder.encode(pixels)
        whole, _ = world.autoencoder.decode(torch.cat([first, *latents], 2))
    expected = ((whole + 1) * 127.5).permute(0, 2, 3, 4, 1).numpy()[:, 1:]
    made = np.concatenate([c.frames for c in chunks], 1)[:, :, 0]
    assert np.abs(made - expected).max() < 0.501


# ---------------------------------------------------------------- reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("condition_channel", [False, True])
def test_reference_hands_over_the_last_decoded_frame(small, kind, condition_channel):
    config = small.config_of(kind)
    dit = dataclasses.replace(config.dit, condition_channel=condition_channel)
    world = small.world_of(kind, dit=dit)
    frames, poses, actions = small.frames_of(2), small.poses_of(2), small.actions_of(2, 16)
    chunks, latents, state = generate(
        world, small, frames, poses, actions, (1, 2), steps="reference"
    )
    spec = world.action_spec
    absolute = spec.to_absolute(actions, poses)
    scaled = ((absolute - np.array(spec.pose_mean)) / np.array(spec.pose_std)).astype(np.float32)
    shown = frames[:, 0]
    for k in range(2):
        pixels = torch.from_numpy(shown).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        with torch.no_grad():
            observed, _ = world.autoencoder.encode(pixels)
        shape = (observed.shape[1], 2, *observed.shape[3:])
        noise = noise_for([derive_seed(1, k), derive_seed(2, k)], shape)
        noise = torch.cat([torch.zeros_like(observed), noise], 2)
        part = torch.from_numpy(scaled[:, 8 * k : 8 * k + 8])
        mask = torch.zeros(2, 1, 3, 4, 4)
        mask[:, :, 0] = 1

        def denoise(x_t, t, part=part, mask=mask):
            given = {"condition_mask_B1FHW": mask} if condition_channel else {}
            with torch.no_grad():
                return world.dit(x_t, t, part, observed_frames=1, **given).sample

        sample = reference_sample(denoise, noise, observed=observed)
        assert small.relative(latents[k], sample[:, :, 1:]) < EXACT
        with torch.no_grad():
            decoded, _ = world.autoencoder.decode(sample)
        levels = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 4, 1).numpy()
        made = chunks[k].frames[:, :, 0]
        assert (np.abs(made + 0.5 - levels[:, 1:]) <= 0.5 + 1e-2).all()  # truncated, not rounded
        shown = chunks[k].frames[:, -1]
    pixels = torch.from_numpy(shown).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        handed, _ = world.autoencoder.encode(pixels)
    assert torch.equal(state.last_latent, handed)


def test_streaming_cannot_continue_a_reference_episode(small):
    world = small.world_of()
    state = world.start(small.frames_of(1), small.poses_of(1), (1,))
    _, state = world.step(state, small.actions_of(1, 8), steps="reference")
    with pytest.raises(UserError, match="begun with the reference procedure"):
        world.step(state, small.actions_of(1, 8), steps=4)


def chunk_layout(small) -> WorldModel:
    config = small.config_of()
    dit = dataclasses.replace(config.dit, action_layout="chunk", chunk_actions=8)
    return small.world_of(dit=dit)


def test_a_chunk_model_is_for_the_reference_procedure_only(small):
    world = chunk_layout(small)
    state = world.start(small.frames_of(2), small.poses_of(2), (1, 2))
    with pytest.raises(UserError, match='only be sampled with steps="reference"'):
        world.step(state, small.actions_of(2, 8), steps=4)
    actions = small.actions_of(2, 8)
    chunk, state = world.step(state, actions, steps="reference")
    assert chunk.frames.shape[1] == 8
    other, _ = world.step(
        world.start(small.frames_of(2), small.poses_of(2), (1, 2)), -actions, steps="reference"
    )
    assert np.abs(other.reward - chunk.reward).max() > 1e-4  # it follows the actions
    state.fork(2)


# ---------------------------------------------------------------- success, poses


def test_success_needs_consecutive_frames_also_across_chunks(small, monkeypatch):
    world = small.world_of(held_frames=3)
    rewards = np.full((2, 16), 0.5, np.float32)
    rewards[0, 6:9] = 0.95  # held over the border of the chunks
    rewards[1, [3, 4, 6, 7, 10]] = 0.99  # never three in a row
    parts = iter((rewards[:, :8], rewards[:, 8:]))
    monkeypatch.setattr(world.reward, "forward", lambda latents: torch.from_numpy(next(parts)))
    state = world.start(small.frames_of(2), small.poses_of(2), (1, 2))
    a, state = world.step(state, small.actions_of(2, 8))
    assert not a.success.any() and not a.terminated.any() and not a.truncated.any()
    b, state = world.step(state, small.actions_of(2, 8))
    assert b.success[0].tolist() == [True] + [False] * 7
    assert b.terminated.tolist() == [True, False] == state.done.tolist()


@pytest.mark.parametrize("taps", [1, 3, 12])  # 12: longer than a chunk
def test_poses_follow_the_controller_across_chunks(small, taps):
    gains = tuple(0.02 / (k + 1) for k in range(taps))
    controller = dataclasses.replace(
        small.SPEC.controller, position_taps=gains, rotation_taps=gains
    )
    world = WorldModel(small.with_spec(small.config_of(), controller=controller))
    poses, actions = small.poses_of(2), small.actions_of(2, 32)
    expected = world.action_spec.to_absolute(actions, poses)
    state = world.start(small.frames_of(2), poses, (1, 2))
    for k in range(4):
        _, state = world.step(state, actions[:, 8 * k : 8 * k + 8], steps=1, decode="none")
        np.testing.assert_allclose(state.poses, expected[:, 8 * k + 7], atol=1e-6, rtol=0)


# ---------------------------------------------------------------- states on disk


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [0, 1, 4])  # after four the ring has wrapped
def test_a_loaded_state_continues_the_original(small, tmp_path, kind, chunks):
    world = small.world_of(kind)
    actions = small.actions_of(2, 48)
    state = world.start(small.frames_of(2), small.poses_of(2), (2**62 + 1, 3))
    for k in range(chunks):
        _, state = world.step(state, actions[:, 8 * k : 8 * k + 8])
    state.save(tmp_path / "state")
    loaded = WorldState.load(tmp_path / "state", world)
    assert (loaded.seeds, loaded.cursor, loaded.chunk) == (state.seeds, state.cursor, state.chunk)
    for k in range(chunks, chunks + 2):
        part = actions[:, 8 * k : 8 * k + 8]
        a, state = world.step(state, part)
        b, loaded = world.step(loaded, part)
        assert_same_chunk(a, b, reward=0.0)
        np.testing.assert_array_equal(state.poses, loaded.poses)


def test_a_chunk_models_state_on_disk(small, tmp_path):
    world = chunk_layout(small)
    actions = small.actions_of(1, 16)
    state = world.start(small.frames_of(1), small.poses_of(1), (1,))
    _, state = world.step(state, actions[:, :8], steps="reference")
    loaded = WorldState.load(state.save(tmp_path / "state"), world)
    a, _ = world.step(state, actions[:, 8:], steps="reference")
    b, _ = world.step(loaded, actions[:, 8:], steps="reference")
    assert_same_chunk(a, b, reward=0.0)


def test_states_that_do_not_fit_are_refused(small, tmp_path):
    world = small.world_of()
    folder = world.start(small.frames_of(1), small.poses_of(1), (1,)).save(tmp_path / "state")
    with pytest.raises(UserError, match="window"):
        WorldState.load(folder, small.world_of(window=4))
    with pytest.raises(UserError, match="last_latent"):
        WorldState.load(folder, small.world_of("wan"))
    with pytest.raises(UserError, match="kind is 'world_state'"):
        WorldModel.from_pretrained(folder)
    weights = folder / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"state\.safetensors: truncated"):
        WorldState.load(folder, world)
    document = json.loads((folder / "config.json").read_text())
    del document["config"]["cursor"]
    (folder / "config.json").write_text(json.dumps(document))
    weights.unlink()
    with pytest.raises(UserError, match=r"state\.safetensors"):
        WorldState.load(folder, world)


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
    a, _, _ = generate(world, small, *inputs)
    b, _, _ = generate(back, small, *inputs)
    for x, y in zip(a, b):
        assert_same_chunk(x, y, reward=0.0)


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
        a, _, _ = generate(world, small, *inputs)
        b, _, _ = generate(low, small, *inputs)
        assert np.abs(a[1].frames.astype(int) - b[1].frames).mean() < 8
        for steps in (1, "reference"):
            generate(low, small, *inputs, steps=steps)


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


def test_an_autoencoder_checkpoint_without_weights_is_named(small, tmp_path):
    world = small.world_of()
    world.save(tmp_path / "world")
    with pytest.raises(UserError, match="kind is 'world_model', expected 'light_vae'"):
        load_autoencoder(tmp_path / "world")
    assert load_checkpoint(tmp_path / "world").parts.keys() == {"dit", "reward", "autoencoder"}
