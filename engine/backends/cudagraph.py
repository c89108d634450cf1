"""CUDA graphs: the launches of a pass are recorded once and replayed with one.

A replay reads its inputs where the recording read them, so a call copies its tensors there first;
tensors that are the same objects as at the last call and were not written since are not copied
again (the history, through all passes of a chunk). Nothing in a call waits for the device.

`build` records the module itself, `build_compiled` what torch.compile makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worldloop.engine.backends import compiled
from worldloop.engine.backends.base import Call, Unchanged, facts_of, no_autocast, require_like
from worldloop.errors import UserError

WARM_UPS = 3  # before recording: libraries choose algorithms and allocate workspaces

_pools: dict[int, Any] = {}  # torch's pool handles


class StaticInputs:
    """Tensors at fixed addresses, filled before each replay."""

    def __init__(self, example: Sequence[Tensor]) -> None:
        self.expected = [facts_of(t) for t in example]
        # One check for each tensor: some change with every pass, the history does not.
        self._unchanged = [Unchanged() for _ in example]
        with torch.inference_mode(False), torch.no_grad():
            self.tensors = [torch.empty_like(t, memory_format=torch.preserve_format).copy_(t)
                            for t in example]  # fmt: skip

    def load(self, tensors: Sequence[Tensor]) -> int:
        """Copy what has changed; the number of tensors copied."""
        require_like(self.expected, tensors)
        copied = 0
        with torch.no_grad():
            for own, given, unchanged in zip(self.tensors, tensors, self._unchanged, strict=True):
                if not unchanged([given]):
                    own.copy_(given, non_blocking=True)
                    copied += 1
        return copied


def build(module: nn.Module, example: Sequence[Tensor]) -> Call:
    """See `Backend`. Raises UserError on a CPU, and under autocast."""
    return record(module, example)


def build_compiled(module: nn.Module, example: Sequence[Tensor]) -> Call:
    """See `Backend`: torch.compile first, then recorded."""
    _require_cuda(example)
    return record(compiled.build(module, example), example)


def record(function: Call, example: Sequence[Tensor]) -> Call:
    """Warm up, record, and return the call that replays."""
    device = _require_cuda(example)
    inputs = StaticInputs(example)
    index = device.index if device.index is not None else torch.cuda.current_device()
    # One pool for all graphs of a device: they never run at the same time.
    pool = _pools.setdefault(index, torch.cuda.graph_pool_handle())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.inference_mode():
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(*inputs.tensors)
        torch.cuda.current_stream(device).wait_stream(stream)
        # thread_local: a policy that acts in another thread may allocate meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = function(*inputs.tensors)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        no_autocast("backend 'cudagraph'", device)
        inputs.load(tensors)
        graph.replay()
        return tuple(t.clone() for t in outputs)  # the next replay writes to `outputs`

    return call


def _require_cuda(example: Sequence[Tensor]) -> torch.device:
    device = example[0].device
    if device.type != "cuda":
        raise UserError(
            f"backend 'cudagraph' needs a CUDA device, the tensors are on {device.type}; "
            "take 'eager' or 'compiled'"
        )
    no_autocast("backend 'cudagraph'", device)
    return device
