"""A ledger of rounds: one folder a round, one JSON record a finished stage, chained by hashes.

    loop/round-01/collect.json     {"number", "round", "stage", "previous",
                                    "inputs":  {name: sha256 of what went in},
                                    "outputs": {name: {"path", "sha256"}},
                                    "facts":   {...},
                                    "digest",  sha256 of all of the above
                                    "made":    {"seconds", "attempts", "commit", "at"},
                                    "seal"}    sha256 of digest and made

``previous`` is the digest of the record before, so that none can be left out or put in. What
depends on the clock stands in ``made``: a run that was killed and resumed has the digests of one
that was not. Records are written whole or not at all (`worldloop.files.atomic_path`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from worldloop.config import config_from_dict, config_to_dict, read_json
from worldloop.errors import UserError
from worldloop.files import atomic_write_text, file_sha256
from worldloop.outcome import ACTIONS_ONLY

# Files of a dataset's meta/ that no reader reads: who writes which episode, and a card's result.
NOT_READ = ("claimed.json", Path(ACTIONS_ONLY).name)
ROOMS = ("kernels", "engine", "rl", "training")  # beside the ground floor; bench decides nothing


# ---------------------------------------------------------------- hashes


def text_sha256(value: Any) -> str:
    """SHA-256 of plain JSON values, the same for equal values whatever their keys' order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def checkpoint_sha256(folder: Path) -> str:
    """Of a checkpoint's configuration and weights.

    Parts that config.json names count by their part, whatever the file is called (a checkpoint
    saved twice has other names); without such a list (a policy's), every file counts by its name.
    """
    document = read_json(folder / "config.json")
    files = document.pop("files", None)
    if files is None:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        shown = [path for path in paths if not path.name.startswith(".")]
        return text_sha256({str(p.relative_to(folder)): file_sha256(p) for p in shown})
    weights = {part: file_sha256(folder / name) for part, name in files.items()}
    return text_sha256([document, weights])


def dataset_sha256(folder: Path) -> str:
    """Of all that a dataset's readers read: meta, rows and videos; caches and locks left out."""
    if not (folder / "meta/info.json").is_file():
        raise UserError(f"{folder}: no dataset there (meta/info.json is missing)")
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and name.name not in NOT_READ:
            found[str(name)] = file_sha256(path)
    return text_sha256(found)


def path_sha256(path: Path) -> str:
    """Of a dataset, a checkpoint or a plain file; raises UserError where there is none."""
    if (path / "meta").is_dir():
        return dataset_sha256(path)
    if (path / "config.json").is_file():
        return checkpoint_sha256(path)
    if path.is_file():
        return file_sha256(path)
    raise UserError(f"{path}: no dataset, checkpoint or file there; restore it")


@cache
def code_sha256() -> str:
    """Of the sources that a run's results follow from, of all rooms."""
    folders = [Path(__file__).parent]
    for room in ROOMS:
        spec = importlib.util.find_spec(f"worldloop.{room}")
        if spec is not None and spec.submodule_search_locations:
            folders.append(Path(next(iter(spec.submodule_search_locations))))
    found: dict[str, str] = {}
    for name, folder in zip(("worldloop", *ROOMS), folders):
        for path in sorted((*folder.rglob("*.py"), *folder.rglob("*.c"))):
            found[f"{name}/{path.relative_to(folder)}"] = file_sha256(path)
    return text_sha256(found)


# ---------------------------------------------------------------- records


@dataclass(frozen=True)
class Output:
    """A file or folder that a stage made."""

    path: str  # relative to the ledger's folder, so that the whole may be moved
    sha256: str


@dataclass(frozen=True)
class Record:
    """One finished stage."""

    number: int
    round: int
    stage: str
    previous: str
    inputs: dict[str, str]
    outputs: dict[str, Output]
    facts: dict[str, Any]
    digest: str
    made: dict[str, Any]
    seal: str


class Ledger:
    """Reads and adds records of one folder. Raises UserError naming the record that is wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[Record] = sorted(self._read(), key=lambda record: record.number)
        previous = ""
        for expected, record in enumerate(self.records):
            where = self.path(record.round, record.stage)
            if record.number != expected:
                raise UserError(
                    f"{folder}: record {expected} is missing or doubled (found {where}, number "
                    f"{record.number}); restore the folder"
                )
            if record.previous != previous:
                raise UserError(
                    f"{where}: does not follow from the record before it; restore the folder"
                )
            previous = record.digest

    def path(self, round_: int, stage: str) -> Path:
        """Where the record of a stage lies."""
        return self.round_folder(round_) / f"{stage}.json"

    def round_folder(self, round_: int) -> Path:
        """The folder of a round."""
        return self.folder / f"round-{round_:02d}"

    def _read(self) -> Iterator[Record]:
        for path in sorted(self.folder.glob("round-[0-9]*/*.json")):
            values = read_json(path)
            record = config_from_dict(Record, values, str(path))
            content = {k: values[k] for k in values if k not in ("digest", "made", "seal")}
            sealed = text_sha256([record.digest, values["made"]])
            if text_sha256(content) != record.digest or sealed != record.seal:
                raise UserError(
                    f"{path}: was changed after it was written (its hash is unlike); restore it, "
                    "or begin in another folder"
                )
            if path != self.path(record.round, record.stage):
                raise UserError(f"{path}: is the record of {record.stage}, round {record.round}")
            yield record

    def find(self, round_: int, stage: str) -> Record | None:
        """The record of a stage, None where it has not finished."""
        for record in self.records:
            if (record.round, record.stage) == (round_, stage):
                return record
        return None

    def add(
        self,
        round_: int,
        stage: str,
        *,
        inputs: Mapping[str, str],
        outputs: Mapping[str, Path],
        facts: Mapping[str, Any],
        made: Mapping[str, Any],
    ) -> Record:
        """Write the record of a stage that has just finished; outputs are hashed here."""
        content = {
            "number": len(self.records),
            "round": round_,
            "stage": stage,
            "previous": self.records[-1].digest if self.records else "",
            "inputs": dict(inputs),
            "outputs": {
                name: config_to_dict(Output(str(path.relative_to(self.folder)), path_sha256(path)))
                for name, path in outputs.items()
            },
            "facts": json.loads(json.dumps(dict(facts))),
        }
        digest, plain = text_sha256(content), json.loads(json.dumps(dict(made)))
        values = {
            **content, "digest": digest, "made": plain, "seal": text_sha256([digest, plain]),
        }  # fmt: skip
        path = self.path(round_, stage)
        atomic_write_text(path, json.dumps(values, indent=2) + "\n")
        record = config_from_dict(Record, values, str(path))
        self.records.append(record)
        return record

    def output(self, round_: int, stage: str, name: str, *, check: bool = True) -> Path:
        """A stage's output; raises UserError where it is not what the record says."""
        record = self.find(round_, stage)
        if record is None or name not in record.outputs:
            raise UserError(f"{self.path(round_, stage)}: no record of {name!r}")
        made = record.outputs[name]
        path = self.folder / made.path
        if check and path_sha256(path) != made.sha256:
            raise UserError(
                f"{path}: is not what {self.path(round_, stage)} says (its hash is unlike); "
                "restore it, or begin in another folder"
            )
        return path
