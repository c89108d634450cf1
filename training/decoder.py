"""`worldloop train decoder`: distil an autoencoder's decoder into a small, fast one.

The teacher encodes real clips, its latents get noise (the diffusion model's are never quite
right), and the student learns to make of them what the teacher makes. The teacher's pictures are
the target, not the real ones: the student is to be a stand-in. Loss: squared plus a little absolute
error, more where the picture differs from the background, which is where the task happens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldloop.cli import parse_config
from worldloop.config import positive
from worldloop.engine.light_decoder import PRESETS, LightDecoder
from worldloop.engine.precision import autocast
from worldloop.engine.vae import Autoencoder
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.files import exclusive
from worldloop.training.autoencoder import median_background, psnr_of
from worldloop.training.common import Facts, TrainingOptions, device_for, fit
from worldloop.training.data import EpisodeArrays, load_arrays


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(TrainingOptions):
    """Distil the decoder of a world model's autoencoder; run it again to resume."""

    data: Path
    world: str = "tiny"
    """Shipped preset, checkpoint folder or hub id of the world model with the teacher."""
    preset: str = "tiny"
    steps: int = 4_000
    batch: int = 4
    """Clips a step."""
    latents: int = 4
    """Latent frames of a clip: the first stands for one frame, the others for four."""
    lr: float = 2e-3
    motion_weight: float = 4.0
    latent_noise: float = 0.15
    """Largest standard deviation of the noise on latents (which have unit scale)."""
    ema: float = 0.995
    limit: int | None = None
    """Use only the first episodes of the dataset."""
    save_every: int = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "latents")
        if self.preset not in PRESETS:
            raise UserError(f"preset is {self.preset!r}; known: {', '.join(PRESETS)}")


def clips_of(data: EpisodeArrays, episodes: np.ndarray, starts: np.ndarray, frames: int) -> Tensor:
    """Clips [B,3,frames,H,W] in [-1,1]."""
    clips = [data.frames[e, t : t + frames] for e, t in zip(episodes, starts, strict=True)]
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    return pixels.float() / 127.5 - 1


def sample_clips(
    data: EpisodeArrays, first: int, last: int, config: DecoderConfig, key: list[int]
) -> Tensor:
    """One batch out of episodes first .. last-1; depends on `key` alone."""
    rng = np.random.default_rng(key)
    frames = 1 + 4 * (config.latents - 1)
    episodes = rng.integers(first, last, size=config.batch)
    starts = rng.integers(data.frames.shape[1] - frames + 1, size=config.batch)
    return clips_of(data, episodes, starts, frames)


@torch.no_grad()
def targets_of(teacher: Autoencoder, clips: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Noisy latents of clips and the teacher's frames for them; each clip has its own noise."""
    latents, _ = teacher.encode(clips)
    sigma = noise * torch.rand(len(clips), 1, 1, 1, 1, device=clips.device)
    latents = latents.float() + sigma * torch.randn_like(latents, dtype=torch.float32)
    frames, _ = teacher.decode(latents)
    return latents, frames.float().clamp(-1, 1)


def distillation_loss(
    student: LightDecoder, latents: Tensor, target: Tensor, motion_weight: float
) -> tuple[Tensor, Tensor]:
    """Weighted loss and the plain mean squared error ([-1,1] scale)."""
    error = student.decode_frames(latents, None).float() - target
    weight = torch.ones_like(target[:, :1])
    if student.config.picture is not None:
        still = student.background.detach()[None, :, None]
        moving = ((target - still).abs().amax(1, keepdim=True) > 0.15).float()
        weight = 1 + motion_weight * moving
    square = error.square()
    return (weight * (square + 0.05 * error.abs())).mean(), square.mean()


@torch.no_grad()
def held_out_psnr(student: LightDecoder, latents: Tensor, target: Tensor) -> float:
    """PSNR in dB of the student's frames against the teacher's."""
    made = student.decode_frames(latents, None).float()
    return psnr_of(float((made - target).square().mean()))


def make_student(data: EpisodeArrays, teacher: Autoencoder, preset: str) -> LightDecoder:
    """A fresh student for a teacher, with the dataset's median picture as its background."""
    sizes = replace(PRESETS[preset](), latent_channels=teacher.latent_channels)
    size = (int(data.frames.shape[2]), int(data.frames.shape[3]))
    student = LightDecoder(replace(sizes, picture=size))
    student.background.data.copy_(median_background(data))
    return student


def train(config: DecoderConfig) -> Path:
    """Train until ``config.steps``; returns the run's folder (its ``model`` is the decoder)."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = device_for(config.device)
    data = load_arrays(config.data, config.limit)
    trained = len(data) - config.held_out
    if trained < 1:
        raise UserError(f"held_out is {config.held_out}; {config.data} has {len(data)} episodes")
    if data.frames.shape[1] < 1 + 4 * (config.latents - 1):
        raise UserError(f"latents is {config.latents}: longer than the episodes of {config.data}")
    teacher = WorldModel.from_pretrained(config.world, device=device).autoencoder
    teacher.channels_last().requires_grad_(False)
    student = make_student(data, teacher, config.preset).to(device).channels_last()
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, betas=(0.9, 0.99))
    held = [
        targets_of(teacher, sample_clips(data, trained, len(data), config, [7, i]).to(device), 0.0)
        for i in range(4)
    ]
    held_latents, held_frames = (torch.cat(parts) for parts in zip(*held, strict=True))

    def loss_at(step: int) -> tuple[Tensor, Facts]:
        torch.manual_seed(config.seed * 1_000_003 + step)  # latent noise: resumable
        clips = sample_clips(data, 0, trained, config, [config.seed, step]).to(device)
        with autocast(device, config.precision):
            latents, target = targets_of(teacher, clips, config.latent_noise)
            loss, mse = distillation_loss(student, latents, target, config.motion_weight)
        return loss, {"mse": mse.detach()}

    def checked(step: int, row: dict[str, float]) -> dict[str, float]:
        student.save(config.out / "model")
        psnr = held_out_psnr(student, held_latents, held_frames)
        return row | {"train_psnr": psnr_of(row["mse"]), "held_out_psnr": psnr}

    fit(
        "decoder", config, student, optimizer, loss_at, checked, rates=[config.lr],
        ema=config.ema, frames=config.batch * held_frames.shape[2],
    )  # fmt: skip
    return config.out


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(DecoderConfig, argv, "worldloop train decoder")
    with exclusive(config.out):
        print(f"decoder: {train(config)}")
    return 0
