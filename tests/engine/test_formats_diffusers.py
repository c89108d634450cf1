"""The transformer equals diffusers' CosmosTransformer3DModel; keys and folders go both ways."""

import dataclasses
import json
import types

import pytest
import torch
from networks import randomised, relative_l2
from torch import nn

from worldloop.engine.dit import DiT, DiTConfig
from worldloop.engine.formats.diffusers import (
    config_to_diffusers,
    from_diffusers,
    load_diffusers,
    to_diffusers,
)
from worldloop.errors import UserError

SMALL = DiTConfig(width=64, depth=3, heads=2, adaln_rank=16, context_dim=24)


def diffusers_twin(config: DiTConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[DiT, nn.Module]:
    module = pytest.importorskip("diffusers.models.transformers.transformer_cosmos")
    # diffusers resizes the padding mask with torchvision, which need not be installed.
    resize = lambda x, size, interpolation: nn.functional.interpolate(x, size, mode="nearest")  # noqa: E731
    stand_in = types.SimpleNamespace(
        functional=types.SimpleNamespace(resize=resize),
        InterpolationMode=types.SimpleNamespace(NEAREST="nearest"),
    )
    monkeypatch.setattr(module, "transforms", stand_in, raising=False)
    theirs = randomised(module.CosmosTransformer3DModel(**config_to_diffusers(config))).eval()
    ours = DiT(config).eval()
    ours.load_state_dict(from_diffusers(theirs.state_dict()), strict=True)
    return ours, theirs


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (SMALL, (2, 3, 8, 12)),
        (dataclasses.replace(SMALL, heads=4, depth=2), (1, 1, 14, 6)),
        (
            dataclasses.replace(SMALL, width=128, heads=1, rope_ratio_hwt=(2, 2, 5 / 6)),
            (1, 4, 4, 8),
        ),
        (dataclasses.replace(SMALL, condition_channel=False, context_proj_dim=40), (2, 2, 6, 6)),
    ],
)
@pytest.mark.parametrize("per_frame", [False, True])
def test_equals_diffusers(config, shape, per_frame, monkeypatch):
    ours, theirs = diffusers_twin(config, monkeypatch)
    B, frames, H, W = shape
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, config.latent_channels, frames, H, W, generator=g)
    t = torch.rand(B, frames, generator=g)
    condition = torch.zeros(B, 1, frames, H, W)
    condition[:, :, 0] = 1
    padding = (torch.rand(1, 1, 5 * H, 3 * W) > 0.5).float()
    context = torch.randn(B, 9, config.context_proj_dim or config.context_dim)
    mask = {"condition_mask_B1FHW": condition} if config.condition_channel else {}
    t = t if per_frame else t[:, 0]
    with torch.no_grad():
        got = ours(x, t, padding_mask=padding, context=context, **mask).sample
        expected = theirs(
            hidden_states=x,
            timestep=t.reshape(B, 1, frames, 1, 1) if per_frame else t,
            encoder_hidden_states=context,
            condition_mask=mask.get("condition_mask_B1FHW"),
            padding_mask=padding,
        ).sample
    assert relative_l2(got, expected) <= 1e-5


def test_diffusers_keys_both_ways():
    state = DiT(SMALL).state_dict()
    there = to_diffusers(state)
    assert "transformer_blocks.2.attn2.to_out.0.weight" in there
    back = from_diffusers(there)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(UserError, match="action_embedder_B_D"):
        to_diffusers(DiT(dataclasses.replace(SMALL, action_dim=7)).state_dict())


def test_a_folder_loads_strictly(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    dit = randomised(DiT(SMALL)).eval()
    state = to_diffusers(dit.state_dict())
    (tmp_path / "config.json").write_text(json.dumps(config_to_diffusers(SMALL)))
    safetensors.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_diffusers(tmp_path, dtype=torch.float32)
    assert loaded.config == SMALL
    x, t = torch.randn(1, 16, 2, 4, 6), torch.rand(1, 2)
    assert torch.equal(loaded(x, t).sample, dit(x, t).sample)

    state.pop("proj_out.weight")
    safetensors.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"missing key final_layer.linear.weight"):
        load_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json lacks 'patch_size'"):
        load_diffusers(tmp_path)
    with pytest.raises(UserError, match=r"no config.json"):
        load_diffusers(tmp_path / "absent")
