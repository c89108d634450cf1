"""The vision towers against timm, whose weights and key names OpenVLA's checkpoints carry."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from worldloop.engine.policy.vision import DINOV2_L, SIGLIP_SO400M, ViT, ViTConfig

pytestmark = pytest.mark.timm

PARITY = 1e-5  # relative L2, float32
TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": (
        DINOV2_L,
        ViTConfig(64, 4, 4, 256, image_size=56, registers=4, layer_scale=True),
    ),
    "vit_so400m_patch14_siglip_224": (
        SIGLIP_SO400M,
        ViTConfig(64, 4, 4, int(64 * 3.7362), image_size=56, pool=True),  # timm's mlp_ratio
    ),
}


def theirs_of(name: str, config: ViTConfig) -> nn.Module:
    import timm

    return timm.create_model(
        name,
        pretrained=False,
        num_classes=0,
        img_size=config.image_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
    ).eval()


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("scale_factor", "gamma"): value for key, value in state.items()}


@pytest.mark.parametrize("name", TOWERS)
def test_keys_and_shapes_at_full_width(name):
    config = dataclasses.replace(TOWERS[name][0], depth=2)
    ours, theirs = ViT(config), theirs_of(name, config)
    shapes = {key: value.shape for key, value in to_timm(ours.state_dict()).items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


@pytest.mark.parametrize("name", TOWERS)
def test_features_of_the_second_to_last_block(name):
    config = TOWERS[name][1]
    ours, theirs = ViT(config), theirs_of(name, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator) + 0.5 * (p.dim() == 1))
    theirs.load_state_dict(to_timm(ours.state_dict()), strict=True)
    pixels = torch.randn(2, 3, 56, 56, generator=generator)
    with torch.no_grad():
        # As the published code asks for them: no norm, no prefix tokens.
        (expected,) = theirs.get_intermediate_layers(pixels, n={config.depth - 2})
        got = ours(pixels)
    assert got.shape == expected.shape == (2, 16, 64)
    assert (got - expected).norm() / expected.norm() <= PARITY
