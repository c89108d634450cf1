"""`worldloop train autoencoder`: fit the light autoencoder to a dataset's frames.

Loss: squared plus a little absolute error, more where something moves (the frame differs from the
learned background) and around the tracked object. Small noise on the latents makes the decoder
tolerant of what the diffusion model will not get exactly right.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from worldloop.checkpoint import save_checkpoint
from worldloop.config import config_to_dict
from worldloop.engine.light_vae import PRESETS, LightVAE
from worldloop.engine.world_model import load_autoencoder
from worldloop.errors import UserError
from worldloop.track import Run
from worldloop.training.common import (
    EMA,
    Clock,
    autocast,
    device_for,
    learning_rate,
    load_state,
    save_state,
)
from worldloop.training.data import EpisodeArrays, load_arrays, object_weight


@dataclass(frozen=True)
class AutoencoderConfig:
    """Train the light autoencoder; run it again to resume."""

    data: Path
    out: Path
    preset: str = "tiny"
    steps: int = 12_000
    batch: int = 16
    """Groups of four frames a step."""
    lr: float = 1e-3
    weight_decay: float = 1e-4
    motion_weight: float = 3.0
    object_weight: float = 6.0
    latent_noise: float = 0.08
    """Standard deviation of the noise on latents, in units of their own."""
    ema: float = 0.998
    held_out: int = 32
    """Last episodes of the dataset, never trained on."""
    limit: int | None = None
    """Use only the first episodes of the dataset."""
    seed: int = 0
    threads: int = 1
    device: str = "auto"
    precision: str = "auto"
    save_every: int = 250
    init: Path | None = None
    """Start from this autoencoder checkpoint."""
    freeze_encoder: bool = False
    """Tune the decoder only: latents, and every world model trained on them, stay valid."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"preset is {self.preset!r}; known: {', '.join(PRESETS)}")
        for name in ("steps", "batch", "threads", "save_every", "held_out"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; must be at least 1")
        if self.freeze_encoder and self.init is None:
            raise UserError("freeze_encoder needs init: an encoder to keep")


def median_background(data: EpisodeArrays, samples: int = 400) -> Tensor:
    """Per-pixel median [3,H,W] in [-1,1] over frames spread over the dataset."""
    rng = np.random.default_rng(0)
    episodes = rng.integers(len(data), size=samples)
    times = rng.integers(data.frames.shape[1], size=samples)
    frames = np.stack([data.frames[e, t] for e, t in zip(episodes, times, strict=True)])
    median = np.median(frames, 0)
    return torch.from_numpy(median.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1


def batch_at(
    data: EpisodeArrays, trained: int, config: AutoencoderConfig, step: int
) -> tuple[Tensor, Tensor]:
    """Groups [G,12,H,W] in [-1,1] and object weights [G,1,H,W] of one step."""
    rng = np.random.default_rng([config.seed, step])
    episodes = rng.integers(trained, size=config.batch)
    latents = rng.integers(data.frames.shape[1] // 4 + 1, size=config.batch)
    return groups_of(data, episodes, latents)


def groups_of(
    data: EpisodeArrays, episodes: np.ndarray, latents: np.ndarray
) -> tuple[Tensor, Tensor]:
    """The four frames behind each latent frame (the first one stands alone, folded)."""
    size = data.frames.shape[2]
    groups, weights = [], []
    for e, f in zip(episodes, latents, strict=True):
        times = [0, 0, 0, 0] if f == 0 else list(range(4 * f - 3, 4 * f + 1))
        pictures = data.frames[e, times].astype(np.float32) / 127.5 - 1
        groups.append(pictures.transpose(0, 3, 1, 2).reshape(12, size, size))
        if data.object_pixels is None:
            weights.append(np.zeros((size, size), np.float32))
        else:
            weights.append(object_weight(data.object_pixels[e, times], size, size / 18).max(0))
    return torch.from_numpy(np.stack(groups)), torch.from_numpy(np.stack(weights))[:, None]


def weighted_loss(
    model: LightVAE, groups: Tensor, near_object: Tensor, config: AutoencoderConfig
) -> tuple[Tensor, Tensor]:
    """Weighted reconstruction loss and the plain mean squared error ([-1,1] scale)."""
    latents = model.encode_groups(groups)
    scale = latents.detach().float().std()
    noisy = latents + config.latent_noise * scale * torch.randn_like(latents)
    error = model.decode_groups(noisy).float() - groups
    moving = groups - model.background.detach().repeat(4, 1, 1)
    moving = (moving.abs().amax(1, keepdim=True) > 0.15).float()
    weight = 1 + config.motion_weight * moving + config.object_weight * near_object
    square = error.square()
    loss = (weight * (square + 0.05 * error.abs())).mean()
    # Latents of unit size: nothing else bounds them.
    loss = loss + 1e-3 * (latents.float().square().mean() - 1).square()
    return loss, square.mean()


def psnr_of(mse_pm1: float) -> float:
    """PSNR in dB from a mean squared error on the [-1,1] scale (peak to peak 2)."""
    return float(10 * np.log10(4 / max(mse_pm1, 1e-12)))


@torch.no_grad()
def evaluate(model: LightVAE, groups: Tensor) -> tuple[float, Tensor]:
    """Held-out PSNR without latent noise, and the reconstruction."""
    out = model.decode_groups(model.encode_groups(groups)).float().clamp(-1, 1)
    return psnr_of(float((out - groups).square().mean())), out


def train(config: AutoencoderConfig) -> Path:
    """Train until ``config.steps``; returns the folder of the run (its ``model`` is loaded)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the autoencoder trains in one process; start it without torchrun")
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = device_for(config.device)
    data = load_arrays(config.data, config.limit)
    trained = len(data) - config.held_out
    if trained < 1:
        raise UserError(f"held_out is {config.held_out}; {config.data} has {len(data)} episodes")
    if config.init is None:
        model = LightVAE(replace(PRESETS[config.preset](), picture=data.frames.shape[2:4]))
        model.background.data.copy_(median_background(data))
    else:
        model = load_autoencoder(config.init).train()
        if model.config.picture != data.frames.shape[2:4]:
            raise UserError(
                f"{config.init}: its background is {model.config.picture}, the frames of "
                f"{config.data} are {data.frames.shape[2:4]}; they must agree"
            )
    if config.freeze_encoder:  # the background belongs to the encoder: it is subtracted first
        model.encoder.requires_grad_(False)
        model.background.requires_grad_(False)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.lr,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
    )
    ema = EMA(model, config.ema)
    step = load_state(config.out / "state", model, optimizer, ema)
    run = Run(config.out, config, resume_step=step or None, overwrite=True)
    rng = np.random.default_rng(7)
    held_groups, _ = groups_of(
        data,
        trained + rng.integers(config.held_out, size=64),
        rng.integers(data.frames.shape[1] // 4 + 1, size=64),
    )
    held_groups = held_groups.to(device)
    clock, errors = Clock(), []
    with run.progress(config.steps, "autoencoder", unit="step", initial=step) as progress:
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.steps, config.lr)
            groups, near = (x.to(device) for x in batch_at(data, trained, config, step))
            groups = groups.contiguous(memory_format=torch.channels_last)
            torch.manual_seed(config.seed * 1_000_003 + step)  # latent noise: resumable
            with autocast(device, config.precision):
                loss, mse = weighted_loss(model, groups, near, config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.update(model, step)
            errors.append(float(mse.detach()))
            step += 1
            recent = psnr_of(float(np.mean(errors[-50:])))
            progress.update(1, loss=float(loss.detach()), psnr=recent)
            if step % config.save_every == 0 or step == config.steps:
                with ema.applied(model), autocast(device, config.precision):
                    held, pictures = evaluate(model, held_groups)
                    write_checkpoint(model, data, config)
                run.log(
                    step,
                    loss=float(loss.detach()),
                    train_psnr=psnr_of(float(np.mean(errors))),
                    held_out_psnr=held,
                    frames_per_second=4 * config.batch * len(errors) / clock.lap(),
                )
                errors = []
                write_samples(held_groups, pictures, config.out / "samples" / f"{step:06d}.png")
                # Last: a run killed before this line does these steps and their row again.
                save_state(config.out / "state", model, optimizer, ema, step)
                progress.write(f"step {step}: held-out PSNR {held:.2f} dB")
    run.close()
    return config.out


@torch.no_grad()
def write_checkpoint(model: LightVAE, data: EpisodeArrays, config: AutoencoderConfig) -> None:
    """Save the (averaged) weights with the latents' statistics over sampled groups."""
    sizes = model.config
    if not config.freeze_encoder:
        rng = np.random.default_rng(3)
        groups, _ = groups_of(
            data,
            rng.integers(len(data) - config.held_out, size=64),
            rng.integers(data.frames.shape[1] // 4 + 1, size=64),
        )
        latents = model.encode_groups(groups.to(next(model.parameters()).device)).float()
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3)).clamp_min(1e-3)
        sizes = replace(
            sizes,
            latent_mean=tuple(round(float(v), 6) for v in mean),
            latent_std=tuple(round(float(v), 6) for v in std),
        )
    plain = config_to_dict(sizes)
    save_checkpoint(config.out / "model", model.state_dict(), plain, kind="light_vae")


def write_samples(real: Tensor, made: Tensor, path: Path, count: int = 8) -> None:
    """Real (above) and reconstructed (below) last frames of held-out groups, as a PNG."""
    pair = torch.stack([real[:count, 9:12], made[:count, 9:12]])
    picture = ((pair.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    rows = picture.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rows).save(path)


def main(argv: list[str]) -> int:
    config = tyro.cli(AutoencoderConfig, args=argv, prog="worldloop train autoencoder")
    print(f"autoencoder: {train(config)}")
    return 0
