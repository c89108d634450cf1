"""Run folders: rows that survive a kill, resume without a seam, progress without a terminal."""

import io
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from worldloop import __version__, track
from worldloop.errors import UserError
from worldloop.track import Progress, Run, read_rows


@dataclass(frozen=True)
class Config:
    """A config."""

    steps: int = 5
    sizes: tuple[int, ...] = (1, 2)


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def test_rows_and_config(tmp_path: Path) -> None:
    with Run(tmp_path / "r", Config(), tensorboard=False) as run:
        run.log(1, {"loss": 0.5, "note": "a"}, psnr=20.0)
        assert read_rows(run.metrics_path)[0]["loss"] == 0.5  # on the disk before close
    assert json.loads((tmp_path / "r" / "config.json").read_text()) == {"steps": 5, "sizes": [1, 2]}
    row = read_rows(tmp_path / "r" / "metrics.jsonl")[0]
    assert (row["step"], row["note"], row["psnr"]) == (1, "a", 20.0) and row["seconds"] >= 0
    with pytest.raises(ValueError, match="this run is closed"):
        run.log(2)


def test_resume_drops_later_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run(tmp_path, Config(), tensorboard=False) as run:
        for step in range(1, 6):
            run.log(step, loss=float(step))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed while writing
    with Run(tmp_path, Config(steps=9), resume_step=3, tensorboard=False) as run:
        assert steps(tmp_path) == [1, 2, 3]
        run.log(4, loss=4.0)
    rows = read_rows(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["seconds"] >= rows[2]["seconds"]
    assert "resumed with steps 5 -> 9" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 9


def test_a_finished_run_keeps_the_record_of_what_made_it(tmp_path: Path) -> None:
    """Nothing is left to train: other settings would name what the weights never saw."""
    with Run(tmp_path, Config(), tensorboard=False) as run:
        run.log(5, loss=1.0)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=r"5 steps were made with other settings \(sizes"):
        Run(tmp_path, Config(sizes=(3,)), resume_step=5, tensorboard=False)
    assert (tmp_path / "config.json").read_text() == before
    Run(tmp_path, Config(steps=4), resume_step=5, tensorboard=False).close()
    Run(tmp_path, Config(steps=6, sizes=(3,)), resume_step=5, tensorboard=False).close()


def test_the_commit_is_this_checkouts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "theirs/.venv/site-packages/worldloop"
    package.mkdir(parents=True)
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q",
                                   "--allow-empty", "-m", "theirs"]):  # fmt: skip
        subprocess.run(["git", *words], cwd=tmp_path / "theirs", check=True)
    monkeypatch.setattr(track, "__file__", str(package / "track.py"))
    assert track.git_commit() == f"worldloop {__version__}"


def test_a_run_that_is_not_resumed_begins_anew(tmp_path: Path) -> None:
    with Run(tmp_path, Config(), tensorboard=False) as run:
        run.log(1)
    Run(tmp_path, Config(), tensorboard=False).close()
    assert steps(tmp_path) == []


def test_damaged_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        Run(tmp_path, Config(), resume_step=2, tensorboard=False)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Run(tmp_path, {"a": 1}) as run:
        run.log(1, loss=0.25, note="text")
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with Run(tmp_path / "r", Config()) as run:
        run.log(1, loss=1.0)
    assert not (tmp_path / "r").exists()
    stream = io.StringIO()
    with Progress(10, "collect", every=0.0, stream=stream) as bar:
        bar.update()
    assert stream.getvalue() == ""


def test_plain_progress() -> None:
    stream = io.StringIO()
    with Progress(4, "collect", unit="episodes", initial=1, every=0.0, stream=stream) as bar:
        bar.update(success=0.5)
        bar.write("a note")
        bar.update(2, success=0.75)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("collect: 2/4 episodes, ") and lines[0].endswith("success=0.5")
    assert " left, " in lines[0] and "episodes/s" in lines[0]
    assert lines[1] == "a note"
    assert lines[-1].startswith("collect: 4/4 episodes") and "success=0.75" in lines[-1]


def test_plain_progress_is_sparse() -> None:
    stream = io.StringIO()
    with Progress(None, "train", every=60.0, stream=stream) as bar:
        for _ in range(1000):
            bar.update()
    assert len(stream.getvalue().splitlines()) == 1


def test_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(3, "train", stream=stream) as bar:
        bar.update(3, loss=0.123456)
        bar.write("a note")
    assert "train: 100%" in stream.getvalue() and "a note" in stream.getvalue()
