"""Merging datasets: the same episodes, none doubled, nothing encoded again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from worldloop.episodes import DatasetMeta, EpisodeDataset, EpisodeWriter
from worldloop.errors import UserError
from worldloop.lerobot import VIDEO, VIDEO_KEY, place_of
from worldloop.merge import merge_datasets
from worldloop.types import ActionSpec, Episode

META = DatasetMeta(ActionSpec(chunk=8), "Test-v0", {"name": "front"}, 8, 32)


def episode(seed: int, objects: bool = True, text: str = "do it") -> Episode:
    rng = np.random.default_rng(seed)
    success = bool(seed % 2)
    return Episode(
        frames=rng.integers(0, 256, (9, 32, 32, 3), np.uint8),
        actions=rng.uniform(-1, 1, (8, 7)).astype(np.float32),
        states=rng.normal(size=(9, 7)).astype(np.float32),
        reward=np.append(np.zeros(7), success).astype(np.float32),
        instruction=text, env_id="Test-v0", seed=seed, success=success,
        objects=rng.normal(size=(9, 1, 7)).astype(np.float32) if objects else None,
        object_pixels=rng.normal(size=(9, 1, 2)).astype(np.float32) if objects else None,
        info={"sim_seed": seed + 1000},
    )  # fmt: skip


def dataset(root: Path, seeds: range, meta: DatasetMeta = META, shard: int = 2, **options) -> Path:
    writer = EpisodeWriter(root, meta)
    for i in range(0, len(seeds), shard):
        writer.add([episode(seed, **options) for seed in seeds[i : i + shard]])
    return root


def test_a_merged_dataset_holds_every_episode_as_it_was(tmp_path):
    sources = [
        dataset(tmp_path / "a", range(5)),
        dataset(tmp_path / "b", range(10, 13), text="do the other"),
    ]
    merged = merge_datasets(sources, tmp_path / "out")
    whole = [e for source in sources for e in EpisodeDataset(source).stream()]
    assert len(merged) == 8 and merged.info["total_frames"] == 72
    for own, other in zip(merged.stream(), whole, strict=True):
        for f in dataclasses.fields(Episode):
            a, b = getattr(own, f.name), getattr(other, f.name)
            if isinstance(a, np.ndarray):
                np.testing.assert_array_equal(a, b, err_msg=f.name)
            else:
                assert a == b, f.name
    # The very files: nothing was encoded again.
    for number, (source, shard) in enumerate([("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]):
        paths = [tmp_path / folder / VIDEO.format(video_key=VIDEO_KEY, **place_of(n))
                 for folder, n in ((source, shard), ("out", number))]  # fmt: skip
        assert paths[0].read_bytes() == paths[1].read_bytes()
    # Statistics are those of one writer over all rows.
    one = EpisodeWriter(tmp_path / "one", META)
    one.add(whole)
    a, b = (json.loads((tmp_path / n / "meta/stats.json").read_text()) for n in ("out", "one"))
    for name in a:
        for key in a[name]:
            np.testing.assert_allclose(a[name][key], b[name][key], rtol=1e-6, atol=1e-6)
    # It may be continued like any other.
    assert EpisodeWriter(tmp_path / "out", META).add([episode(40)]) == 9
    assert EpisodeDataset(tmp_path / "out").read(8).seed == 40


def test_objects_stay_only_where_all_have_them(tmp_path):
    sources = [
        dataset(tmp_path / "a", range(2)), dataset(tmp_path / "b", range(4, 6), objects=False)
    ]  # fmt: skip
    merged = merge_datasets(sources, tmp_path / "out")
    assert all(e.objects is None and e.object_pixels is None for e in merged.stream(frames=False))
    assert merged.info["features"]["observation.environment_state"]["shape"] == [0]


def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path):
    a = dataset(tmp_path / "a", range(2))
    other = dataclasses.replace
    for name, meta in (
        ("env_id", other(META, env_id="Other-v0")),
        ("camera", other(META, camera={"name": "side"})),
        ("control_hz", other(META, action_spec=ActionSpec(control_hz=10.0))),
    ):
        b = dataset(tmp_path / name, range(4, 6), meta)
        with pytest.raises(ValueError, match=name):
            merge_datasets([a, b], tmp_path / "out")
    with pytest.raises(UserError, match="episode 0 of .*a is also episode 0 of .*a; merge each"):
        merge_datasets([a, a], tmp_path / "out")
    with pytest.raises(UserError, match="exists"):
        merge_datasets([a], a)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_killed_merge_leaves_nothing_and_is_repeated(tmp_path, monkeypatch):
    a = dataset(tmp_path / "a", range(4))
    monkeypatch.setattr("worldloop.merge.tasks_table", lambda names: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_datasets([a], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    (tmp_path / ".out.999999999.tmp").mkdir()  # of a process that is no more
    assert len(merge_datasets([a], tmp_path / "out")) == 4
    assert not list(tmp_path.glob(".out*"))
