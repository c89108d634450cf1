"""Advantages of GRPO (SimpleVLA-RL): how much better than its group an episode did.

Shape letters: B episodes, K decisions (chunks) of an episode.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from worldloop.errors import UserError

EPSILON = 1e-6  # beside the deviation, so that a group of equals has advantage 0
Floats = npt.NDArray[np.float32]


def group_advantages(score_B: npt.ArrayLike, group_B: npt.ArrayLike) -> Floats:
    """(score - mean) / (std + 1e-6) within each group, the deviation unbiased; float32 [B].

    A group of one has advantage 0. Raises UserError when the shapes differ.
    """
    score, group = np.asarray(score_B, np.float64), np.asarray(group_B)
    if score.ndim != 1 or score.shape != group.shape:
        raise UserError(f"scores {list(score.shape)} and groups {list(group.shape)}; expected [B]")
    out = np.zeros(len(score), np.float32)
    for name in np.unique(group):
        rows = np.flatnonzero(group == name)
        if len(rows) > 1:
            own = score[rows]
            out[rows] = (own - own.mean()) / (own.std(ddof=1) + EPSILON)
    return out


def decision_advantages(
    score_B: npt.ArrayLike, group_B: npt.ArrayLike, widths_K: Sequence[int]
) -> Floats:
    """`group_advantages` of every decision in a group that branches; float32 [B,K].

    ``widths_K``: how many rows of a group share each chunk (`rollout.rows_alike`). What a decision
    is worth is the mean score of the episodes that go on from it; its group are the decisions taken
    at the same moment of the same episode. Where all part at the first chunk that is
    `group_advantages` for every decision. (VinePPO, Kazemnejad et al. 2024, estimates values so in
    text, where one can also go back.)
    """
    score, group = np.asarray(score_B, np.float64), np.asarray(group_B)
    size = len(group) // max(1, len(np.unique(group)))
    if len(score) != len(group) or not np.array_equal(group, np.repeat(group[::size], size)):
        raise UserError(f"groups are {group.tolist()}; expected one after the other, of one size")
    out = np.zeros((len(score), len(widths_K)), np.float32)
    before = size  # rows that were alike up to this decision
    for k, width in enumerate(widths_K):
        if k and width == before:  # nobody parts: it is worth what the decision before it is
            out[:, k] = out[:, k - 1]
            continue
        worth = score.reshape(-1, width).mean(1)
        moment = np.arange(0, len(score), width) // before
        out[:, k] = np.repeat(group_advantages(worth, moment), width)
        before = width
    return out


def decision_spreads(
    score_B: npt.ArrayLike, group_size: int, widths_K: Sequence[int]
) -> dict[str, float]:
    """How much of the score's variance within groups each chunk's decisions make: {chunk: variance}
    for every chunk at which groups part, counted from 1; rows and ``widths_K`` as above.

    The variance among siblings' worth, less what chance after them leaves in a mean of so many
    (nested analysis of variance, so it is unbiased and can be below zero).
    """
    score, before = np.asarray(score_B, np.float64), group_size
    parted: list[tuple[int, int, float]] = []  # chunk, siblings, variance of their worth
    for k, width in enumerate(widths_K):
        siblings, before = before // width, width
        if siblings > 1:
            worth = score.reshape(-1, siblings, width).mean(2)
            parted.append((k + 1, siblings, float(worth.var(1, ddof=1).mean())))
    below = [variance / siblings for _, siblings, variance in parted[1:]] + [0.0]
    return {f"spread_{k}": v - rest for (k, _, v), rest in zip(parted, below, strict=True)}


def mixed_groups(
    success_B: npt.NDArray[np.bool_], group_B: npt.NDArray[np.int64], low: float, high: float
) -> npt.NDArray[np.int64]:
    """The groups whose mean success lies in [low, high]: the others teach nothing, or little."""
    names = np.unique(group_B)
    means = np.array([success_B[group_B == name].mean() for name in names])
    # A hair of room: 0.1 must admit a mean of exactly one in ten.
    kept: npt.NDArray[np.int64] = names[(means >= low - 1e-9) & (means <= high + 1e-9)]
    return kept
