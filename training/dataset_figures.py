"""A dataset's card as plain values, and its montage: what both people and scripts look at."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.files import atomic_write_bytes
from worldloop.outcome import actions_only_accuracy, save_actions_only
from worldloop.types import Episode

GRADES = ("aimed", "near", "clear")  # of a script's perturbations: success, near-success, failure
# Of the rows of a montage: green, amber, red.
COLORS = {"aimed": (29, 122, 70), "near": (214, 144, 20), "clear": (176, 32, 48)}
BIN = 0.01  # metres, of the histogram of perturbations
MONTAGE_BYTES = 120_000


def grade_of(episode: Episode) -> str:
    """Of a scripted episode its perturbation's grade; of others success or clear failure."""
    return str(episode.info.get("grade", "aimed" if episode.success else "clear"))


def card(dataset: EpisodeDataset, seed: int = 0) -> dict[str, Any]:
    """Counts, outcome mix, lengths, perturbations and what the actions betray, as JSON values.

    The last is kept with the dataset as well; it is None, with ``actions_only_why``, where the
    dataset is too small for it or has one outcome. ``script_success``: of the script's tries for a
    success that could be begun, the share that ended in one.
    """
    episodes = list(dataset.stream(frames=False))
    success = dataset.success
    kinds = Counter((str(e.info.get("perturbation", "none")), grade_of(e)) for e in episodes)
    grades = Counter(grade_of(e) for e in episodes)
    sizes = np.array([float(e.info.get("size_m", 0.0)) for e in episodes])
    bins = max(1, int(np.ceil((sizes.max() + 1e-9) / BIN)))
    edges = BIN * np.arange(bins + 1)
    first = [int(np.argmax(e.reward)) + 1 for e in episodes if e.success]
    found: dict[str, Any] = {
        "env_id": dataset.meta.env_id,
        "instruction": episodes[0].instruction,
        "camera": dataset.meta.camera.get("name", "unnamed"),
        "image_size": dataset.meta.image_size,
        "horizon": dataset.meta.horizon,
        "lengths": dict(Counter(str(len(e.actions)) for e in episodes)),
        "episodes": len(episodes),
        "frames": int(dataset.info["total_frames"]),
        "successes": int(success.sum()),
        "success_share": round(float(success.mean()), 4),
        "grades": {grade: grades[grade] for grade in GRADES},
        "perturbations": {f"{kind}, {grade}": n for (kind, grade), n in sorted(kinds.items())},
        "perturbation_m": {
            "edges": edges.round(3).tolist(),
            "success": np.histogram(sizes[success], edges)[0].tolist(),
            "failure": np.histogram(sizes[~success], edges)[0].tolist(),
        },
        "first_success_step": (
            np.percentile(first, [10, 50, 90]).round().astype(int).tolist() if first else None
        ),
        "script_success": _script_success(episodes),
    }
    actions = np.stack([episode.actions for episode in episodes])
    try:
        result = actions_only_accuracy(actions, success, seed)
    except UserError as error:
        return {**found, "actions_only": None, "actions_only_why": str(error)}
    save_actions_only(dataset.root, result)
    return {**found, "actions_only": round(result["accuracy"], 4)}


def _script_success(episodes: Sequence[Episode]) -> dict[str, Any] | None:
    tried = [e for e in episodes if e.success and "failed_tries" in e.info]
    if not tried:
        return None
    tries = len(tried) + sum(int(e.info["failed_tries"]) for e in tried)
    return {"tries": tries, "share": round(len(tried) / tries, 4)}


def strip(episode: Episode, columns: int) -> npt.NDArray[np.uint8]:
    """Evenly spaced frames of an episode beside each other, the first and the last among them."""
    times = np.linspace(0, len(episode.frames) - 1, columns).round().astype(int)
    row = np.concatenate(list(episode.frames[times]), 1)
    edge = np.full((len(row), 6, 3), COLORS[grade_of(episode)], np.uint8)
    joined: npt.NDArray[np.uint8] = np.concatenate([edge, row], 1)
    return joined


def montage(dataset: EpisodeDataset, rows: int = 2, columns: int = 8) -> Image.Image:
    """Successes (green edge), near-successes (amber) and clear failures (red), ``rows`` of each."""
    chosen: dict[str, list[int]] = {grade: [] for grade in GRADES}
    for number, episode in enumerate(dataset.stream(frames=False)):
        of_grade = chosen[grade_of(episode)]
        if len(of_grade) < rows:
            of_grade.append(number)
    pictures = [
        strip(dataset.read(number), columns) for grade in GRADES for number in chosen[grade]
    ]
    return Image.fromarray(np.concatenate(pictures, 0))


def save_montage(dataset: EpisodeDataset, path: Path) -> None:
    """Write the montage as a JPEG, of the best quality that stays within `MONTAGE_BYTES`."""
    picture, data = montage(dataset), b""
    for quality in (90, 80, 70, 60, 50, 40):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= MONTAGE_BYTES:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, data)
