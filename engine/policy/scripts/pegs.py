"""Long things held by one end: LiftPegUpright, PokeCube, PegInsertionSide, PullCubeTool."""

from __future__ import annotations

import numpy as np

from worldloop.engine.policy.scripts.common import (
    LOADED_SAG,
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


def _lift_peg(rng: Style, objects: Vector, tool: Vector) -> list[Waypoint]:
    """Take the peg (along x, 24 cm long) by its near end, raise it and turn it to hang upright.

    The hand turns until its fingers point back to the robot: the other way round the wrist ends
    at a joint limit. From the moment it stands above the peg it acts blindly.
    """
    x, y = objects[0, 0], objects[0, 1]
    grip = rng.uniform(0.05, 0.065)  # from the peg's middle
    approach, carry = rng.uniform(0.7, 1.0), rng.uniform(0.4, 0.6)
    high = rng.uniform(0.10, 0.13)
    end = np.array([x - grip, y, 0.026])
    upright = (0.0, rng.uniform(1.48, 1.54), 0.0)
    # The peg hangs from the fingers: its lower end is a grip and half a length below them.
    top = np.array([rng.uniform(-0.19, -0.13), y, 0.124 + grip])
    back = (0.0, rng.uniform(1.0, 1.2), 0.0)
    rise = rng.uniform(0.09, 0.12)
    above = np.array([0, 0, high])
    over = np.array([0, 0, rng.uniform(0.025, 0.04)])
    return [
        Waypoint(end + above, approach, 1.0, tolerance=0.008, hold=2, timeout=14),
        Waypoint(end, approach, 1.0, tolerance=0.008, hold=1, timeout=8, blind=True),
        Waypoint(end, 0.3, -1.0, hold=3, timeout=5, blind=True),
        Waypoint(top + over, carry, -1.0, upright, timeout=40, blind=True, sag=LOADED_SAG),
        Waypoint(top, 0.4, -1.0, upright, 0.006, timeout=8, blind=True, sag=LOADED_SAG),
        Waypoint(top, 0.2, 1.0, upright, hold=3, timeout=5, blind=True),
        Waypoint(top + [0, 0, rise], 0.6 * approach, 1.0, back, blind=True),
    ]


def _perturb_lift(rng: np.random.Generator, success: bool) -> Perturbation:
    rng.uniform(0, 2 * np.pi)  # a heading that other tasks use: seeds keep their episodes
    if success:
        return aimed(rng.uniform((-0.01, -0.007), (0.02, 0.007))[None])
    side = rng.choice([-1.0, 1.0])
    if rng.random() < 0.7:  # a finger comes down on the peg, or both beside it
        offset = [rng.uniform(-0.01, 0.02), side * rng.uniform(0.028, 0.06)]
        return missed("beside", [offset], near_below=0.042)
    offset = [rng.uniform(-0.09, -0.055), rng.uniform(-0.007, 0.007)]  # short of it
    return missed("short", [offset], near_below=0.07)


def _poke(rng: Style, objects: Vector, tool: Vector) -> list[Waypoint]:
    """Take the peg (along x) near its end, line it up with the cube, push the cube with it."""
    cube, peg = objects[0, :2], objects[1, :2]
    grip = rng.uniform(0.05, 0.075)  # from the peg's middle
    approach, carry, push = rng.uniform(0.5, 1.0), rng.uniform(0.3, 0.6), rng.uniform(0.16, 0.4)
    high = rng.uniform(0.06, 0.1)
    end = at([peg[0] - grip, peg[1]], 0.025)
    low = rng.uniform(0.026, 0.03)
    lined_up = at([end[0] - rng.uniform(0.0, 0.01), cube[1] + rng.uniform(-0.004, 0.004)], low)
    # The peg's head is a grip and half a length ahead of the fingers, the cube half a side more.
    pushed = at([cube[0] + rng.uniform(0.085, 0.115) - 0.02 - 0.12 - grip, lined_up[1]], low)
    back = pushed - [rng.uniform(0.03, 0.06), 0, 0]
    return [
        Waypoint(end + [0, 0, high], approach, 1.0, timeout=20),
        Waypoint(end, approach, 1.0, tolerance=0.006, hold=1, timeout=8, blind=True),
        Waypoint(end, 0.3, -1.0, hold=3, timeout=5, blind=True),
        Waypoint(lined_up, carry, -1.0, tolerance=0.005, timeout=20, hold=1),
        Waypoint(pushed, push, -1.0, tolerance=0.005, timeout=40),
        Waypoint(back, carry, -1.0),
    ]


def _perturb_poke(rng: np.random.Generator, success: bool) -> Perturbation:
    side = rng.choice([-1.0, 1.0])
    if success:
        return aimed([rng.uniform(-0.008, 0.008, 2), rng.uniform((-0.01, -0.008), (0.01, 0.008))])
    if rng.random() < 0.75:  # the peg passes the cube, or turns it by its edge
        size = graded(rng, 0.05, 0.036, 0.075)
        beside = [rng.uniform(-0.01, 0.01), side * size]
        return missed("beside", [beside, [0.0, 0.0]], near_below=0.05)
    cube, peg = rng.uniform(-0.008, 0.008, 2), [0.0, side * rng.uniform(0.03, 0.05)]
    return missed("grasp", [cube, peg], near_below=0.0)


def _insert(rng: Style, objects: Vector, tool: Vector) -> list[Waypoint]:
    """Take the peg by its tail, hold its head before the hole, push it in along the hole."""
    peg, hole, head = objects
    half = float(np.linalg.norm(head[:3] - peg[:3]))
    yaw, hole_yaw = yaw_of(peg[3:]), yaw_of(hole[3:])
    ahead = np.array([np.cos(yaw), np.sin(yaw)])
    into = np.array([np.cos(hole_yaw), np.sin(hole_yaw)])
    # From the peg's middle: nearer to it the hand meets the box, farther off the peg tilts.
    grip = rng.uniform(0.051, 0.057)
    approach, carry, push = rng.uniform(0.6, 1.0), rng.uniform(0.5, 0.8), rng.uniform(0.2, 0.35)
    high = rng.uniform(0.06, 0.09)
    turn, hole_turn = (0.0, 0.0, yaw), (0.0, 0.0, hole_yaw)
    tail = at(peg[:2] - grip * ahead, peg[2])
    reach = grip + half  # from the fingers to the head
    # The hole is as long as the peg: its mouth is half of that before its middle.
    before = at(hole[:2] - (reach + half + rng.uniform(0.015, 0.025)) * into, hole[2])
    inside = at(hole[:2] - (reach - rng.uniform(0.0, 0.01)) * into, hole[2])
    return [
        Waypoint(tail + [0, 0, high], approach, 1.0, turn, timeout=20),
        Waypoint(tail, approach, 1.0, turn, tolerance=0.0015, hold=1, timeout=14, jitter=0.1),
        Waypoint(tail, 0.3, -1.0, turn, hold=3, timeout=5, jitter=0.1),
        Waypoint(at(tail, hole[2] + 0.03), carry, -1.0, turn, timeout=12),
        Waypoint(before, carry, -1.0, hole_turn, 0.002, hold=2, timeout=26, jitter=0.1),
        *(
            Waypoint(
                before + share * (inside - before),
                push,
                -1.0,
                hole_turn,
                0.004,
                timeout=4,
                jitter=0.1,
            )
            for share in np.linspace(0, 1, 9)[1:]
        ),
        Waypoint(inside, 0.2, 1.0, hole_turn, hold=2, timeout=5),
        Waypoint(inside + at(-0.04 * into, 0.09), 0.5, 1.0, hole_turn),
    ]


def _perturb_insert(rng: np.random.Generator, success: bool) -> Perturbation:
    side, direction = rng.choice([-1.0, 1.0]), heading(rng)
    if success:
        return aimed(np.zeros((3, 2)))
    if rng.random() < 0.75:  # the head meets the box beside the hole, or passes the box
        offset = np.array([side * graded(rng, 0.03, 0.012, 0.06), 0.0])
        return missed("place", [[0.0, 0.0], offset, [0.0, 0.0]], near_below=0.03)
    offset = rng.uniform(0.035, 0.06) * direction
    return missed("grasp", [offset, [0.0, 0.0], offset], near_below=0.0)


def _pull_with_tool(rng: Style, objects: Vector, tool: Vector) -> list[Waypoint]:
    """Take the L by its handle, bring its hook behind the cube from the side, draw it near.

    The L stays on the table. From its handle's end (its origin) the hook's inner face is 15 cm
    ahead and the hook reaches 10 cm to the left.
    """
    cube, handle = objects[0, :2], objects[1, :2]
    grip = rng.uniform(0.03, 0.05)
    approach, carry, pull = rng.uniform(0.6, 1.0), rng.uniform(0.5, 0.8), rng.uniform(0.3, 0.6)
    high, low = rng.uniform(0.06, 0.1), 0.026
    hand = np.array([grip, 0.0])
    beside = cube + [-0.15 + 0.035 + rng.uniform(0.0, 0.01), -rng.uniform(0.135, 0.145)]
    behind = np.array([beside[0], cube[1] - rng.uniform(0.06, 0.07)])
    near = np.array([rng.uniform(-0.28, -0.23), behind[1]])
    return [
        Waypoint(at(handle + hand, high), approach, 1.0, timeout=20),
        Waypoint(
            at(handle + hand, low), approach, 1.0, tolerance=0.006, hold=1, timeout=8, blind=True
        ),
        Waypoint(at(handle + hand, low), 0.3, -1.0, hold=3, timeout=5, blind=True),
        Waypoint(at([handle[0] + grip, beside[1]], low), carry, -1.0, timeout=20),
        Waypoint(at(beside + hand, low), carry, -1.0, timeout=24),
        Waypoint(at(behind + hand, low), 0.5 * carry, -1.0, tolerance=0.008, timeout=16),
        Waypoint(at(near + hand, low), pull, -1.0, timeout=40),
        Waypoint(at(near + hand, low), 0.2, 1.0, hold=2, timeout=6),
        Waypoint(at(near + hand, 0.12), carry, 1.0),
    ]


def _perturb_tool(rng: np.random.Generator, success: bool) -> Perturbation:
    side = rng.choice([-1.0, 1.0])
    if success:
        return aimed([rng.uniform(-0.008, 0.008, 2), rng.uniform(-0.006, 0.006, 2)])
    if rng.random() < 0.75:
        # The hook comes down short of the cube, or does not reach round it.
        size = graded(rng, 0.07, 0.045, 0.1)
        offset = [-size, 0.0] if side < 0 else [rng.uniform(-0.008, 0.008), -size]
        return missed("hook", [offset, [0.0, 0.0]], near_below=0.07)
    offset = [0.0, side * rng.uniform(0.03, 0.05)]
    return missed("grasp", [rng.uniform(-0.008, 0.008, 2), offset], near_below=0.0)


SCRIPTS = {
    "LiftPegUpright-v1": Script(_lift_peg, _perturb_lift),
    "PokeCube-v1": Script(_poke, _perturb_poke),
    "PegInsertionSide-v1": Script(_insert, _perturb_insert),
    "PullCubeTool-v1": Script(_pull_with_tool, _perturb_tool),
}
