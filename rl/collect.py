"""`worldloop collect`: scripted successes and near-successes in a simulator (paper section 3.1).

Each seed decides its own wanted outcome; attempts are screened at state speed and only the one
that ends as wanted is rendered. Shape letters: T actions, A their dimension, O objects.
"""

from __future__ import annotations

import fcntl
import itertools
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from worldloop.cli import parse_config
from worldloop.engine.policy.base import Observation, Policy
from worldloop.engine.policy.scripted import perturbation, scripted_policy
from worldloop.engine.policy.scripts.common import Perturbation, aimed
from worldloop.engine.policy.scripts.wander import Wander
from worldloop.engine.policy.vla import TEMPERATURE, VLAPolicy
from worldloop.engine.sampler import derive_seed
from worldloop.episodes import DatasetMeta, EpisodeDataset, EpisodeWriter
from worldloop.errors import UserError
from worldloop.files import disk_error
from worldloop.outcome import actions_only_accuracy, save_actions_only
from worldloop.rl.envs.simulators import Simulator, make_simulator, own_sequence, reset_in_view
from worldloop.rl.envs.tasks import task_preset
from worldloop.track import Progress
from worldloop.types import ActionSpec, Episode

# The outcome must be visible: at 128x128 a pixel is about 4 mm, so the episodes whose cube stops
# within two pixels of the target's edge are left out, of both outcomes.
VISIBLE_MARGIN = 0.008
SETTLED = 8  # last steps over which the success flag must not change
EXPERT_STYLE = 0.15  # share of each range of styles that an expert's hand uses
# Reasons that are the script's own; what could not be begun or seen is not.
FAILED = ("arm frozen", "outcome not settled", "other outcome")
WANDER = "wander"  # in the place of a policy's name
TRIES = 40  # attempts at the wanted outcome before a seed is given up


@dataclass(frozen=True)
class CollectConfig:
    """Collect scripted episodes of one task into a dataset; start it as often as you have cores."""

    env: str
    """Task, such as PushCube-v1 (ManiSkill3) or libero_object-0 (docs/data.md lists them)."""
    out: Path
    """Dataset folder; an existing one of the same task is continued."""
    episodes: int = 1000
    """Stop when the dataset holds this many."""
    horizon: int = 0
    """Actions per episode, the same for every outcome; 0 is the task's own number."""
    image_size: int = 128
    seed: int = 0
    """First seed; seeds are given out once, whatever the number of processes."""
    success_share: float = 0.5
    """Of scripted episodes; a policy's are kept as they end."""
    expert: bool = False
    """Demonstrations for a policy: scripted successes of one steady style, aimed at the object."""
    policy: str | None = None
    """Roll this policy out instead of the scripted one (checkpoint folder or shipped name);
    "wander": a hand that goes to random places, so that a world model sees more than tasks do."""
    temperature: float = TEMPERATURE
    """Of that policy's sampling."""
    coherence: float = 0.0
    """How alike it draws at neighbouring steps, 0 .. 1 (`worldloop grpo` has the same option)."""
    device: str = "cpu"
    """Of that policy."""
    shard: int = 16
    """Episodes per file; a killed process loses at most one unfinished file."""
    crf: int = 16
    """H.264 quality of the videos (lower is better)."""

    def __post_init__(self) -> None:
        try:
            task = task_preset(self.env)
        except ValueError as error:
            raise UserError(f"env: {error}") from error
        if self.horizon == 0:
            object.__setattr__(self, "horizon", task.horizon)
        if not 1 <= self.episodes <= 1_000_000:
            raise ValueError(f"episodes is {self.episodes}; expected 1 .. 1000000")
        if self.horizon < 24 or self.horizon % 24:
            raise ValueError(f"horizon is {self.horizon}; expected a multiple of 24 (the chunk)")
        if self.image_size % 16 or not 32 <= self.image_size <= 1024:
            raise ValueError(f"image_size is {self.image_size}; expected 32 .. 1024, step 16")
        if not 0 <= self.success_share <= 1:
            raise ValueError(f"success_share is {self.success_share}; expected 0 .. 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected 0 or more")
        if not 0 <= self.coherence < 1:
            raise ValueError(f"coherence is {self.coherence}; expected at least 0 and below 1")
        if not 1 <= self.shard <= 1000:
            raise ValueError(f"shard is {self.shard}; expected 1 .. 1000")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf is {self.crf}; expected 0 .. 51")


def _outcome_visible(env: Simulator, success: bool) -> bool:
    """Whether a picture tells the outcome: near the goal's edge, or a failure in it, does not."""
    goal, radius = env.goal(), env.task.goal_radius
    if goal is None:
        return True
    distance = float(np.linalg.norm(env.objects()[0, :2] - goal[:2]))
    return abs(distance - radius) > VISIBLE_MARGIN and (distance < radius) == success


def _frozen(actions_TA: npt.NDArray[np.float32], states_TA: npt.NDArray[np.float32]) -> int:
    """Steps in which a clear command moved nothing: no inverse kinematics was found there."""
    moved = np.abs(np.diff(states_TA[:, :3], axis=0)).max(1)
    return int(((np.abs(actions_TA[:, :3]).max(1) > 0.15) & (moved < 0.001)).sum())


@dataclass(frozen=True)
class Attempt:
    """One scripted episode at state speed: nothing is rendered yet."""

    snapshots: list[Any]  # T+1 simulator states to render from
    actions: npt.NDArray[np.float32]  # [T,A]
    states: npt.NDArray[np.float32]  # [T+1,A]
    objects: npt.NDArray[np.float32]  # [T+1,O,7] poses
    reward: npt.NDArray[np.float32]  # [T] the simulator's success flag after each action
    sim_seed: int
    belief: Perturbation  # how far objects are from where they are believed
    rejected: str  # why it is not kept; empty when it is


def play(
    env: Simulator, seed: int, want: bool, try_: int, horizon: int, expert: bool = False
) -> Attempt | str:
    """Try for the wanted outcome once; a string says why the plan was not even begun."""
    rng = np.random.default_rng([seed, try_])
    sim_seed = reset_in_view(env, (int(rng.integers(2**31)) for _ in itertools.count()))
    start = env.objects()
    belief = perturbation(env.task.env_id, rng, want)
    if expert:
        belief = aimed(np.zeros_like(belief.offset))
    offset = belief.offset
    half = env.task.spawn_half_width
    if half is not None and np.abs(start[0, :2] + offset[0]).max() > half:
        return "belief outside the spawn area"
    policy = scripted_policy(
        env.task.env_id, rng, start, env.tcp()[:3], offset, horizon, EXPERT_STYLE if expert else 1.0
    )
    farthest = max(float(point.position[0]) for point in policy.waypoints)
    if env.task.reach_x is not None and farthest > env.task.reach_x:
        return "out of reach"
    snapshots, states, objects = [env.snapshot()], [env.state()], [start]
    actions, reward = [], []
    for _ in range(horizon):
        state = states[-1].astype(np.float64)
        action = policy.act(state[:3], state[3:6])
        reward.append(float(env.step(action)))
        actions.append(action)
        snapshots.append(env.snapshot())
        states.append(env.state())
        objects.append(env.objects())
    settled = reward[-SETTLED:]
    rejected = ""
    if not env.task.blocked and _frozen(np.stack(actions), np.stack(states)) > 2:
        rejected = "arm frozen"
    elif len(set(settled)) > 1:
        rejected = "outcome not settled"
    elif bool(settled[-1]) != want:
        rejected = "other outcome"
    elif not _outcome_visible(env, want):
        rejected = "outcome hard to see"
    return Attempt(
        snapshots=snapshots,
        actions=np.stack(actions),
        states=np.stack(states),
        objects=np.stack(objects),
        reward=np.asarray(reward, np.float32),
        sim_seed=sim_seed,
        belief=belief,
        rejected=rejected,
    )


def attempt(
    env: Simulator, seed: int, want: bool, try_: int, horizon: int, expert: bool = False
) -> Episode | str:
    """One scripted episode whose outcome is the wanted one, or why there is none.

    Rendered only when it is kept.
    """
    played = play(env, seed, want, try_, horizon, expert)
    if isinstance(played, str) or played.rejected:
        return played if isinstance(played, str) else played.rejected
    return Episode(
        frames=np.stack([env.render_snapshot(snapshot) for snapshot in played.snapshots]),
        actions=played.actions,
        states=played.states,
        reward=played.reward,
        instruction=env.task.instruction,
        env_id=env.task.env_id,
        seed=seed,
        success=want,
        objects=played.objects,
        object_pixels=np.stack([env.object_pixels(pose) for pose in played.objects]),
        info={
            "sim_seed": played.sim_seed,
            "perturbation_m": played.belief.offset.round(5).tolist(),
            "perturbation": played.belief.kind,
            "grade": played.belief.grade,
            "size_m": round(played.belief.size, 5),
        },
    )


def policy_episode(
    env: Simulator, policy: Policy, seed: int, horizon: int, record: dict[str, Any],
    sim_seed: int | None = None,
) -> Episode:  # fmt: skip
    """One episode by a policy, whatever its outcome: the paper's second way (section 3.1).

    It goes on to the horizon after a success; ``success`` is the flag over the last two steps.
    sim_seed: begin exactly as the episode whose ``info["sim_seed"]`` this is; without it, where
    ``seed`` leads to (`reset_in_view`).
    """
    if sim_seed is None:
        sim_seed = reset_in_view(env, own_sequence(seed), solvable=True)
    else:
        env.reset(sim_seed)
    frames, states, objects = [env.render()], [env.state()], [env.objects()]
    actions: list[npt.NDArray[np.float32]] = []
    reward: list[float] = []
    while len(actions) < horizon:
        k = len(actions) // policy.action_spec.chunk
        observation = Observation(
            frames[-1][None, None, None], states[-1][None], (env.task.instruction,), (0,), k
        )
        for action in policy.act(observation, derive_seed(seed, k)).actions[0]:
            reward.append(float(env.step(action)))
            actions.append(action)
            frames.append(env.render())
            states.append(env.state())
            objects.append(env.objects())
    return Episode(
        frames=np.stack(frames),
        actions=np.stack(actions),
        states=np.stack(states),
        reward=np.asarray(reward, np.float32),
        instruction=env.task.instruction,
        env_id=env.task.env_id,
        seed=seed,
        success=all(reward[-2:]),
        objects=np.stack(objects),
        object_pixels=np.stack([env.object_pixels(pose) for pose in objects]),
        info={"sim_seed": sim_seed, **record},
    )


def wanted_outcome(seed: int, success_share: float) -> bool:
    """Whether the episode of a seed is to be a success; independent of the seed's parity."""
    return bool(np.random.default_rng([seed, 999]).random() < success_share)


@contextmanager
def _turn_to_add(root: Path) -> Iterator[None]:
    """One collector at a time: two that finish together must not both add the last episodes."""
    path = root / "meta/.adding"
    try:
        file = open(path, "w")  # noqa: SIM115 - closed below, after the lock
    except OSError as error:
        raise disk_error(path, error) or error from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Collector:
    """One process that adds episodes of one task to a dataset."""

    def __init__(self, config: CollectConfig) -> None:
        torch.set_num_threads(1)
        self.config = config
        self.env = make_simulator(config.env, config.image_size)
        meta = DatasetMeta(
            action_spec=ActionSpec(),
            env_id=config.env,
            camera=asdict(self.env.camera),
            horizon=config.horizon,
            image_size=config.image_size,
        )
        self.writer = EpisodeWriter(config.out, meta, config.crf)
        self.policy: VLAPolicy | None = None
        if config.policy not in (None, WANDER):
            self.policy = VLAPolicy.from_pretrained(
                config.policy, temperature=config.temperature, coherence=config.coherence,
                device=config.device,
            )  # fmt: skip
            spec = self.policy.action_spec
            meta.action_spec.require_same(spec, config.env, config.policy)
            if config.horizon % spec.chunk:
                raise UserError(
                    f"horizon is {config.horizon}; expected a multiple of the policy's chunk, "
                    f"{spec.chunk}"
                )
        self.tries = self.kept = self.successes = 0

    def episode(self, seed: int) -> Episode | None:
        """The episode of a seed, or None where its wanted outcome is not to be had."""
        if self.config.policy is not None:
            rolled = self._rolled(seed)
            self.tries, self.kept = self.tries + 1, self.kept + 1
            self.successes += int(rolled.success)
            return rolled
        config = self.config
        want = config.expert or wanted_outcome(seed, config.success_share)
        rejected: Counter[str] = Counter()
        for try_ in range(TRIES):
            self.tries += 1
            episode = attempt(self.env, seed, want, try_, config.horizon, config.expert)
            if isinstance(episode, Episode):
                self.kept += 1
                self.successes += int(want)
                # What went before tells how often a script ends as it should.
                failed = sum(n for reason, n in rejected.items() if reason in FAILED)
                tried = {"rejected": dict(rejected), "failed_tries": failed}
                return replace(episode, info={**episode.info, **tried})
            rejected[episode] += 1
        return None

    def _rolled(self, seed: int) -> Episode:
        """The episode of a seed by the policy that was named."""
        config, policy = self.config, self.policy
        record: dict[str, Any] = {"policy": config.policy}
        if policy is not None:
            record |= {"temperature": config.temperature, "coherence": config.coherence}
            return policy_episode(self.env, policy, seed, config.horizon, record)
        gripper = float(np.random.default_rng([seed, 997]).choice([-1.0, 1.0]))
        return policy_episode(self.env, Wander(gripper), seed, config.horizon, record)

    def add(self, shard: list[Episode]) -> int:
        """Write what is still wanted of a shard; return how many episodes the dataset holds."""
        with _turn_to_add(self.config.out):
            have = count_episodes(self.config.out)
            # An interrupted writer may have finished what it is handed again.
            there = set(EpisodeDataset(self.config.out).seeds) if have else set()
            shard = [episode for episode in shard if episode.seed not in there]
            shard = shard[: max(0, self.config.episodes - have)]
            return self.writer.add(shard) if shard else have

    def run(self) -> None:
        """Collect until the dataset holds the wanted number; Ctrl-C keeps what is finished."""
        config = self.config
        have = count_episodes(config.out)
        progress = Progress(config.episodes, config.env, unit="ep", initial=have)
        shard: list[Episode] = []
        try:
            with progress:
                while have < config.episodes:
                    seeds = self.writer.claim_seeds(
                        min(config.shard, config.episodes - have), config.seed
                    )
                    for seed in seeds:
                        episode = self.episode(seed)
                        if episode is None:
                            continue
                        shard.append(episode)
                        progress.update(
                            success=f"{self.successes / self.kept:.0%}",
                            kept=f"{self.kept / self.tries:.0%} of tries",
                        )
                    have, shard = self.add(shard), []
                    progress.update(have - progress.count)  # what the others added
        except KeyboardInterrupt:
            if shard:
                self.add(shard)
            raise

    def close(self) -> None:
        """Close the simulator."""
        self.env.close()


def collect(config: CollectConfig) -> EpisodeDataset:
    """Collect until the dataset holds ``config.episodes``; safe to kill, repeat and share.

    Raises UserError when the simulator cannot run here, the disk is full, or the folder holds a
    dataset of another task or camera.
    """
    if count_episodes(config.out):
        there = EpisodeDataset(config.out).meta  # before the simulator starts, which takes a while
        for name, mine in (("env_id", config.env), ("horizon", config.horizon),
                           ("image_size", config.image_size)):  # fmt: skip
            if getattr(there, name) != mine:
                raise UserError(
                    f"{config.out}: its {name} is {getattr(there, name)!r}, this collection's "
                    f"{mine!r}; collect into another folder"
                )
    if count_episodes(config.out) < config.episodes:
        collector = Collector(config)
        try:
            collector.run()
        finally:
            collector.close()
    return EpisodeDataset(config.out)


def count_episodes(root: Path) -> int:
    """How many episodes a dataset folder holds; 0 where there is none yet."""
    return len(EpisodeDataset(root)) if (root / "meta/info.json").exists() else 0


def label_leak(dataset: EpisodeDataset) -> str:
    """Measure how well the outcome can be guessed from the actions alone; keep and tell it.

    A dataset too small to measure gives a sentence that says so and keeps nothing. The margin
    told is two standard errors of a guess, 2 * sqrt(0.25 / episodes).
    """
    actions = np.stack([episode.actions for episode in dataset.stream(frames=False)])
    try:
        result = actions_only_accuracy(actions, dataset.success)
    except UserError as error:
        return f"not measured ({error})"
    save_actions_only(dataset.root, result)
    return (
        f"the actions alone betray {result['accuracy']:.1%} of the outcomes "
        f"(± {100 / len(dataset) ** 0.5:.0f} points by chance; {result['model']}; "
        f"always guessing the commoner one: {result['majority']:.1%})"
    )


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(CollectConfig, argv, "worldloop collect")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the shard is kept
    dataset = collect(config)
    print(
        f"{config.out}: {len(dataset)} episodes, {dataset.success.mean():.0%} successes. "
        "Look at it with `worldloop data inspect`."
    )
    print(f"{config.out}: {label_leak(dataset)}")
    return 0
