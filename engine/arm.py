"""Where the commands take the hand: the pose after each action, from commands alone.

A world model is told absolute poses (paper section 3.2), a policy emits increments. Adding those
up linearly (`ControllerFit`) is right in free space only: a hand pressed on the table does not
sink, drags at half its speed and leans over, so that the sum is off by centimetres exactly where a
policy meets its object. `Arm` adds a small network's correction to the linear sum, step by step,
from the last commands and the pose so far. It is fitted on recorded episodes
(`worldloop.training.arm`) and part of the world model's checkpoint.

Shape letters: B rows (episodes), T actions, P commands that are still carried out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloop.errors import UserError

Float = npt.NDArray[np.float32]
MOVES = 6  # x y z, rotation vector; the gripper is where it is told to be


@dataclass(frozen=True)
class ArmConfig:
    """Sizes of the correcting network."""

    past: int = 4
    """Commands read: the present one and those before it."""
    width: int = 256

    def __post_init__(self) -> None:
        for name in ("past", "width"):
            if getattr(self, name) < 1:
                raise UserError(f"arm.{name} is {getattr(self, name)}; must be at least 1")


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
