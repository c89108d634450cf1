"""`worldloop data VERB`: what a dataset holds, whether it is whole, its figures; new ones from old.

inspect    one page of facts, and a contact sheet with --sheet
validate   reads every episode, every picture and number; names the first thing that is wrong
stats      fits the controller and the pose statistics that trainers store in a checkpoint, and
           measures how much of the outcome the actions alone betray
import     recorded or teleoperated episodes become a dataset (`worldloop.training.import_data`)
merge      several datasets of one task as one; nothing is encoded again
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.files import atomic_path
from worldloop.merge import episode_key, merge_datasets
from worldloop.outcome import actions_only_accuracy, load_actions_only, save_actions_only
from worldloop.track import Progress
from worldloop.training.data import fit_action_spec
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


@dataclass(frozen=True)
class MergeConfig:
    """Write the episodes of several datasets of one task as a new one."""

    data: tyro.conf.Positional[tuple[Path, ...]]
    out: Path


@dataclass(frozen=True)
class StatsConfig:
    """Fit controller and pose statistics; measure what the actions betray of the outcome."""

    data: tyro.conf.Positional[Path]
    seed: int = 0


def _open(path: Path) -> EpisodeDataset:
    dataset = EpisodeDataset(path)
    if not len(dataset):
        raise UserError(f"{path}: holds no episodes yet; collect some with `worldloop collect`")
    return dataset


def inspect(config: InspectConfig) -> int:
    """Print the facts of a dataset; write the contact sheet asked for."""
    if config.rows < 1:
        raise UserError(f"rows is {config.rows}; must be at least 1")
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
    """Rows of evenly spaced frames, one row an episode; successes have a green left edge."""
    rows = []
    for episode in episodes:
        times = np.linspace(0, len(episode.frames) - 1, columns).round().astype(int)
        strip = np.concatenate(list(episode.frames[times]), 1)
        color = (29, 122, 70) if episode.success else (176, 32, 48)
        edge = np.full((len(strip), 6, 3), color, np.uint8)
        rows.append(np.concatenate([edge, strip], 1))
    return Image.fromarray(np.concatenate(rows, 0))


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
    dataset = _open(config.data)
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
    """Print the fitted action spec and the actions-only accuracy, which is kept in meta/."""
    dataset = _open(config.data)
    episodes = list(dataset.stream(frames=False))
    actions = np.stack([episode.actions for episode in episodes])
    states = np.stack([episode.states for episode in episodes])
    spec = fit_action_spec(dataset.meta.action_spec, actions, states)
    if spec.controller is not None:
        for name, value in asdict(spec.controller).items():
            print(f"  {name:<14} {json.dumps(value)}")
    for name in ("pose_mean", "pose_std"):
        print(f"  {name:<14} {json.dumps(getattr(spec, name))}")
    result = actions_only_accuracy(actions, dataset.success, config.seed)
    save_actions_only(config.data, result)
    for name, accuracy in result["models"].items():
        print(f"  {name:<36} {accuracy:.1%}")
    print(
        f"{config.data}: the actions alone betray {result['accuracy']:.1%} of the outcomes "
        f"(always guessing the commoner one: {result['majority']:.1%})"
    )
    return 0


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
}


def main(argv: list[str]) -> int:
    """Run from the command line."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: worldloop data {{{','.join(_VERBS)}}} DATASET\n\n{__doc__}")
        return 0 if argv else 2
    if argv[0] not in _VERBS:
        raise UserError(f"data: unknown verb {argv[0]!r}; known: {', '.join(_VERBS)}")
    config_type, run = _VERBS[argv[0]]
    return run(tyro.cli(config_type, args=argv[1:], prog=f"worldloop data {argv[0]}"))  # type: ignore[arg-type,operator]
