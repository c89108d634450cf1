"""How like the real thing imagined frames and rewards are (paper section 4.2).

Shape letters: N pictures, B episodes, T frames, V views, H W pixels. Frames are uint8 with the
channel last, [..., H, W, 3]; leading axes are free and are kept: every measure comes per frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from worldloop.errors import UserError
from worldloop.objects import ObjectTrack, locate_object, object_within
from worldloop.types import Episode, Rollout

__all__ = [
    "Alignment", "Classifier", "Comparison", "ObjectTrack", "compare_rollout", "frechet_distance",
    "fvd", "locate_object", "lpips", "mse", "object_within", "outcome_alignment", "psnr",
    "psnr_of_mse", "ssim", "wilson_interval",
]  # fmt: skip

Pictures = npt.NDArray[np.uint8]  # [..., H, W, 3]
Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

PEAK = 255.0
_BATCH = 256  # frames worked on at a time: bounds memory


def _check_pair(real: Pictures, imagined: Pictures) -> None:
    for name, value in (("real", real), ("imagined", imagined)):
        if value.dtype != np.uint8 or value.ndim < 3 or value.shape[-1] != 3:
            raise UserError(
                f"{name} frames are {value.dtype} {list(value.shape)}; "
                "expected uint8 [..., H, W, 3]"
            )
    if real.shape != imagined.shape:
        raise UserError(
            f"real frames are {list(real.shape)}, imagined ones {list(imagined.shape)}; "
            "cut both to the same frames"
        )


# ---------------------------------------------------------------- pictures


def mse(real: Pictures, imagined: Pictures) -> Float:
    """Mean squared error of each frame [...], pixel values in [0,1] (paper table 1: 0.0024)."""
    _check_pair(real, imagined)
    flat_a = real.reshape(-1, *real.shape[-3:])
    flat_b = imagined.reshape(flat_a.shape)
    out = np.empty(len(flat_a))
    for i in range(0, len(flat_a), _BATCH):
        difference = flat_a[i : i + _BATCH].astype(np.float32) - flat_b[i : i + _BATCH]
        out[i : i + _BATCH] = np.square(difference).mean((1, 2, 3), dtype=np.float64)
    return (out / PEAK**2).reshape(real.shape[:-3])


def psnr(real: Pictures, imagined: Pictures) -> Float:
    """Peak signal-to-noise ratio of each frame [...] in dB, peak 255; identical frames give inf.

    The mean over a clip is the mean of these (not the PSNR of the mean error, which is lower).
    """
    return psnr_of_mse(mse(real, imagined))


def psnr_of_mse(error: Float) -> Float:
    """Decibels of mean squared errors on the [0,1] scale."""
    with np.errstate(divide="ignore"):
        decibels: Float = -10 * np.log10(error)
    return decibels


def ssim(real: Pictures, imagined: Pictures) -> Float:
    """Structural similarity of each frame [...], in [-1,1].

    Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03, population
    covariances; each colour channel by itself, then averaged, over the places where the window
    lies wholly inside the picture.
    Raises UserError for pictures smaller than the window.
    """
    _check_pair(real, imagined)
    window, sigma = 11, 1.5
    if min(real.shape[-3:-1]) < window:
        raise UserError(f"frames are {list(real.shape[-3:-1])}; SSIM needs {window} pixels or more")
    offsets = torch.arange(window, dtype=torch.float64) - window // 2
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).float()

    def band(size: int) -> torch.Tensor:
        """[size, size - window + 1]; on a CPU a product is 30 times faster than conv2d here."""
        matrix = torch.zeros(size, size - window + 1)
        for place in range(size - window + 1):
            matrix[place : place + window, place] = kernel
        return matrix

    down, across = band(real.shape[-3]).T.contiguous(), band(real.shape[-2])

    def blur(x: torch.Tensor) -> torch.Tensor:
        return down @ (x @ across)

    flat_a = real.reshape(-1, *real.shape[-3:])
    flat_b = imagined.reshape(flat_a.shape)
    c1, c2 = 0.01**2, 0.03**2
    out = np.empty(len(flat_a))
    for i in range(0, len(flat_a), 32):
        # Centred on 0.5: E[x^2] - E[x]^2 then cancels far fewer digits of float32.
        pair = [
            torch.from_numpy(np.ascontiguousarray(x[i : i + 32])).float().div(PEAK).sub(0.5)
            for x in (flat_a, flat_b)
        ]
        n = len(pair[0])
        a, b = (x.permute(0, 3, 1, 2).contiguous() for x in pair)
        mean_a, mean_b = blur(a), blur(b)
        var_a = blur(a * a) - mean_a**2
        var_b = blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
        mean_a, mean_b = mean_a + 0.5, mean_b + 0.5
        light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        structure = (2 * covariance + c2) / (var_a + var_b + c2)
        out[i : i + 32] = (light * structure).view(n, -1).double().mean(1).numpy()
    return out.reshape(real.shape[:-3])


def lpips(real: Pictures, imagined: Pictures) -> tuple[float | None, str]:
    """Mean LPIPS (AlexNet, v0.1) and "", or None and the reason why it cannot be measured here.

    The ``lpips`` package ships its linear heads; the AlexNet backbone must already lie in torch's
    hub cache. It is never downloaded and never random: such a number would mean nothing.
    """
    _check_pair(real, imagined)
    try:
        import lpips as package
    except Exception as error:  # a torchvision built for another torch fails in many ways
        return None, f"the lpips package cannot be imported ({type(error).__name__})"
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if not sorted(cache.glob("alexnet-owt-*.pth")):
        return None, "the AlexNet backbone (alexnet-owt-*.pth) is not in torch's hub cache"
    network = package.LPIPS(net="alex", verbose=False).eval()
    total, count = 0.0, 0
    flat_a = real.reshape(-1, *real.shape[-3:])
    flat_b = imagined.reshape(flat_a.shape)
    with torch.no_grad():
        for i in range(0, len(flat_a), 32):
            a, b = (
                torch.from_numpy(x[i : i + 32].copy()).permute(0, 3, 1, 2) / 127.5 - 1
                for x in (flat_a, flat_b)
            )
            total += float(network(a, b).sum())
            count += len(a)
    return total / max(count, 1), ""


def frechet_distance(a_ND: Float, b_ND: Float) -> float:
    """Distance of two clouds of features as Gaussians: |m - n|^2 + tr(A + B - 2 (A B)^(1/2))."""
    if len(a_ND) < 2 or len(b_ND) < 2:
        raise UserError(f"Frechet distance of {len(a_ND)} and {len(b_ND)} clips; needs 2 or more")
    means = a_ND.mean(0) - b_ND.mean(0)
    A, B = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a_ND, b_ND))
    # tr (A B)^(1/2) by the eigenvalues of A^(1/2) B A^(1/2), which is symmetric.
    values, vectors = np.linalg.eigh(A)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ B @ root), 0, None)).sum()
    return float(means @ means + np.trace(A) + np.trace(B) - 2 * cross)


def fvd(
    real_BTHW3: Pictures, imagined_BTHW3: Pictures, backbone: Path | None
) -> tuple[float | None, str]:
    """Frechet video distance and "", or None and the reason why it cannot be measured here.

    backbone: TorchScript file of the I3D network that FVD is defined by (``i3d_torchscript.pt``,
    called with clips [B,3,T,224,224] in [-1,1] and ``return_features=True``). It is never
    downloaded. Raises UserError when the file that is named cannot be loaded.
    """
    _check_pair(real_BTHW3, imagined_BTHW3)
    if backbone is None:
        return None, "FVD needs its I3D backbone; give the TorchScript file with --fvd"
    try:
        network = torch.jit.load(str(backbone)).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{backbone}: the I3D backbone of FVD cannot be loaded; give its TorchScript file"
        ) from error
    clouds = []
    for clips in (real_BTHW3, imagined_BTHW3):
        features = []
        for clip in clips:
            x = torch.from_numpy(np.ascontiguousarray(clip)).permute(3, 0, 1, 2)[None].float()
            size = (x.shape[2], 224, 224)
            x = torch.nn.functional.interpolate(x, size, mode="trilinear", align_corners=False)
            with torch.no_grad():
                features.append(network(x / 127.5 - 1, return_features=True).double())
        clouds.append(torch.cat(features).numpy())
    return frechet_distance(clouds[0], clouds[1]), ""


# ---------------------------------------------------------------- outcomes


@dataclass(frozen=True)
class Alignment:
    """Agreement of predicted outcomes with true ones."""

    true_success: int
    false_success: int  # predicted success, truly a failure
    false_failure: int
    true_failure: int
    repeats: int = 1
    """How often each start state is counted (by several checkpoints, or a group's members)."""

    @property
    def count(self) -> int:
        return self.true_success + self.false_success + self.false_failure + self.true_failure

    @property
    def rate(self) -> float:
        """Share of episodes whose outcome is predicted rightly (paper section 4.2)."""
        return (self.true_success + self.true_failure) / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the rate; a start state that is counted often is one draw."""
        right = self.true_success + self.true_failure
        return wilson_interval(right / self.repeats, self.count / self.repeats)

    def to_dict(self) -> dict[str, int]:
        """The four counts by name."""
        return {name: value for name, value in self.__dict__.items() if name != "repeats"}


def outcome_alignment(true_B: Bool, predicted_B: Bool) -> Alignment:
    """Count agreements and both kinds of disagreement of outcomes [B]."""
    true, predicted = np.asarray(true_B, bool), np.asarray(predicted_B, bool)
    if true.shape != predicted.shape or true.ndim != 1:
        raise UserError(
            f"outcomes are {list(true.shape)} and {list(predicted.shape)}; expected the same [B]"
        )
    return Alignment(
        int((true & predicted).sum()),
        int((~true & predicted).sum()),
        int((true & ~predicted).sum()),
        int((~true & ~predicted).sum()),
    )


def held_success(reward_T: npt.NDArray[np.floating[Any]], frames: int) -> bool:
    """Whether a recorded success flag [T] stays up for that many frames somewhere."""
    return held_steps(reward_T, frames) is not None


def held_steps(reward_T: npt.NDArray[np.floating[Any]], frames: int) -> int | None:
    """Control steps until a recorded success flag [T] has stayed up for that many frames; None:
    it never does."""
    held = np.convolve(reward_T > 0.5, np.ones(frames), "full")[: len(reward_T)] >= frames
    return int(held.argmax()) + 1 if held.any() else None


def wilson_interval(right: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share ``right / count``; (nan, nan) for an empty count."""
    if not 0 <= right <= count:
        raise UserError(f"right is {right} of {count}; expected 0 <= right <= count")
    if count == 0:
        return math.nan, math.nan
    p = right / count
    middle = p + z**2 / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def pooled_success(successes: Sequence[int], count: int) -> dict[str, Any]:
    """Mean success over seeds that were measured on the same ``count`` start states.

    The interval is that of ``count`` episodes: a start state that several seeds share is one draw
    (one policy measured three times over is no better known).
    """
    mean = sum(successes) / len(successes)
    return {"success": mean / count, "ci95": list(wilson_interval(mean, count))}


# ---------------------------------------------------------------- a rollout against its episodes


@dataclass(frozen=True)
class Comparison:
    """Every figure of B imagined episodes against the real ones, T frames each.

    Frame 0, which was given, counts nowhere.
    """

    psnr: Float  # [B,T] dB
    psnr_static: Float  # [B,T] dB, the first frame repeated
    ssim: Float  # [B,T]
    mse: Float  # [B,T] on [0,1]
    track: ObjectTrack  # [B,T]
    reward: Alignment
    visual: Alignment | None  # None without a classifier
    true_success: Bool  # [B]
    reward_success: Bool  # [B]
    visual_success: Bool | None  # [B]

    def summary(self, chunk: int = 24) -> dict[str, Any]:
        """The figures by the names of summary.json, with intervals and counts."""
        T = self.psnr.shape[1]
        chunks = [float(self.psnr[:, t : t + chunk].mean()) for t in range(0, T, chunk)]
        values: dict[str, Any] = {
            "episodes": len(self.psnr),
            "frames": int(self.psnr.size),
            "psnr": float(self.psnr.mean()),
            "psnr_static": float(self.psnr_static.mean()),
            "psnr_by_chunk": chunks,
            "ssim": float(self.ssim.mean()),
            "mse": float(self.mse.mean()),
            "object_within_4px": self.track.share,
            "object_hidden_share": self.track.hidden,
            "reward_alignment": self.reward.rate,
            "reward_alignment_interval": list(self.reward.interval),
            "reward_confusion": self.reward.to_dict(),
            "true_success_share": float(self.true_success.mean()),
            "visual_alignment": None,
        }
        if self.visual is not None:
            values["visual_alignment"] = self.visual.rate
            values["visual_alignment_interval"] = list(self.visual.interval)
            values["visual_confusion"] = self.visual.to_dict()
        return values


class Classifier(Protocol):
    """Whatever judges final frames: `worldloop.outcome.OutcomeClassifier`."""

    def success(self, frames_NHW3: Pictures) -> Bool: ...


def compare_rollout(
    real: Sequence[Episode],
    rollout: Rollout,
    classifier: Classifier | None,
    object_color: str = "blue",
    pixels: float = 4.0,
    held_frames: int = 1,
) -> Comparison:
    """Measure a rollout with every frame decoded against the episodes it re-imagines.

    ``real[b]`` must be the episode whose start and actions row b had. object_color: "" where no
    colour tells the object. held_frames: of the rule that ``rollout.success`` was found by; by it
    an episode has succeeded, whatever came after, while the classifier is asked about the last
    frame. Raises UserError when the numbers of episodes or frames differ, or frames were not
    decoded.
    """
    if rollout.frames is None:
        raise UserError('rollout.frames is None; imagine with decode="all" to compare pictures')
    B, T = rollout.reward.shape
    if len(real) != B:
        raise UserError(f"{len(real)} real episodes, {B} imagined ones; expected as many")
    for b, episode in enumerate(real):
        if len(episode.frames) < T + 1:
            raise UserError(f"real episode {b} has {len(episode.frames)} frames; expected {T + 1}")
    if rollout.frames.shape[1] != T + 1:
        raise UserError(
            f"rollout.frames has {rollout.frames.shape[1]} frames; expected the start and {T} more"
        )
    true = np.stack([episode.frames[: T + 1] for episode in real])
    imagined = rollout.frames[:, :, 0]
    error = mse(true[:, 1:], imagined[:, 1:])
    static = mse(true[:, 1:], np.broadcast_to(true[:, :1], true[:, 1:].shape))
    truth = np.array([held_success(episode.reward[:T], held_frames) for episode in real])
    at_the_end = np.array([bool(episode.reward[T - 1] > 0.5) for episode in real])
    visual = None if classifier is None else classifier.success(imagined[:, -1])
    # An untouched scene gives 100 dB, not infinity, or the mean would be lost.
    return Comparison(
        psnr=psnr_of_mse(np.maximum(error, 1e-10)),
        psnr_static=psnr_of_mse(np.maximum(static, 1e-10)),
        ssim=ssim(true[:, 1:], imagined[:, 1:]),
        mse=error,
        track=_track(true[:, 1:], imagined[:, 1:], pixels, object_color),
        reward=outcome_alignment(truth, rollout.success),
        visual=None if visual is None else outcome_alignment(at_the_end, visual),
        true_success=truth,
        reward_success=np.asarray(rollout.success, bool),
        visual_success=visual,
    )


def _track(real: Pictures, imagined: Pictures, pixels: float, color: str) -> ObjectTrack:
    if color:
        return object_within(real, imagined, pixels, color)
    nothing = np.zeros(real.shape[:-3], bool)
    return ObjectTrack(nothing, nothing, np.full(nothing.shape, np.nan), pixels)
