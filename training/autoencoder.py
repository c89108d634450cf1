"""`worldloop train autoencoder`: fit the light autoencoder to the frames of one or more datasets.

Loss: squared plus a little absolute error, more where something moves (the frame differs from the
learned background) and around the tracked object. Small noise on the latents makes the decoder
tolerant of what the diffusion model will not get exactly right. Each camera has a background of
its own; the decoder is also told which one the encoder took off.

Shape letters: G groups of four frames, H W picture height and width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from worldloop.checkpoint import save_checkpoint
from worldloop.cli import parse_config
from worldloop.config import config_to_dict
from worldloop.engine.light_vae import PRESETS, LightVAE, load_autoencoder
from worldloop.engine.precision import autocast
from worldloop.errors import UserError
from worldloop.files import exclusive
from worldloop.training.common import Facts, TrainingOptions, device_for, fit
from worldloop.training.data import EpisodeArrays, load_mixture, object_weight

SAME_VIEW = 0.03  # mean difference of two backgrounds, scale [-1,1], below which they are one


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(TrainingOptions):
    """Train the light autoencoder; run it again to resume."""

    data: tuple[Path, ...]
    """Dataset folders. Tasks count alike, however many episodes they have."""
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
    limit: int | None = None
    """Use only the first episodes of each dataset."""
    save_every: int = 250
    init: Path | None = None
    """Start from this autoencoder checkpoint; cameras that it does not know are added."""
    freeze_encoder: bool = False
    """Tune the decoder only: latents, and every world model trained on them, stay valid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise UserError(f"preset is {self.preset!r}; known: {', '.join(PRESETS)}")
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


def add_cameras(model: LightVAE, parts: Sequence[EpisodeArrays]) -> LightVAE:
    """The model with a background for every task that none of its own is near to."""
    known = list(model.background.detach())
    for env_id in dict.fromkeys(part.env_id for part in parts):
        own = median_background(next(part for part in parts if part.env_id == env_id))
        if all(float((own - other).abs().mean()) > SAME_VIEW for other in known):
            known.append(own)
    if len(known) == model.config.cameras:
        return model
    grown = LightVAE(replace(model.config, cameras=len(known)))
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("camera.")}
    grown.load_state_dict(kept | {"background": torch.stack(known)}, strict=False)
    return grown


def batch_at(
    parts: Sequence[EpisodeArrays], config: AutoencoderConfig, step: int
) -> tuple[Tensor, Tensor]:
    """Groups [G,12,H,W] in [-1,1] and object weights [G,1,H,W] of one step."""
    rng = np.random.default_rng([config.seed, step])
    return groups_of(parts, sample(parts, config, rng, config.batch))


Group = tuple[int, int, int]  # number of the dataset, of the episode, of the latent frame


def sample(
    parts: Sequence[EpisodeArrays],
    config: AutoencoderConfig,
    rng: np.random.Generator,
    count: int,
    held_out: bool = False,
) -> list[Group]:
    """Groups to train on, or held-out ones; every task as likely as any other."""
    tasks = list(dict.fromkeys(part.env_id for part in parts))
    sizes = np.array([len(part) - config.held_out for part in parts], np.float64)
    total = {task: sum(n for n, p in zip(sizes, parts) if p.env_id == task) for task in tasks}
    share = np.array([n / total[p.env_id] for n, p in zip(sizes, parts)]) / len(tasks)
    chosen = []
    for k in rng.choice(len(parts), size=count, p=share / share.sum()):
        part, trained = parts[k], int(sizes[k])
        first, last = (trained, len(part)) if held_out else (0, trained)
        latent = rng.integers(part.actions.shape[1] // 4 + 1)
        chosen.append((int(k), int(rng.integers(first, last)), int(latent)))
    return chosen


def groups_of(parts: Sequence[EpisodeArrays], chosen: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """The four frames behind each latent frame (the first one stands alone, folded)."""
    size = parts[0].frames.shape[2]
    groups, weights = [], []
    for k, e, f in chosen:
        data = parts[k]
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
    camera = model.nearest(groups)
    moving = groups - model.background.detach()[camera].repeat(1, 4, 1, 1)
    moving = (moving.abs().amax(1, keepdim=True) > 0.15).float()
    weight = 1 + config.motion_weight * moving + config.object_weight * near_object
    square = error.square()
    loss = (weight * (square + 0.05 * error.abs())).mean()
    # Latents of unit size: nothing else bounds them.
    loss = loss + 1e-3 * (latents.float().square().mean() - 1).square()
    if model.config.cameras > 1:
        loss = loss + 0.02 * F.cross_entropy(model.camera_logits(noisy).float(), camera)
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
    limits = None if config.limit is None else [config.limit] * len(config.data)
    parts = load_mixture(config.data, limits, one_outcome=True)
    for root, part in zip(config.data, parts):
        if len(part) <= config.held_out:
            raise UserError(f"held_out is {config.held_out}; {root} has {len(part)} episodes")
    picture = parts[0].frames.shape[2:4]
    if config.init is None:
        model = LightVAE(replace(PRESETS[config.preset](), picture=picture))
        model.background.data[0] = median_background(parts[0])
    else:
        model = load_autoencoder(config.init).train()
        if model.config.picture != picture:
            raise UserError(
                f"{config.init}: its background is {model.config.picture}, the frames of "
                f"{config.data[0]} are {picture}; they must agree"
            )
    if config.freeze_encoder:  # the backgrounds belong to the encoder: they are subtracted first
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("decoder."))
    else:
        model = add_cameras(model, parts)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.lr,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
    )
    rng = np.random.default_rng(7)
    held, _ = groups_of(parts, sample(parts, config, rng, 64, held_out=True))
    held = held.to(device)

    def loss_at(step: int) -> tuple[Tensor, Facts]:
        groups, near = (x.to(device) for x in batch_at(parts, config, step))
        groups = groups.contiguous(memory_format=torch.channels_last)
        torch.manual_seed(config.seed * 1_000_003 + step)  # latent noise: resumable
        with autocast(device, config.precision):
            loss, mse = weighted_loss(model, groups, near, config)
        return loss, {"mse": mse.detach()}

    def checked(step: int, row: dict[str, float]) -> dict[str, float]:
        with autocast(device, config.precision):
            psnr, pictures = evaluate(model, held)
            write_checkpoint(model, parts, config)
        write_samples(held, pictures, config.out / "samples" / f"{step:06d}.png")
        return row | {"train_psnr": psnr_of(row["mse"]), "held_out_psnr": psnr}

    fit(
        "autoencoder", config, model, optimizer, loss_at, checked, rates=[config.lr],
        ema=config.ema, frames=4 * config.batch,
    )  # fmt: skip
    return config.out


@torch.no_grad()
def write_checkpoint(
    model: LightVAE, parts: Sequence[EpisodeArrays], config: AutoencoderConfig
) -> None:
    """Save the (averaged) weights with the latents' statistics over sampled groups."""
    sizes = model.config
    if not config.freeze_encoder:
        rng = np.random.default_rng(3)
        groups, _ = groups_of(parts, sample(parts, config, rng, 64))
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
    config = parse_config(AutoencoderConfig, argv, "worldloop train autoencoder")
    with exclusive(config.out):
        print(f"autoencoder: {train(config)}")
    return 0
