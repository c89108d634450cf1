"""Where imagined episodes begin: the first frames and poses of recorded ones, and which of them."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

import worldloop
from worldloop.engine.world_model import WorldModel
from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.types import Starts

SHIPPED_EPISODES = Path(worldloop.__file__).parent / "data"
FADE = 0.9  # of what is known of a start, from one step to the next: the policy changes


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


def starts_sha256(starts: Starts) -> str:
    """Of pictures, poses and instructions: whether they are the same starts."""
    digest = hashlib.sha256()
    for array in (starts.frames, starts.poses):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update("\n".join(starts.instructions).encode())
    return digest.hexdigest()


class StartChooser:
    """Draws the starts whose groups are likely to be mixed: the others are imagined for nothing.

    What is known of a start's chance of success p is a Beta distribution: uniform at first, then
    one count for every success and failure imagined from it, faded by `FADE` a step. A draw
    (Thompson sampling) takes a p of each start and the starts where a group of ``group_size`` with
    that p is likeliest to have its mean in [low, high]. A start never tried has a wide p and
    comes early; one that failed or succeeded throughout comes back as its counts fade.
    With ``mixed=False`` starts are drawn uniformly. Shape letters: N starts, G groups, M members.
    """

    def __init__(
        self, count: int, group_size: int, low: float, high: float, *, mixed: bool = True
    ) -> None:
        wins = np.arange(group_size + 1)
        means = wins / group_size
        self.kept = wins[(means >= low - 1e-9) & (means <= high + 1e-9)]
        self.group_size, self.mixed = group_size, mixed
        self.counts_N2 = np.zeros((count, 2))  # successes, failures

    def draw(self, rng: np.random.Generator, wanted: int) -> npt.NDArray[np.int64]:
        """Rows [wanted] of the starts; a start comes twice only when there are fewer."""
        count = len(self.counts_N2)
        if not self.mixed:
            return rng.choice(count, wanted, replace=wanted > count)
        wins_N, losses_N = self.counts_N2.T
        p_N = rng.beta(1 + wins_N, 1 + losses_N)
        ties = rng.random(count)
        order = np.lexsort((ties, -self.chance(p_N)))
        return np.resize(order, wanted)

    def chance(self, p_N: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Chance that a group is kept, where each of its episodes succeeds with chance p."""
        size = self.group_size
        return sum(
            (math.comb(size, k) * p_N**k * (1 - p_N) ** (size - k) for k in self.kept.tolist()),
            np.zeros_like(p_N),
        )

    def observe(self, rows_G: npt.NDArray[np.int64], success_GM: npt.NDArray[np.bool_]) -> None:
        """Count what was imagined from these starts."""
        wins = success_GM.sum(1)
        np.add.at(self.counts_N2, rows_G, np.stack([wins, success_GM.shape[1] - wins], 1))

    def success(self) -> float:
        """Mean success over all starts; that of the drawn ones leans to the middle.

        Each start's own, drawn towards the mean by the weight of one episode.
        """
        wins_N, losses_N = self.counts_N2.T
        count_N = wins_N + losses_N
        return float((wins_N / (count_N + 1)).sum() / (count_N / (count_N + 1)).sum())

    def fade(self) -> None:
        """The policy has changed: what is known of it is worth less."""
        self.counts_N2 *= FADE
