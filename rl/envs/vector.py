"""What every environment of ours is: rows side by side, one step a chunk of actions.

A gymnasium ``VectorEnv`` without autoreset: a finished row is frozen (it shows the same picture,
earns nothing and keeps its flags) until ``reset`` with ``options={"reset_mask": ...}`` begins it
again; the other rows go on untouched.

Shape letters: B rows of the environment, R rows that act, T actions of a chunk, H W pixels,
A action dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from worldloop.engine.sampler import derive_seed
from worldloop.errors import UserError
from worldloop.types import Actions, ActionSpec

Pictures = npt.NDArray[np.uint8]  # [R,H,W,3]
Float = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Obs = dict[str, npt.NDArray[Any]]
Infos = dict[str, npt.NDArray[Any]]

OPTIONS = ("reset_mask", "starts")


@dataclass(frozen=True)
class RowsBegun:
    """What R rows show before their first action."""

    frames: Pictures  # [R,H,W,3]
    poses: Float  # [R,A]
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class RowsPlayed:
    """What R rows answer to a chunk of T actions.

    ``played`` counts the actions that were carried out: fewer than T where a row stopped early.
    Rewards and successes after those are 0.
    """

    frames: Pictures  # [R,H,W,3] after the last action carried out
    poses: Float  # [R,A] likewise
    reward: Float  # [R,T] in [0,1]
    success: Bool  # [R,T]
    played: Ints  # [R]


class ChunkVectorEnv(VectorEnv, ABC):  # type: ignore[misc]
    """B independent episodes; a subclass begins rows (`_begin`) and plays chunks (`_advance`).

    An action is a chunk [T,A] in the ActionSpec's units and bounds. An observation has "frame"
    (uint8 [H,W,3]) and "pose" (float32 [A]: metres, rotation vector, gripper). Rows that were
    never begun count as truncated and show a black picture.

    infos of ``reset`` and ``step``, all [B]: "instruction" (str), "start" (which start the row
    began from, -1 for none), "chunk" (chunks played), "steps" (control steps until the first
    success, or so far), "success" (so far). ``step`` adds "reward_frames" and "success_frames"
    [B,T], and "played" [B] (actions of this chunk that were carried out).
    """

    metadata: dict[str, Any] = {
        "autoreset_mode": AutoresetMode.DISABLED,
        "render_modes": ["rgb_array"],
    }
    render_mode = "rgb_array"

    def __init__(
        self,
        action_spec: ActionSpec,
        picture: tuple[int, int],
        *,
        num_envs: int,
        horizon: int,
        stop_on_success: bool,
    ) -> None:
        chunk, dim = action_spec.chunk, action_spec.dim
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}; expected at least 1")
        if horizon < chunk or horizon % chunk:
            raise UserError(f"horizon is {horizon}; expected a multiple of {chunk}, the chunk")
        self.action_spec, self.num_envs, self.horizon = action_spec, num_envs, horizon
        self.stop_on_success = stop_on_success
        self.metadata = {**self.metadata, "render_fps": action_spec.control_hz / chunk}
        low, high = (
            np.tile(np.asarray(bound, np.float32), (chunk, 1))
            for bound in (action_spec.low, action_spec.high)
        )
        self.single_action_space = spaces.Box(low, high, dtype=np.float32)
        self.single_observation_space = spaces.Dict(
            {
                "frame": spaces.Box(0, 255, (*picture, 3), np.uint8),
                "pose": spaces.Box(-np.inf, np.inf, (dim,), np.float32),
            }
        )
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        B = num_envs
        self._frames: Pictures = np.zeros((B, *picture, 3), np.uint8)
        self._poses: Float = np.zeros((B, dim), np.float32)
        self._instructions = [""] * B
        self._starts: Ints = np.full(B, -1, np.int64)
        self._chunks: Ints = np.zeros(B, np.int64)
        self._steps: Ints = np.zeros(B, np.int64)
        self._success: Bool = np.zeros(B, bool)
        self._terminated: Bool = np.zeros(B, bool)
        self._truncated: Bool = np.ones(B, bool)  # nothing has begun

    # ------------------------------------------------------------ what a subclass gives

    @abstractmethod
    def _begin(self, rows: Sequence[int], starts: Ints, seeds: Sequence[int]) -> RowsBegun:
        """Begin these rows afresh from these starts [R], with these seeds."""

    @abstractmethod
    def _advance(self, rows: Sequence[int], actions_RTA: Actions) -> RowsPlayed:
        """Play one chunk in these rows."""

    @abstractmethod
    def _draw_starts(self, count: int) -> Ints:
        """Starts [count] from ``np_random``."""

    @abstractmethod
    def _check_starts(self, starts: Ints) -> None:
        """Raise UserError for a start that there is not."""

    # ------------------------------------------------------------ gymnasium

    @property
    def finished(self) -> Bool:
        """[B]: terminated or truncated (or never begun)."""
        return self._terminated | self._truncated

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Obs, Infos]:
        """Begin the rows of the mask (all without one); the others are left alone.

        seed: what a row's randomness depends on, one for each of the B rows, or an int n for
        n, n+1, ...; it also seeds ``np_random``. Without it rows draw theirs from ``np_random``.
        options: "reset_mask" bool [B]; "starts" int [B], the start of each row (those outside the
        mask are not looked at), without which ``np_random`` draws them.
        """
        mask, wanted = self._read_options(dict(options or {}))
        rows = [int(row) for row in np.flatnonzero(mask)]
        seeds = self._row_seeds(seed, rows)
        if wanted is None:
            starts = self._draw_starts(len(rows))
        else:
            starts = wanted[rows]
            self._check_starts(starts)
        begun = self._begin(rows, starts, seeds)
        self._frames[rows], self._poses[rows] = begun.frames, begun.poses
        for row, text in zip(rows, begun.instructions, strict=True):
            self._instructions[row] = text
        self._starts[rows] = starts
        for flags in (self._chunks, self._steps, self._success, self._terminated, self._truncated):
            flags[rows] = 0
        return self._observation(), self._infos()

    def step(self, actions: npt.NDArray[Any]) -> tuple[Obs, Float, Bool, Bool, Infos]:
        """Play a chunk [B,T,A] in every row that is not finished.

        Reward is 1 on the step at which success first appears, else 0. Raises UserError when
        every row is finished, or for actions of another shape or outside their bounds.
        """
        finished = self.finished
        if finished.all():
            raise UserError(
                "step: every row is finished or was never begun; call reset first "
                '(options={"reset_mask": ...} chooses rows)'
            )
        shape = (self.num_envs, self.action_spec.chunk, self.action_spec.dim)
        given = np.asarray(actions)
        if given.shape != shape:
            raise UserError(f"actions has shape {list(given.shape)}; expected {list(shape)}")
        frozen = finished[:, None, None]  # whatever is said to a frozen row is not looked at
        try:
            checked = self.action_spec.check(np.where(frozen, given.dtype.type(0), given))
        except ValueError as error:
            raise UserError(str(error)) from error
        rows = [int(row) for row in np.flatnonzero(~finished)]
        out = self._advance(rows, checked[rows])

        B, T = shape[:2]
        reward, reward_frames = np.zeros(B, np.float32), np.zeros((B, T), np.float32)
        success_frames, played = np.zeros((B, T), bool), np.zeros(B, np.int64)
        reward_frames[rows], success_frames[rows] = out.reward, out.success
        played[rows] = out.played
        self._frames[rows], self._poses[rows] = out.frames, out.poses
        first = success_frames.any(1) & ~self._success
        reward[first] = 1
        until = np.where(first, success_frames.argmax(1) + 1, played)
        self._steps += np.where(self._success, 0, until)
        self._success |= first
        self._chunks[rows] += 1
        if self.stop_on_success:
            self._terminated |= self._success
        self._truncated |= (self._chunks * T >= self.horizon) & ~self._terminated
        infos = self._infos()
        infos |= {
            "reward_frames": reward_frames, "success_frames": success_frames, "played": played,
        }  # fmt: skip
        return self._observation(), reward, self._terminated.copy(), self._truncated.copy(), infos

    def render(self) -> tuple[Pictures, ...]:
        """The present picture [H,W,3] of every row."""
        return tuple(self._frames.copy())

    # ------------------------------------------------------------ parts

    def _observation(self) -> Obs:
        return {"frame": self._frames.copy(), "pose": self._poses.copy()}

    def _infos(self) -> Infos:
        return {
            "instruction": np.array(self._instructions, object),  # as gymnasium groups them
            "start": self._starts.copy(),
            "chunk": self._chunks.copy(),
            "steps": self._steps.copy(),
            "success": self._success.copy(),
        }

    def _read_options(self, options: dict[str, Any]) -> tuple[Bool, Ints | None]:
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            raise UserError(f"reset: unknown option {unknown[0]!r}; known: {', '.join(OPTIONS)}")
        B = self.num_envs
        mask = options.get("reset_mask")
        mask = np.ones(B, bool) if mask is None else np.asarray(mask)
        if mask.dtype != np.bool_ or mask.shape != (B,) or not mask.any():
            raise UserError(
                f"reset_mask is {mask.dtype} {list(mask.shape)} with {int(mask.astype(bool).sum())}"
                f" rows chosen; expected bool [{B}] with at least one"
            )
        starts = options.get("starts")
        if starts is None:
            return mask, None
        starts = np.asarray(starts)
        if starts.dtype.kind not in "iu" or starts.shape != (B,):
            raise UserError(
                f"starts is {starts.dtype} {list(starts.shape)}; expected an integer for each of "
                f"the {B} rows"
            )
        return mask, starts.astype(np.int64)

    def _row_seeds(self, seed: int | Sequence[int | None] | None, rows: Sequence[int]) -> list[int]:
        """A seed for each of the rows to reset; seeds ``np_random`` where one is given."""
        if seed is None:
            return [int(n) for n in self.np_random.integers(2**62, size=len(rows))]
        if isinstance(seed, int | np.integer):
            if seed < 0:
                raise UserError(f"seed is {seed}; expected 0 or more")
            super().reset(seed=int(seed))
            return [int(seed) + row for row in rows]
        if len(seed) != self.num_envs:
            raise UserError(f"seed has {len(seed)} entries; expected one for each of the "
                            f"{self.num_envs} rows")  # fmt: skip
        chosen = [seed[row] for row in rows]
        if any(not isinstance(n, int | np.integer) or n < 0 for n in chosen):
            raise UserError(f"seed is {list(seed)}; expected integers of 0 or more in reset rows")
        seeds = [int(n) for n in chosen if n is not None]
        super().reset(seed=derive_seed(*seeds))
        return seeds
