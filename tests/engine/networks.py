"""Small networks with random weights, for tests in several files."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from worldloop.engine.policy.llama import LlamaConfig
from worldloop.engine.policy.openvla_oft import OpenVLAConfig
from worldloop.engine.policy.vision import DINOV2_TINY, SIGLIP_TINY

SMALL_OPENVLA = OpenVLAConfig(
    dino=dataclasses.replace(DINOV2_TINY, width=24, depth=2, heads=2, mlp_width=48, image_size=16),
    siglip=dataclasses.replace(
        SIGLIP_TINY, width=32, depth=2, heads=2, mlp_width=50, image_size=16
    ),
    llama=LlamaConfig(width=40, depth=2, heads=2, mlp_width=64, vocab_rows=320),
    text_vocab=300,
    space_id=35,
    chunk=2,
)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, norms included, so that no path is silently zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name and p.dim() == 1:
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(noise / math.sqrt(p.shape[-1]))
    return model


def relative_l2(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())
