"""Advantages and loss of GRPO against independent computations on random inputs."""

import math

import numpy as np
import pytest
import torch

from worldloop.errors import UserError
from worldloop.rl.advantage import (
    decision_advantages,
    decision_spreads,
    group_advantages,
    mixed_groups,
)
from worldloop.rl.learner import gap_metrics
from worldloop.rl.loss import ClipConfig, token_loss, trajectory_weights
from worldloop.rl.starts import StartChooser


@pytest.mark.parametrize("seed", range(5))
def test_advantages_against_plain_python(seed):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 6, 40)  # groups of unequal size, rows in any order
    score = rng.normal(size=40) if seed % 2 else rng.integers(0, 2, 40).astype(float)
    got = group_advantages(score, group)
    for b in range(40):
        own = [float(score[i]) for i in range(40) if group[i] == group[b]]
        expected = 0.0
        if len(own) > 1:
            mean = sum(own) / len(own)
            std = math.sqrt(sum((s - mean) ** 2 for s in own) / (len(own) - 1))
            expected = (score[b] - mean) / (std + 1e-6)
        assert got[b] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_advantages_of_the_published_example():
    """n = 8, one success: +2.475 and -0.354 (SimpleVLA-RL); the factor 5 of its reward cancels."""
    success = np.zeros(8)
    success[3] = 1
    for factor in (1, 5):
        got = group_advantages(factor * success, np.zeros(8, int))
        assert got[3] == pytest.approx(2.475, abs=1e-3)
        assert got[0] == pytest.approx(-0.354, abs=1e-3)


def test_uniform_and_single_groups_have_no_advantage():
    assert not group_advantages([1, 1, 0], [0, 0, 7]).any()
    with pytest.raises(UserError, match=r"expected \[B\]"):
        group_advantages([1, 0], [0])


def test_a_decision_is_compared_with_others_of_its_moment():
    """Two groups of six, (3, 2): three first chunks, two second ones after each."""
    score = np.array([1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0], float)
    got = decision_advantages(score, np.repeat([7, 3], 6), [2, 1, 1])
    worth = np.array([0.5, 0, 1, 0, 0.5, 0]).reshape(2, 3)
    first = (worth - worth.mean(1, keepdims=True)) / (worth.std(1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(got[:, 0], np.repeat(first.ravel(), 2), atol=1e-5)
    half = 2**-0.5  # of a success and a failure
    second = [half, -half, 0, 0, 0, 0, 0, 0, -half, half, 0, 0]
    np.testing.assert_allclose(got[:, 1], second, atol=1e-5)
    np.testing.assert_array_equal(got[:, 2], got[:, 1])  # nobody parts at the third
    flat = decision_advantages(score, np.repeat([7, 3], 6), [1, 1])
    expected = group_advantages(score, np.repeat([7, 3], 6))
    np.testing.assert_array_equal(flat, np.stack([expected, expected], 1))
    with pytest.raises(UserError, match="one after the other"):
        decision_advantages([1, 0, 1, 0], [0, 1, 0, 1], [1])


def test_spreads_tell_which_chunk_decides():
    """Scores with known variances of three chunks, (6, 4, 3): found, but for chance."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 2, (4000, 6, 1, 1)), rng.normal(0, 1, (4000, 6, 4, 1))
    score = (first + second + rng.normal(0, 3, (4000, 6, 4, 3))).ravel()
    found = decision_spreads(score, 72, [12, 3, 1, 1])
    assert list(found) == ["spread_1", "spread_2", "spread_3"]
    np.testing.assert_allclose(list(found.values()), [4, 1, 9], atol=0.1)
    assert decision_spreads([1, 0, 0, 0], 4, [1, 1]) == {"spread_1": 0.25}


def test_mixed_groups_keep_the_bounds_themselves():
    success = np.zeros(50, bool)
    group = np.repeat(np.arange(5), 10)
    for name, count in enumerate((0, 1, 5, 9, 10)):
        success[10 * name : 10 * name + count] = True
    assert mixed_groups(success, group, 0.1, 0.9).tolist() == [1, 2, 3]
    assert mixed_groups(success, group, 0.0, 1.0).tolist() == [0, 1, 2, 3, 4]


def plain_loss(logp, old, advantage, valid, clip):
    """SimpleVLA-RL's loss, one number at a time: mean in an episode, then over episodes."""
    per_episode = []
    B, T, A = logp.shape
    for b in range(B):
        terms = []
        for t in range(T):
            for a in range(A):
                if not valid[b, t]:
                    continue
                ratio = math.exp(logp[b, t, a] - old[b, t, a])
                bounded = min(max(ratio, 1 - clip.low), 1 + clip.high)
                term = max(-advantage[b] * ratio, -advantage[b] * bounded)
                if clip.dual is not None and advantage[b] < 0:
                    term = min(term, -advantage[b] * clip.dual)
                terms.append(term)
        if terms:
            per_episode.append(sum(terms) / len(terms))
    return sum(per_episode) / len(per_episode)


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_loss_against_plain_python(seed, dual):
    rng = np.random.default_rng(seed)
    B, T, A = 5, 12, 3
    logp = rng.normal(-2, 1, (B, T, A))
    old = logp + rng.normal(0, 0.7, (B, T, A))
    advantage = rng.normal(size=B)
    lengths = rng.integers(1, T + 1, B)  # unequal lengths
    valid = np.arange(T)[None] < lengths[:, None]
    if seed == 3:
        valid[2] = False  # an episode that counts for nothing
    clip = ClipConfig(dual=dual)
    losses, facts = token_loss(
        torch.from_numpy(logp), torch.from_numpy(old),
        torch.from_numpy(advantage)[:, None, None], clip,
    )  # fmt: skip
    weights = torch.from_numpy(trajectory_weights(valid, A)).double()[..., None]
    expected = plain_loss(logp, old, advantage, valid, clip)
    assert float((losses * weights).sum()) == pytest.approx(expected, rel=1e-6)
    # Any split into micro-batches adds up to the same.
    split = sum(float((losses[i : i + 2] * weights[i : i + 2]).sum()) for i in range(0, B, 2))
    assert split == pytest.approx(expected, rel=1e-6)
    clipped = facts["clipped"].numpy()
    ratio = np.exp(logp - old)
    up = (advantage[:, None, None] > 0) & (ratio > 1.28)
    down = (advantage[:, None, None] < 0) & (ratio < 0.8)
    np.testing.assert_array_equal(clipped, up | down)


def test_clipped_tokens_have_no_gradient():
    logp = torch.tensor([0.5, -0.5, 0.0], requires_grad=True)
    losses, _ = token_loss(logp, torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), ClipConfig())
    losses.sum().backward()
    assert logp.grad.tolist() == [0.0, 0.0, -1.0]


def test_the_gap_counts_valid_tokens_only():
    sampled = np.zeros((1, 3, 2), np.float32)
    again = np.array([[[0.1, 0.3], [0, 0], [9, 9]]], np.float32)
    gap = gap_metrics(sampled, again, np.array([[True, True, False]]))
    assert gap == {"gap_mean": pytest.approx(0.1), "gap_max": pytest.approx(0.3)}


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.9), (0.25, 0.75)])
def test_the_chance_of_a_mixed_group_is_the_share_of_many_drawn_ones(low, high):
    rng, p = np.random.default_rng(0), np.array([0.0, 0.03, 0.2, 0.5, 0.9, 1.0])
    means = (rng.random((100_000, 6, 8)) < p[:, None]).mean(2)
    drawn = ((means >= low) & (means <= high)).mean(0)
    np.testing.assert_allclose(StartChooser(6, 8, low, high).chance(p), drawn, atol=0.008)


def test_likely_starts_are_mixed_more_often_than_uniform_ones_and_none_is_forgotten():
    yields = []
    for mixed in (False, True):
        rng = np.random.default_rng(1)
        p = np.where(np.arange(60) < 36, 0.0, rng.uniform(0.2, 0.8, 60))  # 36 of 60 are hopeless
        chooser, kept, last = StartChooser(60, 8, 0.1, 0.9, mixed=mixed), 0, np.zeros(60, int)
        for step in range(60):
            rows = chooser.draw(rng, 10)
            assert len(set(rows)) == 10
            success = rng.random((10, 8)) < p[rows, None]
            kept += len(mixed_groups(success.ravel(), np.arange(10).repeat(8), 0.1, 0.9))
            chooser.observe(rows, success)
            chooser.fade()
            last[rows] = step
        yields.append(kept / 600)
        if mixed:  # of all starts, not of the drawn ones
            assert chooser.success() == pytest.approx(p.mean(), abs=0.1)
        assert last.min() >= 20, "the policy learns: a hopeless start is tried again"
    assert yields[0] == pytest.approx(0.4 * 0.97, abs=0.05)
    assert yields[1] > yields[0] + 0.25


def test_more_groups_than_starts_take_all_of_them_equally_often():
    for mixed in (False, True):
        rows = StartChooser(4, 8, 0.1, 0.9, mixed=mixed).draw(np.random.default_rng(0), 12)
        assert len(rows) == 12 and set(rows) <= set(range(4))
        if mixed:
            assert np.bincount(rows).tolist() == [3, 3, 3, 3]
