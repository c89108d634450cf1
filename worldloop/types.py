"""What every room speaks: frames, actions and their spec, chunks, rollouts, episodes.

Shape letters used in names all over the project:
B episodes, T frames or actions, V views, H W pixels, A action dim, F latent frames, N tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from worldloop.config import config_from_dict, config_to_dict

Frames = npt.NDArray[np.uint8]  # [B,T,V,H,W,3] at every public edge
Actions = npt.NDArray[np.float32]  # [B,T,A] in environment units

POSE_DIM = 7  # x y z (metres), rotation vector (radians), gripper in [-1, 1]


@dataclass(frozen=True)
class ControllerFit:
    """How a delta controller turns commands into motion: a short causal filter.

    The pose after action t moves by ``sum_k taps[k] * action[t-k]`` (metres for the first three
    components, radians for the next three). A PD arm reaches only part of a command within one
    control step and the rest in the following ones; the taps are fitted by least squares on
    recorded episodes, once per dataset, and travel with it.
    """

    position_taps: tuple[float, ...]
    rotation_taps: tuple[float, ...]
    position_rmse: float  # metres, pose after an episode's actions against the recorded pose
    rotation_rmse: float  # radians, likewise


@dataclass(frozen=True)
class ActionSpec:
    """What an action means. Stored in datasets and checkpoints, compared at construction.

    ``kind`` is ``delta_pose`` (what a policy emits) or ``absolute_pose`` (what the world model's
    action embedder takes, paper section 3.2). Rotations are rotation vectors in the world frame.
    ``gripper``: ``-1`` closes and ``+1`` opens when it is ``open_positive``.
    """

    dim: int = POSE_DIM
    names: tuple[str, ...] = ("x", "y", "z", "rx", "ry", "rz", "gripper")
    low: tuple[float, ...] = (-1.0,) * POSE_DIM
    high: tuple[float, ...] = (1.0,) * POSE_DIM
    kind: Literal["delta_pose", "absolute_pose"] = "delta_pose"
    rotation: Literal["rotation_vector"] = "rotation_vector"
    gripper: Literal["open_positive", "close_positive"] = "open_positive"
    control_hz: float = 20.0
    chunk: int = 24
    controller: ControllerFit | None = None
    # Normalisation of absolute poses before the action embedder, from the training episodes.
    pose_mean: tuple[float, ...] = (0.0,) * POSE_DIM
    pose_std: tuple[float, ...] = (1.0,) * POSE_DIM

    def __post_init__(self) -> None:
        for name in ("names", "low", "high", "pose_mean", "pose_std"):
            if len(getattr(self, name)) != self.dim:
                raise ValueError(
                    f"ActionSpec.{name} has {len(getattr(self, name))} entries; dim is {self.dim}"
                )
        if self.chunk < 1 or self.control_hz <= 0:
            raise ValueError("ActionSpec.chunk and control_hz must be positive")

    def differences(self, other: ActionSpec) -> list[str]:
        """Fields in which another spec means something else (statistics and fits excepted)."""
        meaning = ("dim", "names", "low", "high", "kind", "rotation", "gripper", "control_hz")
        return [
            f"{name}: {getattr(self, name)!r} here, {getattr(other, name)!r} there"
            for name in meaning
            if getattr(self, name) != getattr(other, name)
        ]

    def require_same(self, other: ActionSpec, here: str, there: str) -> None:
        """Raise one clear error when two parts disagree on what an action means."""
        found = self.differences(other)
        if found:
            raise ValueError(
                f"ActionSpec of {here} and {there} differ in {'; '.join(found)}. "
                "Use a checkpoint and data of the same kind, or convert the actions."
            )

    def check(self, actions_BTA: npt.NDArray[Any], name: str = "actions") -> Actions:
        """Return float32 ``[B,T,A]`` actions or raise, naming what is wrong."""
        actions = np.asarray(actions_BTA)
        if actions.ndim != 3 or actions.shape[-1] != self.dim:
            raise ValueError(
                f"{name} has shape {tuple(actions.shape)}; expected [B, T, {self.dim}] "
                f"({', '.join(self.names)})"
            )
        if actions.dtype.kind != "f":
            raise ValueError(f"{name} has dtype {actions.dtype}; expected a float array")
        if not np.isfinite(actions).all():
            b, t, a = (int(i) for i in np.argwhere(~np.isfinite(actions))[0])
            raise ValueError(
                f"{name}[{b},{t},{a}] ({self.names[a]}) is {actions[b, t, a]}; must be finite"
            )
        low, high = np.asarray(self.low), np.asarray(self.high)
        bad = (actions < low - 1e-4) | (actions > high + 1e-4)
        if bad.any():
            b, t, a = (int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"{name}[{b},{t},{a}] ({self.names[a]}) is {actions[b, t, a]:.4g}, outside "
                f"[{self.low[a]:g}, {self.high[a]:g}]; clip it to the ActionSpec's bounds"
            )
        return np.clip(actions, low, high).astype(np.float32)

    def to_absolute(
        self,
        actions_BTA: Actions,
        start_pose_BA: npt.NDArray[np.float32],
        history_BTA: Actions | None = None,
    ) -> npt.NDArray[np.float32]:
        """Absolute end-effector poses ``[B,T,7]`` after each action.

        ``start_pose_BA`` is the pose before the first action of ``actions_BTA``; ``history_BTA``
        holds the actions before it, which a lagging controller is still carrying out.
        An ``absolute_pose`` spec returns its actions unchanged.
        """
        if self.kind == "absolute_pose":
            return actions_BTA
        if self.controller is None:
            raise ValueError(
                "ActionSpec.controller is missing, so delta poses cannot be made absolute; "
                "fit it with `worldloop data stats`"
            )
        lag = self.lag
        pad = np.zeros((actions_BTA.shape[0], lag, self.dim), np.float32)
        if history_BTA is not None and history_BTA.shape[1]:
            keep = history_BTA[:, -lag:] if lag else history_BTA[:, :0]
            pad[:, lag - keep.shape[1] :] = keep
        padded = np.concatenate([pad, actions_BTA], 1)
        T = actions_BTA.shape[1]

        def moved(taps: tuple[float, ...], columns: slice) -> npt.NDArray[np.float32]:
            step = sum(
                tap * padded[:, lag - k : lag - k + T, columns] for k, tap in enumerate(taps)
            )
            return np.cumsum(step, axis=1, dtype=np.float64).astype(np.float32)

        pose = np.empty_like(actions_BTA)
        start = start_pose_BA[:, None]
        pose[..., :3] = start[..., :3] + moved(self.controller.position_taps, slice(0, 3))
        pose[..., 3:6] = start[..., 3:6] + moved(self.controller.rotation_taps, slice(3, 6))
        pose[..., 6] = actions_BTA[..., 6]
        return pose

    @property
    def lag(self) -> int:
        """How many past actions `to_absolute` needs: those a controller still carries out."""
        if self.kind == "absolute_pose" or self.controller is None:
            return 0
        return max(len(self.controller.position_taps), len(self.controller.rotation_taps)) - 1

    def to_dict(self) -> dict[str, Any]:
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ActionSpec:
        return config_from_dict(cls, values, "action_spec")


@dataclass(frozen=True)
class Starts:
    """Where B imagined episodes begin."""

    frames: Frames  # [B,1,V,H,W,3]
    poses: npt.NDArray[np.float32]  # [B,A] end-effector state, as ActionSpec names it
    instructions: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.frames) == len(self.poses) == len(self.instructions) > 0:
            raise ValueError(
                f"Starts has {len(self.frames)} frames, {len(self.poses)} poses and "
                f"{len(self.instructions)} instructions; expected one of each for every episode"
            )

    def select(self, rows: Sequence[int]) -> Starts:
        index = list(rows)
        chosen = tuple(self.instructions[row] for row in index)
        return Starts(self.frames[index], self.poses[index], chosen)


@dataclass(frozen=True)
class Chunk:
    """One generated chunk of T frames: what the world answers to T actions.

    ``frames`` is ``[B,T,V,H,W,3]`` uint8, ``[B,1,...]`` (the last frame) with
    ``decode="policy"``, or None with ``decode="none"``.
    """

    frames: Frames | None
    reward: npt.NDArray[np.float32]  # [B,T] in [0,1]
    success: npt.NDArray[np.bool_]  # [B,T] reward above the threshold
    terminated: npt.NDArray[np.bool_]  # [B]
    truncated: npt.NDArray[np.bool_]  # [B]


@dataclass(frozen=True)
class Episode:
    """One recorded episode: T+1 frames (the first before any action), T actions, T rewards."""

    frames: npt.NDArray[np.uint8]  # [T+1,H,W,3]
    actions: npt.NDArray[np.float32]  # [T,A]
    states: npt.NDArray[np.float32]  # [T+1,7] end-effector pose and gripper
    reward: npt.NDArray[np.float32]  # [T] 1 where the state after the action is a success
    instruction: str
    env_id: str
    seed: int
    success: bool
    objects: npt.NDArray[np.float32] | None = None  # [T+1,O,7] object poses, xyz + wxyz
    object_pixels: npt.NDArray[np.float32] | None = None  # [T+1,O,2] column, row of the centre
    info: dict[str, Any] = field(default_factory=dict)  # perturbation, style

    def __post_init__(self) -> None:
        T = len(self.actions)
        if len(self.frames) != T + 1 or len(self.states) != T + 1 or len(self.reward) != T:
            raise ValueError(
                f"Episode has {len(self.frames)} frames, {len(self.states)} states, {T} actions "
                f"and {len(self.reward)} rewards; expected T+1, T+1, T, T"
            )


@dataclass(frozen=True)
class Rollout:
    """Stacked chunks of B imagined episodes with what the policy did in them.

    ``frames`` is ``[B,1+T,V,H,W,3]`` (all decoded), ``[B,T/chunk,...]`` (what the policy saw: the
    start and the one after each chunk but the last) or None.
    """

    frames: Frames | None
    actions: Actions  # [B,T,A]
    reward: npt.NDArray[np.float32]  # [B,T]
    success: npt.NDArray[np.bool_]  # [B]
    valid: npt.NDArray[np.bool_]  # [B,T] False past the end of an episode
    seeds: npt.NDArray[np.int64]  # [B]
    group_id: npt.NDArray[np.int64]  # [B]
    instructions: tuple[str, ...]
    start_pose: npt.NDArray[np.float32]  # [B,7]
    action_tokens: npt.NDArray[np.int64] | None = None  # [B,T,A]
    logprobs: npt.NDArray[np.float32] | None = None  # [B,T,A]
    policy_version: int = 0
    timings: dict[str, float] = field(default_factory=dict)  # seconds by part

    def select(self, rows: npt.NDArray[Any]) -> Rollout:
        """The given rows (indices, or a bool mask [B]); timings are the whole rollout's."""
        index = np.arange(len(self.success))[rows]
        chosen: dict[str, Any] = {
            f.name: value[index]
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), np.ndarray)
        }
        return dataclasses.replace(
            self, instructions=tuple(self.instructions[i] for i in index), **chosen
        )

    @staticmethod
    def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
        """Rows of several rollouts of one policy; groups are numbered anew, timings added up.

        Raises ValueError where some have frames, tokens or log-probabilities and others not.
        """
        first, seconds, groups = rollouts[0], dict[str, float](), 0
        joined: dict[str, Any] = {}
        for f in dataclasses.fields(Rollout):
            values = [getattr(rollout, f.name) for rollout in rollouts]
            have = [isinstance(value, np.ndarray) for value in values]
            if any(have) and not all(have):
                raise ValueError(f"concatenate: only some of the rollouts have {f.name}")
            if all(have):
                joined[f.name] = np.concatenate(values)
        numbered = []
        for rollout in rollouts:
            _, own = np.unique(rollout.group_id, return_inverse=True)
            numbered.append(own.astype(np.int64) + groups)
            groups += int(own.max()) + 1
            for part, value in rollout.timings.items():
                seconds[part] = seconds.get(part, 0.0) + value
        joined["group_id"] = np.concatenate(numbered)
        texts = tuple(text for rollout in rollouts for text in rollout.instructions)
        return dataclasses.replace(first, instructions=texts, timings=seconds, **joined)
