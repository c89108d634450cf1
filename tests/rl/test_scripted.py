"""Scripted policies without a simulator: a point that follows commands late, as the arm does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from worldloop.engine.policy.scripted import (
    PLANS,
    Waypoint,
    WaypointPolicy,
    _yaw_of,
    perturbation,
    scripted_policy,
    smooth_noise,
)

TASKS = sorted(PLANS)
HORIZON = 72
HOME = np.array([0.0, 0.0, 0.17])
Point = npt.NDArray[np.float64]


def objects_of(env_id: str, rng: np.random.Generator) -> Point:
    """Poses [O,7] as the task might spawn them."""
    height = 0.025 if env_id == "LiftPegUpright-v1" else 0.02
    first = np.array([*rng.uniform(-0.08, 0.08, 2), height, 1, 0, 0, 0])
    if env_id != "StackCube-v1":
        return first[None]
    angle = rng.uniform(0, 2 * np.pi)
    second = first.copy()
    second[:2] += 0.09 * np.array([np.cos(angle), np.sin(angle)])
    return np.stack([first, second])


def follow(
    policy: WaypointPolicy, steps: int, obstacle: Callable[[Point], Point] = lambda p: p
) -> tuple[Point, Point, list[int]]:
    """Let a lagging point carry out the policy.

    Half of a command's motion (0.04 m in all) comes in its own step, half in the next one, as
    fitted to the simulated arm. Returns positions [T+1,3], actions [T,7] and waypoint indices.
    """
    position, rotation, last = HOME.copy(), np.zeros(3), np.zeros(3)
    path, actions, index = [position], [], []
    for _ in range(steps):
        action = policy.act(position, rotation)
        position = obstacle(position + 0.02 * action[:3] + 0.02 * last)
        rotation = rotation - 0.04 * action[3:6]  # the controller turns the other way round
        last = action[:3].astype(np.float64)
        path.append(position)
        actions.append(action)
        index.append(policy.index)
    return np.stack(path), np.stack(actions), index


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("seed", range(6))
def test_plan_ends_in_time_for_the_outcome_to_be_seen(env_id: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    objects = objects_of(env_id, rng)
    offset = np.zeros((len(objects), 2))
    policy = scripted_policy(env_id, rng, objects, HOME, offset, HORIZON)
    path, actions, index = follow(policy, HORIZON)
    end = len(policy.waypoints) - 1
    assert index[63] == end
    assert np.linalg.norm(path[-1] - policy.waypoints[end].position) < 0.04
    assert path[:, 2].min() > 0.0  # never into the table
    assert actions.shape == (HORIZON, 7) and actions.dtype == np.float32
    assert np.abs(actions).max() <= 1


@pytest.mark.parametrize("env_id", TASKS)
def test_a_perturbation_only_moves_the_belief(env_id: str) -> None:
    """The plan for an object believed elsewhere is the plan for an object that is there."""
    objects = objects_of(env_id, np.random.default_rng(3))
    offset = np.full((len(objects), 2), 0.03)
    moved = objects.copy()
    moved[:, :2] += offset
    perturbed = scripted_policy(
        env_id, np.random.default_rng(4), objects, HOME, offset, HORIZON
    )  # fmt: skip
    honest = scripted_policy(
        env_id, np.random.default_rng(4), moved, HOME, 0 * offset, HORIZON
    )  # fmt: skip
    np.testing.assert_array_equal(follow(perturbed, HORIZON)[1], follow(honest, HORIZON)[1])


@pytest.mark.parametrize("env_id", TASKS)
def test_perturbations_are_centimetres(env_id: str) -> None:
    rng = np.random.default_rng(5)
    hits = np.stack([perturbation(env_id, rng, True) for _ in range(300)])
    misses = np.stack([perturbation(env_id, rng, False) for _ in range(300)])
    assert hits.shape[1:] == misses.shape[1:] == (len(objects_of(env_id, rng)), 2)
    far_hit = np.linalg.norm(hits, axis=-1).max(1)
    far_miss = np.linalg.norm(misses, axis=-1).max(1)
    assert far_hit.max() < 0.025
    assert far_miss.min() > 0.02 and far_miss.max() < 0.13
    assert np.abs(misses.mean(0)).max() < 0.03  # not all to one side


def test_blind_waypoints_do_not_betray_what_the_hand_meets() -> None:
    """Coming down on the peg instead of around it must not change one action."""
    env_id, objects = "LiftPegUpright-v1", objects_of("LiftPegUpright-v1", np.random.default_rng(6))

    def actions(blocked_below: float) -> Point:
        policy = scripted_policy(
            env_id, np.random.default_rng(7), objects, HOME, np.zeros((1, 2)), HORIZON
        )
        return follow(policy, HORIZON, lambda p: np.maximum(p, [-1, -1, blocked_below]))[1]

    np.testing.assert_array_equal(actions(0.0), actions(0.055))


def test_seeing_waypoints_do_react() -> None:
    """The control to the test above: a hand that looks keeps pressing on what is in its way."""

    def actions(blocked_below: float) -> Point:
        points = [Waypoint(np.array([0.0, 0, 0.02]), 0.5), Waypoint(np.array([0.1, 0, 0.2]), 0.5)]
        policy = WaypointPolicy(points, np.zeros((1, 6)))
        return follow(policy, 20, lambda p: np.maximum(p, [-1, -1, blocked_below]))[1]

    assert np.abs(actions(0.0) - actions(0.055)).max() > 0.1


def test_hold_and_timeout() -> None:
    far = Waypoint(np.array([5.0, 0, 0.17]), 0.5, timeout=4)
    here = Waypoint(np.array([0.16, 0, 0.17]), 0.5, tolerance=0.2, hold=3)
    end = Waypoint(HOME, 0.5)
    index = follow(WaypointPolicy([far, here, end], np.zeros((1, 6))), 12)[2]
    assert index.count(0) == 3  # given up at its fourth step
    assert index.count(1) == 4  # the step of arrival and three to stay
    assert index[-1] == 2


def test_speed_limits_the_largest_component() -> None:
    policy = WaypointPolicy([Waypoint(np.array([1.0, 0.5, 0.17]), 0.3)], np.zeros((1, 6)))
    action = policy.act(HOME, np.zeros(3))
    np.testing.assert_allclose(action[:3], [0.3, 0.15, 0], atol=1e-6)


def test_rotation_is_commanded_the_other_way_round() -> None:
    point = Waypoint(HOME, 0.5, rotation=(0.0, 1.0, 0.0))
    action = WaypointPolicy([point], np.zeros((1, 6))).act(HOME, np.zeros(3))
    np.testing.assert_allclose(action[3:6], [0, -1, 0])


@pytest.mark.parametrize("degrees", [-170, -50, -44, 0, 30, 44, 46, 100, 135])
def test_yaw_is_folded_to_the_nearest_quarter_turn(degrees: float) -> None:
    half = np.radians(degrees) / 2
    yaw = _yaw_of(np.array([np.cos(half), 0, 0, np.sin(half)]))
    assert abs(yaw) <= np.pi / 4 + 1e-9
    quarter_turns = (np.radians(degrees) - yaw) / (np.pi / 2)
    assert abs(quarter_turns - round(quarter_turns)) < 1e-9


def test_noise_is_smooth_and_scaled() -> None:
    noise = smooth_noise(np.random.default_rng(0), 2000, 0.04)
    assert noise.shape == (2000, 6)
    np.testing.assert_allclose(noise.std(0), [0.04] * 3 + [0.012] * 3, rtol=0.15)
    assert np.abs(np.diff(noise, axis=0)).mean() < 0.7 * np.abs(noise).mean()


def test_unknown_task_is_named() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="'Nope-v1'.*PushCube-v1"):
        scripted_policy("Nope-v1", rng, np.zeros((1, 7)), HOME, np.zeros((1, 2)), HORIZON)
    with pytest.raises(ValueError, match="'Nope-v1'.*PushCube-v1"):
        perturbation("Nope-v1", rng, True)


def test_an_expert_s_style_is_the_middle_of_every_range():
    """Plans of a narrow style are alike; those of the full style are not."""
    objects = np.array([[0.0, 0.02, 0.02, 1, 0, 0, 0]] * 2)
    tool = np.array([0.0, 0.0, 0.17])

    def spread(env_id: str, share: float) -> float:
        plans = []
        for seed in range(12):
            rng = np.random.default_rng(seed)
            policy = scripted_policy(env_id, rng, objects, tool, np.zeros((2, 2)), 72, share)
            plans.append([[*point.position, point.speed] for point in policy.waypoints])
        return float(np.std(np.array(plans), axis=0).mean())

    for env_id in ("PushCube-v1", "PullCube-v1", "StackCube-v1", "LiftPegUpright-v1"):
        assert 0 < spread(env_id, 0.15) < 0.3 * spread(env_id, 1.0), env_id
