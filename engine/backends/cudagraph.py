"""CUDA graphs: the launches of a pass are recorded once and replayed with one.

A replay reads its inputs where the recording read them, so a call copies its tensors there first;
tensors that are the same objects as at the last call and were not written since are not copied
again, and a history lies where all graphs read it (`base.Resident`). Results are written to buffers
that graphs with results alike share, and handed out as copies. Nothing in a call waits for the
device.

`build` records the module itself, `build_compiled` what torch.compile makes of it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from worldloop.engine.backends import compiled
from worldloop.engine.backends.base import Call, Unchanged, facts_of, no_autocast, require_like
from worldloop.errors import UserError

WARM_UPS = 3  # before recording: libraries choose algorithms and allocate workspaces

_keepers: dict[int, torch.cuda.CUDAGraph] = {}  # one a device, see `_pool`
_results: WeakValueDictionary[Hashable, Results] = WeakValueDictionary()


class StaticInputs:
    """Tensors at fixed addresses, filled before each replay.

    fixed: numbers of those that have their address for good; whoever calls has filled them.
    """

    def __init__(self, example: Sequence[Tensor], fixed: Collection[int] = ()) -> None:
        self.fixed = frozenset(fixed)
        self.expected = [facts_of(t) for t in example]
        # One check for each tensor: some change with every pass, the history does not.
        self._unchanged = [Unchanged() for _ in example]
        with torch.inference_mode(False), torch.no_grad():
            self.tensors = [t if i in self.fixed else _like(t).copy_(t)
                            for i, t in enumerate(example)]  # fmt: skip

    def load(self, tensors: Sequence[Tensor]) -> int:
        """Copy what has changed; the number of tensors copied."""
        require_like(self.expected, tensors)
        copied = 0
        with torch.no_grad():
            for i, (own, given) in enumerate(zip(self.tensors, tensors, strict=True)):
                if i not in self.fixed and not self._unchanged[i]([given]):
                    own.copy_(given, non_blocking=True)
                    copied += 1
        return copied


class Results:
    """Where graphs with results of these shapes write them; they never run at the same time."""

    def __init__(self, made: Sequence[Tensor]) -> None:
        self.tensors = [_like(t) for t in made]

    @classmethod
    def shared(cls, made: Sequence[Tensor]) -> Results:
        """Those that another graph has already, or new ones."""
        key = tuple((facts_of(t), t.stride()) for t in made)
        found = _results.get(key)
        if found is None:
            found = _results[key] = cls(made)
        return found


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.preserve_format)


def build(module: nn.Module, example: Sequence[Tensor], fixed: Collection[int] = ()) -> Call:
    """See `Backend`; fixed as in `StaticInputs`. Raises UserError on a CPU, and under autocast."""
    _require_cuda(example)
    return record(module, StaticInputs(example, fixed))


def build_compiled(
    module: nn.Module, example: Sequence[Tensor], fixed: Collection[int] = ()
) -> Call:
    """See `build`: torch.compile first, then recorded."""
    _require_cuda(example)
    inputs = StaticInputs(example, fixed)
    # With the tensors of the recording: those of an example in inference mode are compiled apart.
    return record(compiled.build(module, inputs.tensors), inputs)


def record(function: Call, inputs: StaticInputs) -> Call:
    """Warm up, record, and return the call that replays."""
    device = inputs.tensors[0].device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.inference_mode():
        pool = _pool()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                made = function(*inputs.tensors)
        torch.cuda.current_stream(device).wait_stream(stream)
        results = Results.shared(made)
        del made
        # thread_local: a policy that acts in another thread may allocate meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            for own, result in zip(results.tensors, function(*inputs.tensors), strict=True):
                own.copy_(result)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        no_autocast("backend 'cudagraph'", device)
        inputs.load(tensors)
        graph.replay()
        return tuple(t.clone() for t in results.tensors)  # the next replay writes there

    return call


def _pool() -> Any:
    """The memory pool of all graphs of the current device: they never run at the same time.

    A pool dies with its last graph, and its name cannot be used again: a graph that is never
    replayed keeps it.
    """
    index = torch.cuda.current_device()
    if index not in _keepers:
        keeper = torch.cuda.CUDAGraph()
        with torch.cuda.graph(keeper, capture_error_mode="thread_local"):
            torch.zeros(1, device="cuda")
        _keepers[index] = keeper
    return _keepers[index].pool()


def _require_cuda(example: Sequence[Tensor]) -> torch.device:
    device = example[0].device
    if device.type != "cuda":
        raise UserError(
            f"backend 'cudagraph' needs a CUDA device, the tensors are on {device.type}; "
            "take 'eager' or 'compiled'"
        )
    no_autocast("backend 'cudagraph'", device)
    return device
