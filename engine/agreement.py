"""How far two ways of running a world model agree: the quality gate of every inexact saving.

Both imagine the same episodes from the same starts, actions and noise. What is compared is what
reinforcement learning consumes: latents, frames, rewards and successes, and the actions that a
policy takes on what it sees. Disagreement adds up over an episode, as it would in use.

Shape letters: B episodes, T frames, C channels, F latent frames, A action dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldloop.engine.policy.base import Observation, Policy
from worldloop.engine.sampler import derive_seed
from worldloop.engine.world_model import Steps, WorldModel
from worldloop.errors import UserError
from worldloop.metrics import mse, psnr_of_mse
from worldloop.types import Actions, Starts


@dataclass(frozen=True)
class Imagined:
    """What one way of running a world model makes of B episodes of T actions."""

    latents: Tensor  # [B,C,F,h,w] fp32
    frames: npt.NDArray[np.uint8]  # [B,T,1,H,W,3]
    reward: npt.NDArray[np.float32]  # [B,T]
    success: npt.NDArray[np.bool_]  # [B] at any frame
    tokens: npt.NDArray[np.int64] | None  # [B,chunks,T,A] greedy, on the frame after each chunk
    actions: Actions | None  # [B,chunks,T,A]


def imagine(
    world: WorldModel,
    starts: Starts,
    actions_BTA: Actions,
    policy: Policy | None = None,
    *,
    steps: Steps = 4,
    seed: int = 0,
    max_batch: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Imagined:
    """Re-imagine episodes with recorded actions; ask the policy what it would do after each chunk.

    policy: greedy (temperature 0), so that equal frames give equal tokens. progress: is told how
    many frames were made.
    """
    parts = []
    for first in range(0, len(actions_BTA), max_batch):
        rows = range(first, min(first + max_batch, len(actions_BTA)))
        some = starts.select(rows)
        part = _imagine(
            world, some, actions_BTA[rows.start : rows.stop], policy, steps, seed, first
        )
        parts.append(part)
        if progress is not None:
            progress(part.reward.size)
    stacked = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("frames", "reward", "success")
    }
    seen = [(part.tokens, part.actions) for part in parts]
    has_tokens = all(tokens is not None for tokens, _ in seen)
    return Imagined(
        latents=torch.cat([part.latents for part in parts]),
        **stacked,
        tokens=np.concatenate([t for t, _ in seen]) if has_tokens else None,
        actions=None if policy is None else np.concatenate([a for _, a in seen]),
    )


def _imagine(
    world: WorldModel,
    starts: Starts,
    actions_BTA: Actions,
    policy: Policy | None,
    steps: Steps,
    seed: int,
    first: int,
) -> Imagined:
    B, T = len(actions_BTA), world.action_spec.chunk
    latents: list[Tensor] = []
    hook = world.reward.register_forward_pre_hook(
        lambda _, given: latents.append(given[0].detach().float().cpu().clone())
    )
    chunks, answers = [], []
    try:
        seeds = [derive_seed(seed, first + b, 0) for b in range(B)]
        state = world.start(starts.frames, starts.poses, seeds)
        for k in range(actions_BTA.shape[1] // T):
            chunk, state = world.step(state, actions_BTA[:, k * T : (k + 1) * T], steps=steps)
            chunks.append(chunk)
            if policy is not None and chunk.frames is not None:
                shown = chunk.frames[:, -1:]
                episodes = tuple(range(first, first + B))
                looked = Observation(shown, state.poses, starts.instructions, episodes, k)
                answers.append(policy.act(looked, derive_seed(seed, -1, k)))
    finally:
        hook.remove()
    tokens = [answer.tokens for answer in answers if answer.tokens is not None]
    return Imagined(
        torch.cat(latents, 2),
        np.concatenate([chunk.frames for chunk in chunks if chunk.frames is not None], 1),
        np.concatenate([chunk.reward for chunk in chunks], 1),
        np.any([chunk.success.any(1) for chunk in chunks], 0),
        np.stack(tokens, 1) if tokens else None,
        np.stack([answer.actions for answer in answers], 1) if answers else None,
    )


def agreement(reference: Imagined, candidate: Imagined, threshold: float) -> dict[str, Any]:
    """The figures of the gate; `threshold`: reward of a success.

    latent_relative_l2: over all latents, and by chunk of the first episode axis. psnr_db: of the
    mean squared error over all frames (None: identical). reward_flip_rate: frames whose reward is
    on the other side of the threshold. success_flip_rate: episodes. token_agreement: share of the
    policy's greedy action tokens that are equal; action_mean_difference: between its actions.
    Raises UserError where the two did not imagine the same episodes.
    """
    if reference.reward.shape != candidate.reward.shape:
        raise UserError(
            f"agreement: {list(reference.reward.shape)} rewards against "
            f"{list(candidate.reward.shape)}; imagine the same episodes"
        )
    a, b = reference.latents.double(), candidate.latents.double()
    per_frame = [
        float((b[:, :, f] - a[:, :, f]).norm() / a[:, :, f].norm()) for f in range(a.shape[2])
    ]
    error = mse(reference.frames, candidate.frames)
    total = float(error.mean())
    found: dict[str, Any] = {
        "episodes": len(reference.reward),
        "frames": int(reference.reward.size),
        "latent_relative_l2": float((b - a).norm() / a.norm()),
        "latent_relative_l2_first_frame": per_frame[0],
        "latent_relative_l2_last_frame": per_frame[-1],
        "psnr_db": None if total == 0 else float(psnr_of_mse(np.array(total))),
        "psnr_db_worst_frame": None if total == 0 else float(psnr_of_mse(error.max())),
        "reward_flip_rate": float(
            ((reference.reward > threshold) != (candidate.reward > threshold)).mean()
        ),
        "reward_mean_difference": float(np.abs(reference.reward - candidate.reward).mean()),
        "success_flip_rate": float((reference.success != candidate.success).mean()),
        "success_reference": float(reference.success.mean()),
        "success_candidate": float(candidate.success.mean()),
    }
    if reference.tokens is not None and candidate.tokens is not None:
        found["token_agreement"] = float((reference.tokens == candidate.tokens).mean())
    if reference.actions is not None and candidate.actions is not None:
        difference = np.abs(reference.actions - candidate.actions)
        found["action_mean_difference"] = float(difference.mean())
    return found


@dataclass(frozen=True)
class Gate:
    """The least agreement at which a saving may be used; checked by `Gate.check`."""

    latent_relative_l2: float = 0.1
    psnr_db: float = 35.0
    reward_flip_rate: float = 0.01
    success_flip_rate: float = 0.05
    token_agreement: float = 0.9

    def failures(self, found: dict[str, Any]) -> list[str]:
        """One line for each figure of `agreement` that misses its bound; empty: passed."""
        out = []
        for name in ("latent_relative_l2", "reward_flip_rate", "success_flip_rate"):
            if not found[name] <= getattr(self, name):
                out.append(f"{name} is {found[name]:.4g}; at most {getattr(self, name)}")
        for name in ("psnr_db", "token_agreement"):
            value = found.get(name)
            if value is not None and not value >= getattr(self, name):
                out.append(f"{name} is {value:.4g}; at least {getattr(self, name)}")
        return out
