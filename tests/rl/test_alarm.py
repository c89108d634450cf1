"""The exploitation alarm: it stops a run that fools itself, and leaves an honest one alone."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # child processes look for loop_home as well

from loop_home import HORIZON, PointWorld, small_policy, small_world, write_pool

from worldloop.engine.rollout import RolloutEngine
from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.metrics import held_steps
from worldloop.rl import grpo as module
from worldloop.rl.alarm import AlarmConfig, check_steps, head_verdict, load_check
from worldloop.rl.grpo import train
from worldloop.rl.grpo_config import GRPOConfig
from worldloop.rl.learner import LearnerConfig
from worldloop.rl.starts import load_starts
from worldloop.rl.true_env import TrueEnv
from worldloop.track import read_rows

TRUE = TrueEnv("loop_home:PointRecorder", horizon=HORIZON, image_size=32, held_frames=1)
ALARM = AlarmConfig(every=4, episodes=64, limit=0.7, window=1, true=TRUE, videos=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alarm")
    small_world().save(folder / "world")
    small_policy().save(folder / "policy")
    write_pool(folder / "pool", spread=0.0)
    return folder


def config_of(home: Path, out: Path, **changes) -> GRPOConfig:
    values = {
        "out": out, "policy": str(home / "policy"), "world": str(home / "world"),
        "starts": home / "pool", "steps": 16, "groups": 6, "group_size": 8, "horizon": HORIZON,
        "world_steps": 1, "accuracy_low": 0.0, "accuracy_high": 1.0, "rounds": 1,
        "evaluate_every": 0, "keep_every": 100, "temperature": 1.6, "alarm": ALARM,
        "learner": LearnerConfig(lr=2e-2, mini_batch=24, micro_batch=24, epochs=2,
                                 old_logprobs="rollout"), **changes,
    }  # fmt: skip
    return GRPOConfig(**values)


def test_a_planted_exploit_stops_the_run_and_an_honest_reward_does_not(
    home, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(module, "WorldModel", PointWorld)
    monkeypatch.setattr(PointWorld, "exploitable", True)
    cheating = config_of(home, tmp_path / "cheating")
    policy = train(cheating)
    done = json.loads((cheating.out / "done.json").read_text())
    stop = load_check(cheating.out / f"alarm/{done['alarm']:06d}", ALARM)
    assert done["alarm"] > 0 and stop.stop and stop.ci95[0] > ALARM.limit
    assert policy == cheating.out / f"policies/{done['steps']:06d}"
    assert done["steps"] == done["alarm"] - 4, "the policy of the last silent check"
    assert "of the imagined successes are none in truth" in capsys.readouterr().out
    rows = {row["step"]: row for row in read_rows(cheating.out / "metrics.jsonl")}
    assert max(rows) == done["alarm"]
    assert rows[done["alarm"]]["alarm_false_success"] > rows[0]["alarm_false_success"]
    # What fooled it is kept with true frames and labels, and as video.
    fooled = EpisodeDataset(stop.folder / "episodes")
    assert len(fooled) == stop.counts.false_success + stop.counts.false_failure
    assert not fooled.success.any() and all(e.info["imagined_success"] for e in fooled.stream())
    videos = [e for e in json.loads((stop.folder / "check.json").read_text())["episodes"]
              if "video" in e]  # fmt: skip
    assert len(videos) == 2 and (stop.folder / videos[0]["video"]).stat().st_size > 1000
    # Run again, it stays stopped.
    assert train(cheating) == policy
    assert check_steps(cheating.out / "alarm")[-1] == done["alarm"]

    monkeypatch.setattr(PointWorld, "exploitable", False)
    honest = config_of(home, tmp_path / "honest", steps=4)
    assert train(honest) == honest.out / "policies/000004"
    assert json.loads((honest.out / "done.json").read_text()) == {"steps": 4, "alarm": None}
    for step in (0, 4):
        check = load_check(honest.out / f"alarm/{step:06d}", ALARM)
        assert not check.stop and check.counts.false_success == check.counts.false_failure == 0
        assert check.counts.true_success > 0
        assert not (check.folder / "episodes").exists()


def test_judges_stand_in_for_a_simulator(home, tmp_path, monkeypatch):
    """Other reward heads and other noise: a head that sees success everywhere is denied."""
    plain = small_world()
    starts = load_starts(home / "pool", plain)
    rollout = RolloutEngine(plain, small_policy(), steps=1).rollout(
        starts, horizon=HORIZON, decode="all"
    )
    np.testing.assert_array_equal(head_verdict(small_world(threshold=0.0), rollout), [True] * 9)
    np.testing.assert_array_equal(head_verdict(small_world(threshold=0.9999), rollout), [False] * 9)

    easy = small_world()
    easy.config = dataclasses.replace(easy.config, reward_threshold=0.5)
    easy.save(home / "easy")
    strict = []
    for seed in (1, 5):
        world = small_world(seed=seed)
        world.config = dataclasses.replace(world.config, reward_threshold=0.9999)
        strict.append(str(world.save(home / f"strict-{seed}")))
    alarm = dataclasses.replace(ALARM, episodes=16, judges=tuple(strict), again=2, limit=0.5)
    config = config_of(home, tmp_path / "run", world=str(home / "easy"), steps=3, alarm=alarm)
    train(config)
    check = load_check(config.out / "alarm/000000", alarm)
    assert check.stop and check.counts.false_success == 16
    assert check.disagreement == pytest.approx(2 * 0.25), "three of four votes deny"
    assert json.loads((config.out / "done.json").read_text()) == {"steps": 0, "alarm": 0}
    agreeing = dataclasses.replace(alarm, judges=(str(home / "easy"),))
    config = config_of(home, tmp_path / "fine", world=str(home / "easy"), steps=1, alarm=agreeing)
    train(config)
    check = load_check(config.out / "alarm/000000", agreeing)
    assert not check.stop and check.counts.true_success == 16 and check.disagreement == 0


def test_truth_of_another_task_is_refused(home, tmp_path):
    """PullCube's seeds and actions played in PushCube would make every success a false one."""
    pull = write_pool(tmp_path / "pull", "PullCube-v1")
    alarm = dataclasses.replace(ALARM, true=TrueEnv("PushCube-v1"))
    with pytest.raises(UserError, match="are of PullCube-v1, the true environment is PushCube-v1"):
        train(config_of(home, tmp_path / "run", starts=pull, alarm=alarm))
    short = dataclasses.replace(ALARM, true=dataclasses.replace(ALARM.true, horizon=HORIZON - 8))
    with pytest.raises(UserError, match=f"horizon is {HORIZON}, but the true environment's is"):
        train(config_of(home, tmp_path / "short", alarm=short))


def test_starts_that_cannot_be_begun_again_are_an_error(home, tmp_path):
    other = write_pool(tmp_path / "pool")
    for path in (other / "meta/episodes").rglob("*.parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        at = table.schema.get_field_index("info")
        pq.write_table(table.set_column(at, "info", pa.array(["{}"] * table.num_rows)), path)
    with pytest.raises(UserError, match="no episode says which simulator seed.*alarm.judges"):
        train(config_of(home, tmp_path / "run", starts=other, steps=1))


def test_settings_are_checked():
    for match, changes in (
        ("alarm.every is -1", {"every": -1}), ("alarm.limit is 2", {"limit": 2.0}),
        ("alarm.episodes is 0", {"episodes": 0}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            AlarmConfig(**changes)
    with pytest.raises(UserError, match="unknown env 'Push'"):
        TrueEnv("Push")
    with pytest.raises(UserError, match="name the checkpoint that is the truth"):
        TrueEnv("world")


def test_success_is_a_flag_that_holds():
    flags = np.array([0, 1, 0, 1, 1, 1], np.float32)
    assert held_steps(flags, 1) == 2 and held_steps(flags, 2) == 5 and held_steps(flags, 3) == 6
    assert held_steps(flags, 4) is None and held_steps(np.zeros(4, np.float32), 1) is None


@pytest.mark.sim
def test_imagined_actions_are_replayed_in_the_simulator(tmp_path):
    """The same start picture, and for recorded actions the recorded outcome."""
    from worldloop.rl.starts import shipped_episodes
    from worldloop.rl.true_env import Replay, record_replay

    folder = shipped_episodes()
    dataset = EpisodeDataset(folder)
    seeds = dataset.sim_seeds
    true = TrueEnv("PushCube-v1")
    for i in (0, 40):
        recorded = dataset.read(i)
        replay = Replay(1, seeds[i], recorded.actions, dataset.meta.action_spec, {"alarm_step": 5})
        episode, meta = record_replay(true, replay)
        # The recorded picture is of a video: other than drawn, but no other start looks like it.
        apart = [
            np.abs(episode.frames[0].astype(int) - dataset.read(j).frames[0]).mean()
            for j in (i, *(k for k in range(0, 60, 7) if k != i))
        ]
        assert apart[0] < 2.5 and apart[0] < 0.7 * min(apart[1:])
        np.testing.assert_allclose(episode.states, recorded.states, atol=1e-4)
        np.testing.assert_array_equal(episode.reward, recorded.reward)
        assert episode.info == {"sim_seed": seeds[i], "alarm_step": 5}
        assert json.dumps(meta.camera) == json.dumps(dataset.meta.camera), "they can be merged"
