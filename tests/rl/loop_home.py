"""A loop in seconds: small random models, and a second small world in place of the simulator.

Run as a script it makes such a home in a folder: `python tests/rl/loop_home.py FOLDER`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import torch

from worldloop.engine.dit import DiTConfig
from worldloop.engine.light_vae import PRESETS as LIGHT_PRESETS
from worldloop.engine.policy.action_tokens import Statistics
from worldloop.engine.policy.llama import LlamaConfig
from worldloop.engine.policy.openvla_oft import OpenVLAOFT, tiny_config
from worldloop.engine.policy.vision import DINOV2_TINY, SIGLIP_TINY
from worldloop.engine.policy.vla import PolicyConfig, VLAPolicy
from worldloop.engine.reward import RewardConfig
from worldloop.engine.world_model import WorldModel, WorldModelConfig
from worldloop.episodes import DatasetMeta, EpisodeWriter
from worldloop.rl.alarm import AlarmConfig
from worldloop.rl.grpo import GRPOConfig
from worldloop.rl.learner import LearnerConfig
from worldloop.rl.round_config import FineTune, RoundConfig
from worldloop.rl.true_env import TrueEnv
from worldloop.types import ActionSpec, ControllerFit, Episode

SPEC = ActionSpec(chunk=8, controller=ControllerFit((0.01, 0.006), (0.02, 0.01), 0.0, 0.0))
HORIZON = 16
POOL = 9


def small_world(threshold: float = 0.9518, seed: int = 1) -> WorldModel:
    """Random weights, pictures of 32 pixels, chunks of 8."""
    torch.set_num_threads(1)
    autoencoder = LIGHT_PRESETS["test"]()
    channels = autoencoder.latent_channels
    dit = DiTConfig(
        width=48, depth=2, heads=2, adaln_rank=8, context_dim=0, latent_channels=channels,
        condition_channel=False, padding_channel=False, timestep_scale=1000.0, action_dim=7,
        action_layout="per_frame", learned_positions=(2, 2), prediction="sample",
    )  # fmt: skip
    reward = RewardConfig(channels, grid=(4, 4))
    world = WorldModel(
        WorldModelConfig(
            dit, reward, autoencoder, SPEC, reward_threshold=threshold, held_frames=1, window=6
        )
    ).eval()
    for part, (module, scale) in enumerate(
        ((world.dit, 1.0), (world.autoencoder, 0.6), (world.reward, 1.0))
    ):
        generator = torch.Generator().manual_seed(part + seed)
        with torch.no_grad():
            for p in module.parameters():
                fan_in = math.prod(p.shape[1:]) if p.ndim > 1 else p.shape[0]
                noise = torch.randn(p.shape, generator=generator) * scale / math.sqrt(fan_in)
                p.copy_(noise + (0 if p.ndim > 1 else 0.5))
    return world


def small_policy(seed: int = 0) -> VLAPolicy:
    """Random weights that fit `small_world`."""
    dino = dataclasses.replace(DINOV2_TINY, width=32, depth=2, heads=2, mlp_width=32, patch=16)
    siglip = dataclasses.replace(SIGLIP_TINY, width=32, depth=2, heads=2, patch=16)
    llama = LlamaConfig(width=32, depth=2, heads=2, mlp_width=64, vocab_rows=576)
    network = OpenVLAOFT(
        dataclasses.replace(tiny_config(7, 8), dino=dino, siglip=siglip, llama=llama)
    )
    network.init_weights(seed)
    statistics = Statistics((-1.0,) * 7, (1.0,) * 7, (True,) * 6 + (False,))
    return VLAPolicy(network.eval(), PolicyConfig(SPEC, "small"), statistics)


def write_pool(root: Path, env_id: str = "world", horizon: int = HORIZON) -> Path:
    """Nine recorded episodes of noise: where episodes begin, and SANS data to start with."""
    meta = DatasetMeta(SPEC, env_id, {"name": "world"}, horizon, 32)
    rng = np.random.default_rng(1)
    episodes = []
    for i in range(POOL):
        success = bool(i % 2)
        episodes.append(
            Episode(
                frames=rng.integers(0, 256, (horizon + 1, 32, 32, 3), np.uint8),
                actions=rng.uniform(-1, 1, (horizon, 7)).astype(np.float32),
                states=rng.normal(0, 0.2, (horizon + 1, 7)).astype(np.float32),
                reward=np.append(np.zeros(horizon - 1), success).astype(np.float32),
                instruction="do it", env_id=env_id, seed=i, success=success, info={"sim_seed": i},
            )
        )  # fmt: skip
    EpisodeWriter(root, meta).add(episodes)
    return root


def make_home(home: Path, true_threshold: float = 0.9518) -> RoundConfig:
    """World, truth, policy and pool in a folder; the config of a round of seconds."""
    if not (home / "pool").exists():
        small_world().save(home / "world")
        small_world(true_threshold).save(home / "truth")
        small_policy().save(home / "policy")
        write_pool(home / "pool")
    grpo = GRPOConfig(
        out=Path("grpo"), steps=3, groups=2, group_size=4, horizon=HORIZON, world_steps=1,
        accuracy_low=0.0, accuracy_high=1.0, rounds=2, evaluate_every=0, keep_every=1,
        temperature=1.6, learner=LearnerConfig(lr=1e-3, mini_batch=8, micro_batch=8),
        alarm=AlarmConfig(every=2, episodes=6, limit=0.9, videos=2),
    )  # fmt: skip
    return RoundConfig(
        true=TrueEnv(
            "world", horizon=HORIZON, image_size=32, held_frames=1, world=str(home / "truth"),
            starts=home / "pool",
        ),
        policy=str(home / "policy"), world=str(home / "world"), data=(home / "pool",),
        episodes=10, temperature=1.6, evaluations=12, grpo=grpo,
        fine_tune=FineTune(
            steps=6, batch=2, held_out=2, save_every=2, arm_steps=0, lr=1e-3, lr_vectors=1e-3
        ),
    )  # fmt: skip


if __name__ == "__main__":
    make_home(Path(sys.argv[1]))
