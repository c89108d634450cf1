"""What several tests of rl look at: simulated episodes, a stand-in simulator, a small world."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from worldloop.engine.dit import DiTConfig
from worldloop.engine.light_vae import PRESETS as LIGHT_PRESETS
from worldloop.engine.policy.action_tokens import Statistics
from worldloop.engine.policy.base import Observation, PolicyAction
from worldloop.engine.policy.llama import LlamaConfig
from worldloop.engine.policy.openvla_oft import OpenVLAOFT, tiny_config
from worldloop.engine.policy.vision import DINOV2_TINY, SIGLIP_TINY
from worldloop.engine.policy.vla import PolicyConfig, VLAPolicy
from worldloop.engine.reward import RewardConfig
from worldloop.engine.sampler import derive_seed
from worldloop.engine.world_model import WorldModel, WorldModelConfig
from worldloop.episodes import EpisodeDataset
from worldloop.rl.collect import CollectConfig, Collector
from worldloop.rl.envs.simulators import Simulator
from worldloop.rl.envs.tasks import task_preset
from worldloop.types import ActionSpec, ControllerFit, Starts


@dataclass
class Simulated:
    """A small real dataset and the simulator that it was collected with."""

    dataset: EpisodeDataset
    env: Simulator


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Simulated]]:
    """Real episodes of a task by its name: seed 1 wants a success, seed 2 a failure."""
    made: dict[str, Simulated] = {}

    def make(env_id: str) -> Simulated:
        if env_id not in made:
            out = tmp_path_factory.mktemp("sim") / env_id
            collector = Collector(CollectConfig(env_id, out, episodes=2, seed=1))
            collector.run()
            made[env_id] = Simulated(EpisodeDataset(out), collector.env)
        return made[env_id]

    yield make
    for each in made.values():
        each.env.close()


class PointSim:
    """A task without physics: the tool goes where it is told; beyond a line it has succeeded.

    The line of a seed lies 0.2 .. 1.2 m ahead in x; the picture shows the tool's column.
    """

    made: list[PointSim] = []

    def __init__(self, env_id: str, image_size: int = 32) -> None:
        type(self).made.append(self)
        self.task, self.image_size = task_preset(env_id), image_size
        self.steps = self.renders = 0
        self.closed = False

    def reset(self, seed: int) -> None:
        self.line = np.random.default_rng(seed).uniform(0.2, 1.2)
        self.tool = np.zeros(7, np.float32)

    def step(self, action: npt.NDArray[np.float32]) -> bool:
        self.steps += 1
        self.tool = self.tool + np.float32(0.04) * action
        return bool(self.tool[0] > self.line)

    def state(self) -> npt.NDArray[np.float32]:
        return self.tool.copy()

    def objects(self) -> npt.NDArray[np.float32]:
        return np.array([[self.line / 10 - 0.12, 0, 0.02, 1, 0, 0, 0]], np.float32)

    def render(self) -> npt.NDArray[np.uint8]:
        self.renders += 1
        picture = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        picture[:, int(self.tool[0] * 10) % self.image_size] = 255
        return picture

    def close(self) -> None:
        self.closed = True


class DrawingPolicy:
    """Draws its actions from the seed of the row, and leans on what it sees: any mix-up shows."""

    reads_frames = True

    def __init__(self, spec: ActionSpec, forward: float = 0.0) -> None:
        self.action_spec, self.forward = spec, forward
        self.asked: list[tuple[int, tuple[int, ...]]] = []  # (chunk, episodes) of every call

    def act(self, observation: Observation, seed: int) -> PolicyAction:
        assert observation.frames.shape[:3] == (len(observation.episodes), 1, 1)
        self.asked.append((observation.chunk, observation.episodes))
        spec, drawn = self.action_spec, []
        for row, episode in enumerate(observation.episodes):
            rng = np.random.default_rng(derive_seed(seed, episode))
            actions = rng.uniform(-0.5, 0.5, (spec.chunk, spec.dim))
            seen = observation.frames[row].mean() / 1000 + observation.poses[row, 1] / 10
            drawn.append(actions + seen + [self.forward, 0, 0, 0, 0, 0, 0])
        return PolicyAction(np.clip(np.stack(drawn), -1, 1).astype(np.float32))


@pytest.fixture
def point_sim() -> type[PointSim]:
    PointSim.made = []
    return PointSim


@pytest.fixture
def drawing_policy() -> type[DrawingPolicy]:
    return DrawingPolicy


SPEC = ActionSpec(chunk=8, controller=ControllerFit((0.01, 0.006), (0.02, 0.01), 0.0, 0.0))


@pytest.fixture(scope="session")
def small_world() -> WorldModel:
    """Random weights, pictures of 32 pixels, chunks of 8; about half its episodes succeed."""
    torch.set_num_threads(1)
    autoencoder = LIGHT_PRESETS["test"]()
    channels = autoencoder.latent_channels
    dit = DiTConfig(
        width=48, depth=2, heads=2, adaln_rank=8, context_dim=0, latent_channels=channels,
        condition_channel=False, padding_channel=False, timestep_scale=1000.0, action_dim=7,
        action_layout="per_frame", learned_positions=(2, 2), prediction="sample",
    )  # fmt: skip
    reward = RewardConfig(channels, grid=(4, 4), token_width=16, token_out=8, hidden=16)
    config = WorldModelConfig(
        dit, reward, autoencoder, SPEC, reward_threshold=0.8445, held_frames=1, window=6
    )
    world = WorldModel(config).eval()
    for part, (module, scale) in enumerate(
        ((world.dit, 1.0), (world.autoencoder, 0.6), (world.reward, 1.0))
    ):
        generator = torch.Generator().manual_seed(part + 1)
        with torch.no_grad():
            for p in module.parameters():
                fan_in = math.prod(p.shape[1:]) if p.ndim > 1 else p.shape[0]
                noise = torch.randn(p.shape, generator=generator) * scale / math.sqrt(fan_in)
                p.copy_(noise + (0 if p.ndim > 1 else 0.5))
    return world


@pytest.fixture(scope="session")
def pool() -> Starts:
    """Nine starts for the small world."""
    rng = np.random.default_rng(1)
    return Starts(
        rng.integers(0, 256, (9, 1, 1, 32, 32, 3), np.uint8),
        rng.normal(0, 0.2, (9, 7)).astype(np.float32),
        tuple(f"do number {i}" for i in range(9)),
    )


@pytest.fixture
def small_policy(small_world: WorldModel) -> Callable[..., VLAPolicy]:
    """Makes policies with the same random weights for the small world."""

    def make(seed: int = 0, chunk: int = SPEC.chunk, **options: float) -> VLAPolicy:
        torch.set_num_threads(1)
        dino = dataclasses.replace(DINOV2_TINY, width=32, depth=2, heads=2, mlp_width=32, patch=16)
        siglip = dataclasses.replace(SIGLIP_TINY, width=32, depth=2, heads=2, patch=16)
        llama = LlamaConfig(width=32, depth=2, heads=2, mlp_width=64, vocab_rows=576)
        network = OpenVLAOFT(
            dataclasses.replace(tiny_config(7, chunk), dino=dino, siglip=siglip, llama=llama)
        )
        network.init_weights(seed)
        spec = dataclasses.replace(small_world.action_spec, chunk=chunk)
        statistics = Statistics((-1.0,) * 7, (1.0,) * 7, (True,) * 6 + (False,))
        return VLAPolicy(network.eval(), PolicyConfig(spec, "small"), statistics, **options)

    return make
