"""Datasets on disk: round trip, streaming, several writers, killed writers, full and bad disks."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from worldloop import episodes as module
from worldloop.episodes import VIDEO_KEY, DatasetMeta, EpisodeDataset, EpisodeWriter
from worldloop.types import ActionSpec, Episode

SIZE, T = 32, 6
META = DatasetMeta(ActionSpec(), "PushCube-v1", {"name": "test"}, T, SIZE)


def episode(seed: int, success: bool | None = None) -> Episode:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    frames = np.stack(
        [np.stack([4 * x + 9 * t, 5 * y, 0 * x + 20 * (seed % 10)], -1) for t in range(T + 1)]
    )
    success = bool(seed % 2) if success is None else success
    reward = np.zeros(T, np.float32)
    reward[T // 2 :] = success
    return Episode(
        frames=np.clip(frames, 0, 255).astype(np.uint8),
        actions=rng.uniform(-1, 1, (T, 7)).astype(np.float32),
        states=rng.normal(size=(T + 1, 7)).astype(np.float32),
        reward=reward,
        instruction=("push the cube", "pull the cube")[seed % 2],
        env_id="PushCube-v1",
        seed=seed,
        success=success,
        objects=rng.normal(size=(T + 1, 2, 7)).astype(np.float32),
        object_pixels=rng.uniform(0, SIZE, (T + 1, 2, 2)).astype(np.float32),
        info={"perturbation_m": [0.01, -0.02]},
    )


def check_same(read: Episode, written: Episode) -> None:
    for name in ("actions", "states", "reward", "objects", "object_pixels"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    for name in ("instruction", "env_id", "seed", "success", "info"):
        assert getattr(read, name) == getattr(written, name)
    assert read.frames.shape == written.frames.shape
    assert np.abs(read.frames.astype(int) - written.frames).mean() < 3  # H.264


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two shards of two and three episodes."""
    writer = EpisodeWriter(tmp_path / "set", META)
    assert writer.add([episode(0), episode(1)]) == 2
    assert writer.add([episode(2), episode(3), episode(4)]) == 5
    return tmp_path / "set"


def loads(root: Path, count: int) -> None:
    """The dataset holds ``count`` episodes, all readable, its own figures consistent."""
    found = EpisodeDataset(root)
    assert len(found) == count
    total = 0
    for number, one in enumerate(found.stream()):
        check_same(one, episode(one.seed))
        assert found.seeds[number] == one.seed
        total += len(one.frames)
    assert total == found.info["total_frames"]
    assert len(set(found.seeds)) == count
    stats = json.loads((root / "meta/stats.json").read_text())
    assert stats["action"]["count"] == [total]


# ---------------------------------------------------------------- whole datasets


def test_round_trip_and_streaming(dataset: Path) -> None:
    loads(dataset, 5)
    found = EpisodeDataset(dataset)
    assert found.success.tolist() == [False, True, False, True, False]
    assert found.meta == META
    for number in (4, 0, 3):  # in any order, each starting at its own key frame
        check_same(found.read(number), episode(number))
        assert np.array_equal(found.first_frame(number), found.read(number).frames[0])
    bare = found.read(1, frames=False)
    assert bare.frames.shape[1:] == (0, 0, 3)
    np.testing.assert_array_equal(bare.actions, episode(1).actions)
    with pytest.raises(IndexError, match="episode 5 of a dataset of 5"):
        found.read(5)


def test_layout_is_lerobots(dataset: Path) -> None:
    info = json.loads((dataset / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == 20
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (5, 35, 2)
    assert info["splits"] == {"train": "0:5"}
    rows = pq.read_table(dataset / "data/chunk-000/file-001.parquet").to_pydict()
    assert rows["index"] == list(range(14, 35))
    assert rows["episode_index"] == [2] * 7 + [3] * 7 + [4] * 7
    assert rows["frame_index"] == list(range(7)) * 3
    assert rows["next.done"] == ([False] * 6 + [True]) * 3
    index = pq.read_table(dataset / "meta/episodes/chunk-000/file-001.parquet").to_pydict()
    assert index["dataset_from_index"] == [14, 21, 28]
    assert index[f"videos/{VIDEO_KEY}/from_timestamp"] == [0, 7 / 20, 14 / 20]
    tasks = pq.read_table(dataset / "meta/tasks.parquet").to_pydict()
    assert tasks["__index_level_0__"] == ["push the cube", "pull the cube"]
    for key, feature in info["features"].items():
        if feature["dtype"] != "video":
            assert key in rows


def test_stats_are_those_of_all_rows(dataset: Path) -> None:
    stats = json.loads((dataset / "meta/stats.json").read_text())
    states = np.concatenate([episode(i).states for i in range(5)])
    for name, value in (("mean", states.mean(0)), ("std", states.std(0)), ("max", states.max(0))):
        np.testing.assert_allclose(stats["observation.state"][name], value, atol=1e-6)


def test_a_dataset_is_continued_only_by_its_own_kind(dataset: Path) -> None:
    assert EpisodeWriter(dataset, META).add([episode(5)]) == 6
    for change, message in (
        ({"env_id": "PullCube-v1"}, "env_id"),
        ({"camera": {"name": "other"}}, "camera"),
        ({"horizon": 7}, "horizon"),
        ({"action_spec": ActionSpec(control_hz=10)}, "control_hz"),
    ):
        with pytest.raises(ValueError, match=message):
            EpisodeWriter(dataset, dataclasses.replace(META, **change))
    loads(dataset, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": np.zeros((T + 1, 16, 16, 3), np.uint8)}, "frames"),
        ({"frames": np.zeros((T + 1, SIZE, SIZE, 3), np.float32)}, "frames"),
        ({"actions": np.full((T, 7), np.nan, np.float32)}, "finite"),
        ({"actions": np.full((T, 7), 3, np.float32)}, "outside"),
        ({"states": np.full((T + 1, 7), np.inf, np.float32)}, "states"),
    ],
)
def test_episodes_that_do_not_fit_are_refused(
    dataset: Path, change: dict[str, Any], message: str
) -> None:
    bad = dataclasses.replace(episode(7), **change)
    with pytest.raises(ValueError, match=message):
        EpisodeWriter(dataset, META).add([episode(5), bad])
    loads(dataset, 5)


# ---------------------------------------------------------------- several and killed writers

WRITER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_episodes as t
from worldloop import episodes as module
root = Path({root!r})
writer = module.EpisodeWriter(root, t.META)
"""


def start(root: Path, code: str) -> subprocess.Popen[bytes]:
    head = WRITER.format(tests=str(Path(__file__).parent), root=str(root))
    return subprocess.Popen([sys.executable, "-c", head + textwrap.dedent(code)])


def test_two_processes_write_one_dataset(tmp_path: Path) -> None:
    code = """
    for _ in range(4):
        writer.add([t.episode(seed) for seed in writer.claim_seeds(3, 100)])
    """
    processes = [start(tmp_path, code) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    loads(tmp_path, 24)
    assert sorted(EpisodeDataset(tmp_path).seeds) == list(range(100, 124))


@pytest.mark.parametrize("moment", range(1, 7))
def test_a_writer_killed_between_its_files(dataset: Path, moment: int) -> None:
    """SIGKILL at each rename of a shard: data, video, episodes, tasks, stats, info."""
    code = f"""
    real, count = os.replace, 0
    def replace(source, target):
        global count
        count += 1
        if count == {moment}:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
    os.replace = replace
    writer.add([t.episode(20), t.episode(21)])
    """
    process = start(dataset, code)
    assert process.wait(60) == -signal.SIGKILL
    loads_rows(dataset, 5)
    assert EpisodeWriter(dataset, META).add([episode(5)]) == 6
    loads(dataset, 6)
    leftovers = [p.name for p in dataset.rglob("*") if "staging" in p.name or ".tmp" in p.name]
    assert leftovers == []


def loads_rows(root: Path, count: int) -> None:
    """As `loads`, without the statistics, which a killed writer may have run ahead with."""
    for one in (found := EpisodeDataset(root)).stream():
        check_same(one, episode(one.seed))
    assert len(found) == count


# ---------------------------------------------------------------- full and bad disks


@pytest.mark.parametrize("moment", range(1, 7))
def test_a_full_disk_leaves_what_was_there(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    count = 0

    def full(source: Any, target: Any, real: Any = os.replace) -> None:
        nonlocal count
        count += 1
        if count == moment:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", full)
        with pytest.raises((OSError, ValueError), match="disk is full"):
            EpisodeWriter(dataset, META).add([episode(20)])
    loads_rows(dataset, 5)
    assert not list(dataset.glob(".staging*"))
    assert EpisodeWriter(dataset, META).add([episode(5)]) == 6
    loads(dataset, 6)


def test_a_full_disk_while_the_video_is_written(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_video", full)
        with pytest.raises((OSError, ValueError), match="disk is full"):
            EpisodeWriter(dataset, META).add([episode(20)])
    loads(dataset, 5)


def video_of(dataset: Path) -> Path:
    return dataset / f"videos/{VIDEO_KEY}/chunk-000/file-001.mp4"


@pytest.mark.parametrize("kept", [0, 100, 2000])
def test_a_truncated_video_is_named(dataset: Path, kept: int) -> None:
    path = video_of(dataset)
    path.write_bytes(path.read_bytes()[:kept])
    EpisodeDataset(dataset).read(1)  # the other shard is whole
    with pytest.raises(ValueError, match="file-001.mp4"):
        EpisodeDataset(dataset).read(3)


def test_a_damaged_video_is_named(dataset: Path) -> None:
    path = video_of(dataset)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4
    data[at + 900 : at + 1500] = bytes(600)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="file-001.mp4"):
        for number in (2, 3, 4):
            EpisodeDataset(dataset).read(number)


def test_a_missing_or_foreign_video_is_named(dataset: Path) -> None:
    path = video_of(dataset)
    path.write_bytes(b"no video at all " * 100)
    with pytest.raises(ValueError, match="file-001.mp4"):
        EpisodeDataset(dataset).read(3)
    path.unlink()
    with pytest.raises(ValueError, match="file-001.mp4"):
        EpisodeDataset(dataset).read(3)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("meta/info.json", "{", "info.json"),
        ("meta/info.json", "{}", "codebase_version is None"),
        ("meta/info.json", '{"codebase_version": "v2.1"}', "expected 'v3.0'"),
        ("meta/info.json", '{"codebase_version": "v3.0"}', "info.json.*(fps|total_episodes)"),
        ("meta/worldloop.json", "not json", "worldloop.json"),
        ("meta/worldloop.json", "{}", "worldloop.json.*action_spec"),
        ("meta/worldloop.json", '{"action_spec": {"dimension": 7}}', "dimension"),
        ("meta/episodes/chunk-000/file-000.parquet", "PAR1", "file-000.parquet"),
        ("data/chunk-000/file-000.parquet", "PAR1", "file-000.parquet"),
    ],
)
def test_wrong_metadata_is_named(dataset: Path, file: str, text: str, message: str) -> None:
    (dataset / file).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        EpisodeDataset(dataset).read(0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        "meta/info.json",
        "meta/worldloop.json",
        "meta/episodes/chunk-000/file-000.parquet",
        "data/chunk-000/file-000.parquet",
    ],
)
def test_a_missing_file_is_named(dataset: Path, file: str) -> None:
    (dataset / file).unlink()
    with pytest.raises(FileNotFoundError, match=Path(file).name):
        EpisodeDataset(dataset).read(0)
