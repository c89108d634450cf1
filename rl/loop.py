"""`worldloop loop`: the world model and the policy improve each other (paper Figure 3, 4.3).

A round, every stage a function below, every result a record in the ledger (`worldloop.ledger`):

    collect     the best policy so far acts in the true environment
    label       its episodes are told apart: success, near-success, miss
    extend      SANS = the given data + those that fooled earlier rounds + every round's episodes
    fine-tune   the pretrained world model learns from SANS; its success rule is fitted anew
    improve     GRPO inside it; the alarm looks at the truth every few steps
    evaluate    the new policy in the true environment, over fixed unseen start states
    decide      accepted where it succeeds at least as often as the best so far; else rolled back

Round 0 only evaluates the policy that is given. Run it again to resume: finished stages are read
from the ledger, and the interrupted one goes on at its last shard, checkpoint or step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tyro

from worldloop.checkpoint import resolve_pretrained
from worldloop.cli import parse_config
from worldloop.config import config_from_dict, config_to_dict, read_json
from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.files import atomic_write_text, exclusive
from worldloop.ledger import Ledger, Record, code_sha256, path_sha256
from worldloop.rl.loop_report import write_report
from worldloop.rl.round_config import OPERATION, PRESETS, RoundConfig
from worldloop.rl.stages import (
    Made,
    Tally,
    Waiting,
    collect,
    decide,
    evaluate,
    extend,
    fine_tune,
    improve,
    label,
)
from worldloop.rl.true_env import require_truth
from worldloop.track import git_commit


@dataclass(frozen=True)
class Stage:
    """A row of the table: what runs, and what it reads (`Loop.inputs` knows where that lies)."""

    name: str
    run: Callable[..., Made]
    reads: tuple[str, ...]


STAGES = (
    Stage("collect", collect, ("best policy",)),
    Stage("label", label, ("episodes",)),
    Stage("extend", extend, ("data", "fooled", "all episodes")),
    Stage("fine-tune", fine_tune, ("pretrained world", "sans", "episodes")),
    Stage("improve", improve, ("start policy", "world", "starts", "judges")),
    Stage("evaluate", evaluate, ("policy",)),
    Stage("decide", decide, ("best evaluation", "evaluation")),
)
ROUND_0 = (Stage("evaluate", evaluate, ("base policy",)),)


def stages_of(r: int) -> tuple[Stage, ...]:
    """The stages of a round."""
    return STAGES if r else ROUND_0


# ---------------------------------------------------------------- the loop


class Loop:
    """Rounds in a folder. ``config`` None: that of the folder's ledger.

    ``accept_changes`` lets a loop go on with another configuration or other code than its records
    were made with; without it `run` raises UserError and says what is unlike.
    """

    def __init__(
        self, folder: Path | str, config: RoundConfig | None = None, *,
        accept_changes: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.accept_changes = Path(folder), accept_changes
        self._settings = self.folder / "loop.json"
        if config is None:
            if not self._settings.is_file():
                raise UserError(f"{folder}: holds no loop (loop.json is missing); begin one there")
            config = config_from_dict(
                RoundConfig, read_json(self._settings)["config"], str(self._settings)
            )
        self.config = config
        self.ledger = Ledger(self.folder)

    # ------------------------------------------------------------ running

    def run(self, rounds: int | None = None) -> Record | None:
        """Do what is left of rounds 0 .. ``rounds`` (of the rounds planned before, without it).

        Returns the last round's decision, None after round 0.

        Raises UserError: a ledger that was changed or belongs to other code, data or settings,
        another process in the folder, a stage that failed. Nothing finished is lost.
        """
        rounds = self.planned if rounds is None else rounds
        if rounds < 0:
            raise UserError(f"rounds is {rounds}; expected 0 or more")
        with exclusive(self.folder):
            self.ledger = Ledger(self.folder)
            self._open(rounds)
            for r in range(rounds + 1):
                for stage in stages_of(r):
                    if self.ledger.find(r, stage.name) is None:
                        self._run(stage, r)
                if r and not (self.ledger.round_folder(r) / "report.html").is_file():
                    write_report(self.ledger, r)
        return self.ledger.find(rounds, "decide")

    @property
    def planned(self) -> int:
        """Rounds that were asked for so far."""
        return int(read_json(self._settings)["rounds"]) if self._settings.is_file() else 0

    def _open(self, rounds: int) -> None:
        """Write loop.json, or compare it and every record with what runs now."""
        self._require_data()
        base = {
            "policy": path_sha256(self._resolved(self.config.policy)),
            "world": path_sha256(self._resolved(self.config.world)),
            **{str(path): path_sha256(path) for path in self.config.data},
        }
        if self._settings.is_file():
            old = read_json(self._settings)
            if not self.accept_changes:
                self._require_same(old)
            for name, sha256 in base.items():
                if old["base"].get(name, sha256) != sha256:
                    raise UserError(
                        f"{name}: is not what this loop began with (its hash is unlike); restore "
                        "it, or begin a loop in another folder"
                    )
        elif any(self.folder.glob("round-*")):
            raise UserError(f"{self._settings}: is missing though there are rounds; restore it")
        values = {
            "format": 1, "rounds": max(rounds, self.planned), "base": base,
            "config": config_to_dict(self.config),
        }  # fmt: skip
        atomic_write_text(self._settings, json.dumps(values, indent=2) + "\n")

    def _require_data(self) -> None:
        """Refuse now what collected episodes could not be merged with, or seen by evaluation."""
        config, true = self.config, self.config.true
        if config.recorded or not true.simulated:
            return
        seen = range(config.evaluation_seed, config.evaluation_seed + config.evaluations)
        for path in config.data:
            require_truth(true, path, config.grpo.horizon)
            dataset = EpisodeDataset(path)
            there = dataset.meta.horizon
            if true.horizon != there:
                raise UserError(f"{path}: its horizon is {there}; give true.horizon {there}")
            if any(seed in seen for seed in dataset.sim_seeds if seed is not None):
                raise UserError(
                    f"{path}: holds start states of the evaluation (seeds {seen.start} to "
                    f"{seen.stop - 1}); give another evaluation_seed"
                )

    def _require_same(self, old: dict[str, Any]) -> None:
        remedy = "begin a loop in another folder, or go on all the same with --accept-changes"
        now = config_to_dict(self.config)
        unlike = [k for k in now if k not in OPERATION and now[k] != old["config"].get(k)]
        if unlike:
            name = unlike[0]
            raise UserError(
                f"{self._settings}: {name} is {old['config'].get(name)!r} there, {now[name]!r} "
                f"here; {remedy}"
            )
        for record in self.ledger.records:
            where = self.ledger.path(record.round, record.stage)
            if record.inputs["config"] != self.config.sha256:
                raise UserError(f"{where}: was made with another configuration; {remedy}")
            if record.inputs["code"] != code_sha256():
                raise UserError(
                    f"{where}: was made by other code (commit {record.made['commit']}); check "
                    f"that out, or {remedy}"
                )

    def _run(self, stage: Stage, r: int) -> None:
        at = self.ledger.round_folder(r)
        paths = [path for name in stage.reads for path in self.inputs(name, r)]
        inputs = {"config": self.config.sha256, "code": code_sha256()}
        for i, path in enumerate(paths):
            inputs[f"path {i}"] = path_sha256(path)
        attempts = Tally(at / "jobs/attempts.json")
        attempts.add(stage.name, attempts.rows.get(stage.name, 0) + 1)
        print(f"round {r}: {stage.name}", flush=True)
        begun = time.monotonic()
        try:
            made = stage.run(self.config, at, r, *paths)
        except Waiting:
            raise
        except UserError as error:
            raise UserError(f"round {r}, {stage.name}: {error}") from error
        self.ledger.add(
            r, stage.name, inputs=inputs, outputs=made.outputs, facts=made.facts,
            made={
                "seconds": round(time.monotonic() - begun, 1),
                "attempts": attempts.rows[stage.name],
                "commit": git_commit(), "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            },
        )  # fmt: skip

    # ------------------------------------------------------------ what stages read

    def inputs(self, name: str, r: int) -> list[Path]:
        """The paths that a name in `STAGES` stands for in round ``r``; outputs are verified."""
        config, made, best = self.config, self.ledger.output, self.best(r)
        if name == "start policy":
            name = "base policy" if config.start == "base" else "best policy"
        if name == "base policy" or (name == "best policy" and best == 0):
            return [self._resolved(config.policy)]
        if name == "best policy":
            return [made(best, "improve", "policy")]
        if name == "pretrained world":
            return [self._resolved(config.world)]
        if name == "data":
            return list(config.data)
        if name == "all episodes":
            return [made(q, "collect", "episodes") for q in range(1, r + 1)]
        if name == "fooled":
            return self._fooled(r)
        if name == "judges":
            return self.earlier_worlds(r) if config.recorded else []
        if name == "best evaluation":
            return [made(best, "evaluate", "evaluation")]
        if name == "starts" and not config.starts:
            name = "sans"
        stage, output = {
            "starts": ("collect", "starts"),
            "episodes": ("collect", "episodes"), "sans": ("extend", "sans"),
            "world": ("fine-tune", "world"), "policy": ("improve", "policy"),
            "evaluation": ("evaluate", "evaluation"),
        }[name]  # fmt: skip
        return [made(r, stage, output)]

    def _fooled(self, r: int) -> list[Path]:
        """Episodes in which imagination and truth parted, of the alarms of earlier rounds."""
        found = []
        for q in range(1, r):
            record = self.ledger.find(q, "improve")
            names = record.outputs if record else {}
            found += [self.ledger.output(q, "improve", n) for n in names if n.startswith("fooled")]
        return found

    def best(self, r: int) -> int:
        """The round whose policy is the best before round ``r``: the last accepted one, or 0."""
        accepted = [
            record.round for record in self.ledger.records
            if record.stage == "decide" and record.round < r and record.facts["accepted"]
        ]  # fmt: skip
        return accepted[-1] if accepted else 0

    def earlier_worlds(self, r: int) -> list[Path]:
        """The pretrained world model and those of earlier rounds: they saw other data."""
        earlier = [self.ledger.output(q, "fine-tune", "world") for q in range(1, r)]
        return [self._resolved(self.config.world), *earlier]

    @staticmethod
    def _resolved(name: str) -> Path:
        return Path(resolve_pretrained(name))

    # ------------------------------------------------------------ looking at it

    def status(self) -> str:
        """A table of rounds: success with its interval, what was decided, time, frames, next."""
        lines = [f"{'round':>5}  {'success (95 %)':<26}{'decision':<13}{'hours':>6}  "
                 f"{'true frames':>11}  {'imagined':>11}"]  # fmt: skip
        following = None
        for r in range(self.planned + 1):
            records = [record for record in self.ledger.records if record.round == r]
            missing = [s.name for s in stages_of(r) if self.ledger.find(r, s.name) is None]
            if missing and following is None:
                following = (r, missing[0])
            if records:
                lines.append(self._row(r, records))
        if following is None:
            lines.append("next: nothing, the planned rounds are done")
        else:
            lines.append(f"next: round {following[0]}, {following[1]}")
        return "\n".join(lines)

    def _row(self, r: int, records: list[Record]) -> str:
        facts = {record.stage: record.facts for record in records}
        success = "-"
        if "evaluate" in facts:
            found = facts["evaluate"]
            low, high = found["ci95"]
            success = f"{found['success']:.1%} ({low:.1%} .. {high:.1%})"
        decision = "base" if r == 0 else "open"
        if "decide" in facts:
            decision = "accepted" if facts["decide"]["accepted"] else "rolled back"
        if facts.get("improve", {}).get("stopped_by_alarm") is not None:
            decision += " (alarm)"
        hours = sum(record.made["seconds"] for record in records) / 3600
        frames = [sum(f.get(f"{kind}_frames", 0) for f in facts.values())
                  for kind in ("true", "imagined")]  # fmt: skip
        return (f"{r:>5}  {success:<26}{decision:<13}{hours:>6.2f}  {frames[0]:>11,}  "
                f"{frames[1]:>11,}")  # fmt: skip


# ---------------------------------------------------------------- command line


@dataclass(frozen=True)
class LoopConfig(RoundConfig):
    """Run the closed loop; run it again to resume."""

    out: Path = Path("runs/loop")
    rounds: int = 2
    accept_changes: bool = False
    """Go on with other settings or other code than the ledger's records were made with."""

    @property
    def round(self) -> RoundConfig:
        return RoundConfig(**_values(self))


@dataclass(frozen=True)
class ResumeConfig:
    """Go on with a loop as its ledger says."""

    out: Path
    rounds: int | None = None
    """Rounds in all; without it, those that were planned."""
    resume: bool = True
    accept_changes: bool = False


@dataclass(frozen=True)
class StatusConfig:
    """Show the rounds of a loop and what is next."""

    out: tyro.conf.Positional[Path]


def main(argv: list[str]) -> int:
    """Run from the command line; 75 where a round waits for a human."""
    if "--resume" in argv:
        again = parse_config(ResumeConfig, argv, "worldloop loop --resume")
        loop, rounds = Loop(again.out, accept_changes=again.accept_changes), again.rounds
    else:
        config = parse_config(PRESETS_OF_LOOPS, argv, "worldloop loop")
        loop = Loop(config.out, config.round, accept_changes=config.accept_changes)
        rounds = config.rounds
    try:
        loop.run(rounds)
    except Waiting as wait:
        print(f"waiting: {wait}")
        return 75
    print(loop.status())
    return 0


def status_main(argv: list[str]) -> int:
    """Show from the command line."""
    config = parse_config(StatusConfig, argv, "worldloop loop status")
    print(Loop(config.out).status())
    return 0


def _values(config: RoundConfig) -> dict[str, Any]:
    return {each.name: getattr(config, each.name) for each in fields(RoundConfig)}


PRESETS_OF_LOOPS = {
    name: (text, LoopConfig(**_values(config), out=Path(f"runs/loop-{name}")))
    for name, (text, config) in PRESETS.items()
}
