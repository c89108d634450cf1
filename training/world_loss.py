"""The world model's losses: flow matching and reward, chunk by chunk (paper section 3.2).

Shape letters: B episodes, C channels, F latent frames, H W latent sides, T actions, A action dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from worldloop.engine.dit import KV, DiT
from worldloop.engine.reward import RewardHead
from worldloop.engine.sampler import add_noise, to_x0
from worldloop.engine.world_config import WorldModelConfig
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
    def reward_shift(self) -> int: ...

    @property
    def checkpoint_blocks(self) -> bool: ...


class Trainee(nn.Module):
    """The parts that are trained together."""

    def __init__(self, dit: DiT, reward: RewardHead) -> None:
        super().__init__()
        self.dit, self.reward = dit, reward


class History:
    """What a causal network has seen of B episodes: keys and values of each block, in order.

    Kept as `KVRing` keeps them where nothing is differentiated: the sink and the window.
    """

    def __init__(self, dit: DiT, sizes: WorldModelConfig, checkpoint_blocks: bool = False) -> None:
        self.dit, self.sizes, self.checkpoint_blocks = dit, sizes, checkpoint_blocks
        self.kv: list[KV] = []

    def commit(
        self, latents: Tensor, poses: Tensor | None, first: int, level: Tensor | None = None
    ) -> None:
        """Add latents [B,C,F,H,W] at latent frame ``first``; what the window loses is forgotten.

        poses: None for observed frames; level: noise level [B] of the latents, zeros by default.
        """
        frames = latents.shape[2]
        new = self.dit(
            latents,
            torch.zeros(len(latents), device=latents.device) if level is None else level,
            poses,
            first_frame=first,
            history=self.kv or None,
            observed_frames=frames if poses is None else 0,
            checkpoint_blocks=self.checkpoint_blocks,
        ).kv
        tokens = new[0][0].shape[1] // frames
        sink, window = self.sizes.sink * tokens, self.sizes.window * tokens

        def joined(old: Tensor, new: Tensor) -> Tensor:
            if old.shape[1] + new.shape[1] <= sink + window:
                return torch.cat([old, new], 1)
            return torch.cat([old[:, :sink], torch.cat([old[:, sink:], new], 1)[:, -window:]], 1)

        pairs = zip(self.kv, new, strict=True)
        self.kv = [(joined(k, a), joined(v, b)) for (k, v), (a, b) in pairs] if self.kv else new


def sample_times(config: Levels, rows: int) -> Tensor:
    """Noise levels t [B] in (0,1]: pure noise, or a shifted logit-normal."""
    u = torch.sigmoid(torch.randn(rows))
    shifted = config.time_shift * u / (1 + (config.time_shift - 1) * u)
    return torch.where(torch.rand(rows) < config.pure_noise, torch.ones(rows), shifted)


def edm_weight(t: Tensor, most: float = 5.0) -> Tensor:
    """lambda(sigma) = (sigma^2 + 1) / sigma^2 (EDM with unit data), sigma = t / (1-t), bounded."""
    sigma = t / (1 - t).clamp_min(1e-4)
    return (1 + 1 / sigma.square()).clamp_max(most)


def reward_errors(
    head: RewardHead, made: Tensor, real: Tensor, reward: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Squared reward errors [B] of imagined and of recorded latents [B,C,F,H,W]; reward [B,T].

    Both are shifted by the same cells, up to ``most`` in either direction, each episode by its own,
    its edges repeated: an outcome lies in where things are to each other, and a head that knows
    each place of the picture by itself learns the few endings it has seen by heart.
    """
    if most:
        B, _, _, H, W = made.shape
        down, right = torch.randint(-most, most + 1, (2, B, 1), device=made.device)
        rows = (torch.arange(H, device=made.device) + down).clamp(0, H - 1)[:, :, None]
        columns = (torch.arange(W, device=made.device) + right).clamp(0, W - 1)[:, None]
        each = torch.arange(B, device=made.device)[:, None, None]
        made, real = (  # indices first: [B,H,W,C,F]
            x[each, :, :, rows, columns].permute(0, 3, 4, 1, 2) for x in (made, real)
        )
    return (head(made) - reward).square().mean(1), (head(real) - reward).square().mean(1)


def training_loss(
    model: Trainee, batch: Batch, config: LossConfig, sizes: WorldModelConfig, own_history: bool
) -> dict[str, Tensor]:
    """Flow-matching and reward losses summed over an episode's chunks.

    ``loss`` is what is differentiated; ``flow`` the unweighted x0 error, ``reward`` the squared
    reward error, ``flow_last`` the x0 error of the last chunk.
    """
    dit, z, chunk, each = model.dit, batch.latents, sizes.action_spec.chunk, sizes.block
    B, device = len(z), z.device
    history = History(dit, sizes, config.checkpoint_blocks)
    history.commit(z[:, :, :1], None, 0)
    chunks = (z.shape[2] - 1) // each
    total = z.new_zeros(())
    flows, rewards = [], []
    # All at once: a copy for each chunk would make the host wait for the chunk before.
    times_KB = torch.stack([sample_times(config, B) for _ in range(chunks)]).to(device)
    for k, t in enumerate(times_KB):
        frames = slice(1 + k * each, 1 + (k + 1) * each)
        poses = batch.poses[:, k * chunk : (k + 1) * chunk]
        x0 = z[:, :, frames]
        noise = torch.randn_like(x0)
        x_t = add_noise(x0, noise, t[:, None].expand(-1, each))
        out = dit(
            x_t, t, poses, first_frame=frames.start, history=history.kv, return_kv=False,
            checkpoint_blocks=config.checkpoint_blocks,
        ).sample  # fmt: skip
        x0_hat = to_x0(dit.config.prediction, out, x_t, t[:, None].expand(-1, each))
        error = (x0_hat - x0).square()
        weight = batch.weight[:, :, frames.start - 1 : frames.stop - 1]
        weighted = (error * weight).mean((1, 2, 3, 4))
        # The velocity's error is x0's over t; bounded, since 1/t^2 would be all about nothing.
        flow = (weighted / t.clamp_min(0.5).square()).mean()
        true_reward = batch.reward[:, k * chunk : (k + 1) * chunk]
        made, real = reward_errors(model.reward, x0_hat, x0, true_reward, config.reward_shift)
        rewarded = (edm_weight(t) * made + real).mean()
        total = total + flow + config.reward_weight * rewarded
        flows.append(error.mean().detach())
        rewards.append(made.mean().detach())
        if k + 1 < chunks:
            if own_history:
                history.commit(x0_hat.detach(), poses, frames.start)
            else:
                level = config.history_noise * torch.rand(B, device=device)
                seen = add_noise(x0, torch.randn_like(x0), level[:, None].expand(-1, each))
                history.commit(seen, poses, frames.start, level)
    return {
        "loss": total / chunks,
        "flow": torch.stack(flows).mean(),
        "flow_last": flows[-1],
        "reward": torch.stack(rewards).mean(),
    }


def training_flops(sizes: WorldModelConfig, batch: Batch) -> int:
    """Multiply-adds x 2 of one step on this process: three times the forward passes'."""
    B, _, frames, H, W = batch.latents.shape
    each = sizes.block
    tokens = (H // sizes.dit.patch) * (W // sizes.dit.patch)
    chunks = (frames - 1) // each
    total = sizes.dit.flops(1, H, W)
    for k in range(chunks):
        passes = 2 if k + 1 < chunks else 1  # denoised, and committed where a chunk follows
        history = min(1 + k * each, sizes.sink + sizes.window)
        total += passes * sizes.dit.flops(each, H, W, history * tokens)
    return 3 * B * total
