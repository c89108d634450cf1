"""LIBERO's tasks (suites object, goal and spatial): state to script from, one RGB view.

LIBERO is imported when an environment is made, nowhere else. Its package (`make setup-libero`) has
the task files and the start states; the scene assets come from the hub, or from the folder that
WORLDLOOP_LIBERO_ASSETS names. Which tasks are scripted is in `worldloop.rl.envs.tasks`.
"""

from __future__ import annotations

import contextlib
import io
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from worldloop.errors import UserError
from worldloop.files import atomic_write_text
from worldloop.rl.envs.simulators import quat_to_rotvec
from worldloop.rl.envs.tasks import CameraPreset, task_preset

Array = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]

OWN_STARTS = 50  # seeds below lead to the benchmark's own start states, the others are drawn
SETTLE = 10  # control steps after a reset in which the objects come to rest and the hand opens
OPENING = 0.04  # metres between a finger and the middle when the hand is open


def assets_folder() -> Path:
    """Where the scene assets are; raises UserError where they are not."""
    named = os.environ.get("WORLDLOOP_LIBERO_ASSETS")
    folder = Path(named) if named else Path.home() / ".cache/libero/assets"
    if not (folder / "scenes").is_dir():
        raise UserError(
            f"LIBERO's scene assets are not in {folder} (no folder `scenes`): `make setup-libero` "
            "gets them from the hub, or name their folder in WORLDLOOP_LIBERO_ASSETS"
        )
    return folder


def _prepare(package: Path) -> None:
    """Write what LIBERO would ask for on standard input when imported; choose a way to render."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "worldloop/libero"
    path = Path(os.environ.setdefault("LIBERO_CONFIG_PATH", str(cache))) / "config.yaml"
    names = {"benchmark_root": ".", "bddl_files": "bddl_files", "init_states": "init_files",
             "datasets": "../datasets", "assets": "assets"}  # fmt: skip
    wanted = "".join(f'{key}: "{package / name}"\n' for key, name in names.items())
    # A user's own file is left as it is; ours may be of another environment's package.
    if not path.exists() or (path.parent == cache and path.read_text() != wanted):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, wanted)
    # EGL renders on a GPU or, through Mesa, on the CPU; without one GLFW would want a display.
    backend = os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("PYOPENGL_PLATFORM", backend)
    os.environ.setdefault("LP_NUM_THREADS", "1")  # several collectors must not fight for the cores


def _look_at(camera: CameraPreset) -> Double:
    """Axes [3,3] of the camera as columns in the world: right, up, backwards."""
    back = np.array(camera.eye) - camera.target
    right = np.cross([0.0, 0.0, 1.0], back)
    axes = np.stack([right, np.cross(back, right), back], 1)
    return axes / np.linalg.norm(axes, axis=0)


class LiberoEnv:
    """A `Simulator` of one LIBERO task: the Panda arm under OSC_POSE at 20 Hz.

    A command of 1 asks for 0.05 m (0.5 rad) and moves about 13 mm a step. Raises UserError where
    LIBERO or its assets are not installed, or nothing can be rendered.
    """

    def __init__(self, env_id: str, image_size: int = 128, camera: CameraPreset | None = None):
        self.task = task_preset(env_id)
        self.camera = camera or self.task.camera
        self.image_size = image_size
        found = find_spec("libero")
        if found is None or found.origin is None:
            raise UserError("LIBERO is not installed; install it with `make setup-libero`")
        package = Path(found.origin).parent / "libero"
        assets = assets_folder()
        _prepare(package)
        suite, name = self.task.options["suite"], self.task.options["name"]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                import libero.libero
                from libero.libero.envs import OffScreenRenderEnv
                from robosuite.utils import transform_utils
                from robosuite.utils.errors import RandomizationError

            libero.libero._assets_path_cache = str(assets)
            self._sampling_failed = RandomizationError
            # The wrapper is left aside: its reset() swallows every error, Ctrl-C as well.
            self._env = OffScreenRenderEnv(
                bddl_file_name=str(package / "bddl_files" / suite / f"{name}.bddl"),
                use_camera_obs=False,
                camera_heights=image_size,
                camera_widths=image_size,
                hard_reset=False,  # the scene stays, objects are placed anew: 0.1 s, not 5
                ignore_done=True,
            ).env
        except (ImportError, RuntimeError) as error:  # what EGL raises is an ImportError, too
            raise UserError(
                f"LIBERO does not start here ({str(error).strip()}); `make setup-libero` installs "
                "it and a way to render without a display"
            ) from error
        self._sim = self._env.sim
        self._quat = transform_utils.mat2quat
        self._robot = self._env.robots[0]
        self._starts = self._load_starts(package / "init_files" / suite / f"{name}.pruned_init")
        self._aim_camera()
        self.reset(0)
        self.render()

    @staticmethod
    def _load_starts(path: Path) -> Double:
        """The benchmark's own start states [50,S]: time, positions and velocities."""
        import torch
        from numpy._core.multiarray import _reconstruct
        from numpy.dtypes import Float64DType

        # The file is a pickled numpy array; nothing but what an array needs is let in.
        allowed: list[Any] = [(_reconstruct, "numpy.core.multiarray._reconstruct"),
                   (_reconstruct, "numpy._core.multiarray._reconstruct"),
                   np.ndarray, np.dtype, Float64DType]  # fmt: skip
        with torch.serialization.safe_globals(allowed):
            states: Double = torch.load(path, weights_only=True)
        return states

    def _aim_camera(self) -> None:
        """Put LIBERO's `agentview` where ours is."""
        model = self._sim.model
        number = model.camera_name2id("agentview")
        self._axes = _look_at(self.camera)
        x, y, z, w = self._quat(self._axes)
        model.cam_pos[number] = self.camera.eye
        model.cam_quat[number] = (w, x, y, z)
        model.cam_fovy[number] = np.degrees(self.camera.fov)

    def reset(self, seed: int) -> None:
        """Place the objects as the seed says: below 50 as the benchmark does, else drawn anew."""
        if seed < OWN_STARTS:
            self._place(0)  # fixtures, which a state does not hold, are where the benchmark's are
            self._sim.set_state_from_flattened(self._starts[seed])
            self._sim.forward()
            self._settle()
            return
        for try_ in range(100):
            self._place((seed, try_))
            drawn = self._places()
            self._settle()
            # LIBERO may draw objects into one another; physics then throws them apart.
            if np.linalg.norm(self._places()[:, :2] - drawn[:, :2], axis=1).max() < 0.01:
                return
        raise RuntimeError(f"{self.task.env_id}: no start at rest in 100 draws from seed {seed}")

    def _place(self, seed: int | tuple[int, int]) -> None:
        """LIBERO's own reset; it draws from numpy's global generator, which is given back."""
        before = np.random.get_state()
        try:
            np.random.seed(seed)
            while True:
                with contextlib.suppress(self._sampling_failed):
                    self._env.reset()
                    return
        finally:
            np.random.set_state(before)

    def _places(self) -> Double:
        """Where all that can be moved is [N,3]."""
        places: Double = self._sim.data.body_xpos[
            [self._env.obj_body_id[name] for name in self._env.objects_dict]
        ]
        return places

    def _settle(self) -> None:
        """Let objects come to rest and the hand open."""
        for _ in range(SETTLE):
            self.step(np.array([0, 0, 0, 0, 0, 0, 1], np.float32))

    def step(self, action: Array) -> bool:
        """Apply one OSC_POSE action [7] in [-1,1]; return the simulator's success flag.

        LIBERO's own gripper command is the other way round: -1 opens there.
        """
        command = np.asarray(action, np.float64) * [1, 1, 1, 1, 1, 1, -1]
        success = bool(self._env.step(command)[2])
        # MuJoCo leaves bodies where they were before the last of its own steps (2 ms); a state that
        # is restored to be drawn has them where its joints say, and pictures are to be the same.
        self._sim.forward()
        return success

    def tcp(self) -> Double:
        """Tool centre point in the world: x y z and quaternion w x y z."""
        site = self._robot.eef_site_id
        # Columns of the site's axes: its x is the hand's y, across which the fingers close.
        axes = self._sim.data.site_xmat[site].reshape(3, 3) @ [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
        x, y, z, w = self._quat(axes)
        return np.array([*self._sim.data.site_xpos[site], w, x, y, z])

    def state(self) -> Array:
        """End-effector state [7]: position, rotation vector, gripper opening in [-1, 1]."""
        pose = self.tcp()
        fingers = self._sim.data.qpos[self._robot._ref_gripper_joint_pos_indexes]
        opening = float(np.abs(fingers).mean()) / OPENING
        return np.concatenate(
            [pose[:3], quat_to_rotvec(pose[3:]), [2 * opening - 1]], dtype=np.float32
        )

    def objects(self) -> Array:
        """Poses [O,7] (x y z, w x y z) of the task's tracked objects."""
        bodies = [self._env.obj_body_id[name] for name in self.task.objects]
        data = self._sim.data
        return np.concatenate(
            [data.body_xpos[bodies], data.body_xquat[bodies]], 1, dtype=np.float32
        )

    def goal(self) -> Array | None:
        """Where the moved object must come to [3]; None where the outcome is no distance."""
        if self.task.goal is None:
            return None
        return self._sim.data.body_xpos[self._env.obj_body_id[self.task.goal]].astype(np.float32)

    def object_pixels(self, poses_O7: npt.NDArray[Any]) -> Array:
        """Pixel coordinates [O,2] (column, row) of the origins of objects at these poses."""
        return self.project(poses_O7[:, :3])

    def project(self, points_O3: npt.NDArray[Any]) -> Array:
        """Pixel coordinates [O,2] (column, row) of world points."""
        right, up, back = ((points_O3 - np.array(self.camera.eye)) @ self._axes).T
        half = self.image_size / 2
        focal = half / np.tan(self.camera.fov / 2)
        pixels: Array = np.stack([half - focal * right / back, half + focal * up / back], 1).astype(
            np.float32
        )
        return pixels

    def snapshot(self) -> Double:
        state: Double = self._sim.get_state().flatten()
        return state

    def render_snapshot(self, snapshot: Double) -> npt.NDArray[np.uint8]:
        self._sim.set_state_from_flattened(snapshot)
        self._sim.forward()
        return self.render()

    def render(self) -> npt.NDArray[np.uint8]:
        """The camera's RGB picture [H,W,3] of the present state."""
        size = self.image_size
        picture: npt.NDArray[np.uint8] = self._sim.render(
            camera_name="agentview", width=size, height=size
        )
        return picture[::-1].copy()  # OpenGL's first row is the lowest

    def close(self) -> None:
        self._env.close()
