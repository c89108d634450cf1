"""`worldloop data` on small datasets, and the training of the outcome classifier."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from worldloop.episodes import DatasetMeta, EpisodeWriter
from worldloop.errors import UserError
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
        "PushCube-v1", seed, success,
    )  # fmt: skip


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
