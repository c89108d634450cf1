"""The two vision towers of OpenVLA: DINOv2 with registers and SigLIP, in timm's key layout.

Both are pre-norm vision transformers. Used is the output of the second-to-last block, without the
prefix tokens and without the final norm; the last block, `norm` and SigLIP's `attn_pool` take no
part, but published checkpoints hold them, so they are built. LayerScale's `gamma` is stored as
`scale_factor`, as published. Facts: openvla/openvla-oft at 213c5ff and timm 0.9.10.

Shape letters: B rows, V images per row, H W pixels, N patches, P prefix tokens, D width, h heads.
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloop.engine.attention import attend
from worldloop.errors import UserError
from worldloop.kernels.frames import normalise

EPS = 1e-6

# What the published preprocessor applies: the usual means and deviations, rounded to bfloat16.
DINO_MEAN, DINO_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ViTConfig:
    """One tower; `registers` None means no prefix tokens at all, else cls + that many."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int = 14
    image_size: int = 224
    registers: int | None = None
    layer_scale: bool = False
    pool: bool = False  # holds SigLIP's attention pooling (unused, but in the checkpoint)

    def __post_init__(self) -> None:
        if self.width % self.heads or self.image_size % self.patch or self.depth < 2:
            raise UserError(
                f"ViTConfig: width {self.width} must divide by heads {self.heads}, image_size "
                f"{self.image_size} by patch {self.patch}, and depth {self.depth} be at least 2"
            )

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2


DINOV2_L = ViTConfig(1024, 24, 16, 4096, registers=4, layer_scale=True)
SIGLIP_SO400M = ViTConfig(1152, 27, 16, 4304, pool=True)
DINOV2_TINY = dataclasses.replace(
    DINOV2_L, width=96, depth=4, heads=3, mlp_width=384, patch=8, image_size=64
)
SIGLIP_TINY = dataclasses.replace(
    SIGLIP_SO400M, width=128, depth=4, heads=4, mlp_width=478, patch=8, image_size=64
)


class Attention(nn.Module):
    """Full self-attention with a fused, biased qkv."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        B, N, D = x_BND.shape
        qkv = self.qkv(x_BND).reshape(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class ViTBlock(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        D = config.width
        self.norm1 = nn.LayerNorm(D, eps=EPS)
        self.attn = Attention(D, config.heads)
        self.ls1 = LayerScale(D) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(D, eps=EPS)
        self.mlp = MLP(D, config.mlp_width)
        self.ls2 = LayerScale(D) if config.layer_scale else nn.Identity()

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.ls1(self.attn(self.norm1(x_BND)))
        return cast(Tensor, x_BND + self.ls2(self.mlp(self.norm2(x_BND))))


class PatchEmbed(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, stride=config.patch)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        return self.proj(pixels_B3HW).flatten(2).transpose(1, 2)


class AttentionPool(nn.Module):
    """The parameters of SigLIP's pooling head; OpenVLA never runs it."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        D = config.width
        self.latent = nn.Parameter(torch.zeros(1, 1, D))
        self.q = nn.Linear(D, D)
        self.kv = nn.Linear(D, 2 * D)
        self.proj = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D, eps=EPS)
        self.mlp = MLP(D, config.mlp_width)


class ViT(nn.Module):
    """One tower: pixels [B,3,H,W], normalised, to patch features [B,N,D]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.prefix = 0 if config.registers is None else 1 + config.registers
        if config.registers is not None:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, D))
        # Positions belong to the patches only; prefix tokens have none.
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches, D))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, eps=EPS)
        if config.pool:
            self.attn_pool = AttentionPool(config)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Raises UserError where the picture is not of the tower's size."""
        size = self.config.image_size
        if tuple(pixels_B3HW.shape[1:]) != (3, size, size):
            raise UserError(
                f"pixels have shape {list(pixels_B3HW.shape)}; expected [B, 3, {size}, {size}]"
            )
        x_BND = self.patch_embed(pixels_B3HW) + self.pos_embed
        if self.prefix:
            rows = x_BND.shape[0]
            prefix = torch.cat([self.cls_token, self.reg_token], dim=1)
            x_BND = torch.cat([prefix.expand(rows, -1, -1), x_BND], dim=1)
        for block in list(self.blocks)[:-1]:
            x_BND = block(x_BND)
        return x_BND[:, self.prefix :]


class VisionBackbone(nn.Module):
    """Both towers on every image; features side by side on the channel axis."""

    def __init__(self, dino: ViTConfig, siglip: ViTConfig) -> None:
        super().__init__()
        self.featurizer = ViT(dino)
        self.fused_featurizer = ViT(siglip)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """pixels [B,6V,H,W]: three channels for DINOv2, then three for SigLIP, image by image.

        Returns [B,V*N,D_dino+D_siglip], the images one after another on the token axis.
        """
        if pixels_BCHW.dim() != 4 or pixels_BCHW.shape[1] % 6 or not pixels_BCHW.shape[1]:
            raise UserError(
                f"pixels have shape {list(pixels_BCHW.shape)}; expected [B, 6*images, H, W]"
            )
        B = pixels_BCHW.shape[0]
        each = pixels_BCHW.reshape(-1, 6, *pixels_BCHW.shape[2:])
        features = torch.cat(
            [self.featurizer(each[:, :3]), self.fused_featurizer(each[:, 3:])], dim=-1
        )
        return features.reshape(B, -1, features.shape[-1])


def normalise_frames(frames_BVHW3: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 frames [B,V,H,W,3], already of the towers' size, to their input [B,6V,H,W]."""
    if frames_BVHW3.dtype != torch.uint8 or frames_BVHW3.dim() != 5 or frames_BVHW3.shape[-1] != 3:
        raise UserError(
            f"frames are {frames_BVHW3.dtype} {list(frames_BVHW3.shape)}; "
            "expected uint8 [B, views, H, W, 3]"
        )
    mean, std = _statistics(frames_BVHW3.device)
    return normalise(frames_BVHW3.flatten(0, 1), mean, std, dtype).unflatten(
        0, frames_BVHW3.shape[:2]
    ).flatten(1, 2)  # fmt: skip


@lru_cache(maxsize=8)
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Means and deviations of both towers, [6] fp32; kept, so that no call copies to the device."""
    with torch.inference_mode(False):
        mean = torch.tensor(DINO_MEAN + SIGLIP_MEAN, dtype=torch.float32, device=device)
        return mean, torch.tensor(DINO_STD + SIGLIP_STD, dtype=torch.float32, device=device)
