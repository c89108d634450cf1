"""Rotary position embedding over (time, height, width), as Cosmos-Predict2 splits it.

The rotation itself is `worldloop.kernels.qk_rope.rotate`.

Shape letters: F latent frames, N tokens (time, height, width order), K head dimension.
"""

import functools

import torch
from torch import Tensor

from worldloop.engine.dit_config import DiTConfig


def rope_table(
    config: DiTConfig, frames_F: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [N,K/2] fp32 of tokens at latent frames `frames_F` on a height x width grid.

    The head dimension is split into time, height and width (in this order); each axis has base
    10000 * ratio^(d/(d-2)) (NTK scaling) and raw grid indices as positions.
    """
    side = config.head_dim // 6 * 2
    rounded = torch.float32 if config.rope_dtype == "float32" else torch.bfloat16
    working = torch.bfloat16 if config.rope_dtype == "bfloat16" else torch.float32

    def angles(positions: Tensor, dim: int, ratio: float) -> Tensor:
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
        theta = 10000.0 * ratio ** (dim / (dim - 2))
        # A bf16 exponent makes torch round the base as well: 10000 becomes 9984, as published.
        frequencies = 1.0 / torch.pow(theta, exponents.to(rounded).to(working))
        return torch.outer(positions.to(working), frequencies).float()

    ratio_h, ratio_w, ratio_t = config.rope_ratio_hwt
    device, grid = frames_F.device, (frames_F.shape[0], height, width, -1)
    t = angles(frames_F, config.head_dim - 2 * side, ratio_t)[:, None, None].expand(grid)
    h = angles(torch.arange(height, device=device), side, ratio_h)[None, :, None].expand(grid)
    w = angles(torch.arange(width, device=device), side, ratio_w)[None, None, :].expand(grid)
    angles_NK = torch.cat([t, h, w], dim=-1).flatten(0, 2)
    return angles_NK.cos(), angles_NK.sin()


@functools.lru_cache(maxsize=128)
def cached_rope_table(
    config: DiTConfig, first: int, frames: int, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    # A table built inside inference mode could never serve a backward pass.
    with torch.inference_mode(False):
        positions = torch.arange(first, first + frames, device=device)
        return rope_table(config, positions, height, width)
