"""Imagine the shipped held-out episodes from their first frames and recorded actions.

    python examples/imagine.py

Takes half a minute on two CPU cores; prints how often the imagined outcome is the true one.
"""

from pathlib import Path

import numpy as np

import worldloop as wl
from worldloop.engine.rollout import ReplayPolicy
from worldloop.episodes import EpisodeDataset
from worldloop.types import Starts

dataset = EpisodeDataset(Path(wl.__file__).parent / "data" / "demo-pushcube")
episodes = [dataset.read(i) for i in range(0, len(dataset), 4)]
actions = np.stack([episode.actions for episode in episodes])  # [B,T,7] in [-1,1]
starts = Starts(
    frames=np.stack([episode.frames[0] for episode in episodes])[:, None, None],  # [B,1,1,H,W,3]
    poses=np.stack([episode.states[0] for episode in episodes]),  # [B,7]
    instructions=tuple(episode.instruction for episode in episodes),
)

engine = wl.RolloutEngine.from_pretrained("tiny", ReplayPolicy(actions), steps=4)
rollout = engine.rollout(starts, horizon=72, seed=0, decode="policy")

true = np.array([episode.success for episode in episodes])
print(f"frames {rollout.frames.shape}, rewards {rollout.reward.shape}")
print(f"imagined outcome right in {np.mean(rollout.success == true):.0%} of {len(true)} episodes")
print({part: round(seconds, 2) for part, seconds in rollout.timings.items()})
