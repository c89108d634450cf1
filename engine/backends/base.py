"""What every back end is: a pure function of tensors, made faster without changing it.

    build(module, example) -> call
    call(*tensors) -> tuple of tensors

`module` is a pure function of positional tensors that returns a tuple of tensors. `example` are
tensors of the shapes, dtypes and device of every later call; a call with others raises UserError.
What a call returns is the caller's: no later call writes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from worldloop.errors import UserError

Call = Callable[..., tuple[Tensor, ...]]

# Rows are padded up to the next of these, so that few shapes are compiled or captured; more rows
# than the largest go in pieces of it.
BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


class Backend(Protocol):
    """`build` of a back end's module."""

    def __call__(self, module: nn.Module, example: Sequence[Tensor]) -> Call: ...


def require_like(example: Sequence[Facts], tensors: Sequence[Tensor]) -> None:
    """Raises UserError naming the first tensor that is not as in the example."""
    if len(example) != len(tensors):
        raise UserError(f"back end: made for {len(example)} tensors, called with {len(tensors)}")
    for i, (facts, tensor) in enumerate(zip(example, tensors, strict=True)):
        if facts != facts_of(tensor):
            raise UserError(
                f"back end: tensor {i} is {facts_of(tensor)}, the example was {facts}; "
                "build another call for it"
            )


Facts = tuple[tuple[int, ...], torch.dtype, torch.device]


def facts_of(tensor: Tensor) -> Facts:
    """Shape, dtype and device."""
    return tuple(tensor.shape), tensor.dtype, tensor.device


def no_autocast(what: str, device: torch.device) -> None:
    """Raises UserError under autocast, which such a back end cannot follow."""
    if torch.is_autocast_enabled(device.type):
        raise UserError(
            f"{what} does not work under autocast; load the world model with dtype=torch.bfloat16 "
            "instead"
        )


class Calls:
    """The calls of one network, built as they are needed: one for each kind, shape and bucket.

    buckets: numbers of rows, rising; None: every number of rows gets a call of its own.
    room: entries of dimension 1 of a full history. With it the history lies in buffers that stay
    (`Resident`), and ``build(module, example, fixed=indices)`` is told which tensors these are.
    """

    def __init__(
        self, build: Callable[..., Call], buckets: Sequence[int] | None, room: int | None = None
    ) -> None:
        if buckets is not None and (not buckets or list(buckets) != sorted(set(buckets))):
            raise UserError(f"buckets is {list(buckets)}; expected numbers of rows, rising")
        self.build = build
        self.buckets = buckets
        self.built: dict[Hashable, Call] = {}
        self._resides = room is not None
        self._history = _Padded() if room is None else Resident(room, self.built.clear)

    def __call__(
        self,
        kind: Hashable,
        module: Callable[[], nn.Module],
        batched: Sequence[Tensor],
        shared: Sequence[Tensor] = (),
        lasting: int = 0,
    ) -> tuple[Tensor, ...]:
        """Run; rows are dimension 0 of every `batched` tensor and of every result.

        module: makes the pure module (batched tensors, then shared ones) of this kind.
        lasting: how many of the last batched tensors come again and again unchanged (the history
        of a chunk); they are padded, and put into one order, once.
        """
        rows = batched[0].shape[0]
        if self.buckets is None:
            return self._run(kind, module, batched, shared, ())
        fresh = len(batched) - lasting
        if rows > self.buckets[-1]:
            most = self.buckets[-1]
            parts = [
                self(kind, module, [t[i : i + most] for t in batched], shared, lasting)
                for i in range(0, rows, most)
            ]
            return tuple(torch.cat(results) for results in zip(*parts, strict=True))
        bucket = next(b for b in self.buckets if b >= rows)
        padded = [_pad(t, bucket) for t in batched[:fresh]]
        padded += self._history(batched[fresh:], bucket)
        out = self._run(kind, module, padded, shared, range(fresh, len(padded)))
        return tuple(t[:rows] for t in out)

    def _run(
        self,
        kind: Hashable,
        module: Callable[[], nn.Module],
        batched: Sequence[Tensor],
        shared: Sequence[Tensor],
        lasting: Sequence[int],
    ) -> tuple[Tensor, ...]:
        tensors = [*batched, *shared]
        autocast = torch.is_autocast_enabled(tensors[0].device.type)
        key = (kind, autocast, *map(facts_of, tensors))
        if key not in self.built:
            fixed = {"fixed": lasting} if self._resides else {}
            self.built[key] = self.build(module(), tensors, **fixed)
        return self.built[key](*tensors)


def _pad(tensor: Tensor, rows: int) -> Tensor:
    """More rows, copies of the first one: finite, of its range, and never looked at."""
    missing = rows - tensor.shape[0]
    if not missing:
        return tensor
    # Not an expanded row: torch.cat would lose the order of channels-last tensors.
    return torch.cat([tensor, *[tensor[:1]] * missing])


class Unchanged:
    """Whether tensors are those of the last time, and nobody has written to them since."""

    def __init__(self) -> None:
        self._seen: list[tuple[Callable[[], Tensor | None], int]] = []

    def __call__(self, tensors: Sequence[Tensor]) -> bool:
        """Compare with the last call's tensors, and remember these."""
        same = len(tensors) == len(self._seen) and all(
            ref() is t and not t.is_inference() and version == t._version
            for (ref, version), t in zip(self._seen, tensors, strict=True)
        )
        if not same:
            # Weak references: the history of an episode that is over may be freed. Tensors of
            # inference mode count no writes, so they are never taken for unchanged.
            from weakref import ref

            self._seen = [(ref(t), -1 if t.is_inference() else t._version) for t in tensors]
        return same


class _Padded:
    """The history of a chunk with padded rows, made once for all its passes.

    Contiguous whether it was padded or not: a history that is not yet full is a strided view, and
    a compiler would make another graph for its strides.
    """

    def __init__(self) -> None:
        self._unchanged = Unchanged()
        self._rows = 0
        self._made: list[Tensor] = []

    def __call__(self, tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
        if not (self._unchanged(tensors) and rows == self._rows):
            self._made = []  # free the last one first
            # Ordinary tensors, so that a back end can tell that they are unchanged as well.
            with torch.inference_mode(False), torch.no_grad():
                self._made = [_pad(t, rows).contiguous() for t in tensors]
            self._rows = rows
        return self._made


class Resident:
    """The history of a chunk in buffers that stay where they are, for graphs that read them there.

    One buffer a tensor, for the rows of the largest bucket so far and a full history: histories of
    all lengths and buckets are views of it, so that it is there once, however many graphs read it.
    ``drop`` is called before larger ones take their places: what read the old ones is void.
    """

    def __init__(self, room: int, drop: Callable[[], None]) -> None:
        self.room, self.drop = room, drop
        self._unchanged = Unchanged()
        self._buffers: list[Tensor] = []
        self._views: list[Tensor] = []

    def __call__(self, tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
        if not tensors:
            return []
        if self._unchanged(tensors) and self._views and len(self._views[0]) == rows:
            return self._views
        with torch.inference_mode(False), torch.no_grad():
            if not self._fit(tensors, rows):
                self._buffers, self._views = [], []  # free the old ones first
                self.drop()
                self._buffers = [
                    t.new_zeros(rows, max(self.room, t.shape[1]), *t.shape[2:]) for t in tensors
                ]
            self._views = [b[:rows, : t.shape[1]] for b, t in zip(self._buffers, tensors)]
            for view, tensor in zip(self._views, tensors, strict=True):
                count = len(tensor)
                view[:count].copy_(tensor, non_blocking=True)
                if count < rows:  # finite, of its range, and never looked at
                    view[count:].copy_(tensor[:1].expand(rows - count, *tensor.shape[1:]))
        return self._views

    def _fit(self, tensors: Sequence[Tensor], rows: int) -> bool:
        return len(self._buffers) == len(tensors) and all(
            b.shape[0] >= rows and b.shape[1] >= t.shape[1] and b.shape[2:] == t.shape[2:]
            and (b.dtype, b.device) == (t.dtype, t.device)
            for b, t in zip(self._buffers, tensors, strict=True)
        )  # fmt: skip
