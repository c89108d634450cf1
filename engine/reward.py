"""The reward head: one scalar per frame from denoised latents (paper section 3.2).

Shape letters: B rows, C channels, F latent frames, H W latent height and width, T frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RewardConfig:
    """A light MLP. ``grid``: latent height and width it was made for."""

    latent_channels: int = 16
    grid: tuple[int, int] = (16, 16)
    patch: int = 2
    token_width: int = 64
    token_out: int = 16
    hidden: int = 128
    frames_per_latent: int = 4


class RewardHead(nn.Module):
    """Every patch through one small MLP, the patches' outputs through a second one."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        self.config = config
        p = config.patch
        tokens = (config.grid[0] // p) * (config.grid[1] // p)
        self.patches = nn.PixelUnshuffle(p)
        self.token = nn.Sequential(
            nn.Linear(config.latent_channels * p * p, config.token_width),
            nn.GELU(),
            nn.Linear(config.token_width, config.token_out),
            nn.GELU(),
        )
        self.head = nn.Sequential(
            nn.Linear(tokens * config.token_out, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.frames_per_latent),
        )

    def logits(self, latents_BCFHW: Tensor) -> Tensor:
        """Reward before the sigmoid, [B,T] with T = frames_per_latent * F."""
        frames = latents_BCFHW.transpose(1, 2).flatten(0, 1)  # [B*F,C,H,W]
        weight: Tensor = self.head[0].weight  # type: ignore[assignment]
        patches = self.patches(frames.to(weight.dtype))
        tokens = self.token(patches.flatten(2).transpose(1, 2))
        out: Tensor = self.head(tokens.flatten(1))
        return out.reshape(latents_BCFHW.shape[0], -1)

    def forward(self, latents_BCFHW: Tensor) -> Tensor:
        """Latents of frames that follow actions to rewards in [0,1], [B,T] fp32."""
        return torch.sigmoid(self.logits(latents_BCFHW).float())
