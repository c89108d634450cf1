"""`worldloop collect`: scripted successes and near-successes in ManiSkill (paper section 3.1)."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from worldloop.engine.policy.scripted import perturbation, scripted_policy
from worldloop.episodes import DatasetMeta, EpisodeDataset, EpisodeWriter
from worldloop.rl.envs.maniskill import ManiSkillEnv, task_preset
from worldloop.types import ActionSpec, Episode

# The outcome must be visible: at 128x128 a pixel is about 4 mm, so the episodes whose cube stops
# within two pixels of the target's edge are left out, of both outcomes.
VISIBLE_MARGIN = 0.008
FARTHEST_REACH = 0.145  # metres; beyond it a low, downward gripper has no inverse kinematics
# Where ManiSkill puts a cube to push or pull. A belief outside of it would betray a perturbation
# through the path alone, so the believed position must lie inside, whatever the outcome.
SPAWN_HALF_WIDTH = 0.1
SETTLED = 8  # last steps over which the success flag must not change


@dataclass(frozen=True)
class CollectConfig:
    """Collect scripted episodes of one task into a dataset; start it as often as you have cores."""

    env: str
    """Task: PushCube-v1, PullCube-v1, StackCube-v1 or LiftPegUpright-v1."""
    out: Path
    """Dataset folder; an existing one of the same task is continued."""
    episodes: int = 1000
    """Stop when the dataset holds this many."""
    horizon: int = 72
    """Actions per episode, the same for every outcome."""
    image_size: int = 128
    seed: int = 0
    """First seed; seeds are given out once, whatever the number of processes."""
    success_share: float = 0.5
    shard: int = 16
    """Episodes per file; a killed process loses at most one unfinished file."""
    crf: int = 16
    """H.264 quality of the videos (lower is better)."""

    def __post_init__(self) -> None:
        task_preset(self.env)
        if not 1 <= self.episodes <= 1_000_000:
            raise ValueError(f"episodes is {self.episodes}; expected 1 .. 1000000")
        if self.horizon < 24 or self.horizon % 24:
            raise ValueError(f"horizon is {self.horizon}; expected a multiple of 24 (the chunk)")
        if self.image_size % 16 or not 32 <= self.image_size <= 1024:
            raise ValueError(f"image_size is {self.image_size}; expected 32 .. 1024, step 16")
        if not 0 <= self.success_share <= 1:
            raise ValueError(f"success_share is {self.success_share}; expected 0 .. 1")


def _outcome_visible(env: ManiSkillEnv) -> bool:
    goal = env.goal()
    if goal is None:
        return True
    distance = float(np.linalg.norm(env.objects()[0, :2] - goal[:2]))
    return abs(distance - 0.1) > VISIBLE_MARGIN


def _frozen(actions_TA: np.ndarray, states_TA: np.ndarray) -> int:
    """Steps in which a clear command moved nothing: no inverse kinematics was found there."""
    moved = np.abs(np.diff(states_TA[:, :3], axis=0)).max(1)
    return int(((np.abs(actions_TA[:, :3]).max(1) > 0.15) & (moved < 0.001)).sum())


def attempt(env: ManiSkillEnv, seed: int, want: bool, try_: int, horizon: int) -> Episode | None:
    """One scripted episode whose outcome is the wanted one, or None. Rendered only when kept."""
    rng = np.random.default_rng([seed, try_])
    sim_seed = int(rng.integers(2**31))
    env.reset(sim_seed)
    offset = perturbation(env.task.env_id, rng, want)
    start = env.objects()
    if env.goal() is not None and np.abs(start[0, :2] + offset[0]).max() > SPAWN_HALF_WIDTH:
        return None
    policy = scripted_policy(env.task.env_id, rng, start, env.tcp()[:3], offset, horizon)
    if max(float(point.position[0]) for point in policy.waypoints) > FARTHEST_REACH:
        return None
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
    if _frozen(np.stack(actions), np.stack(states)) > 2:
        return None
    settled = reward[-SETTLED:]
    if len(set(settled)) > 1 or bool(settled[-1]) != want or not _outcome_visible(env):
        return None
    frames = np.stack([env.render_snapshot(snapshot) for snapshot in snapshots])
    poses = np.stack(objects)
    pixels = np.stack([env.project(pose[:, :3]) for pose in poses])
    return Episode(
        frames=frames,
        actions=np.stack(actions),
        states=np.stack(states),
        reward=np.asarray(reward, np.float32),
        instruction=env.task.instruction,
        env_id=env.task.env_id,
        seed=seed,
        success=want,
        objects=poses,
        object_pixels=pixels,
        info={"sim_seed": sim_seed, "perturbation_m": offset.round(5).tolist()},
    )


def collect(config: CollectConfig) -> EpisodeDataset:
    """Collect until the dataset holds ``config.episodes``; safe to kill, repeat and share."""
    torch.set_num_threads(1)
    env = ManiSkillEnv(config.env, config.image_size)
    meta = DatasetMeta(
        action_spec=ActionSpec(),
        env_id=config.env,
        camera=asdict(env.camera),
        horizon=config.horizon,
        image_size=config.image_size,
    )
    writer = EpisodeWriter(config.out, meta, config.crf)
    have = _count(config.out)
    progress = tqdm(total=config.episodes, initial=have, unit="ep", desc=config.env)
    tries = kept = successes = 0
    started = time.time()
    try:
        while have < config.episodes:
            shard: list[Episode] = []
            count = min(config.shard, config.episodes - have)
            for seed in writer.claim_seeds(count, config.seed):
                want = np.random.default_rng([seed, 999]).random() < config.success_share
                for try_ in range(40):
                    tries += 1
                    episode = attempt(env, seed, bool(want), try_, config.horizon)
                    if episode is not None:
                        shard.append(episode)
                        kept, successes = kept + 1, successes + int(episode.success)
                        progress.update(1)
                        progress.set_postfix_str(
                            f"{kept / (time.time() - started):.2f} ep/s, success "
                            f"{successes / kept:.0%}, kept {kept / tries:.0%} of tries"
                        )
                        break
            if shard:
                have = writer.add(shard)
    finally:
        progress.close()
        env.close()
    return EpisodeDataset(config.out)


def _count(root: Path) -> int:
    return len(EpisodeDataset(root)) if (root / "meta/info.json").exists() else 0


def main(argv: list[str]) -> int:
    config = tyro.cli(CollectConfig, args=argv, prog="worldloop collect")
    dataset = collect(config)
    print(
        f"{config.out}: {len(dataset)} episodes, {dataset.success.mean():.0%} successes. "
        "Look at it with `worldloop data inspect`."
    )
    return 0
