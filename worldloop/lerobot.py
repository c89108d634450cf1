"""The tables of the LeRobotDataset v3.0 layout: what its files are called and what is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from worldloop.types import ActionSpec, Episode

VIDEO_KEY = "observation.images.third_person"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
FILES_PER_CHUNK = 1000
STATS = ("action", "observation.state", "next.reward")


def place_of(shard: int) -> dict[str, int]:
    """Where the files of shard number ``shard`` lie."""
    return {"chunk_index": shard // FILES_PER_CHUNK, "file_index": shard % FILES_PER_CHUNK}


def empty_info(image_size: int, spec: ActionSpec, objects: int) -> dict[str, Any]:
    """meta/info.json of a dataset without episodes; ``objects``: tracked objects a frame."""
    return {
        "codebase_version": "v3.0",
        "robot_type": "panda",
        "total_episodes": 0,
        "total_frames": 0,
        "total_tasks": 0,
        "worldloop_shards": 0,
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": int(spec.control_hz),
        "splits": {"train": "0:0"},
        "data_path": DATA,
        "video_path": VIDEO,
        "features": features(image_size, spec, objects),
    }


def features(size: int, spec: ActionSpec, objects: int) -> dict[str, Any]:
    """LeRobot's description of every column."""

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


def episode_tables(
    episodes: Sequence[Episode],
    info: dict[str, Any],
    task_names: list[str],
    place: dict[str, int],
    fps: int,
) -> tuple[pa.Table, pa.Table]:
    """The rows of a shard, one a frame, and its index, one row an episode.

    ``info`` is meta/info.json before the shard is counted; ``place`` names its files.
    """
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


def tasks_table(names: Sequence[str]) -> pa.Table:
    """meta/tasks.parquet as LeRobot's own loader (pandas) expects it: the name is the index."""
    table = pa.table({"task_index": list(range(len(names))), "__index_level_0__": names})
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
    return table.replace_schema_metadata({"pandas": json.dumps(pandas_meta)})


def merged_stats(stats: dict[str, Any], rows: pa.Table, before: int) -> dict[str, Any]:
    """Fold a shard's rows into statistics of ``before`` rows (count-weighted moments)."""
    merged: dict[str, Any] = {}
    for name in STATS:
        x = np.asarray(rows[name].to_pylist(), np.float64).reshape(rows.num_rows, -1)
        new = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
        if before:
            old = {k: np.asarray(v) for k, v in stats[name].items()}
            n, m = before, len(x)
            mean = (old["mean"] * n + new["mean"] * m) / (n + m)
            square = (
                n * (old["std"] ** 2 + old["mean"] ** 2) + m * (new["std"] ** 2 + new["mean"] ** 2)
            ) / (n + m)
            new = {
                "min": np.minimum(old["min"], new["min"]),
                "max": np.maximum(old["max"], new["max"]),
                "mean": mean,
                "std": np.sqrt(np.maximum(square - mean**2, 0)),
            }
        merged[name] = {k: v.tolist() for k, v in new.items()}
        merged[name]["count"] = [before + rows.num_rows]
    return merged
