"""RolloutEngine: seeds, batches, groups, early stops and what is recorded."""

import dataclasses
import threading

import numpy as np
import pytest
import torch

from worldloop.engine.policy.base import Observation, PolicyAction, ReplayPolicy
from worldloop.engine.rollout import RolloutEngine
from worldloop.engine.sampler import derive_seed, noise_for
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.types import ActionSpec, Rollout, Starts

T = 24  # three chunks of eight


def starts_of(small, rows: int) -> Starts:
    return Starts(
        small.frames_of(rows), small.poses_of(rows), tuple(f"task {i}" for i in range(rows))
    )


def replay(small, rows: int) -> ReplayPolicy:
    return ReplayPolicy(small.actions_of(rows, T), small.SPEC)


class SamplingPolicy:
    """Actions of what it sees and of each row's own noise; records what it was shown."""

    reads_frames = True

    def __init__(self, spec: ActionSpec) -> None:
        self.action_spec = spec
        self.seen: list[Observation] = []

    def act(self, observation: Observation, seed: int) -> PolicyAction:
        self.seen.append(observation)
        seeds = [derive_seed(seed, episode) for episode in observation.episodes]
        noise = noise_for(seeds, (self.action_spec.chunk, 7)).numpy()
        light = observation.frames.astype(np.float32).mean((1, 2, 3, 4, 5)) / 255
        actions = np.clip(0.3 * noise + (light - 0.5)[:, None, None], -1, 1)
        tokens = np.round((actions + 1) * 127.5).astype(np.int64)
        return PolicyAction(actions, tokens, -np.abs(noise))


def same(a: Rollout, b: Rollout, rows=slice(None), frames: int = 1) -> None:
    """Rollout a is the given rows of b; frames may differ by one of 255 levels."""
    np.testing.assert_allclose(a.reward, b.reward[rows], rtol=0, atol=1e-4)
    np.testing.assert_allclose(a.actions, b.actions[rows], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(a.seeds, b.seeds[rows])
    np.testing.assert_array_equal(a.valid, b.valid[rows])
    if b.frames is None:
        assert a.frames is None
    else:
        assert np.abs(a.frames.astype(int) - b.frames[rows]).max() <= frames


@pytest.mark.parametrize("kind", ["light", "wan"])
@pytest.mark.parametrize("decode", ["all", "policy", "none"])
def test_what_comes_back(small, kind, decode):
    starts = starts_of(small, 2)
    policy = replay(small, 4)
    engine = RolloutEngine(small.world_of(kind), policy)
    out = engine.rollout(starts, horizon=T, group_size=2, seed=5, decode=decode)
    count = {"all": 1 + T, "policy": 3, "none": None}[decode]
    if count is None:
        assert out.frames is None
    else:
        assert out.frames.shape == (4, count, 1, small.SIDE, small.SIDE, 3)
        np.testing.assert_array_equal(out.frames[:, :1], np.repeat(starts.frames, 2, 0))
    assert out.reward.shape == (4, T) and out.reward.dtype == np.float32
    assert ((out.reward > 0) & (out.reward < 1)).all()
    assert out.valid.all() and out.valid.shape == (4, T)
    np.testing.assert_array_equal(out.actions, policy.actions)
    assert out.group_id.tolist() == [0, 0, 1, 1]
    assert out.instructions == ("task 0", "task 0", "task 1", "task 1")
    np.testing.assert_array_equal(out.start_pose, np.repeat(starts.poses, 2, 0))
    assert out.seeds.tolist() == [derive_seed(5, g, m) for g in range(2) for m in range(2)]
    assert out.action_tokens is None and out.logprobs is None
    assert out.timings["total"] > 0 and {"dit", "commit", "reward", "policy"} <= set(out.timings)


@pytest.mark.parametrize("kind", ["light", "wan"])
def test_policy_frames_are_those_of_all(small, kind):
    engine = RolloutEngine(small.world_of(kind), replay(small, 2))
    starts = starts_of(small, 2)
    everything = engine.rollout(starts, horizon=T, seed=1, decode="all")
    policy = engine.rollout(starts, horizon=T, seed=1, decode="policy")
    none = engine.rollout(starts, horizon=T, seed=1, decode="none")
    np.testing.assert_array_equal(policy.frames, everything.frames[:, :-1:8])
    np.testing.assert_array_equal(policy.reward, everything.reward)
    np.testing.assert_array_equal(none.reward, everything.reward)


@pytest.mark.parametrize("steps", [1, 2, 4, "reference"])
def test_every_sampler_runs(small, steps):
    engine = RolloutEngine(small.world_of(), replay(small, 1), steps=steps)
    out = engine.rollout(starts_of(small, 1), horizon=T, decode="all")
    assert np.isfinite(out.reward).all() and out.frames[:, 1:].std() > 5


@pytest.mark.parametrize("kind", ["light", "wan"])
@pytest.mark.parametrize("max_batch", [2, 3, 4])
def test_max_batch_changes_nothing(small, kind, max_batch):
    world = small.world_of(kind)
    starts = starts_of(small, 3)
    for policy in (replay(small, 6), SamplingPolicy(small.SPEC)):
        options = {"horizon": T, "group_size": 2, "seed": 3, "decode": "policy"}
        engine = RolloutEngine(world, policy)
        whole = engine.rollout(starts, **options)
        parts = engine.rollout(starts, **options, max_batch=max_batch)
        same(parts, whole, frames=2)  # a policy that looks at frames amplifies a level
        assert parts.group_id.tolist() == whole.group_id.tolist()
        assert parts.instructions == whole.instructions


def test_an_episode_does_not_depend_on_the_others(small):
    world = small.world_of()
    starts = starts_of(small, 3)
    actions = small.actions_of(3, T)
    whole = RolloutEngine(world, ReplayPolicy(actions, small.SPEC)).rollout(starts, horizon=T)
    changed = Starts(
        np.concatenate([starts.frames[:1], 255 - starts.frames[1:]]), starts.poses,
        starts.instructions,
    )  # fmt: skip
    others = actions.copy()
    others[1:] *= -1
    again = RolloutEngine(world, ReplayPolicy(others, small.SPEC)).rollout(changed, horizon=T)
    np.testing.assert_allclose(again.reward[0], whole.reward[0], atol=1e-5, rtol=0)
    assert np.abs(again.frames[0].astype(int) - whole.frames[0]).max() <= 1
    assert np.abs(again.reward[1:] - whole.reward[1:]).max() > 1e-3
    alone = RolloutEngine(world, ReplayPolicy(actions[:1], small.SPEC)).rollout(
        starts.select([0]), horizon=T
    )
    np.testing.assert_allclose(alone.reward[0], whole.reward[0], atol=1e-5, rtol=0)


def test_members_have_their_own_noise_unless_it_is_shared(small):
    actions = np.repeat(small.actions_of(2, T), 3, 0)  # the members of a group act alike
    engine = RolloutEngine(small.world_of(), ReplayPolicy(actions, small.SPEC))
    starts = starts_of(small, 2)
    own = engine.rollout(starts, horizon=T, group_size=3, seed=1)
    shared = engine.rollout(starts, horizon=T, group_size=3, seed=1, share_noise=True)
    for first in (0, 3):
        group = shared.reward[first : first + 3]
        np.testing.assert_allclose(group, np.repeat(group[:1], 3, 0), atol=1e-5, rtol=0)
        assert np.unique(shared.seeds[first : first + 3]).size == 1
        assert np.unique(own.seeds[first : first + 3]).size == 3
        spread = own.reward[first : first + 3]
        assert np.abs(spread[1:] - spread[0]).max(1).min() > 1e-3
    np.testing.assert_allclose(own.reward[[0, 3]], shared.reward[[0, 3]], atol=1e-5, rtol=0)
    other = engine.rollout(starts, horizon=T, group_size=3, seed=2)
    assert not np.intersect1d(other.seeds, own.seeds).size
    assert np.abs(other.reward - own.reward).max() > 1e-3


def test_the_policy_sees_what_is_recorded(small):
    policy = SamplingPolicy(small.SPEC)
    world = small.world_of("wan")
    starts = starts_of(small, 2)
    out = RolloutEngine(world, policy).rollout(starts, horizon=T, group_size=2, decode="all")
    poses = small.SPEC.to_absolute(out.actions, out.start_pose)
    for k, seen in enumerate(policy.seen):
        np.testing.assert_array_equal(seen.frames, out.frames[:, 8 * k : 8 * k + 1])
        expected = out.start_pose if k == 0 else poses[:, 8 * k - 1]
        np.testing.assert_allclose(seen.poses, expected, atol=1e-6, rtol=0)
        assert seen.chunk == k and seen.episodes == (0, 1, 2, 3)
        assert seen.instructions == out.instructions
    assert out.action_tokens.shape == out.actions.shape == out.logprobs.shape
    assert out.action_tokens.dtype == np.int64
    np.testing.assert_array_equal(out.action_tokens, np.round((out.actions + 1) * 127.5))


def test_policy_noise_differs_from_chunk_to_chunk_and_from_world_noise(small):
    seeds = []

    class Recorder(SamplingPolicy):
        def act(self, observation, seed):
            seeds.append(seed)
            return super().act(observation, seed)

    engine = RolloutEngine(small.world_of(), Recorder(small.SPEC))
    out = engine.rollout(starts_of(small, 4), horizon=T, group_size=4, seed=9)
    assert len(set(seeds)) == 3
    assert not set(seeds) & {int(s) for s in out.seeds}


# ---------------------------------------------------------------- early stops


def engineered(small, monkeypatch, rewards: np.ndarray, members: int = 1) -> WorldModel:
    """A world whose reward is a table [episodes,T]: found by each row's seed and its chunk."""
    world = small.world_of()
    by_seed = {derive_seed(0, *divmod(b, members)): row for b, row in enumerate(rewards)}
    step = world.step

    def scripted(state, actions, **options):
        part = np.stack([by_seed[s][8 * state.chunk : 8 * state.chunk + 8] for s in state.seeds])
        monkeypatch.setattr(world.reward, "forward", lambda latents: torch.from_numpy(part))
        return step(state, actions, **options)

    monkeypatch.setattr(world, "step", scripted)
    return world


def test_stop_on_success_drops_rows_and_leaves_the_others_alone(small, monkeypatch):
    rewards = np.full((4, T), 0.2, np.float32)
    rewards[1, 2:5] = 0.95  # succeeds in the first chunk
    rewards[3, 15:18] = 0.95  # held only in the third: nothing is left to stop
    rewards[2, 12:14] = 0.95  # in the second
    rewards[0, [1, 9]] = 0.95  # never twice in a row
    world = engineered(small, monkeypatch, rewards)
    policy = SamplingPolicy(small.SPEC)
    engine = RolloutEngine(world, policy)
    starts = starts_of(small, 4)
    whole = engine.rollout(starts, horizon=T, decode="all")
    policy.seen.clear()
    stopped = engine.rollout(starts, horizon=T, decode="all", stop_on_success=True)
    assert [o.episodes for o in policy.seen] == [(0, 1, 2, 3), (0, 2, 3), (0, 3)]
    # Valid up to the action whose frame made the success, the second in a row above the threshold.
    assert stopped.valid.sum(1).tolist() == [24, 4, 14, 17] and whole.valid.all()
    assert (np.diff(stopped.valid.astype(int), axis=1) <= 0).all()
    assert stopped.success.tolist() == whole.success.tolist() == [False, True, True, True]
    for b, n in enumerate((24, 8, 16, 24)):
        np.testing.assert_array_equal(stopped.reward[b, :n], rewards[b, :n])
        np.testing.assert_allclose(stopped.actions[b, :n], whole.actions[b, :n], atol=1e-4, rtol=0)
        frames = stopped.frames[b, : n + 1].astype(int) - whole.frames[b, : n + 1]
        assert np.abs(frames).max() <= 2
        assert not stopped.valid[b, n:].any()
        assert not stopped.reward[b, n:].any() and not stopped.actions[b, n:].any()
        assert not stopped.frames[b, n + 1 :].any()
        assert not stopped.action_tokens[b, n:].any()


def test_nothing_runs_once_all_have_succeeded(small, monkeypatch):
    rewards = np.full((2, T), 0.99, np.float32)
    policy = SamplingPolicy(small.SPEC)
    engine = RolloutEngine(engineered(small, monkeypatch, rewards), policy)
    out = engine.rollout(starts_of(small, 2), horizon=T, stop_on_success=True)
    assert len(policy.seen) == 1 and out.success.all()
    assert out.valid.sum(1).tolist() == [2, 2]


# ---------------------------------------------------------------- branches


@pytest.mark.parametrize("max_batch", [None, 13])
def test_a_group_parts_where_it_is_told(small, max_batch):
    """(3, 2, 2): a row is what it would be alone up to where it parts from the first one like it;
    chunks that rows share are imagined once."""
    policy = SamplingPolicy(small.SPEC)
    engine = RolloutEngine(small.world_of(), policy)
    options = {"horizon": T, "group_size": 12, "decode": "all", "seed": 5}
    flat = engine.rollout(starts_of(small, 2), **options)
    policy.seen.clear()
    tree = engine.rollout(starts_of(small, 2), **options, branching=(3, 2, 2), max_batch=max_batch)
    rows = [(o.chunk, len(o.episodes)) for o in policy.seen]
    assert [sum(n for c, n in rows if c == chunk) for chunk in range(3)] == [6, 12, 24]
    assert max(n for _, n in rows) <= (max_batch or 24)
    for chunk, width in enumerate((4, 2, 1)):
        times = slice(chunk * 8, (chunk + 1) * 8)
        nodes = tree.actions[:, times].reshape(24 // width, width, -1)
        assert (nodes == nodes[:, :1]).all()
        assert len(np.unique(nodes[:, 0], axis=0)) == 24 // width
        seen = tree.frames[:, 1:][:, times].reshape(24 // width, width, -1)
        assert (seen == seen[:, :1]).all()
        firsts = slice(None, None, width)  # these have been the first of all that they were like
        if chunk == 0:
            np.testing.assert_allclose(
                tree.actions[firsts, :8], flat.actions[firsts, :8], atol=1e-4
            )
    leaders = [0, 4, 8, 12, 16, 20]  # never anyone's copy
    same(tree.select(np.array(leaders)), flat, rows=leaders, frames=2)


def test_a_success_ends_all_rows_that_share_it(small, monkeypatch):
    rewards = np.full((4, T), 0.2, np.float32)
    rewards[2, 2:5] = 0.95  # the second of two first chunks
    policy = SamplingPolicy(small.SPEC)
    world = engineered(small, monkeypatch, rewards, members=4)
    tree = RolloutEngine(world, policy).rollout(
        starts_of(small, 1), horizon=T, group_size=4, branching=(2, 2), stop_on_success=True
    )
    assert [o.episodes for o in policy.seen] == [(0, 2), (0, 1), (0, 1)]
    assert tree.success.tolist() == [False, False, True, True]
    assert tree.valid.sum(1).tolist() == [24, 24, 4, 4]


# ---------------------------------------------------------------- continuous batching


def test_a_waiting_episode_takes_a_slot_as_soon_as_it_is_free(small, monkeypatch):
    rewards = np.full((5, T), 0.2, np.float32)
    rewards[0, 2:5] = 0.95  # leaves after its first chunk
    policy = SamplingPolicy(small.SPEC)
    engine = RolloutEngine(engineered(small, monkeypatch, rewards), policy)
    starts = starts_of(small, 5)
    options = {"horizon": T, "decode": "all", "stop_on_success": True}
    whole = engine.rollout(starts, **options)
    policy.seen.clear()
    refilled = engine.rollout(starts, **options, max_batch=2)
    # Row 2 begins when row 0 is over, 3 when 1 is, and so on: nobody waits for the slower of two.
    turns = [(o.chunk, o.episodes) for o in policy.seen]
    assert turns == [
        (0, (0, 1)), (1, (1,)), (0, (2,)), (2, (1,)), (1, (2,)), (0, (3,)), (2, (2,)), (1, (3,)),
        (0, (4,)), (2, (3,)), (1, (4,)), (2, (4,)),
    ]  # fmt: skip
    same(refilled, whole, frames=2)
    assert refilled.success.tolist() == [True] + [False] * 4


@pytest.mark.parametrize("max_batch", [None, 4])
def test_the_policy_may_act_beside_the_world(small, max_batch):
    """Same episodes; the policy is called in one other thread, under the caller's autocast."""
    starts, where = starts_of(small, 3), []

    class Watched(SamplingPolicy):
        def act(self, observation, seed):
            precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else 0
            where.append((threading.get_ident(), precision, observation.episodes))
            return super().act(observation, seed)

    engine = RolloutEngine(small.world_of(), Watched(small.SPEC))
    options = {"horizon": T, "group_size": 2, "seed": 3, "decode": "policy"}
    alone = engine.rollout(starts, **options)
    where.clear()
    beside = engine.rollout(starts, **options, max_batch=max_batch, overlap=True)
    same(beside, alone, frames=2)
    threads = {thread for thread, _, _ in where}
    assert len(threads) == 1 and threads != {threading.get_ident()}
    halves = [(0, 1, 2, 3), (4, 5)] if max_batch is None else [(0, 1), (2, 3)]
    assert [episodes for _, _, episodes in where[:2]] == halves
    assert {precision for _, precision, _ in where} == {0}
    with torch.autocast("cpu", torch.bfloat16):
        engine.rollout(starts, **options, overlap=True)
    assert where[-1][1] is torch.bfloat16


def test_an_error_in_the_policys_thread_comes_out(small):
    class Broken(SamplingPolicy):
        def act(self, observation, seed):
            raise UserError("the policy server is gone")

    engine = RolloutEngine(small.world_of(), Broken(small.SPEC))
    with pytest.raises(UserError, match="the policy server is gone"):
        engine.rollout(starts_of(small, 2), horizon=T, overlap=True)


# ---------------------------------------------------------------- bad input


def test_specs_that_mean_different_things_are_named(small):
    world = small.world_of()
    for changes, message in (
        ({"control_hz": 10.0}, "control_hz: 20.0 here, 10.0 there"),
        ({"gripper": "close_positive"}, "gripper"),
        ({"kind": "absolute_pose"}, "kind: 'delta_pose' here, 'absolute_pose' there"),
        ({"low": (-2.0,) * 7}, "low"),
        ({"chunk": 12}, "chunks of 8 actions, the policy gives 12"),
    ):
        spec = dataclasses.replace(small.SPEC, **changes)
        with pytest.raises(ValueError, match=message):
            RolloutEngine(world, ReplayPolicy(small.actions_of(1, T), spec))
    fitted = dataclasses.replace(small.SPEC, controller=None, pose_mean=(0.0,) * 7)
    RolloutEngine(world, ReplayPolicy(small.actions_of(1, T), fitted))  # statistics may differ


def test_bad_options_are_named(small):
    engine = RolloutEngine(small.world_of(), replay(small, 2))
    starts = starts_of(small, 2)
    for options, message in (
        ({"horizon": 20}, "horizon is 20; expected a multiple of 8"),
        ({"horizon": 0}, "horizon is 0"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 4, "max_batch": 3}, "max_batch"),
        ({"max_batch": 0}, "max_batch"),
        ({"group_size": 4, "branching": (2, 3)}, "branching is 2 3; expected at most 3 numbers"),
        ({"group_size": 4, "branching": (2, 2, 1, 1)}, "branching is 2 2 1 1; expected at most 3"),
        ({"decode": "some"}, "decode is 'some'"),
        ({"horizon": 48}, "episodes of 24 actions"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.rollout(starts, **{"horizon": T, **options})
    with pytest.raises(ValueError, match="steps is 3"):
        RolloutEngine(small.world_of(), replay(small, 2), steps=3)
    blind = RolloutEngine(small.world_of(), SamplingPolicy(small.SPEC))
    with pytest.raises(ValueError, match="decode is 'none', but the policy looks at frames"):
        blind.rollout(starts, horizon=T, decode="none")
    with pytest.raises(ValueError, match=r"actions\[0,2,1\] \(y\) is nan"):
        actions = small.actions_of(1, T)
        actions[0, 2, 1] = np.nan
        ReplayPolicy(actions, small.SPEC)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("actions", np.full((2, 8, 7), np.nan, np.float32), "nan"),
        ("actions", np.zeros((2, 4, 7), np.float32), r"actions has shape \[2, 4, 7\]"),
        ("tokens", np.zeros((2, 8), np.int64), r"tokens has shape \[2, 8\]; expected \[2, 8, 7\]"),
        ("logprobs", np.zeros((1, 8, 7), np.float32), r"logprobs has shape \[1, 8, 7\]"),
    ],
)
def test_what_a_policy_returns_is_checked(small, name, value, message):
    class Wrong(SamplingPolicy):
        def act(self, observation, seed):
            return dataclasses.replace(super().act(observation, seed), **{name: value})

    engine = RolloutEngine(small.world_of(), Wrong(small.SPEC))
    with pytest.raises(ValueError, match=message):
        engine.rollout(starts_of(small, 2), horizon=T)


def test_progress_counts_frames(small):
    from worldloop.track import Progress

    engine = RolloutEngine(small.world_of(), replay(small, 4))
    with Progress(4 * T, "imagine", every=1e9) as progress:
        engine.rollout(starts_of(small, 2), horizon=T, group_size=2, progress=progress)
        assert progress.count == 4 * T
