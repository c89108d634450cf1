"""Small random world models for the tests: every weight non-zero, both kinds of autoencoder."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from worldloop.engine.dit import DiTConfig
from worldloop.engine.light_vae import PRESETS as LIGHT_PRESETS
from worldloop.engine.reward import RewardConfig
from worldloop.engine.vae import PRESETS as WAN_PRESETS
from worldloop.engine.world_model import WorldModel, WorldModelConfig
from worldloop.types import ActionSpec, ControllerFit

SIDE = 32  # pixels; latents are 4x4, tokens 2x2
CONTROLLER = ControllerFit((0.01, 0.006, 0.002), (0.02, 0.01, 0.004), 0.0, 0.0)
SPEC = ActionSpec(
    chunk=8,
    controller=CONTROLLER,
    pose_mean=(0.1, -0.1, 0.2, 0.0, 0.1, 0.0, 0.0),
    pose_std=(0.2, 0.2, 0.2, 0.5, 0.5, 0.5, 1.0),
)


def config_of(kind: str = "light", **changes) -> WorldModelConfig:
    """Width 48, depth 2, two latent frames a chunk; kind: light or wan."""
    autoencoder = LIGHT_PRESETS["test"]() if kind == "light" else WAN_PRESETS["tiny"]
    channels = autoencoder.latent_channels
    dit = DiTConfig(
        width=48, depth=2, heads=2, adaln_rank=8, context_dim=0, latent_channels=channels,
        condition_channel=False, padding_channel=False, timestep_scale=1000.0, action_dim=7,
        action_layout="per_frame", learned_positions=(2, 2), prediction="sample",
    )  # fmt: skip
    reward = RewardConfig(channels, grid=(4, 4), token_width=16, token_out=8, hidden=16)
    # Noise is never still: a tolerance at which frames depend on the start frame all the same.
    values = {"sink": 1, "window": 6, "still_tolerance": 1.0, **changes}
    return WorldModelConfig(**{
        "dit": dit, "reward": reward, "autoencoder": autoencoder, "action_spec": SPEC, **values,
    })  # fmt: skip


def randomise(module: nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Fan-in scaled normal weights everywhere, also where a fresh network starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = math.prod(p.shape[1:]) if p.ndim > 1 else p.shape[0]
            noise = torch.randn(p.shape, generator=generator) * scale / math.sqrt(fan_in)
            p.copy_(noise + (0 if p.ndim > 1 else 0.5))


def world_of(kind: str = "light", **changes) -> WorldModel:
    world = WorldModel(config_of(kind, **changes)).eval()
    randomise(world.dit, 1)
    randomise(world.autoencoder, 2, 0.6 if kind == "light" else 0.9)  # few saturated pixels
    randomise(world.reward, 3, 1.0)
    return world


def frames_of(rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, 1])
    return rng.integers(0, 256, (rows, 1, 1, SIDE, SIDE, 3), np.uint8)


def poses_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, 2]).normal(0, 0.2, (rows, 7)).astype(np.float32)


def actions_of(rows: int, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, 3]).uniform(-1, 1, (rows, count, 7)).astype(np.float32)


class Latents:
    """Collects the latents of every chunk that a world model generates."""

    def __init__(self, world: WorldModel) -> None:
        self.chunks: list[Tensor] = []
        world.reward.register_forward_pre_hook(lambda _, args: self.chunks.append(args[0].clone()))


def relative(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance."""
    return float((a - b).norm() / b.norm())


def generate(world, frames, poses, actions, seeds, **options):
    """(chunks, latents) of a rollout through start and step."""
    latents = Latents(world)
    state = world.start(frames, poses, seeds)
    out = []
    T = world.action_spec.chunk
    for k in range(actions.shape[1] // T):
        chunk, state = world.step(state, actions[:, k * T : (k + 1) * T], **options)
        out.append(chunk)
    return out, latents.chunks, state


def assert_same_chunk(a, b, levels: int = 0, reward: float = 1e-5) -> None:
    np.testing.assert_allclose(a.reward, b.reward, rtol=0, atol=reward)
    if a.frames is None:
        assert b.frames is None
    else:
        difference = np.abs(a.frames.astype(int) - b.frames.astype(int))
        assert difference.max() <= levels


def with_spec(config: WorldModelConfig, **changes) -> WorldModelConfig:
    spec = dataclasses.replace(config.action_spec, **changes)
    return dataclasses.replace(config, action_spec=spec)


@pytest.fixture
def small() -> SimpleNamespace:
    """The functions above; test modules cannot import each other."""
    torch.set_num_threads(1)
    names = (config_of, randomise, world_of, frames_of, poses_of, actions_of, Latents, relative,
             with_spec, generate, assert_same_chunk)  # fmt: skip
    return SimpleNamespace(SPEC=SPEC, SIDE=SIDE, **{f.__name__: f for f in names})
