"""`worldloop bench compare OLD NEW`: exit code 1 where new results are slower than old ones.

OLD and NEW are bench JSON files, or folders whose files pair up by name. A row is slower when its
median and its least time both exceed the old ones by more than the tolerance: one noisy repeat is
no regression. A row of OLD that NEW lacks (or that ran out of memory) fails as well. Times of two
machines mean nothing beside each other, so that is refused unless --any-machine says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from worldloop.cli import parse_config
from worldloop.config import read_json
from worldloop.errors import UserError

# What tells a file's rows apart, in the order in which a label shows them.
IDENTITY = ("arm", "work", "op", "case", "implementation", "dtype", "batch")
# Must agree for a comparison to mean anything.
SAME = ("bench", "preset", "picture", "dtype", "backend", "attention", "chunks", "checkpoint")


@dataclass(frozen=True)
class Compare:
    """Compare two benchmark results, or two folders of them."""

    old: Annotated[Path, tyro.conf.Positional]
    new: Annotated[Path, tyro.conf.Positional]
    tolerance: float = 0.1
    """A row may take this much longer, as a share of its old time."""
    any_machine: bool = False
    """Compare although machine or threads differ."""

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 10:
            raise UserError(f"tolerance is {self.tolerance}; expected 0 .. 10, such as 0.1")


@dataclass(frozen=True)
class Row:
    """One timed thing: seconds of its median and of its fastest repeat."""

    median: float
    least: float


def rows_of(document: Mapping[str, Any]) -> dict[str, Row]:
    """Every timed row of a bench document, by a label that tells it apart."""
    found: dict[str, Row] = {}
    for name, value in document.items():
        if name.startswith("ms_per_") and not name.endswith("_p95"):
            # The policy's file has no list of rows.
            label = f"{name.removeprefix('ms_per_')}, batch {document['batch']}"
            found[label] = Row(value / 1000, value / 1000)
    for value in document.values():
        for entry in value if isinstance(value, list) else []:
            if isinstance(entry, Mapping) and "p50_s" in entry:
                parts = [f"{name} {entry[name]}" for name in IDENTITY if name in entry]
                label = ", ".join(parts)
                if label in found:
                    raise UserError(f"two rows are called {label!r}; they cannot be compared")
                found[label] = Row(entry["p50_s"], entry.get("min_s", entry["p50_s"]))
    return found


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float, any_machine: bool
) -> tuple[list[str], list[str]]:
    """One line for each row, and those that fail. Raises UserError for unlike documents."""
    for which, document in (("OLD", old), ("NEW", new)):
        if "bench" not in document or "machine" not in document:
            raise UserError(f"{which} is not a benchmark's result")
    for name in SAME:
        if old.get(name) != new.get(name):
            raise UserError(f"{name} is {old.get(name)!r} in OLD and {new.get(name)!r} in NEW")
    if old["machine"] != new["machine"] and not any_machine:
        raise UserError(
            f"machines differ ({old['machine']} and {new['machine']}); run both on one, or pass "
            "--any-machine"
        )
    before, after = rows_of(old), rows_of(new)
    if not before:  # agreement: its figures are qualities
        return [f"{old['bench']}: no timed rows"], []
    lines, failed = [], []
    for label, row in before.items():
        if label not in after:
            failed.append(f"{label}: {1000 * row.median:.3f} ms before, missing now")
            lines.append(failed[-1])
            continue
        now = after[label]
        change = now.median / row.median - 1
        line = (
            f"{label}: {1000 * row.median:.3f} -> {1000 * now.median:.3f} ms ({change:+.1%} time)"
        )
        slower = change > tolerance and now.least > row.least * (1 + tolerance)
        if slower:
            failed.append(line)
        lines.append(line + ("  SLOWER" if slower else ""))
    return lines, failed


def pairs_of(old: Path, new: Path) -> list[tuple[Path, Path]]:
    """The files to compare; of folders those that OLD has, each must be in NEW as well."""
    if old.is_dir() != new.is_dir():
        raise UserError(f"{old} and {new}: give two files, or two folders")
    if not old.is_dir():
        return [(old, new)]
    names = sorted(path.name for path in old.glob("*.json"))
    if not names:
        raise UserError(f"{old}: holds no results (*.json)")
    return [(old / name, new / name) for name in names]


def main(argv: list[str]) -> int:
    """Run from the command line; 1 where something is slower."""
    config = parse_config(Compare, argv, "worldloop bench compare")
    failed: list[str] = []
    for old, new in pairs_of(config.old, config.new):
        print(old.name)
        try:
            lines, slower = compare(
                read_json(old), read_json(new), config.tolerance, config.any_machine
            )
        except UserError as error:
            raise UserError(f"{old.name}: {error}") from error
        print("\n".join(f"  {line}" for line in lines))
        failed += [f"{old.name}: {line}" for line in slower]
    if failed:
        print(f"{len(failed)} slower by more than {config.tolerance:.0%}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
