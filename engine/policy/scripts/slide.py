"""Sliding a cube over the table: PushCube and PullCube."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from worldloop.engine.policy.scripts.common import (
    Perturbation,
    Script,
    Style,
    Vector,
    Waypoint,
    aimed,
    missed,
)


def _slide(direction: float) -> Callable[[Style, Vector, Vector], list[Waypoint]]:
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


def _perturb(direction: float) -> Callable[[np.random.Generator, bool], Perturbation]:
    def perturb(rng: np.random.Generator, success: bool) -> Perturbation:
        if success:
            return aimed([[rng.uniform(-0.012, 0.012), rng.uniform(-0.009, 0.009)]])
        kind = rng.random()
        if kind < 0.74:  # beside the cube, or only its edge
            side = rng.choice([-1.0, 1.0])
            offset = [rng.uniform(-0.02, 0.02), side * rng.uniform(0.022, 0.06)]
            return missed("beside", [offset], near_below=0.04)
        sideways = rng.uniform(-0.012, 0.012)
        if kind < 0.87:  # behind where it should be: the push ends short
            offset = [-direction * rng.uniform(0.045, 0.085), sideways]
            return missed("short", [offset], near_below=0.065)
        offset = [direction * rng.uniform(0.095, 0.125), sideways]  # in front of it
        return missed("beyond", [offset], near_below=0.0)

    return perturb


SCRIPTS = {
    "PushCube-v1": Script(_slide(1.0), _perturb(1.0)),
    "PullCube-v1": Script(_slide(-1.0), _perturb(-1.0)),
}
