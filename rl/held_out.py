"""Held-out real episodes as a world model takes them: start frames, poses, recorded actions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from worldloop.engine.world_model import WorldModel
from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.rl.envs.maniskill import TASKS
from worldloop.types import Actions, Episode, Starts


@dataclass(frozen=True)
class HeldOut:
    """N real episodes of one task, all of T actions."""

    episodes: list[Episode]
    folder: Path
    env_id: str
    fps: float

    @cached_property
    def actions(self) -> Actions:
        """[N,T,A]."""
        return np.stack([episode.actions for episode in self.episodes])

    @cached_property
    def starts(self) -> Starts:
        """First frames, poses and instructions."""
        return Starts(
            frames=np.stack([episode.frames[0] for episode in self.episodes])[:, None, None],
            poses=np.stack([episode.states[0] for episode in self.episodes]),
            instructions=tuple(episode.instruction for episode in self.episodes),
        )

    @property
    def object_color(self) -> str:
        return TASKS[self.env_id].object_color if self.env_id in TASKS else "blue"

    def first(self, count: int, horizon: int) -> HeldOut:
        """The first episodes, cut to ``horizon`` actions."""
        cut = [
            dataclasses.replace(
                e, frames=e.frames[: horizon + 1], actions=e.actions[:horizon],
                states=e.states[: horizon + 1], reward=e.reward[:horizon],
            )
            for e in self.episodes[:count]
        ]  # fmt: skip
        return dataclasses.replace(self, episodes=cut)


def load_held_out(folder: Path, count: int | None, world: WorldModel) -> HeldOut:
    """Read episodes that fit the world model; raises UserError naming what does not."""
    dataset = EpisodeDataset(folder)
    number = len(dataset) if count is None else min(count, len(dataset))
    if number < 2:
        raise UserError(f"{folder}: holds {len(dataset)} episodes; at least 2 are needed")
    world.action_spec.require_same(dataset.meta.action_spec, "the world model", str(folder))
    episodes = [dataset.read(i) for i in range(number)]
    lengths = {len(episode.actions) for episode in episodes}
    chunk = world.action_spec.chunk
    if len(lengths) > 1 or min(lengths) % chunk:
        raise UserError(
            f"{folder}: episodes have {sorted(lengths)} actions; one length is needed, a multiple "
            f"of the world model's chunk ({chunk})"
        )
    return HeldOut(episodes, folder, dataset.meta.env_id, dataset.meta.action_spec.control_hz)
