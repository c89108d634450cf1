"""The exploitation alarm: do imagined successes still come true, while a policy learns on them?

Every few RL steps the present policy imagines a handful of episodes from starts that a simulator
can begin again. Their actions are carried out there, and the outcomes laid side by side, false
successes first: they are what a policy learns to make. When even the lower end of the 95 % Wilson
interval of their share among the imagined successes is above the limit, RL stops. The episodes
in which imagination and truth part are kept as a dataset, true frames and true labels: the next
fine-tuning of the world model learns from them.

Without a simulator, judges take its place: held-out reward heads (those of other world models)
look at the imagined frames, and the same actions are imagined again with other noise, in this
world and in theirs. A success that most of these votes deny counts as false.

Shape letters: B episodes, T actions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from worldloop.config import positive, read_json
from worldloop.engine.policy.base import Policy
from worldloop.engine.rollout import ReplayPolicy, RolloutEngine
from worldloop.engine.sampler import derive_seed
from worldloop.engine.world_model import WorldModel
from worldloop.episodes import EpisodeDataset, EpisodeWriter
from worldloop.errors import UserError
from worldloop.files import atomic_write_text
from worldloop.metrics import Alignment, held_success, outcome_alignment, wilson_interval
from worldloop.rl.children import Children, Dropped
from worldloop.rl.pictures import plain_pair, write_pair
from worldloop.rl.starts import shipped_episodes
from worldloop.rl.true_env import Replay, TrueEnv, record_replay, require_truth
from worldloop.types import Rollout, Starts

Bool = npt.NDArray[np.bool_]
JUDGES = "judges"


@dataclass(frozen=True)
class AlarmConfig:
    """When to look, where the truth is, and what is too much."""

    every: int = 0
    """RL steps between checks, the first one before RL begins; 0: never."""
    episodes: int = 32
    limit: float = 0.3
    """RL stops when the lower 95 % bound of the share of false successes is above this."""
    window: int = 2
    """Checks whose counts are taken together."""
    true: TrueEnv = field(default_factory=lambda: TrueEnv("PushCube-v1"))
    judges: tuple[str, ...] = ()
    """World models whose reward heads judge in place of the simulator; empty: the simulator."""
    again: int = 4
    """Times that judges imagine the same actions once more, each time with other noise."""
    processes: int = 1
    limit_s: float = 300.0
    """Seconds an episode in the simulator may take."""
    videos: int = 6
    """Most episodes of a check that are kept as video, imagined beside true."""

    def __post_init__(self) -> None:
        for name in ("every", "again", "videos"):
            if getattr(self, name) < 0:
                raise UserError(f"alarm.{name} is {getattr(self, name)}; must be at least 0")
        positive(self, "episodes", "window", "processes", where="alarm.")
        if not 0 <= self.limit <= 1:
            raise UserError(f"alarm.limit is {self.limit}; expected 0 .. 1")


@dataclass(frozen=True)
class Check:
    """What one look found."""

    step: int
    counts: Alignment  # of this check
    false_share: float  # of the imagined successes of the window; nan without any
    ci95: tuple[float, float]
    stop: bool
    dropped: int  # episodes that the simulator could not play
    disagreement: float | None  # of judges: mean distance of their votes from unanimity
    folder: Path

    @property
    def row(self) -> dict[str, Any]:
        """For the run's metrics, false successes first."""
        found: dict[str, Any] = {
            "alarm_false_success": self.counts.false_success,
            "alarm_true_success": self.counts.true_success,
            "alarm_false_failure": self.counts.false_failure,
            "alarm_true_failure": self.counts.true_failure,
            "alarm_false_share": None if np.isnan(self.false_share) else self.false_share,
            "alarm_false_share_low": None if np.isnan(self.ci95[0]) else self.ci95[0],
            "alarm_dropped": self.dropped,
        }
        if self.disagreement is not None:
            found["alarm_disagreement"] = self.disagreement
        return found


class Alarm:
    """Looks at a policy at a step. ``folder`` keeps every check; finished ones are read back."""

    def __init__(
        self, config: AlarmConfig, world: WorldModel, policy: Policy, folder: Path,
        *, starts: Starts, dataset: Path | None, horizon: int, world_steps: int, seed: int,
        precision: AbstractContextManager[Any], max_batch: int | None = None,
    ) -> None:  # fmt: skip
        self.config, self.world, self.folder = config, world, folder
        self.engine = RolloutEngine(world, policy, steps=world_steps)
        self.horizon, self.seed, self.precision = horizon, seed, precision
        self.max_batch = max_batch
        self.starts = starts
        where = dataset or shipped_episodes()
        if not config.judges:
            require_truth(config.true, where, horizon)
        self.sim_seeds = EpisodeDataset(where).sim_seeds[: len(starts.instructions)]
        self.known = [i for i, n in enumerate(self.sim_seeds) if n is not None]
        if config.judges:
            self.known = list(range(len(starts.instructions)))
        elif not self.known:
            raise UserError(
                f"{where}: no episode says which simulator seed it began from (info.sim_seed), so "
                "none can be played again; give starts from a simulator, or alarm.judges"
            )
        self.judges = [
            WorldModel.from_pretrained(name, device=world.device) for name in config.judges
        ]

    def due(self, step: int) -> bool:
        """Whether there is a check after this many RL steps."""
        return self.config.every > 0 and step % self.config.every == 0

    def check(self, step: int) -> Check:
        """Imagine, look at the truth, compare; the same for the same policy, step and seed."""
        folder = self.folder / f"{step:06d}"
        if not (folder / "check.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of a killed process
            rows, imagined = self._imagine(step)
            if self.config.judges:
                found = self._judged(step, rows, imagined)
            else:
                found = self._replayed(step, rows, imagined, folder)
            atomic_write_text(folder / "check.json", json.dumps(found, indent=2) + "\n")
        return load_check(folder, self.config)

    def _imagine(self, step: int) -> tuple[list[int], Rollout]:
        rng = np.random.default_rng([self.seed, step, 7])
        count = self.config.episodes
        rows = rng.choice(self.known, count, replace=count > len(self.known)).tolist()
        with self.precision:
            rollout = self.engine.rollout(
                self.starts.select(rows), horizon=self.horizon,
                decode="all" if self.config.videos or self.config.judges else "policy",
                seed=derive_seed(self.seed, step, -2), max_batch=self.max_batch,
            )  # fmt: skip
        return rows, rollout

    # ------------------------------------------------------------ the truth

    def _replayed(
        self, step: int, rows: Sequence[int], imagined: Rollout, folder: Path
    ) -> dict[str, Any]:
        config, held = self.config, self.config.true.held_frames
        replays = [
            Replay(
                derive_seed(self.seed, step, i) % 2**31, int(self.sim_seeds[row] or 0),
                self._padded(imagined.actions[i]), self.world.action_spec,
                {"alarm_step": step, "imagined_success": bool(imagined.success[i])},
            )
            for i, row in enumerate(rows)
        ]  # fmt: skip
        played, parted, videos = [], [], 0
        meta = None
        play = partial(record_replay, config.true)
        with Children(play, config.processes, config.limit_s) as children:
            for i, answer in enumerate(children.map(replays)):
                if isinstance(answer, Dropped):
                    played.append(_row(rows[i], replays[i].sim_seed, imagined.success[i], None))
                    continue
                episode, meta = answer
                success = held_success(episode.reward[: self.horizon], held)
                row = _row(rows[i], replays[i].sim_seed, imagined.success[i], success)
                wrong = success != bool(imagined.success[i])
                if wrong:
                    parted.append(episode)
                # The last places are for episodes that parted.
                if videos < config.videos - (0 if wrong else config.videos // 2):
                    threshold, _ = self.world.config.success_rule(episode.instruction)
                    pair = plain_pair(i, episode, imagined, i, success, threshold)
                    row["video"] = write_pair(pair, folder, self.world.action_spec.control_hz).name
                    videos += 1
                played.append(row)
        if parted and meta is not None:
            EpisodeWriter(folder / "episodes", meta).add(parted)
        return {"step": step, "truth": config.true.env, "episodes": played}

    def _padded(self, actions_TA: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """To the length of the dataset's episodes: the arm stands still after the last action."""
        more = self.config.true.horizon - len(actions_TA)
        if more <= 0:
            return actions_TA
        still = actions_TA[-1:].copy()
        if self.world.action_spec.kind == "delta_pose":
            still[:, :6] = 0
        return np.concatenate([actions_TA, np.repeat(still, more, 0)])

    # ------------------------------------------------------------ judges in its place

    def _judged(self, step: int, rows: Sequence[int], imagined: Rollout) -> dict[str, Any]:
        votes = [head_verdict(judge, imagined) for judge in self.judges]
        replay = ReplayPolicy(imagined.actions, self.world.action_spec)
        worlds = [self.world, *self.judges]
        for n in range(self.config.again):
            engine = RolloutEngine(worlds[n % len(worlds)], replay, steps=self.engine.steps)
            with self.precision:
                again = engine.rollout(
                    self.starts.select(rows), horizon=self.horizon, decode="none",
                    seed=derive_seed(self.seed, step, -3, n), max_batch=self.max_batch,
                )  # fmt: skip
            votes.append(again.success)
        share = np.mean(votes, 0)
        played = [
            {**_row(row, self.sim_seeds[row], imagined.success[i], share[i] >= 0.5),
             "votes": float(share[i])}
            for i, row in enumerate(rows)
        ]  # fmt: skip
        return {"step": step, "truth": JUDGES, "episodes": played}


def _row(start: int, sim_seed: int | None, imagined: Any, true: Any) -> dict[str, Any]:
    """One episode of a check; ``true`` is None where it could not be played."""
    return {
        "start": start, "sim_seed": sim_seed, "imagined": bool(imagined),
        "true": None if true is None else bool(true),
    }  # fmt: skip


@torch.inference_mode()
def head_verdict(judge: WorldModel, imagined: Rollout) -> Bool:
    """Success [B] of imagined frames as another world model's reward head sees them."""
    assert imagined.frames is not None
    out = []
    # One episode in memory at a time.
    for frames, instruction in zip(imagined.frames[:, :, 0], imagined.instructions):
        pixels = torch.from_numpy(frames.copy()).to(judge.device).float() / 127.5 - 1
        latents, _ = judge.autoencoder.encode(pixels.permute(3, 0, 1, 2)[None])
        reward = judge.reward(latents[:, :, 1:])[0].cpu().numpy()
        threshold, held = judge.config.success_rule(instruction)
        out.append(held_success((reward > threshold).astype(np.float32), held))
    return np.array(out)


# ---------------------------------------------------------------- reading checks back


def load_check(folder: Path, config: AlarmConfig) -> Check:
    """A finished check, judged together with those before it in its window."""
    steps = [n for n in check_steps(folder.parent) if n <= int(folder.name)][-config.window :]
    counts = [_counts(read_json(folder.parent / f"{n:06d}/check.json")) for n in steps]
    false = sum(each.false_success for each in counts)
    believed = false + sum(each.true_success for each in counts)
    low, high = wilson_interval(false, believed)
    found = read_json(folder / "check.json")
    votes = [e["votes"] for e in found["episodes"] if "votes" in e]
    return Check(
        step=int(folder.name),
        counts=counts[-1],
        false_share=false / believed if believed else float("nan"),
        ci95=(low, high),
        stop=bool(low > config.limit),
        dropped=sum(e["true"] is None for e in found["episodes"]),
        disagreement=float(np.mean([2 * min(v, 1 - v) for v in votes])) if votes else None,
        folder=folder,
    )


def check_steps(folder: Path) -> list[int]:
    """The steps at which a run's finished checks were made."""
    return sorted(int(path.parent.name) for path in folder.glob("[0-9]*/check.json"))


def _counts(found: dict[str, Any]) -> Alignment:
    played = [e for e in found["episodes"] if e["true"] is not None]
    return outcome_alignment(
        np.array([e["true"] for e in played], bool), np.array([e["imagined"] for e in played], bool)
    )


def last_trusted(folder: Path, config: AlarmConfig) -> int:
    """The last step at which the alarm was silent; 0 where it never was."""
    silent = [n for n in check_steps(folder) if not load_check(folder / f"{n:06d}", config).stop]
    return silent[-1] if silent else 0


def stopped(folder: Path, config: AlarmConfig, step: int) -> Check | None:
    """The check that stopped a run which has come to ``step``, if one did."""
    steps = [n for n in check_steps(folder) if n <= step] if config.every else []
    last = load_check(folder / f"{steps[-1]:06d}", config) if steps else None
    return last if last is not None and last.stop else None
