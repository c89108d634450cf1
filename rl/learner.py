"""What GRPO does with finished rollouts: recompute log-probabilities, take clipped steps.

The unit of training is one *decision*: an episode's frame before a chunk and the chunk's tokens.
The unit of a forward pass is what decisions *see*: a group's members begin alike, so their first
decisions are one pass and many tokens. Frames stay uint8 until the moment they are needed.

Shape letters: B episodes, T actions of an episode, K decisions, C actions of a chunk, A action dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from worldloop.config import positive
from worldloop.engine.policy.vla import VLAPolicy, distinct
from worldloop.errors import UserError
from worldloop.rl.loss import ClipConfig, token_loss, trajectory_weights
from worldloop.types import Rollout

Floats = npt.NDArray[np.float32]


MEANS = ("loss", "entropy", "ratio", "clip_fraction", "gap_mean")  # metrics of an update


@dataclass(frozen=True)
class LearnerConfig:
    """Optimizer and loss; the defaults are SimpleVLA-RL's for LIBERO."""

    lr: float = 5e-6
    warmup: int = 0
    """Optimizer steps of linear warm-up."""
    cooldown: float = 0.0
    """Share of the run, at its end, over which the learning rate falls linearly to zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    clip: ClipConfig = ClipConfig()
    mini_batch: int = 128
    """Most episodes an optimizer step; an iteration's are shared out evenly."""
    micro_batch: int = 16
    """Different pictures a forward pass; gradients add up over them."""
    epochs: int = 1
    old_logprobs: str = "recompute"
    """What the ratio is measured from: "recompute" (one more pass with the learner's own
    arithmetic before the first step) or "rollout" (as sampled; right where the gap is small)."""
    checkpoint_blocks: bool = False
    """Recompute layers in the backward pass: less memory, a third more time."""
    freeze_vision: bool = False
    """Leave the vision towers and the projector behind them as they are."""

    def __post_init__(self) -> None:
        if self.old_logprobs not in ("recompute", "rollout"):
            raise UserError(
                f"old_logprobs is {self.old_logprobs!r}; expected 'recompute' or 'rollout'"
            )
        if not 0 <= self.cooldown <= 1:
            raise UserError(f"cooldown is {self.cooldown}; expected 0 .. 1")
        positive(self, "mini_batch", "micro_batch", "epochs")


@dataclass(frozen=True)
class Experience:
    """Episodes with advantages, as `Learner.update` takes them."""

    frames: npt.NDArray[np.uint8]  # [B,K,V,H,W,3] frame k is what decision k saw
    instructions: tuple[str, ...]
    tokens: npt.NDArray[np.int64]  # [B,T,A]
    logprobs: Floats  # [B,T,A] as sampled
    valid: npt.NDArray[np.bool_]  # [B,T]
    advantages: Floats  # [B,K] of every decision

    @classmethod
    def of(cls, rollout: Rollout, advantages: Floats) -> Experience:
        """From a rollout of a policy that samples, made with decode="policy".

        ``advantages``: [B,K], or [B] where all decisions of an episode have the same.
        """
        if rollout.frames is None or rollout.action_tokens is None or rollout.logprobs is None:
            raise UserError(
                "this rollout has no frames, tokens or log-probabilities: roll out a policy that "
                'samples, with decode="policy"'
            )
        if rollout.actions.shape[1] % rollout.frames.shape[1]:  # there is no frame for each chunk
            raise UserError('this rollout has every frame: roll out with decode="policy"')
        each = np.broadcast_to(advantages.reshape(len(advantages), -1), rollout.frames.shape[:2])
        return cls(
            rollout.frames, rollout.instructions, rollout.action_tokens, rollout.logprobs,
            rollout.valid, each,
        )  # fmt: skip


class Learner:
    """A policy with its optimizer. ``precision`` makes the context of every forward pass."""

    def __init__(
        self,
        policy: VLAPolicy,
        config: LearnerConfig,
        precision: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.policy, self.config = policy, config
        self.precision = precision or nullcontext()
        if config.freeze_vision:
            for part in (policy.network.vision_backbone, policy.network.projector):
                part.requires_grad_(False)
        self.parameters = [p for p in policy.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.steps = 0

    # ------------------------------------------------------------ passes

    def _decisions(self, e: Experience, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(episode, chunk) [K,2] of every decision with a valid action."""
        chunk = self.policy.action_spec.chunk
        starts = e.valid[rows, ::chunk]
        b, k = np.nonzero(starts)
        return np.stack([rows[b], k], 1)

    def _micro_batches(
        self, e: Experience, decisions: npt.NDArray[np.int64]
    ) -> Iterator[npt.NDArray[np.int64]]:
        """Parts of these decisions, those that see the same in one."""
        b, k = decisions.T
        _, which = distinct(e.frames[b, k], [e.instructions[i] for i in b])
        for part in range(-(-(which.max(initial=-1) + 1) // self.config.micro_batch)):
            yield decisions[which // self.config.micro_batch == part]

    def _forward(
        self, e: Experience, part: npt.NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies [k,C,A] of a micro-batch's tokens."""
        b, k = part.T
        with self.precision:
            return self.policy.logprobs(
                e.frames[b, k],
                [e.instructions[i] for i in b],
                self._chunks(e.tokens, part),
                checkpoint_blocks=self.config.checkpoint_blocks,
            )

    def _chunks(self, array_BTx: npt.NDArray[Any], part: npt.NDArray[np.int64]) -> Any:
        """The rows (episode, chunk) of an array over time, [k,C,...]."""
        chunk = self.policy.action_spec.chunk
        times = part[:, 1, None] * chunk + np.arange(chunk)
        return array_BTx[part[:, 0, None], times]

    @torch.no_grad()
    def logprobs(self, e: Experience) -> Floats:
        """Log-probabilities [B,T,A] of an experience's tokens by the present weights."""
        out = np.zeros_like(e.logprobs)
        chunk = self.policy.action_spec.chunk
        for part in self._micro_batches(e, self._decisions(e, np.arange(len(e.tokens)))):
            values = self._forward(e, part)[0].float().cpu().numpy()
            for (b, k), value in zip(part, values, strict=True):
                out[b, k * chunk : (k + 1) * chunk] = value
        return out

    # ------------------------------------------------------------ update

    def update(self, e: Experience, seed: int, done: float = 0.0) -> dict[str, float]:
        """Pass over the experience ``epochs`` times in mini-batches; metrics of the whole update.

        ``seed`` orders the mini-batches; ``done`` is the share of the run that lies behind.
        Metrics: loss, entropy (nats a token), ratio (mean and largest), clip_fraction, gradient
        norm, and the gap between the sampler's and the learner's log-probabilities before the
        first step (of all episodes, or of the first mini-batch's with old_logprobs="rollout").
        Raises UserError for a loss that is not finite.
        """
        config = self.config
        old, gap = e.logprobs, {}
        if config.old_logprobs == "recompute":
            old = self.logprobs(e)
            gap = gap_metrics(e.logprobs, old, e.valid)
        rng = np.random.default_rng(seed)
        sums: dict[str, float] = {}
        largest, optimizer_steps = 0.0, 0
        for _ in range(config.epochs):
            order = rng.permutation(len(e.tokens))
            # As even as can be: a step is as long however few episodes its gradient is of.
            for episodes in np.array_split(order, -(-len(order) // config.mini_batch)):
                rows = np.sort(episodes)
                weights = np.zeros(e.valid.shape, np.float32)
                weights[rows] = trajectory_weights(e.valid[rows], e.tokens.shape[-1])
                self.optimizer.zero_grad()
                found = self._accumulate(e, rows, old, weights)
                largest = max(largest, found.pop("ratio_max"))
                seen = {name: found.pop(name) for name in ("gap_mean", "gap_max")}
                gap = gap or seen  # of the first mini-batch, whose weights are the sampler's
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value
                norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip))
                if not np.isfinite(norm):
                    raise UserError(
                        f"gradient norm is {norm} at optimizer step {self.steps}; the last good "
                        "state is on disk; lower the learning rate"
                    )
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate(done)
                self.optimizer.step()
                self.steps += 1
                optimizer_steps += 1
                sums["grad_norm"] = sums.get("grad_norm", 0.0) + norm
        self.policy.version += 1
        means = {name: value / max(1, optimizer_steps) for name, value in sums.items()}
        return {**means, "ratio_max": largest, "optimizer_steps": optimizer_steps, **gap}

    def _accumulate(
        self, e: Experience, rows: npt.NDArray[np.int64], old: Floats, weights: Floats
    ) -> dict[str, float]:
        """The gradient of a mini-batch, and its metrics, which are weighted like it.

        Decisions without an advantage, whose gradient is zero, are left out of both: with branches
        those after which all went alike. Metrics stay on the device until the last micro-batch:
        reading one would make the host wait.
        """
        sums: dict[str, Any] = dict.fromkeys(MEANS, 0.0)
        largest: dict[str, Any] = {"ratio_max": 0.0, "gap_max": 0.0}
        decisions = self._decisions(e, rows)
        decisions = decisions[e.advantages[tuple(decisions.T)] != 0]
        learned = float(self._chunks(weights, decisions).sum()) * e.tokens.shape[-1]
        for part in self._micro_batches(e, decisions):
            logprobs, entropy = self._forward(e, part)
            device = logprobs.device
            weight = torch.from_numpy(self._chunks(weights, part)).to(device)[..., None]
            advantage = torch.from_numpy(e.advantages[tuple(part.T)]).to(device)[:, None, None]
            before = torch.from_numpy(self._chunks(old, part)).to(device)
            losses, facts = token_loss(logprobs.float(), before, advantage, self.config.clip)
            loss = (losses * weight).sum()
            loss.backward()
            with torch.no_grad():
                gap, ratio = (logprobs.float() - before).abs(), facts["ratio"]
                values = (losses, entropy, ratio, facts["clipped"], gap)
                for name, value in zip(MEANS, values, strict=True):
                    sums[name] += (value * weight).sum()
                for name, value in (("ratio_max", ratio), ("gap_max", gap)):
                    here = torch.where(weight > 0, value, 0).amax()
                    largest[name] = here.clamp_min(largest[name])
        total = float(sums.pop("loss"))
        means = {name: float(value) / max(learned, 1e-9) for name, value in sums.items()}
        return {"loss": total, **means, **{name: float(value) for name, value in largest.items()}}

    def learning_rate(self, done: float) -> float:
        """Of the next optimizer step, at this share of the run: warm-up, constant, cool-down."""
        config = self.config
        warm = min(1.0, (self.steps + 1) / max(1, config.warmup))
        cool = min(1.0, (1 - done) / config.cooldown) if config.cooldown else 1.0
        return config.lr * warm * cool

    # ------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the step number."""
        return {
            "network": self.policy.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "version": self.policy.version,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; raises where the network is another one."""
        self.policy.network.load_state_dict(state["network"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.policy.version = int(state["steps"]), int(state["version"])


def gap_metrics(
    sampled: Floats, recomputed: Floats, valid_BT: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """Mean and largest |log-probability at sampling - recomputed| over valid tokens, in nats."""
    gap = np.abs(sampled - recomputed)[valid_BT]
    return {"gap_mean": float(gap.mean()), "gap_max": float(gap.max())}
