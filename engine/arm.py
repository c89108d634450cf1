"""Where the commands take the hand: the pose after each action, from commands alone.

A world model is told absolute poses (paper section 3.2), a policy emits increments. Adding those
up linearly (`ControllerFit`) is right in free space only: a hand pressed on the table does not
sink, drags at half its speed and leans over, so that the sum is off by centimetres exactly where a
policy meets its object. `Arm` adds a small network's correction to the linear sum, step by step,
from the last commands and the pose so far.

What the hand meets on its way (a cube under it) no command tells, but the picture does: `PoseHead`
reads the hand's pose from the latents of a chunk's last frame and mends the pose that the next
chunk starts from. Both are fitted on recorded episodes (`worldloop.training.arm`) and part of the
world model's checkpoint.

Shape letters: B rows (episodes), T actions, P commands that are still carried out, C channels,
H W latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloop.config import positive

Float = npt.NDArray[np.float32]
MOVES = 6  # x y z, rotation vector; the gripper is where it is told to be


@dataclass(frozen=True)
class PoseHeadConfig:
    """Sizes of the network that reads the pose. ``grid``: latent height and width."""

    latent_channels: int = 16
    grid: tuple[int, int] = (16, 16)
    width: int = 96
    hidden: int = 256


class PoseHead(nn.Module):
    """Latents of the present frame and the pose that commands lead to: the pose that is seen.

    It reads a pose, and how far to trust it in place of the one from commands (not at all where
    the hand is out of the picture), each component by itself.
    """

    def __init__(self, config: PoseHeadConfig) -> None:
        super().__init__()
        self.config, width, hidden = config, config.width, config.hidden
        cells = -(-config.grid[0] // 4) * -(-config.grid[1] // 4)
        self.picture = nn.Sequential(
            nn.Conv2d(config.latent_channels, 64, 3, padding=1), nn.SiLU(),
            nn.Conv2d(64, width, 3, 2, 1), nn.SiLU(),
            nn.Conv2d(width, width, 3, 2, 1), nn.SiLU(),
            nn.Flatten(), nn.Linear(width * cells, hidden), nn.SiLU(),
        )  # fmt: skip
        self.told = nn.Sequential(nn.Linear(MOVES, hidden // 2), nn.SiLU())
        self.both = nn.Sequential(nn.Linear(hidden + hidden // 2, hidden), nn.SiLU())
        self.read, self.trust = nn.Linear(hidden, MOVES), nn.Linear(hidden, MOVES)
        for head, bias in ((self.read, 0.0), (self.trust, -2.0)):
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, bias)

    def forward(self, latent_BCHW: Tensor, placed_B6: Tensor) -> tuple[Tensor, Tensor]:
        """The mended pose and the pose as read, [B,6] each, in the units of ``placed``."""
        x = self.both(torch.cat([self.picture(latent_BCHW), self.told(placed_B6)], 1))
        read = self.read(x)
        return placed_B6 + torch.sigmoid(self.trust(x)) * (read - placed_B6), read


@dataclass(frozen=True)
class ArmConfig:
    """Sizes of the correcting network."""

    past: int = 4
    """Commands read: the present one and those before it."""
    width: int = 256
    pose_head: PoseHeadConfig | None = None

    def __post_init__(self) -> None:
        positive(self, "past", "width", where="arm.")


class Arm(nn.Module):
    """pose[t+1] = pose[t] + linear(commands) + network(commands, pose[t])."""

    NEAR = 0.03  # metres above z = 0, the table: where touching it matters
    STEP = (0.003,) * 3 + (0.02,) * 3  # metres and radians: size of a correction

    pose_mean: Tensor
    pose_std: Tensor

    def __init__(self, config: ArmConfig) -> None:
        super().__init__()
        self.config = config
        inputs = config.past * MOVES + MOVES + 1
        self.linear = nn.Parameter(torch.zeros(config.past, MOVES))
        self.fc1 = nn.Linear(inputs, config.width)
        self.fc2 = nn.Linear(config.width, config.width)
        self.fc3 = nn.Linear(config.width, MOVES)
        nn.init.zeros_(self.fc3.weight)
        nn.init.zeros_(self.fc3.bias)
        self.register_buffer("pose_mean", torch.zeros(MOVES))
        self.register_buffer("pose_std", torch.ones(MOVES))
        self.pose_head = None if config.pose_head is None else PoseHead(config.pose_head)

    def _apply(self, fn: Any, recurse: bool = True) -> Arm:
        """Stays in fp32 on the host: poses are numpy, and steps of 30 us follow each other."""
        return self

    def forward(self, commands_BTP6: Tensor, start_B6: Tensor) -> Tensor:
        """Poses [B,T,6] after each command; differentiable. ``commands`` as `windows` makes it."""
        scale = start_B6.new_tensor(self.STEP)
        linear = (commands_BTP6 * self.linear).sum(2)
        pose, poses = start_B6, []
        for t in range(commands_BTP6.shape[1]):
            height = pose[:, 2:3].clamp_max(self.NEAR) / (self.NEAR / 3)
            placed = (pose - self.pose_mean) / self.pose_std
            x = torch.cat([commands_BTP6[:, t].flatten(1), placed, height], 1)
            x = self.fc3(F.silu(self.fc2(F.silu(self.fc1(x)))))
            pose = pose + linear[:, t] + x * scale
            poses.append(pose)
        return torch.stack(poses, 1)

    def windows(self, actions_BTA: Float, past_BTA: Float | None = None) -> Tensor:
        """Each command with those before it, the latest first: [B,T,P,6]; zeros before a start."""
        B, T, _ = actions_BTA.shape
        before = self.config.past - 1
        padded = np.zeros((B, before + T, MOVES), np.float32)
        padded[:, before:] = actions_BTA[..., :MOVES]
        if past_BTA is not None and before:
            kept = past_BTA[:, -before:, :MOVES]
            padded[:, before - kept.shape[1] : before] = kept
        stacked = [padded[:, before - k : before - k + T] for k in range(before + 1)]
        return torch.from_numpy(np.stack(stacked, 2))

    @torch.no_grad()
    def poses(self, actions_BTA: Float, start_BA: Float, past_BTA: Float | None = None) -> Float:
        """Absolute poses [B,T,7] after each action (`ActionSpec.to_absolute`, corrected).

        start_BA: the pose before the first action. past_BTA: the actions before it.
        """
        with torch.autocast("cpu", enabled=False):
            start = torch.from_numpy(np.ascontiguousarray(start_BA[:, :MOVES], np.float32))
            moved = self(self.windows(actions_BTA, past_BTA), start)
        return np.concatenate([moved.numpy(), actions_BTA[..., MOVES:]], 2)

    def seen(self, latent_BCHW: Tensor, pose_B6: Tensor) -> tuple[Tensor, Tensor]:
        """The mended pose and the pose as read, [B,6] in metres and radians; differentiable."""
        assert self.pose_head is not None
        mended, read = self.pose_head(latent_BCHW, (pose_B6 - self.pose_mean) / self.pose_std)
        return self.pose_mean + mended * self.pose_std, self.pose_mean + read * self.pose_std

    @torch.no_grad()
    def look(self, latent_BCHW: Tensor, pose_BA: Float) -> Float:
        """The pose [B,7] mended by the latents of its frame; without a pose head, as it is."""
        if self.pose_head is None:
            return pose_BA
        with torch.autocast("cpu", enabled=False):
            told = torch.from_numpy(np.ascontiguousarray(pose_BA[:, :MOVES], np.float32))
            mended, _ = self.seen(latent_BCHW.float().cpu(), told)
        return np.concatenate([mended.numpy(), pose_BA[:, MOVES:]], 1)
