"""RolloutEngine: policy and world model in turn, many episodes at once.

At most ``max_batch`` episodes are in the batch. With ``stop_on_success`` an episode is over at its
first success: later actions are not valid, and its row leaves the batch after the chunk. As soon as
a group fits into the free slots, it begins: no step is spent on masked time, and none on waiting
for the slowest.

A group can branch: a world model, unlike a world, goes on from one moment as often as it is asked.
With ``branching=(4, 4)`` four first chunks are imagined from a start, and four second ones after
each: 16 episodes for 20 chunks instead of 32, and a chunk is told apart from what came before it.
A row of the batch then stands for all rows of the rollout that have been alike so far.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import torch

from worldloop.engine.policy.base import Observation, Policy, PolicyAction, ReplayPolicy
from worldloop.engine.sampler import STREAMING_TIMES, derive_seed
from worldloop.engine.world_model import Decode, Steps, Timer, WorldModel
from worldloop.engine.world_state import WorldState
from worldloop.errors import UserError
from worldloop.files import PathLike
from worldloop.track import Progress
from worldloop.types import Chunk, Frames, Rollout, Starts

__all__ = ["ReplayPolicy", "RolloutEngine"]


class RolloutEngine:
    """Imagines episodes: ``RolloutEngine(world, policy).rollout(starts, horizon=72)``.

    steps: denoising steps of the world model (1, 2, 4 or "reference"). Raises UserError when the
    policy's actions mean something else than the world model's.
    """

    def __init__(self, world: WorldModel, policy: Policy, *, steps: Steps = 4) -> None:
        world.action_spec.require_same(policy.action_spec, "the world model", "the policy")
        if world.action_spec.chunk != policy.action_spec.chunk:
            raise UserError(
                f"the world model takes chunks of {world.action_spec.chunk} actions, the policy "
                f"gives {policy.action_spec.chunk}"
            )
        if steps != "reference" and steps not in STREAMING_TIMES:
            known = ", ".join(map(str, STREAMING_TIMES))
            raise UserError(f"steps is {steps!r}; expected {known} or 'reference'")
        self.world, self.policy, self.steps = world, policy, steps

    @classmethod
    def from_pretrained(
        cls,
        world: PathLike,
        policy: Policy,
        *,
        steps: Steps = 4,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> RolloutEngine:
        """With a world model from a folder, a shipped preset's name or a hub id."""
        loaded = WorldModel.from_pretrained(world, device=device, dtype=dtype)
        return cls(loaded, policy, steps=steps)

    def rollout(
        self,
        starts: Starts,
        *,
        horizon: int = 72,
        group_size: int = 1,
        branching: Sequence[int] = (),
        seed: int = 0,
        decode: Decode = "policy",
        max_batch: int | None = None,
        share_noise: bool = False,
        stop_on_success: bool = False,
        overlap: bool = False,
        progress: Progress | None = None,
    ) -> Rollout:
        """Imagine ``group_size`` episodes from every start.

        horizon: actions per episode, a multiple of the chunk. Row ``g * group_size + m`` is member
        m of group g; its world noise depends on (seed, g, m) alone, or on (seed, g) with
        ``share_noise``. branching: into how many each episode parts at its first chunk, its second
        and so on; their product is the group's size, and without it all part at the first. Rows of
        a group that have not parted yet have the actions and the noise of the first of them.
        decode: "all" returns every frame, "policy" those that the policy sees (the start and the
        one after each chunk but the last), "none" none (only for a policy that reads no frames).
        max_batch: most episodes in the batch at once. overlap: the policy acts for one half of the
        batch, in a thread, while the world model imagines the other (``timings`` then adds up to
        more than the total).
        progress: counts frames.
        """
        chunk = self.world.action_spec.chunk
        if horizon < chunk or horizon % chunk:
            raise UserError(f"horizon is {horizon}; expected a multiple of {chunk}, the chunk")
        if group_size < 1 or (max_batch is not None and max_batch < group_size):
            raise UserError(
                f"group_size is {group_size}; expected at least 1 and at most max_batch"
                f" ({max_batch})"
            )
        if decode not in ("all", "policy", "none"):
            raise UserError(f"decode is {decode!r}; expected 'all', 'policy' or 'none'")
        if decode == "none" and self.policy.reads_frames:
            raise UserError("decode is 'none', but the policy looks at frames; use 'policy'")
        groups = len(starts.instructions)
        widths = rows_alike(branching or (group_size,), group_size, horizon // chunk)
        run = _Run(
            self, starts, widths, group_size, seed, decode, share_noise,
            stop_on_success, Timer(), progress,
        )  # fmt: skip
        begun = time.perf_counter()
        most = groups * group_size if max_batch is None else max_batch
        with contextlib.ExitStack() as stack:
            ask = stack.enter_context(_asking(self.world.device)) if overlap else _ask_at_once
            self._schedule(run, most, 2 if overlap else 1, ask)
        timings = {**run.timer.seconds, "total": time.perf_counter() - begun}
        return run.rollout(timings)

    def _schedule(self, run: _Run, max_batch: int, ways: int, ask: Ask) -> None:
        """Continuous batching: cohorts take turns; slots that come free take waiting groups.

        Rows of a cohort are equally far, so that its chunk is one batch. ``ways``: cohorts that a
        batch is split into, so that one can wait for the policy while another is in the world.
        """
        waiting = deque(range(len(run.starts.instructions)))
        cohorts: deque[tuple[_Cohort, Answer]] = deque()
        while waiting or cohorts:
            free = max_batch - sum(run.slots(cohort) for cohort, _ in cohorts)
            fit = min(len(waiting), free // run.group_size)
            for way in range(ways if fit >= ways else min(fit, 1)):
                share = fit // ways + (way < fit % ways) if fit >= ways else fit
                cohort = run.begin([waiting.popleft() for _ in range(share)])
                cohorts.append((cohort, ask(partial(run.act, cohort))))
            cohort, answer = cohorts.popleft()
            left = run.step(cohort, answer())
            if left is not None:
                cohorts.append((left, ask(partial(run.act, left))))


def rows_alike(branching: Sequence[int], group_size: int, chunks: int) -> list[int]:
    """How many rows of a group share each chunk: (4, 4) is [4, 1, 1 ...].

    Raises UserError where the branches do not multiply to the group's size.
    """
    if min(branching) < 1 or math.prod(branching) != group_size or len(branching) > chunks:
        raise UserError(
            f"branching is {' '.join(map(str, branching))}; expected at most {chunks} numbers (the "
            f"chunks of an episode) whose product is the group's size, {group_size}"
        )
    parted = itertools.accumulate(branching, operator.mul)
    widths = [group_size // so_far for so_far in parted]
    return widths + [1] * (chunks - len(widths))


Answer = Callable[[], PolicyAction]
Ask = Callable[[Answer], Answer]


def _ask_at_once(call: Answer) -> Answer:
    """The policy is called when its answer is needed."""
    return call


@contextlib.contextmanager
def _asking(device: torch.device) -> Iterator[Ask]:
    """The policy is called in a thread of its own; on a GPU, on a stream of its own."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    stream = _policy_stream(device) if kind == "cuda" else None

    def begin() -> None:
        # A thread starts without its parent's autocast. It is never left, or the weights that it
        # has cast would be cast anew at each call.
        torch.autocast(kind, dtype, enabled=enabled).__enter__()

    def within(call: Answer) -> PolicyAction:
        with torch.cuda.stream(stream):
            return call()

    with ThreadPoolExecutor(1, "policy", initializer=begin) as pool:
        yield lambda call: pool.submit(within, call).result


@cache
def _policy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all rollouts: what an allocator keeps for a stream serves no other one."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class _Cohort:
    """Episodes in the batch that are equally far: ``state`` after ``chunks`` chunks."""

    rows: list[int]  # of the rollout: the first of those that each stands for
    state: WorldState
    shown: Frames  # [B,1,V,H,W,3] what the policy sees
    chunks: int


class _Run:
    """One rollout: its options and what has been recorded of it so far."""

    def __init__(
        self,
        engine: RolloutEngine,
        starts: Starts,
        widths: Sequence[int],
        group_size: int,
        seed: int,
        decode: Decode,
        share_noise: bool,
        stop_on_success: bool,
        timer: Timer,
        progress: Progress | None,
    ) -> None:
        self.engine, self.starts, self.widths, self.group_size = engine, starts, widths, group_size
        self.seed, self.decode, self.stop_on_success = seed, decode, stop_on_success
        self.timer, self.progress = timer, progress
        groups, spec = len(starts.instructions), engine.world.action_spec
        B, T = groups * group_size, len(widths) * spec.chunk
        self.seeds = [
            derive_seed(seed, g, 0 if share_noise else m)
            for g in range(groups)
            for m in range(group_size)
        ]
        self.instructions = tuple(t for t in starts.instructions for _ in range(group_size))
        self.actions = np.zeros((B, T, spec.dim), np.float32)
        self.reward = np.zeros((B, T), np.float32)
        self.success = np.zeros(B, bool)
        self.valid = np.zeros((B, T), bool)
        self.tokens: npt.NDArray[np.int64] | None = None
        self.logprobs: npt.NDArray[np.float32] | None = None
        self.frames: Frames | None = None
        if decode != "none":
            count = 1 + T if decode == "all" else len(widths)
            self.frames = np.zeros((B, count, *starts.frames.shape[2:]), np.uint8)
            self.frames[:, :1] = np.repeat(starts.frames, group_size, 0)

    def begin(self, groups: list[int]) -> _Cohort:
        """The first frames of these groups, encoded once each."""
        clock = time.perf_counter()
        rows, starts = [g * self.group_size for g in groups], self.starts.select(groups)
        seeds = [self.seeds[row] for row in rows]
        state = self.engine.world.start(starts.frames, starts.poses, seeds, starts.instructions)
        cohort = self.part(rows, state, starts.frames, 0)
        self.timer.add("start", clock)
        return cohort

    def part(self, rows: list[int], state: WorldState, shown: Frames, chunks: int) -> _Cohort:
        """The cohort of these rows, each as often as it parts in the chunk that comes."""
        width = self.widths[chunks]
        n = (self.widths[chunks - 1] if chunks else self.group_size) // width
        if n > 1:
            rows = [row + k * width for row in rows for k in range(n)]
            state = state.fork(n, [self.seeds[row] for row in rows])
            shown = np.repeat(shown, n, 0)
        return _Cohort(rows, state, shown, chunks)

    def slots(self, cohort: _Cohort) -> int:
        """Rows that it will have in the batch when all have parted."""
        return len(cohort.rows) * self.widths[cohort.chunks]

    def act(self, cohort: _Cohort) -> PolicyAction:
        clock = time.perf_counter()
        observation = Observation(
            cohort.shown,
            cohort.state.poses,
            tuple(self.instructions[row] for row in cohort.rows),
            tuple(cohort.rows),
            cohort.chunks,
        )
        # No group has the number -1: never the seed of a member's world noise.
        action = self.engine.policy.act(observation, derive_seed(self.seed, -1, cohort.chunks))
        self.timer.add("policy", clock)
        return action

    def step(self, cohort: _Cohort, action: PolicyAction) -> _Cohort | None:
        """Imagine the chunk and record it; the cohort of those that go on, or None."""
        done = cohort.chunks + 1
        last = done == len(self.widths)
        out, state = self.engine.world.step(
            cohort.state,
            action.actions,
            steps=self.engine.steps,
            decode="none" if last and self.decode == "policy" else self.decode,
            commit=not last,
            timer=self.timer,
        )
        self._record(cohort, action, out)
        if self.progress is not None:
            self.progress.update(out.reward.size)
        if last:
            return None
        rows, shown = cohort.rows, cohort.shown if out.frames is None else out.frames[:, -1:]
        if self.stop_on_success and state.done.any():
            kept = [i for i in range(len(rows)) if not state.done[i]]
            if not kept:
                return None
            rows, shown, state = [rows[i] for i in kept], shown[kept], state.select(kept)
        return self.part(rows, state, shown, done)

    def _record(self, cohort: _Cohort, action: PolicyAction, out: Chunk) -> None:
        width, spec = self.widths[cohort.chunks], self.engine.world.action_spec
        rows = [row + k for row in cohort.rows for k in range(width)]
        alike = partial(np.repeat, repeats=width, axis=0)
        shape = (len(cohort.rows), spec.chunk, spec.dim)
        times = slice(cohort.chunks * spec.chunk, (cohort.chunks + 1) * spec.chunk)
        self.actions[rows, times] = alike(action.actions)
        self.reward[rows, times] = alike(out.reward)
        over = np.cumsum(out.success, 1) - out.success > 0  # a success lies before this action
        self.valid[rows, times] = alike(~over) if self.stop_on_success else True
        self.success[rows] |= alike(out.success.any(1))
        for name in ("tokens", "logprobs"):
            value = getattr(action, name)
            if value is None:
                continue
            if value.shape != shape:
                raise UserError(
                    f"the policy's {name} has shape {list(value.shape)}; expected {list(shape)}"
                )
            if getattr(self, name) is None:
                setattr(self, name, np.zeros(self.actions.shape, value.dtype))
            getattr(self, name)[rows, times] = alike(value)
        if self.frames is not None and out.frames is not None:
            each = spec.chunk if self.decode == "all" else 1
            first = 1 + cohort.chunks * each
            self.frames[rows, first : first + each] = alike(out.frames[:, -each:])

    def rollout(self, timings: dict[str, float]) -> Rollout:
        return Rollout(
            frames=self.frames,
            actions=self.actions,
            reward=self.reward,
            success=self.success,
            valid=self.valid,
            seeds=np.array(self.seeds, np.int64),
            group_id=np.repeat(np.arange(len(self.starts.instructions)), self.group_size),
            instructions=self.instructions,
            start_pose=np.repeat(self.starts.poses, self.group_size, 0),
            action_tokens=self.tokens,
            logprobs=self.logprobs,
            timings=timings,
        )
