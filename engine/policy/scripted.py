"""Scripted table-top policies from ground-truth poses, with graded near-misses (paper 3.1).

A plan is a list of waypoints for the tool centre point. It is made for *perceived* object poses:
the true ones plus a perturbation of centimetres. The style of the motion (speeds, approach, push
length, retreat) is drawn from one distribution whatever the perturbation, so that an action
sequence by itself does not betray the outcome. Where touching or carrying something would show in
the corrections of the hand, it acts blindly.

The scripts are in `worldloop.engine.policy.scripts`, one file a kind of motion.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from worldloop.engine.policy.scripts import cubes, draw, libero, pegs, slide
from worldloop.engine.policy.scripts.common import (
    NarrowStyle,
    Perturbation,
    Script,
    Vector,
    WaypointPolicy,
    smooth_noise,
)

SCRIPTS: dict[str, Script] = {
    **slide.SCRIPTS, **cubes.SCRIPTS, **pegs.SCRIPTS, **draw.SCRIPTS, **libero.SCRIPTS,
}  # fmt: skip


def script(env_id: str) -> Script:
    """The script of a task; raises ValueError naming the known ones."""
    if env_id not in SCRIPTS:
        raise ValueError(f"no scripted policy for {env_id!r}; known: {', '.join(SCRIPTS)}")
    return SCRIPTS[env_id]


def perturbation(env_id: str, rng: np.random.Generator, success: bool) -> Perturbation:
    """How far each object is believed to be from where it is, for a wanted outcome."""
    return script(env_id).perturb(rng, success)


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
    task = script(env_id)
    believed = np.asarray(objects_O7, np.float64).copy()
    believed[:, :2] += offset_O2
    style = rng if style_share == 1 else NarrowStyle(rng, style_share)
    plan = task.plan(style, believed, np.asarray(tool_3, np.float64))
    return WaypointPolicy(plan, smooth_noise(rng, steps, rng.uniform(0.0, 0.04)), task.arm)
