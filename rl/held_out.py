"""Held-out real episodes as a world model takes them: start frames, poses, recorded actions."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import worldloop
from worldloop.engine.rollout import ReplayPolicy, RolloutEngine
from worldloop.engine.world_model import Decode, Steps, WorldModel
from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.outcome import OutcomeClassifier, actions_only_accuracy, load_actions_only
from worldloop.rl.envs.tasks import TASKS
from worldloop.track import Progress
from worldloop.types import Actions, Episode, Rollout, Starts

SHIPPED_CLASSIFIERS = Path(worldloop.__file__).parent / "weights/outcome"


@dataclass(frozen=True)
class HeldOut:
    """N real episodes of one task, all of T actions."""

    episodes: list[Episode]
    folder: Path
    env_id: str
    fps: float

    @cached_property
    def actions(self) -> Actions:
        """[N,T,A]."""
        return np.stack([episode.actions for episode in self.episodes])

    @cached_property
    def starts(self) -> Starts:
        """First frames, poses and instructions."""
        return Starts(
            frames=np.stack([episode.frames[0] for episode in self.episodes])[:, None, None],
            poses=np.stack([episode.states[0] for episode in self.episodes]),
            instructions=tuple(episode.instruction for episode in self.episodes),
        )

    @property
    def object_color(self) -> str:
        return TASKS[self.env_id].object_color if self.env_id in TASKS else "blue"

    def first(self, count: int, horizon: int) -> HeldOut:
        """The first episodes, cut to ``horizon`` actions."""
        cut = [
            dataclasses.replace(
                e, frames=e.frames[: horizon + 1], actions=e.actions[:horizon],
                states=e.states[: horizon + 1], reward=e.reward[:horizon],
            )
            for e in self.episodes[:count]
        ]  # fmt: skip
        return dataclasses.replace(self, episodes=cut)

    def pick(self, rows: Sequence[int]) -> HeldOut:
        """These episodes, in this order."""
        return dataclasses.replace(self, episodes=[self.episodes[row] for row in rows])

    def balanced(self, count: int | None = None) -> HeldOut:
        """As many successes as failures, at most ``count`` in all: the first of either.

        Raises UserError where all episodes end alike.
        """
        ends = [
            [i for i, e in enumerate(self.episodes) if bool(e.reward[-1] > 0.5) == outcome]
            for outcome in (True, False)
        ]
        each = min(map(len, ends))
        if count is not None:
            each = min(each, count // 2)
        if each == 0:
            raise UserError(
                f"{self.folder}: {len(ends[0])} successes and {len(ends[1])} failures; outcomes "
                "cannot be balanced, add episodes of either kind (or ask for at least 2)"
            )
        return self.pick(sorted(ends[0][:each] + ends[1][:each]))


def load_held_out(
    folder: Path, count: int | None, world: WorldModel, least: int = 2, *, frames: bool = True
) -> HeldOut:
    """Read episodes, ``least`` or more, that fit the world model; UserError names what does not.

    frames=False decodes only the first frame of each, and shows it in place of all others.
    """
    dataset = EpisodeDataset(folder)
    number = len(dataset) if count is None else min(count, len(dataset))
    if number < least:
        raise UserError(f"{folder}: holds {len(dataset)} episodes; at least {least} are needed")
    world.action_spec.require_same(dataset.meta.action_spec, "the world model", str(folder))
    if frames:
        episodes = [dataset.read(i) for i in range(number)]
    else:
        episodes = [_first_only(dataset, i) for i in range(number)]
    lengths = {len(episode.actions) for episode in episodes}
    chunk = world.action_spec.chunk
    if len(lengths) > 1 or min(lengths) % chunk:
        raise UserError(
            f"{folder}: episodes have {sorted(lengths)} actions; one length is needed, a multiple "
            f"of the world model's chunk ({chunk})"
        )
    return HeldOut(episodes, folder, dataset.meta.env_id, dataset.meta.action_spec.control_hz)


def _first_only(dataset: EpisodeDataset, number: int) -> Episode:
    episode, first = dataset.read(number, frames=False), dataset.first_frame(number)
    shown = np.broadcast_to(first, (len(episode.frames), *first.shape))
    return dataclasses.replace(episode, frames=shown)


def find_classifier(
    env_id: str, image_size: int, given: Path | None = None, among: Sequence[Path] = ()
) -> tuple[OutcomeClassifier | None, str]:
    """The outcome classifier of a task's pictures and "", or None and the reason.

    given: take this one. among: folders to look at before the shipped ones.
    """
    if given is not None:
        classifier = OutcomeClassifier.load(given)
        if classifier.image_size != image_size:
            raise UserError(
                f"{given}: is for pictures of {classifier.image_size} pixels a side, these have "
                f"{image_size}; train one on these"
            )
        return classifier, ""
    shipped = sorted(SHIPPED_CLASSIFIERS.glob("*/config.json"))
    for path in [*(folder / "config.json" for folder in among), *shipped]:
        classifier = OutcomeClassifier.load(path.parent)
        if (classifier.env_id, classifier.image_size) == (env_id, image_size):
            return classifier, ""
    return None, (
        f"no outcome classifier of {env_id} at {image_size} pixels is shipped or given; train one"
    )


def imagine(
    world: WorldModel,
    held_out: HeldOut,
    actions_NTA: Actions,
    steps: Steps,
    seed: int,
    title: str | None = None,
    max_batch: int | None = None,
    decode: Decode = "all",
) -> tuple[Rollout, float]:
    """Imagine every episode, at most ``max_batch`` at once; the rollout, its wall-clock seconds.

    With a ``title`` the progress is shown; ``decode`` as `RolloutEngine.rollout` has it.
    """
    engine = RolloutEngine(world, ReplayPolicy(actions_NTA, world.action_spec), steps=steps)
    horizon = actions_NTA.shape[1]
    since = time.perf_counter()
    bar = None if title is None else Progress(len(actions_NTA) * horizon, title, unit="frame")
    with bar or nullcontext():
        rollout = engine.rollout(
            held_out.starts, horizon=horizon, seed=seed, decode=decode, max_batch=max_batch,
            progress=bar,
        )  # fmt: skip
    return rollout, time.perf_counter() - since


def actions_only(held_out: HeldOut, seed: int) -> dict[str, Any]:
    """The larger of two figures: measured with the training data, and on these episodes.

    On a few dozen episodes the cross-validated figure is noisy, so it is a mean over repeats.
    """
    success = np.array([episode.success for episode in held_out.episodes])
    stored = load_actions_only(held_out.folder)
    values: dict[str, Any] = {"actions_only_stored": stored, "actions_only_here": None}
    found = [] if stored is None else [float(stored["accuracy"])]
    if min(success.sum(), (~success).sum()) >= 10:
        runs = [actions_only_accuracy(held_out.actions, success, seed + i) for i in range(5)]
        values["actions_only_here"] = statistics.fmean(run["accuracy"] for run in runs)
        found.append(values["actions_only_here"])
    return {"actions_only_alignment": max(found) if found else None, **values}
