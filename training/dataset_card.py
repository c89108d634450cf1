"""`worldloop data VERB`: what a dataset holds, whether it is whole, its figures; new ones from old.

inspect    one page of facts, and a contact sheet with --sheet
validate   reads every episode, every picture and number; names the first thing that is wrong
stats      outcome mix, perturbations, the fitted controller and what the actions alone betray of
           the outcome; of several datasets with --json, and a montage of each with --montages
import     recorded or teleoperated episodes become a dataset (`worldloop.training.import_data`)
merge      several datasets of one task as one
split      a dataset's episodes for training and held out, no start in both
balance    as many successes as failures

What merge, split and balance write is not encoded again.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from worldloop.cli import parse_config
from worldloop.config import positive
from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.files import atomic_path, atomic_write_text, new_folder
from worldloop.merge import episode_key, merge_datasets, subset_dataset
from worldloop.outcome import load_actions_only
from worldloop.track import Progress, git_commit
from worldloop.training.data import fit_action_spec
from worldloop.training.dataset_figures import GRADES, card, grade_of, save_montage, strip
from worldloop.training.import_data import ImportConfig, import_data
from worldloop.types import Episode


@dataclass(frozen=True)
class InspectConfig:
    """Show what a dataset holds."""

    data: tyro.conf.Positional[Path]
    sheet: Path | None = None
    """Write a contact sheet of the first episodes (PNG)."""
    rows: int = 8
    """Episodes on the contact sheet."""


@dataclass(frozen=True)
class ValidateConfig:
    """Read everything in a dataset; the first fault ends it with exit code 2."""

    data: tyro.conf.Positional[Path]
    rarer_share: float = 0.0
    """Smallest share that the rarer outcome may have, such as 0.2."""


@dataclass(frozen=True)
class MergeConfig:
    """Write the episodes of several datasets of one task as a new one."""

    data: tyro.conf.Positional[tuple[Path, ...]]
    out: Path


@dataclass(frozen=True)
class SplitConfig:
    """Write OUT/train and OUT/held-out: both outcomes in each, no start state in both."""

    data: tyro.conf.Positional[Path]
    out: Path
    held_out: float = 0.1
    """Share of the starts of each outcome."""
    seed: int = 0


@dataclass(frozen=True)
class BalanceConfig:
    """Write a dataset with as many successes as failures; of the commoner ones some are drawn."""

    data: tyro.conf.Positional[Path]
    out: Path
    seed: int = 0


@dataclass(frozen=True)
class StatsConfig:
    """Cards of datasets: outcome mix, perturbations, controller, what the actions betray."""

    data: tyro.conf.Positional[tuple[Path, ...]]
    json: Path | None = None
    """Write all cards as one JSON object, by task."""
    montages: Path | None = None
    """Write TASK.jpg of each into this folder: successes, near-successes, clear failures."""
    seed: int = 0


def _open(path: Path) -> EpisodeDataset:
    dataset = EpisodeDataset(path)
    if not len(dataset):
        raise UserError(f"{path}: holds no episodes yet; collect some with `worldloop collect`")
    return dataset


def inspect(config: InspectConfig) -> int:
    """Print the facts of a dataset; write the contact sheet asked for."""
    positive(config, "rows")
    dataset = _open(config.data)
    meta, spec = dataset.meta, dataset.meta.action_spec
    files = [f for part in ("meta", "data", "videos") for f in (config.data / part).rglob("*")]
    size = sum(f.stat().st_size for f in files if f.is_file()) / 2**20
    print(f"{config.data}: {len(dataset)} episodes of {meta.env_id}, {size:.1f} MiB")
    print(f"  outcome      {dataset.success.mean():.1%} successes")
    print(f"  pictures     {meta.image_size}x{meta.image_size} at {spec.control_hz:g} Hz, "
          f"camera {meta.camera.get('name', 'unnamed')}")  # fmt: skip
    print(f"  actions      {meta.horizon} a episode; {spec.kind}: {', '.join(spec.names)}")
    first = dataset.read(0)
    print(f"  instruction  {first.instruction}")
    stored = load_actions_only(config.data)
    if stored is not None:
        print(f"  actions only {stored['accuracy']:.1%} of outcomes guessed ({stored['model']})")
    if config.sheet is not None:
        episodes = [dataset.read(i) for i in range(min(config.rows, len(dataset)))]
        picture = contact_sheet(episodes)
        with atomic_path(config.sheet) as temporary:
            picture.save(temporary, format="PNG")
        print(f"  sheet        {config.sheet}")
    return 0


def contact_sheet(episodes: list[Episode], columns: int = 10) -> Image.Image:
    """Rows of frames, one row an episode; its left edge is green where it succeeds."""
    return Image.fromarray(np.concatenate([strip(e, columns) for e in episodes], 0))


def check_episode(episode: Episode, spec_check: Callable[..., object], where: str) -> None:
    """Raise UserError naming the field of an episode that is not as it must be."""
    spec_check(episode.actions[None], f"{where}: actions")
    for name in ("states", "reward", "objects", "object_pixels"):
        value = getattr(episode, name)
        if value is not None and not np.isfinite(value).all():
            raise UserError(f"{where}: {name} holds a value that is not finite; collect it again")
    if not np.isin(episode.reward, (0, 1)).all():
        raise UserError(f"{where}: reward must be 0 or 1 at every step; collect it again")
    if bool(episode.reward[-1] > 0.5) != episode.success:
        raise UserError(
            f"{where}: success is {episode.success}, its last reward {episode.reward[-1]:g}; "
            "they must agree, collect it again"
        )
    if episode.frames.std() < 1:
        raise UserError(f"{where}: its pictures show nothing (one flat colour); collect it again")


def validate(config: ValidateConfig) -> int:
    """Read every episode; raises naming the first fault."""
    if not 0 <= config.rarer_share <= 0.5:
        raise UserError(f"rarer_share is {config.rarer_share:g}; expected 0 .. 0.5")
    dataset = _open(config.data)
    share = min(dataset.success.mean(), 1 - dataset.success.mean())
    if share < config.rarer_share:
        raise UserError(
            f"{config.data}: the rarer outcome has {share:.1%} of the episodes, expected at least "
            f"{config.rarer_share:.1%}; `worldloop data balance`, or collect more of it"
        )
    frames = 0
    seen: dict[tuple[int, str], int] = {}
    with Progress(len(dataset), "validate", unit="ep") as progress:
        for number, episode in enumerate(dataset.stream()):
            where = f"{config.data}: episode {number}"
            check_episode(episode, dataset.meta.action_spec.check, where)
            if len(episode.actions) != dataset.meta.horizon:
                raise UserError(
                    f"{where}: {len(episode.actions)} actions, meta/worldloop.json says "
                    f"{dataset.meta.horizon}"
                )
            frames += len(episode.frames)
            key = episode_key(episode.seed, episode.actions)
            if key in seen:
                raise UserError(f"{where} is episode {seen[key]} once more; merge or collect anew")
            seen[key] = number
            progress.update()
    if frames != dataset.info["total_frames"]:
        raise UserError(
            f"{config.data}/meta/info.json: total_frames is {dataset.info['total_frames']}, "
            f"its episodes hold {frames}"
        )
    print(f"{config.data}: {len(dataset)} episodes, {frames} frames, all read, nothing wrong")
    return 0


def stats(config: StatsConfig) -> int:
    """Print cards and fitted action specs; write the files asked for."""
    if not config.data:
        raise UserError("stats: no datasets given")
    datasets = [_open(path) for path in config.data]
    cards: dict[str, Any] = {}
    for path, dataset in zip(config.data, datasets, strict=True):
        first, env_id = datasets[0].meta.action_spec, dataset.meta.env_id
        first.require_same(dataset.meta.action_spec, str(config.data[0]), str(path))
        if env_id in cards:
            raise UserError(f"{path}: a second dataset of {env_id}; merge them first")
        cards[env_id] = card(dataset, config.seed)
        _print_card(dataset, cards[env_id])
        if config.montages is not None:
            save_montage(dataset, config.montages / f"{env_id}.jpg")
    if config.json is not None:
        record = {
            "command": shlex.join(["worldloop", "data", "stats", *sys.argv[3:]]),
            "commit": git_commit(),
            "tasks": cards,
        }
        config.json.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(config.json, json.dumps(record, indent=1) + "\n")
    return 0


def _print_card(dataset: EpisodeDataset, found: dict[str, Any]) -> None:
    actions = np.stack([episode.actions for episode in dataset.stream(frames=False)])
    states = np.stack([episode.states for episode in dataset.stream(frames=False)])
    spec = fit_action_spec(dataset.meta.action_spec, actions, states)
    print(f"{dataset.root}: {found['episodes']} episodes of {found['env_id']}, "
          f"{found['success_share']:.1%} successes")  # fmt: skip
    for name in ("grades", "perturbations", "perturbation_m", "lengths", "first_success_step",
                 "script_success"):  # fmt: skip
        print(f"  {name:<20} {json.dumps(found[name])}")
    if spec.controller is not None:
        for name, value in asdict(spec.controller).items():
            print(f"  {name:<20} {json.dumps(value)}")
    for name in ("pose_mean", "pose_std"):
        print(f"  {name:<20} {json.dumps(getattr(spec, name))}")
    if found["actions_only"] is None:
        print(f"  the actions alone: not measured ({found['actions_only_why']})")
    else:
        majority = max(found["success_share"], 1 - found["success_share"])
        print(f"  the actions alone betray {found['actions_only']:.1%} of the outcomes "
              f"(always guessing the commoner one: {majority:.1%})")  # fmt: skip


def split(config: SplitConfig) -> int:
    """Split by start state; errors name what there is too little of."""
    if not 0 < config.held_out < 1:
        raise UserError(f"held_out is {config.held_out:g}; expected a share between 0 and 1")
    dataset = _open(config.data)
    _both_outcomes(dataset)
    groups: dict[int, list[int]] = defaultdict(list)  # episodes by where they begin
    for number, episode in enumerate(dataset.stream(frames=False)):
        groups[int(episode.info.get("sim_seed", episode.seed))].append(number)
    rng, held = np.random.default_rng(config.seed), list[int]()
    for outcome in (True, False):
        # A start belongs to the outcome of its first episode, so each is drawn once.
        own = [rows for rows in groups.values() if dataset.success[rows[0]] == outcome]
        count = round(config.held_out * len(own))
        if not 0 < count < len(own):
            raise UserError(
                f"{config.data}: {len(own)} starts of {'successes' if outcome else 'failures'} "
                f"cannot be split {1 - config.held_out:g} to {config.held_out:g}; collect more, "
                "or choose another held_out"
            )
        held += [row for i in rng.permutation(len(own))[:count] for row in own[i]]
    rest = sorted(set(range(len(dataset))) - set(held))
    with new_folder(config.out) as folder:
        for name, rows in (("train", rest), ("held-out", sorted(held))):
            part = subset_dataset(config.data, rows, folder / name)
            print(f"{config.out / name}: {len(part)} episodes, "
                  f"{part.success.mean():.0%} successes")  # fmt: skip
    return 0


def balance(config: BalanceConfig) -> int:
    """Keep all of the rarer outcome and as many of the other, spread over grades as they are."""
    dataset = _open(config.data)
    _both_outcomes(dataset)
    grade = [GRADES.index(grade_of(episode)) for episode in dataset.stream(frames=False)]
    success = dataset.success
    common = bool(success.mean() >= 0.5)
    count = int(min(success.sum(), (~success).sum()))
    rows = np.random.default_rng(config.seed).permutation(np.flatnonzero(success == common))
    order = sorted(rows.tolist(), key=lambda row: grade[row])  # stable: drawn within a grade
    chosen = [order[i * len(order) // count] for i in range(count)]
    keep = sorted([*chosen, *(int(row) for row in np.flatnonzero(success != common))])
    part = subset_dataset(config.data, keep, config.out)
    print(f"{config.out}: {len(part)} of {len(dataset)} episodes, "
          f"{part.success.mean():.0%} successes")  # fmt: skip
    return 0


def _both_outcomes(dataset: EpisodeDataset) -> None:
    if dataset.success.all() or not dataset.success.any():
        only = "successes" if dataset.success.all() else "failures"
        raise UserError(
            f"{dataset.root}: holds {only} only; collect the other outcome as well "
            "(`worldloop collect --success-share`)"
        )


def merge(config: MergeConfig) -> int:
    """Merge and say what came of it."""
    dataset = merge_datasets(config.data, config.out)
    print(f"{config.out}: {len(dataset)} episodes, {dataset.success.mean():.0%} successes")
    return 0


_VERBS = {
    "inspect": (InspectConfig, inspect),
    "validate": (ValidateConfig, validate),
    "stats": (StatsConfig, stats),
    "import": (ImportConfig, import_data),
    "merge": (MergeConfig, merge),
    "split": (SplitConfig, split),
    "balance": (BalanceConfig, balance),
}


def main(argv: list[str]) -> int:
    """Run from the command line."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: worldloop data {{{','.join(_VERBS)}}} DATASET\n\n{__doc__}")
        return 0 if argv else 2
    if argv[0] not in _VERBS:
        raise UserError(f"data: unknown verb {argv[0]!r}; known: {', '.join(_VERBS)}")
    config_type, run = _VERBS[argv[0]]
    return run(parse_config(config_type, argv[1:], f"worldloop data {argv[0]}"))  # type: ignore[arg-type,operator]
