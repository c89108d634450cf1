"""`worldloop rollout`: imagine the episodes of a dataset from first frames and recorded actions."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from worldloop.cli import parse_config
from worldloop.config import config_to_dict, positive
from worldloop.engine.rollout import ReplayPolicy, RolloutEngine
from worldloop.engine.world_model import WorldModel
from worldloop.files import atomic_write_text
from worldloop.metrics import Alignment, held_success, outcome_alignment
from worldloop.rl.held_out import load_held_out
from worldloop.rollout_io import save_rollout
from worldloop.track import Progress, git_commit
from worldloop.types import Rollout


@dataclass(frozen=True)
class ImagineConfig:
    """Imagine episodes with a world model; write the rollout and how its outcomes agree."""

    episodes: Path
    """Dataset folder."""
    world: str = "tiny"
    """Shipped preset, checkpoint folder or hub id."""
    out: Path = Path("runs/rollout")
    steps: Literal["1", "2", "4", "reference"] = "4"
    """Denoising steps of the streaming sampler, or the 35-step reference procedure."""
    decode: Literal["all", "policy", "none"] = "all"
    """Frames to decode: all, the one after each chunk, or none (rewards only)."""
    count: int | None = None
    """Use only the first episodes."""
    group_size: int = 1
    """Imaginations of each episode, each with its own noise."""
    max_batch: int | None = None
    """Most rows at a time; less memory, a little slower."""
    seed: int = 0
    threads: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        positive(self, "group_size", "threads")


def imagine(config: ImagineConfig) -> tuple[Rollout, Alignment]:
    """Imagine, save into ``config.out``; the rollout, and how its outcomes agree with the real.

    An episode's outcome is whether it succeeded at any moment, as the world model's rule has it.
    """
    torch.set_num_threads(config.threads)
    world = WorldModel.from_pretrained(config.world, device=config.device)
    real = load_held_out(config.episodes, config.count, world, least=1, frames=False)
    steps: int | Literal["reference"] = (
        "reference" if config.steps == "reference" else int(config.steps)
    )
    actions = np.repeat(real.actions, config.group_size, 0)  # a row for each member of a group
    engine = RolloutEngine(world, ReplayPolicy(actions, world.action_spec), steps=steps)
    rows, horizon = actions.shape[:2]
    with Progress(rows * horizon, "imagine", unit="frame") as progress:
        rollout = engine.rollout(
            real.starts,
            horizon=horizon,
            group_size=config.group_size,
            seed=config.seed,
            decode=config.decode,
            max_batch=config.max_batch,
            progress=progress,
        )
    save_rollout(rollout, config.out, real.fps)
    rule = world.config.success_rule
    succeeded = [held_success(e.reward, rule(e.instruction)[1]) for e in real.episodes]
    true = np.repeat(succeeded, config.group_size)
    agreement = replace(outcome_alignment(true, rollout.success), repeats=config.group_size)
    document = {
        **agreement.to_dict(),
        "agreement": agreement.rate,
        "ci95": list(agreement.interval),
        "config": config_to_dict(config),
        "commit": git_commit(),
    }
    atomic_write_text(config.out / "agreement.json", json.dumps(document, indent=2) + "\n")
    return rollout, agreement


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(ImagineConfig, argv, "worldloop rollout")
    since = time.perf_counter()
    rollout, agreement = imagine(config)
    seconds = rollout.timings.get("total", time.perf_counter() - since)
    rows, horizon = rollout.reward.shape
    print(
        f"{config.out}: {rows} episodes of {horizon} frames, {rows * horizon / seconds:.0f} "
        f"frames/s, {rollout.success.mean():.0%} imagined successes"
    )
    print(
        f"outcomes agree in {agreement.rate:.1%}: {agreement.false_success} imagined only, "
        f"{agreement.false_failure} real only"
    )
    return 0
