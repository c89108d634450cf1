"""ManiSkill3 table-top tasks: state to script from, one RGB view to learn from.

The simulator is imported when an environment is made, nowhere else. The tasks themselves are in
`worldloop.rl.envs.tasks`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from worldloop.errors import UserError
from worldloop.rl.envs.tasks import TASKS, CameraPreset, task_preset
from worldloop.rl.envs.vector import ChunkVectorEnv, Ints, RowsBegun, RowsPlayed
from worldloop.types import Actions, ActionSpec

__all__ = ["TASKS", "ManiSkillEnv", "ManiSkillVectorEnv", "own_sequence", "quat_to_rotvec",
           "reset_in_view", "task_preset"]  # fmt: skip

Array = npt.NDArray[np.float32]


def _find_software_vulkan() -> None:
    """Point the Vulkan loader at lavapipe where the user has not chosen a driver."""
    # A software renderer with a thread a core gets in its own way when several collect.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if os.environ.get("VK_ICD_FILENAMES") or os.environ.get("VK_DRIVER_FILES"):
        return
    for folder in ("/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d"):
        if not os.path.isdir(folder):
            continue
        names = sorted(os.listdir(folder))
        if any("nvidia" in name for name in names):
            return
        for name in names:
            if name.startswith("lvp_icd"):
                os.environ["VK_ICD_FILENAMES"] = os.path.join(folder, name)
                return


def quat_to_rotvec(q_wxyz: npt.NDArray[Any]) -> Array:
    """Rotation vector of the rotation that takes the gripper-down pose to ``q_wxyz``.

    Gripper-down (quaternion 0 1 0 0) is the origin, so ordinary poses stay far from the
    rotation vector's singularity at pi.
    """
    w, x, y, z = np.moveaxis(np.asarray(q_wxyz, np.float64), -1, 0)
    # q * conj(q_down) with q_down = (0, 1, 0, 0)
    rel = np.stack([x, -w, -z, y], -1)
    rel *= np.where(rel[..., :1] < 0, -1.0, 1.0)
    norm = np.linalg.norm(rel[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(norm, rel[..., :1])
    scale = np.where(norm > 1e-9, angle / np.maximum(norm, 1e-9), 2.0)
    return (rel[..., 1:] * scale).astype(np.float32)


def _rotate(q_wxyz: npt.NDArray[Any], vector_3: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The vector turned by each unit quaternion [O,4]: [O,3]."""
    w, axis = q_wxyz[:, :1], q_wxyz[:, 1:]
    twice: npt.NDArray[Any] = 2 * np.cross(axis, vector_3)
    return vector_3 + w * twice + np.cross(axis, twice)


class ManiSkillEnv:
    """One simulated episode at a time, on this CPU: reset, step, look.

    Stepping does not render: a scripted attempt can be screened at state speed and only the kept
    one be drawn, from its saved states (``snapshot`` / ``render_snapshot``). Raises UserError where
    the simulator is not installed or cannot render.
    """

    def __init__(self, env_id: str, image_size: int = 128, camera: CameraPreset | None = None):
        self.task = task_preset(env_id)
        self.camera = camera or self.task.camera
        self.image_size = image_size
        _find_software_vulkan()
        try:
            import gymnasium as gym
            import mani_skill.envs  # noqa: F401  (registers the tasks)
            from mani_skill.utils import sapien_utils
        except ImportError as error:
            raise UserError(
                f"ManiSkill is not importable ({error}); install it with `make setup-sim`"
            ) from error
        try:
            self._env = gym.make(
                env_id,
                obs_mode="none",
                control_mode="pd_ee_delta_pose",
                sim_backend="cpu",
                render_backend="cpu",
                robot_uids=self.task.robot,
                sensor_configs={
                    "base_camera": {
                        "width": image_size,
                        "height": image_size,
                        "fov": self.camera.fov,
                        "pose": sapien_utils.look_at(self.camera.eye, self.camera.target),
                    }
                },
                max_episode_steps=100_000,
                **self.task.options,
            )
            self._env.reset(seed=0)
            self._sim = self._env.unwrapped
            self._sensor = self._sim._sensors["base_camera"]
            for marker in self._sim._hidden_objects:  # such as the goal of PickCube
                marker.show_visual()
            self._has_gripper = self._env.action_space.shape[-1] == len(ActionSpec().names)
            self.render()
        except RuntimeError as error:
            raise UserError(
                f"ManiSkill cannot render here ({error}); it needs a Vulkan driver with "
                "descriptor indexing: `make setup-sim` installs Mesa's software one"
            ) from error

    def reset(self, seed: int) -> None:
        self._env.reset(seed=seed, options={"reconfigure": self.task.fresh_scene})

    def step(self, action: Array) -> bool:
        """Apply one ``pd_ee_delta_pose`` action [7] in [-1,1]; return the success flag.

        A robot with a stick for a hand does nothing with the gripper's command.
        """
        command = np.asarray(action, np.float32)
        info = self._env.step(command if self._has_gripper else command[:-1])[-1]
        return bool(info["success"].item())

    def tcp(self) -> npt.NDArray[np.float64]:
        """Tool centre point in the world: x y z and quaternion w x y z."""
        return self._sim.agent.tcp.pose.raw_pose[0].numpy().astype(np.float64)

    def state(self) -> Array:
        """End-effector state [7]: position, rotation vector, gripper opening in [-1, 1].

        The opening of a stick is -1.
        """
        pose = self.tcp()
        opening = 0.0
        if self._has_gripper:
            opening = float(self._sim.agent.robot.get_qpos()[0, -2:].mean()) / 0.04
        return np.concatenate(
            [pose[:3], quat_to_rotvec(pose[3:]), [2 * opening - 1]], dtype=np.float32
        )

    def objects(self) -> Array:
        """Poses [O,7] (x y z, w x y z) of the task's tracked objects."""
        found = [getattr(self._sim, name) for name in self.task.objects]
        poses = [getattr(value, "pose", value).raw_pose[0].numpy() for value in found]
        return np.stack(poses).astype(np.float32)

    def goal(self) -> Array | None:
        """Where the moved object must come to [3]; None where the outcome is no distance."""
        if self.task.goal_at is not None:
            return np.array(self.task.goal_at, np.float32)
        if self.task.goal is None:
            return None
        return getattr(self._sim, self.task.goal).pose.p[0].numpy().astype(np.float32)

    def object_pixels(self, poses_O7: npt.NDArray[Any]) -> Array:
        """Pixel coordinates [O,2] (column, row) of the tracked point of objects at these poses."""
        points = poses_O7[:, :3]
        if any(self.task.tracked_point):
            points = points + _rotate(poses_O7[:, 3:], np.array(self.task.tracked_point))
        return self.project(points)

    def project(self, points_O3: npt.NDArray[Any]) -> Array:
        """Pixel coordinates [O,2] (column, row) of world points."""
        params = self._sensor.get_params()
        extrinsic = params["extrinsic_cv"][0].numpy()
        intrinsic = params["intrinsic_cv"][0].numpy()
        seen = points_O3 @ extrinsic[:, :3].T + extrinsic[:, 3]
        pixel = seen @ intrinsic.T
        return (pixel[:, :2] / pixel[:, 2:]).astype(np.float32)

    def snapshot(self) -> Any:
        return self._sim.get_state_dict()

    def render_snapshot(self, snapshot: Any) -> npt.NDArray[np.uint8]:
        self._sim.set_state_dict(snapshot)
        return self.render()

    def render(self) -> npt.NDArray[np.uint8]:
        """The camera's RGB picture [H,W,3] of the present state."""
        self._sim.scene.update_render()
        self._sensor.capture()
        picture = self._sensor.get_obs(rgb=True, depth=False, position=False, segmentation=False)
        rgb: npt.NDArray[np.uint8] = picture["rgb"][0].numpy()
        return rgb

    def close(self) -> None:
        self._env.close()


def reset_in_view(env: ManiSkillEnv, seeds: Iterable[int], solvable: bool = False) -> int:
    """Reset with one seed after the other until every object starts where the camera shows it.

    solvable: and the moved one where the task can be done from (`TaskPreset.solvable_x`).
    Returns the seed used; RuntimeError after 1000 of them.
    """
    view, farthest = env.task.in_view, env.task.solvable_x
    for seed in itertools.islice(seeds, 1000):
        env.reset(seed)
        at = env.objects()[:, :2]
        seen = view is None or (np.abs(at) < view).all()
        if seen and not (solvable and farthest is not None and at[0, 0] > farthest):
            return seed
    raise RuntimeError(f"{env.task.env_id}: no start within {env.task.in_view} in 1000 resets")


class ManiSkillVectorEnv(ChunkVectorEnv):
    """Episodes of one task in B simulators, one after the other; a start is an integer seed.

    A seed whose objects the camera shows badly, or from which the task cannot be done, leads to
    the next one of its own sequence (`reset_in_view`). A picture is rendered after each chunk,
    none in between. Success: the simulator's flag held for ``held_frames`` consecutive control
    steps (2 is the world model's rule, 1 the simulator's); with ``stop_on_success`` nothing is
    simulated after it.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int = 1,
        *,
        horizon: int = 72,
        image_size: int = 128,
        held_frames: int = 2,
        stop_on_success: bool = True,
        action_spec: ActionSpec | None = None,
        simulator: Callable[[str, int], ManiSkillEnv] = ManiSkillEnv,
    ) -> None:
        spec = action_spec or ActionSpec()
        ActionSpec().require_same(spec, "the simulator", "the environment")
        if held_frames < 1:
            raise UserError(f"held_frames is {held_frames}; expected at least 1")
        self.simulators: list[ManiSkillEnv] = []
        super().__init__(
            spec,
            (image_size, image_size),
            num_envs=num_envs,
            horizon=horizon,
            stop_on_success=stop_on_success,
        )
        self.task, self.held_frames = task_preset(env_id), held_frames
        for _ in range(num_envs):
            self.simulators.append(simulator(env_id, image_size))
        self._high = np.zeros(num_envs, np.int64)  # consecutive steps with the flag up

    def _begin(self, rows: Sequence[int], starts: Ints, seeds: Sequence[int]) -> RowsBegun:
        for row, start in zip(rows, starts, strict=True):
            reset_in_view(self.simulators[row], own_sequence(int(start)), solvable=True)
            self._high[row] = 0
        sims = [self.simulators[row] for row in rows]
        return RowsBegun(
            np.stack([sim.render() for sim in sims]),
            np.stack([sim.state() for sim in sims]),
            (self.task.instruction,) * len(rows),
        )

    def _advance(self, rows: Sequence[int], actions_RTA: Actions) -> RowsPlayed:
        R, T = actions_RTA.shape[:2]
        reward, played = np.zeros((R, T), np.float32), np.zeros(R, np.int64)
        success = np.zeros((R, T), bool)
        for i, row in enumerate(rows):
            for t, action in enumerate(actions_RTA[i]):
                flag = self.simulators[row].step(action)
                self._high[row] = self._high[row] + 1 if flag else 0
                reward[i, t], success[i, t] = flag, self._high[row] >= self.held_frames
                played[i] += 1
                if success[i, t] and self.stop_on_success:
                    break
        sims = [self.simulators[row] for row in rows]
        frames, poses = np.stack([s.render() for s in sims]), np.stack([s.state() for s in sims])
        return RowsPlayed(frames, poses, reward, success, played)

    def _draw_starts(self, count: int) -> Ints:
        drawn: Ints = self.np_random.integers(2**31, size=count)
        return drawn

    def _check_starts(self, starts: Ints) -> None:
        if ((starts < 0) | (starts >= 2**31)).any():
            raise UserError(f"starts is {starts.tolist()}; expected seeds 0 .. {2**31 - 1}")

    def close_extras(self, **kwargs: Any) -> None:
        """Close the simulators."""
        for simulator in self.simulators:
            simulator.close()


def own_sequence(start: int) -> Iterable[int]:
    """The seed itself, then others that depend on it alone."""
    yield start
    rng = np.random.default_rng([start, 1])
    while True:
        yield int(rng.integers(2**31))
