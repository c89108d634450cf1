"""Where the commands take the hand: the pose after each action, from commands alone.

A world model is told absolute poses (paper section 3.2), a policy emits increments. Adding those
up linearly (`ControllerFit`) is right in free space only: a hand pressed on the table does not
sink, drags at half its speed and leans over, so that the sum is off by centimetres exactly where a
policy meets its object. `Arm` adds a small network's correction to the linear sum, step by step,
from the last commands and the pose so far.

What the hand meets on its way (a cube under it) no command tells, but the picture does.
`ObjectHead` reads from the latents of the frame that a chunk starts from where the object is, and
the correcting network sees the hand beside it: a hand that comes down on a cube stops there.
`PoseHead` reads the hand's pose from a chunk's last frame and mends the pose that the next chunk
starts from. All are fitted on recorded episodes (`worldloop.training.arm`) and part of the world
model's checkpoint.

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
from worldloop.errors import UserError

Float = npt.NDArray[np.float32]
MOVES = 6  # x y z, rotation vector; the gripper is where it is told to be


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of a network that reads latents. ``grid``: latent height and width."""

    latent_channels: int = 16
    grid: tuple[int, int] = (16, 16)
    width: int = 96
    hidden: int = 256


def _picture(config: HeadConfig) -> nn.Sequential:
    """Latents [B,C,H,W] to features [B,hidden]."""
    width = config.width
    cells = -(-config.grid[0] // 4) * -(-config.grid[1] // 4)
    return nn.Sequential(
        nn.Conv2d(config.latent_channels, 64, 3, padding=1), nn.SiLU(),
        nn.Conv2d(64, width, 3, 2, 1), nn.SiLU(),
        nn.Conv2d(width, width, 3, 2, 1), nn.SiLU(),
        nn.Flatten(), nn.Linear(width * cells, config.hidden), nn.SiLU(),
    )  # fmt: skip


class ObjectHead(nn.Module):
    """Latents of a frame [B,C,H,W] to the position [B,3] of its first object, in metres."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.picture, self.read = _picture(config), nn.Linear(config.hidden, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))

    def forward(self, latent_BCHW: Tensor) -> Tensor:
        position: Tensor = self.mean + self.read(self.picture(latent_BCHW)) * self.std
        return position


class PoseHead(nn.Module):
    """Latents of the present frame and the pose that commands lead to: the pose that is seen.

    It reads a pose, and how far to trust it in place of the one from commands (not at all where
    the hand is out of the picture), each component by itself.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config, hidden = config, config.hidden
        self.picture = _picture(config)
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
    pose_head: HeadConfig | None = None
    object_head: HeadConfig | None = None

    def __post_init__(self) -> None:
        positive(self, "past", "width", where="arm.")


class Arm(nn.Module):
    """pose[t+1] = pose[t] + linear(commands) + network(commands, pose[t], hand beside object)."""

    NEAR = 0.03  # metres above z = 0, the table: where touching it matters
    STEP = (0.003,) * 3 + (0.02,) * 3  # metres and radians: size of a correction
    BESIDE = 0.02, 4.0  # metres from the object that count as one, and the most that count

    pose_mean: Tensor
    pose_std: Tensor

    def __init__(self, config: ArmConfig) -> None:
        super().__init__()
        self.config = config
        inputs = config.past * MOVES + MOVES + 1 + (0 if config.object_head is None else 3)
        self.linear = nn.Parameter(torch.zeros(config.past, MOVES))
        self.fc1 = nn.Linear(inputs, config.width)
        self.fc2 = nn.Linear(config.width, config.width)
        self.fc3 = nn.Linear(config.width, MOVES)
        nn.init.zeros_(self.fc3.weight)
        nn.init.zeros_(self.fc3.bias)
        self.register_buffer("pose_mean", torch.zeros(MOVES))
        self.register_buffer("pose_std", torch.ones(MOVES))
        self.pose_head = None if config.pose_head is None else PoseHead(config.pose_head)
        self.object_head = None if config.object_head is None else ObjectHead(config.object_head)

    def _apply(self, fn: Any, recurse: bool = True) -> Arm:
        """Stays in fp32 on the host: poses are numpy, and steps of 30 us follow each other."""
        return self

    def forward(
        self, commands_BTP6: Tensor, start_B6: Tensor, object_B3: Tensor | None = None
    ) -> Tensor:
        """Poses [B,T,6] after each command; differentiable. ``commands`` as `windows` makes it.

        object_B3: where the object is at the start, in metres; with an object head only.
        """
        scale = start_B6.new_tensor(self.STEP)
        linear = (commands_BTP6 * self.linear).sum(2)
        pose, poses = start_B6, []
        for t in range(commands_BTP6.shape[1]):
            height = pose[:, 2:3].clamp_max(self.NEAR) / (self.NEAR / 3)
            placed = (pose - self.pose_mean) / self.pose_std
            told = [commands_BTP6[:, t].flatten(1), placed, height]
            if object_B3 is not None:
                unit, most = self.BESIDE
                told.append(((pose[:, :3] - object_B3) / unit).clamp(-most, most))
            x = torch.cat(told, 1)
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
    def poses(
        self,
        actions_BTA: Float,
        start_BA: Float,
        past_BTA: Float | None = None,
        latent_BCHW: Tensor | None = None,
    ) -> Float:
        """Absolute poses [B,T,7] after each action (`ActionSpec.to_absolute`, corrected).

        start_BA: the pose before the first action. past_BTA: the actions before it. latent_BCHW:
        of the frame at the start; needed by an object head. Raises UserError where it is missing.
        """
        if self.object_head is not None and latent_BCHW is None:
            raise UserError("this arm sees the object: give the latents of the frame at the start")
        with torch.autocast("cpu", enabled=False):
            start = torch.from_numpy(np.ascontiguousarray(start_BA[:, :MOVES], np.float32))
            seen = None
            if self.object_head is not None and latent_BCHW is not None:
                seen = self.object_head(latent_BCHW.float().cpu())
            moved = self(self.windows(actions_BTA, past_BTA), start, seen)
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
