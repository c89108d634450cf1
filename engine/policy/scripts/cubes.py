"""Taking something and putting it somewhere: StackCube, StackPyramid, PickCube, PlaceSphere."""

from __future__ import annotations

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
    quarter_yaw,
)

Turn = tuple[float, float, float]


def _stack(rng: Style, objects: Vector, tool: Vector) -> list[Waypoint]:
    red, green = objects[0], objects[1]
    turn = (0.0, 0.0, quarter_yaw(red[3:]))
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


def _perturb_stack(rng: np.random.Generator, success: bool) -> Perturbation:
    direction = heading(rng)
    size = rng.uniform(0.0, 0.008) if success else rng.uniform(0.028, 0.05)
    if success:
        return aimed(np.stack([rng.uniform(-0.004, 0.004, 2), size * direction]))
    if rng.random() < 0.75:  # put down beside the middle of the green cube
        offset = np.stack([rng.uniform(-0.004, 0.004, 2), size * direction])
        return missed("place", offset, near_below=0.038)
    offset = np.stack([rng.uniform(0.03, 0.045) * direction, rng.uniform(-0.008, 0.008, 2)])
    return missed("grasp", offset, near_below=0.0)


def _take(position: Vector, speed: float, above: float, turn: Turn) -> list[Waypoint]:
    """Open fingers from above around a point, close them there."""
    return [
        Waypoint(position + [0, 0, above], speed, 1.0, turn, timeout=16),
        Waypoint(position, speed, 1.0, turn, tolerance=0.006, hold=1, timeout=10),
        Waypoint(position, 0.3, -1.0, turn, hold=3, timeout=8),
    ]


def _release(position: Vector, speed: float, rise: float, turn: Turn) -> list[Waypoint]:
    """Go down to a point with closed fingers, open them, go up."""
    return [
        Waypoint(position, 0.4, -1.0, turn, tolerance=0.004, timeout=10, jitter=0.5),
        Waypoint(position, 0.2, 1.0, turn, hold=3, timeout=8),
        Waypoint(position + [0, 0, rise], speed, 1.0, turn, timeout=14),
    ]


def _place_sphere(rng: Style, objects: Vector, tool: Vector) -> list[Waypoint]:
    ball, bin_ = objects[0, :2], objects[1, :2]
    turn = (0.0, 0.0, rng.uniform(-0.2, 0.2))
    approach, carry = rng.uniform(0.5, 1.0), rng.uniform(0.4, 0.8)
    above, lift = rng.uniform(0.06, 0.1), rng.uniform(0.09, 0.13)
    place = rng.uniform(0.028, 0.036)
    aside = np.array([rng.uniform(-0.1, 0.0), rng.uniform(-0.1, -0.05)])
    return [
        *_take(at(ball, 0.02), approach, above, turn),
        Waypoint(at(ball, lift), carry, -1.0, turn, timeout=14),
        Waypoint(at(bin_, lift), carry, -1.0, turn, tolerance=0.006, timeout=24),
        *_release(at(bin_, place), carry, 0.09, turn),
        Waypoint(at(bin_ + aside, place + 0.11), carry, 1.0, turn),
    ]


def _perturb_sphere(rng: np.random.Generator, success: bool) -> Perturbation:
    direction = heading(rng)
    if success:
        return aimed([rng.uniform(-0.004, 0.004, 2), rng.uniform(0, 0.008) * direction])
    if rng.random() < 0.7:  # onto the rim, or beside the bin
        offset = [rng.uniform(-0.004, 0.004, 2), graded(rng, 0.034, 0.023, 0.055) * direction]
        return missed("place", offset, near_below=0.034)
    offset = [rng.uniform(0.028, 0.05) * direction, rng.uniform(-0.008, 0.008, 2)]
    return missed("grasp", offset, near_below=0.0)


def _pick(rng: Style, objects: Vector, tool: Vector) -> list[Waypoint]:
    cube, goal = objects[0], objects[1, :3]
    turn = (0.0, 0.0, quarter_yaw(cube[3:]))
    approach, carry = rng.uniform(0.5, 1.0), rng.uniform(0.35, 0.8)
    above, lift = rng.uniform(0.06, 0.1), rng.uniform(0.05, 0.1)
    return [
        *_take(at(cube, 0.02), approach, above, turn),
        Waypoint(at(cube, 0.02 + lift), carry, -1.0, turn, timeout=14),
        Waypoint(at(goal, max(goal[2], 0.02 + lift)), carry, -1.0, turn, timeout=24),
        Waypoint(goal, 0.5 * carry, -1.0, turn, tolerance=0.003),
    ]


def _perturb_pick(rng: np.random.Generator, success: bool) -> Perturbation:
    direction = heading(rng)
    if success:
        return aimed([rng.uniform(-0.004, 0.004, 2), rng.uniform(0, 0.008) * direction])
    if rng.random() < 0.7:  # held beside the goal, as seen from the front
        direction = direction * [0.25, 1] / np.linalg.norm(direction * [0.25, 1])
        offset = [rng.uniform(-0.004, 0.004, 2), graded(rng, 0.055, 0.036, 0.09) * direction]
        return missed("place", offset, near_below=0.055)
    offset = [rng.uniform(0.03, 0.05) * direction, rng.uniform(-0.008, 0.008, 2)]
    return missed("grasp", offset, near_below=0.0)


def _pyramid(rng: Style, objects: Vector, tool: Vector) -> list[Waypoint]:
    """Red beside green, blue on both. The fingers close along the gap's side, so they fit in."""
    blue, red, green = objects
    yaw = quarter_yaw(green[3:])
    along = np.array([np.cos(yaw), np.sin(yaw)])  # the hand's x: fingers are on its y
    if (red[:2] - green[:2]) @ along < 0:
        along = -along
    gap = rng.uniform(0.043, 0.047)
    approach, carry = rng.uniform(0.7, 1.0), rng.uniform(0.6, 0.9)
    above, lift = rng.uniform(0.06, 0.09), rng.uniform(0.08, 0.1)
    turn, turn_red, turn_blue = ((0.0, 0.0, quarter_yaw(q)) for q in
                                 (green[3:], red[3:], blue[3:]))  # fmt: skip
    beside = green[:2] + gap * along
    middle = green[:2] + 0.5 * gap * along
    aside = np.array([rng.uniform(-0.1, 0.0), rng.uniform(-0.1, -0.05)])
    return [
        *_take(at(red, 0.02), approach, above, turn_red),
        Waypoint(at(red, lift), carry, -1.0, turn_red, timeout=10),
        Waypoint(at(beside, lift), carry, -1.0, turn, tolerance=0.008, timeout=18, jitter=0.5),
        *_release(at(beside, 0.022), carry, above, turn),
        *_take(at(blue, 0.02), approach, above, turn_blue),
        Waypoint(at(blue, 0.05 + lift), carry, -1.0, turn_blue, timeout=10),
        Waypoint(at(middle, 0.05 + lift), carry, -1.0, turn, 0.008, timeout=18, jitter=0.5),
        *_release(at(middle, 0.063), carry, above, turn),
        Waypoint(at(middle + aside, 0.16), carry, 1.0, turn),
    ]


def _perturb_pyramid(rng: np.random.Generator, success: bool) -> Perturbation:
    direction = heading(rng)
    blue, red, green = rng.uniform(-0.004, 0.004, (3, 2))
    if success:
        return aimed([blue, red, green])
    kind = rng.random()
    if kind < 0.6:  # the green cube is elsewhere: red stands apart from it, or runs into it
        size = graded(rng, 0.04, 0.026, 0.06)
        return missed("place", [blue, red, size * direction], near_below=0.04)
    if kind < 0.8:
        return missed("grasp blue", [rng.uniform(0.03, 0.045) * direction, red, green], 0.0)
    return missed("grasp red", [blue, rng.uniform(0.03, 0.045) * direction, green], 0.0)


SCRIPTS = {
    "StackCube-v1": Script(_stack, _perturb_stack),
    "PlaceSphere-v1": Script(_place_sphere, _perturb_sphere),
    "PickCube-v1": Script(_pick, _perturb_pick),
    "StackPyramid-v1": Script(_pyramid, _perturb_pyramid),
}
