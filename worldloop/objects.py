"""Where an object is in a picture: one colour detector for real and imagined frames alike.

Frames are uint8 with the channel last, [..., H, W, 3]; leading axes are free and are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worldloop.errors import UserError

Pictures = npt.NDArray[np.uint8]  # [..., H, W, 3]
Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

_BATCH = 256  # frames worked on at a time: bounds memory


def _blue(rgb: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return rgb[..., 2] - np.maximum(rgb[..., 0], rgb[..., 1])


def _red(rgb: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    # Wood is red as well, but with much green in it; a painted cube has hardly any.
    other: npt.NDArray[np.float32] = np.maximum(rgb[..., 1], rgb[..., 2])
    other *= 2.2
    return rgb[..., 0] - other


def _green(rgb: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return rgb[..., 1] - np.maximum(rgb[..., 0], rgb[..., 2])


# How much of an object's colour a pixel has, in grey levels.
_COLOURS = {"blue": _blue, "red": _red, "green": _green}
_FLOOR = 18.0  # grey levels; shadows and video noise stay below
_FULL = 25.0  # above the floor a pixel counts in full: lit and shaded faces weigh the same
_LEAST_MASS = 30.0  # full pixels in the window, at 128x128, where a cube has about 160


def _box_sums(weight_NHW: npt.NDArray[np.float32], radius: int) -> npt.NDArray[np.float32]:
    """Sums over the square of ``2 radius + 1`` pixels around each pixel, zero outside."""
    padded = np.pad(weight_NHW, ((0, 0), (radius + 1, radius), (radius + 1, radius)))
    total = padded.cumsum(1, dtype=np.float64).cumsum(2)
    side = 2 * radius + 1
    sums: npt.NDArray[np.float64] = total[:, side:, side:] - total[:, :-side, side:]
    sums += total[:, :-side, :-side] - total[:, side:, :-side]
    out: npt.NDArray[np.float32] = sums.astype(np.float32)
    return out


def locate_object(frames: Pictures, color: str = "blue") -> Float:
    """Centre [..., 2] of the object of one colour in pixels; nan where none is found.

    Column and row are continuous: the middle of the first pixel is (0.5, 0.5), as in
    ``Episode.object_pixels``.

    The same detector for real and imagined frames: the window (a tenth of the picture to each
    side is the size of a near cube) that holds most of the colour, then the colour's centre of
    mass in that window. Two ghosts of a cube give the stronger one, not the point between them.
    """
    if color not in _COLOURS:
        raise UserError(f"object colour {color!r} is unknown; known: {', '.join(_COLOURS)}")
    if frames.dtype != np.uint8 or frames.ndim < 3 or frames.shape[-1] != 3:
        raise UserError(
            f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [..., H, W, 3]"
        )
    flat = frames.reshape(-1, *frames.shape[-3:])
    H, W = flat.shape[1:3]
    radius = max(2, round(min(H, W) / 16))
    least = _LEAST_MASS * (min(H, W) / 128) ** 2
    out = np.full((len(flat), 2), np.nan)
    columns, rows = np.arange(W), np.arange(H)
    for i in range(0, len(flat), _BATCH):
        weight = _COLOURS[color](flat[i : i + _BATCH].astype(np.float32)) - _FLOOR
        weight = np.clip(weight / _FULL, 0, 1)
        sums = _box_sums(weight, radius)
        peak = sums.reshape(len(sums), -1).argmax(1)
        mass = sums.reshape(len(sums), -1).max(1)
        centre = np.stack([peak % W, peak // W], 1).astype(np.float64)
        reach = 1.5 * radius
        for _ in range(3):  # mean shift: the window follows its own centre of mass
            inside = (np.abs(columns - centre[:, :1]) <= reach)[:, None, :] & (
                np.abs(rows - centre[:, 1:]) <= reach
            )[:, :, None]
            local = weight * inside
            total = np.maximum(local.sum((1, 2)), 1e-9)
            centre = np.stack(
                [(local.sum(1) * columns).sum(1) / total, (local.sum(2) * rows).sum(1) / total], 1
            )
        out[i : i + _BATCH] = np.where((mass >= least)[:, None], centre + 0.5, np.nan)
    return out.reshape(*frames.shape[:-3], 2)


@dataclass(frozen=True)
class ObjectTrack:
    """How well the imagined object follows the true one, frame by frame."""

    within: Bool  # [...] both found, and near each other; False where the true one is hidden
    counted: Bool  # [...] the true object is seen
    distance: Float  # [...] pixels; inf where only the true one is found, nan where it is hidden
    pixels: float

    @property
    def share(self) -> float:
        """Share of the counted frames in which the imagined object is near enough."""
        return float(self.within[self.counted].mean()) if self.counted.any() else math.nan

    @property
    def hidden(self) -> float:
        """Share of frames left out because the true object is not seen (behind the hand)."""
        return float(1 - self.counted.mean())


def object_within(
    real: Pictures, imagined: Pictures, pixels: float = 4.0, color: str = "blue"
) -> ObjectTrack:
    """Compare where the object is in real and imagined frames [..., H, W, 3].

    Frames where it is not found in the real picture are left out; not found in the imagined one
    only is a miss.
    """
    if real.shape != imagined.shape:
        raise UserError(f"real frames are {list(real.shape)}, imagined ones {list(imagined.shape)}")
    true, guess = locate_object(real, color), locate_object(imagined, color)
    counted = np.isfinite(true).all(-1)
    distance = np.linalg.norm(true - guess, axis=-1)
    distance = np.where(counted, np.where(np.isfinite(distance), distance, np.inf), np.nan)
    within = np.asarray(counted & (distance <= pixels))
    return ObjectTrack(within, np.asarray(counted), distance, pixels)
