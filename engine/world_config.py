"""The world model's configuration and its presets.

Shape letters: A action dim, T actions of a chunk, F latent frames.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from worldloop.config import config_to_dict, read_json
from worldloop.engine import dit_config
from worldloop.engine.arm import ArmConfig
from worldloop.engine.dit_config import DiTConfig
from worldloop.engine.light_vae import LightVAEConfig
from worldloop.engine.reward import RewardConfig
from worldloop.engine.vae import PRESETS as VAE_PRESETS
from worldloop.engine.vae import WanVAEConfig
from worldloop.errors import UserError
from worldloop.files import atomic_write_text
from worldloop.types import ActionSpec


@dataclass(frozen=True)
class Calibration:
    """How a task's rewards tell its outcome, fitted on imagined held-out episodes.

    A success is a reward above ``threshold`` for ``held_frames`` frames on end.
    """

    threshold: float
    held_frames: int
    episodes: int
    """Episodes that it was fitted on."""
    accuracy: float
    """Share of their outcomes that it tells, each by a fit on the other half of them."""
    curve: tuple[tuple[float, float, float], ...] = ()
    """(threshold, precision, recall), thresholds rising, at ``held_frames``."""


@dataclass(frozen=True)
class TaskRecord:
    """A task that the world model was trained on."""

    env_id: str
    instruction: str = ""
    calibration: Calibration | None = None


@dataclass(frozen=True)
class WorldModelConfig:
    """Everything beside the weights; what an action means is part of it.

    Raises UserError naming the fields where the parts do not fit each other.
    """

    dit: DiTConfig
    reward: RewardConfig
    autoencoder: LightVAEConfig | WanVAEConfig
    action_spec: ActionSpec
    env_ids: tuple[str, ...] = ()
    tasks: tuple[TaskRecord, ...] = ()
    reward_threshold: float = 0.9
    held_frames: int = 2
    """Consecutive frames above the threshold that make a success."""
    sink: int = 1
    window: int = 12
    """Latent frames of history kept beside the sink."""
    trained_steps: int = 0
    arm: ArmConfig | None = None
    """How commands become poses; None: the linear fit of the action spec."""
    still_tolerance: float = 0.2
    """Change of a decoded pixel, on the scale [-1,1], up to which it is shown as the start frame
    has it (`engine.still`); 0: all pixels are the decoder's."""

    def __post_init__(self) -> None:
        for name, least in (("held_frames", 1), ("sink", 0), ("window", 1), ("trained_steps", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; must be at least {least}")
        if not 0 <= self.reward_threshold <= 1:
            raise UserError(f"reward_threshold is {self.reward_threshold}; expected 0 .. 1")
        if not 0 <= self.still_tolerance <= 2:
            raise UserError(f"still_tolerance is {self.still_tolerance}; expected 0 .. 2")
        spec, dit, reward, autoencoder = self.action_spec, self.dit, self.reward, self.autoencoder
        must_equal: list[tuple[str, object, str, object]] = [
            ("dit.action_dim", dit.action_dim, "action_spec.dim", spec.dim),
            ("dit.latent_channels", dit.latent_channels,
             "autoencoder.latent_channels", autoencoder.latent_channels),
            ("reward.latent_channels", reward.latent_channels,
             "autoencoder.latent_channels", autoencoder.latent_channels),
            ("dit.actions_per_frame", dit.actions_per_frame,
             "the autoencoder's frames per latent frame", self.temporal),
            ("reward.frames_per_latent", reward.frames_per_latent,
             "the autoencoder's frames per latent frame", self.temporal),
        ]  # fmt: skip
        if dit.action_layout == "chunk":
            must_equal.append(("action_spec.chunk", spec.chunk,
                               "dit.chunk_actions", dit.chunk_actions))  # fmt: skip
        if dit.learned_positions is not None:
            tokens = (reward.grid[0] // dit.patch, reward.grid[1] // dit.patch)
            must_equal.append(("dit.learned_positions", tuple(dit.learned_positions),
                               "reward.grid over dit.patch", tokens))  # fmt: skip
        if isinstance(autoencoder, LightVAEConfig) and autoencoder.picture is not None:
            must_equal.append(("autoencoder.picture", tuple(autoencoder.picture),
                               "reward.grid in pixels", self.picture))  # fmt: skip
        for name in ("pose_head", "object_head"):
            head = None if self.arm is None else getattr(self.arm, name)
            if head is not None:
                must_equal += [
                    (f"arm.{name}.grid", tuple(head.grid), "reward.grid", tuple(reward.grid)),
                    (f"arm.{name}.latent_channels", head.latent_channels,
                     "reward.latent_channels", reward.latent_channels),
                ]  # fmt: skip
        for name, value, other, expected in must_equal:
            if value != expected:
                raise UserError(f"{name} is {value}; {other} is {expected}: they must agree")
        if self.arm is not None and spec.kind != "delta_pose":
            raise UserError(f"arm is given, but action_spec.kind is {spec.kind!r}; pass None")
        if spec.chunk % dit.actions_per_frame:
            raise UserError(
                f"action_spec.chunk is {spec.chunk}; must be a multiple of {dit.actions_per_frame}"
            )
        if self.window < self.block:
            raise UserError(f"window is {self.window} latent frames; a chunk has {self.block}")

    def success_rule(self, instruction: str = "") -> tuple[float, int]:
        """(threshold, frames held) of the task with this instruction: its own where one has been
        fitted, otherwise the model's.
        """
        for task in self.tasks:
            if task.instruction == instruction and task.calibration is not None:
                return task.calibration.threshold, task.calibration.held_frames
        return self.reward_threshold, self.held_frames

    def with_rule(self, env_id: str, instruction: str, rule: Calibration) -> WorldModelConfig:
        """With a success rule of a task's own, in place of one that it may have."""
        known = {task.env_id: task for task in self.tasks}
        task = known.get(env_id, TaskRecord(env_id, instruction))
        known[env_id] = dataclasses.replace(task, calibration=rule)
        return dataclasses.replace(self, tasks=tuple(known.values()))

    @property
    def block(self) -> int:
        """Latent frames of a chunk."""
        return self.action_spec.chunk // self.dit.actions_per_frame

    @property
    def temporal(self) -> int:
        """Frames of a latent frame."""
        if isinstance(self.autoencoder, LightVAEConfig):
            return 4
        return int(2 ** sum(self.autoencoder.temporal_downsample))

    @property
    def picture(self) -> tuple[int, int]:
        """Height and width of the frames, in pixels."""
        light = isinstance(self.autoencoder, LightVAEConfig)
        levels = 3 if light else len(self.autoencoder.temporal_downsample)  # type: ignore[union-attr]
        return self.reward.grid[0] * 2**levels, self.reward.grid[1] * 2**levels


def published_actions() -> ActionSpec:
    """What NVIDIA's action-conditioned checkpoints take: 12 poses at 4 Hz.

    Increments of position (metres) and of roll, pitch, yaw (radians) in the gripper's own frame,
    times 20, and the gripper as it is. ``absolute_pose`` hands them to the embedder as they come.
    """
    return ActionSpec(
        kind="absolute_pose",
        control_hz=4.0,
        chunk=12,
        pose_std=(0.05,) * 6 + (1.0,),
    )


def tiny() -> WorldModelConfig:
    """For CPUs: the light autoencoder at 128x128 and a small transformer. Ships trained."""
    return WorldModelConfig(dit_config.tiny(), RewardConfig(), LightVAEConfig(), ActionSpec())


def cosmos_2b() -> WorldModelConfig:
    """Cosmos-Predict2-2B-Sample-Action-Conditioned at 480x640, with the Wan2.1 autoencoder.

    Its embedder takes one whole chunk, so it is sampled with steps="reference". For streaming,
    replace ``dit`` by one with ``action_layout="per_frame"`` (and train it).
    """
    return WorldModelConfig(
        dit_config.cosmos_2b(), RewardConfig(grid=(60, 80)), VAE_PRESETS["wan2.1"],
        published_actions(),
    )  # fmt: skip


def cosmos_14b() -> WorldModelConfig:
    """Cosmos-Predict2-14B with the action embedder of the 2B (NVIDIA published none for it)."""
    dit = dataclasses.replace(dit_config.cosmos_14b(), action_dim=7)
    reward = RewardConfig(grid=(60, 80))
    return WorldModelConfig(dit, reward, VAE_PRESETS["wan2.1"], published_actions())


PRESETS: dict[str, Callable[[], WorldModelConfig]] = {
    "tiny": tiny,
    "2b": cosmos_2b,
    "14b": cosmos_14b,
}


def preset(name: str) -> WorldModelConfig:
    """The configuration of that name; raises UserError listing the known ones."""
    if name not in PRESETS:
        raise UserError(f"preset is {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]()


def write_world_config(folder: Path, config: WorldModelConfig) -> Path:
    """Give a checkpoint another configuration; its weights stay as they are."""
    path = folder / "config.json"
    document = read_json(path) | {"config": config_to_dict(config)}
    atomic_write_text(path, json.dumps(document, indent=2) + "\n")
    return path
