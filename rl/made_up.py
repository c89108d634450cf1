"""Made-up action sequences whose true outcome the simulator gives (paper figure 6).

No policy would act so and no training episode holds such paths; a world model that follows actions
imagines them all the same. And long wandering episodes, to see how far imagination holds.

Shape letters: N episodes, T actions, A action dim.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from worldloop.engine.policy.base import Policy, ReplayPolicy
from worldloop.engine.policy.scripts.wander import REACH, Wander
from worldloop.episodes import DatasetMeta, EpisodeDataset, EpisodeWriter
from worldloop.errors import UserError
from worldloop.files import disk_error
from worldloop.rl.collect import policy_episode
from worldloop.rl.envs.simulators import make_simulator
from worldloop.rl.envs.tasks import task_preset
from worldloop.rl.held_out import HeldOut
from worldloop.track import Progress
from worldloop.types import ActionSpec, Episode

Float = npt.NDArray[np.float32]
KINDS = ("there and back", "oscillations", "detour, then the task", "the task, disturbed")


def made_up(kind: str, recorded_TA: Float, rng: np.random.Generator) -> Float:
    """An action sequence [T,A] of a kind, beside a recorded one whose gripper it keeps."""
    T = len(recorded_TA)
    actions = np.zeros_like(recorded_TA)
    actions[:, 6:] = recorded_TA[:, 6:]
    moves = actions[:, :3]
    side = float(rng.choice([-1.0, 1.0]))
    if kind == KINDS[0]:  # aside, back above the start, and up to a neutral pose
        n = T // 4
        moves[:n, 1] = side * 0.09 / REACH / n
        moves[n : 2 * n, 1] = -side * 0.09 / REACH / n
        moves[3 * n :, 2] = 0.05 / REACH / (T - 3 * n)
    elif kind == KINDS[1]:  # forward and back, and sideways, in different time
        t = np.arange(T)
        for axis, period, size in ((0, T / 3, 0.03), (1, T / 2, 0.05)):
            path = size * np.sin(2 * np.pi * t / period + rng.uniform(0, 0.5))
            moves[1:, axis] = np.diff(path) / REACH
    elif kind == KINDS[2]:  # aside and back, then what was recorded, as far as there is time
        n = T // 6
        moves[:n, 1] = side * 0.06 / REACH / n
        moves[n : 2 * n, 1] = -side * 0.06 / REACH / n
        actions[2 * n :] = recorded_TA[: T - 2 * n]
    elif kind == KINDS[3]:  # what was recorded, and a slow drift that nobody recorded
        knots = rng.normal(0, 0.15, (6, 3))
        at = np.linspace(0, 5, T)
        drift = np.stack([np.interp(at, np.arange(6), knots[:, k]) for k in range(3)], 1)
        actions[:] = recorded_TA
        moves += drift.astype(np.float32)
    else:
        raise UserError(f"kind is {kind!r}; one of {', '.join(KINDS)}")
    return np.clip(actions, -1, 1)


def simulate(
    folder: Path, held_out: HeldOut, plays: Sequence[tuple[Policy, int, str]], horizon: int
) -> EpisodeDataset:
    """Episodes of policies from simulator seeds, each with a note; kept in ``folder``.

    Task, camera and picture size are those of the held-out episodes.

    ``folder`` gets a part that names what was asked for: asked again, it is only read. Raises
    UserError where the simulator is not installed or cannot render.
    """
    env_id, image_size = held_out.env_id, held_out.episodes[0].frames.shape[1]
    seen = EpisodeDataset(held_out.folder).meta.camera
    camera = replace(
        task_preset(env_id).camera, name=seen["name"], eye=tuple(seen["eye"]),
        target=tuple(seen["target"]), fov=seen["fov"],
    )  # fmt: skip
    asked = [(sim_seed, note, _digest(policy)) for policy, sim_seed, note in plays]
    text = json.dumps([env_id, seen, image_size, horizon, asked])
    final = folder / f"{env_id}-{horizon}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if (final / "meta/info.json").is_file():
        return EpisodeDataset(final)
    making = final.with_name(f".{final.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    env = make_simulator(env_id, image_size, camera)
    try:
        meta = DatasetMeta(ActionSpec(), env_id, asdict(camera), horizon, image_size)
        episodes = []
        with Progress(len(plays), f"simulate {env_id}", unit="episode") as progress:
            for number, (policy, sim_seed, note) in enumerate(plays):
                record = {"made_up": note}
                episodes.append(policy_episode(env, policy, number, horizon, record, sim_seed))
                progress.update()
        EpisodeWriter(making, meta).add(episodes)
        making.rename(final)
    except OSError as error:
        raise disk_error(final, error) or error from error
    finally:
        env.close()
    return EpisodeDataset(final)


def _digest(policy: Policy) -> str:
    if isinstance(policy, ReplayPolicy):
        return hashlib.sha256(policy.actions.tobytes()).hexdigest()
    assert isinstance(policy, Wander)
    return f"wander {policy.gripper}"


def _sim_seed(episode: Episode, where: Path) -> int:
    if "sim_seed" not in episode.info:
        raise UserError(f"{where}: its episodes hold no sim_seed; the simulator cannot begin there")
    return int(episode.info["sim_seed"])


def novel_episodes(held_out: HeldOut, count: int, folder: Path, seed: int) -> EpisodeDataset:
    """``count`` made-up sequences from the starts of held-out episodes, the kinds in turn."""
    plays: list[tuple[Policy, int, str]] = []
    for i in range(count):
        episode = held_out.episodes[i % len(held_out.episodes)]
        kind = KINDS[i % len(KINDS)]
        actions = made_up(kind, episode.actions, np.random.default_rng([seed, i]))
        plays.append((ReplayPolicy(actions[None]), _sim_seed(episode, held_out.folder), kind))
    return simulate(folder, held_out, plays, held_out.actions.shape[1])


def long_episodes(held_out: HeldOut, count: int, frames: int, folder: Path) -> EpisodeDataset:
    """``count`` wandering episodes of at least ``frames`` frames from held-out starts."""
    chunk = ActionSpec().chunk
    plays: list[tuple[Policy, int, str]] = []
    for i in range(count):
        episode = held_out.episodes[i % len(held_out.episodes)]
        wander = Wander(float(episode.actions[0, 6]))
        plays.append((wander, _sim_seed(episode, held_out.folder), "wander"))
    return simulate(folder, held_out, plays, -(-frames // chunk) * chunk)
