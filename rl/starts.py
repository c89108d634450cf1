"""Where imagined episodes begin: the first frames and poses of recorded ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import worldloop
from worldloop.engine.world_model import WorldModel
from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.types import Starts

SHIPPED_EPISODES = Path(worldloop.__file__).parent / "data"


def shipped_episodes() -> Path:
    """The dataset that comes with the package; raises UserError where there is none."""
    shipped = sorted(SHIPPED_EPISODES.glob("demo-*/meta/info.json"))
    if not shipped:
        raise UserError(f"{SHIPPED_EPISODES}: no shipped episodes (demo-*); give a dataset")
    return shipped[0].parents[1]


def load_starts(folder: Path | None, world: WorldModel, limit: int | None = None) -> Starts:
    """First frames, poses and instructions of a dataset (the shipped one where none is given).

    Raises UserError when the dataset's actions or picture size are not the world model's.
    """
    if folder is None:
        folder = shipped_episodes()
    dataset = EpisodeDataset(folder)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count == 0:
        raise UserError(f"{folder}: holds no episodes; collect some first")
    world.action_spec.require_same(dataset.meta.action_spec, "the world model", str(folder))
    size = (dataset.meta.image_size,) * 2
    if world.config.picture != size:
        raise UserError(f"{folder}: frames are {size}, the world model's {world.config.picture}")
    frames, poses, texts = [], [], []
    for i in range(count):
        episode = dataset.read(i, frames=False)
        frames.append(dataset.first_frame(i))
        poses.append(episode.states[0])
        texts.append(episode.instruction)
    return Starts(np.stack(frames)[:, None, None], np.stack(poses), tuple(texts))
