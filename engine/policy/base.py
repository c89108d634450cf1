"""What a policy is to the engine, and the one that replays recorded actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from worldloop.errors import UserError
from worldloop.types import Actions, ActionSpec, Frames


@dataclass(frozen=True)
class Observation:
    """What B episodes show before their next chunk."""

    frames: Frames  # [B,1,V,H,W,3]
    poses: npt.NDArray[np.float32]  # [B,A] end-effector state
    instructions: tuple[str, ...]
    episodes: tuple[int, ...]  # which episode of the rollout each row is
    chunk: int  # number of chunks already acted


@dataclass(frozen=True)
class PolicyAction:
    """A chunk of actions and, from a policy that samples, what the learner needs."""

    actions: Actions  # [B,T,A]
    tokens: npt.NDArray[np.int64] | None = None  # [B,T,A]
    logprobs: npt.NDArray[np.float32] | None = None  # [B,T,A]


class Policy(Protocol):
    """Acts one chunk at a time on a batch of episodes.

    ``reads_frames`` False says that ``act`` does not look at the pictures, so none need be made.
    ``seed`` of ``act`` is that of the chunk. A policy that samples draws each row's noise from
    ``derive_seed(seed, episode)`` of its entry in ``observation.episodes``: rows leave the batch
    and come in batches of any size, and an episode must not depend on that.
    """

    @property
    def action_spec(self) -> ActionSpec: ...

    @property
    def reads_frames(self) -> bool: ...

    def act(self, observation: Observation, seed: int) -> PolicyAction: ...


class ReplayPolicy:
    """Acts what was recorded: actions [B,T,A], one row for each episode of the rollout."""

    reads_frames = False

    def __init__(
        self, actions_BTA: npt.NDArray[Any], action_spec: ActionSpec | None = None
    ) -> None:
        self.action_spec = action_spec or ActionSpec()
        self.actions = self.action_spec.check(actions_BTA)

    def act(self, observation: Observation, seed: int) -> PolicyAction:
        first = observation.chunk * self.action_spec.chunk
        last = first + self.action_spec.chunk
        if last > self.actions.shape[1] or max(observation.episodes) >= len(self.actions):
            raise UserError(
                f"ReplayPolicy holds {len(self.actions)} episodes of {self.actions.shape[1]} "
                f"actions; episode {max(observation.episodes)} asked for actions {first}..{last}"
            )
        return PolicyAction(self.actions[list(observation.episodes), first:last])
