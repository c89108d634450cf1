"""The clipped policy loss of GRPO as SimpleVLA-RL uses it, token by token.

Shape letters: B episodes, T actions, A action dim. Losses are in nats times advantage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


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
