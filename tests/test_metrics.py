"""Metrics against independent computations; the detector on drawn scenes; outcome classifiers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from worldloop import metrics
from worldloop.errors import UserError
from worldloop.outcome import (
    OutcomeClassifier,
    OutcomeNet,
    action_features,
    actions_only_accuracy,
    load_actions_only,
    save_actions_only,
)
from worldloop.types import Episode, Rollout

RNG = np.random.default_rng(0)


def scene(column: float, row: float, size: int = 128, cube: bool = True) -> np.ndarray:
    """A drawn table: streaky wood, a red and white disc, a grey hand, a blue cube of two faces."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:size, :size] + 0.5
    wood = np.array([190.0, 105, 60]) + 18 * np.sin(x / 2.3)[..., None]
    picture = wood + rng.normal(0, 4, (size, size, 3))
    ring = np.hypot(x - 0.3 * size, (y - 0.6 * size) * 1.3) / (size / 128)
    picture[ring < 24] = (205, 72, 80)
    picture[(ring < 19) & (ring > 14) | (ring < 9)] = (235, 230, 230)
    picture[(x > 0.72 * size) & (y < 0.4 * size)] = (150, 152, 156)
    if cube:
        half = 6 * size / 128
        inside = (np.abs(x - column) < half) & (np.abs(y - row) < half)
        picture[inside & (y < row)] = (58, 100, 188)
        picture[inside & (y >= row)] = (34, 62, 116)
    return np.clip(picture, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- pictures


def test_psnr_and_mse_of_known_errors() -> None:
    real = np.full((3, 16, 16, 3), 100, np.uint8)
    off = real.copy()
    off[1] += 5
    off[2, :8] += 10
    expected = np.array([0, 25, 50]) / 255**2
    np.testing.assert_allclose(metrics.mse(real, off), expected, rtol=1e-6)
    decibels = metrics.psnr(real, off)
    assert decibels[0] == np.inf
    np.testing.assert_allclose(decibels[1:], 10 * np.log10(255**2 / np.array([25, 50])), rtol=1e-6)
    assert metrics.psnr(real[None], off[None]).shape == (1, 3)


def test_psnr_and_ssim_against_scikit_image() -> None:
    skimage = pytest.importorskip("skimage.metrics")
    real = np.stack([scene(40 + 9 * i, 60 + 4 * i) for i in range(3)])
    noise = RNG.integers(-25, 26, real.shape)
    other = np.clip(real.astype(int) + noise * np.array([0, 1, 2])[:, None, None, None], 0, 255)
    other = other.astype(np.uint8)
    other[1] = np.roll(other[1], 3, 1)
    ours = metrics.ssim(real, other)
    for i in range(3):
        theirs = skimage.structural_similarity(
            real[i], other[i], channel_axis=-1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, data_range=255,
        )  # fmt: skip
        assert ours[i] == pytest.approx(theirs, abs=1e-4)
    for i in (1, 2):
        theirs = skimage.peak_signal_noise_ratio(real[i], other[i], data_range=255)
        assert metrics.psnr(real, other)[i] == pytest.approx(theirs, abs=1e-6)


def test_ssim_on_rectangles_and_many_axes() -> None:
    a = RNG.integers(0, 256, (2, 3, 24, 40, 3), np.uint8)
    assert metrics.ssim(a, a).shape == (2, 3)
    np.testing.assert_allclose(metrics.ssim(a, a), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("real", "imagined", "message"),
    [
        (
            np.zeros((16, 16, 3), np.float32),
            np.zeros((16, 16, 3), np.uint8),
            "real frames are fl",
        ),
        (np.zeros((2, 16, 16, 3), np.uint8), np.zeros((1, 16, 16, 3), np.uint8), "imagined ones"),
        (np.zeros((16, 16, 4), np.uint8), np.zeros((16, 16, 4), np.uint8), r"\[..., H, W, 3\]"),
    ],
)
def test_pictures_that_do_not_fit(real: np.ndarray, imagined: np.ndarray, message: str) -> None:
    for measure in (metrics.mse, metrics.psnr, metrics.ssim, metrics.lpips):
        with pytest.raises(UserError, match=message):
            measure(real, imagined)
    with pytest.raises(UserError, match="SSIM needs 11"):
        metrics.ssim(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8))


def test_lpips_is_none_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    a = np.zeros((1, 64, 64, 3), np.uint8)
    value, reason = metrics.lpips(a, a)
    assert value is None and ("AlexNet" in reason or "lpips package" in reason)


# ---------------------------------------------------------------- the object


@pytest.mark.parametrize("size", [64, 128, 256])
def test_detector_finds_the_cube(size: int) -> None:
    scale = size / 128
    places = [(40, 50), (38.5, 77), (38, 76), (90, 60), (10, 30), (100, 110)]
    for column, row in places:  # on wood, on the disc's white and red, near the edge
        found = metrics.locate_object(scene(column * scale, row * scale, size))
        assert np.abs(found - np.array([column, row]) * scale).max() < 1.0 * max(scale, 1)


def test_detector_finds_nothing_where_there_is_nothing() -> None:
    assert np.isnan(metrics.locate_object(scene(0, 0, cube=False))).all()
    assert np.isnan(metrics.locate_object(np.zeros((2, 64, 64, 3), np.uint8))).all()


def test_detector_takes_the_stronger_of_two_ghosts() -> None:
    a, b, empty = (scene(30, 30).astype(float), scene(90, 100).astype(float),
                   scene(0, 0, cube=False).astype(float))  # fmt: skip
    ghosts = (empty + 0.8 * (a - empty) + 0.6 * (b - empty)).astype(np.uint8)
    assert np.abs(metrics.locate_object(ghosts) - (30, 30)).max() < 1.5


def test_object_within_counts_misses_and_leaves_out_hidden() -> None:
    real = np.stack([scene(50, 50), scene(50, 50), scene(50, 50), scene(0, 0, cube=False)])
    imagined = np.stack([scene(53, 50), scene(56, 50), scene(0, 0, cube=False), scene(50, 50)])
    track = metrics.object_within(real, imagined)
    assert track.counted.tolist() == [True, True, True, False]
    assert track.within.tolist() == [True, False, False, False]
    assert track.share == pytest.approx(1 / 3) and track.hidden == pytest.approx(1 / 4)
    assert track.distance[2] == np.inf and np.isnan(track.distance[3])


def test_unknown_colour() -> None:
    with pytest.raises(UserError, match="known: blue, red, green"):
        metrics.locate_object(scene(50, 50), "mauve")


# ---------------------------------------------------------------- outcomes


def test_alignment_counts() -> None:
    true = np.array([1, 1, 0, 0, 0], bool)
    predicted = np.array([1, 0, 1, 0, 0], bool)
    found = metrics.outcome_alignment(true, predicted)
    assert found.to_dict() == {
        "true_success": 1, "false_success": 1, "false_failure": 1, "true_failure": 2,
    }  # fmt: skip
    assert found.rate == pytest.approx(0.6)
    with pytest.raises(UserError, match="expected the same"):
        metrics.outcome_alignment(true, predicted[:2])


def test_wilson_interval_of_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert metrics.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert metrics.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    with pytest.raises(UserError):
        metrics.wilson_interval(3, 2)


def test_seeds_that_share_their_starts_are_not_more_episodes() -> None:
    """One policy measured three times is known as well as measured once."""
    once = metrics.pooled_success([70], 200)
    assert metrics.pooled_success([70, 70, 70], 200) == once
    assert once["ci95"] == pytest.approx([0.2873, 0.4184], abs=1e-4)
    assert metrics.pooled_success([60, 81], 200)["success"] == pytest.approx(0.3525)


def episode(success: bool, T: int = 4, seed: int = 0) -> Episode:
    rng = np.random.default_rng(seed)
    frames = np.stack([scene(30 + 5 * t, 60, 64) for t in range(T + 1)])
    return Episode(
        frames=frames,
        actions=rng.uniform(-1, 1, (T, 7)).astype(np.float32),
        states=np.zeros((T + 1, 7), np.float32),
        reward=np.full(T, float(success), np.float32),
        instruction="push", env_id="PushCube-v1", seed=seed, success=success,
    )  # fmt: skip


def rollout(episodes: list[Episode], success: list[bool]) -> Rollout:
    B, T = len(episodes), len(episodes[0].actions)
    return Rollout(
        frames=np.stack([e.frames for e in episodes])[:, :, None],
        actions=np.stack([e.actions for e in episodes]),
        reward=np.ones((B, T), np.float32),
        success=np.array(success),
        valid=np.ones((B, T), bool),
        seeds=np.arange(B),
        group_id=np.arange(B),
        instructions=("push",) * B,
        start_pose=np.zeros((B, 7), np.float32),
    )


class Always:
    """A classifier that sees success everywhere."""

    def success(self, frames_NHW3: np.ndarray) -> np.ndarray:
        assert frames_NHW3.ndim == 4
        return np.ones(len(frames_NHW3), bool)


def test_compare_rollout() -> None:
    real = [episode(True), episode(False, seed=1)]
    comparison = metrics.compare_rollout(real, rollout(real, [True, True]), Always())
    summary = comparison.summary(chunk=2)
    assert summary["episodes"] == 2 and summary["frames"] == 8  # frame 0 was given
    assert summary["psnr"] == pytest.approx(100) and summary["mse"] == 0
    assert summary["psnr_static"] < 40 and len(summary["psnr_by_chunk"]) == 2
    assert summary["object_within_4px"] == 1
    assert summary["reward_alignment"] == summary["visual_alignment"] == 0.5
    assert metrics.compare_rollout(real, rollout(real, [True, True]), None).visual is None
    # Won and lost again: a success to the rule, a failure to who looks at the last frame.
    lost = dataclasses.replace(real[0], reward=np.array([0, 1, 1, 0], np.float32))
    both = [lost, real[1]]
    for held, right in ((1, 1.0), (2, 1.0), (3, 0.5)):
        found = metrics.compare_rollout(
            both, rollout(both, [True, False]), Always(), held_frames=held
        )
        assert found.reward.rate == right and found.visual is not None
        assert found.visual.rate == 0.0


def test_a_start_state_that_is_counted_often_is_one_draw() -> None:
    once = metrics.Alignment(5, 1, 1, 5)
    often = metrics.Alignment(40, 8, 8, 40, repeats=8)
    assert often.rate == once.rate and often.interval == pytest.approx(once.interval)
    assert often.to_dict() == {
        "true_success": 40, "false_success": 8, "false_failure": 8, "true_failure": 40,
    }  # fmt: skip


def test_compare_rollout_refuses_what_does_not_fit() -> None:
    real = [episode(True), episode(False, seed=1)]
    whole = rollout(real, [True, False])
    with pytest.raises(UserError, match="decode"):
        metrics.compare_rollout(real, dataclasses.replace(whole, frames=None), None)
    with pytest.raises(UserError, match="1 real episodes, 2 imagined"):
        metrics.compare_rollout(real[:1], whole, None)
    with pytest.raises(UserError, match="real episode 0"):
        metrics.compare_rollout([episode(True, T=2)] * 2, whole, None)


# ---------------------------------------------------------------- actions only


def test_actions_without_a_leak_tell_nothing() -> None:
    actions = RNG.uniform(-1, 1, (160, 24, 7)).astype(np.float32)
    result = actions_only_accuracy(actions, RNG.random(160) < 0.5)
    assert result["accuracy"] < 0.65 and result["episodes"] == 160
    assert result["accuracy"] == max(result["models"].values())


@pytest.mark.parametrize("leak", ["length", "late", "distance from the middle"])
def test_actions_with_a_leak_are_caught(leak: str) -> None:
    rng = np.random.default_rng(3)
    actions = rng.normal(0, 0.1, (160, 24, 7)).astype(np.float32)
    if leak == "length":
        way = rng.uniform(0.2, 0.6, 160)
        success = way > 0.4
        actions[:, 4:12, 0] += way[:, None]
    elif leak == "late":
        success = rng.random(160) < 0.5
        for row, good in zip(actions, success):
            row[14 if good else 10 :] *= 0.05
    else:  # no linear model sees this one
        way = rng.uniform(-0.6, 0.6, 160)
        success = np.abs(way) < 0.3
        actions[:, 4:12, 1] += way[:, None]
    result = actions_only_accuracy(actions, success)
    assert result["accuracy"] > 0.85, result


def test_actions_only_needs_both_outcomes() -> None:
    actions = RNG.uniform(-1, 1, (30, 8, 7)).astype(np.float32)
    with pytest.raises(UserError, match="rarer outcome"):
        actions_only_accuracy(actions, np.arange(30) < 3)
    with pytest.raises(UserError, match=r"expected \[N, T, A\]"):
        actions_only_accuracy(actions, np.ones(4, bool))


def test_still_actions_have_finite_features() -> None:
    for view in action_features(np.zeros((2, 24, 7), np.float32)).values():
        assert np.isfinite(view).all()


def test_actions_only_is_kept_with_its_dataset(tmp_path: Path) -> None:
    assert load_actions_only(tmp_path) is None
    save_actions_only(tmp_path, {"accuracy": 0.53})
    assert load_actions_only(tmp_path) == {"accuracy": 0.53}


# ---------------------------------------------------------------- the classifier of pictures


def test_outcome_classifier_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = OutcomeNet(4).half().float()
    classifier = OutcomeClassifier(net, 64, "PushCube-v1", {"held_out_accuracy": 1.0})
    frames = RNG.integers(0, 256, (5, 64, 64, 3), np.uint8)
    again = OutcomeClassifier.load(classifier.save(tmp_path / "outcome"))
    np.testing.assert_array_equal(again.probability(frames), classifier.probability(frames))
    assert again.env_id == "PushCube-v1" and again.record == classifier.record
    assert again.probability(frames[:0]).shape == (0,)
    with pytest.raises(UserError, match=r"takes uint8 \[N, 64, 64, 3\]"):
        again.probability(frames[:, :32])


def test_the_shipped_kind_of_classifier_is_small(tmp_path: Path) -> None:
    folder = OutcomeClassifier(OutcomeNet(), 128, "PushCube-v1", {}).save(tmp_path)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 300_000


# ---------------------------------------------------------------- videos as clouds


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (40_000, 3)), rng.normal(0, 1, (40_000, 3)) * [2, 1, 0.5] + [3, 0, 0]
    # Diagonal covariances: sum of squared differences of means and of standard deviations.
    assert metrics.frechet_distance(a, b) == pytest.approx(9 + 1 + 0 + 0.25, rel=0.03)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert metrics.frechet_distance(a @ turn, b @ turn) == pytest.approx(
        metrics.frechet_distance(a, b), rel=1e-6
    )
    from scipy.linalg import sqrtm

    A, B = np.cov(a[:50], rowvar=False), np.cov(b[:50], rowvar=False)
    means = a[:50].mean(0) - b[:50].mean(0)
    expected = means @ means + np.trace(A + B - 2 * sqrtm(A @ B).real)
    assert metrics.frechet_distance(a[:50], b[:50]) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match="of 1 and 50 clips"):
        metrics.frechet_distance(a[:1], b[:50])


class _Backbone(torch.nn.Module):
    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features and x.shape[3] == 224
        return torch.stack([x.mean((1, 2, 3, 4)), x[:, 0].mean((1, 2, 3))], 1)


def test_fvd_takes_a_backbone_and_names_its_absence(tmp_path):
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (6, 4, 8, 8, 3), np.uint8)
    value, reason = metrics.fvd(real, real, None)
    assert value is None and "I3D backbone" in reason
    with pytest.raises(UserError, match=r"nowhere.pt: the I3D backbone of FVD cannot be loaded"):
        metrics.fvd(real, real, tmp_path / "nowhere.pt")
    torch.jit.script(_Backbone()).save(str(tmp_path / "i3d.pt"))
    same, reason = metrics.fvd(real, real, tmp_path / "i3d.pt")
    assert same == pytest.approx(0, abs=1e-9) and reason == ""
    brighter = (real // 2 + 127).astype(np.uint8)
    other, _ = metrics.fvd(real, brighter, tmp_path / "i3d.pt")
    x = real.astype(np.float64) / 127.5 - 1
    y = brighter.astype(np.float64) / 127.5 - 1
    clouds = [np.stack([v.mean((1, 2, 3, 4)), v[..., 0].mean((1, 2, 3))], 1) for v in (x, y)]
    assert other == pytest.approx(metrics.frechet_distance(*clouds), rel=0.05) and other > 0.1
