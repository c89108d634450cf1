"""The world model as an environment: imagined episodes behind the interface of a simulator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from worldloop.engine.sampler import STREAMING_TIMES
from worldloop.engine.world_model import Steps, WorldModel, WorldState
from worldloop.errors import UserError
from worldloop.files import PathLike
from worldloop.rl.envs.vector import ChunkVectorEnv, Ints, RowsBegun, RowsPlayed
from worldloop.types import Actions, Starts


class WorldVectorEnv(ChunkVectorEnv):
    """Imagined episodes from a pool of starts; ``options["starts"]`` are indices into it.

    world: a WorldModel, or what ``WorldModel.from_pretrained`` takes. starts: the pool. steps:
    denoising steps (1, 2, 4 or "reference"). A row's world noise depends on its seed and its chunk
    number alone, as in RolloutEngine: its episode does not depend on its batch mates (up to the
    rounding of matrix products of another size). Rows that are at the same chunk, whenever they
    were begun, go through the model as one batch.
    """

    def __init__(
        self,
        world: WorldModel | PathLike,
        starts: Starts,
        num_envs: int = 1,
        *,
        horizon: int = 72,
        steps: Steps = 4,
        stop_on_success: bool = True,
    ) -> None:
        if steps != "reference" and steps not in STREAMING_TIMES:
            known = ", ".join(map(str, STREAMING_TIMES))
            raise UserError(f"steps is {steps!r}; expected {known} or 'reference'")
        if not isinstance(world, WorldModel):
            world = WorldModel.from_pretrained(world)
        spec, picture = world.action_spec, world.config.picture
        if starts.frames.shape[1:] != (1, 1, *picture, 3) or starts.poses.shape[1:] != (spec.dim,):
            raise UserError(
                f"starts have frames {list(starts.frames.shape)} and poses "
                f"{list(starts.poses.shape)}; this world model takes "
                f"[N, 1, 1, {picture[0]}, {picture[1]}, 3] and [N, {spec.dim}]"
            )
        super().__init__(
            spec,
            (picture[0], picture[1]),
            num_envs=num_envs,
            horizon=horizon,
            stop_on_success=stop_on_success,
        )
        self.world, self.starts, self.steps = world, starts, steps
        # The rows at each chunk number and their state: a WorldState has one cursor.
        self._states: dict[int, tuple[list[int], WorldState]] = {}

    def _begin(self, rows: Sequence[int], starts: Ints, seeds: Sequence[int]) -> RowsBegun:
        pool = self.starts.select([int(start) for start in starts])
        state = self.world.start(pool.frames, pool.poses, seeds, pool.instructions)
        self._keep(set(range(self.num_envs)) - set(rows))
        if 0 in self._states:  # begun earlier, not stepped yet
            before, other = self._states[0]
            self._states[0] = ([*before, *rows], WorldState.join([other, state]))
        else:
            self._states[0] = (list(rows), state)
        return RowsBegun(pool.frames[:, 0, 0], pool.poses, pool.instructions)

    def _advance(self, rows: Sequence[int], actions_RTA: Actions) -> RowsPlayed:
        R, T = actions_RTA.shape[:2]
        place = {row: i for i, row in enumerate(rows)}
        self._keep(set(rows))
        frames = np.empty((R, *self._frames.shape[1:]), np.uint8)
        poses = np.empty((R, self.action_spec.dim), np.float32)
        reward, success = np.empty((R, T), np.float32), np.empty((R, T), bool)
        after: dict[int, tuple[list[int], WorldState]] = {}
        for number, (members, state) in self._states.items():
            index = [place[row] for row in members]
            chunk, state = self.world.step(
                state, actions_RTA[index], steps=self.steps, decode="policy"
            )
            assert chunk.frames is not None
            frames[index], poses[index] = chunk.frames[:, -1, 0], state.poses
            reward[index], success[index] = chunk.reward, chunk.success
            after[number + 1] = (members, state)
        self._states = after
        return RowsPlayed(frames, poses, reward, success, np.full(R, T, np.int64))

    def _keep(self, rows: set[int]) -> None:
        """Let go of the states of all other rows."""
        for number, (members, state) in list(self._states.items()):
            kept = [i for i, row in enumerate(members) if row in rows]
            if not kept:
                del self._states[number]
            elif len(kept) < len(members):
                self._states[number] = ([members[i] for i in kept], state.select(kept))

    def _draw_starts(self, count: int) -> Ints:
        drawn: Ints = self.np_random.integers(len(self.starts.instructions), size=count)
        return drawn

    def _check_starts(self, starts: Ints) -> None:
        size = len(self.starts.instructions)
        if ((starts < 0) | (starts >= size)).any():
            raise UserError(f"starts is {starts.tolist()}; the pool has starts 0 .. {size - 1}")
