"""How much of a GRPO gradient is signal: gradients of mixed groups against each other.

    python scripts/gradient_noise.py --config GRPO.json --steps 6 --out gradient-noise.json

Imagines the first steps of that run (config.json of a run's folder) with its policy as it begins,
and takes the gradient of each mixed group by the learner's own code, once for each setting of
path_modes. The mean inner product of two groups' gradients is the signal (squared), their mean
squared length signal and noise; their quotient is what one group is worth. Rollouts are kept in
--rollouts; killed and run again, it goes on from there. A sixteenth of the weights, drawn once,
stands for all.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from worldloop.cli import parse_config
from worldloop.engine.policy.vla import VLAPolicy
from worldloop.engine.world_model import WorldModel
from worldloop.files import atomic_write_text
from worldloop.rl.advantage import decision_advantages
from worldloop.rl.grpo import GRPO
from worldloop.rl.grpo_config import GRPOConfig
from worldloop.rl.learner import Experience, Learner
from worldloop.rl.loss import trajectory_weights
from worldloop.rl.starts import load_starts

SHARE = 16


def gradient(learner: Learner, e: Experience, picks: list[torch.Tensor]) -> torch.Tensor:
    """Of one group's loss at its own weights, where every ratio is one."""
    learner.optimizer.zero_grad()
    weights = trajectory_weights(e.valid, e.tokens.shape[-1])
    learner._accumulate(e, np.arange(len(e.tokens)), learner.logprobs(e), weights)
    taken = []
    for p, pick in zip(learner.parameters, picks, strict=True):
        taken.append(torch.zeros(len(pick)) if p.grad is None else p.grad.flatten()[pick])
    return torch.cat(taken).double()


def worth(gradients: torch.Tensor) -> tuple[float, float]:
    """Signal over signal and noise of one group, and its standard error (jackknife)."""
    gram = (gradients @ gradients.T).numpy()

    def quotient(rows: np.ndarray) -> float:
        part, n = gram[np.ix_(rows, rows)], len(rows)
        return float((part.sum() - np.trace(part)) / (n - 1) / np.trace(part))

    everyone = np.arange(len(gram))
    without = np.array([quotient(np.delete(everyone, i)) for i in everyone])
    return quotient(everyone), float(np.sqrt((len(gram) - 1) * without.var()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--modes", type=int, nargs="+", default=[0, 1, 4, 24])
    parser.add_argument("--rollouts", type=Path, default=Path("runs/gradient-noise"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = parse_config(GRPOConfig, ["--config", args.config], "gradient_noise")
    world = WorldModel.from_pretrained(config.world)
    policy = VLAPolicy.from_pretrained(config.policy, temperature=config.temperature)
    grpo = GRPO(config, world, policy, load_starts(config.starts, world))
    random = torch.Generator().manual_seed(0)
    picks = [
        torch.randperm(p.numel(), generator=random)[: -(-p.numel() // SHARE)]
        for p in grpo.learner.parameters
    ]
    learners = {
        modes: Learner(policy, replace(config.learner, path_modes=modes, old_logprobs="recompute"))
        for modes in args.modes
    }
    found: dict[int, list[torch.Tensor]] = {modes: [] for modes in args.modes}
    for step in range(args.steps):
        for rollout in grpo.collect(step, args.rollouts / f"{step:06d}").rollouts:
            groups = rollout.group_id
            advantages = decision_advantages(rollout.success, groups, grpo.widths)
            for group in np.unique(groups):
                rows = groups == group
                e = Experience.of(rollout.select(rows), advantages[rows])
                for modes, learner in learners.items():
                    found[modes].append(gradient(learner, e, picks))
        grpo.chooser.fade()
        print(f"step {step}: {len(found[args.modes[0]])} groups", flush=True)
    table = {}
    for modes, gradients in found.items():
        value, error = worth(torch.stack(gradients))
        table[str(modes)] = {"signal_share": value, "standard_error": error}
        print(f"path_modes {modes}: {value:.4f} +- {error:.4f} a group")
    document = {
        "groups": len(found[args.modes[0]]), "group_size": config.group_size,
        "branching": config.branching, "temperature": config.temperature, "path_modes": table,
    }  # fmt: skip
    atomic_write_text(args.out, json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
