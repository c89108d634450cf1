"""Several datasets of one task as one: videos are copied as they are, tables are renumbered."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from worldloop.episodes import DatasetMeta, EpisodeDataset
from worldloop.errors import UserError
from worldloop.files import atomic_write_text, fsync_path, new_folder
from worldloop.lerobot import (
    DATA,
    EPISODES,
    VIDEO,
    VIDEO_KEY,
    features,
    merged_stats,
    place_of,
    tasks_table,
)

# What only simulated episodes have; where one dataset lacks it, the whole has none.
OBJECTS = ("observation.environment_state", "observation.object_pixels")


def merge_datasets(sources: Sequence[Path], out: Path) -> EpisodeDataset:
    """Write the episodes of ``sources``, in their order, as the new dataset ``out``.

    Nothing is encoded again. ``out`` appears whole or not at all. Raises UserError where the
    sources differ in task, camera, action spec, horizon or picture size, where one episode is in
    two of them, and where ``out`` exists.
    """
    if not sources:
        raise UserError("merge: no datasets given")
    datasets = [EpisodeDataset(source) for source in sources]
    _require_same(datasets)
    _require_distinct(datasets)
    with new_folder(out) as folder:
        _write(datasets, folder)
    return EpisodeDataset(out)


def subset_dataset(source: Path, episodes: Sequence[int], out: Path) -> EpisodeDataset:
    """Write some episodes of ``source``, in its own order, as the new dataset ``out``.

    Nothing is encoded again: a video is copied whole where one of its episodes is kept. ``out``
    appears whole or not at all. Raises UserError for no episodes, for numbers that are not there
    or there twice, and where ``out`` exists.
    """
    dataset, keep = EpisodeDataset(source), set(episodes)
    if not keep:
        raise UserError(f"{source}: no episodes chosen for {out}")
    if len(keep) != len(episodes) or min(keep) < 0 or max(keep) >= len(dataset):
        raise UserError(
            f"{source}: episodes must be distinct numbers of 0 .. {len(dataset) - 1} for {out}"
        )
    with new_folder(out) as folder:
        _write([dataset], folder, keep)
    return EpisodeDataset(out)


def _require_same(datasets: Sequence[EpisodeDataset]) -> None:
    first = datasets[0]
    for other in datasets[1:]:
        first.meta.action_spec.require_same(
            other.meta.action_spec, str(first.root), str(other.root)
        )
        for name in ("env_id", "camera", "horizon", "image_size"):
            mine, theirs = getattr(first.meta, name), getattr(other.meta, name)
            if json.dumps(mine) != json.dumps(theirs):
                raise UserError(
                    f"{other.root}: its {name} is {theirs!r}, that of {first.root} {mine!r}; "
                    "only datasets of one task, seen alike, can be merged"
                )


def _require_distinct(datasets: Sequence[EpisodeDataset]) -> None:
    seen: dict[tuple[int, str], str] = {}
    for dataset in datasets:
        for i, episode in enumerate(dataset.stream(frames=False)):
            key = episode_key(episode.seed, episode.actions)
            where = f"episode {i} of {dataset.root}"
            if key in seen:
                raise UserError(f"{where} is also {seen[key]}; merge each episode once")
            seen[key] = where


def episode_key(seed: int, actions_TA: np.ndarray[Any, Any]) -> tuple[int, str]:
    """What tells one episode from another: its seed and what was done in it."""
    return seed, hashlib.sha256(np.ascontiguousarray(actions_TA).tobytes()).hexdigest()


def _write(datasets: Sequence[EpisodeDataset], out: Path, keep: set[int] | None = None) -> None:
    """The datasets' episodes, or those of them that are numbered in ``keep``."""
    meta: DatasetMeta = datasets[0].meta
    info: dict[str, Any] = json.loads(json.dumps(datasets[0].info))
    widths = {
        json.dumps([dataset.info["features"][name]["shape"] for name in OBJECTS])
        for dataset in datasets
    }
    drop_objects = len(widths) > 1
    if drop_objects:
        info["features"] = features(meta.image_size, meta.action_spec, 0)
    info |= {"total_episodes": 0, "total_frames": 0, "worldloop_shards": 0}
    stats: dict[str, Any] = {}
    tasks: list[str] = []
    for dataset in datasets:
        for shard in range(dataset.info["worldloop_shards"]):
            index = _read(dataset.root / EPISODES.format(**place_of(shard)))
            rows = _read(dataset.root / DATA.format(**place_of(shard)))
            if keep is not None:
                rows, index = _only(rows, keep), _only(index, keep)
            if not index.num_rows:
                continue
            if drop_objects:
                for name in OBJECTS:
                    rows = _replaced(rows, name, [[] for _ in range(rows.num_rows)])
            for names in index["tasks"].to_pylist():
                if names[0] not in tasks:
                    tasks.append(names[0])
            rows, index = _renumbered(rows, index, info, tasks)
            stats = merged_stats(stats, rows, info["total_frames"])
            _place(dataset.root, shard, rows, index, out, info["worldloop_shards"])
            info["total_episodes"] += index.num_rows
            info["total_frames"] += rows.num_rows
            info["worldloop_shards"] += 1
    info["total_tasks"] = len(tasks)
    info["splits"] = {"train": f"0:{info['total_episodes']}"}
    _write_table(tasks_table(tasks), out / "meta/tasks.parquet")
    for name, value in (
        ("worldloop", meta.to_dict()), ("stats", stats), ("info", info),
    ):  # fmt: skip
        atomic_write_text(out / f"meta/{name}.json", json.dumps(value, indent=2) + "\n")


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore the dataset") from error


def _only(table: pa.Table, keep: set[int]) -> pa.Table:
    """The rows of the episodes in ``keep``."""
    return table.filter(pa.array([number in keep for number in table["episode_index"].to_pylist()]))


def _renumbered(
    rows: pa.Table, index: pa.Table, info: dict[str, Any], tasks: list[str]
) -> tuple[pa.Table, pa.Table]:
    """A shard's tables as the next shard of the dataset that ``info`` describes."""
    first_row, first_episode = info["total_frames"], info["total_episodes"]
    place = place_of(info["worldloop_shards"])
    n = index.num_rows
    lengths = np.array(index["length"].to_pylist(), np.int64)
    begins = first_row + np.cumsum(lengths) - lengths
    episodes = first_episode + np.arange(n)
    numbers = [tasks.index(names[0]) for names in index["tasks"].to_pylist()]
    for name, values in {
        "index": first_row + np.arange(rows.num_rows),
        "episode_index": np.repeat(episodes, lengths),
        "task_index": np.repeat(numbers, lengths),
    }.items():
        rows = _replaced(rows, name, values)
    changed: dict[str, Any] = {
        "episode_index": episodes,
        "dataset_from_index": begins,
        "dataset_to_index": begins + lengths,
    }
    for part in ("data", f"videos/{VIDEO_KEY}", "meta/episodes"):
        for name, value in place.items():
            changed[f"{part}/{name}"] = np.full(n, value)
    for name, values in changed.items():
        index = _replaced(index, name, values)
    return rows, index


def _replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    at = table.schema.get_field_index(name)
    field = table.schema.field(at)
    return table.set_column(at, field, pa.chunked_array([pa.array(values, field.type)]))


def _place(
    source: Path, shard: int, rows: pa.Table, index: pa.Table, out: Path, number: int
) -> None:
    place = place_of(number)
    _write_table(rows, out / DATA.format(**place))
    _write_table(index, out / EPISODES.format(**place))
    video = out / VIDEO.format(video_key=VIDEO_KEY, **place)
    video.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / VIDEO.format(video_key=VIDEO_KEY, **place_of(shard)), video)
    fsync_path(video)


def _write_table(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    fsync_path(path)
