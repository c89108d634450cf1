"""Rows of the world model's tables, from episodes that it imagined.

Shape letters: N episodes, T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from worldloop.engine.world_model import WorldModel
from worldloop.metrics import Alignment, Comparison, held_success, outcome_alignment
from worldloop.rl.held_out import HeldOut
from worldloop.types import Rollout


@dataclass(frozen=True)
class Measured:
    """A task's episodes, imagined."""

    held_out: HeldOut
    rollout: Rollout
    comparison: Comparison
    seconds: float

    @property
    def frames(self) -> npt.NDArray[np.uint8]:
        """Imagined frames [N,T+1,H,W,3]."""
        assert self.rollout.frames is not None
        return self.rollout.frames[:, :, 0]

    @property
    def real(self) -> npt.NDArray[np.uint8]:
        return np.stack([episode.frames for episode in self.held_out.episodes])


def pictures(compared: Comparison, frames: int) -> dict[str, Any]:
    """Table 1's row of the first ``frames`` frames."""
    track = compared.track
    seen = track.counted[:, :frames]
    return {
        "psnr": float(compared.psnr[:, :frames].mean()),
        "psnr_static": float(compared.psnr_static[:, :frames].mean()),
        "ssim": float(compared.ssim[:, :frames].mean()),
        "mse": float(compared.mse[:, :frames].mean()),
        "object_within_4px": float(track.within[:, :frames][seen].mean()) if seen.any() else None,
    }


def pose_errors(world: WorldModel, held_out: HeldOut, frames: int) -> dict[str, Any]:
    """How far the hand is from where its commands put it, in mm, after ``frames`` actions: by the
    world model's arm, and by the linear sum of the action spec. Empty for absolute poses."""
    spec = world.action_spec
    if spec.kind == "absolute_pose":
        return {}
    actions = held_out.actions[:, :frames]
    starts = held_out.starts
    told = {
        "arm": world.poses(
            world.start(starts.frames, starts.poses, [0] * len(starts.poses)), actions
        ),
        "linear": spec.to_absolute(actions, starts.poses),
    }
    true = np.stack([episode.states[actions.shape[1], :3] for episode in held_out.episodes])
    rows = {}
    for name, poses in told.items():
        off = 1000 * np.linalg.norm(poses[:, -1, :3] - true, axis=-1)
        rows[name] = {"median": float(np.median(off)), "p90": float(np.percentile(off, 90))}
    return {"pose_error_mm": rows}


@torch.inference_mode()
def on_recorded(world: WorldModel, held_out: HeldOut, frames: int) -> Alignment:
    """Outcomes that the reward head reads from ``frames`` recorded frames, not from imagined ones.

    What is wrong here is the head's fault, the rest of a reward alignment imagination's.
    """
    said, true = [], []
    for episode in held_out.episodes:
        threshold, held = world.config.success_rule(episode.instruction)
        pixels = torch.from_numpy(np.array(episode.frames[: frames + 1])).to(world.device)
        clip = pixels.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        latents, _ = world.autoencoder.encode(clip)
        reward = world.reward(latents[:, :, 1:])[0].cpu().numpy()
        said.append(held_success((reward > threshold).astype(np.float32), held))
        true.append(held_success(episode.reward[:frames], held))
    return outcome_alignment(np.array(true), np.array(said))


def rate(name: str, aligned: Alignment) -> dict[str, Any]:
    """A share of agreeing outcomes with its interval and the four counts."""
    return {
        name: aligned.rate, f"{name}_ci95": list(aligned.interval), f"{name}_counts":
        aligned.to_dict(),
    }  # fmt: skip


def alignments(visual: Alignment | None, reward: Alignment) -> dict[str, Any]:
    """Table 2's row; visual alignment is None without a classifier."""
    row = {"visual_alignment": None} if visual is None else rate("visual_alignment", visual)
    return {**row, **rate("reward_alignment", reward)}


def add(parts: Sequence[Alignment], repeats: int = 1) -> Alignment:
    """The counts of several tasks together, each measured ``repeats`` times on the same starts."""
    counts = [part.to_dict() for part in parts]
    return Alignment(**{k: sum(part[k] for part in counts) for k in counts[0]}, repeats=repeats)


def pooled(found: Sequence[Measured], frames: int, repeats: int = 1) -> dict[str, Any]:
    """Pictures as the mean over rollouts, outcomes counted together.

    repeats: how many checkpoints imagined the same episodes; they are counted all, but the interval
    is that of the episodes.
    """
    compared = [measured.comparison for measured in found]
    visual = [c.visual for c in compared if c.visual is not None]
    rows = mean_of([pictures(c, frames) for c in compared])
    return {
        "n": sum(len(c.psnr) for c in compared),
        **rows,
        **alignments(
            add(visual, repeats) if visual else None, add([c.reward for c in compared], repeats)
        ),
    }


def mean_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each number over rows; a figure that some row lacks is averaged without it."""
    out: dict[str, Any] = {}
    for name in ("psnr", "psnr_static", "ssim", "mse", "lpips", "fvd", "object_within_4px",
                 "actions_only_alignment"):  # fmt: skip
        values = [row[name] for row in rows if row.get(name) is not None]
        if any(name in row for row in rows):
            out[name] = float(np.mean(values)) if values else None
    return out


def thinned(rows: Sequence[tuple[float, float, float]], most: int) -> list[Any]:
    """At most ``most`` of the rows, evenly spaced, the ends kept."""
    index = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))
    return [tuple(float(v) for v in rows[i]) for i in index]
