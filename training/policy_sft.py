"""`worldloop train policy`: supervised fine-tuning of the policy on SANS successes (paper 4.3).

Cross-entropy over the 256 bins of every action token of the chunk that follows a frame. Frames
are taken from anywhere in an episode, so that the policy also knows what to do between the chunk
ends where it will look. From scratch (`tiny`), or from a checkpoint with all weights or LoRA.

Shape letters: B rows, T actions of an episode, A action dim, S side of the network's pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldloop.cli import parse_config
from worldloop.engine.policy.action_tokens import Statistics
from worldloop.engine.policy.lora import add_lora, merge_and_unload, save_lora
from worldloop.engine.policy.openvla_oft import OpenVLAOFT, tiny_config
from worldloop.engine.policy.vla import PolicyConfig, VLAPolicy, token_logprobs
from worldloop.engine.precision import autocast
from worldloop.errors import UserError
from worldloop.files import exclusive
from worldloop.training.common import Facts, TrainingOptions, device_for, fit
from worldloop.training.data import EpisodeArrays, augment, load_arrays
from worldloop.training.optimizer import MuonAdamW
from worldloop.training.towers import load_towers
from worldloop.types import ActionSpec


@dataclass(frozen=True, kw_only=True)
class PolicyTraining(TrainingOptions):
    """Fine-tune a policy on the successes of a dataset; run it again to resume."""

    data: Path
    init: str | None = None
    """Policy checkpoint to start from; without it, preset `tiny` from scratch."""
    towers: Path | None = None
    """Pretrained towers for that (`worldloop train towers`)."""
    demos: int | None = None
    """Use only the first successful episodes."""
    held_out: int = 8
    """Last of them, never trained on."""
    lora_rank: int = 0
    """Train adapters of this rank instead of all weights; 0: all weights."""
    lora_alpha: float = 16.0
    steps: int = 2000
    batch: int = 16
    """Frames a step."""
    lr: float = 1e-3
    """Peak learning rate of the hidden matrices (Muon) from scratch; of everything else and of a
    checkpoint's weights (AdamW) `lr_vectors`."""
    lr_vectors: float = 5e-4
    weight_decay: float = 0.01
    warmup: int = 50
    ema: float = 0.995
    jitter: float = 0.1
    """Strength of brightness, contrast and noise augmentation; imagined frames are a bit soft."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init is not None and self.towers is not None:
            raise UserError("init and towers: a checkpoint has towers of its own; give one of both")
        if self.lora_rank < 0 or (self.lora_rank and self.init is None):
            raise UserError("lora_rank: adapters need a checkpoint to adapt; give one with --init")


class Demonstrations:
    """Pictures and tokens of the successes of a dataset, ready for batches."""

    def __init__(self, data: EpisodeArrays, policy: VLAPolicy, rows: npt.NDArray[np.int64]) -> None:
        # An episode at a time: resampling all of them at once takes many times their memory.
        each = [policy.pictures(np.asarray(data.frames[row])[:, None]).cpu() for row in rows]
        self.pictures = torch.stack(each)  # [N,T+1,1,S,S,3]
        self.tokens = torch.from_numpy(policy.to_tokens(data.actions[rows]))  # [N,T,A]
        self.instruction = data.instruction
        self.chunk = policy.action_spec.chunk
        self.last = self.tokens.shape[1] - self.chunk  # latest frame with a whole chunk after it
        if self.last < 0:
            raise UserError(
                f"episodes have {self.tokens.shape[1]} actions; the policy's chunk is {self.chunk}"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, episodes: npt.NDArray[np.int64], times: npt.NDArray[np.int64]) -> tuple[
        Tensor, Tensor
    ]:  # fmt: skip
        """Pictures [B,1,S,S,3] at these moments and the tokens [B,chunk,A] that follow."""
        follow = times[:, None] + np.arange(self.chunk)
        return self.pictures[episodes, times], self.tokens[episodes[:, None], follow]

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor]:
        """A random batch; a third of the frames are those a rollout looks at."""
        times = rng.integers(0, self.last + 1, batch)
        ends = rng.integers(0, self.last // self.chunk + 1, batch) * self.chunk
        return self.batch(
            rng.integers(0, len(self), batch), np.where(rng.random(batch) < 1 / 3, ends, times)
        )

    def all_ends(self) -> tuple[Tensor, Tensor]:
        """Every episode at every moment that a rollout looks at."""
        times = np.arange(0, self.last + 1, self.chunk)
        return self.batch(np.repeat(np.arange(len(self)), len(times)), np.tile(times, len(self)))


def fit_statistics(actions_NTA: npt.NDArray[np.float32], spec: ActionSpec) -> Statistics:
    """Quantiles q01 and q99 of each action dimension; the gripper passes through as it is."""
    flat = actions_NTA.reshape(-1, spec.dim).astype(np.float64)
    low, high = np.quantile(flat, 0.01, axis=0), np.quantile(flat, 0.99, axis=0)
    mask = [name != "gripper" for name in spec.names]
    width = np.maximum(high - low, 1e-3)  # a dimension that never moves keeps a little room
    return Statistics(
        tuple(np.round(low, 6).tolist()), tuple(np.round(low + width, 6).tolist()), tuple(mask)
    )


def start_policy(config: PolicyTraining, data: EpisodeArrays, device: torch.device) -> VLAPolicy:
    """The policy to train: a checkpoint's, or `tiny` with random weights."""
    if config.init is not None:
        policy = VLAPolicy.from_pretrained(config.init, device=device)
        policy.action_spec.require_same(data.action_spec, config.init, str(config.data))
        return policy
    spec = data.action_spec
    network = OpenVLAOFT(tiny_config(spec.dim, spec.chunk))
    network.init_weights(config.seed)
    if config.towers is not None:
        load_towers(network.vision_backbone, config.towers)
    made = PolicyConfig(action_spec=spec, suite=data.env_id)
    statistics = fit_statistics(data.actions[data.success], spec)
    return VLAPolicy(network.to(device), made, statistics)


def policy_loss(policy: VLAPolicy, batch: tuple[Tensor, Tensor], instruction: str) -> Tensor:
    """Mean cross-entropy of the batch's action tokens, nats a token."""
    pictures, tokens = batch
    logits = policy.forward(pictures, [instruction] * len(pictures))
    logprobs, _ = token_logprobs(logits, tokens.flatten(1).to(logits.device), 1.0)
    return -logprobs.mean()


@torch.no_grad()
def check(policy: VLAPolicy, demos: Demonstrations) -> dict[str, float]:
    """Cross-entropy and greedy actions' absolute error at the moments a rollout looks at."""
    pictures, tokens = demos.all_ends()
    losses, errors = [], []
    for i in range(0, len(pictures), 32):
        part = pictures[i : i + 32], tokens[i : i + 32]
        logits = policy.forward(part[0], [demos.instruction] * len(part[0])).cpu()
        losses.append(-token_logprobs(logits, part[1].flatten(1), 1.0)[0])
        greedy = policy.to_actions(logits.argmax(-1).view(part[1].shape).numpy())
        errors.append(np.abs(greedy - policy.to_actions(part[1].numpy()))[..., :3])
    return {
        "held_out_loss": float(torch.cat(losses).mean()),
        "held_out_error": float(np.concatenate(errors).mean()),
    }


def train(config: PolicyTraining) -> Path:
    """Train until ``config.steps``; returns the checkpoint folder of the averaged policy."""
    torch.set_num_threads(config.threads)
    device = device_for(config.device)
    data = load_arrays(config.data)
    successes = np.flatnonzero(data.success)[: config.demos]
    if len(successes) <= config.held_out:
        raise UserError(
            f"{config.data}: {len(successes)} successful episodes are used and held_out is "
            f"{config.held_out}; collect more, or hold out fewer"
        )
    policy = start_policy(config, data, device)
    network = policy.network
    trained = Demonstrations(data, policy, successes[: -config.held_out])
    held = Demonstrations(data, policy, successes[-config.held_out :])
    optimizer: Any
    if config.init is None:
        optimizer = MuonAdamW(network, config)
        bases = [config.lr, config.lr_vectors]
    else:
        parameters = list(network.parameters())
        if config.lora_rank:
            parameters = add_lora(network, config.lora_rank, config.lora_alpha, config.seed)
        optimizer = torch.optim.AdamW(
            parameters, lr=config.lr_vectors, weight_decay=config.weight_decay
        )
        bases = [config.lr_vectors]

    def loss_at(step: int) -> tuple[Tensor, Facts]:
        rng = np.random.default_rng([config.seed, step])
        pictures, tokens = trained.draw(rng, config.batch)
        batch = augment(pictures, config.jitter, rng), tokens
        with autocast(device, config.precision):
            return policy_loss(policy, batch, trained.instruction), {}

    def checked(step: int, row: dict[str, float]) -> dict[str, float]:
        with autocast(device, config.precision):
            found = check(policy, held)
            save(policy, config, len(trained), step)
        return row | found

    fit(
        "policy", config, network, optimizer, loss_at, checked, rates=bases, ema=config.ema,
        frames=config.batch, warmup=config.warmup,
    )  # fmt: skip
    return config.out / "model"


def save(policy: VLAPolicy, config: PolicyTraining, demos: int, step: int) -> None:
    """Write the policy; with LoRA also its adapters, the weights then being merged ones."""
    record = {"demos": demos, "steps": step, "seed": config.seed, "data": config.data.name}
    kept = VLAPolicy(
        policy.network,
        PolicyConfig(**{**vars(policy.config), "record": record}),
        policy.statistics,
        tokenizer=policy.tokenizer,
    )
    if config.lora_rank:
        import copy

        save_lora(policy.network, config.out / "lora_adapter")
        kept.network = copy.deepcopy(policy.network)
        merge_and_unload(kept.network)
    kept.save(config.out / "model")


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(PolicyTraining, argv, "worldloop train policy")
    with exclusive(config.out):
        print(f"policy: {train(config)}")
    return 0
