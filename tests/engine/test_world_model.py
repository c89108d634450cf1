"""The world model against an independent recompute without any cache, and its contracts.

Tolerances are relative L2 in fp32 unless a test says otherwise.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from worldloop.engine import dit_layers
from worldloop.engine.sampler import STREAMING_TIMES, derive_seed, noise_for, reference_sample
from worldloop.engine.still import keep_still, still_of
from worldloop.engine.world_config import Calibration, TaskRecord
from worldloop.engine.world_model import (
    WorldModel,
    WorldState,
)
from worldloop.errors import UserError

KINDS = ("light", "wan")
EXACT = 2e-6  # measured: below 4e-7


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

    def attend(q: Tensor, k: Tensor, v: Tensor, implementation: str) -> Tensor:
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


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_rollout_equals_full_recompute(small, monkeypatch, kind, steps):
    world = small.world_of(kind)  # 3 chunks of 2 latent frames: the window is never full
    inputs = (small.frames_of(2), small.poses_of(2), small.actions_of(2, 24))
    _, made, _ = small.generate(world, *inputs, (5, 6), steps=steps)
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
    _, made, state = small.generate(world, *inputs, (9,), steps=2)
    expected = recomputed(world, monkeypatch, *inputs, (9,), 2)
    assert state.ring.frames == 13 and state.ring.filled == sink + window
    for a, b in zip(made, expected):
        assert small.relative(a, b) < EXACT
    wide = small.world_of(**{
        f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "window"
    }, window=12)  # fmt: skip
    _, unbounded, _ = small.generate(wide, *inputs, (9,), steps=2)
    assert small.relative(made[-1], unbounded[-1]) > 100 * EXACT  # the window is felt: 0.3


# ---------------------------------------------------------------- fork, select, rows


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
        small.assert_same_chunk(a, b, levels=1)
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
    together, latents, _ = small.generate(world, frames, poses, actions, seeds, steps=steps)
    for rows in ([3], [4, 0, 3]):
        world.reward._forward_pre_hooks.clear()
        alone, own, _ = small.generate(
            world, frames[rows], poses[rows], actions[rows],
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


@pytest.mark.parametrize("kind", KINDS)
def test_join_goes_on_as_the_parts_would(small, kind):
    world = small.world_of(kind)
    frames, poses, actions = small.frames_of(3), small.poses_of(3), small.actions_of(3, 24)
    seeds = (1, 2, 3)

    def first(rows):
        state = world.start(frames[rows], poses[rows], [seeds[row] for row in rows])
        return world.step(state, actions[rows, :8])[1]

    parts, joined = [first([0, 1]), first([2])], WorldState.join([first([0, 1]), first([2])])
    assert joined.seeds == seeds and joined.rows == 3
    for part in (actions[:, 8:16], actions[:, 16:]):
        both, joined = world.step(joined, part)
        for i, rows in enumerate(([0, 1], [2])):
            alone, parts[i] = world.step(parts[i], part[rows])
            np.testing.assert_allclose(both.reward[rows], alone.reward, atol=1e-5, rtol=0)
            assert np.abs(both.frames[rows].astype(int) - alone.frames).max() <= 1
    fresh = world.start(frames[:1], poses[:1], (1,))
    with pytest.raises(UserError, match=r"join: states are at chunks \[3, 0\]"):
        WorldState.join([joined, fresh])


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [4, "reference"])
def test_decode_is_lazy_exactly(small, kind, steps):
    world = small.world_of(kind)
    inputs = (small.frames_of(2), small.poses_of(2), small.actions_of(2, 32), (7, 8))
    all_, _, _ = small.generate(world, *inputs, steps=steps, decode="all")
    policy, _, _ = small.generate(world, *inputs, steps=steps, decode="policy")
    none, _, _ = small.generate(world, *inputs, steps=steps, decode="none")
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
    all_, _, _ = small.generate(world, *inputs, (7,))
    state = world.start(*inputs[:2], (7,))
    for k, decode in enumerate(("none", "policy", "none", "all")):
        chunk, state = world.step(state, inputs[2][:, 8 * k : 8 * k + 8], decode=decode)
    np.testing.assert_array_equal(chunk.frames, all_[3].frames)


def test_frames_are_those_of_one_decode_of_the_whole_clip(small):
    world = small.world_of("wan", still_tolerance=0.0)
    frames = small.frames_of(2)
    inputs = (frames, small.poses_of(2), small.actions_of(2, 24), (1, 2))
    chunks, latents, _ = small.generate(world, *inputs)
    pixels = torch.from_numpy(frames[:, 0]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        first, _ = world.autoencoder.encode(pixels)
        whole, _ = world.autoencoder.decode(torch.cat([first, *latents], 2))
    expected = ((whole + 1) * 127.5).permute(0, 2, 3, 4, 1).numpy()[:, 1:]
    made = np.concatenate([c.frames for c in chunks], 1)[:, :, 0]
    assert np.abs(made - expected).max() < 0.501


def test_what_is_still_keeps_its_recorded_pixels():
    """Of two frames, the second with a square that the start frame's decoding has not."""
    generator = torch.Generator().manual_seed(0)
    recorded, lost = 2 * torch.rand(2, 2, 3, 16, 16, generator=generator) - 1
    decoded = recorded + 0.3 * lost
    pixels = decoded[:, :, None].repeat(1, 1, 2, 1, 1)
    pixels[:, 1:, 1, 4:8, 4:8] += 1.5  # two of three channels
    shown = keep_still(pixels, still_of(recorded, decoded), 0.2)
    torch.testing.assert_close(shown[:, :, 0], recorded)
    torch.testing.assert_close(shown[:, :, 1, 5:7, 5:7], pixels[:, :, 1, 5:7, 5:7])
    torch.testing.assert_close(shown[:, :, 1, 10:], recorded[:, :, 10:])
    share = math.exp(-((0.1 / 0.2) ** 2))
    faded = keep_still(pixels[:, :, :1] + 0.1, still_of(recorded, decoded), 0.2)
    mixed = share * recorded[:, :, None] + (1 - share) * (pixels[:, :, :1] + 0.1)
    torch.testing.assert_close(faded, mixed)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_one_decode_of_the_clip_with_what_is_still(small, kind):
    inputs = (small.frames_of(2), small.poses_of(2), small.actions_of(2, 16), (1, 2))
    made = {}
    for tolerance in (0.0, 0.2, 2.0):
        world = small.world_of(kind, still_tolerance=tolerance)
        chunks, latents, state = small.generate(world, *inputs)
        made[tolerance] = np.concatenate([c.frames for c in chunks], 1)[:, :, 0].astype(float)
    start = inputs[0][:, 0].astype(float)
    near = {t: np.abs(frames - start).mean() for t, frames in made.items()}
    assert near[2.0] < near[0.2] < near[0.0]
    with torch.no_grad():
        pixels = torch.from_numpy(inputs[0][:, 0]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        first, _ = world.autoencoder.encode(pixels)
        clip, _ = world.autoencoder.decode(torch.cat([first, *latents], 2))
    expected = keep_still(clip[:, :, 1:], still_of(pixels[:, :, 0], clip[:, :, 0]), 2.0)
    expected = ((expected + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 4, 1).numpy()
    assert np.abs(made[2.0] - expected).max() < 0.501


def test_a_tolerance_out_of_range_is_named(small):
    with pytest.raises(UserError, match=r"still_tolerance is 3\.0; expected 0 \.\. 2"):
        small.config_of(still_tolerance=3.0)


# ---------------------------------------------------------------- reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("condition_channel", [False, True])
def test_reference_hands_over_the_last_decoded_frame(small, kind, condition_channel):
    config = small.config_of(kind)
    dit = dataclasses.replace(config.dit, condition_channel=condition_channel)
    world = small.world_of(kind, dit=dit)
    frames, poses, actions = small.frames_of(2), small.poses_of(2), small.actions_of(2, 16)
    chunks, latents, state = small.generate(
        world, frames, poses, actions, (1, 2), steps="reference"
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
    with pytest.raises(UserError, match="made by the reference procedure"):
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


def test_a_task_is_judged_by_its_own_rule(small, monkeypatch, tmp_path):
    tasks = (
        TaskRecord("Push-v1", "push", Calibration(0.4, 2, 20, 0.9)),
        TaskRecord("Pull-v1", "pull"),  # not calibrated
    )
    world = small.world_of(held_frames=4, reward_threshold=0.9, tasks=tasks)
    assert world.config.success_rule("push") == (0.4, 2)
    assert world.config.success_rule("pull") == world.config.success_rule() == (0.9, 4)
    rewards = np.full((3, 8), 0.1, np.float32)
    rewards[:, 5:8] = 0.5  # enough for "push" alone
    monkeypatch.setattr(world.reward, "forward", lambda latents: torch.from_numpy(rewards))
    frames, poses, actions = small.frames_of(3), small.poses_of(3), small.actions_of(3, 8)
    state = world.start(frames, poses, (1, 2, 3), ["pull", "push", "lift"])
    state = WorldState.load(state.save(tmp_path / "state"), world)
    state = WorldState.join([state.select([1]), state.select([0, 2])])
    chunk, _ = world.step(state, actions)
    assert chunk.success.any(1).tolist() == [True, False, False]
    assert chunk.success[0].tolist() == [False] * 6 + [True, True]
    with pytest.raises(UserError, match="instructions has 2 entries for 3 start frames"):
        world.start(frames, poses, (1, 2, 3), ["push", "push"])


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
        small.assert_same_chunk(a, b, reward=0.0)
        np.testing.assert_array_equal(state.poses, loaded.poses)


def test_a_chunk_models_state_on_disk(small, tmp_path):
    world = chunk_layout(small)
    actions = small.actions_of(1, 16)
    state = world.start(small.frames_of(1), small.poses_of(1), (1,))
    _, state = world.step(state, actions[:, :8], steps="reference")
    loaded = WorldState.load(state.save(tmp_path / "state"), world)
    a, _ = world.step(state, actions[:, 8:], steps="reference")
    b, _ = world.step(loaded, actions[:, 8:], steps="reference")
    small.assert_same_chunk(a, b, reward=0.0)


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


def test_the_last_chunk_need_not_be_committed(small):
    """The same chunk without the pass that nobody would read; a further step is refused."""
    world = small.world_of()
    frames, poses, actions = small.frames_of(2), small.poses_of(2), small.actions_of(2, 16)
    chunks = []
    for commit in (True, False):
        state = world.start(frames, poses, [1, 2])
        _, state = world.step(state, actions[:, :8])
        chunk, state = world.step(state, actions[:, 8:], commit=commit)
        chunks.append(chunk)
    small.assert_same_chunk(*chunks, levels=0, reward=0)
    with pytest.raises(UserError, match="commit=False; start again"):
        world.step(state, actions[:, :8])


def test_half_precision_weights_run_outside_of_autocast(small):
    """The caller's autocast (for a learner in fp32) neither changes nor slows such a world."""
    world = small.world_of().to(torch.bfloat16)
    frames, poses, actions = small.frames_of(2), small.poses_of(2), small.actions_of(2, 8)
    plain, _ = world.step(world.start(frames, poses, [1, 2]), actions)
    with torch.autocast("cpu", torch.float16):
        within, _ = world.step(world.start(frames, poses, [1, 2]), actions)
        assert torch.is_autocast_enabled("cpu")
    np.testing.assert_array_equal(within.reward, plain.reward)
    np.testing.assert_array_equal(within.frames, plain.frames)
    whole = small.world_of()
    exact, _ = whole.step(whole.start(frames, poses, [1, 2]), actions)
    with torch.autocast("cpu", torch.bfloat16):
        state = whole.start(frames, poses, [1, 2])
        cast, state = whole.step(state, actions)
    assert state.ring.storage.keys[0].dtype == torch.bfloat16, "history stays as computed"
    assert 0 < np.abs(cast.reward - exact.reward).max() < 0.05
