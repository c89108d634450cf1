"""Where the time of a chunk goes: DiT, autoencoder and policy, by the clock around their calls."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from worldloop.bench.policy import make_policy
from worldloop.bench.timing import synchronise
from worldloop.bench.worlds import start_state
from worldloop.engine.policy.base import Policy
from worldloop.engine.policy.vla import VLAPolicy
from worldloop.engine.rollout import RolloutEngine
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.rl.starts import load_starts
from worldloop.types import Starts


class Parts:
    """Within the block, seconds spent in the DiT, the autoencoder, the reward head and a policy.

    On a GPU each call waits for the device before and after, so that the seconds are the part's
    own; the whole is then a little slower than without, and is timed apart for its speed.
    """

    def __init__(
        self, world: WorldModel, network: nn.Module | None = None, policy: Policy | None = None
    ) -> None:
        self.world, self.device = world, world.device
        self.seconds = {"dit": 0.0, "vae": 0.0, "reward": 0.0, "policy": 0.0}
        self._calls: list[tuple[Any, str, str]] = [
            (world.dit, "forward", "dit"),
            (world.autoencoder, "encode", "vae"),
            (world.autoencoder, "decode", "vae"),
            (world.reward, "forward", "reward"),
        ]
        if network is not None:
            self._calls.append((network, "forward", "dit"))
        if policy is not None:
            self._calls.append((policy, "act", "policy"))

    def __enter__(self) -> Parts:
        for owner, name, part in self._calls:
            # On the instance, before its class's own; gone again at the end of the block.
            owner.__dict__[name] = self._timed(getattr(owner, name), part)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, _part in self._calls:
            del owner.__dict__[name]

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronise(self.device)
            since = time.perf_counter()
            result = call(*args, **kwargs)
            synchronise(self.device)
            self.seconds[part] += time.perf_counter() - since
            return result

        return timed


def policy_for(world: WorldModel, preset: str, device: torch.device, dtype: torch.dtype) -> Policy:
    """The shipped policy for `tiny`; for a large world the 7b one with random weights."""
    if preset == "tiny":
        return VLAPolicy.from_pretrained("policy/pushcube", device=device, dtype=dtype)
    return make_policy("7b", device, dtype, world.action_spec)


@torch.inference_mode()
def engine_shares(
    world: WorldModel, preset: str, rows: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Whole rollouts of `RolloutEngine`: three chunks, four steps, only the policy's frame decoded.

    outside: the share of time in none of DiT, autoencoder and policy (the reward head, which lies
    outside as well, is given by itself). The median of three rollouts after one to warm up.
    """
    policy = policy_for(world, preset, device, dtype)
    if world.config.env_ids:
        starts = load_starts(None, world)
        starts = starts.select([row % len(starts.instructions) for row in range(rows)])
    else:
        state = start_state(world, rows)
        height, width = world.config.picture
        frames = np.random.default_rng(0).integers(0, 256, (rows, 1, 1, height, width, 3), np.uint8)
        starts = Starts(frames, state.poses, ("push the blue cube onto the target",) * rows)
    engine = RolloutEngine(world, policy, steps=4)
    horizon = 3 * world.action_spec.chunk
    found = []
    for i in range(4):
        synchronise(device)
        since = time.perf_counter()
        with Parts(world, policy=policy) as parts:
            engine.rollout(starts, horizon=horizon)
            synchronise(device)
        total = time.perf_counter() - since
        if min(parts.seconds[name] for name in ("dit", "vae", "policy")) == 0:
            raise UserError("a part was never called; the split would be false")
        inside = parts.seconds["dit"] + parts.seconds["vae"] + parts.seconds["policy"]
        if i:
            found.append((1 - inside / total, total, parts.seconds))
    outside, total, seconds = sorted(found, key=lambda item: item[0])[len(found) // 2]
    return {
        "batch": rows,
        "chunks": 3,
        "steps": 4,
        "decode": "policy",
        "total_s": total,
        "seconds": seconds,
        "outside": outside,
        "frames_per_s": rows * horizon / total,
    }
