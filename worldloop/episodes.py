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
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from worldloop.types import ActionSpec, Episode

VIDEO_KEY = "observation.images.third_person"
_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_FILES_PER_CHUNK = 1000
_STATS = ("action", "observation.state", "next.reward")


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
        return {**self.__dict__, "action_spec": self.action_spec.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DatasetMeta:
        spec = ActionSpec.from_dict(values["action_spec"])
        return cls(**{**values, "action_spec": spec})


def _write_atomic(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    _write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def encode_video(path: Path, episodes: Sequence[npt.NDArray[np.uint8]], fps: int, crf: int) -> None:
    """Write episodes [T,H,W,3] one after another to an H.264 file; each starts with a key frame.

    Colour is kept at full resolution (4:4:4): a cube of 11 pixels is 5 chroma samples otherwise.
    """
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        height, width = episodes[0].shape[1:3]
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p"
        stream.time_base = Fraction(1, fps)
        options = {"crf": str(crf), "preset": "medium", "bf": "0", "x264-params": "threads=1"}
        stream.options = options
        stream.codec_context.gop_size = 100_000
        index = 0
        for frames in episodes:
            for t, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, fps)
                frame.pict_type = (
                    av.video.frame.PictureType.I if t == 0 else av.video.frame.PictureType.NONE
                )
                container.mux(stream.encode(frame))
                index += 1
        container.mux(stream.encode())


def decode_video(path: Path, start: int, count: int, fps: int) -> npt.NDArray[np.uint8]:
    """Frames ``start .. start+count-1`` of a video as uint8 [count,H,W,3].

    Raises ValueError naming the file when it is missing, corrupt or too short.
    """
    frames: list[npt.NDArray[np.uint8]] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            base = stream.time_base or Fraction(1, fps)
            container.seek(int(Fraction(start, fps) / base), stream=stream)
            for frame in container.decode(stream):
                index = round(float(frame.pts * base) * fps) if frame.pts is not None else -1
                if index < start:
                    continue
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == count:
                    break
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"{path}: cannot decode the video ({error}); collect it again") from error
    if len(frames) < count:
        raise ValueError(
            f"{path}: holds {len(frames)} frames from {start} on, expected {count}; "
            "the file is cut short, restore or collect it again"
        )
    return np.stack(frames)


def _features(size: int, spec: ActionSpec, objects: int) -> dict[str, Any]:
    def column(dtype: str, shape: list[int], names: Any = None) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "names": names}

    video = column("video", [size, size, 3], ["height", "width", "channels"])
    video["info"] = {
        "video.fps": spec.control_hz,
        "video.height": size,
        "video.width": size,
        "video.channels": 3,
        "video.codec": "h264",
        "video.pix_fmt": "yuv444p",
        "video.is_depth_map": False,
        "has_audio": False,
    }
    return {
        VIDEO_KEY: video,
        "observation.state": column("float32", [spec.dim], list(spec.names)),
        "observation.environment_state": column("float32", [objects * 7]),
        "observation.object_pixels": column("float32", [objects * 2]),
        "action": column("float32", [spec.dim], list(spec.names)),
        "next.reward": column("float32", [1]),
        "next.success": column("bool", [1]),
        "next.done": column("bool", [1]),
        "timestamp": column("float32", [1]),
        "frame_index": column("int64", [1]),
        "episode_index": column("int64", [1]),
        "index": column("int64", [1]),
        "task_index": column("int64", [1]),
    }


class EpisodeWriter:
    """Adds shards of episodes to a dataset; any number of writers may share one folder."""

    def __init__(self, root: Path | str, meta: DatasetMeta, crf: int = 16):
        self.root, self.meta, self.crf = Path(root), meta, crf
        self.root.mkdir(parents=True, exist_ok=True)
        with self.lock():
            path = self.root / "meta/worldloop.json"
            if path.exists():
                there = DatasetMeta.from_dict(json.loads(path.read_text()))
                meta.action_spec.require_same(there.action_spec, "this collection", str(root))
                for name in ("env_id", "camera", "horizon", "image_size"):
                    mine, theirs = getattr(meta, name), getattr(there, name)
                    if json.dumps(mine) != json.dumps(theirs):
                        raise ValueError(
                            f"{root}: its {name} is {theirs!r}, this collection's {mine!r}; "
                            "collect into another folder"
                        )
            else:
                _write_json(path, meta.to_dict())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the dataset's lock; it is released by the kernel when a process dies."""
        (self.root / "meta").mkdir(parents=True, exist_ok=True)
        with open(self.root / "meta/.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def claim_seeds(self, count: int, first: int) -> range:
        """Seeds that no other writer of this dataset has been given, ``first`` at the lowest."""
        with self.lock():
            path = self.root / "meta/claimed.json"
            claimed = json.loads(path.read_text())["next_seed"] if path.exists() else first
            claimed = max(claimed, first)
            _write_json(path, {"next_seed": claimed + count})
        return range(claimed, claimed + count)

    def add(self, episodes: Sequence[Episode]) -> int:
        """Write one shard; return the number of episodes the dataset now holds.

        Raises OSError (a full disk, say) with the dataset as it was before the call.
        """
        fps = int(self.meta.action_spec.control_hz)
        staging = self.root / f".staging-{os.getpid()}"
        staging.mkdir(exist_ok=True)
        try:
            video = staging / "video.mp4"
            encode_video(video, [e.frames for e in episodes], fps, self.crf)
            with self.lock():
                return self._commit(episodes, video, staging, fps)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _commit(self, episodes: Sequence[Episode], video: Path, staging: Path, fps: int) -> int:
        info = self._info(episodes[0])
        file_number = info["worldloop_shards"]
        place = {
            "chunk_index": file_number // _FILES_PER_CHUNK,
            "file_index": file_number % _FILES_PER_CHUNK,
        }
        tasks_path = self.root / "meta/tasks.parquet"
        tasks = pq.read_table(tasks_path).to_pydict() if tasks_path.exists() else None
        task_names: list[str] = list(tasks["__index_level_0__"]) if tasks else []
        for episode in episodes:
            if episode.instruction not in task_names:
                task_names.append(episode.instruction)
        rows, index_rows = self._rows(episodes, info, task_names, place, fps)
        for name, table in (("data", rows), ("episodes", index_rows)):
            pq.write_table(table, staging / f"{name}.parquet")
        for name, template in (("data", _DATA), ("video", _VIDEO), ("episodes", _EPISODES)):
            target = self.root / template.format(video_key=VIDEO_KEY, **place)
            target.parent.mkdir(parents=True, exist_ok=True)
            source = video if name == "video" else staging / f"{name}.parquet"
            with open(source, "rb") as file:
                os.fsync(file.fileno())
            os.replace(source, target)
        table = pa.table(
            {"task_index": list(range(len(task_names))), "__index_level_0__": task_names}
        )
        pandas_meta = {
            "index_columns": ["__index_level_0__"],
            "column_indexes": [],
            "columns": [
                {"name": "task_index", "field_name": "task_index", "pandas_type": "int64",
                 "numpy_type": "int64", "metadata": None},
                {"name": None, "field_name": "__index_level_0__", "pandas_type": "unicode",
                 "numpy_type": "object", "metadata": None},
            ],
        }  # fmt: skip
        table = table.replace_schema_metadata({"pandas": json.dumps(pandas_meta)})
        pq.write_table(table, staging / "tasks.parquet")
        os.replace(staging / "tasks.parquet", tasks_path)
        info["total_episodes"] += len(episodes)
        info["total_frames"] += rows.num_rows
        info["total_tasks"] = len(task_names)
        info["worldloop_shards"] += 1
        info["splits"] = {"train": f"0:{info['total_episodes']}"}
        self._merge_stats(rows, info["total_frames"] - rows.num_rows)
        _write_json(self.root / "meta/info.json", info)
        return int(info["total_episodes"])

    def _info(self, episode: Episode) -> dict[str, Any]:
        path = self.root / "meta/info.json"
        if path.exists():
            loaded: dict[str, Any] = json.loads(path.read_text())
            return loaded
        objects = 0 if episode.objects is None else episode.objects.shape[1]
        return {
            "codebase_version": "v3.0",
            "robot_type": "panda",
            "total_episodes": 0,
            "total_frames": 0,
            "total_tasks": 0,
            "worldloop_shards": 0,
            "chunks_size": _FILES_PER_CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": int(self.meta.action_spec.control_hz),
            "splits": {"train": "0:0"},
            "data_path": _DATA,
            "video_path": _VIDEO,
            "features": _features(self.meta.image_size, self.meta.action_spec, objects),
        }

    def _rows(
        self,
        episodes: Sequence[Episode],
        info: dict[str, Any],
        task_names: list[str],
        place: dict[str, int],
        fps: int,
    ) -> tuple[pa.Table, pa.Table]:
        columns: dict[str, list[Any]] = {}
        index: dict[str, list[Any]] = {}
        row, in_file = info["total_frames"], 0
        for offset, e in enumerate(episodes):
            n = len(e.frames)
            episode_index = info["total_episodes"] + offset
            task_index = task_names.index(e.instruction)
            last = np.zeros((1, e.actions.shape[1]), np.float32)
            reward = np.append(e.reward, e.reward[-1:]).astype(np.float32)
            objects = np.zeros((n, 0), np.float32) if e.objects is None else e.objects
            pixels = np.zeros((n, 0), np.float32) if e.object_pixels is None else e.object_pixels
            added = {
                "observation.state": list(e.states),
                "observation.environment_state": list(objects.reshape(n, -1)),
                "observation.object_pixels": list(pixels.reshape(n, -1)),
                "action": list(np.concatenate([e.actions, last])),
                "next.reward": list(reward),
                "next.success": list(reward > 0.5),
                "next.done": [t == n - 1 for t in range(n)],
                "timestamp": list((np.arange(n) / fps).astype(np.float32)),
                "frame_index": list(range(n)),
                "episode_index": [episode_index] * n,
                "index": list(range(row, row + n)),
                "task_index": [task_index] * n,
            }
            for name, values in added.items():
                columns.setdefault(name, []).extend(values)
            video = f"videos/{VIDEO_KEY}"
            entry: dict[str, Any] = {
                "episode_index": episode_index,
                "tasks": [e.instruction],
                "length": n,
                "data/chunk_index": place["chunk_index"],
                "data/file_index": place["file_index"],
                "dataset_from_index": row,
                "dataset_to_index": row + n,
                f"{video}/chunk_index": place["chunk_index"],
                f"{video}/file_index": place["file_index"],
                f"{video}/from_timestamp": in_file / fps,
                f"{video}/to_timestamp": (in_file + n) / fps,
                "meta/episodes/chunk_index": place["chunk_index"],
                "meta/episodes/file_index": place["file_index"],
                "seed": e.seed,
                "success": e.success,
                "env_id": e.env_id,
                "info": json.dumps(e.info),
            }
            for name, value in entry.items():
                index.setdefault(name, []).append(value)
            row, in_file = row + n, in_file + n
        return pa.table(columns), pa.table(index)

    def _merge_stats(self, rows: pa.Table, before: int) -> None:
        """Fold a shard into meta/stats.json (count-weighted mean and second moment)."""
        path = self.root / "meta/stats.json"
        stats: dict[str, Any] = json.loads(path.read_text()) if path.exists() and before else {}
        for name in _STATS:
            x = np.asarray(rows[name].to_pylist(), np.float64).reshape(rows.num_rows, -1)
            new = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
            if name in stats:
                old = {k: np.asarray(v) for k, v in stats[name].items()}
                n, m = before, len(x)
                mean = (old["mean"] * n + new["mean"] * m) / (n + m)
                square = (
                    n * (old["std"] ** 2 + old["mean"] ** 2)
                    + m * (new["std"] ** 2 + new["mean"] ** 2)
                ) / (n + m)
                new = {
                    "min": np.minimum(old["min"], new["min"]),
                    "max": np.maximum(old["max"], new["max"]),
                    "mean": mean,
                    "std": np.sqrt(np.maximum(square - mean**2, 0)),
                }
            stats[name] = {k: v.tolist() for k, v in new.items()}
            stats[name]["count"] = [before + rows.num_rows]
        _write_json(path, stats)


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
        try:
            self.info: dict[str, Any] = json.loads(info_path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{info_path} is not JSON ({error})") from error
        version = self.info.get("codebase_version")
        if version != "v3.0":
            raise ValueError(f"{info_path}: codebase_version is {version!r}; expected 'v3.0'")
        meta_path = self.root / "meta/worldloop.json"
        if not meta_path.exists():
            raise FileNotFoundError(
                f"{meta_path} is missing: it names the action spec, which is never guessed"
            )
        self.meta = DatasetMeta.from_dict(json.loads(meta_path.read_text()))
        self.fps = int(self.info["fps"])
        self._index = self._read_index()
        self._cached_rows: tuple[str, pa.Table] | None = None

    def _read_index(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        number = 0
        while len(rows) < self.info["total_episodes"]:
            path = self.root / _EPISODES.format(
                chunk_index=number // _FILES_PER_CHUNK, file_index=number % _FILES_PER_CHUNK
            )
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

    def read(self, episode: int, frames: bool = True) -> Episode:
        """One episode; ``frames=False`` leaves the pictures out (an empty array of zeros)."""
        if not 0 <= episode < len(self):
            raise IndexError(f"episode {episode} of a dataset of {len(self)}: {self.root}")
        entry = self._index[episode]
        name = _DATA.format(
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

        video = f"videos/{VIDEO_KEY}"
        size = self.meta.image_size
        pictures = np.zeros((n, 0, 0, 3), np.uint8)
        if frames:
            path = self.root / _VIDEO.format(
                video_key=VIDEO_KEY,
                chunk_index=entry[f"{video}/chunk_index"],
                file_index=entry[f"{video}/file_index"],
            )
            start = round(entry[f"{video}/from_timestamp"] * self.fps)
            pictures = decode_video(path, start, n, self.fps)
            if pictures.shape[1:3] != (size, size):
                raise ValueError(f"{path}: frames are {pictures.shape[1:3]}, meta says {size}")
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

    def stream(self, frames: bool = True) -> Iterator[Episode]:
        """Every episode in order, one in memory at a time."""
        for episode in range(len(self)):
            yield self.read(episode, frames)
