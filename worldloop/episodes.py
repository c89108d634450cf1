"""SANS episodes on disk (paper section 3.1) in the LeRobotDataset v3.0 layout.

    meta/info.json                                totals, features, path templates: the truth
    meta/tasks.parquet                            instruction by task_index
    meta/stats.json                               mean, std, min, max of numeric features
    meta/worldloop.json                           action spec, camera, task: what LeRobot lacks
    meta/episodes/chunk-000/file-000.parquet      one row an episode: where its rows and video lie
    data/chunk-000/file-000.parquet               one row a frame
    videos/observation.images.third_person/chunk-000/file-000.mp4

An episode of T actions has T+1 rows; the last row's action repeats no motion (zeros) and its
``next.done`` is true. Writers add whole *shards* (one file of each kind) under a file lock and
count them in ``info.json`` last, by rename: what a killed writer left behind is not counted and
is overwritten by the next shard. Readers trust ``info.json`` alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from worldloop.config import config_from_dict, config_to_dict, read_json
from worldloop.errors import UserError
from worldloop.files import atomic_write_text, disk_error, fsync_path, left_behind
from worldloop.lerobot import (
    DATA,
    EPISODES,
    STATS,
    VIDEO,
    VIDEO_KEY,
    empty_info,
    episode_tables,
    merged_stats,
    place_of,
    tasks_table,
)
from worldloop.types import ActionSpec, Episode
from worldloop.video import decode_video, encode_video

__all__ = ["VIDEO_KEY", "DatasetMeta", "EpisodeDataset", "EpisodeWriter"]

# Followed by the process's number. With the machine's name, as folders may be shared by several.
_STAGING = f".staging-{platform.node()}-"


@dataclass(frozen=True)
class DatasetMeta:
    """What a dataset says about itself beyond LeRobot's own fields."""

    action_spec: ActionSpec
    env_id: str
    camera: dict[str, Any]
    horizon: int
    image_size: int
    goal: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "dataset") -> DatasetMeta:
        """From `to_dict`; raises UserError naming the key that is unknown, missing or wrong."""
        return config_from_dict(cls, values, where)

    @classmethod
    def load(cls, path: Path) -> DatasetMeta:
        """Read meta/worldloop.json; errors name the file."""
        return cls.from_dict(read_json(path), str(path))


def _write_json(path: Path, value: Any) -> None:
    atomic_write_text(path, json.dumps(value, indent=2) + "\n")


class EpisodeWriter:
    """Adds shards of episodes to a dataset; any number of writers may share one folder."""

    def __init__(self, root: Path | str, meta: DatasetMeta, crf: int = 16):
        self.root, self.meta, self.crf = Path(root), meta, crf
        with self.lock():
            path = self.root / "meta/worldloop.json"
            if path.exists():
                there = DatasetMeta.load(path)
                meta.action_spec.require_same(there.action_spec, "this collection", str(root))
                for name in ("env_id", "camera", "horizon", "image_size"):
                    mine, theirs = getattr(meta, name), getattr(there, name)
                    if json.dumps(mine) != json.dumps(theirs):
                        raise UserError(
                            f"{root}: its {name} is {theirs!r}, this collection's {mine!r}; "
                            "collect into another folder"
                        )
            else:
                _write_json(path, meta.to_dict())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the dataset's lock; it is released by the kernel when a process dies."""
        folder = self.root / "meta"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / ".lock", "w")  # noqa: SIM115
        except OSError as error:
            raise disk_error(folder, error) or error from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def claim_seeds(self, count: int, first: int) -> range:
        """Seeds that no other writer of this dataset has been given, ``first`` at the lowest."""
        with self.lock():
            path = self.root / "meta/claimed.json"
            claimed = int(read_json(path)["next_seed"]) if path.exists() else first
            claimed = max(claimed, first)
            _write_json(path, {"next_seed": claimed + count})
        return range(claimed, claimed + count)

    def add(self, episodes: Sequence[Episode]) -> int:
        """Write one shard; return the number of episodes the dataset now holds.

        Raises UserError for an episode that does not fit the dataset, or for a disk that is full
        or not writable; the dataset then is as it was before the call.
        """
        if not episodes:
            raise UserError(f"{self.root}: no episodes to add")
        for number, episode in enumerate(episodes):
            self._check(episode, f"{self.root}: episode {number} of the shard")
        fps = int(self.meta.action_spec.control_hz)
        staging = self.root / f"{_STAGING}{os.getpid()}"
        try:
            staging.mkdir(exist_ok=True)
            video = staging / "video.mp4"
            encode_video(video, [e.frames for e in episodes], fps, self.crf)
            with self.lock():
                return self._commit(episodes, video, staging, fps)
        except OSError as error:
            raise disk_error(self.root, error) or error from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _check(self, episode: Episode, where: str) -> None:
        size = self.meta.image_size
        frames = episode.frames
        if frames.dtype != np.uint8 or frames.shape[1:] != (size, size, 3):
            raise UserError(
                f"{where}: frames is {frames.dtype} {list(frames.shape)}; "
                f"expected uint8 [T+1, {size}, {size}, 3]"
            )
        self.meta.action_spec.check(episode.actions[None], f"{where}: actions")
        for name in ("states", "reward", "objects", "object_pixels"):
            value = getattr(episode, name)
            if value is not None and not np.isfinite(value).all():
                raise UserError(f"{where}: {name} holds a value that is not finite")

    def _commit(self, episodes: Sequence[Episode], video: Path, staging: Path, fps: int) -> int:
        self._sweep()
        info = self._info(episodes[0])
        place = place_of(info["worldloop_shards"])
        tasks_path = self.root / "meta/tasks.parquet"
        tasks = pq.read_table(tasks_path).to_pydict() if tasks_path.exists() else None
        task_names: list[str] = list(tasks["__index_level_0__"]) if tasks else []
        for episode in episodes:
            if episode.instruction not in task_names:
                task_names.append(episode.instruction)
        rows, index_rows = episode_tables(episodes, info, task_names, place, fps)
        stats = merged_stats(self._stats(info), rows, info["total_frames"])
        for name, table, target in (
            ("data", rows, DATA),
            ("video", None, VIDEO),
            ("episodes", index_rows, EPISODES),
            ("tasks", tasks_table(task_names), "meta/tasks.parquet"),
        ):
            source = video if table is None else staging / f"{name}.parquet"
            if table is not None:
                pq.write_table(table, source)
            fsync_path(source)
            final = self.root / target.format(video_key=VIDEO_KEY, **place)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, final)
        info["total_episodes"] += len(episodes)
        info["total_frames"] += rows.num_rows
        info["total_tasks"] = len(task_names)
        info["worldloop_shards"] += 1
        info["splits"] = {"train": f"0:{info['total_episodes']}"}
        _write_json(self.root / "meta/stats.json", stats)
        _write_json(self.root / "meta/info.json", info)
        return int(info["total_episodes"])

    def _sweep(self) -> None:
        """Remove what killed writers of this machine left; the lock is held."""
        for folder in self.root.glob(f"{_STAGING}*"):
            number = folder.name.removeprefix(_STAGING)
            # Our own is what this writer is about to add.
            if number != str(os.getpid()) and left_behind(number):
                shutil.rmtree(folder, ignore_errors=True)
        for file in (self.root / "meta").glob(".*.tmp"):  # only lock holders write these
            file.unlink(missing_ok=True)

    def _info(self, episode: Episode) -> dict[str, Any]:
        path = self.root / "meta/info.json"
        if path.exists():
            return read_json(path)
        objects = 0 if episode.objects is None else episode.objects.shape[1]
        return empty_info(self.meta.image_size, self.meta.action_spec, objects)

    def _stats(self, info: dict[str, Any]) -> dict[str, Any]:
        """Statistics of the rows that are counted.

        A writer killed between stats.json and info.json leaves statistics that run ahead: they
        are made again from the shards.
        """
        path, counted = self.root / "meta/stats.json", info["total_frames"]
        stats = read_json(path) if path.exists() else {}
        if not counted or all(stats.get(name, {}).get("count") == [counted] for name in STATS):
            return stats
        stats, before = {}, 0
        for shard in range(info["worldloop_shards"]):
            rows = pq.read_table(self.root / DATA.format(**place_of(shard)))
            stats, before = merged_stats(stats, rows, before), before + rows.num_rows
        return stats


class EpisodeDataset:
    """Reads a dataset: random access by episode, or streaming in order.

    Raises FileNotFoundError or ValueError naming the file that is missing or wrong.
    """

    def __init__(self, root: Path | str):
        self.root = Path(root)
        info_path = self.root / "meta/info.json"
        if not info_path.exists():
            raise FileNotFoundError(
                f"{info_path} is missing: not a LeRobotDataset v3 folder, or nothing collected yet"
            )
        self.info = read_json(info_path)
        version = self.info.get("codebase_version")
        if version != "v3.0":
            raise UserError(f"{info_path}: codebase_version is {version!r}; expected 'v3.0'")
        for key in ("total_episodes", "total_frames", "fps"):
            if not isinstance(self.info.get(key), int):
                raise UserError(f"{info_path}: {key} is {self.info.get(key)!r}; restore the file")
        meta_path = self.root / "meta/worldloop.json"
        if not meta_path.exists():
            raise FileNotFoundError(
                f"{meta_path} is missing: it names the action spec, which is never guessed"
            )
        self.meta = DatasetMeta.load(meta_path)
        self.fps = int(self.info["fps"])
        self._index = self._read_index()
        self._cached_rows: tuple[str, pa.Table] | None = None

    def _read_index(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        number = 0
        while len(rows) < self.info["total_episodes"]:
            path = self.root / EPISODES.format(**place_of(number))
            rows.extend(self._table(path).to_pylist())
            number += 1
        return rows[: self.info["total_episodes"]]

    @staticmethod
    def _table(path: Path) -> pa.Table:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing though info.json counts its episodes")
        try:
            return pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); collect it again") from error

    def __len__(self) -> int:
        return len(self._index)

    @property
    def success(self) -> npt.NDArray[np.bool_]:
        """Outcome by episode [N]."""
        return np.array([row["success"] for row in self._index], bool)

    @property
    def seeds(self) -> list[int]:
        return [row["seed"] for row in self._index]

    @property
    def sim_seeds(self) -> list[int | None]:
        """By episode, the seed that a simulator's reset begins it from again (None: recorded).

        With it the simulator shows the episode's first frame and pose once more, and the same
        actions lead to the same outcome.
        """
        seeds = [json.loads(row["info"]).get("sim_seed") for row in self._index]
        return [None if seed is None else int(seed) for seed in seeds]

    def read(self, episode: int, frames: bool = True) -> Episode:
        """One episode; ``frames=False`` leaves the pictures out (an empty array of zeros)."""
        entry = self._entry(episode)
        name = DATA.format(
            chunk_index=entry["data/chunk_index"], file_index=entry["data/file_index"]
        )
        if self._cached_rows is None or self._cached_rows[0] != name:
            self._cached_rows = (name, self._table(self.root / name))
        table = self._cached_rows[1]
        first = entry["dataset_from_index"] - table["index"][0].as_py()
        n = entry["length"]
        rows = table.slice(first, n)
        if rows.num_rows != n:
            raise ValueError(f"{self.root / name}: has too few rows for episode {episode}")

        def column(key: str) -> npt.NDArray[np.float32]:
            return np.asarray(rows[key].to_pylist(), np.float32)

        pictures = self._pictures(episode, n) if frames else np.zeros((n, 0, 0, 3), np.uint8)
        objects = column("observation.environment_state")
        pixels = column("observation.object_pixels")
        return Episode(
            frames=pictures,
            actions=column("action")[:-1],
            states=column("observation.state"),
            reward=column("next.reward")[:-1].reshape(-1),
            instruction=entry["tasks"][0],
            env_id=entry["env_id"],
            seed=entry["seed"],
            success=bool(entry["success"]),
            objects=objects.reshape(n, -1, 7) if objects.size else None,
            object_pixels=pixels.reshape(n, -1, 2) if pixels.size else None,
            info=json.loads(entry["info"]),
        )

    def first_frame(self, episode: int) -> npt.NDArray[np.uint8]:
        """An episode's first picture [H,W,3]; the others are not decoded."""
        return self._pictures(episode, 1)[0]

    def _entry(self, episode: int) -> dict[str, Any]:
        if not 0 <= episode < len(self):
            raise IndexError(f"episode {episode} of a dataset of {len(self)}: {self.root}")
        return self._index[episode]

    def _pictures(self, episode: int, count: int) -> npt.NDArray[np.uint8]:
        entry, video, size = self._entry(episode), f"videos/{VIDEO_KEY}", self.meta.image_size
        path = self.root / VIDEO.format(
            video_key=VIDEO_KEY,
            chunk_index=entry[f"{video}/chunk_index"],
            file_index=entry[f"{video}/file_index"],
        )
        start = round(entry[f"{video}/from_timestamp"] * self.fps)
        pictures = decode_video(path, start, count, self.fps)
        if pictures.shape[1:3] != (size, size):
            raise ValueError(f"{path}: frames are {pictures.shape[1:3]}, meta says {size}")
        return pictures

    def stream(self, frames: bool = True) -> Iterator[Episode]:
        """Every episode in order, one in memory at a time."""
        for episode in range(len(self)):
            yield self.read(episode, frames)
