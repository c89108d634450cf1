"""ManiSkill3 table-top tasks: state to script from, one RGB view to learn from.

The simulator is imported when an environment is made, nowhere else. The tasks themselves are in
`worldloop.rl.envs.tasks`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from worldloop.errors import UserError
from worldloop.rl.envs.simulators import quat_to_rotvec
from worldloop.rl.envs.tasks import CameraPreset, task_preset
from worldloop.types import ActionSpec

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


def _rotate(q_wxyz: npt.NDArray[Any], vector_3: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The vector turned by each unit quaternion [O,4]: [O,3]."""
    w, axis = q_wxyz[:, :1], q_wxyz[:, 1:]
    twice: npt.NDArray[Any] = 2 * np.cross(axis, vector_3)
    return vector_3 + w * twice + np.cross(axis, twice)


class ManiSkillEnv:
    """A `Simulator` of one ManiSkill task.

    Raises UserError where ManiSkill is not installed or cannot render.
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
            self._sim = self._env.unwrapped
            self.reset(0)
            self._has_gripper = self._env.action_space.shape[-1] == len(ActionSpec().names)
            self.render()
        except RuntimeError as error:
            raise UserError(
                f"ManiSkill cannot render here ({error}); it needs a Vulkan driver with "
                "descriptor indexing: `make setup-sim` installs Mesa's software one"
            ) from error

    def reset(self, seed: int) -> None:
        self._env.reset(seed=seed, options={"reconfigure": self.task.fresh_scene})
        # Of this scene: a fresh one has a camera and markers of its own.
        self._sensor = self._sim._sensors["base_camera"]
        for marker in self._sim._hidden_objects:  # such as the goal of PickCube
            marker.show_visual()

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
