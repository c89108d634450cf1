"""Scripted table-top policies from ground-truth poses, with graded near-misses (paper 3.1).

A plan is a list of waypoints for the tool centre point. It is made for a *perceived* object pose:
the true one plus a perturbation of centimetres. The style of the motion (speeds, approach, push
length, retreat) is drawn from one distribution whatever the perturbation, so that an action
sequence by itself does not betray the outcome. Where touching or carrying something would show in
the corrections of the hand, it acts blindly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

FULL_STEP = 0.1  # metres (and radians) that a command of 1 asks for
REACHED = 0.4  # share of a command that the arm carries out within its own control step
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
    # by where the commands so far should have brought the tool, not by where it is.
    blind: bool = False
    sag: float = 0.0  # metres a step by which a blind hand expects its load to pull it down


@dataclass
class WaypointPolicy:
    """Follows waypoints with a proportional controller; the last one is held for ever."""

    waypoints: list[Waypoint]
    jitter: Vector  # [T,6] smooth disturbance of the commands: the hand of this episode
    index: int = 0
    waited: int = 0
    steps: int = 0
    _inside: bool = field(default=False, repr=False)
    _reckoned: tuple[Vector, Vector] | None = field(default=None, repr=False)

    def act(self, position: Vector, rotation: Vector) -> npt.NDArray[np.float32]:
        """One ``pd_ee_delta_pose`` action [7] from the tool's position and rotation vector."""
        point = self.waypoints[self.index]
        seen = (np.asarray(position, np.float64), np.asarray(rotation, np.float64))
        position, rotation = self._reckoned if point.blind and self._reckoned else seen
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
        command = error / (FULL_STEP * REACHED)
        largest = np.abs(command).max()
        if largest > point.speed:
            command *= point.speed / largest
        # The controller turns the other way round: a positive command lowers the angle.
        twist = -np.clip(turn / (FULL_STEP * REACHED), -1, 1)
        action = np.concatenate([command, twist, [point.gripper]])
        action[:6] += self.jitter[self.steps % len(self.jitter)]
        action = np.clip(action, -1, 1)
        self.steps += 1
        drop = np.array([0.0, 0.0, point.sag])
        response = FULL_STEP * REACHED
        self._reckoned = (
            position + response * action[:3] - drop, rotation - response * action[3:6]
        )  # fmt: skip
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


def _slide(direction: float) -> Callable[..., list[Waypoint]]:
    """Plans that slide a cube along x: +1 pushes from behind, -1 pulls from the front."""

    def plan(rng: Style, objects: Vector, tool: Vector) -> list[Waypoint]:
        x, y = objects[0, 0], objects[0, 1]
        clearance = rng.uniform(0.045, 0.07)
        above, low = rng.uniform(0.06, 0.12), rng.uniform(0.021, 0.029)
        length = rng.uniform(0.09, 0.13)
        approach, push = rng.uniform(0.25, 0.6), rng.uniform(0.16, 0.4)
        start = x - direction * clearance
        end = x + direction * length
        drift = rng.uniform(-0.006, 0.006)
        back = rng.uniform(0.02, 0.07)
        lift = rng.uniform(0.09, 0.16)
        home = (x - direction * rng.uniform(0.0, 0.1), y + rng.uniform(-0.05, 0.0))
        return [
            Waypoint(np.array([start, y, above]), approach, hold=int(rng.integers(0, 4))),
            Waypoint(np.array([start, y, low]), approach, tolerance=0.008),
            Waypoint(np.array([end, y + drift, low]), push, tolerance=0.006),
            Waypoint(np.array([end - direction * back, y + drift, low + 0.02]), approach),
            Waypoint(np.array([end - direction * back, y + drift, lift]), approach),
            Waypoint(np.array([*home, lift]), approach),
        ]

    return plan


def _yaw_of(quaternion_wxyz: Vector) -> float:
    """Yaw of an upright cube, folded to the nearest quarter turn (a gripper fits four ways)."""
    w, x, y, z = quaternion_wxyz
    yaw = float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))
    return (yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4


def _stack(rng: Style, objects: Vector, tool: Vector) -> list[Waypoint]:
    red, green = objects[0], objects[1]
    turn = (0.0, 0.0, _yaw_of(red[3:]))
    approach, carry = rng.uniform(0.5, 1.0), rng.uniform(0.4, 0.9)
    above, lift = rng.uniform(0.07, 0.12), rng.uniform(0.10, 0.14)
    place = 0.062 + rng.uniform(0.0, 0.004)
    aside = np.array([rng.uniform(-0.06, 0.06), rng.uniform(-0.1, -0.04)])
    return [
        Waypoint(np.array([*red[:2], above]), approach, 1.0, turn),
        Waypoint(np.array([*red[:2], 0.02]), approach, 1.0, turn, tolerance=0.006, hold=1),
        Waypoint(np.array([*red[:2], 0.02]), 0.3, -1.0, turn, hold=4),
        Waypoint(np.array([*red[:2], lift]), carry, -1.0, turn),
        Waypoint(np.array([*green[:2], lift]), carry, -1.0, turn, tolerance=0.006),
        Waypoint(np.array([*green[:2], place]), 0.4, -1.0, turn, tolerance=0.004, timeout=14),
        Waypoint(np.array([*green[:2], place]), 0.2, 1.0, turn, hold=3),
        Waypoint(np.array([*green[:2], place + 0.09]), carry, 1.0, turn),
        Waypoint(np.array([*(green[:2] + aside), place + 0.11]), carry, 1.0, turn),
    ]


def _lift_peg(rng: Style, objects: Vector, tool: Vector) -> list[Waypoint]:
    """Take the peg (along x, 24 cm long) by its near end, raise it and turn it to hang upright.

    The hand turns until its fingers point back to the robot: the other way round the wrist ends
    at a joint limit. From the moment it stands above the peg it acts blindly.
    """
    x, y = objects[0, 0], objects[0, 1]
    grip = rng.uniform(0.05, 0.065)  # from the peg's middle
    approach, carry = rng.uniform(0.7, 1.0), rng.uniform(0.4, 0.6)
    high = rng.uniform(0.10, 0.13)
    at = np.array([x - grip, y, 0.026])
    upright = (0.0, rng.uniform(1.48, 1.54), 0.0)
    # The peg hangs from the fingers: its lower end is a grip and half a length below them.
    top = np.array([rng.uniform(-0.19, -0.13), y, 0.124 + grip])
    back = (0.0, rng.uniform(1.0, 1.2), 0.0)
    rise = rng.uniform(0.09, 0.12)
    above = np.array([0, 0, high])
    over = np.array([0, 0, rng.uniform(0.025, 0.04)])
    return [
        Waypoint(at + above, approach, 1.0, tolerance=0.008, hold=2, timeout=14),
        Waypoint(at, approach, 1.0, tolerance=0.008, hold=1, timeout=8, blind=True),
        Waypoint(at, 0.3, -1.0, hold=3, timeout=5, blind=True),
        Waypoint(top + over, carry, -1.0, upright, timeout=40, blind=True, sag=LOADED_SAG),
        Waypoint(top, 0.4, -1.0, upright, 0.006, timeout=8, blind=True, sag=LOADED_SAG),
        Waypoint(top, 0.2, 1.0, upright, hold=3, timeout=5, blind=True),
        Waypoint(top + [0, 0, rise], 0.6 * approach, 1.0, back, blind=True),
    ]


def _sideways_or_along(rng: np.random.Generator, direction: float) -> Callable[[bool], Vector]:
    def offset(success: bool) -> Vector:
        if success:
            return np.array([rng.uniform(-0.012, 0.012), rng.uniform(-0.009, 0.009)])
        kind = rng.random()
        if kind < 0.74:  # beside the cube, or only its edge
            side = rng.choice([-1.0, 1.0])
            return np.array([rng.uniform(-0.02, 0.02), side * rng.uniform(0.022, 0.06)])
        sideways = rng.uniform(-0.012, 0.012)
        if kind < 0.87:  # behind where it should be: the push ends short
            return np.array([-direction * rng.uniform(0.045, 0.085), sideways])
        return np.array([direction * rng.uniform(0.095, 0.125), sideways])  # in front of it

    return offset


PLANS: dict[str, Callable[[Style, Vector, Vector], list[Waypoint]]] = {
    "PushCube-v1": _slide(1.0),
    "PullCube-v1": _slide(-1.0),
    "StackCube-v1": _stack,
    "LiftPegUpright-v1": _lift_peg,
}


def perturbation(env_id: str, rng: np.random.Generator, success: bool) -> Vector:
    """Offset [O,2] (metres, x and y) between where each object is and where it is believed."""
    if env_id in ("PushCube-v1", "PullCube-v1"):
        direction = 1.0 if env_id == "PushCube-v1" else -1.0
        return _sideways_or_along(rng, direction)(success)[None]
    angle = rng.uniform(0, 2 * np.pi)
    heading = np.array([np.cos(angle), np.sin(angle)])
    if env_id == "StackCube-v1":
        size = rng.uniform(0.0, 0.008) if success else rng.uniform(0.028, 0.05)
        if success or rng.random() < 0.75:  # put down beside the middle of the green cube
            return np.stack([rng.uniform(-0.004, 0.004, 2), size * heading])
        return np.stack([rng.uniform(0.03, 0.045) * heading, rng.uniform(-0.008, 0.008, 2)])
    if env_id == "LiftPegUpright-v1":
        if success:
            return rng.uniform((-0.01, -0.007), (0.02, 0.007))[None]
        side = rng.choice([-1.0, 1.0])
        if rng.random() < 0.7:  # a finger comes down on the peg, or both beside it
            return np.array([[rng.uniform(-0.01, 0.02), side * rng.uniform(0.028, 0.06)]])
        return np.array([[rng.uniform(-0.09, -0.055), rng.uniform(-0.007, 0.007)]])  # short of it
    raise ValueError(f"no scripted policy for {env_id!r}; known: {', '.join(PLANS)}")


def scripted_policy(
    env_id: str,
    rng: np.random.Generator,
    objects_O7: npt.NDArray[Any],
    tool_3: npt.NDArray[Any],
    offset_O2: Vector,
    steps: int,
    style_share: float = 1.0,
) -> WaypointPolicy:
    """A policy for one episode that believes the objects to be ``offset_O2`` from where they are.

    style_share: how much of each range of styles is used; small is an expert's steady hand.
    Raises ValueError for an unknown ``env_id``.
    """
    if env_id not in PLANS:
        raise ValueError(f"no scripted policy for {env_id!r}; known: {', '.join(PLANS)}")
    believed = np.asarray(objects_O7, np.float64).copy()
    believed[:, :2] += offset_O2
    style = rng if style_share == 1 else NarrowStyle(rng, style_share)
    plan = PLANS[env_id](style, believed, np.asarray(tool_3, np.float64))
    return WaypointPolicy(plan, smooth_noise(rng, steps, rng.uniform(0.0, 0.04)))
