"""LIBERO's pick-and-place: take an object (or a bowl by its rim), put it into or onto another.

Heights and offsets are from the objects' own origins; the fingers close along the world's y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from worldloop.engine.policy.scripts.common import (
    Arm,
    Perturbation,
    Script,
    Style,
    Vector,
    Waypoint,
    aimed,
    graded,
    missed,
)

# Measured. A command of 1 asks for 0.05 m and 0.5 rad; the arm answers late, so a script asks for
# its whole error and no more.
LIBERO = Arm(answered_m=0.05, moved_m=0.0131, answered_rad=0.5, moved_rad=0.155)
MARGIN = 0.004  # metres that a good belief may be off


@dataclass(frozen=True)
class PickPlace:
    """Where a task's object is taken and where it is let go; metres."""

    grasp: tuple[float, float, float]  # tool from the object's origin
    held: tuple[float, float]  # likewise once it is held: closing fingers shift a bowl
    rise: float  # tool above the grasp while carrying
    release: float  # tool above the target's origin when the fingers open
    closing: int = 6  # steps until the fingers hold it; 11 from open to shut
    carry: tuple[float, float] = (0.75, 1.0)  # speed with it in the hand, of a full command


def _plan(task: PickPlace) -> Callable[[Style, Vector, Vector], list[Waypoint]]:
    """Above, down, close, lift, over the target, down to it, open, up and aside."""

    def plan(rng: Style, objects: Vector, tool: Vector) -> list[Waypoint]:
        moved, target = objects[0, :3], objects[1, :3]
        grip = np.asarray(task.grasp)
        approach, carry = rng.uniform(0.8, 1.0), rng.uniform(*task.carry)
        above, rise = rng.uniform(0.07, 0.10), task.rise + rng.uniform(0.0, 0.02)
        aside = np.array([rng.uniform(-0.14, -0.08), rng.uniform(-0.08, 0.0), 0.0])
        take = moved + grip
        up = take + [0, 0, rise]
        put = target + [*task.held, task.release + rng.uniform(0.0, 0.01)]
        over = np.array([*put[:2], max(up[2], put[2])])
        back = put + [0, 0, rng.uniform(0.08, 0.11)]
        # How far down the hand comes is not looked at: what it lands on must not show in commands.
        return [
            Waypoint(take + [0, 0, above], approach, 1.0, timeout=45, tolerance=0.012, hold=5),
            Waypoint(
                take, 0.8 * approach, 1.0, tolerance=0.006, hold=1, timeout=16, blind="height"
            ),
            Waypoint(take, 0.3, -1.0, hold=task.closing, timeout=task.closing + 1, blind="height"),
            Waypoint(up, carry, -1.0, timeout=25, tolerance=0.02),
            Waypoint(over, carry, -1.0, timeout=52, tolerance=0.01, hold=2),
            Waypoint(put, 0.6 * carry, -1.0, tolerance=0.008, timeout=22),
            # Fingers first undo their squeeze; before they are open they take the object with them.
            Waypoint(put, 0.2, 1.0, hold=14, timeout=15),
            Waypoint(back, carry, 1.0, timeout=14, tolerance=0.02),
            Waypoint(back + aside, carry, 1.0),
        ]

    return plan


def _nearby(rng: np.random.Generator) -> Vector:
    return rng.uniform(-MARGIN, MARGIN, 2)


@dataclass(frozen=True)
class Misses:
    """How far beside, in metres, which way, and up to where it is nearly a success."""

    place: tuple[float, float, float]  # low, edge, high of the target's belief
    way: tuple[float, float]  # degrees from x to y in which it is off
    grasp: tuple[float, float, float]  # likewise of the object's belief, along y
    sides: tuple[float, ...] = (-1.0, 1.0)  # of y


def _perturb(task: Misses) -> Callable[[np.random.Generator, bool], Perturbation]:
    def perturb(rng: np.random.Generator, success: bool) -> Perturbation:
        if success:
            return aimed([_nearby(rng), _nearby(rng)])
        if rng.random() < 0.65:
            low, edge, high = task.place
            angle = np.radians(rng.uniform(*task.way))
            offset = graded(rng, edge, low, high) * np.array([np.cos(angle), np.sin(angle)])
            return missed("place", [_nearby(rng), offset], near_below=edge)
        low, edge, high = task.grasp
        side = rng.choice(task.sides) * graded(rng, edge, low, high)
        return missed("grasp", [[rng.uniform(-MARGIN, MARGIN), side], _nearby(rng)], edge)

    return perturb


def _script(task: PickPlace, misses: Misses) -> Script:
    return Script(_plan(task), _perturb(misses), LIBERO)


# Not behind a basket or a bowl, where the camera would not show it; not out of the picture, nor of
# the arm's reach (x = 0.12), nor in `goal` to where the cabinet stops the hand (y = -0.03).
BASKET = Misses((0.095, 0.13, 0.17), (-110.0, -45.0), (0.025, 0.035, 0.06))
PLATE = Misses((0.04, 0.08, 0.13), (80.0, 280.0), (0.06, 0.075, 0.09), sides=(1.0,))
BOWL = Misses((0.055, 0.085, 0.12), (0.0, 100.0), (0.025, 0.035, 0.055))
# As deep as the fingers come, and slowly: otherwise the rim slips out.
RIM = PickPlace((0.0, 0.046, 0.007), (-0.005, 0.038), 0.1, 0.055, closing=15, carry=(0.55, 0.75))
SCRIPTS = {
    "libero_object-0": _script(PickPlace((0.0, 0.0, 0.0), (0.0, 0.0), 0.17, 0.2), BASKET),
    "libero_object-5": _script(
        PickPlace((0.0, 0.0, -0.005), (0.0, 0.0), 0.175, 0.2, closing=10), BASKET
    ),
    "libero_goal-6": _script(PickPlace((0.0, 0.0, 0.0), (0.0, 0.0), 0.12, 0.1), BOWL),
    "libero_goal-8": _script(RIM, replace(PLATE, way=(80.0, 190.0))),
    "libero_spatial-0": _script(RIM, PLATE),
    "libero_spatial-2": _script(RIM, PLATE),
}
