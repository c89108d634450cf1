"""Work in child processes that may hang or die: a simulator is not to take a whole run with it.

Each child serves one function, item after item. One that takes too long or dies is replaced and
its item tried again; an item that fails every time is dropped, and counted by the caller.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from worldloop.errors import UserError

IN_A_ROW = 5  # dropped items after which the simulator is taken to be broken


@dataclass(frozen=True)
class Dropped:
    """An item that could not be done, and why."""

    item: Any
    reason: str


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """What a child does: until its parent hangs up (or dies), answer items."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            item = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = ("done", function(item))
        except KeyboardInterrupt:
            return
        except UserError as error:
            answer = ("user error", str(error))
        except Exception as error:  # the parent tries again, then drops the item and says why
            answer = ("failed", f"{type(error).__name__}: {error}")
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return


class _Child:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, function), daemon=True)
        self.process.start()
        other.close()
        self.number = -1  # of the item it works on
        self.until = 0.0

    def give(self, number: int, item: Any, limit_s: float) -> None:
        self.number, self.until = number, time.monotonic() + limit_s
        self.pipe.send(item)

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


class Children:
    """``processes`` children that serve ``function`` (a module-level function, or a partial).

    limit_s: seconds an item may take, a child's start-up included. tries: of each item.
    """

    def __init__(
        self, function: Callable[[Any], Any], processes: int = 1, limit_s: float = 300.0,
        tries: int = 2,
    ) -> None:  # fmt: skip
        self.function, self.processes = function, processes
        self.limit_s, self.tries = limit_s, tries
        self.children: list[_Child] = []

    def map(self, items: Sequence[Any]) -> Iterator[Any]:
        """The results (or `Dropped`) in the order of the items.

        Raises UserError as a child raised it (no simulator here, unfit policy), and when
        `IN_A_ROW` items after one another had to be dropped. Dropped ones are told when a later
        item has succeeded, or at the end: those of a simulator that is broken are not lost.
        """
        results: dict[int, Any] = {}
        tried = [0] * len(items)
        waiting = list(range(len(items)))[::-1]
        given = 0
        dropped: list[Dropped] = []  # since the last success
        while given < len(items):
            for child in self.children[:]:
                if child.number < 0 and waiting:
                    self._give(child, waiting, items)
            while len(self.children) < self.processes and waiting:
                self.children.append(_Child(self.function))
                self._give(self.children[-1], waiting, items)
            for number, kind, value in self._answers():
                if kind == "user error":
                    raise UserError(value)
                if kind == "failed":
                    tried[number] += 1
                    if tried[number] < self.tries:
                        waiting.append(number)
                        continue
                    value = Dropped(items[number], value)
                results[number] = value
            while given in results:
                result = results.pop(given)
                given += 1
                if isinstance(result, Dropped):
                    dropped.append(result)
                    if len(dropped) >= IN_A_ROW:
                        raise UserError(
                            f"simulator or policy failed {len(dropped)} episodes in a row, each of "
                            f"them {self.tries} times; the last: {result.reason}"
                        )
                    continue
                yield from dropped
                dropped = []
                yield result
        yield from dropped

    def _give(self, child: _Child, waiting: list[int], items: Sequence[Any]) -> None:
        number = waiting.pop()
        with contextlib.suppress(OSError):  # it died while it was idle; `_answers` finds it so
            child.give(number, items[number], self.limit_s)

    def _answers(self) -> list[tuple[int, str, Any]]:
        """What arrived, and which children hang or died; at least one, or after a while none."""
        busy = [child for child in self.children if child.number >= 0]
        nearest = min(child.until for child in busy)
        ready = wait([c.pipe for c in busy], max(0.0, min(nearest - time.monotonic(), 5.0)))
        answers = []
        for child in busy:
            if child.pipe in ready:
                try:
                    kind, value = child.pipe.recv()
                except (EOFError, OSError):
                    child.process.join(5)
                    code = child.process.exitcode
                    answers.append((child.number, "failed", f"its process died (exit {code})"))
                    self._replace(child)
                    continue
                answers.append((child.number, kind, value))
                child.number = -1
            elif time.monotonic() >= child.until:
                answers.append((child.number, "failed", f"no answer in {self.limit_s:g} s"))
                self._replace(child)
        return answers

    def _replace(self, child: _Child) -> None:
        child.end()
        self.children.remove(child)

    def close(self) -> None:
        """End the children."""
        for child in self.children:
            child.end()
        self.children = []

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
