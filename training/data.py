"""Episodes as arrays for training: frames decoded once into a memory-mapped cache.

The cache lies in the dataset's folder under ``.cache``; its name holds the number of episodes and
a hash of their seeds, so a dataset that has grown gets a new one, made from the old one and the new
episodes. Several datasets can be read as one mixture: they then share one action spec, fitted on
all of them.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.files import disk_error, left_behind
from worldloop.track import Progress
from worldloop.types import ActionSpec, ControllerFit, Episode

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
    seeds: tuple[int, ...]  # [N]; name this set of episodes, for caches made from it
    numbers: npt.NDArray[np.int64]  # [N] which episodes of the dataset they are
    first: int = 0  # frame of the recorded episodes at which these begin
    objects: Float | None = None  # [N,T+1,O,7] poses, where the recording has them

    def __len__(self) -> int:
        return len(self.actions)

    def key(self, count: int | None = None) -> str:
        """What caches call these episodes, or the first ``count`` of them."""
        return _key(self.seeds[:count]) + (f"-from-{self.first}" if self.first else "")

    @property
    def first_objects(self) -> Float:
        """Pose [N,T+1,1,7] of the first object of each episode."""
        assert self.objects is not None
        return self.objects[:, :, :1]

    def begun_at(self, first: int) -> EpisodeArrays:
        """The same episodes from frame ``first`` on, in whole chunks; raises UserError if none is.

        As if the recording had begun there: other chunks, and a first frame amid the motion.
        """
        chunk = self.action_spec.chunk
        length = (self.actions.shape[1] - first) // chunk * chunk
        if first < 1 or length < chunk:
            raise UserError(
                f"later_starts: {first}; episodes of {self.actions.shape[1]} actions can begin at "
                f"frame 1 to {self.actions.shape[1] - chunk}, with a chunk of {chunk} after it"
            )
        steps, moments = slice(first, first + length), slice(first, first + length + 1)
        pixels = None if self.object_pixels is None else self.object_pixels[:, moments]
        objects = None if self.objects is None else self.objects[:, moments]
        return replace(
            self,
            frames=self.frames[:, moments],
            actions=self.actions[:, steps],
            states=self.states[:, moments],
            reward=self.reward[:, steps],
            success=self.reward[:, steps][:, -1] > 0.5,
            object_pixels=pixels,
            first=first,
            objects=objects,
        )


def load_arrays(
    root: Path | str, limit: int | None = None, near_success: bool = True
) -> EpisodeArrays:
    """Read a dataset (at most its first ``limit`` episodes) and decode its videos once.

    near_success: False leaves the near-successes out (`is_near_success`).
    """
    dataset = EpisodeDataset(root)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count == 0:
        raise UserError(f"{root}: holds no episodes yet; collect some first")
    numbers = list(range(count))
    episodes = [dataset.read(i, frames=False) for i in numbers]
    if not near_success:
        numbers = [i for i in numbers if not is_near_success(episodes[i])]
        episodes = [episodes[i] for i in numbers]
        if not episodes:
            raise UserError(f"{root}: holds near-successes alone; nothing is left without them")
    lengths = {len(e.actions) for e in episodes}
    if len(lengths) > 1:
        raise UserError(f"{root}: episodes have {sorted(lengths)} actions; one horizon is needed")
    if len(texts := {e.instruction for e in episodes}) > 1:
        raise UserError(
            f"{root}: holds {len(texts)} instructions ({', '.join(map(repr, sorted(texts)[:2]))} "
            "...); one a dataset is needed, import or collect each task into its own"
        )
    pixels = [e.object_pixels for e in episodes]
    actions = np.stack([e.actions for e in episodes])
    states = np.stack([e.states for e in episodes])
    return EpisodeArrays(
        frames=_frame_cache(dataset, numbers),
        actions=actions,
        states=states,
        reward=np.stack([e.reward for e in episodes]),
        success=np.array([e.success for e in episodes]),
        object_pixels=None if any(p is None for p in pixels) else np.stack(pixels),  # type: ignore[arg-type]
        action_spec=fit_action_spec(dataset.meta.action_spec, actions, states),
        env_id=dataset.meta.env_id,
        instruction=episodes[0].instruction,
        seeds=tuple(int(dataset.seeds[i]) for i in numbers),
        numbers=np.array(numbers),
        objects=_objects(episodes),
    )


def _key(seeds: Sequence[int]) -> str:
    return f"{len(seeds)}-{hashlib.sha256(','.join(map(str, seeds)).encode()).hexdigest()[:12]}"


def _objects(episodes: Sequence[Episode]) -> Float | None:
    """Their poses [N,T+1,O,7], or None where one has none or another number of them."""
    found = [e.objects for e in episodes if e.objects is not None and e.objects.shape[1]]
    if len(found) < len(episodes) or len({each.shape for each in found}) > 1:
        return None
    return np.stack(found).astype(np.float32)


def is_near_success(episode: Episode) -> bool:
    """A failure that was made by a small perturbation of what succeeds (paper section 3.1).

    Scripted collection records its perturbation, and where it grades them, the grade.
    """
    if episode.success or "perturbation_m" not in episode.info:
        return False
    return str(episode.info.get("grade", "near")).startswith("near")


def load_mixture(
    roots: Sequence[Path],
    limits: Sequence[int] | None = None,
    near_success: bool = True,
    one_outcome: bool = False,
) -> list[EpisodeArrays]:
    """Several datasets with one action spec, fitted on all.

    limits: how many episodes of each, from its first on.

    Raises UserError naming the datasets whose pictures or actions differ in kind, and, without
    ``one_outcome``, the task whose episodes all end alike: its reward cannot be learned.
    """
    if not roots:
        raise UserError("data: no dataset is named; give at least one folder")
    most = [None] * len(roots) if limits is None else list(limits)
    parts = [load_arrays(root, n, near_success) for root, n in zip(roots, most, strict=True)]
    for root, part in zip(roots, parts):
        parts[0].action_spec.require_same(part.action_spec, str(roots[0]), str(root))
        size, first = part.frames.shape[2], parts[0].frames.shape[2]
        if size != first:
            raise UserError(f"{root}: pictures of {size} pixels, {roots[0]} has {first}")
        if part.action_spec.chunk != parts[0].action_spec.chunk:
            raise UserError(
                f"{root}: chunks of {part.action_spec.chunk} actions, {roots[0]} has "
                f"{parts[0].action_spec.chunk}"
            )
    for env_id in dict.fromkeys(part.env_id for part in parts):
        success = np.concatenate([part.success for part in parts if part.env_id == env_id])
        if len(set(success)) == 1 and not one_outcome:
            raise UserError(
                f"{env_id}: all {len(success)} episodes end in "
                f"{'success' if success[0] else 'failure'}, so its reward cannot be learned; add "
                "episodes of the other outcome, or pass --one-outcome to train all the same"
            )
        rarer = min(success.mean(), 1 - success.mean())
        if 0 < rarer < 0.1:
            print(f"{env_id}: only {rarer:.0%} of its episodes are of one outcome; "
                  "`worldloop data balance` evens them out", file=sys.stderr)  # fmt: skip
    if len(parts) > 1:
        T = min(part.actions.shape[1] for part in parts)
        actions = np.concatenate([part.actions[:, :T] for part in parts])
        states = np.concatenate([part.states[:, : T + 1] for part in parts])
        spec = fit_action_spec(parts[0].action_spec, actions, states)
        parts = [replace(part, action_spec=spec) for part in parts]
    return parts


def cached_array(
    path_of: Callable[[int], Path], count: int, make: Callable[[int], npt.NDArray[Any]], title: str
) -> npt.NDArray[Any]:
    """The arrays of ``count`` episodes, memory-mapped from a .npy file that is written once.

    path_of: the file that holds those of the first n episodes. Of a dataset that has grown since
    an earlier one was written, only the new episodes are made. A file is whole or not there; the
    room on the disk is taken first: a map of a file that outgrows its disk would kill the process.
    Raises UserError where there is none.
    """
    path = path_of(count)
    if path.exists():
        return np.load(path, mmap_mode="r")
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        for left in path.parent.glob("*.*.tmp"):
            if left_behind(left.name.split(".")[-2]):
                left.unlink(missing_ok=True)
        fewer = next((n for n in range(count - 1, 0, -1) if path_of(n).exists()), 0)
        known = np.load(path_of(fewer), mmap_mode="r") if fewer else ()
        out: Any = None  # a memory map
        with Progress(count, title, unit="ep", initial=fewer) as progress:
            for i in range(count):
                array = known[i] if i < fewer else make(i)
                if out is None:
                    shape = (count, *array.shape)
                    out = np.lib.format.open_memmap(temporary, "w+", array.dtype, shape)
                    with open(temporary, "r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
                out[i] = array
                if i >= fewer:
                    progress.update()
        out.flush()
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(path, error) or error from error
    finally:
        temporary.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


def _frame_cache(dataset: EpisodeDataset, numbers: list[int]) -> npt.NDArray[np.uint8]:
    seeds = [int(dataset.seeds[i]) for i in numbers]
    return cached_array(
        lambda n: dataset.root / ".cache" / f"frames-{_key(seeds[:n])}.npy",
        len(numbers),
        lambda i: dataset.read(numbers[i]).frames,
        f"decode {dataset.root.name}",
    )


def fit_action_spec(spec: ActionSpec, actions: Float, states: Float, taps: int = 4) -> ActionSpec:
    """Fit how far the arm moves per command, and the statistics of the absolute poses.

    Least squares of the recorded pose increments on the last ``taps`` commands, one set of taps
    for positions and one for rotations (the axes share the controller's gains).
    """
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
