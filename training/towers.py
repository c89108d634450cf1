"""`worldloop train towers`: teach preset `tiny`'s vision towers to see, before any policy training.

The published policy begins with DINOv2 and SigLIP, which have seen hundreds of millions of
pictures; `tiny` has no such start, and a hundred demonstrations do not teach a transformer where
things are. So its towers first learn to tell, from frames of every outcome, where the tracked
object and the hand are. Actions and outcomes are not used. Both towers learn together, each with
a head of its own; the heads are thrown away.

Shape letters: B frames, N patches, D width of a tower, S side of the pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from worldloop.checkpoint import load_checkpoint, load_into, save_checkpoint
from worldloop.cli import parse_config
from worldloop.config import config_to_dict
from worldloop.engine.policy.images import prepare_frames
from worldloop.engine.policy.openvla_oft import OpenVLAConfig, tiny_config
from worldloop.engine.policy.vision import VisionBackbone, ViT, ViTConfig, normalise_frames
from worldloop.engine.precision import autocast
from worldloop.errors import UserError
from worldloop.files import exclusive
from worldloop.training.common import Facts, TrainingOptions, device_for, fit
from worldloop.training.data import EpisodeArrays, augment, load_arrays
from worldloop.training.optimizer import MuonAdamW

KIND = "vision_towers"
TARGETS = 5  # object's column and row, hand's x, y, z


@dataclass(frozen=True, kw_only=True)
class TowersTraining(TrainingOptions):
    """Pretrain the towers of preset `tiny` on a dataset's frames; run it again to resume."""

    data: Path
    steps: int = 2000
    batch: int = 64
    lr: float = 2e-3
    """Peak learning rate of the hidden matrices (Muon); the rest takes `lr_vectors` (AdamW)."""
    lr_vectors: float = 1e-3
    weight_decay: float = 0.01
    ema: float = 0.995
    jitter: float = 0.1
    held_out: int = 16
    limit: int | None = None


class PlaceHead(nn.Module):
    """Looks at one place for each target and reads the target there.

    The features of each patch are weighted by a softmax over patches; the object's place is the
    weighted mean of patch centres plus an offset, the hand's pose is linear in its features.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        D, side = config.width, config.image_size // config.patch
        self.norm = nn.LayerNorm(D)
        self.look = nn.Linear(D, 2)
        self.offset = nn.Linear(D, 2)
        self.pose = nn.Linear(D + 2, 3)
        at = (torch.arange(side) + 0.5) / side * 2 - 1
        row, column = torch.meshgrid(at, at, indexing="ij")
        self.register_buffer("centres", torch.stack([column, row], -1).flatten(0, 1))

    def forward(self, features_BND: Tensor) -> Tensor:
        """Targets [B,5]: object in [-1, 1] of the picture, hand normalised."""
        x = self.norm(features_BND.float())
        weight = torch.softmax(self.look(x), 1)  # [B,N,2]
        places = torch.einsum("bnk,nc->bkc", weight, self.centres)
        seen = torch.einsum("bnk,bnd->bkd", weight, x)
        target = places[:, 0] + self.offset(seen[:, 0])
        hand = self.pose(torch.cat([seen[:, 1], places[:, 1]], -1))
        return torch.cat([target, hand], -1)


class Trainee(nn.Module):
    """The towers with their heads."""

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        self.vision_backbone = VisionBackbone(config.dino, config.siglip)
        for tower in (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer):
            nn.init.normal_(tower.pos_embed, std=0.02)
            for name in ("cls_token", "reg_token"):
                if hasattr(tower, name):
                    nn.init.normal_(getattr(tower, name), std=0.02)
        self.heads = nn.ModuleList([PlaceHead(config.dino), PlaceHead(config.siglip)])

    def forward(self, pixels_B6HW: Tensor) -> list[Tensor]:
        """Each tower's targets [B,5]."""
        towers: list[ViT] = [
            self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer
        ]  # fmt: skip
        pairs = zip(self.heads, towers, pixels_B6HW.split(3, dim=1), strict=True)
        return [head(tower(x)) for head, tower, x in pairs]


class Frames:
    """Every frame of a dataset as a small picture with its targets."""

    def __init__(self, data: EpisodeArrays, size: int) -> None:
        if data.object_pixels is None:
            raise UserError("towers: this dataset tracks no object; collect it with worldloop")
        self.pictures = np.stack([prepare_frames(f, size, jpeg=False, crop=False)
                                  for f in data.frames])  # fmt: skip
        place = (data.object_pixels[:, :, 0] + 0.5) / data.frames.shape[2] * 2 - 1
        hand = data.states[..., :3]
        self.scale = hand.reshape(-1, 3).std(0)
        self.centre = hand.reshape(-1, 3).mean(0)
        self.targets = np.concatenate([place, (hand - self.centre) / self.scale], -1)
        self.pixel = data.frames.shape[2] / 2  # camera pixels in one unit of a place

    def batch(self, rng: np.random.Generator, size: int, episodes: range) -> tuple[Tensor, Tensor]:
        """Random frames [B,1,S,S,3] of these episodes with their targets [B,5]."""
        b = rng.integers(episodes.start, episodes.stop, size)
        t = rng.integers(self.targets.shape[1], size=size)
        return (
            torch.from_numpy(self.pictures[b, t][:, None]),
            torch.from_numpy(self.targets[b, t].astype(np.float32)),
        )


def train(config: TowersTraining) -> Path:
    """Train until ``config.steps``; returns the checkpoint folder of the averaged towers."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = device_for(config.device)
    data = load_arrays(config.data, config.limit)
    if len(data) <= config.held_out:
        raise UserError(f"held_out is {config.held_out}; {config.data} has {len(data)} episodes")
    sizes = tiny_config()
    frames = Frames(data, sizes.image_size)
    trained = range(len(data) - config.held_out)
    held = frames.batch(
        np.random.default_rng(0), 512, range(len(data) - config.held_out, len(data))
    )
    model = Trainee(sizes).to(device)
    optimizer = MuonAdamW(model, config)

    def loss_at(step: int) -> tuple[Tensor, Facts]:
        rng = np.random.default_rng([config.seed, step])
        pictures, targets = frames.batch(rng, config.batch, trained)
        pixels = normalise_frames(augment(pictures, config.jitter, rng).to(device))
        with autocast(device, config.precision):
            first, second = model(pixels)
        targets = targets.to(device)
        return (first - targets).abs().mean() + (second - targets).abs().mean(), {}

    def checked(step: int, row: dict[str, float]) -> dict[str, float]:
        state = model.vision_backbone.state_dict()
        save_checkpoint(config.out / "model", state, config_to_dict(sizes), kind=KIND)
        return row | check(model, held, frames, device, config)

    fit(
        "towers", config, model, optimizer, loss_at, checked, rates=optimizer.bases,
        ema=config.ema, frames=config.batch,
    )  # fmt: skip
    return config.out / "model"


@torch.no_grad()
def check(
    model: Trainee,
    held: tuple[Tensor, Tensor],
    frames: Frames,
    device: torch.device,
    config: TowersTraining,
) -> dict[str, float]:
    """Mean distance of object (camera pixels) and hand (millimetres), averaged over the towers."""
    with autocast(device, config.precision):
        made = torch.stack(model(normalise_frames(held[0].to(device)))).mean(0).float().cpu()
    error = (made - held[1]).numpy()
    return {
        "object_pixels": float(np.linalg.norm(error[:, :2] * frames.pixel, axis=1).mean()),
        "hand_mm": float(1000 * np.linalg.norm(error[:, 2:] * frames.scale, axis=1).mean()),
    }


def load_towers(backbone: VisionBackbone, folder: Path) -> None:
    """Fill a policy's towers from a folder that `train` wrote; raises UserError naming it."""
    checkpoint = load_checkpoint(folder, kind=KIND)
    load_into(backbone, checkpoint.parts["model"], str(folder))


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(TowersTraining, argv, "worldloop train towers")
    with exclusive(config.out):
        print(f"towers: {train(config)}")
    return 0
