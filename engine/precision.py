"""The device that is asked for, whether it computes in bf16 by itself, and the autocast for it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from worldloop.errors import UserError

PRECISIONS = ("auto", "bf16", "fp32")


def device_of(name: str | torch.device) -> torch.device:
    """The device of that name, where it is there; ``auto``: a GPU, or else the CPU.

    Raises UserError for one that torch does not know or see.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N") from error
    there = {"cpu": 1, "meta": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= there:
        raise UserError(
            f"device is {str(name)!r}, but torch {torch.__version__} sees {there or 'no'} such "
            f"device{'s' if there > 1 else ''}"
        )
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run on this device's own units.

    A CPU without AVX-512 emulates them: one AVX2 core (AMD Zen 3) does 93 GFLOP/s in fp32, 0.9 in
    bf16.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def takes_bf16(device: torch.device, precision: str) -> bool:
    """Whether ``precision`` means bf16 here: ``auto`` does where the device is fast in it.

    Raises UserError for a precision that is not one of PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; expected auto, bf16 or fp32")
    return precision == "bf16" or (precision == "auto" and has_fast_bf16(device))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast where `takes_bf16`, else nothing. Raises UserError as it does."""
    if takes_bf16(device, precision):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
