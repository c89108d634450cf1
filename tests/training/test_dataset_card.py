"""`worldloop data` on small datasets, and the training of the outcome classifier."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from worldloop.episodes import DatasetMeta, EpisodeDataset, EpisodeWriter
from worldloop.errors import UserError
from worldloop.merge import subset_dataset
from worldloop.outcome import OutcomeClassifier, load_actions_only
from worldloop.training.dataset_card import main
from worldloop.training.outcome import OutcomeTraining, train
from worldloop.types import ActionSpec, Episode

SIZE, T = 48, 12


def episode(seed: int) -> Episode:
    """A blue square that is in the white area at the end, or beside it."""
    rng = np.random.default_rng(seed)
    success = bool(seed % 2)
    frames = np.full((T + 1, SIZE, SIZE, 3), (190, 105, 60), np.uint8)
    frames[:, 14:34, 6:22] = 235
    row, start = int(rng.integers(16, 24)), 38
    end = int(rng.integers(7, 13) if success else rng.integers(25, 32))
    for t in range(T + 1):
        column = round(start + (end - start) * min(1, t / 4))
        frames[t, row : row + 8, column : column + 8] = (45, 80, 150)
    reward = np.zeros(T, np.float32)
    reward[4:] = success
    return Episode(
        frames, rng.uniform(-1, 1, (T, 7)).astype(np.float32),
        rng.normal(size=(T + 1, 7)).astype(np.float32), reward, "push the square",
        "PushCube-v1", seed, success, info=info_of(seed, success),
    )  # fmt: skip


def info_of(seed: int, success: bool) -> dict[str, Any]:
    """As a collector writes it: failures are near or clear, episodes 4 k and 4 k + 1 share one."""
    if success:
        return {"perturbation": "aimed", "grade": "aimed", "size_m": 0.004, "failed_tries": 1,
                "sim_seed": seed // 4}  # fmt: skip
    near = seed % 4 == 0
    return {"perturbation": "beside", "grade": "near" if near else "clear",
            "size_m": 0.025 if near else 0.055, "sim_seed": 1000 + seed // 4}  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    meta = DatasetMeta(ActionSpec(), "PushCube-v1", {"name": "test"}, T, SIZE)
    EpisodeWriter(tmp_path / "set", meta).add([episode(seed) for seed in range(40)])
    return tmp_path / "set"


def test_inspect(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    assert main(["inspect", str(dataset), "--sheet", str(sheet), "--rows", "3"]) == 0
    text = capsys.readouterr().out
    assert "40 episodes of PushCube-v1" in text and "50.0% successes" in text
    with Image.open(sheet) as picture:
        assert picture.height == 3 * SIZE


def test_stats_are_printed_and_kept(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(dataset)]) == 0
    text = capsys.readouterr().out
    assert "position_taps" in text and "pose_std" in text and "actions alone betray" in text
    kept = load_actions_only(dataset)
    assert kept is not None and 0 <= kept["accuracy"] <= 1
    main(["inspect", str(dataset)])
    assert "actions only" in capsys.readouterr().out


def test_validate(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(dataset)]) == 0
    assert "nothing wrong" in capsys.readouterr().out
    info = json.loads((dataset / "meta/info.json").read_text())
    (dataset / "meta/info.json").write_text(json.dumps({**info, "total_frames": 1}))
    with pytest.raises(UserError, match="total_frames"):
        main(["validate", str(dataset)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"success": True}, "success is True, its last reward 0"),
        ({"reward": np.full(T, 0.5, np.float32)}, "reward must be 0 or 1"),
        ({"frames": np.full((T + 1, SIZE, SIZE, 3), 90, np.uint8)}, "one flat colour"),
        ({"seed": 1, "actions": episode(1).actions}, "episode 40 is episode 1 once more"),
    ],
)
def test_validate_names_the_fault(dataset: Path, change: dict[str, object], message: str) -> None:
    meta = DatasetMeta.load(dataset / "meta/worldloop.json")
    bad = dataclasses.replace(episode(40), **change)  # type: ignore[arg-type]
    EpisodeWriter(dataset, meta).add([bad])
    with pytest.raises(UserError, match=message):
        main(["validate", str(dataset)])


def test_unknown_verb_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known: inspect, validate, stats"):
        main(["mend", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"info\.json"):
        main(["inspect", str(tmp_path)])
    assert main([]) == 2


def test_outcome_classifier_learns_from_real_frames(dataset: Path, tmp_path: Path) -> None:
    config = OutcomeTraining(
        dataset, tmp_path / "outcome", steps=150, batch=32, width=8, held_out=8, lr=4e-3
    )
    train(config)
    record = OutcomeClassifier.load(tmp_path / "outcome").record
    assert record["held_out_accuracy"] >= 7 / 8
    assert record["episodes"] == 32
    with pytest.raises(UserError, match="held_out is 40"):
        train(dataclasses.replace(config, held_out=40))


def spoiled(dataset: Path, out: Path, **changes: Any) -> Path:
    """A dataset of the same episodes whose meta differs."""
    meta = dataclasses.replace(DatasetMeta.load(dataset / "meta/worldloop.json"), **changes)
    EpisodeWriter(out, meta).add([episode(seed) for seed in range(4)])
    return out


def test_card_and_montage_of_several_datasets(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = spoiled(dataset, tmp_path / "other", env_id="PullCube-v1")
    written, montages = tmp_path / "results/data.json", tmp_path / "img"
    arguments = ["--json", str(written), "--montages", str(montages)]
    assert main(["stats", str(dataset), str(other), *arguments]) == 0
    record = json.loads(written.read_text())
    assert set(record) == {"command", "commit", "tasks"}
    found = record["tasks"]["PushCube-v1"]
    assert found["episodes"] == 40 and found["successes"] == 20
    assert found["grades"] == {"aimed": 20, "near": 10, "clear": 10}
    assert found["perturbations"] == {
        "aimed, aimed": 20, "beside, clear": 10, "beside, near": 10
    }  # fmt: skip
    assert found["perturbation_m"] == {
        "edges": [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06],
        "success": [20, 0, 0, 0, 0, 0], "failure": [0, 0, 10, 0, 0, 10],
    }  # fmt: skip
    assert found["lengths"] == {str(T): 40} and found["frames"] == 40 * (T + 1)
    assert found["first_success_step"] == [5, 5, 5]
    assert found["script_success"] == {"tries": 40, "share": 0.5}
    kept = load_actions_only(dataset)
    assert kept is not None and found["actions_only"] == pytest.approx(kept["accuracy"], abs=1e-4)
    small = record["tasks"]["PullCube-v1"]
    assert small["actions_only"] is None and "2 episodes of the rarer" in small["actions_only_why"]
    assert "not measured" in capsys.readouterr().out
    with Image.open(montages / "PushCube-v1.jpg") as picture:
        assert picture.size == (6 + 8 * SIZE, 6 * SIZE)
        edges = np.asarray(picture)[SIZE // 2 :: SIZE, 2].astype(int)
    for row, color in zip(edges, [(29, 122, 70)] * 2 + [(214, 144, 20)] * 2, strict=False):
        assert np.abs(row - color).max() < 30
    assert max(p.stat().st_size for p in montages.glob("*.jpg")) <= 150_000


def test_stats_refuses_what_does_not_belong_together(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a second dataset of PushCube-v1; merge them first"):
        main(["stats", str(dataset), str(dataset)])
    spec = dataclasses.replace(ActionSpec(), control_hz=10.0)
    mixed = spoiled(dataset, tmp_path / "slow", action_spec=spec, env_id="PullCube-v1")
    with pytest.raises(ValueError, match="control_hz: 20.0 here, 10.0 there"):
        main(["stats", str(dataset), str(mixed)])
    with pytest.raises(ValueError, match="control_hz: 20.0 here, 10.0 there"):
        main(["merge", str(dataset), str(mixed), "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_split_holds_starts_out(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    assert main(["split", str(dataset), "--out", str(out), "--held-out", "0.2"]) == 0
    whole = EpisodeDataset(dataset)
    train_part, held = EpisodeDataset(out / "train"), EpisodeDataset(out / "held-out")
    assert len(train_part) + len(held) == 40 and len(held) == 8
    assert held.success.mean() == 0.5 == train_part.success.mean()
    starts = [
        {e.info["sim_seed"] for e in part.stream(frames=False)} for part in (train_part, held)
    ]
    assert not starts[0] & starts[1] and len(starts[1]) == 4
    assert sorted(train_part.seeds + held.seeds) == sorted(whole.seeds)
    for part in (train_part, held):  # pictures and numbers are those of the whole
        assert main(["validate", str(part.root)]) == 0
        for got in part.stream():
            wanted = whole.read(whole.seeds.index(got.seed))
            np.testing.assert_array_equal(got.frames, wanted.frames)
            np.testing.assert_array_equal(got.actions, wanted.actions)
            assert got.info == wanted.info and got.success == wanted.success
    with pytest.raises(UserError, match="exists; choose another folder"):
        main(["split", str(dataset), "--out", str(out)])
    with pytest.raises(UserError, match="10 starts of successes cannot be split 0.99 to 0.01"):
        main(["split", str(dataset), "--out", str(tmp_path / "no"), "--held-out", "0.01"])
    assert not (tmp_path / "no").exists()
    with pytest.raises(UserError, match="held_out is 1; expected a share"):
        main(["split", str(dataset), "--out", str(tmp_path / "no"), "--held-out", "1"])


def uneven(dataset: Path, out: Path, seeds: list[int]) -> Path:
    meta = DatasetMeta.load(dataset / "meta/worldloop.json")
    writer = EpisodeWriter(out, meta)
    for first in range(0, len(seeds), 8):  # several shards
        writer.add([episode(seed) for seed in seeds[first : first + 8]])
    return out


def test_balance_keeps_the_mix_of_grades(dataset: Path, tmp_path: Path) -> None:
    seeds = [*range(0, 40, 2), 1, 3, 5, 7]  # twenty failures, four successes
    lopsided = uneven(dataset, tmp_path / "lopsided", seeds)
    with pytest.raises(UserError, match="rarer outcome has 16.7% of the episodes, expected at"):
        main(["validate", str(lopsided), "--rarer-share", "0.3"])
    out = tmp_path / "even"
    assert main(["balance", str(lopsided), "--out", str(out)]) == 0
    even = EpisodeDataset(out)
    assert len(even) == 8 and even.success.sum() == 4
    grades = [e.info["grade"] for e in even.stream(frames=False)]
    assert grades.count("near") == grades.count("clear") == 2
    assert main(["validate", str(out), "--rarer-share", "0.5"]) == 0


@pytest.mark.parametrize(("first", "only"), [(0, "failures"), (1, "successes")])
def test_one_outcome_only_is_named(dataset: Path, tmp_path: Path, first: int, only: str) -> None:
    one = uneven(dataset, tmp_path / "one", list(range(first, 20, 2)))
    for verb in ("split", "balance"):
        with pytest.raises(UserError, match=f"one: holds {only} only; collect the other outcome"):
            main([verb, str(one), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert main(["stats", str(one)]) == 0  # a card of demonstrations is of use


def test_empty_dataset_is_named_by_every_verb(dataset: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    meta = DatasetMeta.load(dataset / "meta/worldloop.json")
    EpisodeWriter(empty, meta)
    info = json.loads((dataset / "meta/info.json").read_text())
    (empty / "meta/info.json").write_text(json.dumps({**info, "total_episodes": 0}))
    for verb in ("inspect", "validate", "stats", "split", "balance"):
        options = ["--out", str(tmp_path / "out")] if verb in ("split", "balance") else []
        with pytest.raises(UserError, match="holds no episodes yet; collect some"):
            main([verb, str(empty), *options])


def test_subset_names_what_is_wrong(dataset: Path, tmp_path: Path) -> None:
    for rows, message in (([], "no episodes chosen"), ([0, 0], "distinct"), ([40], "0 .. 39")):
        with pytest.raises(UserError, match=message):
            subset_dataset(dataset, rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()
