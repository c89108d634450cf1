"""Where an episode ends as it really ends: a simulator, or (without one) a second world model.

The functions at the end are what child processes serve (`worldloop.rl.children`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from worldloop.engine.policy.base import Policy, ReplayPolicy
from worldloop.engine.policy.vla import VLAPolicy
from worldloop.engine.rollout import RolloutEngine
from worldloop.engine.sampler import derive_seed
from worldloop.engine.world_model import WorldModel
from worldloop.episodes import DatasetMeta, EpisodeDataset
from worldloop.errors import UserError
from worldloop.metrics import held_steps
from worldloop.registry import load
from worldloop.rl.collect import policy_episode
from worldloop.rl.envs.simulators import make_simulator
from worldloop.rl.envs.tasks import task_preset
from worldloop.rl.evaluate import WORLD, EvaluateConfig, Evaluation, _run
from worldloop.rl.starts import load_starts
from worldloop.types import ActionSpec, Episode


@dataclass(frozen=True)
class TrueEnv:
    """The environment that decides what is true."""

    env: str
    """Task of a simulator; `world`: a second world model stands for the truth (tests); or your own
    `Recorder` as "package.module:Class", made with this config."""
    horizon: int = 72
    image_size: int = 128
    held_frames: int = 2
    """Consecutive control steps that the simulator's success flag must hold."""
    world: str = ""
    """Checkpoint folder of `world`."""
    starts: Path | None = None
    """Dataset whose first frames episodes of `world` begin from; a seed counts through them."""
    steps: int = 1
    """Denoising steps of `world`."""
    device: str = "cpu"
    """Of the policy that acts there, and of `world`; each of the processes has its own copy."""

    def __post_init__(self) -> None:
        if self.env == WORLD and not self.world:
            raise UserError("world: env is `world`; name the checkpoint that is the truth")
        if not self.simulated:
            return
        try:
            task_preset(self.env)
        except ValueError as error:
            raise UserError(f"env: {error}; `{WORLD}`, or your own package.module:Class") from error

    @property
    def simulated(self) -> bool:
        """Whether it is a task of a simulator."""
        return self.env != WORLD and ":" not in self.env

    def evaluation(self, config: Evaluating) -> EvaluateConfig:
        """`worldloop evaluate policy` here, greedy, an episode at a time."""
        return EvaluateConfig(
            policy=config.policy, env=self.env, first_seed=config.first_seed, seed=config.seed,
            horizon=config.horizon, image_size=self.image_size, held_frames=self.held_frames,
            world=self.world or "tiny", starts=self.starts, steps=self.steps,  # type: ignore[arg-type]
            rows=1, threads=1, device=self.device,
        )  # fmt: skip


def require_truth(true: TrueEnv, dataset: Path, horizon: int) -> None:
    """Raises UserError unless the truth can play ``horizon`` actions from the dataset's starts."""
    if horizon > true.horizon:
        raise UserError(
            f"horizon is {horizon}, but the true environment's is {true.horizon}; "
            f"give true.horizon {horizon} or more"
        )
    meta = EpisodeDataset(dataset).meta
    if true.simulated and true.env != meta.env_id:
        raise UserError(
            f"{dataset}: its episodes are of {meta.env_id}, the true environment is {true.env}; "
            f"give true.env {meta.env_id}, or starts of that task"
        )
    if true.simulated and true.image_size != meta.image_size:
        raise UserError(
            f"{dataset}: its image_size is {meta.image_size}; give true.image_size "
            f"{meta.image_size}"
        )


@dataclass(frozen=True)
class Evaluating:
    """A policy, and the start states that it is measured on."""

    policy: str
    first_seed: int
    seed: int
    horizon: int


class Recorder(Protocol):
    """Plays and records whole episodes."""

    @property
    def meta(self) -> DatasetMeta: ...

    def play(
        self, policy: Policy, seed: int, sim_seed: int | None, record: dict[str, Any]
    ) -> Episode: ...


class SimulatorRecorder:
    """Episodes of a simulator's task."""

    def __init__(self, true: TrueEnv) -> None:
        self.true = true
        self.env = make_simulator(true.env, true.image_size)

    @property
    def meta(self) -> DatasetMeta:
        true = self.true
        return DatasetMeta(
            ActionSpec(), true.env, asdict(self.env.camera), true.horizon, true.image_size
        )

    def play(
        self, policy: Policy, seed: int, sim_seed: int | None, record: dict[str, Any]
    ) -> Episode:
        return policy_episode(self.env, policy, seed, self.true.horizon, record, sim_seed)


class WorldRecorder:
    """Episodes that a world model imagines; the reward's threshold says what succeeds."""

    def __init__(self, true: TrueEnv) -> None:
        self.true = true
        self.world = WorldModel.from_pretrained(true.world, device=true.device)
        self.starts = load_starts(true.starts, self.world)

    @property
    def meta(self) -> DatasetMeta:
        return DatasetMeta(
            self.world.action_spec, WORLD, {"name": WORLD}, self.true.horizon,
            self.world.config.picture[0],
        )  # fmt: skip

    def play(
        self, policy: Policy, seed: int, sim_seed: int | None, record: dict[str, Any]
    ) -> Episode:
        begin = seed if sim_seed is None else sim_seed
        world = self.world
        engine = RolloutEngine(world, policy, steps=self.true.steps)
        start = self.starts.select([begin % len(self.starts.instructions)])
        rollout = engine.rollout(
            start, horizon=self.true.horizon, seed=derive_seed(begin), decode="all"
        )
        assert rollout.frames is not None
        first = world.start(start.frames, start.poses, [0], start.instructions)
        poses = world.poses(first, rollout.actions)[0]
        threshold, _ = world.config.success_rule(start.instructions[0])
        reward = (rollout.reward[0] > threshold).astype(np.float32)
        return Episode(
            frames=rollout.frames[0, :, 0],
            actions=rollout.actions[0],
            states=np.concatenate([start.poses, poses]),
            reward=reward,
            instruction=start.instructions[0],
            env_id=WORLD,
            seed=seed,
            success=bool(reward[-1]),
            info={"sim_seed": begin, **record},
        )


# ---------------------------------------------------------------- in a child process


@lru_cache(maxsize=1)
def recorder(true: TrueEnv) -> Recorder:
    """The environment of this process: begun once."""
    if ":" in true.env:
        own: Recorder = load(true.env)(true)
        return own
    return WorldRecorder(true) if true.env == WORLD else SimulatorRecorder(true)


@lru_cache(maxsize=1)
def _policy(name: str, temperature: float, coherence: float, device: str) -> VLAPolicy:
    return VLAPolicy.from_pretrained(
        name, temperature=temperature, coherence=coherence, device=device
    )


Recorded = tuple[Episode, DatasetMeta]


def record_policy(
    true: TrueEnv,
    policy: str,
    seed: int,
    *,
    temperature: float,
    coherence: float,
    record: dict[str, Any],
) -> Recorded:
    """One episode of a policy."""
    here = recorder(true)
    acting = _policy(policy, temperature, coherence, true.device)
    here.meta.action_spec.require_same(acting.action_spec, true.env, policy)
    if true.horizon % acting.action_spec.chunk:
        raise UserError(
            f"horizon is {true.horizon}; expected a multiple of the policy's chunk, "
            f"{acting.action_spec.chunk}"
        )
    return here.play(acting, seed, None, record), here.meta


def record_start(true: TrueEnv, seed: int) -> Recorded:
    """A start state that nobody acts from: an episode of one action, which stands still."""
    here = recorder(replace(true, horizon=1))
    spec = replace(here.meta.action_spec, chunk=1)
    still = ReplayPolicy(np.zeros((1, 1, spec.dim), np.float32), spec)
    return here.play(still, seed, None, {}), here.meta


@dataclass(frozen=True)
class Replay:
    """Recorded or imagined actions, to be carried out again in truth."""

    seed: int  # of the episode that comes of it
    sim_seed: int
    actions: npt.NDArray[np.float32]  # [T,A]
    spec: ActionSpec
    record: dict[str, Any]


def record_replay(true: TrueEnv, replay: Replay) -> Recorded:
    """One episode of given actions from a given start."""
    here = recorder(true)
    here.meta.action_spec.require_same(replay.spec, true.env, "the imagined actions")
    policy = ReplayPolicy(replay.actions[None], replay.spec)
    return here.play(policy, replay.seed, replay.sim_seed, replay.record), here.meta


def measure(true: TrueEnv, config: Evaluating, number: int) -> Evaluation:
    """Episode ``number`` of an evaluation, greedy."""
    if ":" not in true.env:
        return _run(true.evaluation(config), [number], 1, 1)
    start = config.first_seed + number
    episode = recorder(true).play(_policy(config.policy, 0.0, 0.0, true.device), start, None, {})
    held = held_steps(episode.reward[: config.horizon], true.held_frames)
    steps = config.horizon if held is None else held
    played = len(episode.actions)  # to the environment's own horizon, whatever came of it
    return Evaluation((start,), np.array([held is not None]), np.array([steps]), played, 0.0)
