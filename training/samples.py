"""Sample videos while training: held-out episodes, real beside imagined, by the rollout code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from worldloop.engine.rollout import ReplayPolicy, RolloutEngine
from worldloop.engine.world_model import Steps, WorldModel
from worldloop.training.data import EpisodeArrays
from worldloop.types import Starts
from worldloop.video import write_video


def write_sample_video(
    world: WorldModel,
    data: EpisodeArrays,
    episodes: Sequence[int],
    path: Path,
    steps: Steps = 4,
) -> None:
    """Imagine episodes from their first frames and recorded actions; write real | imagined.

    One row of the picture for each episode. The incomplete last chunk of an episode is left out.
    """
    rows = list(episodes)
    horizon = data.actions.shape[1] // world.action_spec.chunk * world.action_spec.chunk
    real = data.frames[rows, : horizon + 1]  # [B,T+1,H,W,3]
    starts = Starts(real[:, :1, None], data.states[rows, 0], ("",) * len(rows))
    policy = ReplayPolicy(data.actions[rows, :horizon], world.action_spec)
    engine = RolloutEngine(world, policy, steps=steps)
    rollout = engine.rollout(starts, horizon=horizon, decode="all")
    assert rollout.frames is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, _pairs(real, rollout.frames[:, :, 0]), data.action_spec.control_hz)


def _pairs(
    real_BTHW3: npt.NDArray[np.uint8], made_BTHW3: npt.NDArray[np.uint8]
) -> Iterator[npt.NDArray[np.uint8]]:
    for t in range(real_BTHW3.shape[1]):
        yield np.concatenate(
            [np.concatenate([r, m], 1) for r, m in zip(real_BTHW3[:, t], made_BTHW3[:, t])]
        )
