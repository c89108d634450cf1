"""Rollouts on disk: one safetensors file with everything, and an mp4 of the first view."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from worldloop.checkpoint import load_tensors, save_tensors
from worldloop.config import read_json
from worldloop.errors import UserError
from worldloop.files import atomic_write_text
from worldloop.types import Rollout
from worldloop.video import write_video

_FORMAT = 1
_REQUIRED = ("actions", "reward", "success", "valid", "seeds", "group_id", "start_pose")
_OPTIONAL = ("frames", "action_tokens", "logprobs")


def save_rollout(
    rollout: Rollout, folder: Path | str, fps: float = 20.0, *, video: bool = True
) -> Path:
    """Write rollout.safetensors, rollout.json and, with frames, rollout.mp4 (a grid of rows).

    Each file is replaced in one step. Returns the folder.
    """
    target = Path(folder)
    arrays = {name: getattr(rollout, name) for name in (*_REQUIRED, *_OPTIONAL)}
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(value))
        for name, value in arrays.items()
        if value is not None
    }
    save_tensors(target / "rollout.safetensors", tensors)
    document = {
        "format": _FORMAT,
        "instructions": list(rollout.instructions),
        "policy_version": rollout.policy_version,
        "timings": rollout.timings,
        "fps": fps,
    }
    if video and rollout.frames is not None and rollout.frames.shape[1] > 1:
        write_video(target / "rollout.mp4", _grid(rollout.frames[:, :, 0]), fps)
    else:
        (target / "rollout.mp4").unlink(missing_ok=True)  # of an earlier one
    atomic_write_text(target / "rollout.json", json.dumps(document, indent=2) + "\n")
    return target


def load_rollout(folder: Path | str) -> Rollout:
    """Read a folder written by `save_rollout`; raises UserError naming the file that is wrong."""
    source = Path(folder)
    document = read_json(source / "rollout.json")
    if document.get("format") != _FORMAT:
        raise UserError(
            f"{source / 'rollout.json'}: format {document.get('format')!r}, this version reads "
            f"{_FORMAT}; use the worldloop version that wrote it"
        )
    arrays: dict[str, Any] = {
        name: tensor.numpy()
        for name, tensor in load_tensors(source / "rollout.safetensors").items()
    }
    missing = [name for name in _REQUIRED if name not in arrays]
    foreign = sorted(set(arrays) - {*_REQUIRED, *_OPTIONAL})
    if missing or foreign:
        raise UserError(
            f"{source / 'rollout.safetensors'}: not a rollout (missing {missing}, "
            f"unknown {foreign}); save it again"
        )
    return Rollout(
        frames=arrays.pop("frames", None),
        instructions=tuple(document["instructions"]),
        policy_version=int(document["policy_version"]),
        timings=dict(document["timings"]),
        **arrays,
    )


def _grid(frames_BTHW3: npt.NDArray[np.uint8], most: int = 16) -> Iterable[npt.NDArray[np.uint8]]:
    """The first ``most`` rows side by side, picture by picture [H',W',3]."""
    rows = frames_BTHW3[:most]
    B, T, H, W, _ = rows.shape
    wide = int(np.ceil(np.sqrt(B)))
    high = -(-B // wide)
    for t in range(T):
        canvas = np.zeros((high * H, wide * W, 3), np.uint8)
        for b in range(B):
            r, c = divmod(b, wide)
            canvas[r * H : (r + 1) * H, c * W : (c + 1) * W] = rows[b, t]
        yield canvas
