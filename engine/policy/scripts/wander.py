"""A hand that goes nowhere in particular: paths that no task and no policy would take."""

from __future__ import annotations

import numpy as np

from worldloop.engine.policy.base import Observation, PolicyAction
from worldloop.engine.sampler import derive_seed
from worldloop.types import ActionSpec

REACH = 0.038  # metres that a full command moves the hand in the end (ManiSkill's controller)
# Metres in which a wandering hand stays, above what stands for the table.
BOX = ((-0.12, 0.10), (-0.12, 0.12), (0.03, 0.15))
TABLE = 0.9  # height of LIBERO's scenes with one (rl/envs/tasks.py), below the hand; else it is 0


class Wander:
    """Goes to one random place after another, a chunk each; the gripper stays as it is."""

    reads_frames = False

    def __init__(self, gripper: float, spec: ActionSpec | None = None) -> None:
        self.gripper, self.action_spec = gripper, spec or ActionSpec()

    def act(self, observation: Observation, seed: int) -> PolicyAction:
        spec, low, high = self.action_spec, *np.array(BOX).T
        rows = []
        for pose, episode in zip(observation.poses, observation.episodes, strict=True):
            goal = np.random.default_rng(derive_seed(seed, episode)).uniform(low, high)
            goal[2] += TABLE if pose[2] > TABLE else 0.0
            actions = np.zeros((spec.chunk, spec.dim), np.float32)
            # Three quarters of the time on the way, the rest to arrive.
            n = max(1, 3 * spec.chunk // 4)
            actions[:n, :3] = (goal - pose[:3]) / REACH / n
            actions[:, 6:] = self.gripper
            rows.append(np.clip(actions, -1, 1))
        return PolicyAction(np.stack(rows))
