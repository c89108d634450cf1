"""The world model's losses: flow matching and reward, chunk by chunk (paper section 3.2).

Shape letters: B episodes, C channels, F latent frames, H W latent sides, T actions, A action dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from worldloop.engine.dit import DiT
from worldloop.engine.dit_config import DiTConfig
from worldloop.engine.reward import RewardHead
from worldloop.engine.sampler import add_noise, to_x0
from worldloop.training.latents import Batch


class Levels(Protocol):
    """What `sample_times` reads of a training configuration."""

    @property
    def pure_noise(self) -> float: ...

    @property
    def time_shift(self) -> float: ...


class LossConfig(Levels, Protocol):
    """What `training_loss` reads of a training configuration."""

    @property
    def history_noise(self) -> float: ...

    @property
    def reward_weight(self) -> float: ...

    @property
    def checkpoint_blocks(self) -> bool: ...


class Trainee(nn.Module):
    """The parts that are trained together."""

    def __init__(self, dit: DiT, reward: RewardHead) -> None:
        super().__init__()
        self.dit, self.reward = dit, reward


def sample_times(config: Levels, rows: int) -> Tensor:
    """Noise levels t [B] in (0,1]: pure noise, or a shifted logit-normal."""
    u = torch.sigmoid(torch.randn(rows))
    shifted = config.time_shift * u / (1 + (config.time_shift - 1) * u)
    return torch.where(torch.rand(rows) < config.pure_noise, torch.ones(rows), shifted)


def edm_weight(t: Tensor, most: float = 5.0) -> Tensor:
    """lambda(sigma) = (sigma^2 + 1) / sigma^2 (EDM with unit data), sigma = t / (1-t), bounded."""
    sigma = t / (1 - t).clamp_min(1e-4)
    return (1 + 1 / sigma.square()).clamp_max(most)


def training_loss(
    model: Trainee, batch: Batch, config: LossConfig, chunk: int, own_history: bool
) -> dict[str, Tensor]:
    """Flow-matching and reward losses summed over an episode's chunks.

    ``loss`` is what is differentiated; ``flow`` the unweighted x0 error, ``reward`` the squared
    reward error, ``flow_last`` the x0 error of the last chunk.
    """
    dit, z, again = model.dit, batch.latents, config.checkpoint_blocks
    B, each = len(z), chunk // dit.config.actions_per_frame
    device = z.device
    zero = torch.zeros(B, device=device)
    first = dit(z[:, :, :1], zero, observed_frames=1, checkpoint_blocks=again)
    history = [[pair] for pair in first.kv]
    chunks = (z.shape[2] - 1) // each
    total = z.new_zeros(())
    flows, rewards = [], []
    for k in range(chunks):
        frames = slice(1 + k * each, 1 + (k + 1) * each)
        poses = batch.poses[:, k * chunk : (k + 1) * chunk]
        past = [(torch.cat([p[0] for p in b], 1), torch.cat([p[1] for p in b], 1)) for b in history]
        x0 = z[:, :, frames]
        t = sample_times(config, B).to(device)
        noise = torch.randn_like(x0)
        x_t = add_noise(x0, noise, t[:, None].expand(-1, each))
        out = dit(
            x_t, t, poses, first_frame=frames.start, history=past, return_kv=False,
            checkpoint_blocks=again,
        ).sample  # fmt: skip
        x0_hat = to_x0(dit.config.prediction, out, x_t, t[:, None].expand(-1, each))
        error = (x0_hat - x0).square()
        weight = batch.weight[:, :, frames.start - 1 : frames.stop - 1]
        weighted = (error * weight).mean((1, 2, 3, 4))
        # The velocity's error is x0's over t; bounded, since 1/t^2 would be all about nothing.
        flow = (weighted / t.clamp_min(0.5).square()).mean()
        true_reward = batch.reward[:, k * chunk : (k + 1) * chunk]
        made = (model.reward(x0_hat) - true_reward).square().mean(1)
        real = (model.reward(x0) - true_reward).square().mean()
        total = total + flow + config.reward_weight * ((edm_weight(t) * made).mean() + real)
        flows.append(error.mean().detach())
        rewards.append(made.mean().detach())
        if k + 1 < chunks:
            if own_history:
                seen, level = x0_hat.detach(), zero
            else:
                level = config.history_noise * torch.rand(B, device=device)
                seen = add_noise(x0, torch.randn_like(x0), level[:, None].expand(-1, each))
            commit = dit(
                seen, level, poses, first_frame=frames.start, history=past, checkpoint_blocks=again
            )
            for block, pair in zip(history, commit.kv, strict=True):
                block.append(pair)
    return {
        "loss": total / chunks,
        "flow": torch.stack(flows).mean(),
        "flow_last": flows[-1],
        "reward": torch.stack(rewards).mean(),
    }


def training_flops(sizes: DiTConfig, batch: Batch, chunk: int) -> int:
    """Multiply-adds x 2 of one step on this process: three times the forward passes'."""
    B, _, frames, H, W = batch.latents.shape
    each = chunk // sizes.actions_per_frame
    tokens = (H // sizes.patch) * (W // sizes.patch)
    chunks = (frames - 1) // each
    total = sizes.flops(1, H, W)
    for k in range(chunks):
        passes = 2 if k + 1 < chunks else 1  # denoised, and committed where a chunk follows
        total += passes * sizes.flops(each, H, W, (1 + k * each) * tokens)
    return 3 * B * total
