"""From rewards to outcomes: scores, the fit, its cross-validation, precision and recall."""

from __future__ import annotations

import numpy as np
import pytest

from worldloop.calibration import crossfit_alignment, fit_reward, held_score, precision_recall
from worldloop.errors import UserError


def naive_success(reward: np.ndarray, threshold: float, frames: int) -> np.ndarray:
    """As the world model counts: a run of ``frames`` rewards above the threshold."""
    out = []
    for row in reward:
        run = best = 0
        for value in row:
            run = run + 1 if value > threshold else 0
            best = max(best, run)
        out.append(best >= frames)
    return np.array(out)


def test_held_scores_are_runs_above_a_threshold():
    rng = np.random.default_rng(1)
    reward = rng.uniform(0, 1, (40, 30)).astype(np.float32)
    for frames in (1, 2, 5):
        for threshold in (0.1, 0.5, 0.8):
            expected = naive_success(reward, threshold, frames)
            assert ((held_score(reward, frames) > threshold) == expected).all()
    with pytest.raises(UserError, match="held for 31 frames; rewards have 30"):
        held_score(reward, 31)


def test_the_fit_finds_threshold_and_frames():
    """Failures flash high for two frames, successes hold 0.6 for long: only k > 2 tells them."""
    rng = np.random.default_rng(2)
    reward = rng.uniform(0, 0.3, (40, 48)).astype(np.float32)
    true = np.arange(40) % 2 == 0
    reward[true, 30:] = rng.uniform(0.55, 0.65, (20, 18))
    for row in np.flatnonzero(~true):
        reward[row, 10 + row % 8 : 12 + row % 8] = 0.97
    fit = fit_reward(reward, true)
    assert fit.held_frames >= 3 and 0.3 < fit.threshold < 0.56 and fit.balanced_accuracy == 1.0
    assert (fit.success(reward) == true).all()
    assert (naive_success(reward, fit.threshold, fit.held_frames) == true).all()
    assert naive_success(reward, 0.9, 2).sum() == 20  # the paper's threshold takes the flashes
    crossed = crossfit_alignment(reward, true)
    assert crossed is not None and crossed.rate == 1.0 and crossed.count == 40
    # Rewards that know nothing are not made to look as if they did.
    noise = rng.uniform(0, 1, (200, 48)).astype(np.float32)
    coin = rng.random(200) < 0.5
    assert crossfit_alignment(noise, coin).rate < 0.62
    assert crossfit_alignment(noise[:3], np.array([True, False, True])) is None
    with pytest.raises(UserError, match="all 20 episodes end alike"):
        fit_reward(reward[true], true[true])


def test_precision_and_recall():
    score = np.array([0.1, 0.4, 0.35, 0.8])
    true = np.array([False, False, True, True])
    assert precision_recall(score, true) == [
        (0.1, 0.5, 1.0), (0.35, pytest.approx(2 / 3), 1.0), (0.4, 0.5, 0.5), (0.8, 1.0, 0.5),
    ]  # fmt: skip
