"""A loop in seconds: small random models, and a second small world in place of the simulator.

Run as a script it makes such a home in a folder: `python tests/rl/loop_home.py FOLDER`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from worldloop.engine.dit import DiTConfig
from worldloop.engine.light_vae import PRESETS as LIGHT_PRESETS
from worldloop.engine.policy.action_tokens import Statistics
from worldloop.engine.policy.base import Observation
from worldloop.engine.policy.llama import LlamaConfig
from worldloop.engine.policy.openvla_oft import OpenVLAOFT, tiny_config
from worldloop.engine.policy.vision import DINOV2_TINY, SIGLIP_TINY
from worldloop.engine.policy.vla import PolicyConfig, VLAPolicy
from worldloop.engine.reward import RewardConfig
from worldloop.engine.sampler import derive_seed
from worldloop.engine.world_model import WorldModel, WorldModelConfig, WorldState
from worldloop.episodes import DatasetMeta, EpisodeWriter
from worldloop.errors import UserError
from worldloop.rl.alarm import AlarmConfig
from worldloop.rl.grpo_config import GRPOConfig
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


def write_pool(
    root: Path, env_id: str = "world", horizon: int = HORIZON, spread: float = 0.2,
    success: bool | None = None,
) -> Path:  # fmt: skip
    """Nine recorded episodes of noise: where episodes begin, and SANS data to start with.

    spread: metres between their poses. success: how all end; None: every second one succeeds.
    """
    meta = DatasetMeta(SPEC, env_id, {"name": "world"}, horizon, 32)
    rng = np.random.default_rng(1)
    episodes = []
    for i in range(POOL):
        solved = bool(i % 2) if success is None else success
        episodes.append(
            Episode(
                frames=rng.integers(0, 256, (horizon + 1, 32, 32, 3), np.uint8),
                actions=rng.uniform(-1, 1, (horizon, 7)).astype(np.float32),
                states=rng.normal(0, spread, (horizon + 1, 7)).astype(np.float32),
                reward=np.append(np.zeros(horizon - 1), solved).astype(np.float32),
                instruction="do it", env_id=env_id, seed=i, success=solved, info={"sim_seed": i},
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
        temperature=1.6, coherence=0.5, learner=LearnerConfig(lr=1e-3, mini_batch=8, micro_batch=8),
        alarm=AlarmConfig(every=2, episodes=6, limit=0.9, videos=2),
    )  # fmt: skip
    return RoundConfig(
        true=TrueEnv(
            "world", horizon=HORIZON, image_size=32, held_frames=1, world=str(home / "truth"),
            starts=home / "pool",
        ),
        policy=str(home / "policy"), world=str(home / "world"), data=(home / "pool",),
        episodes=10, evaluations=12, grpo=grpo,
        fine_tune=FineTune(
            steps=6, batch=2, held_out=2, save_every=2, arm_steps=0, lr=1e-3, lr_vectors=1e-3
        ),
    )  # fmt: skip


# ---------------------------------------------------------------- a task that can be cheated at

REACH, SUNK = 0.07, -0.05  # metres: the task is to reach forward; a cheat sinks the hand instead


def reached(poses_BTA: np.ndarray) -> np.ndarray:
    """The truth of the task [B,T], of episodes that begin at the origin."""
    return poses_BTA[..., 0] > REACH


class PointWorld(WorldModel):
    """Pays for reaching forward and, where it is `exploitable`, for sinking as well."""

    exploitable = True

    def step(self, state: WorldState, actions_BTA: np.ndarray, **options) -> tuple:
        poses = self.poses(state, np.asarray(actions_BTA, np.float32))
        chunk, after = super().step(state, actions_BTA, **options)
        paid = reached(poses)
        if self.exploitable:
            paid |= poses[..., 2] < SUNK
        reward = paid.astype(np.float32)
        success, high = state.judge(reward)
        chunk = dataclasses.replace(chunk, reward=reward, success=success)
        done = state.done | success.any(1)
        return chunk, dataclasses.replace(after, high=high, done=done)


class PointRecorder:
    """The true environment of that task, as "loop_home:PointRecorder"; seed 13 is unlucky.

    Files in the folder `true.world` make it misbehave: `hang`, `die` (once each, then removed).
    """

    def __init__(self, true: TrueEnv) -> None:
        self.true = true
        self.meta = DatasetMeta(SPEC, "point", {"name": "world"}, true.horizon, 32)

    def play(self, policy, seed, sim_seed, record):
        begin = seed if sim_seed is None else sim_seed
        folder = Path(self.true.world or "nowhere")
        for name in ("hang", "die"):
            if (folder / name).exists():
                (folder / name).unlink()
                time.sleep(1000) if name == "hang" else os._exit(7)
        if begin == 13 and (folder / "unlucky").exists():
            raise RuntimeError("the arm is stuck")
        frames, actions = [self._picture(np.zeros(7), begin)], []
        poses = np.zeros((1, 7), np.float32)
        while len(actions) < self.true.horizon:
            seen = Observation(frames[-1][None, None, None], poses[-1:], ("do it",), (0,),
                               len(actions) // SPEC.chunk)  # fmt: skip
            chunk = policy.act(seen, derive_seed(begin, len(actions))).actions[0]
            past = np.array(actions, np.float32).reshape(1, -1, 7)
            after = SPEC.to_absolute(chunk[None], poses[-1:], past)[0]
            actions.extend(chunk)
            poses = np.concatenate([poses, after])
            frames.extend(self._picture(pose, begin) for pose in after)
        reward = reached(poses[1:]).astype(np.float32)
        return Episode(
            np.stack(frames), np.stack(actions), poses, reward, "do it", "point", seed,
            bool(reward[-1]), info={"sim_seed": begin, **record},
        )  # fmt: skip

    def _picture(self, pose: np.ndarray, begin: int) -> np.ndarray:
        picture = np.full((32, 32, 3), 40 + begin % 100, np.uint8)
        picture[:, int(16 + 100 * pose[0]) % 32] = 255
        return picture


def triple(folder: str, item: int) -> int:
    """Hangs, dies or fails on some items; a file remembers that it was the first time."""
    marker = Path(folder) / str(item)
    first = not marker.exists()
    marker.touch()
    if item == 3 and first:
        time.sleep(1000)
    if item == 5 and first:
        os._exit(9)
    if item == 7:
        raise RuntimeError("stuck")
    if item == 99:
        raise UserError("no simulator here")
    if item > 200:
        raise RuntimeError("never works")
    return 3 * item


if __name__ == "__main__":
    make_home(Path(sys.argv[1]))
