"""The ManiSkill adapter: conventions, cameras, replay.  Tests marked `sim` run the simulator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest

from worldloop.engine.policy.scripted import SCRIPTS
from worldloop.errors import UserError
from worldloop.objects import locate_object
from worldloop.rl.envs.maniskill import ManiSkillEnv, _rotate
from worldloop.rl.envs.simulators import quat_to_rotvec
from worldloop.rl.envs.tasks import TASKS, task_preset

if TYPE_CHECKING:
    from tests.rl.conftest import Simulated

Pictures = npt.NDArray[np.uint8]
ALL_TASKS = sorted(name for name, task in TASKS.items() if task.simulator == "maniskill")
# Those that end with the object in full view.
DETECTED = ["LiftPegUpright-v1", "PullCube-v1", "PushCube-v1", "StackCube-v1"]


def quaternion(axis: list[float], angle: float) -> npt.NDArray[np.float64]:
    return np.array([np.cos(angle / 2), *(np.sin(angle / 2) * np.asarray(axis))])


def product(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    (w, *u), (v, *x) = a, b
    return np.array([w * v - np.dot(u, x), *(w * np.asarray(x) + v * np.asarray(u)
                     + np.cross(u, x))])  # fmt: skip


@pytest.mark.parametrize("angle", [-2.0, -0.5, 0.0, 1e-6, 0.7, 1.5])
@pytest.mark.parametrize("axis", [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0, -0.8]])
def test_rotation_vector_counts_from_gripper_down(axis: list[float], angle: float) -> None:
    down = np.array([0.0, 1, 0, 0])
    q = product(quaternion(axis, angle), down)
    for sign in (1, -1):  # both quaternions of a rotation
        np.testing.assert_allclose(quat_to_rotvec(sign * q), angle * np.array(axis), atol=1e-5)


def test_rotate() -> None:
    q = np.stack([quaternion([0, 0, 1], np.pi / 2), quaternion([0, 1, 0], np.pi / 2)])
    turned = _rotate(q, np.array([1.0, 0, 0]))
    np.testing.assert_allclose(turned, [[0, 1, 0], [0, 0, -1]], atol=1e-12)


def test_presets_tell_tasks_apart() -> None:
    assert len({preset.instruction for preset in TASKS.values()}) == len(TASKS) >= 11
    assert set(TASKS) == set(SCRIPTS)
    for env_id, preset in TASKS.items():
        assert preset.env_id == env_id and task_preset(env_id) is preset
        assert preset.horizon % 24 == 0
    with pytest.raises(ValueError, match="'TurnFaucet-v1'; known: PushCube-v1, PullCube-v1"):
        task_preset("TurnFaucet-v1")


def test_missing_simulator_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mani_skill", None)
    monkeypatch.setitem(sys.modules, "mani_skill.envs", None)
    with pytest.raises(UserError, match="not importable.*make setup-sim"):
        ManiSkillEnv("PushCube-v1")


@pytest.mark.sim
def test_missing_vulkan_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "data"
    done = subprocess.run(
        [sys.executable, "-m", "worldloop", "collect", "--env", "PushCube-v1", "--out", str(out)],
        env={**os.environ, "VK_ICD_FILENAMES": str(tmp_path / "none.json")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "worldloop: error" in line]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert "Vulkan" in errors[0] and "make setup-sim" in errors[0]
    assert not out.exists()


def colour_box(picture: Pictures, color: str, centre: npt.NDArray[np.float64]) -> tuple[int, int]:
    """Width and height in pixels of what has the colour near a point (column, row)."""
    red, green, blue = np.moveaxis(picture.astype(np.float32), -1, 0)
    strength = blue - np.maximum(red, green)
    if color == "red":
        strength = red - 2.2 * np.maximum(green, blue)
    row, column = np.mgrid[: picture.shape[0], : picture.shape[1]]
    near = np.hypot(column + 0.5 - centre[0], row + 0.5 - centre[1]) < 24
    mask = (strength > 18) & near
    return int(mask.any(0).sum()), int(mask.any(1).sum())


@pytest.mark.sim
@pytest.mark.parametrize("env_id", ALL_TASKS)
class TestRealEpisodes:
    def test_both_outcomes_over_one_horizon(
        self, simulated: Callable[[str], Simulated], env_id: str
    ) -> None:
        dataset = simulated(env_id).dataset
        assert sorted(dataset.success) == [False, True]
        for episode in dataset.stream():
            horizon = TASKS[env_id].horizon
            assert episode.frames.shape == (horizon + 1, 128, 128, 3)
            assert episode.actions.shape == (horizon, 7)
            assert episode.states.shape == (horizon + 1, 7)
            assert episode.instruction == TASKS[env_id].instruction
            assert set(episode.reward[-8:]) == {float(episode.success)}

    def test_replaying_the_actions_gives_the_same_flags(
        self, simulated: Callable[[str], Simulated], env_id: str
    ) -> None:
        dataset, env = simulated(env_id).dataset, simulated(env_id).env
        for episode in dataset.stream(frames=False):
            env.reset(episode.info["sim_seed"])
            np.testing.assert_allclose(env.objects(), episode.objects[0], atol=1e-6)
            flags = [env.step(action) for action in episode.actions]
            assert [float(flag) for flag in flags] == episode.reward.tolist()
            assert flags[-1] == episode.success
            np.testing.assert_allclose(env.state(), episode.states[-1], atol=1e-4)


@pytest.mark.sim
@pytest.mark.parametrize("env_id", DETECTED)
def test_object_is_where_its_pixels_say_and_large_enough(
    simulated: Callable[[str], Simulated], env_id: str
) -> None:
    color = TASKS[env_id].object_color
    for episode in simulated(env_id).dataset.stream():
        pixels = episode.object_pixels
        assert pixels.min() > 0 and pixels.max() < 128
        found = locate_object(episode.frames, color)
        assert np.isfinite(found).all(1).mean() > 0.8
        for t in (0, -1):  # the hand is away
            assert np.linalg.norm(found[t] - pixels[t, 0]) < 6
            assert min(colour_box(episode.frames[t], color, found[t])) >= 10


@pytest.mark.sim
def test_cameras_show_every_spawn(simulated: Callable[[str], Simulated]) -> None:
    """No object starts outside the picture, wherever in its spawn area it is."""
    for env_id in ("PushCube-v1", "PullCube-v1", "LiftPegUpright-v1"):
        env = simulated(env_id).env
        corners = [(x, y) for x in (-0.1, 0.1) for y in (-0.1, 0.1)]
        poses = np.array([[x, y, 0.02, 1, 0, 0, 0] for x, y in corners])
        pixels = env.object_pixels(poses)
        assert pixels.min() > 0 and pixels.max() < 128, env_id


@pytest.mark.sim
def test_controller_is_as_scripts_believe(simulated: Callable[[str], Simulated]) -> None:
    """Four tenths of a command in a step once the arm moves; rotation the other way round."""
    env = simulated("PushCube-v1").env
    env.reset(3)
    start = env.state()
    for _ in range(5):
        env.step(np.array([0.0, 0.5, 0, 0, 0, 0.5, 1], np.float32))
    moved = env.state() - start
    assert 0.07 < moved[1] < 0.11
    assert -0.13 < moved[5] < -0.06
    assert moved[6] > -0.1 and env.state()[6] > 0.9  # +1 opens the gripper


@pytest.mark.sim
def test_snapshot_is_rendered_as_it_was(simulated: Callable[[str], Simulated]) -> None:
    env = simulated("PushCube-v1").env
    env.reset(4)
    for _ in range(3):
        env.step(np.array([0.5, 0.3, -0.4, 0, 0, 0, -1], np.float32))
    seen, snapshot = env.render(), env.snapshot()
    for _ in range(5):
        env.step(np.array([-0.5, 0.3, 0.4, 0, 0, 0, -1], np.float32))
    assert np.abs(env.render().astype(int) - seen).mean() > 1
    again = env.render_snapshot(snapshot)
    assert seen.shape == (128, 128, 3) and seen.dtype == np.uint8
    assert np.abs(again.astype(int) - seen).mean() < 0.1


@pytest.mark.sim
@pytest.mark.parametrize("env_id", ["PickCube-v1", "StackPyramid-v1"])
def test_a_fresh_scene_is_what_the_camera_sees(env_id: str) -> None:
    """A scene built anew has a camera and markers of its own; those of the old one show nothing."""
    env = ManiSkillEnv(env_id, image_size=128)
    pictures = []
    for seed in (1, 2):
        env.reset(seed)
        first = env.render().astype(int)
        pixel = env.object_pixels(env.objects())[0]
        found = locate_object(first.astype(np.uint8), env.task.object_color)
        assert found is not None and np.abs(np.array(found) - pixel).max() < 4, (found, pixel)
        for _ in range(8):
            env.step(np.array([1, 0, -1, 0, 0, 0, 1], np.float32))
        assert np.abs(env.render() - first).mean() > 0.5  # the arm has moved
        pictures.append(first)
    assert np.abs(pictures[0] - pictures[1]).max() > 50  # cubes lie elsewhere
    if env_id == "PickCube-v1":  # whose goal ManiSkill hides
        for p in pictures:
            green = (p[..., 1] > 100) & (p[..., 0] < 60) & (p[..., 2] < 60)
            assert green.sum() > 10
    env.close()
