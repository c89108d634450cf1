"""RolloutEngine: policy and world model in turn, many episodes at once.

Episodes go through in batches of at most ``max_batch``; with ``stop_on_success`` an episode is
over at its first success: later actions are not valid, and its row leaves the batch after the
chunk, so that no step is spent on it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from worldloop.engine.policy.base import Observation, Policy, PolicyAction, ReplayPolicy
from worldloop.engine.sampler import STREAMING_TIMES, derive_seed
from worldloop.engine.world_model import Decode, Steps, Timer, WorldModel
from worldloop.errors import UserError
from worldloop.files import PathLike
from worldloop.track import Progress
from worldloop.types import Chunk, Rollout, Starts

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
        seed: int = 0,
        decode: Decode = "policy",
        max_batch: int | None = None,
        share_noise: bool = False,
        stop_on_success: bool = False,
        progress: Progress | None = None,
    ) -> Rollout:
        """Imagine ``group_size`` episodes from every start.

        horizon: actions per episode, a multiple of the chunk. Row ``g * group_size + m`` is member
        m of group g; its world noise depends on (seed, g, m) alone, or on (seed, g) with
        ``share_noise``. decode: "all" returns every frame, "policy" the one after each chunk (and
        the start), "none" none (only for a policy that reads no frames). progress: counts frames.
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
        per_batch = groups if max_batch is None else max(1, max_batch // group_size)
        begun = time.perf_counter()
        timer = Timer()
        parts = [
            self._batch(
                starts.select(range(first, min(first + per_batch, groups))),
                first,
                horizon // chunk,
                group_size,
                seed,
                decode,
                share_noise,
                stop_on_success,
                timer,
                progress,
            )
            for first in range(0, groups, per_batch)
        ]
        timings = {**timer.seconds, "total": time.perf_counter() - begun}
        return _stack(parts, starts, group_size, timings)

    def _batch(
        self,
        starts: Starts,
        first_group: int,
        chunks: int,
        group_size: int,
        seed: int,
        decode: Decode,
        share_noise: bool,
        stop_on_success: bool,
        timer: Timer,
        progress: Progress | None,
    ) -> dict[str, Any]:
        groups = len(starts.instructions)
        members = [(first_group + g, m) for g in range(groups) for m in range(group_size)]
        seeds = [derive_seed(seed, g, 0 if share_noise else m) for g, m in members]
        clock = time.perf_counter()
        state = self.world.start(starts.frames, starts.poses, seeds[::group_size])
        state = state.fork(group_size, seeds)
        timer.add("start", clock)
        spec = self.world.action_spec
        B, T = len(members), chunks * spec.chunk
        record: dict[str, Any] = {
            "actions": np.zeros((B, T, spec.dim), np.float32),
            "reward": np.zeros((B, T), np.float32),
            "success": np.zeros(B, bool),
            "valid": np.zeros((B, T), bool),
            "seeds": np.array(seeds, np.int64),
            "tokens": None,
            "logprobs": None,
            "frames": None,
        }
        shown = np.repeat(starts.frames, group_size, 0)
        if decode != "none":
            count = T if decode == "all" else chunks
            record["frames"] = np.zeros((B, 1 + count, *shown.shape[2:]), np.uint8)
            record["frames"][:, :1] = shown
        instructions = [text for text in starts.instructions for _ in range(group_size)]
        rows = list(range(B))  # episodes still in the batch
        for k in range(chunks):
            clock = time.perf_counter()
            action = self.policy.act(
                Observation(
                    shown,
                    state.poses,
                    tuple(instructions[r] for r in rows),
                    tuple(first_group * group_size + r for r in rows),
                    k,
                ),
                # No group has the number -1: never the seed of a member's world noise.
                derive_seed(seed, -1, k),
            )
            timer.add("policy", clock)
            out, state = self.world.step(
                state,
                action.actions,
                steps=self.steps,
                decode=decode,
                commit=k + 1 < chunks,
                timer=timer,
            )
            self._record(record, rows, k, action, out, decode, stop_on_success)
            if out.frames is not None:
                shown = out.frames[:, -1:]
            if progress is not None:
                progress.update(len(rows) * spec.chunk)
            if stop_on_success and state.done.any():
                kept = [i for i in range(len(rows)) if not state.done[i]]
                if not kept:
                    break
                rows, shown = [rows[i] for i in kept], shown[kept]
                state = state.select(kept)
        return record

    def _record(
        self,
        record: dict[str, Any],
        rows: Sequence[int],
        k: int,
        action: PolicyAction,
        out: Chunk,
        decode: Decode,
        stop_on_success: bool,
    ) -> None:
        T = self.world.action_spec.chunk
        shape = (len(rows), T, self.world.action_spec.dim)
        time_slice = slice(k * T, (k + 1) * T)
        record["actions"][rows, time_slice] = action.actions
        record["reward"][rows, time_slice] = out.reward
        over = np.cumsum(out.success, 1) - out.success > 0  # a success lies before this action
        record["valid"][rows, time_slice] = ~over if stop_on_success else True
        record["success"][rows] |= out.success.any(1)
        for name, value in (("tokens", action.tokens), ("logprobs", action.logprobs)):
            if value is not None:
                if value.shape != shape:
                    raise UserError(
                        f"the policy's {name} has shape {list(value.shape)}; expected {list(shape)}"
                    )
                if record[name] is None:
                    record[name] = np.zeros(record["actions"].shape, value.dtype)
                record[name][rows, time_slice] = value
        if out.frames is not None:
            if decode == "all":
                record["frames"][rows, 1 + k * T : 1 + (k + 1) * T] = out.frames
            else:
                record["frames"][rows, 1 + k] = out.frames[:, -1]


def _stack(
    parts: Sequence[dict[str, Any]], starts: Starts, group_size: int, timings: dict[str, float]
) -> Rollout:
    def joined(name: str) -> Any:
        values = [part[name] for part in parts]
        return None if any(v is None for v in values) else np.concatenate(values)

    groups = len(starts.instructions)
    return Rollout(
        frames=joined("frames"),
        actions=joined("actions"),
        reward=joined("reward"),
        success=joined("success"),
        valid=joined("valid"),
        seeds=joined("seeds"),
        group_id=np.repeat(np.arange(groups), group_size),
        instructions=tuple(t for t in starts.instructions for _ in range(group_size)),
        start_pose=np.repeat(starts.poses, group_size, 0),
        action_tokens=joined("tokens"),
        logprobs=joined("logprobs"),
        timings=timings,
    )
