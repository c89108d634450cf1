"""What a world model is trained on: cached latents of one or several datasets, in batches.

A dataset's latents are encoded once and kept in its folder, under the hash of the autoencoder's
weights. Tasks count alike in a mixture, whatever their number of episodes, and all rows of a batch
have one horizon.

Shape letters: N episodes, B rows of a batch, C channels, F latent frames, H W latent sides,
T actions, A action dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldloop.checkpoint import file_sha256, load_checkpoint, load_into
from worldloop.config import config_from_dict, read_json
from worldloop.engine.arm import Arm
from worldloop.engine.formats.wan import from_diffusers_vae, load_wan_vae
from worldloop.engine.light_vae import LightVAE, load_autoencoder
from worldloop.engine.precision import autocast
from worldloop.engine.vae import WanVAE
from worldloop.engine.world_config import WorldModelConfig
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.training.arm import chunk_poses
from worldloop.training.data import EpisodeArrays, cached_array, object_weight
from worldloop.types import ActionSpec

Half = npt.NDArray[np.float16]
Float = npt.NDArray[np.float32]


def autoencoder_of(path: Path) -> LightVAE | WanVAE:
    """A checkpoint folder of ours, a Wan ``.pth`` or a diffusers folder; raises UserError."""
    if path.suffix == ".pth":
        return load_wan_vae(path).float()
    if path.is_dir() and "_class_name" in read_json(path / "config.json"):
        return from_diffusers_vae(path).float()
    if read_json(path / "config.json").get("kind") != "world_model":
        return load_autoencoder(path)
    checkpoint = load_checkpoint(path, kind="world_model")  # of its weights only what is asked for
    with torch.device("meta"):
        world = WorldModel(config_from_dict(WorldModelConfig, checkpoint.config, str(path)))
    if "autoencoder" not in checkpoint.parts:
        raise UserError(f"{path}: has no 'autoencoder' weights; it is not a whole world model")
    weights = {name: tensor.clone() for name, tensor in checkpoint.parts["autoencoder"].items()}
    load_into(world.autoencoder, weights, f"{path} (autoencoder)")
    return world.autoencoder.float().eval()


def autoencoder_hash(path: Path) -> str:
    """Twelve digits that name the weights of an autoencoder, for the caches made with it."""
    if path.suffix == ".pth":
        return file_sha256(path)[:12]
    files = read_json(path / "config.json").get("files")
    if files is None:  # diffusers
        return file_sha256(min(path.glob("*.safetensors")))[:12]
    return file_sha256(path / (files.get("autoencoder") or files["model"]))[:12]


@torch.inference_mode()
def latent_cache(data: EpisodeArrays, root: Path, autoencoder: Path, device: torch.device) -> Half:
    """Latents [N,F,C,H,W] of every episode, encoded once and kept beside the dataset.

    The file's name holds the hash of the autoencoder's weights: another one gets another cache.
    """
    model = autoencoder_of(autoencoder).to(device)  # first, so that a foreign folder is named
    if isinstance(model, LightVAE):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    name = autoencoder_hash(autoencoder)

    def encoded(i: int) -> Half:
        frames = torch.from_numpy(data.frames[i].copy()).to(device).float() / 127.5 - 1
        with autocast(device, "auto"):
            latents, _ = model.encode(frames.permute(3, 0, 1, 2)[None])
        array: Half = latents[0].transpose(0, 1).float().cpu().numpy().astype(np.float16)
        return array

    return cached_array(
        lambda n: root / ".cache" / f"latents-{data.key(n)}-{name}.npy",
        len(data),
        encoded,
        f"encode {root.name}",
    )


@dataclass(frozen=True)
class Batch:
    """B episodes of one horizon."""

    latents: Tensor  # [B,C,1+F,H,W]
    poses: Tensor  # [B,T,A] normalised absolute poses
    reward: Tensor  # [B,T]
    weight: Tensor  # [B,1,F,H,W] loss weights of the latent frames after the first
    episodes: tuple[str, ...] = ()  # what each row is, for messages

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            latents=self.latents.to(device),
            poses=self.poses.to(device),
            reward=self.reward.to(device),
            weight=self.weight.to(device),
        )


class Sampling(Protocol):
    """What `Batches` reads of a training configuration."""

    @property
    def seed(self) -> int: ...

    @property
    def batch(self) -> int: ...

    @property
    def held_out(self) -> int: ...

    @property
    def motion_weight(self) -> float: ...

    @property
    def object_weight(self) -> float: ...


class Batches:
    """The batch of (seed, step, rank): independent of how often the run was interrupted.

    Episodes are numbered through all datasets. The last ``held_out`` of each are never trained on.
    """

    def __init__(
        self,
        parts: Sequence[EpisodeArrays],
        latents: Sequence[Half],
        config: Sampling,
        arm: Arm | None = None,
    ) -> None:
        self.parts, self.latents, self.config = list(parts), list(latents), config
        self.first = np.cumsum([0, *(len(part) for part in parts)])
        self.poses = [
            normalised(rollout_poses(part, arm, z), part.action_spec)
            for part, z in zip(parts, latents, strict=True)
        ]
        # horizon -> task -> the numbers of its episodes to train on
        self.tasks: dict[int, dict[str, npt.NDArray[np.int64]]] = {}
        for first, part in zip(self.first, parts):
            tasks = self.tasks.setdefault(part.actions.shape[1], {})
            trained = np.arange(first, first + len(part) - config.held_out)
            known = tasks.get(part.env_id, np.zeros(0, np.int64))
            tasks[part.env_id] = np.concatenate([known, trained])

    def at(self, step: int, rank: int) -> Batch:
        """The rows of one step: a horizon by its number of tasks, then tasks, then episodes."""
        config = self.config
        rng = np.random.default_rng([config.seed, step, rank])
        horizons = list(self.tasks)
        # The same horizon on every rank: sharded processes must make the same calls.
        chosen = horizons[0]
        if len(horizons) > 1:
            shares = np.array([len(self.tasks[h]) for h in horizons], np.float64)
            # The last number is no rank's: numpy takes [seed, step] for [seed, step, 0].
            common = np.random.default_rng([config.seed, step, 1 << 31])
            chosen = horizons[int(common.choice(len(horizons), p=shares / shares.sum()))]
        tasks = list(self.tasks[chosen].values())
        if len(tasks) == 1:
            return self.of(tasks[0][rng.integers(len(tasks[0]), size=config.batch)])
        picked = rng.integers(len(tasks), size=config.batch)
        return self.of(np.array([tasks[i][rng.integers(len(tasks[i]))] for i in picked]))

    def held(self, most: int = 32, at_once: int = 16) -> list[Batch]:
        """Up to ``most`` held-out episodes, the same number of each dataset, in batches of one
        horizon and ``at_once`` rows at most."""
        whole = [(n, part) for n, part in zip(self.first, self.parts) if part.first == 0]
        each = min(self.config.held_out, max(1, most // len(whole)))
        rows: dict[int, list[int]] = {}
        for first, part in whole:
            last = range(int(first) + len(part) - each, int(first) + len(part))
            rows.setdefault(part.actions.shape[1], []).extend(last)
        return [
            self.of(np.array(numbers[first : first + at_once]))
            for numbers in rows.values()
            for first in range(0, len(numbers), at_once)
        ]

    def of(self, episodes: npt.NDArray[np.int64]) -> Batch:
        """The rows of these episodes, all of one horizon."""
        part_of = np.searchsorted(self.first, episodes, side="right") - 1
        places = [(int(p), int(e - self.first[p])) for p, e in zip(part_of, episodes)]

        def rows(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
            return np.stack([arrays[p][i] for p, i in places])

        z = torch.from_numpy(rows(self.latents).astype(np.float32)).transpose(1, 2)
        names = (name_of(self.parts[p], i) for p, i in places)
        return Batch(
            z,
            torch.from_numpy(rows(self.poses)),
            torch.from_numpy(rows([part.reward for part in self.parts])),
            self._weights(z, places),
            tuple(names),
        )

    def _weights(self, z: Tensor, places: list[tuple[int, int]]) -> Tensor:
        """More where a latent differs from the first frame's, and around the tracked object."""
        change = (z[:, :, 1:] - z[:, :, :1]).square().mean(1, keepdim=True)
        moving = change / (change + 0.25)
        weight = 1 + self.config.motion_weight * moving
        for row, (p, i) in enumerate(places):
            part, grid = self.parts[p], z.shape[-1]
            if part.object_pixels is None:
                continue
            pixels = part.object_pixels[i, 1:, :1]  # [T,1,2]
            cells = (pixels + 0.5) * (grid / part.frames.shape[2]) - 0.5
            bump = object_weight(cells, grid, 1.2)  # [T,grid,grid]
            per_latent = bump.reshape(-1, 4, grid, grid).max(1)
            weight[row] += self.config.object_weight * torch.from_numpy(per_latent)[None]
        return weight


def name_of(data: EpisodeArrays, row: int) -> str:
    """What messages call an episode."""
    later = f" from frame {data.first} on" if data.first else ""
    return f"{data.env_id} episode {data.numbers[row]}{later}"


def rollout_poses(data: EpisodeArrays, arm: Arm | None, latents: Half) -> Float:
    """Poses [N,T,A] after each action as rollouts have them (metres, rotation vector, gripper).

    Chunk after chunk: from the first pose by the commands alone, at each chunk's end mended by
    what its latents [N,F,C,H,W] show.
    """
    per_latent = data.actions.shape[1] // (latents.shape[1] - 1)

    def look(rows: npt.NDArray[np.int64], end: int, poses_nA: Float) -> Float:
        if arm is None:
            return poses_nA
        return arm.look(torch.from_numpy(latents[rows, end // per_latent]), poses_nA)

    return chunk_poses(data, arm, latents, look)


def normalised(poses_NTA: Float, spec: ActionSpec) -> Float:
    """Poses on the scale that the transformer takes."""
    scaled: Float = ((poses_NTA - np.array(spec.pose_mean)) / np.array(spec.pose_std)).astype(
        np.float32
    )
    return scaled


class Ahead:
    """The next step's batch, made in a thread while this one is trained on."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make, self.pool = make, ThreadPoolExecutor(1, "batch")
        self.step = -1
        self.coming: Future[Batch] | None = None

    def at(self, step: int, last: bool) -> Batch:
        """The batch of a step; ``last``: none follows."""
        coming = self.coming if step == self.step else None
        batch = self.make(step) if coming is None else coming.result()
        self.step = step + 1
        if not last:
            self.coming = self.pool.submit(self.make, step + 1)
        return batch

    def close(self) -> None:
        """Wait for the thread."""
        self.pool.shutdown(cancel_futures=True)
