"""Environments of rows: the world model, and the simulator's adapter on a stand-in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.rl.envs import tasks
from worldloop.rl.envs.simulators import SimulatorVectorEnv, reset_in_view
from worldloop.rl.envs.vector import ChunkVectorEnv
from worldloop.rl.envs.world import WorldVectorEnv
from worldloop.types import ActionSpec, Starts

if TYPE_CHECKING:
    from tests.rl.conftest import PointSim

HORIZON = 24
Make = Callable[..., ChunkVectorEnv]


@pytest.fixture(params=["world", "simulator"])
def make(
    request: pytest.FixtureRequest,
    small_world: WorldModel,
    pool: Starts,
    point_sim: type[PointSim],
) -> Make:
    """Both kinds of environment, with chunks of 8 and pictures of 32 pixels."""

    def build(num_envs: int = 3, **options: Any) -> ChunkVectorEnv:
        options = {"horizon": HORIZON, **options}
        if request.param == "world":
            return WorldVectorEnv(small_world, pool, num_envs, **options)
        return SimulatorVectorEnv(
            "PushCube-v1", num_envs, image_size=32, action_spec=ActionSpec(chunk=8),
            simulator=point_sim, **options,
        )  # fmt: skip

    return build


def actions_of(env: ChunkVectorEnv, seed: int) -> npt.NDArray[np.float32]:
    shape = env.action_space.shape
    return np.random.default_rng(seed).uniform(-0.9, 0.9, shape).astype(np.float32)


def still(env: ChunkVectorEnv, forward: Sequence[float] = ()) -> npt.NDArray[np.float32]:
    """Zero actions; ``forward[b]`` is row b's command along x."""
    actions = np.zeros(env.action_space.shape, np.float32)
    for row, command in enumerate(forward):
        actions[row, :, 0] = command
    return actions


class OneRow(gymnasium.Env):
    """Row 0 of an environment as gymnasium's checkers want it."""

    def __init__(self, env: ChunkVectorEnv) -> None:
        self.env = env
        self.metadata, self.render_mode = env.metadata, "rgb_array"
        self.spec = EnvSpec("OneRow-v0", entry_point=lambda **_: self)
        self.observation_space = env.single_observation_space
        self.action_space = env.single_action_space

    @property
    def _np_random(self) -> Any:
        return self.env._np_random

    @_np_random.setter
    def _np_random(self, value: Any) -> None:
        pass

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        obs, infos = self.env.reset(seed=seed, options=options)
        return self.row(obs), self.row(infos)

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, infos = self.env.step(action[None])
        return (
            self.row(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]),
            self.row(infos),
        )  # fmt: skip

    def render(self) -> Any:
        return self.env.render()[0]

    @staticmethod
    def row(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value[0] for name, value in values.items()}


# ------------------------------------------------------------- both kinds


def test_spaces_and_shapes(make: Make) -> None:
    env = make(3)
    assert env.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert env.single_action_space.shape == (8, 7)
    assert env.single_action_space.dtype == np.float32
    assert env.action_space == batch_space(env.single_action_space, 3)
    assert env.observation_space == batch_space(env.single_observation_space, 3)
    obs, infos = env.reset(seed=1)
    assert obs in env.observation_space
    assert obs["frame"].shape == (3, 32, 32, 3) and obs["frame"].dtype == np.uint8
    assert obs["pose"].shape == (3, 7) and obs["pose"].dtype == np.float32
    assert infos["instruction"].shape == (3,) and infos["instruction"].dtype == object
    obs, reward, terminated, truncated, infos = env.step(actions_of(env, 1))
    assert obs in env.observation_space
    assert reward.dtype == np.float32 and terminated.dtype == truncated.dtype == np.bool_
    assert reward.shape == terminated.shape == truncated.shape == (3,)
    assert infos["reward_frames"].shape == infos["success_frames"].shape == (3, 8)
    assert infos["chunk"].tolist() == [1, 1, 1]
    pictures = env.render()
    assert len(pictures) == 3 and (np.stack(pictures) == obs["frame"]).all()
    env.close()


@pytest.mark.filterwarnings("ignore:.*Box (min|low|max|high).*")
def test_gymnasiums_own_checker(make: Make, recwarn: pytest.WarningsRecorder) -> None:
    check_env(OneRow(make(1)))
    ours = [str(w.message) for w in recwarn if "gymnasium" in str(w.filename)]
    assert [text for text in ours if "infinity" not in text] == []


def test_same_seed_same_episode(make: Make) -> None:
    first, again, other = ([], [], [])
    env, second = make(3), make(3)
    for record, place, seed in ((first, env, 5), (again, second, 5), (other, env, 6)):
        record.append(place.reset(seed=seed))
        for k in range(2):
            record.append(place.step(actions_of(env, k)))
    assert data_equivalence(first, again, exact=True)
    assert not data_equivalence(first, other)
    a, _ = env.reset()  # goes on from seed 6
    second.reset(seed=6)
    b, _ = second.reset()
    assert data_equivalence(a, b, exact=True)


def test_a_list_of_seeds_is_a_seed_for_each_row(make: Make) -> None:
    env, one = make(3), make(1)
    starts = np.array([4, 2, 7])
    obs, _ = env.reset(seed=[31, 32, 33], options={"starts": starts})
    obs, *_ = env.step(actions_of(env, 0))
    for row in range(3):
        one.reset(seed=31 + row, options={"starts": starts[row : row + 1]})
        alone, *_ = one.step(actions_of(env, 0)[row : row + 1])
        difference = np.abs(alone["frame"][0].astype(int) - obs["frame"][row])
        assert difference.max() <= 1
        np.testing.assert_allclose(alone["pose"][0], obs["pose"][row], atol=1e-6)


def test_reset_of_a_row_leaves_the_others_alone(make: Make) -> None:
    """Row 1 begins again twice; rows 0 and 2 go on as if nothing had happened."""
    starts = np.array([3, 1, 5])
    env, undisturbed = make(3, stop_on_success=False), make(3, stop_on_success=False)
    for each in (env, undisturbed):
        each.reset(seed=[7, 8, 9], options={"starts": starts})
        each.step(actions_of(env, 0))
    mask = np.array([False, True, False])
    others = np.array([-99, 6, -99])  # not looked at outside the mask
    before = env.reset(seed=[1, 1, 1], options={"reset_mask": mask, "starts": others})[0]
    obs, infos = env.reset(seed=[None, 2, None], options={"reset_mask": mask, "starts": others})
    for row in (0, 2):
        assert (obs["frame"][row] == before["frame"][row]).all()
    assert infos["chunk"].tolist() == [1, 0, 1] and infos["start"].tolist() == [3, 6, 5]
    assert infos["steps"].tolist() == [8, 0, 8] or infos["success"].any()
    for k in (1, 2):
        actions = actions_of(env, k)
        a, b = env.step(actions), undisturbed.step(actions)
        for row in (0, 2):
            assert np.abs(a[0]["frame"][row].astype(int) - b[0]["frame"][row]).max() <= 1
            np.testing.assert_allclose(a[0]["pose"][row], b[0]["pose"][row], atol=1e-6)
            for name in ("reward_frames", "success", "steps"):
                np.testing.assert_allclose(a[4][name][row], b[4][name][row], atol=1e-5)
    fresh = make(3, stop_on_success=False)
    fresh.reset(seed=[0, 2, 0], options={"starts": np.array([0, 6, 0])})
    for k in (1, 2):
        c = fresh.step(actions_of(env, k))
    assert np.abs(a[0]["frame"][1].astype(int) - c[0]["frame"][1]).max() <= 1
    assert a[3].tolist() == [True, False, True]  # the others are at the horizon


def test_finished_rows_are_frozen(make: Make) -> None:
    env = make(2, stop_on_success=False)
    env.reset(seed=3)
    env.step(actions_of(env, 0))
    env.reset(seed=4, options={"reset_mask": np.array([False, True])})
    env.step(actions_of(env, 1))
    obs, _, terminated, truncated, infos = env.step(actions_of(env, 2))
    assert truncated.tolist() == [True, False] and not terminated.any()
    assert env.finished.tolist() == [True, False]
    actions = actions_of(env, 3)
    actions[0] = np.nan  # what is said to a frozen row is not looked at
    after, reward, _, truncated, later = env.step(actions)
    assert (after["frame"][0] == obs["frame"][0]).all()
    assert (after["pose"][0] == obs["pose"][0]).all()
    assert not (after["pose"][1] == obs["pose"][1]).all()
    assert reward[0] == 0 and later["played"].tolist() == [0, 8]
    assert not later["reward_frames"][0].any() and not later["success_frames"][0].any()
    for name in ("chunk", "steps", "success", "start", "instruction"):
        assert later[name][0] == infos[name][0]
    assert truncated.all()
    with pytest.raises(UserError, match="every row is finished"):
        env.step(actions_of(env, 4))


def test_rows_never_begun_are_frozen_and_dark(make: Make) -> None:
    env = make(3)
    with pytest.raises(UserError, match="never begun; call reset"):
        env.step(still(env))
    mask = np.array([True, False, False])
    obs, infos = env.reset(seed=1, options={"reset_mask": mask})
    assert env.finished.tolist() == [False, True, True]
    assert not obs["frame"][1:].any() and infos["start"][1:].tolist() == [-1, -1]
    _, _, _, truncated, infos = env.step(still(env))
    assert truncated[1:].all() and infos["chunk"].tolist() == [1, 0, 0]


def test_the_data_are_the_callers(make: Make) -> None:
    env = make(2)
    obs, infos = env.reset(seed=1)
    kept = {name: value.copy() for name, value in obs.items()}
    obs["frame"][:], obs["pose"][:], infos["chunk"][:] = 0, 0, 9
    again, infos = env.reset(seed=2, options={"reset_mask": np.array([False, True])})
    assert (again["frame"][0] == kept["frame"][0]).all()
    assert (again["pose"][0] == kept["pose"][0]).all()
    assert infos["chunk"].tolist() == [0, 0]


def test_bad_input_is_one_line(make: Make) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_envs": 0}, "num_envs is 0"),
        ({"horizon": 20}, "horizon is 20; expected a multiple of 8"),
        ({"horizon": 0}, "horizon is 0"),
    ]
    for options, text in cases:
        with pytest.raises(UserError, match=text):
            make(**options)
    env = make(2)
    resets: list[tuple[dict[str, Any], str]] = [
        ({"options": {"mask": 1}}, "unknown option 'mask'; known: reset_mask, starts"),
        ({"options": {"reset_mask": [1, 0]}}, r"reset_mask is int64 \[2\]"),
        ({"options": {"reset_mask": np.zeros(2, bool)}}, "with 0 rows"),
        ({"options": {"reset_mask": np.ones(3, bool)}}, r"expected bool \[2\]"),
        ({"options": {"starts": [1]}}, "an integer for each of the 2 rows"),
        ({"options": {"starts": [0.5, 1]}}, "starts is float64"),
        ({"options": {"starts": [0, -1]}}, r"starts is \[0, -1\]"),
        ({"options": {"starts": [0, 2**40]}}, "starts is"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": [1]}, "seed has 1 entries"),
        ({"seed": [1, None]}, "expected integers of 0 or more"),
    ]
    for options, text in resets:
        with pytest.raises(UserError, match=text):
            env.reset(**options)
    env.reset(seed=1)
    outside, broken = still(env, [0, 1.5]), still(env)
    broken[1, 2, 3] = np.nan
    steps: list[tuple[Any, str]] = [
        (still(env)[:1], r"actions has shape \[1, 8, 7\]; expected \[2, 8, 7\]"),
        (outside, r"actions\[1,0,0\] \(x\) is 1.5"),
        (broken, r"actions\[1,2,3\].*must be finite"),
        (np.zeros((2, 8, 7), int), "dtype int64"),
    ]
    for actions, text in steps:
        with pytest.raises(UserError, match=text) as caught:
            env.step(actions)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------- the world model


class TestWorld:
    def test_success_ends_a_row(self, small_world: WorldModel, pool: Starts) -> None:
        """Reward 1 once, at the chunk in which the model's own success first appears."""
        env = WorldVectorEnv(small_world, pool, 9, horizon=HORIZON)
        free = WorldVectorEnv(small_world, pool, 9, horizon=HORIZON, stop_on_success=False)
        starts, seeds = {"starts": np.arange(9)}, list(range(9))
        for each in (env, free):
            each.reset(seed=seeds, options=starts)
        state = small_world.start(pool.frames, pool.poses, seeds)
        earned, earned_free = np.zeros(9), np.zeros(9)
        due = np.full(9, 99)
        for k in range(3):
            actions = actions_of(env, k)
            chunk, state = small_world.step(state, actions)
            _, reward, terminated, truncated, infos = free.step(actions)
            np.testing.assert_allclose(infos["reward_frames"], chunk.reward, atol=1e-6)
            np.testing.assert_array_equal(infos["success_frames"], chunk.success)
            fresh = chunk.success.any(1) & (due == 99)
            due[fresh] = k * 8 + chunk.success[fresh].argmax(1) + 1
            np.testing.assert_array_equal(reward, fresh)
            assert not terminated.any() and truncated.all() == (k == 2)
            earned_free += reward
            if not env.finished.all():
                _, reward, terminated, truncated, infos = env.step(actions)
                np.testing.assert_array_equal(reward, fresh)
                np.testing.assert_array_equal(terminated, due <= (k + 1) * 8)
                earned += reward
        assert 1 < (due < 99).sum() < 9  # both outcomes are here
        np.testing.assert_array_equal(infos["steps"], np.minimum(due, HORIZON))
        np.testing.assert_array_equal(infos["success"], earned > 0)
        np.testing.assert_array_equal(earned, earned_free)
        np.testing.assert_array_equal(truncated, earned == 0)

    def test_equal_chunks_are_one_batch(self, small_world: WorldModel, pool: Starts) -> None:
        """Rows begun at different times are joined; one call of the model for each chunk number."""
        env = WorldVectorEnv(small_world, pool, 4, horizon=HORIZON, stop_on_success=False)
        env.reset(seed=1)
        for row in range(4):  # one by one, before the first step
            env.reset(seed=row, options={"reset_mask": np.arange(4) == row})
        assert [members for members, _ in env._states.values()] == [[0, 1, 2, 3]]
        env.step(actions_of(env, 0))
        env.reset(seed=5, options={"reset_mask": np.array([False, True, False, False])})
        env.reset(seed=6, options={"reset_mask": np.array([True, False, False, False])})
        assert {k: members for k, (members, _) in env._states.items()} == {1: [2, 3], 0: [1, 0]}

    def test_by_name(self, pool: Starts) -> None:
        with pytest.raises(UserError, match=r"frames \[9, 1, 1, 32, 32, 3\].*128, 128, 3\]"):
            WorldVectorEnv("tiny", pool)

    def test_steps_are_checked(self, small_world: WorldModel, pool: Starts) -> None:
        with pytest.raises(UserError, match="steps is 3"):
            WorldVectorEnv(small_world, pool, steps=3)


# ------------------------------------------------------------- the simulator's adapter


class TestSimulator:
    def env(self, sim: type[PointSim], num_envs: int = 1, **options: Any) -> SimulatorVectorEnv:
        return SimulatorVectorEnv(
            "PushCube-v1", num_envs, image_size=32, simulator=sim,
            **{"action_spec": ActionSpec(chunk=8), "horizon": HORIZON, **options},
        )  # fmt: skip

    @pytest.mark.parametrize("held", [1, 2, 3])
    def test_success_is_a_flag_held(self, point_sim: type[PointSim], held: int) -> None:
        env = self.env(point_sim, held_frames=held)
        env.reset(options={"starts": [5]})
        sim = point_sim.made[0]
        sim.line = 0.04 * 3.5  # beyond it from the 4th step on
        _, reward, terminated, truncated, infos = env.step(still(env, [1]))
        assert reward[0] == 1 and terminated[0] and not truncated[0]
        assert infos["steps"][0] == infos["played"][0] == sim.steps == 3 + held
        assert infos["reward_frames"][0].tolist() == [0] * 3 + [1] * held + [0] * (5 - held)
        assert np.flatnonzero(infos["success_frames"][0]).tolist() == [2 + held]

    def test_held_goes_over_a_chunks_edge_and_a_gap_breaks_it(
        self, point_sim: type[PointSim]
    ) -> None:
        env = self.env(point_sim)
        env.reset(options={"starts": [5]})
        point_sim.made[0].line = 0.02
        actions = still(env)
        actions[0, 0, 0], actions[0, 1, 0] = 1, -1  # up for one step only
        actions[0, 7, 0] = 1
        _, reward, terminated, _, infos = env.step(actions)
        assert reward[0] == 0 and not terminated[0] and infos["steps"][0] == 8
        _, reward, terminated, _, infos = env.step(still(env))
        assert reward[0] == 1 and terminated[0] and infos["steps"][0] == 9
        env.reset(options={"starts": [6]})  # forgets what was held
        point_sim.made[0].line = -1
        *_, infos = env.step(still(env))
        assert infos["steps"][0] == 2

    def test_without_stopping_all_is_played(self, point_sim: type[PointSim]) -> None:
        env = self.env(point_sim, stop_on_success=False)
        env.reset(options={"starts": [5]})
        point_sim.made[0].line = 0.02
        rewards = []
        for _ in range(3):
            _, reward, terminated, truncated, infos = env.step(still(env, [1]))
            rewards.append(reward[0])
            assert not terminated[0] and infos["played"][0] == 8
        assert rewards == [1, 0, 0] and truncated[0] and infos["success"][0]
        assert infos["steps"][0] == 2 and point_sim.made[0].steps == 24

    def test_renders_once_a_chunk_and_closes(self, point_sim: type[PointSim]) -> None:
        env = self.env(point_sim, 2)
        env.reset(seed=1)
        for _ in range(3):
            env.step(still(env, [-1, -1]))
        assert [sim.renders for sim in point_sim.made] == [4, 4]
        env.close()
        assert all(sim.closed for sim in point_sim.made)

    def test_starts_are_seeds_of_the_simulator(self, point_sim: type[PointSim]) -> None:
        env = self.env(point_sim, 2)
        _, infos = env.reset(options={"starts": [11, 3_000_000]})
        assert infos["start"].tolist() == [11, 3_000_000]
        assert infos["instruction"].tolist() == ["push the blue cube onto the target"] * 2
        for sim, seed in zip(point_sim.made, (11, 3_000_000), strict=True):
            assert sim.line == np.random.default_rng(seed).uniform(0.2, 1.2)

    def test_a_start_out_of_view_leads_to_another(
        self, point_sim: type[PointSim], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = dataclasses.replace(tasks.TASKS["PushCube-v1"], in_view=(0.05, 0.1))
        monkeypatch.setitem(tasks.TASKS, "PushCube-v1", task)
        env = self.env(point_sim, 1)
        lines = []
        for seed in [*range(30), *range(30)]:
            env.reset(options={"starts": [seed]})
            lines.append(point_sim.made[0].line)
            seen = np.random.default_rng(seed).uniform(0.2, 1.2)
            assert lines[-1] == seen or seen <= 0.7
        assert min(lines) > 0.7
        assert lines[:30] == lines[30:] and len(set(lines)) == 30
        task = dataclasses.replace(task, in_view=(0.0, 0.0))
        monkeypatch.setattr(point_sim.made[0], "task", task)
        with pytest.raises(RuntimeError, match="no start within"):
            reset_in_view(point_sim.made[0], iter(range(2000)))  # type: ignore[arg-type]

    def test_options_are_checked(self, point_sim: type[PointSim]) -> None:
        with pytest.raises(UserError, match="held_frames is 0"):
            self.env(point_sim, held_frames=0)
        with pytest.raises(ValueError, match="control_hz: 20.0 here, 10.0 there"):
            self.env(point_sim, action_spec=ActionSpec(chunk=8, control_hz=10.0))
