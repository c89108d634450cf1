"""Collection: on a small stand-in for the simulator, and (marked `sim`) on the real one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from worldloop import cli
from worldloop.engine.policy.action_tokens import Statistics
from worldloop.engine.policy.openvla_oft import OpenVLAOFT, tiny_config
from worldloop.engine.policy.vla import PolicyConfig, VLAPolicy
from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.outcome import load_actions_only
from worldloop.rl import collect as module
from worldloop.rl.collect import CollectConfig, Collector, collect, wanted_outcome
from worldloop.rl.envs.tasks import task_preset
from worldloop.types import ActionSpec, Episode

Array = npt.NDArray[np.float32]
SIZE = 32


class FlatWorld:
    """PushCube without physics: the tool is a lagging point; a cube in its way goes along."""

    made = 0

    def __init__(self, env_id: str, image_size: int = 128) -> None:
        type(self).made += 1
        self.task = task_preset(env_id)
        self.camera = self.task.camera
        self.image_size = image_size

    def reset(self, seed: int) -> None:
        self.cube = np.random.default_rng(seed).uniform(-0.1, 0.1, 2)
        self.target = self.cube + [0.2, 0]
        self.tool = np.array([0.0, 0.0, 0.17])

    def step(self, action: Array) -> bool:
        self.tool = self.tool + 0.04 * action[:3]
        beside = abs(self.tool[1] - self.cube[1])
        gap = self.cube[0] - self.tool[0]
        if self.tool[2] < 0.04 and beside < 0.02 and -0.03 < gap < 0.03:
            self.cube = np.array([self.tool[0] + 0.03, self.cube[1]])
        return bool(np.linalg.norm(self.cube - self.target) < 0.1)

    def tcp(self) -> npt.NDArray[np.float64]:
        return np.array([*self.tool, 0, 1, 0, 0])

    def state(self) -> Array:
        return np.array([*self.tool, 0, 0, 0, -1], np.float32)

    def objects(self) -> Array:
        return np.array([[*self.cube, 0.02, 1, 0, 0, 0]], np.float32)

    def goal(self) -> Array:
        return np.array([*self.target, 0], np.float32)

    def object_pixels(self, poses_O7: Array) -> Array:
        return (poses_O7[:, :2] * 40 + SIZE / 2).astype(np.float32)

    def snapshot(self) -> Any:
        return self.cube.copy()

    def render_snapshot(self, snapshot: Any) -> npt.NDArray[np.uint8]:
        picture = np.full((self.image_size, self.image_size, 3), 120, np.uint8)
        column, row = (snapshot * 40 + SIZE / 2).astype(int)
        picture[row - 2 : row + 2, column - 2 : column + 2] = (12, 42, 160)
        return picture

    def render(self) -> npt.NDArray[np.uint8]:
        return self.render_snapshot(self.cube)

    def close(self) -> None:
        pass


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> type[FlatWorld]:
    monkeypatch.setattr(module, "make_simulator", FlatWorld)
    FlatWorld.made = 0
    return FlatWorld


def config(out: Path, **changes: Any) -> CollectConfig:
    return CollectConfig(
        **{"env": "PushCube-v1", "out": out, "image_size": SIZE, "shard": 4, **changes}
    )


def leftovers(root: Path) -> list[Path]:
    """Files that a finished or interrupted collection has no business to leave."""
    return [p for p in root.rglob("*") if p.name.startswith(".staging") or p.suffix == ".tmp"]


def check_whole(root: Path, episodes: int) -> EpisodeDataset:
    """The dataset loads, holds that many episodes of distinct seeds, each readable and labelled."""
    dataset = EpisodeDataset(root)
    assert len(dataset) == episodes
    assert len(set(dataset.seeds)) == episodes
    for episode in dataset.stream():
        assert episode.frames.shape[0] == len(episode.actions) + 1 == 73
        assert episode.success == bool(episode.reward[-1]) == wanted_outcome(episode.seed, 0.5)
    assert leftovers(root) == []
    return dataset


# ------------------------------------------------------------- with the stand-in


def test_collects_both_outcomes(flat: type[FlatWorld], tmp_path: Path) -> None:
    out = tmp_path / "data"
    dataset = collect(config(out, episodes=24))
    check_whole(out, 24)
    assert 0.2 < dataset.success.mean() < 0.8
    assert dataset.meta.camera["name"] == "side_close" and dataset.meta.horizon == 72
    offsets = [abs(np.array(e.info["perturbation_m"])).max() for e in dataset.stream(frames=False)]
    assert min(o for o, s in zip(offsets, dataset.success, strict=True) if not s) > 0.02
    for episode in dataset.stream(frames=False):
        info = episode.info
        assert (info["grade"] == "aimed") == (info["perturbation"] == "aimed") == episode.success
        assert info["size_m"] == pytest.approx(np.linalg.norm(info["perturbation_m"]), abs=2e-5)
        assert sum(info["rejected"].values()) >= info["failed_tries"] >= 0


def test_the_same_seeds_give_the_same_episodes(flat: type[FlatWorld], tmp_path: Path) -> None:
    first = collect(config(tmp_path / "a", episodes=3, shard=1)).read(2)
    again = collect(config(tmp_path / "b", episodes=3, shard=3)).read(2)
    np.testing.assert_array_equal(first.actions, again.actions)
    np.testing.assert_array_equal(first.states, again.states)
    assert first.seed == again.seed == 2


def test_expert_demonstrations_are_successes_aimed_at_the_object(
    flat: type[FlatWorld], tmp_path: Path
) -> None:
    dataset = collect(config(tmp_path / "demos", episodes=6, expert=True))
    assert dataset.success.all()
    for episode in dataset.stream(frames=False):
        assert np.abs(episode.info["perturbation_m"]).max() == 0


def test_a_policy_s_episodes_are_kept_as_they_end(flat: type[FlatWorld], tmp_path: Path) -> None:
    """Chunk by chunk from what it sees, to the horizon, from starts that can be solved."""
    torch.set_num_threads(1)
    network = OpenVLAOFT(tiny_config(7, 24))
    network.init_weights(0)
    statistics = Statistics((-0.5,) * 7, (0.5,) * 7, (True,) * 6 + (False,))
    policy = VLAPolicy(network.eval(), PolicyConfig(ActionSpec(), "test"), statistics)
    folder = str(policy.save(tmp_path / "policy"))
    options = {"episodes": 3, "policy": folder, "temperature": 1.0, "horizon": 48}
    dataset = collect(config(tmp_path / "a", **options))
    again = collect(config(tmp_path / "b", **{**options, "shard": 1}))
    for episode, other in zip(dataset.stream(), again.stream(), strict=True):
        assert len(episode.actions) == 48 and episode.info["policy"] == folder
        assert episode.objects is not None and episode.objects[0, 0, 0] <= 0.04
        np.testing.assert_array_equal(episode.actions, other.actions)
        assert episode.success == bool(episode.reward[-2:].all())
    alike = collect(config(tmp_path / "alike", **options, coherence=0.95))
    for episode, other in zip(dataset.stream(frames=False), alike.stream(frames=False)):
        jump, smooth = (np.abs(np.diff(e.actions[:24], axis=0)).mean() for e in (episode, other))
        assert smooth < 0.5 * jump and other.info["coherence"] == 0.95
    other_chunk = VLAPolicy(
        OpenVLAOFT(tiny_config(7, 16)), PolicyConfig(ActionSpec(chunk=16), "test"), statistics
    ).save(tmp_path / "other")
    with pytest.raises(UserError, match="horizon is 24; expected a multiple of the policy's chunk"):
        collect(config(tmp_path / "c", episodes=1, policy=str(other_chunk), horizon=24))


def test_a_wandering_hand_can_be_collected(flat: type[FlatWorld], tmp_path: Path) -> None:
    """To another place in each chunk, gripper as it was, the same from the same seed."""
    options = {"episodes": 6, "policy": "wander", "horizon": 48}
    dataset = collect(config(tmp_path / "a", **options))
    again = collect(config(tmp_path / "b", **{**options, "shard": 1}))
    grippers = set()
    for episode, other in zip(dataset.stream(), again.stream(), strict=True):
        np.testing.assert_array_equal(episode.actions, other.actions)
        assert len(episode.actions) == 48 and episode.info["policy"] == "wander"
        (gripper,) = set(episode.actions[:, 6])
        grippers.add(float(gripper))
        for chunk in (episode.states[:25, :3], episode.states[24:, :3]):
            assert np.linalg.norm(chunk[-1] - chunk[0]) > 0.01
    assert grippers == {-1.0, 1.0}


def test_wanted_outcomes_do_not_follow_the_seed() -> None:
    wanted = np.array([wanted_outcome(seed, 0.5) for seed in range(2000)])
    assert abs(wanted.mean() - 0.5) < 0.04
    assert abs(wanted[::2].mean() - wanted[1::2].mean()) < 0.06  # parity
    assert abs((wanted[1:] == wanted[:-1]).mean() - 0.5) < 0.04  # neighbours
    assert np.mean([wanted_outcome(seed, 0.2) for seed in range(2000)]) == pytest.approx(0.2, 0.2)


def test_label_leak_is_measured_and_kept(
    flat: type[FlatWorld], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    arguments = ["collect", "--env", "PushCube-v1", "--out", str(out), "--image-size", str(SIZE)]
    assert cli.main([*arguments, "--episodes", "4"]) == 0
    assert "not measured (" in capsys.readouterr().out
    assert load_actions_only(out) is None
    assert cli.main([*arguments, "--episodes", "40"]) == 0
    printed = capsys.readouterr().out
    kept = load_actions_only(out)
    assert kept is not None and kept["episodes"] == 40
    assert f"betray {kept['accuracy']:.1%} of the outcomes" in printed


def test_progress_tells_rate_and_success_share(
    flat: type[FlatWorld], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collect(config(tmp_path / "data", episodes=6))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("PushCube-v1: 6/6 ep,") and "ep/s" in last
    assert "success=" in last and "% of tries" in last


def test_two_collectors_that_end_together_do_not_add_too_many(
    flat: type[FlatWorld], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    one, two = (Collector(config(out, episodes=5, shard=4)) for _ in range(2))
    shards = []
    for collector in (one, two):
        made = [collector.episode(seed) for seed in collector.writer.claim_seeds(4, 0)]
        shards.append([episode for episode in made if episode is not None])
    assert one.add(shards[0]) == 4
    assert two.add(shards[1]) == 5
    assert two.add(shards[1]) == 5
    check_whole(out, 5)


def test_a_finished_dataset_is_not_touched(flat: type[FlatWorld], tmp_path: Path) -> None:
    out = tmp_path / "data"
    collect(config(out, episodes=4))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    flat.made = 0
    assert len(collect(config(out, episodes=3))) == 4
    assert flat.made == 0  # the simulator takes seconds to start
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def test_a_shard_that_is_handed_over_twice_is_kept_once(
    flat: type[FlatWorld], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after the dataset has the shard, before the collector knows."""
    added = Collector.add

    def add(self: Collector, shard: list[Episode]) -> int:
        monkeypatch.setattr(Collector, "add", added)
        added(self, shard)
        raise KeyboardInterrupt

    monkeypatch.setattr(Collector, "add", add)
    with pytest.raises(KeyboardInterrupt):
        collect(config(tmp_path / "data", episodes=8))
    have = len(EpisodeDataset(tmp_path / "data"))
    assert 0 < have < 8
    check_whole(tmp_path / "data", have)


def test_ctrl_c_keeps_what_is_finished(
    flat: type[FlatWorld], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, steps = tmp_path / "data", 0
    stepped = FlatWorld.step

    def step(self: FlatWorld, action: Array) -> bool:
        nonlocal steps
        steps += 1
        if steps == 72 * 12:
            raise KeyboardInterrupt
        return stepped(self, action)

    monkeypatch.setattr(FlatWorld, "step", step)
    arguments = ["--env", "PushCube-v1", "--out", str(out), "--image-size", str(SIZE)]
    assert cli.main(["collect", *arguments, "--episodes", "50", "--shard", "100"]) == 130
    have = len(EpisodeDataset(out))
    assert 0 < have <= 12
    check_whole(out, have)
    collect(config(out, episodes=have + 3))
    check_whole(out, have + 3)


def test_full_disk_is_one_clear_error_and_the_dataset_goes_on(
    flat: type[FlatWorld],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "data"
    collect(config(out, episodes=4))
    import pyarrow.parquet as pq

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        arguments = ["--env", "PushCube-v1", "--out", str(out), "--image-size", str(SIZE)]
        capsys.readouterr()
        assert cli.main(["collect", *arguments, "--episodes", "9", "--shard", "4"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and "the disk is full" in errors[0] and str(out) in errors[0]
    check_whole(out, 4)
    collect(config(out, episodes=9))
    check_whole(out, 9)


def test_another_task_needs_another_folder(flat: type[FlatWorld], tmp_path: Path) -> None:
    out = tmp_path / "data"
    collect(config(out, episodes=2))
    flat.made = 0
    with pytest.raises(UserError, match="env_id is 'PushCube-v1', this collection's 'PullCube-v1'"):
        collect(config(out, env="PullCube-v1", episodes=4))
    with pytest.raises(UserError, match="image_size is 32, this collection's 64"):
        collect(config(out, image_size=64, episodes=4))
    assert flat.made == 0
    check_whole(out, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "TurnFaucet-v1"}, "env: unknown env 'TurnFaucet-v1'; known: PushCube-v1"),
        ({"episodes": 0}, "episodes is 0"),
        ({"horizon": 30}, "horizon is 30; expected a multiple of 24"),
        ({"image_size": 100}, "image_size is 100"),
        ({"success_share": 1.5}, "success_share is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"shard": 0}, "shard is 0"),
        ({"crf": 99}, "crf is 99"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_bad_settings_end_the_command_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["collect", "--env", "TurnFaucet-v1", "--out", str(tmp_path / "x")])
    assert exit_.value.code == 2
    assert "unknown env 'TurnFaucet-v1'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------- with the simulator


def start(out: Path, episodes: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "worldloop", "collect", "--env", "PushCube-v1", "--out", str(out),
         "--image-size", "64", "--episodes", str(episodes), "--shard", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.sim
@pytest.mark.slow
def test_killed_then_continued_by_two_processes(tmp_path: Path) -> None:
    """SIGKILL leaves a dataset that loads; two processes then bring it to the wanted number."""
    out = tmp_path / "data"
    info = out / "meta/info.json"
    victim = start(out, 1000)
    deadline = time.monotonic() + 240
    while not info.exists() and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)  # into the middle of the next episode
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    have = json.loads(info.read_text())["total_episodes"]
    assert have >= 1
    assert len(EpisodeDataset(out)) == have
    assert all(e.frames.shape == (73, 64, 64, 3) for e in EpisodeDataset(out).stream())

    pair = [start(out, have + 5) for _ in range(2)]
    for process in pair:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-2000:]
    check_whole(out, have + 5)
