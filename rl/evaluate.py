"""`worldloop evaluate policy`: the success rate of a policy, in the simulator or in imagination.

Every start is played exactly once over the rows of an environment: a row that has finished takes
the next start at once. Shape letters: N starts, B rows of the environment, T actions of a chunk.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from worldloop.cli import parse_config
from worldloop.config import config_to_dict, positive, read_json
from worldloop.engine.policy.base import Observation, Policy
from worldloop.engine.sampler import derive_seed
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.files import atomic_write_text
from worldloop.hub import resolve_pretrained
from worldloop.ledger import checkpoint_sha256
from worldloop.metrics import wilson_interval
from worldloop.rl.envs.simulators import SimulatorVectorEnv
from worldloop.rl.envs.tasks import task_preset
from worldloop.rl.envs.vector import ChunkVectorEnv
from worldloop.rl.envs.world import WorldVectorEnv
from worldloop.rl.starts import load_starts
from worldloop.track import Progress

WORLD = "world"  # the name of the environment that is a world model


@dataclass(frozen=True)
class Evaluation:
    """How N episodes ended."""

    starts: tuple[int, ...]  # simulator seeds, or indices into a pool
    success: npt.NDArray[np.bool_]  # [N]
    steps: npt.NDArray[np.int64]  # [N] control steps until success, or the horizon
    frames: int  # control steps carried out (or imagined) in all
    seconds: float

    @property
    def rate(self) -> float:
        """Share of successes."""
        return float(self.success.mean())

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson score interval of the rate, 95 %; a start that is tried often is one draw."""
        distinct = len(set(self.starts))
        return wilson_interval(self.rate * distinct, distinct)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the figures first, then every episode."""
        done = self.steps[self.success]
        return {
            "episodes": len(self.success),
            "successes": int(self.success.sum()),
            "rate": self.rate,
            "ci95": list(self.ci95),
            "mean_steps_to_success": float(done.mean()) if len(done) else None,
            "frames": self.frames,
            "seconds": self.seconds,
            "starts": list(self.starts),
            "success": [bool(flag) for flag in self.success],
            "steps": [int(count) for count in self.steps],
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Evaluation:
        """What `to_dict` wrote."""
        return cls(
            tuple(document["starts"]), np.array(document["success"], bool),
            np.array(document["steps"], np.int64), document["frames"], document["seconds"],
        )  # fmt: skip


def evaluate(
    env: ChunkVectorEnv,
    policy: Policy,
    starts: Sequence[int],
    seed: int = 0,
    progress: Progress | None = None,
    *,
    episodes: Sequence[int] | None = None,
) -> Evaluation:
    """Play every start [N] once with the policy; the result does not depend on the rows.

    Episode i acts and is imagined with the seeds that ``RolloutEngine.rollout(seed=seed)`` gives
    its group i. episodes: the number i of each start (0 .. N-1 without it), for parts of a larger
    evaluation. progress counts episodes. Raises UserError when the policy's actions mean something
    else than the environment's.
    """
    spec = env.action_spec
    spec.require_same(policy.action_spec, "the environment", "the policy")
    if spec.chunk != policy.action_spec.chunk:
        raise UserError(
            f"the environment takes chunks of {spec.chunk} actions, the policy gives "
            f"{policy.action_spec.chunk}"
        )
    N, B = len(starts), env.num_envs
    numbers = list(range(N)) if episodes is None else [int(number) for number in episodes]
    if not N or len(numbers) != N:
        raise UserError(f"{N} starts and {len(numbers)} episode numbers; expected 1 or more, equal")
    success, steps = np.zeros(N, bool), np.zeros(N, np.int64)
    begun, frames = time.perf_counter(), 0
    playing = np.full(B, -1)  # which of the N each row plays
    taken = ended = 0
    free = np.arange(B)
    while True:
        free = free[: N - taken]
        if len(free):
            playing[free] = np.arange(taken, taken + len(free))
            taken += len(free)
            mask, chosen, seeds = np.zeros(B, bool), np.zeros(B, np.int64), [0] * B
            mask[free] = True
            for row in free:
                chosen[row] = starts[playing[row]]
                seeds[row] = derive_seed(seed, numbers[playing[row]], 0)
            obs, infos = env.reset(seed=seeds, options={"reset_mask": mask, "starts": chosen})
        rows = np.flatnonzero(playing >= 0)
        if not len(rows):
            break
        actions = np.zeros((B, spec.chunk, spec.dim), np.float32)
        for chunk in np.unique(infos["chunk"][rows]):
            group = rows[infos["chunk"][rows] == chunk]
            observation = Observation(
                obs["frame"][group][:, None, None],
                obs["pose"][group],
                tuple(str(text) for text in infos["instruction"][group]),
                tuple(numbers[playing[row]] for row in group),
                int(chunk),
            )
            # No group has the number -1: never the seed of an episode's world noise.
            acted = policy.act(observation, derive_seed(seed, -1, int(chunk)))
            actions[group] = acted.actions
        obs, _, terminated, truncated, infos = env.step(actions)
        frames += int(infos["played"].sum())
        free = rows[(terminated | truncated)[rows]]
        success[playing[free]] = infos["success"][free]
        steps[playing[free]] = infos["steps"][free]
        playing[free] = -1
        ended += len(free)
        if progress is not None and len(free):
            progress.update(len(free), success=f"{success.sum() / ended:.0%}")
    seconds = time.perf_counter() - begun
    return Evaluation(tuple(int(start) for start in starts), success, steps, frames, seconds)


# ---------------------------------------------------------------- command line


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure how often a policy succeeds; write the figures and every outcome as JSON."""

    policy: str
    """Checkpoint folder, shipped policy or hub id."""
    env: str = "PushCube-v1"
    """Task of a simulator, or `world`: the episodes are imagined."""
    episodes: int = 200
    first_seed: int = 6_000_000
    """Simulator seed of the first episode; from 6000000 on no shipped weights have seen any."""
    temperature: float = 0.0
    """Of the policy's sampling; 0 is greedy."""
    coherence: float = 0.0
    """Correlation of an action dimension's draws from step to step, as RL samples."""
    seed: int = 0
    """Of the policy's sampling and of the world's noise."""
    out: Path = Path("runs/evaluation.json")
    horizon: int = 72
    """Control steps after which an episode has failed."""
    image_size: int = 128
    """Of the simulator's pictures, as the policy knows them."""
    held_frames: int = 2
    """Consecutive control steps that the simulator's success flag must hold."""
    world: str = "tiny"
    """World model of `--env world`: shipped preset, checkpoint folder or hub id."""
    starts: Path | None = None
    """Dataset whose first frames begin the episodes of `--env world` (without it the shipped one);
    they repeat when there are fewer than episodes, each time with its own noise."""
    steps: Literal[1, 2, 4] = 4
    """Denoising steps of `--env world`."""
    rows: int | None = None
    """Episodes at a time in each process: 1 in the simulator, 16 in imagination."""
    threads: int = 2
    processes: int = 1
    """More than one share the episodes, with one thread each."""
    device: str = "cpu"
    """Of the policy and the world model."""

    def __post_init__(self) -> None:
        positive(self, "episodes", "held_frames", "threads", "processes", "rows")
        for name in ("first_seed", "seed", "temperature"):
            if not 0 <= getattr(self, name) < 2**31:
                raise UserError(f"{name} is {getattr(self, name)}; expected 0 .. {2**31 - 1}")
        if not 0 <= self.coherence < 1:
            raise UserError(f"coherence is {self.coherence}; expected at least 0 and below 1")
        if self.env != WORLD:
            try:
                task_preset(self.env)
            except ValueError as error:
                raise UserError(f"env: {error}; or `{WORLD}`") from error


def load_policy(config: EvaluateConfig) -> Policy:
    """The policy of a config."""
    from worldloop.engine.policy.vla import VLAPolicy  # not needed to evaluate another one

    return VLAPolicy.from_pretrained(
        config.policy,
        temperature=config.temperature,
        coherence=config.coherence,
        device=config.device,
    )


def rows_of(config: EvaluateConfig) -> int:
    """Episodes at a time in each process."""
    return config.rows or (16 if config.env == WORLD else 1)


def make_env(config: EvaluateConfig, rows: int) -> ChunkVectorEnv:
    """The environment of a config with that many rows (or the rows it names)."""
    if config.env == WORLD:
        world = WorldModel.from_pretrained(config.world, device=config.device)
        return WorldVectorEnv(
            world,
            load_starts(config.starts, world, config.episodes),
            min(rows, rows_of(config)),
            horizon=config.horizon,
            steps=config.steps,
        )
    return SimulatorVectorEnv(
        config.env,
        min(rows, rows_of(config)),
        horizon=config.horizon,
        image_size=config.image_size,
        held_frames=config.held_frames,
    )


@lru_cache(maxsize=1)
def _worker(config: EvaluateConfig, rows: int) -> tuple[ChunkVectorEnv, Policy]:
    return make_env(config, rows), load_policy(config)


def _run(config: EvaluateConfig, numbers: Sequence[int], rows: int, threads: int) -> Evaluation:
    """The episodes of these numbers, in this process."""
    torch.set_num_threads(threads)
    env, policy = _worker(config, rows)
    if isinstance(env, WorldVectorEnv):
        size = len(env.starts.instructions)
        starts = [number % size for number in numbers]
    else:
        starts = [config.first_seed + number for number in numbers]
    return evaluate(env, policy, starts, config.seed, episodes=numbers)


def evaluate_policy(config: EvaluateConfig) -> Evaluation:
    """Evaluate as configured, write ``config.out``, return the evaluation.

    Parts that have finished are kept beside it (``.parts``): the same command goes on there.
    Raises UserError where a process of it was killed.
    """
    N, processes = config.episodes, min(config.processes, config.episodes)
    # Many parts, none long: processes end together, and a kill loses little. The same parts for
    # any number of processes, so that a run goes on with another one.
    size = max(min(math.ceil(N / 16), 16), rows_of(config))
    parts = [range(first, min(first + size, N)) for first in range(0, N, size)]
    kept = config.out.with_name(config.out.name + ".parts")
    made_by = _made_by(config)
    done = _read_parts(kept, made_by)

    with Progress(N, f"evaluate {config.env}", unit="ep") as progress:

        def keep(i: int, part: Evaluation) -> None:
            done[i] = part
            finished = {number: each.to_dict() for number, each in done.items()}
            atomic_write_text(kept, json.dumps({**made_by, "parts": finished}) + "\n")
            rate = np.concatenate([each.success for each in done.values()]).mean()
            progress.update(len(part.success), success=f"{rate:.0%}")

        progress.update(sum(len(part.success) for part in done.values()))
        left = [i for i in range(len(parts)) if i not in done]
        if processes == 1:
            for i in left:
                keep(i, _run(config, parts[i], size, config.threads))
            _worker.cache_clear()
        else:
            with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
                tasks = {pool.submit(_run, config, parts[i], size, 1): i for i in left}
                try:
                    for task in as_completed(tasks):
                        keep(tasks[task], task.result())
                except BrokenProcessPool as error:
                    raise UserError(
                        "a process of the evaluation was killed (out of memory?); run it again, "
                        f"with fewer than {processes} --processes: it goes on where it was"
                    ) from error
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    ordered = [done[i] for i in range(len(parts))]
    whole = Evaluation(
        starts=tuple(start for part in ordered for start in part.starts),
        success=np.concatenate([part.success for part in ordered]),
        steps=np.concatenate([part.steps for part in ordered]),
        frames=sum(part.frames for part in ordered),
        seconds=sum(part.seconds for part in ordered) / processes,
    )
    report = {**made_by, **whole.to_dict()}
    atomic_write_text(config.out, json.dumps(report, indent=2) + "\n")
    kept.unlink()
    return whole


def _made_by(config: EvaluateConfig) -> dict[str, Any]:
    """What a result follows from: the settings and the weights that they name at this moment."""
    models = {"policy_sha256": config.policy}
    if config.env == WORLD:
        models["world_sha256"] = config.world
    hashes = {key: checkpoint_sha256(resolve_pretrained(name)) for key, name in models.items()}
    settings = config_to_dict(config)
    for name in ("processes", "threads"):  # how fast, not what
        del settings[name]
    return {"config": settings, **hashes}


def _read_parts(path: Path, made_by: dict[str, Any]) -> dict[int, Evaluation]:
    """Finished parts of the same evaluation, by number; none where another one left them."""
    if not path.is_file():
        return {}
    document = read_json(path)
    parts = document.pop("parts", {})
    if document != made_by:
        return {}
    return {int(number): Evaluation.from_dict(part) for number, part in parts.items()}


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(EvaluateConfig, argv, "worldloop evaluate policy")
    result = evaluate_policy(config)
    low, high = result.ci95
    print(
        f"{config.out}: {int(result.success.sum())} of {len(result.success)} episodes succeed: "
        f"{result.rate:.1%} (95 % interval {low:.1%} .. {high:.1%}), "
        f"{result.frames / max(result.seconds, 1e-9):.0f} frames/s"
    )
    return 0
