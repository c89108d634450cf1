"""Evaluation: each start once whatever the rows, the figures, the command; `sim`: real episodes."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from worldloop import cli
from worldloop.engine.policy.base import ReplayPolicy
from worldloop.engine.policy.vla import VLAPolicy
from worldloop.engine.rollout import RolloutEngine
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.metrics import wilson_interval
from worldloop.rl import evaluate as module
from worldloop.rl.envs.simulators import SimulatorVectorEnv
from worldloop.rl.envs.world import WorldVectorEnv
from worldloop.rl.evaluate import EvaluateConfig, Evaluation, evaluate, evaluate_policy
from worldloop.track import Progress
from worldloop.types import ActionSpec, Starts

if TYPE_CHECKING:
    from tests.rl.conftest import DrawingPolicy, PointSim, Simulated

HORIZON = 24


def assert_same(a: Evaluation, b: Evaluation) -> None:
    assert a.starts == b.starts and a.frames == b.frames
    np.testing.assert_array_equal(a.success, b.success)
    np.testing.assert_array_equal(a.steps, b.steps)


# ------------------------------------------------------------- the loop


@pytest.mark.parametrize("num_envs", [1, 3, 9, 14])
def test_imagined_as_the_rollout_engine_does(
    small_world: WorldModel, pool: Starts, drawing_policy: type[DrawingPolicy], num_envs: int
) -> None:
    """Same seeds, same episodes as RolloutEngine, whatever the rows: refilled, idle or alone."""
    policy = drawing_policy(small_world.action_spec)
    rollout = RolloutEngine(small_world, policy).rollout(
        pool, horizon=HORIZON, seed=4, stop_on_success=True
    )
    policy.asked.clear()
    env = WorldVectorEnv(small_world, pool, num_envs, horizon=HORIZON)
    result = evaluate(env, policy, range(9), seed=4)
    np.testing.assert_array_equal(result.success, rollout.success)
    assert 0 < result.success.sum() < 9
    above = rollout.reward > small_world.config.reward_threshold
    due = np.where(above.any(1), above.argmax(1) + 1, HORIZON)
    np.testing.assert_array_equal(result.steps, due)
    chunks = -(-due // 8)
    assert result.frames == chunks.sum() * 8 and result.starts == tuple(range(9))
    # Every episode acted exactly once at each of its chunks, from the first on.
    acted = [(episode, chunk) for chunk, rows in policy.asked for episode in rows]
    wanted = [(i, k) for i in range(9) for k in range(chunks[i])]
    assert sorted(acted) == wanted
    assert all(len(rows) <= num_envs for _, rows in policy.asked)


def test_the_simulator_whatever_the_rows(
    point_sim: type[PointSim], drawing_policy: type[DrawingPolicy]
) -> None:
    spec = ActionSpec(chunk=8)
    starts = [6_000_000 + i for i in range(11)]
    results, calls = [], []
    for num_envs in (1, 3):
        env = SimulatorVectorEnv(
            "PushCube-v1", num_envs, image_size=32, horizon=HORIZON, action_spec=spec,
            simulator=point_sim,
        )  # fmt: skip
        policy = drawing_policy(spec, forward=0.7)
        results.append(evaluate(env, policy, starts, seed=1))
        calls.append(sorted((e, k) for k, rows in policy.asked for e in rows))
    assert_same(*results)
    assert calls[0] == calls[1] and {e for e, _ in calls[0]} == set(range(11))
    assert 0 < results[0].success.sum() < 11
    assert (results[0].steps[~results[0].success] == HORIZON).all()
    assert results[0].frames == results[0].steps.sum() == point_sim.made[0].steps


def test_parts_are_the_whole(
    small_world: WorldModel, pool: Starts, drawing_policy: type[DrawingPolicy]
) -> None:
    """Numbered episodes make a part of a larger evaluation; starts may repeat with other noise."""
    env = WorldVectorEnv(small_world, pool, 4, horizon=HORIZON)
    policy = drawing_policy(small_world.action_spec)
    starts = [n % 5 for n in range(10)]
    whole = evaluate(env, policy, starts, seed=2)
    for part in (range(0, 3), range(3, 10)):
        some = evaluate(env, policy, [starts[n] for n in part], seed=2, episodes=part)
        np.testing.assert_array_equal(some.success, whole.success[list(part)])
        np.testing.assert_array_equal(some.steps, whole.steps[list(part)])
    other = evaluate(env, policy, starts, seed=3)
    assert not np.array_equal(other.steps, whole.steps)


def test_progress_counts_episodes(
    point_sim: type[PointSim], drawing_policy: type[DrawingPolicy]
) -> None:
    spec, told = ActionSpec(chunk=8), io.StringIO()
    env = SimulatorVectorEnv(
        "PushCube-v1", 2, image_size=32, horizon=HORIZON, action_spec=spec, simulator=point_sim
    )
    with Progress(5, "evaluate", unit="ep", stream=told) as progress:
        evaluate(env, drawing_policy(spec, 1.0), range(5), progress=progress)
    assert "evaluate: 5/5 ep" in told.getvalue() and "success=" in told.getvalue()


def test_bad_input_is_one_line(
    small_world: WorldModel, pool: Starts, drawing_policy: type[DrawingPolicy]
) -> None:
    spec = small_world.action_spec
    env = WorldVectorEnv(small_world, pool, 2, horizon=HORIZON)
    policy = drawing_policy(spec)
    with pytest.raises(UserError, match="0 starts"):
        evaluate(env, policy, [])
    with pytest.raises(UserError, match="2 starts and 1 episode numbers"):
        evaluate(env, policy, [0, 1], episodes=[0])
    with pytest.raises(UserError, match=r"the pool has starts 0 .. 8"):
        evaluate(env, policy, [9])
    with pytest.raises(UserError, match="chunks of 8 actions, the policy gives 24"):
        evaluate(env, drawing_policy(dataclasses.replace(spec, chunk=24)), [0])
    with pytest.raises(ValueError, match="control_hz"):
        evaluate(env, drawing_policy(dataclasses.replace(spec, control_hz=5.0)), [0])


# ------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # scipy's binomtest(right, count).proportion_ci(method="wilson")
        (5, 10, 0.2365931, 0.7634069),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (90, 100, 0.8256343, 0.9447709),
        (158, 200, 0.7283538, 0.8407159),
    ],
)
def test_wilson_interval(right: int, count: int, low: float, high: float) -> None:
    np.testing.assert_allclose(wilson_interval(right, count), (low, high), atol=1e-6)
    success = np.arange(count) < right
    made = Evaluation(tuple(range(count)), success, np.full(count, 30), 30 * count, 2.0)
    assert made.ci95 == wilson_interval(right, count) and made.rate == right / count
    # A pool of starts that is tried three times over is no larger for it.
    often = Evaluation(made.starts * 3, np.tile(success, 3), np.tile(made.steps, 3), 90, 2.0)
    assert often.ci95 == pytest.approx(made.ci95) and len(often.to_dict()["success"]) == 3 * count


def test_figures_are_plain_json() -> None:
    made = Evaluation((4, 7, 9), np.array([True, False, True]), np.array([20, 72, 31]), 123, 2.0)
    told = json.loads(json.dumps(made.to_dict()))
    assert told["episodes"] == 3 and told["successes"] == 2
    assert told["rate"] == pytest.approx(2 / 3) and told["ci95"] == list(made.ci95)
    assert told["mean_steps_to_success"] == 25.5
    assert told["starts"] == [4, 7, 9] and told["steps"] == [20, 72, 31]
    assert told["success"] == [True, False, True]
    none = dataclasses.replace(made, success=np.zeros(3, bool))
    assert none.to_dict()["mean_steps_to_success"] is None


# ------------------------------------------------------------- the command


@pytest.fixture
def stand_ins(
    monkeypatch: pytest.MonkeyPatch,
    point_sim: type[PointSim],
    drawing_policy: type[DrawingPolicy],
    tmp_path: Path,
) -> Path:
    """The command with a policy that draws (its folder) and a simulator without physics."""

    def simulated(env_id: str, rows: int, **options: Any) -> SimulatorVectorEnv:
        return SimulatorVectorEnv(env_id, rows, simulator=point_sim, **options)

    monkeypatch.setattr(module, "SimulatorVectorEnv", simulated)
    monkeypatch.setattr(module, "load_policy", lambda config: drawing_policy(ActionSpec(), 0.4))
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_command_writes_every_outcome(
    stand_ins: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    point_sim: type[PointSim],
) -> None:
    out = tmp_path / "deep/evaluation.json"
    argv = ["evaluate", "policy", "--policy", str(stand_ins), "--episodes", "6", "--out", str(out)]
    assert cli.main([*argv, "--rows", "2", "--threads", "1"]) == 0
    told = json.loads(out.read_text())
    assert told["config"]["policy"] == str(stand_ins)
    assert told["config"]["first_seed"] == 6_000_000
    assert told["starts"] == list(range(6_000_000, 6_000_006))
    line = capsys.readouterr().out
    assert f"{told['successes']} of 6 episodes succeed" in line and "95 % interval" in line
    assert len(point_sim.made) == 2
    assert [path.name for path in out.parent.iterdir()] == ["evaluation.json"]


def test_a_killed_evaluation_goes_on(
    stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished parts are kept for the same settings and weights, and for no others."""
    whole = EvaluateConfig(str(stand_ins), episodes=6, threads=1, out=tmp_path / "whole.json")
    expected = evaluate_policy(whole)
    config = dataclasses.replace(whole, out=tmp_path / "killed.json")
    kept, run, played = tmp_path / "killed.json.parts", module._run, []

    def killed(config: EvaluateConfig, numbers: range, *sizes: int) -> Evaluation:
        if len(played) == 2:
            raise KeyboardInterrupt
        played.append(numbers)
        return run(config, numbers, *sizes)

    monkeypatch.setattr(module, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_policy(config)
    assert kept.is_file() and not config.out.exists()
    unlike = json.loads(kept.read_text()) | {"policy_sha256": "of other weights"}
    fewer = dataclasses.replace(config, processes=2)  # as after running out of memory
    assert len(module._read_parts(kept, module._made_by(fewer))) == 2
    (tmp_path / "unlike.parts").write_text(json.dumps(unlike))
    assert module._read_parts(tmp_path / "unlike.parts", module._made_by(config)) == {}
    played[:] = [None] * 3  # past the kill
    assert evaluate_policy(config).success.tolist() == expected.success.tolist()
    assert len(played) == 3 + 4 and not kept.exists()


def test_command_in_imagination(stand_ins: Path, tmp_path: Path) -> None:
    """The shipped world model from the first frames of a dataset, which repeat."""
    config = EvaluateConfig(
        str(stand_ins),
        env="world",
        episodes=3,
        horizon=24,
        rows=2,
        threads=1,
        out=tmp_path / "e.json",
    )
    result = evaluate_policy(config)
    assert result.starts == (0, 1, 2) and result.frames == 72


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"env": "NailCube-v1"}, "unknown env 'NailCube-v1'.*or `world`"),
        ({"episodes": 0}, "episodes is 0"),
        ({"processes": 0}, "processes is 0"),
        ({"held_frames": 0}, "held_frames is 0"),
        ({"rows": 0}, "rows is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"coherence": 1.0}, "coherence is 1.0; expected at least 0 and below 1"),
        ({"first_seed": -1}, "first_seed is -1"),
    ],
)
def test_config_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        EvaluateConfig("none", **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--env", "world", "--starts", "nowhere", "--policy", "policy/pushcube"], "nowhere"),
        (["--env", "world", "--world", "nowhere", "--policy", "policy/pushcube"], "nowhere"),
        (["--env", "world", "--episodes", "1"], "no-such-policy"),
    ],
)
def test_command_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], text: str
) -> None:
    out = tmp_path / "e.json"
    argv = ["evaluate", "policy", "--policy", "./no-such-policy", "--out", str(out), *options]
    assert cli.main(argv) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(told) == 1
    assert re.search(text, told[0])
    assert not out.exists()


def test_the_policy_draws_as_told(tmp_path: Path) -> None:
    make_random_policy(tmp_path / "policy")
    config = EvaluateConfig(str(tmp_path / "policy"), temperature=0.35, coherence=0.95)
    policy = module.load_policy(config)
    assert isinstance(policy, VLAPolicy)
    assert (policy.temperature, policy.coherence) == (0.35, 0.95)


# ------------------------------------------------------------- real episodes


@pytest.mark.sim
@pytest.mark.parametrize("env_id", ["PushCube-v1", "LiftPegUpright-v1"])
def test_recorded_actions_have_their_recorded_outcome(
    simulated: Callable[[str], Simulated], env_id: str
) -> None:
    """From the same simulator seed; in two rows at a time, and over again."""
    episodes = [each for each in simulated(env_id).dataset.stream()]
    policy = ReplayPolicy(np.stack([episode.actions for episode in episodes]))
    env = SimulatorVectorEnv(env_id, 2)
    seeds = [episode.info["sim_seed"] for episode in episodes]
    obs, infos = env.reset(options={"starts": seeds})
    for row, episode in enumerate(episodes):
        assert np.abs(obs["frame"][row].astype(int) - episode.frames[0]).mean() < 4  # video
        np.testing.assert_allclose(obs["pose"][row], episode.states[0], atol=1e-5)
    result = evaluate(env, policy, seeds)
    held = [first_held(episode.reward) for episode in episodes]
    np.testing.assert_array_equal(result.steps, [t or 72 for t in held])
    np.testing.assert_array_equal(result.success, [t is not None for t in held])
    assert sorted(episode.success for episode in episodes) == [False, True]
    assert result.success[[episode.success for episode in episodes].index(True)]
    assert_same(result, evaluate(env, policy, seeds))
    env.close()


def first_held(reward: np.ndarray, frames: int = 2) -> int | None:
    """The control step (counted from 1) at which the flag has been up for so many steps."""
    for t in range(frames, len(reward) + 1):
        if reward[t - frames : t].all():
            return t
    return None


@pytest.mark.sim
@pytest.mark.slow
def test_several_processes_give_what_one_gives(tmp_path: Path) -> None:
    """The whole command with a real network of random weights, over real episodes."""
    policy = tmp_path / "policy"
    make_random_policy(policy)
    told = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        done = subprocess.run(
            [sys.executable, "-m", "worldloop", "evaluate", "policy", "--policy", str(policy),
             "--episodes", "3", "--horizon", "24", "--processes", str(processes),
             "--temperature", "1", "--threads", "1", "--out", str(out)],
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told.append(json.loads(out.read_text()))
    for name in ("starts", "success", "steps", "frames"):
        assert told[0][name] == told[1][name]


def make_random_policy(folder: Path) -> None:
    from worldloop.engine.policy.action_tokens import Statistics
    from worldloop.engine.policy.openvla_oft import OpenVLAOFT, tiny_config
    from worldloop.engine.policy.vla import PolicyConfig

    network = OpenVLAOFT(tiny_config(7, 24))
    network.init_weights(0)
    spec = ActionSpec()
    statistics = Statistics(spec.low, spec.high, (True,) * spec.dim)
    VLAPolicy(network, PolicyConfig(spec, "test"), statistics).save(folder)
