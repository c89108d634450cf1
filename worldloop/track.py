"""The record of a run: config.json, metrics.jsonl, TensorBoard, and progress on the screen."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from worldloop import __version__
from worldloop.config import config_to_dict, read_json
from worldloop.errors import UserError
from worldloop.files import PathLike, atomic_write_bytes, atomic_write_text, disk_error

Scalar = bool | int | float | str | None

# Options of a run that make no difference to what its steps have made.
UNTRAINED = {"steps", "out", "threads", "device", "save_every", "sample_every", "wandb"}


def rank() -> int:
    """The rank of this process under torchrun, 0 elsewhere."""
    return int(os.environ.get("RANK", "0"))


def git_commit() -> str:
    """The git commit of this checkout ("-dirty" where it was changed), or the package's version.

    An installed package may lie inside somebody else's repository, whose commit says nothing.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or no repository
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return f"worldloop {__version__}"


class Progress:
    """A tqdm bar on a terminal, a plain line every `every` seconds elsewhere; silent off rank 0."""

    def __init__(
        self, total: int | None, title: str, *, unit: str = "it", initial: int = 0,
        every: float = 10.0, stream: TextIO | None = None,
    ) -> None:  # fmt: skip
        self.total, self.title, self.unit, self.every = total, title, unit, every
        self.count = self.initial = initial
        self.notes = ""
        self._stream = stream if stream is not None else sys.stderr
        self._start = self._printed = time.monotonic()
        self._bar: Any = None
        self._quiet = rank() != 0
        if not self._quiet and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=title, unit=unit, initial=initial, file=self._stream,
                dynamic_ncols=True,
            )  # fmt: skip

    def update(self, n: int = 1, **notes: Scalar) -> None:
        """Count `n` more and show `notes` (loss, success share ...) beside the bar."""
        self.count += n
        if notes:
            self.notes = ", ".join(f"{key}={_short(value)}" for key, value in notes.items())
        if self._bar is not None:
            if notes:
                self._bar.set_postfix_str(self.notes, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._printed >= self.every:
            self._line()

    def _line(self) -> None:
        self._printed = time.monotonic()
        if self._quiet:
            return
        speed = (self.count - self.initial) / max(self._printed - self._start, 1e-9)
        text = f"{self.title}: {self.count}"
        if self.total is not None:
            text += f"/{self.total}"
        text += f" {self.unit}, {_short(speed)} {self.unit}/s"
        if self.total is not None and speed > 0 and self.count < self.total:
            text += f", {_clock((self.total - self.count) / speed)} left"
        print(text + (f", {self.notes}" if self.notes else ""), file=self._stream, flush=True)

    def write(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif not self._quiet:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Finish the bar, or print the closing line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif not self._quiet:
            self._line()
        self._quiet = True

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


class Run:
    """A run folder. `resume_step=N` goes on after step N: later rows are dropped first, all of them
    without it."""

    def __init__(
        self, folder: PathLike, config: Any, *, resume_step: int | None = None,
        tensorboard: bool = True,
    ) -> None:  # fmt: skip
        self.folder = Path(folder)
        self.writes = rank() == 0
        self._writer: Any = None
        self._wandb: Any = None
        self._rows: TextIO | None = None
        if not self.writes:
            return
        plain = dict(config) if isinstance(config, Mapping) else config_to_dict(config)
        self._time_before = self._open_rows(resume_step)
        self._save_config(plain, resume_step)
        self._start = time.monotonic()
        if tensorboard:
            self._writer = self._tensorboard(resume_step)
        if plain.get("wandb"):
            self._wandb = self._start_wandb(plain["wandb"], plain, resume_step)

    @property
    def metrics_path(self) -> Path:
        """The file of one JSON object a line."""
        return self.folder / "metrics.jsonl"

    def _open_rows(self, resume_step: int | None) -> float:
        """Open metrics.jsonl for appending; returns the seconds spent by earlier processes."""
        path = self.metrics_path
        kept: list[dict[str, Any]] = []
        if path.is_file() and resume_step is not None:
            kept = [row for row in read_rows(path) if row["step"] <= resume_step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        atomic_write_bytes(path, text.encode("utf-8"))
        self._rows = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        return float(kept[-1].get("seconds", 0.0)) if kept else 0.0

    def _save_config(self, plain: dict[str, Any], resume_step: int | None) -> None:
        path = self.folder / "config.json"
        if resume_step is not None and path.is_file():
            old, new = read_json(path), json.loads(json.dumps(plain))
            changed = {
                key: f"{key} {old.get(key)!r} -> {new.get(key)!r}"
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key)
            }
            if resume_step >= new.get("steps", math.inf) and changed.keys() - UNTRAINED:
                raise UserError(
                    f"{self.folder}: its {resume_step} steps were made with other settings "
                    f"({'; '.join(changed.values())}); more --steps go on with the new ones, "
                    "another folder begins anew"
                )
            for text in changed.values():
                print(f"{self.folder}: resumed with {text}")
        atomic_write_text(path, json.dumps(plain, indent=2) + "\n")

    def _tensorboard(self, resume_step: int | None) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        purge = None if resume_step is None else resume_step + 1
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)

    def _start_wandb(self, project: str, plain: dict[str, Any], resume_step: int | None) -> Any:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb: not installed; pip install wandb, or drop it") from error
        resume = "allow" if resume_step is not None else None
        name = self.folder.name
        return wandb.init(project=project, name=name, id=name, config=plain, resume=resume)

    def log(self, step: int, metrics: Mapping[str, Scalar] | None = None, **more: Scalar) -> None:
        """Append one row; it is on its way to the disk when this returns."""
        if not self.writes:
            return
        if self._rows is None:
            raise ValueError(f"{self.folder}: this run is closed")
        values = {**(metrics or {}), **more}
        seconds = self._time_before + time.monotonic() - self._start
        row = {"step": step, "seconds": round(seconds, 3), **values}
        try:
            self._rows.write(json.dumps(row) + "\n")
            self._rows.flush()
        except OSError as error:
            raise disk_error(self.metrics_path, error) or error from error
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        if self._writer is not None:
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def progress(
        self, total: int | None, title: str, *, unit: str = "it", initial: int = 0
    ) -> Progress:
        """A progress bar of this run."""
        return Progress(total, title, unit=unit, initial=initial)

    def close(self) -> None:
        """Flush and close everything."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


def read_rows(path: PathLike) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a half-written last line (a killed process) is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is damaged; delete that line") from error
        rows.append(row)
    return rows


def _short(value: Scalar) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
