"""Fit the arm: poses from commands, on recorded episodes (`worldloop.engine.arm`).

`worldloop train world-model` does it first, in about five minutes on one core. Pieces of episodes
are followed from their true first pose and compared along the whole piece, so that what adds up is
what is trained. Episodes that the linear sum gets wrong, which are those with contact, are drawn
more often.

Shape letters: N episodes, T actions, B pieces, P commands.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from worldloop.engine.arm import MOVES, Arm, ArmConfig
from worldloop.training.data import EpisodeArrays

WORTH = (1 / 0.005,) * 3 + (1 / 0.05,) * 3  # 5 mm weigh as much as 0.05 rad
BATCH = 64
PIECE = 32  # actions
LR = 3e-3


def fit_arm(data: EpisodeArrays, episodes: int, steps: int, seed: int = 0) -> Arm:
    """An arm fitted on the first ``episodes`` of a delta-pose dataset."""
    spec = data.action_spec
    assert spec.controller is not None
    actions, states = data.actions[:episodes], data.states[:episodes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        arm = Arm(ArmConfig())
        taps = np.zeros((arm.config.past, MOVES), np.float32)
        for columns, fitted in (
            (slice(0, 3), spec.controller.position_taps),
            (slice(3, 6), spec.controller.rotation_taps),
        ):
            kept = fitted[: arm.config.past]
            taps[: len(kept), columns] = np.array(kept, np.float32)[:, None]
        arm.linear.data.copy_(torch.from_numpy(taps))
        commands, poses = arm.windows(actions), torch.from_numpy(states[..., :MOVES].copy())
        arm.pose_mean.copy_(poses.mean((0, 1)))
        arm.pose_std.copy_(poses.std((0, 1)).clamp_min(0.02))
        wrong = np.abs(spec.to_absolute(actions, states[:, 0]) - states[:, 1:])[..., :3].max((1, 2))
        often = torch.from_numpy(1 + wrong / max(float(wrong.mean()), 1e-6))
        worth, piece = torch.tensor(WORTH), min(PIECE, actions.shape[1])
        optimizer = torch.optim.AdamW(arm.parameters(), lr=LR, weight_decay=1e-4)
        for step in range(steps):
            fall = 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 50) * fall
            rows = torch.multinomial(often, BATCH, replacement=True)
            first = torch.randint(actions.shape[1] - piece + 1, (BATCH,))
            at = first[:, None] + torch.arange(piece)
            # Half of the pieces start a little beside, where an earlier error may have led.
            beside = torch.randn(BATCH, MOVES) * 0.4 / worth * (torch.rand(BATCH, 1) < 0.5)
            made = arm(commands[rows[:, None], at], poses[rows, first] + beside)
            error = (made - poses[rows[:, None], at + 1]) * worth
            loss = F.smooth_l1_loss(error, torch.zeros_like(error))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(arm.parameters(), 1.0)
            optimizer.step()
    return arm.eval()


def position_error(poses_NTA: npt.NDArray[np.float32], states: npt.NDArray[np.float32]) -> float:
    """Metres: root mean square over episodes of the distance at their end."""
    last = poses_NTA[:, -1, :3] - states[:, poses_NTA.shape[1], :3]
    return float(np.sqrt(np.square(last).sum(-1).mean()))
