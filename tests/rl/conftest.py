"""Simulated episodes that several tests look at: made once a task, two wanted outcomes each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from worldloop.episodes import EpisodeDataset
from worldloop.rl.collect import CollectConfig, Collector
from worldloop.rl.envs.maniskill import ManiSkillEnv


@dataclass
class Simulated:
    """A small real dataset and the simulator that it was collected with."""

    dataset: EpisodeDataset
    env: ManiSkillEnv


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Simulated]]:
    """Real episodes of a task by its name: seed 1 wants a success, seed 2 a failure."""
    made: dict[str, Simulated] = {}

    def make(env_id: str) -> Simulated:
        if env_id not in made:
            out = tmp_path_factory.mktemp("sim") / env_id
            collector = Collector(CollectConfig(env_id, out, episodes=2, seed=1))
            collector.run()
            made[env_id] = Simulated(EpisodeDataset(out), collector.env)
        return made[env_id]

    yield make
    for each in made.values():
        each.env.close()
