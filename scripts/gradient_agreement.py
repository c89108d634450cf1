"""How far GRPO's gradients agree from one set of start states to the next: signal beside noise.

    python scripts/gradient_agreement.py --starts runs/data/push-resets --temperature 0.35 \
        --coherence 0.95 --out agreement.json

Imagines sets of episodes by the policy as it is, each from start states of its own, and takes the
learner's gradient of each set. Two sets' gradients have the same expectation and nothing else in
common, so the mean cosine between them, c, tells signal from noise: for m sets together it is
m c / (1 + (m - 1) c). It depends on what is done with a gradient before it becomes a step:
raw (SGD), divided by its size over the sets (Adam), orthogonalised (Muon). The last rows are of
the network's parts, each by itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldloop.engine.policy.vla import VLAPolicy
from worldloop.engine.precision import autocast, device_of
from worldloop.engine.rollout import RolloutEngine
from worldloop.engine.sampler import derive_seed
from worldloop.engine.world_model import WorldModel
from worldloop.files import atomic_write_text
from worldloop.rl.advantage import group_advantages, mixed_groups
from worldloop.rl.learner import Experience, Learner, LearnerConfig
from worldloop.rl.starts import load_starts
from worldloop.track import git_commit
from worldloop.training.optimizer import orthogonalised
from worldloop.types import Rollout

Gradient = dict[str, Tensor]


def gradient(learner: Learner, rollout: Rollout, chunk: int) -> Gradient:
    """Of the loss of one chunk's decisions at the policy's own weights, by parameter."""
    chunks = rollout.valid.shape[1] // learner.policy.action_spec.chunk
    advantages = np.zeros((len(rollout.success), chunks), np.float32)
    advantages[:, chunk] = group_advantages(rollout.success, rollout.group_id)
    learner.update(Experience.of(rollout, advantages), seed=0)
    named = learner.policy.network.named_parameters()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in named if p.requires_grad
    }  # fmt: skip


def cosine(vectors: list[Tensor]) -> tuple[float, float]:
    """Mean cosine of all pairs, and its standard error (jackknife over the sets)."""
    stacked = torch.nn.functional.normalize(torch.stack(vectors).double(), dim=1)
    gram, n = (stacked @ stacked.T).numpy(), len(vectors)

    def mean(rows: np.ndarray) -> float:
        part = gram[np.ix_(rows, rows)]
        return float((part.sum() - np.trace(part)) / (len(rows) * (len(rows) - 1)))

    without = np.array([mean(np.delete(np.arange(n), i)) for i in range(n)])
    return mean(np.arange(n)), float(np.sqrt((n - 1) * without.var()))


def agreement(gradients: list[Gradient]) -> dict[str, tuple[float, float]]:
    """`cosine` of the gradients of all sets: raw, as Adam and as Muon would take them."""
    names = [n for n in gradients[0] if any(float(g[n].abs().max()) > 0 for g in gradients)]
    matrices = [n for n in names if gradients[0][n].ndim == 2 and "embed" not in n]
    size = {n: sum(g[n] ** 2 for g in gradients).div(len(gradients)).sqrt() for n in names}
    ways = {
        "raw": [[g[n] for n in names] for g in gradients],
        "adam": [[g[n] / (size[n] + 1e-12) for n in names] for g in gradients],
        "muon": [[orthogonalised(g[n]) for n in matrices] for g in gradients],
    }
    return {way: cosine([torch.cat([t.flatten().float() for t in parts]) for parts in each])
            for way, each in ways.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="policy/pushcube")
    parser.add_argument("--world", default="tiny")
    parser.add_argument("--starts", type=Path, required=True)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--coherence", type=float, default=0.0)
    parser.add_argument("--sets", type=int, default=8)
    parser.add_argument("--starts-a-set", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--horizon", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.sets < 3:
        parser.error(f"--sets is {args.sets}; an error of the mean needs at least 3")
    torch.set_num_threads(1)
    world = WorldModel.from_pretrained(args.world)
    policy = VLAPolicy.from_pretrained(
        args.policy, temperature=args.temperature, coherence=args.coherence
    )
    starts = load_starts(args.starts, world, args.sets * args.starts_a_set)
    within = autocast(device_of("cpu"), "auto")
    # Nothing is learned: the gradient is left where the optimizer would have read it.
    still = LearnerConfig(lr=0.0, grad_clip=1e9, mini_batch=10**6, epochs=1, old_logprobs="rollout")
    learner = Learner(policy, still, within)
    chunks = args.horizon // policy.action_spec.chunk
    found: list[list[Gradient]] = [[] for _ in range(chunks)]
    groups, rates = [], []
    for k in range(args.sets):
        rows = range(k * args.starts_a_set, (k + 1) * args.starts_a_set)
        with within:
            rollout = RolloutEngine(world, policy, steps=1).rollout(
                starts.select(rows), horizon=args.horizon, group_size=args.group_size,
                seed=derive_seed(args.seed, k), max_batch=64, stop_on_success=True,
            )  # fmt: skip
        rates.append(float(rollout.success.mean()))
        good = mixed_groups(rollout.success, rollout.group_id, 0.1, 0.9)
        rollout = rollout.select(np.isin(rollout.group_id, good))
        groups.append(len(good))
        for chunk in range(chunks):
            found[chunk].append(gradient(learner, rollout, chunk))
        print(f"set {k}: {rates[-1]:.0%} imagined success, {len(good)} mixed groups", flush=True)
    both = [{n: sum(g[n] for g in parts) for n in parts[0]} for parts in zip(*found, strict=True)]
    table = {f"chunk {i + 1}": agreement(each) for i, each in enumerate(found)}
    table["all"] = agreement(both)
    for part in sorted({name.split(".")[0] for name in both[0]}):
        own = [{n: t for n, t in g.items() if n.startswith(f"{part}.")} for g in both]
        table[part] = agreement(own)
    for name, row in table.items():
        print(name, {way: f"{c:.4f} +- {error:.4f}" for way, (c, error) in row.items()})
    document = {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "commit": git_commit(), "imagined_success": float(np.mean(rates)),
        "mixed_groups": groups, "cosine": table,
    }  # fmt: skip
    atomic_write_text(args.out, json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
