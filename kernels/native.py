"""Calls into kernels/csrc: bf16 operators for processors with AVX512-BF16, where CMake built them.

    cmake -B build && cmake --build build

Without them every operator is its reference.
"""

import ctypes
import errno
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import worldloop

__all__ = ["HAS_NATIVE", "call", "strides"]

HAS_NATIVE = (
    worldloop.native is not None
    and hasattr(worldloop.native, "worldloop_has_avx512_bf16")  # not of an older build
    and bool(worldloop.native.worldloop_has_avx512_bf16())
)

_LEAST_WORK = 1e7  # FLOPs that are worth another thread: it takes about 50 us to wake


def strides(tensor: Tensor, row: int, head: int, token: int) -> tuple[int, int, int]:
    """The C struct Strides, from the dimensions that are rows, heads and tokens."""
    return tensor.stride(row), tensor.stride(head), tensor.stride(token)


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

    def part(first: int, last: int) -> int:
        # The interpreter's lock is not held meanwhile.
        found: int = function(*arguments, ctypes.c_int64(first), ctypes.c_int64(last))
        return found

    parts = min(torch.get_num_threads(), items) if work >= _LEAST_WORK else 1
    ends = [items * i // parts for i in range(parts + 1)]
    # A thread pool does not survive a fork: one for each process.
    others = [
        _pool(parts - 1, os.getpid()).submit(part, *pair)
        for pair in zip(ends[1:-1], ends[2:], strict=True)
    ]
    codes = [part(0, ends[1]), *(other.result() for other in others)]
    for code in codes:
        if code == errno.ENOMEM:
            raise MemoryError(f"{name}: no memory for its packed keys and values")
        if code:
            raise OSError(code, f"{name}: {os.strerror(code)}")


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "worldloop-native")
