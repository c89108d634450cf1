"""A whole world model of published weights: NVIDIA's transformer and the Wan2.1 autoencoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from worldloop.engine.dit import DiT
from worldloop.engine.formats.cosmos import load_cosmos
from worldloop.engine.formats.diffusers import load_diffusers
from worldloop.engine.formats.wan import from_diffusers_vae, load_wan_vae
from worldloop.engine.reward import RewardConfig, RewardHead
from worldloop.engine.world_config import WorldModelConfig
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.files import PathLike
from worldloop.types import ActionSpec


def load_published(
    dit: PathLike,
    autoencoder: PathLike,
    *,
    action_spec: ActionSpec,
    reward: RewardHead | None = None,
    picture: tuple[int, int] = (480, 640),
    new_actions: bool = False,
    rope_ratio_hwt: tuple[float, float, float] | None = None,
    weights: Literal["auto", "ema", "net"] = "auto",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> WorldModel:
    """A WorldModel of a Cosmos ``.pt`` and a Wan ``.pth``, or of diffusers folders; strict.

    dit, autoencoder: files, or folders as diffusers writes them (a pipeline's ``transformer`` and
    ``vae``). action_spec: what the checkpoint's actions mean; a published chunk is 12 actions
    (`world_config.published_actions`). reward: a head made for ``picture``; without one every
    reward is 0.5 until a head is trained. picture: height and width of the frames in pixels.
    new_actions: give a checkpoint without an action embedder a new one, which puts out zeros until
    it is trained (``per_frame``, so that it can stream). The rest: `load_cosmos`.
    Raises UserError naming the file and what does not fit.
    """
    network = _load_dit(Path(dit), action_spec, rope_ratio_hwt, weights, dtype)
    if network.config.action_dim == 0:
        if not new_actions:
            raise UserError(
                f"{dit}: has no action embedder, so it would ignore its actions; load an "
                "action-conditioned checkpoint, or pass new_actions=True to train an embedder"
            )
        network = _with_actions(network, action_spec.dim)
    vae = (from_diffusers_vae if Path(autoencoder).is_dir() else load_wan_vae)(autoencoder)
    for name, side in zip(("height", "width"), picture, strict=True):
        multiple = vae.spatial * network.config.patch
        if side < multiple or side % multiple:
            raise UserError(f"picture: {name} is {side}; expected a multiple of {multiple}")
    if reward is None:
        grid = (picture[0] // vae.spatial, picture[1] // vae.spatial)
        reward = RewardHead(RewardConfig(latent_channels=vae.latent_channels, grid=grid))
        last = reward.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    try:
        config = WorldModelConfig(network.config, reward.config, vae.config, action_spec)
    except UserError as error:
        raise UserError(f"{dit}: {error}") from error
    world = WorldModel(config, network, vae, reward).to(device=device, dtype=dtype)
    if world.device.type == "cuda":  # the order in which its kernels are fast
        vae.channels_last()
    return world.eval()


def _load_dit(
    path: Path,
    spec: ActionSpec,
    rope_ratio_hwt: tuple[float, float, float] | None,
    weights: Literal["auto", "ema", "net"],
    dtype: torch.dtype,
) -> DiT:
    if path.is_dir():
        return load_diffusers(path, dtype=dtype)
    return load_cosmos(
        path,
        weights=weights,
        dtype=dtype,
        action_dim=spec.dim,
        chunk_actions=spec.chunk,
        rope_ratio_hwt=rope_ratio_hwt,
    )


def _with_actions(network: DiT, action_dim: int) -> DiT:
    """The same network with an action embedder whose output is zero."""
    config = dataclasses.replace(network.config, action_dim=action_dim, action_layout="per_frame")
    with torch.device("meta"):
        grown = DiT(config)
    state = network.state_dict()
    like = next(iter(state.values()))
    for name, tensor in grown.state_dict().items():
        if name in state:
            continue
        state[name] = torch.zeros(tensor.shape, dtype=like.dtype, device=like.device)
        if name.endswith("fc1.weight"):
            nn.init.trunc_normal_(state[name], std=tensor.shape[1] ** -0.5)
    grown.load_state_dict(state, strict=True, assign=True)
    return grown.requires_grad_(True)
