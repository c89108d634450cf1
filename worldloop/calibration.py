"""From rewards to outcomes: a threshold, and for how many frames it must be held.

Shape letters: B episodes, T frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worldloop.errors import UserError
from worldloop.metrics import Alignment, outcome_alignment

Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

HELD = (1, 2, 3, 4, 6, 8)  # numbers of frames that a reward may have to be held


def held_score(reward_BT: npt.NDArray[np.float32], frames: int) -> Float:
    """The highest threshold [B] that ``frames`` rewards on end exceed.

    An episode is a success by (threshold, frames) exactly where this is above the threshold.
    """
    if not 1 <= frames <= reward_BT.shape[1]:
        raise UserError(f"held for {frames} frames; rewards have {reward_BT.shape[1]}")
    windows = np.lib.stride_tricks.sliding_window_view(reward_BT.astype(np.float64), frames, 1)
    score: Float = windows.min(-1).max(-1)
    return score


def precision_recall(score_B: Float, true_B: Bool) -> list[tuple[float, float, float]]:
    """(threshold, precision, recall) at every score, rising: predicted success is score >= it."""
    true = np.asarray(true_B, bool)
    rows = []
    for threshold in np.unique(score_B):
        said = score_B >= threshold
        right = int((said & true).sum())
        rows.append((float(threshold), right / int(said.sum()), right / max(int(true.sum()), 1)))
    return rows


@dataclass(frozen=True)
class RewardFit:
    """A success is a reward above ``threshold`` for ``held_frames`` frames on end."""

    threshold: float
    held_frames: int
    balanced_accuracy: float  # on the episodes that it was fitted on

    def success(self, reward_BT: npt.NDArray[np.float32]) -> Bool:
        """The outcome [B] that this fit reads from rewards."""
        return held_score(reward_BT, self.held_frames) > self.threshold


def fit_reward(reward_BT: npt.NDArray[np.float32], true_B: Bool) -> RewardFit:
    """Threshold and number of frames that tell the outcomes best (balanced accuracy).

    Where several do as well, the one whose threshold has most room to both sides.
    Raises UserError where all outcomes are alike.
    """
    true = np.asarray(true_B, bool)
    if true.all() or not true.any():
        raise UserError(f"all {len(true)} episodes end alike; a threshold needs both outcomes")
    best: tuple[float, float] = (-1.0, -1.0)
    found = RewardFit(0.5, 1, 0.0)
    for frames in (n for n in HELD if n <= reward_BT.shape[1]):
        score = held_score(reward_BT, frames)
        levels = np.unique(np.concatenate([[0.0], score, [1.0]]))
        for low, high in zip(levels, levels[1:]):
            threshold = float(low + high) / 2
            said = score > threshold
            accuracy = (float(said[true].mean()) + float((~said[~true]).mean())) / 2
            if (accuracy, float(high - low)) > best:
                best = accuracy, float(high - low)
                found = RewardFit(threshold, frames, accuracy)
    return found


def crossfit_alignment(
    reward_BT: npt.NDArray[np.float32], true_B: Bool, seed: int = 0
) -> Alignment | None:
    """Agreement of outcomes read by a fit on the other half of the episodes; None for too few."""
    true = np.asarray(true_B, bool)
    if min(true.sum(), (~true).sum()) < 2:
        return None
    rng = np.random.default_rng(seed)
    half = np.zeros(len(true), bool)
    for outcome in (True, False):
        rows = rng.permutation(np.flatnonzero(true == outcome))
        half[rows[: len(rows) // 2]] = True
    said = np.zeros(len(true), bool)
    for part in (half, ~half):
        said[part] = fit_reward(reward_BT[~part], true[~part]).success(reward_BT[part])
    return outcome_alignment(true, said)
