"""Episodes as arrays for training: frames decoded once into a memory-mapped cache.

The cache lies in the dataset's folder under ``.cache``; its name holds the number of episodes and
a hash of their seeds, so a dataset that has grown gets a new one.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.track import Progress
from worldloop.types import ActionSpec, ControllerFit

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EpisodeArrays:
    """N episodes of T actions; frames are memory-mapped."""

    frames: npt.NDArray[np.uint8]  # [N,T+1,H,W,3]
    actions: Float  # [N,T,A]
    states: Float  # [N,T+1,7]
    reward: Float  # [N,T]
    success: npt.NDArray[np.bool_]  # [N]
    object_pixels: Float | None  # [N,T+1,O,2]
    action_spec: ActionSpec
    env_id: str
    instruction: str
    key: str  # names this set of episodes, for caches made from it

    def __len__(self) -> int:
        return len(self.actions)


def load_arrays(root: Path | str, limit: int | None = None) -> EpisodeArrays:
    """Read a dataset (at most its first ``limit`` episodes) and decode its videos once."""
    dataset = EpisodeDataset(root)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count == 0:
        raise UserError(f"{root}: holds no episodes yet; collect some first")
    seeds = ",".join(map(str, dataset.seeds[:count]))
    key = f"{count}-{hashlib.sha256(seeds.encode()).hexdigest()[:12]}"
    episodes = [dataset.read(i, frames=False) for i in range(count)]
    lengths = {len(e.actions) for e in episodes}
    if len(lengths) > 1:
        raise UserError(f"{root}: episodes have {sorted(lengths)} actions; one horizon is needed")
    pixels = [e.object_pixels for e in episodes]
    actions = np.stack([e.actions for e in episodes])
    states = np.stack([e.states for e in episodes])
    return EpisodeArrays(
        frames=_frame_cache(dataset, count, key),
        actions=actions,
        states=states,
        reward=np.stack([e.reward for e in episodes]),
        success=np.array([e.success for e in episodes]),
        object_pixels=None if any(p is None for p in pixels) else np.stack(pixels),  # type: ignore[arg-type]
        action_spec=fit_action_spec(dataset.meta.action_spec, actions, states),
        env_id=dataset.meta.env_id,
        instruction=episodes[0].instruction,
        key=key,
    )


def _frame_cache(dataset: EpisodeDataset, count: int, key: str) -> npt.NDArray[np.uint8]:
    size, T = dataset.meta.image_size, dataset.meta.horizon
    folder = dataset.root / ".cache"
    path = folder / f"frames-{key}.npy"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        shape = (count, T + 1, size, size, 3)
        try:
            out = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            with Progress(count, f"decode {dataset.root.name}", unit="ep") as progress:
                for i in range(count):
                    out[i] = dataset.read(i).frames
                    progress.update()
            out.flush()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


def fit_action_spec(spec: ActionSpec, actions: Float, states: Float, taps: int = 4) -> ActionSpec:
    """Fit how far the arm moves per command, and the statistics of the absolute poses.

    Least squares of the recorded pose increments on the last ``taps`` commands, one set of taps
    for positions and one for rotations (the axes share the controller's gains).
    """
    from dataclasses import replace

    if spec.kind == "absolute_pose":
        poses = actions
    else:
        fitted = [
            _fit_taps(actions[..., part], states[..., part], taps)
            for part in (slice(0, 3), slice(3, 6))
        ]
        controller = ControllerFit(fitted[0], fitted[1], 0.0, 0.0)
        spec = replace(spec, controller=controller)
        poses = spec.to_absolute(actions, states[:, 0])
        error = np.square(poses - states[:, 1:]).mean((0, 1))
        controller = ControllerFit(
            fitted[0],
            fitted[1],
            float(np.sqrt(error[:3].mean())),
            float(np.sqrt(error[3:6].mean())),
        )
        spec = replace(spec, controller=controller)
    mean, std = poses.mean((0, 1)), poses.std((0, 1))
    std = np.maximum(std, 0.05 * np.maximum(1.0, np.abs(mean)))
    return replace(
        spec,
        pose_mean=tuple(round(float(v), 6) for v in mean),
        pose_std=tuple(round(float(v), 6) for v in std),
    )


def _fit_taps(commands: Float, poses: Float, taps: int) -> tuple[float, ...]:
    increments = np.diff(poses.astype(np.float64), axis=1)
    padded = np.pad(commands.astype(np.float64), ((0, 0), (taps - 1, 0), (0, 0)))
    T = commands.shape[1]
    columns = [padded[:, taps - 1 - k : taps - 1 - k + T].ravel() for k in range(taps)]
    solution = np.linalg.lstsq(np.stack(columns, 1), increments.ravel(), rcond=None)[0]
    return tuple(round(float(v), 8) for v in solution)


def object_weight(pixels_GO2: Float, size: int, radius: float) -> Float:
    """Gaussian bumps [G,size,size] around the first object's pixel position."""
    grid = np.arange(size, dtype=np.float32)
    column = np.square(grid[None, None] - pixels_GO2[:, 0, 0, None, None])
    row = np.square(grid[None, :, None] - pixels_GO2[:, 0, 1, None, None])
    return np.exp(-(column + row) / (2 * radius**2)).astype(np.float32)


def augment(pictures: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast and pixel noise on uint8 pictures [B,V,S,S,3]."""
    if not strength:
        return pictures
    B = len(pictures)
    shape = (B, *[1] * (pictures.dim() - 1))
    gain = torch.from_numpy(rng.uniform(1 - strength, 1 + strength, B).astype(np.float32))
    shift = torch.from_numpy(rng.uniform(-strength, strength, B).astype(np.float32))
    level = torch.from_numpy(rng.uniform(0, 0.2 * strength, B).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(pictures.shape, np.float32))
    x = pictures.float() / 255
    x = (x - 0.5) * gain.view(shape) + 0.5 + 0.3 * shift.view(shape) + level.view(shape) * noise
    return (x * 255).round_().clamp_(0, 255).to(torch.uint8)
