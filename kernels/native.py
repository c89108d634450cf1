"""Calls into kernels/csrc: bf16 operators for processors with AVX512-BF16, where CMake built them.

    cmake -B build && cmake --build build

Without them every operator is its reference.
"""

import ctypes
import errno
import functools
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

import worldloop

__all__ = ["HAS_NATIVE", "call"]

ABI = 2  # of the functions below, as in avx512_bf16.c: a library of other signatures is left alone

HAS_NATIVE = (
    worldloop.native is not None
    and hasattr(worldloop.native, "worldloop_bf16_abi")
    and worldloop.native.worldloop_bf16_abi() == ABI  # 0 on a processor without the instructions
)


def _choose_mkl_kernels() -> None:
    """One number through each elementwise function that MKL computes, in one thread.

    MKL 2024.2, which torch carries on x86, chooses a function's kernel in its first call. Where two
    threads make that at once, one of them may compute its part of that call with the coarsest
    kernel: half of all cosines off by 1e-4, once in a process (pytorch/pytorch#188792).
    """
    for dtype in (torch.float32, torch.float64):
        half = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for function in (
            torch.acos, torch.asin, torch.atan, torch.cos, torch.erf, torch.erfc, torch.erfinv,
            torch.exp, torch.log, torch.log10, torch.log2, torch.sin, torch.sqrt, torch.tan,
            torch.tanh, torch.trunc,
        ):  # fmt: skip
            function(half)


_choose_mkl_kernels()

_LEAST_WORK = 1e7  # FLOPs that are worth another thread: it takes about 50 us to wake


def call(
    name: str,
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    shape: tuple[int, ...],
    items: int,
    work: float,
) -> None:
    """name(tensors..., numbers..., shape, first, last) over all items, in torch's number of
    threads where there is enough work. Raises MemoryError, or OSError where the library fails.
    """
    assert worldloop.native is not None
    function = worldloop.native[name]
    arguments: list[Any] = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    arguments += [ctypes.c_float(x) for x in numbers]
    arguments.append((ctypes.c_int64 * len(shape))(*shape))

    def part(first: int, last: int, alive: tuple[Tensor, ...] = tensors) -> int:
        # The interpreter's lock is not held meanwhile. A part that outlives an interrupted caller
        # still owns what it writes.
        found: int = function(*arguments, ctypes.c_int64(first), ctypes.c_int64(last))
        return found

    parts = min(torch.get_num_threads(), items) if work >= _LEAST_WORK else 1
    ends = [items * i // parts for i in range(parts + 1)]
    others: list[Future[int]] = []
    codes = []
    try:
        for first, last in zip(ends[1:-1], ends[2:], strict=True):
            try:
                others.append(_pool(os.getpid()).submit(part, first, last))
            except RuntimeError:  # no thread is to be had, as when the interpreter ends
                codes.append(part(first, last))
        codes.append(part(0, ends[1]))
    finally:
        wait(others)
    for code in [*codes, *(other.result() for other in others)]:
        if code == errno.ENOMEM:
            raise MemoryError(f"{name}: no memory for its packed keys and values")
        if code:
            raise OSError(code, f"{name}: {os.strerror(code)}")


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """One for each process: its threads do not survive a fork."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), "worldloop-native")
