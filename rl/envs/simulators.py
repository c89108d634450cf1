"""What simulators have in common: the interface, starts by seed, B of them behind gymnasium's.

A simulator is imported when an environment of it is made, nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from worldloop.errors import UserError
from worldloop.registry import Table, resolve
from worldloop.rl.envs.tasks import CameraPreset, TaskPreset, task_preset
from worldloop.rl.envs.vector import ChunkVectorEnv, Ints, RowsBegun, RowsPlayed
from worldloop.types import Actions, ActionSpec

Array = npt.NDArray[np.float32]

SIMULATORS = Table(
    "simulator",
    {
        "maniskill": "worldloop.rl.envs.maniskill:ManiSkillEnv",
        "libero": "worldloop.rl.envs.libero:LiberoEnv",
    },
)


class Simulator(Protocol):
    """One simulated episode at a time, on this CPU: reset, step, look.

    Stepping does not render: a scripted attempt can be screened at state speed and only the kept
    one be drawn, from its saved states (``snapshot`` / ``render_snapshot``). Actions are those of
    the default `ActionSpec`; metres and radians are of the simulator's world frame.
    """

    task: TaskPreset
    camera: CameraPreset
    image_size: int

    def reset(self, seed: int) -> None: ...

    def step(self, action: Array) -> bool:
        """Apply one action [7] in [-1,1]; return the simulator's success flag."""
        ...

    def tcp(self) -> npt.NDArray[np.float64]:
        """Tool centre point in the world: x y z and quaternion w x y z, (0 1 0 0) is down."""
        ...

    def state(self) -> Array:
        """End-effector state [7]: position, rotation vector, gripper opening in [-1, 1]."""
        ...

    def objects(self) -> Array:
        """Poses [O,7] (x y z, w x y z) of the task's tracked objects."""
        ...

    def goal(self) -> Array | None:
        """Where the moved object must come to [3]; None where the outcome is no distance."""
        ...

    def object_pixels(self, poses_O7: npt.NDArray[Any]) -> Array:
        """Pixel coordinates [O,2] (column, row) of the tracked point of objects at these poses."""
        ...

    def snapshot(self) -> Any: ...

    def render_snapshot(self, snapshot: Any) -> npt.NDArray[np.uint8]: ...

    def render(self) -> npt.NDArray[np.uint8]:
        """The camera's RGB picture [H,W,3] of the present state."""
        ...

    def close(self) -> None: ...


def make_simulator(
    env_id: str, image_size: int = 128, camera: CameraPreset | None = None
) -> Simulator:
    """The simulator of a task, ready to be reset.

    camera: instead of the task's own. Raises UserError where the simulator is not installed or
    cannot render, ValueError for an unknown task.
    """
    return resolve(SIMULATORS, task_preset(env_id).simulator)(env_id, image_size, camera)


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


def reset_in_view(env: Simulator, seeds: Iterable[int], solvable: bool = False) -> int:
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


class SimulatorVectorEnv(ChunkVectorEnv):
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
        simulator: Callable[[str, int], Simulator] = make_simulator,
    ) -> None:
        spec = action_spec or ActionSpec()
        ActionSpec().require_same(spec, "the simulator", "the environment")
        if held_frames < 1:
            raise UserError(f"held_frames is {held_frames}; expected at least 1")
        self.simulators: list[Simulator] = []
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
