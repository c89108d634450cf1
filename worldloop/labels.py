"""Outcomes that a human enters, as CSV or JSON.

    episode,success,frame          {"0": true, "1": false, "take-3": {"success": true, "frame": 41}}
    0,1,
    1,0,
    take-3,1,41

``frame`` is the first frame that shows the success, where somebody looked for it.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldloop.errors import UserError

_TRUE, _FALSE = ("1", "true", "yes", "success"), ("0", "false", "no", "failure")


@dataclass(frozen=True)
class Label:
    """How an episode ended."""

    success: bool
    frame: int | None = None


def read_labels(path: Path) -> dict[str, Label]:
    """Labels by episode name, in the file's order. Raises UserError naming the line or key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    labels = _from_json(path, text) if path.suffix == ".json" else _from_csv(path, text)
    if not labels:
        raise UserError(f"{path}: holds no outcomes")
    return labels


def _from_csv(path: Path, text: str) -> dict[str, Label]:
    reader = csv.DictReader(text.splitlines())
    columns = reader.fieldnames or []
    unknown = [name for name in columns if name not in ("episode", "success", "frame")]
    if unknown or not {"episode", "success"} <= set(columns):
        raise UserError(
            f"{path}: columns are {', '.join(columns) or 'none'}; expected episode, success "
            "and perhaps frame"
        )
    labels: dict[str, Label] = {}
    for number, row in enumerate(reader, 2):
        where = f"{path}, line {number}"
        _add(labels, where, (row["episode"] or "").strip(), row["success"], row.get("frame"))
    return labels


def _from_json(path: Path, text: str) -> dict[str, Label]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object of episode names")
    labels: dict[str, Label] = {}
    for name, value in values.items():
        where = f"{path}, {name!r}"
        if isinstance(value, dict):
            if set(value) - {"success", "frame"} or "success" not in value:
                raise UserError(f"{where}: expected success and perhaps frame")
            _add(labels, where, name, value["success"], value.get("frame"))
        else:
            _add(labels, where, name, value, None)
    return labels


def _add(labels: dict[str, Label], where: str, name: str, success: Any, frame: Any) -> None:
    word = str(success if success is not None else "").strip().lower()
    if word not in _TRUE + _FALSE:
        raise UserError(f"{where}: success is {success!r}; expected 1 or 0")
    if not name or name in labels:
        raise UserError(f"{where}: episode {name!r} is empty or named twice")
    first = None
    if frame is not None and str(frame).strip():
        if not str(frame).strip().isdigit():
            raise UserError(f"{where}: frame is {frame!r}; expected a number of 0 or more")
        first = int(str(frame))
    if first is not None and word in _FALSE:
        raise UserError(f"{where}: a failure has no frame of success; leave it empty")
    labels[name] = Label(word in _TRUE, first)
