"""The clipped policy loss of GRPO as SimpleVLA-RL uses it, by tokens or by the path's modes.

Shape letters: B episodes, T actions, A action dim; k decisions, C actions of a chunk, M modes, N
bins. Losses are in nats times advantage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldloop.engine.policy.action_tokens import BINS, from_tokens


@dataclass(frozen=True)
class ClipConfig:
    """Bounds of the probability ratio; asymmetric after DAPO."""

    low: float = 0.2
    high: float = 0.28
    dual: float | None = None
    """Most that a bad token may count, as a multiple of its advantage (RLinf: 3); None: no bound.
    """


def token_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: ClipConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A r, -A clip(r)) for each token, r = exp(logprob - old); shapes broadcast.

    Also returns ``ratio`` and ``clipped`` (bool: the bound was active), both of the tokens' shape.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip.low, 1 + clip.high)
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if clip.dual is not None:
        ceiling = -advantages * clip.dual
        negative = (advantages < 0).expand_as(loss)
        loss = torch.where(negative, torch.minimum(loss, ceiling), loss)
    return loss, {"ratio": ratio.detach(), "clipped": clipped.detach()}


def trajectory_weights(valid_BT: npt.NDArray[np.bool_], action_dim: int) -> npt.NDArray[np.float32]:
    """Weights [B,T] of one token of each action, so that the weighted sum over [B,T,A] is the mean
    over episodes of each episode's own mean over valid tokens. Zero where not valid.

    An episode's weights need not be summed in one piece: any split into micro-batches adds up.
    """
    counts = valid_BT.sum(1, keepdims=True) * action_dim
    weights = valid_BT / np.maximum(counts, 1) / max(1, int((counts > 0).sum()))
    return weights.astype(np.float32)


# ---------------------------------------------------------------- modes of the path


@lru_cache
def path_modes(steps: int, count: int) -> Tensor:
    """The ``count`` ways [M,C] in which commands of ``steps`` steps move the hand farthest.

    Commands are increments, so the path is their running sum: these are the right singular vectors
    of that sum, the largest first. Of the path that independent commands make (a random walk)
    the first has 81 % of the variance, the first four 95 %: the other twenty of 24 are trembling.
    """
    _, _, rows = np.linalg.svd(np.tril(np.ones((steps, steps))))
    return torch.from_numpy(rows[:count].astype(np.float32))


def path_logprobs(
    logits_kCAN: Tensor, tokens_kCA: Tensor, valid_kC: Tensor, count: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [k,M,A] of how far chunks went in each mode, and entropies, in nats.

    How far is a weighted sum of a dimension's actions at the valid steps. They are drawn
    independently, so it is nearly normal, with the sums of their means and variances. Where the
    outcome depends on the path alone, the policy gradient of these few numbers is that of all the
    tokens without the noise of what did not matter (Rao-Blackwell). Differentiable.
    """
    values = torch.from_numpy(from_tokens(np.arange(BINS))).to(logits_kCAN.device)
    p = torch.softmax(logits_kCAN.float() / temperature, -1)
    mean = p @ values
    variance = p @ values.square() - mean.square()
    weights = path_modes(tokens_kCA.shape[1], count).to(values.device) * valid_kC[:, None]
    off = weights @ (values[tokens_kCA] - mean)
    # A bin's width squared over 12: no sum of bins is surer than that.
    spread = weights.square() @ variance + (2 / BINS) ** 2 / 12
    logprobs = -0.5 * (off.square() / spread + torch.log(2 * math.pi * spread))
    return logprobs, 0.5 * torch.log(2 * math.pi * math.e * spread)
