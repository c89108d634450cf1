"""Drawing with a stick: DrawTriangle."""

from __future__ import annotations

import itertools

import numpy as np

from worldloop.engine.policy.scripts.common import (
    Perturbation,
    Script,
    Style,
    Vector,
    Waypoint,
    aimed,
    at,
    graded,
    heading,
    missed,
    yaw_of,
)

# Corners of the outline in its own frame (metres): an equilateral triangle of 0.3 m, as the
# simulator builds it.
CORNERS = 0.3 / np.sqrt(3) * np.array([[np.cos(a), np.sin(a)] for a in np.radians([30, 150, 270])])
INK = 0.0215  # height of the tip: it draws below 0.028, the canvas is at 0.02


def _draw_triangle(rng: Style, objects: Vector, tool: Vector) -> list[Waypoint]:
    """Down at the corner nearest to the tip, once round, up and away."""
    centre, yaw = objects[0, :2], yaw_of(objects[0, 3:])
    turned = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
    corners = centre + CORNERS @ turned.T
    first = int(np.linalg.norm(corners - tool[:2], axis=1).argmin())
    way = 1 - 2 * int(rng.integers(0, 2))
    order = [corners[(first + way * i) % 3] for i in range(4)]
    approach, draw = rng.uniform(0.5, 1.0), rng.uniform(0.38, 0.55)
    high = rng.uniform(0.06, 0.1)
    aside = np.array([rng.uniform(-0.3, -0.25), rng.uniform(-0.1, 0.1)])
    return [
        Waypoint(at(order[0], high), approach, tolerance=0.005, hold=1, timeout=20),
        Waypoint(at(order[0], INK), approach, tolerance=0.006, timeout=10),
        *(
            Waypoint(at(point, INK), draw, tolerance=tolerance, timeout=30, jitter=0.3)
            for here, there in itertools.pairwise(order)
            for point, tolerance in ((0.5 * (here + there), 0.015), (there, 0.007))
        ),
        Waypoint(at(order[0], high), approach, timeout=10),
        Waypoint(at(aside, 0.14), approach),
    ]


def _perturb_draw(rng: np.random.Generator, success: bool) -> Perturbation:
    direction = heading(rng)
    if success:
        return aimed([rng.uniform(0.0, 0.012) * direction])
    return missed("shift", [graded(rng, 0.05, 0.03, 0.09) * direction], near_below=0.05)


SCRIPTS = {"DrawTriangle-v1": Script(_draw_triangle, _perturb_draw)}
