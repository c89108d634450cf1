"""Action numbers of OpenVLA: 256 bins as tokens, and un-normalisation.

Facts: openvla/openvla-oft at 213c5ff. A normalised action lies in [-1, 1]; its token is counted
down from the end of the tokenizer's vocabulary. Here an action token is an index 0..255 into the
256 logits; the vocabulary id is that plus `first_id`.

Shape letters: B rows, T steps of a chunk, A action dimensions (any leading axes will do).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from worldloop.errors import UserError

BINS = 256
EDGES = np.linspace(-1.0, 1.0, BINS)
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2  # 255 of them: the two largest actions share one

Floats = npt.NDArray[np.float32]


def to_tokens(normalised: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Normalised actions (clipped to [-1, 1]) to indices 0..255; index 255 is the action -1."""
    clipped = np.clip(np.asarray(normalised, dtype=np.float64), -1.0, 1.0)
    if np.isnan(clipped).any():
        raise UserError("actions hold NaN; expected finite numbers in [-1, 1]")
    return (BINS - np.digitize(clipped, EDGES)).astype(np.int64)


def from_tokens(tokens: npt.ArrayLike) -> Floats:
    """Indices 0..255 to bin centres, float32; 0 and 1 are both the largest action."""
    index = np.asarray(tokens)
    if index.dtype.kind not in "iu" or (index.size and not 0 <= index.min() <= index.max() < BINS):
        raise UserError(f"action tokens must be whole numbers in 0..{BINS - 1}")
    return CENTRES[np.clip(BINS - 1 - index, 0, BINS - 2)].astype(np.float32)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True)
class Statistics:
    """One quantity's entry in dataset_statistics.json: low and high (q01 and q99 as published)
    become -1 and 1; where `mask` is False a number passes through unchanged."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not len(self.low) == len(self.high) == len(self.mask):
            raise UserError(
                f"statistics: {len(self.low)} low, {len(self.high)} high and {len(self.mask)} "
                "mask entries; expected as many of each"
            )

    @property
    def dim(self) -> int:
        return len(self.low)

    @classmethod
    def from_dict(
        cls, entry: Mapping[str, Any], *, low: str = "q01", high: str = "q99"
    ) -> "Statistics":
        """An `action` or `proprio` entry; ALOHA uses low="min", high="max"."""
        for key in (low, high):
            values = entry.get(key)
            if not isinstance(values, list) or not all(map(_is_number, values)):
                raise UserError(f"statistics: {key!r} is {values!r}; expected a list of numbers")
        mask = entry.get("mask", [True] * len(entry[low]))
        return cls(tuple(entry[low]), tuple(entry[high]), tuple(bool(m) for m in mask))

    def _check(self, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        array = np.asarray(values, dtype=np.float64)
        if array.shape[-1:] != (self.dim,):
            raise UserError(
                f"numbers have shape {array.shape}, statistics {self.dim} dimensions; these are "
                "the statistics of another robot"
            )
        if np.isnan(array).any():
            raise UserError("numbers hold NaN; expected finite ones")
        return array

    def unnormalise(self, values: npt.ArrayLike) -> Floats:
        """[...,A] in [-1, 1] to environment units, float32."""
        x, low, high = self._check(values), np.asarray(self.low), np.asarray(self.high)
        return np.where(self.mask, 0.5 * (x + 1) * (high - low + 1e-8) + low, x).astype(np.float32)

    def normalise(self, values: npt.ArrayLike) -> Floats:
        """The inverse, clipped to [-1, 1] where the mask holds; float32."""
        x, low, high = self._check(values), np.asarray(self.low), np.asarray(self.high)
        scaled = np.clip(2 * (x - low) / (high - low + 1e-8) - 1, -1, 1)
        return np.where(self.mask, scaled, x).astype(np.float32)
