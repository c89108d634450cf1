"""What scripts are made of: waypoints, the hand that follows them, perturbations of a belief."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """What a script may count on of a simulator's arm and its delta controller."""

    # Error that a command of 1 is the answer to, and what it moves once all has come to rest.
    answered_m: float
    moved_m: float
    answered_rad: float
    moved_rad: float  # negative where the arm turns the other way round


# ManiSkill asks for 0.1 m; the arm carries out four tenths of it within its own control step.
MANISKILL = Arm(0.1 * 0.4, 0.1 * 0.4, 0.1 * 0.4, -0.1 * 0.4)
LOADED_SAG = 0.0008  # metres a step that the arm sinks under the peg (0.6 kg)


@dataclass(frozen=True)
class Waypoint:
    """Where the tool should go, how fast (0..1 of a full command) and with which gripper."""

    position: Vector
    speed: float
    gripper: float = -1.0
    rotation: tuple[float, float, float] = (0.0, 0.0, 0.0)  # rotation vector from gripper-down
    tolerance: float = 0.012  # metres at which the next waypoint begins
    hold: int = 0  # steps to stay once there
    timeout: int = 40
    # Where contact differs between outcomes, corrections would betray them: a blind stretch goes
    # by where the commands so far should have brought the tool, not by where it is; blind for its
    # height alone where an arm drifts sideways unless it is corrected.
    blind: bool | Literal["height"] = False
    sag: float = 0.0  # metres a step by which a blind hand expects its load to pull it down
    jitter: float = 1.0  # share of the hand's disturbance while on the way there


@dataclass
class WaypointPolicy:
    """Follows waypoints with a proportional controller; the last one is held for ever."""

    waypoints: list[Waypoint]
    jitter: Vector  # [T,6] smooth disturbance of the commands: the hand of this episode
    arm: Arm = MANISKILL
    index: int = 0
    waited: int = 0
    steps: int = 0
    _inside: bool = field(default=False, repr=False)
    _reckoned: tuple[Vector, Vector] | None = field(default=None, repr=False)

    def act(self, position: Vector, rotation: Vector) -> npt.NDArray[np.float32]:
        """One delta-pose action [7] from the tool's position and rotation vector."""
        point = self.waypoints[self.index]
        seen = (np.asarray(position, np.float64), np.asarray(rotation, np.float64))
        position, rotation = self._reckoned if point.blind and self._reckoned else seen
        if point.blind == "height":
            position, rotation = np.array([*seen[0][:2], position[2]]), seen[1]
        error = point.position - position
        turn = np.asarray(point.rotation) - rotation
        arrived = np.linalg.norm(error) < point.tolerance and np.abs(turn).max() < 0.08
        self._inside = self._inside or bool(arrived)
        self.waited += 1
        if self._inside:
            self.waited = max(self.waited, point.timeout - point.hold)
        if self.waited >= point.timeout and self.index + 1 < len(self.waypoints):
            self.index, self.waited, self._inside = self.index + 1, 0, False
            point = self.waypoints[self.index]
            error = point.position - position
            turn = np.asarray(point.rotation) - rotation
        command = error / self.arm.answered_m
        largest = np.abs(command).max()
        if largest > point.speed:
            command *= point.speed / largest
        twist = np.sign(self.arm.moved_rad) * np.clip(turn / self.arm.answered_rad, -1, 1)
        action = np.concatenate([command, twist, [point.gripper]])
        action[:6] += point.jitter * self.jitter[self.steps % len(self.jitter)]
        action = np.clip(action, -1, 1)
        self.steps += 1
        drop = np.array([0.0, 0.0, point.sag])
        self._reckoned = (
            position + self.arm.moved_m * action[:3] - drop,
            rotation + self.arm.moved_rad * action[3:6],
        )
        return action.astype(np.float32)


class NarrowStyle:
    """Draws a plan's style from the middle ``share`` of each range: an expert's steady hand.

    Stands in for the generator in plans, which draw with ``uniform`` and ``integers`` alone.
    """

    def __init__(self, rng: np.random.Generator, share: float) -> None:
        self.rng, self.share = rng, share

    def uniform(self, low: Any, high: Any) -> Any:
        """Like the generator's, from the middle of [low, high]."""
        low, high = np.asarray(low, float), np.asarray(high, float)
        middle, half = (low + high) / 2, (high - low) / 2
        return middle + self.share * half * self.rng.uniform(-1, 1, middle.shape)

    def integers(self, low: int, high: int) -> int:
        """The middle of low .. high - 1."""
        return (low + high - 1) // 2


Style = np.random.Generator | NarrowStyle


def smooth_noise(rng: np.random.Generator, steps: int, scale: float) -> Vector:
    """Band-limited noise [steps,6]: white noise averaged over five steps; rotations get less."""
    white = rng.normal(size=(steps + 4, 6))
    kernel = np.ones(5) / np.sqrt(5)
    noise = np.stack([np.convolve(white[:, i], kernel, "valid") for i in range(6)], 1)
    return scale * noise * np.array([1, 1, 1, 0.3, 0.3, 0.3])


@dataclass(frozen=True)
class Perturbation:
    """How far a belief is from the truth, and in which way."""

    kind: str  # "aimed", or what it leads to: "beside", "short", "grasp", "place" ...
    grade: Literal["aimed", "near", "clear"]  # a success; nearly one; far from one
    offset: Vector  # [O,2] metres (x and y) between where each object is and is believed

    @property
    def size(self) -> float:
        """Metres by which the worst belief is off."""
        return float(np.linalg.norm(self.offset, axis=1).max())


def aimed(offset_O2: Any) -> Perturbation:
    """A belief that is good enough to succeed."""
    return Perturbation("aimed", "aimed", np.asarray(offset_O2, np.float64))


def missed(kind: str, offset_O2: Any, near_below: float) -> Perturbation:
    """A belief that fails; nearly a success where it is off by less than ``near_below`` metres."""
    found = Perturbation(kind, "clear", np.asarray(offset_O2, np.float64))
    if found.size < near_below:
        found = Perturbation(kind, "near", found.offset)
    return found


def graded(rng: np.random.Generator, edge: float, low: float, high: float) -> float:
    """Metres of a miss in [low, high]: as often below ``edge`` (nearly a success) as above."""
    near = rng.random() < 0.5
    return float(rng.uniform(low, edge) if near else rng.uniform(edge, high))


def heading(rng: np.random.Generator) -> Vector:
    """A unit vector [2] of any direction."""
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.cos(angle), np.sin(angle)])


@dataclass(frozen=True)
class Script:
    """One task: a plan for believed poses, and how beliefs are perturbed for an outcome."""

    plan: Callable[[Style, Vector, Vector], list[Waypoint]]  # style, objects [O,7], tool [3]
    perturb: Callable[[np.random.Generator, bool], Perturbation]  # generator, success wanted
    arm: Arm = MANISKILL


def yaw_of(quaternion_wxyz: Vector) -> float:
    """Angle about the vertical of an upright body, in (-pi, pi]."""
    w, x, y, z = quaternion_wxyz
    return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))


def quarter_yaw(quaternion_wxyz: Vector) -> float:
    """Yaw of an upright cube, folded to the nearest quarter turn (a gripper fits four ways)."""
    return (yaw_of(quaternion_wxyz) + np.pi / 4) % (np.pi / 2) - np.pi / 4


def at(xy: Any, z: float) -> Vector:
    """A point [3] above the table at ``xy``."""
    return np.array([xy[0], xy[1], z], np.float64)
