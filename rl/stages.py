"""The stages of a round of the closed loop, each a function from paths to what it made.

They take the loop's config, the round's folder and number, and the paths that the table in
`worldloop.rl.loop` names. Run again after a kill, each goes on where it was: at its last shard of
episodes, batch of results, checkpoint or RL step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from worldloop.calibration import RewardFit, crossfit_alignment, fit_reward
from worldloop.config import config_to_dict, read_json
from worldloop.engine.policy.vla import VLAPolicy
from worldloop.engine.precision import autocast, device_of
from worldloop.engine.rollout import RolloutEngine
from worldloop.engine.world_config import Calibration, write_world_config
from worldloop.engine.world_model import WorldModel
from worldloop.episodes import EpisodeDataset, EpisodeWriter
from worldloop.errors import UserError
from worldloop.files import atomic_write_text
from worldloop.labels import read_labels
from worldloop.ledger import path_sha256, text_sha256
from worldloop.merge import merge_datasets
from worldloop.metrics import held_success, outcome_alignment, wilson_interval
from worldloop.rl.alarm import check_steps, load_check
from worldloop.rl.children import Children, Dropped
from worldloop.rl.collect import count_episodes
from worldloop.rl.grpo_config import GRPOConfig
from worldloop.rl.held_out import imagine, load_held_out
from worldloop.rl.jobs import run_job
from worldloop.rl.round_config import RoundConfig
from worldloop.rl.starts import load_starts
from worldloop.rl.true_env import Evaluating, Recorded, measure, record_policy, record_start
from worldloop.track import Progress, read_rows

SHARD = 8  # episodes or results between two writes
GREEDY = 160  # starts at most, to compare imagined with true success from
MOVED = 0.01  # metres: a failure that moved its object this far was a near-success


class Waiting(UserError):
    """A round without a simulator needs something from a human before it can go on."""


@dataclass(frozen=True)
class Made:
    """What a stage made: outputs go into the ledger by their hashes, facts as they are."""

    outputs: dict[str, Path]
    facts: dict[str, Any]


class Tally:
    """A small JSON object on disk that a stage adds to: results that a kill must not lose."""

    def __init__(self, path: Path, every: int = 1) -> None:
        self.path, self.every, self._unsaved = path, every, 0
        self.rows: dict[str, Any] = read_json(path) if path.is_file() else {}

    def add(self, name: str, value: Any) -> None:
        self.rows[name] = value
        self._unsaved += 1
        if self._unsaved >= self.every:
            self.save()

    def save(self) -> None:
        atomic_write_text(self.path, json.dumps(self.rows) + "\n")
        self._unsaved = 0


def collect(config: RoundConfig, at: Path, r: int, actor: Path) -> Made:
    """Episodes of the acting policy in the true environment, one for each seed of the round."""
    out = at / "collect/episodes"
    if config.recorded:
        return _handed_in(out, r)
    seeds = _seeds(config.first_seed, config.episodes, r)
    # As it will sample in RL: a world model has to know those paths.
    temperature, coherence = config.grpo.temperature, config.grpo.coherence
    name = path_sha256(actor)[:16]
    record = {"policy": name, "temperature": temperature, "coherence": coherence}
    act = partial(
        record_policy, config.true, str(actor),
        temperature=temperature, coherence=coherence, record=record,
    )  # fmt: skip
    outputs, dropped = {"episodes": out}, _record(config, out, seeds, act)
    if config.starts:
        outputs["starts"] = at / "collect/starts"
        seeds = _seeds(config.first_start, config.starts, r)
        dropped += _record(config, outputs["starts"], seeds, partial(record_start, config.true))
    return Made(outputs, {
        "episodes": len(EpisodeDataset(out)), "dropped": dropped,
        "true_frames": sum(EpisodeDataset(path).info["total_frames"] for path in outputs.values()),
    })  # fmt: skip


def _seeds(first: int, count: int, r: int) -> list[int]:
    """Those of round ``r``, where every round takes ``count``."""
    return list(range(first + (r - 1) * count, first + r * count))


def _record(
    config: RoundConfig, out: Path, seeds: list[int], act: Callable[[int], Recorded]
) -> int:
    """Episodes of these seeds, those that are not there yet; how many were dropped."""
    dropped = Tally(out.with_name(f"dropped-{out.name}.json"))
    there = set(EpisodeDataset(out).seeds) if count_episodes(out) else set()
    left = [seed for seed in seeds if seed not in there and str(seed) not in dropped.rows]
    shard: list[Any] = []
    with (
        Progress(len(seeds), out.name, unit="ep", initial=len(seeds) - len(left)) as progress,
        Children(act, config.processes, config.limit_s) as children,
    ):
        for i, answer in enumerate(children.map(left)):
            if isinstance(answer, Dropped):
                dropped.add(str(answer.item), answer.reason)
            else:
                episode, meta = answer
                shard.append(episode)
            if shard and (len(shard) == SHARD or i + 1 == len(left)):
                EpisodeWriter(out, meta).add(shard)
                shard = []
            progress.update()
    if not count_episodes(out):
        raise UserError(f"{out}: every episode was dropped; see {dropped.path}")
    return len(dropped.rows)


def _handed_in(out: Path, r: int) -> Made:
    if not count_episodes(out):
        raise Waiting(
            f"round {r} waits for recorded episodes of its policy: `worldloop data import ... "
            f"--out {out}`, then run the loop again"
        )
    dataset = EpisodeDataset(out)
    frames = dataset.info["total_frames"]
    return Made({"episodes": out}, {"episodes": len(dataset), "dropped": 0, "true_frames": frames})


def label(config: RoundConfig, at: Path, r: int, episodes: Path) -> Made:
    """Tell episodes apart: success, near-success (failed, but moved its object), miss."""
    rows: list[dict[str, Any]] = []
    for episode in EpisodeDataset(episodes).stream(frames=False):
        kind = "success" if episode.success else "failure"
        if not episode.success and episode.objects is not None:
            moved = np.linalg.norm(episode.objects[-1, 0, :3] - episode.objects[0, 0, :3])
            kind = "near-success" if moved > MOVED else "miss"
        rows.append({"seed": episode.seed, "label": kind})
    path = at / "label/labels.json"
    atomic_write_text(path, json.dumps(rows, indent=2) + "\n")
    kinds = [row["label"] for row in rows]
    return Made({"labels": path}, {kind: kinds.count(kind) for kind in sorted(set(kinds))})


def extend(config: RoundConfig, at: Path, r: int, *sources: Path) -> Made:
    """All true episodes there are, as one dataset."""
    out = at / "extend/sans"
    if not out.exists():
        merge_datasets(sources, out)
    dataset = EpisodeDataset(out)
    return Made({"sans": out}, {"episodes": len(dataset), "successes": int(dataset.success.sum())})


def fine_tune(
    config: RoundConfig, at: Path, r: int, base: Path, sans: Path, episodes: Path
) -> Made:
    """The pretrained world model on SANS; the trainer resumes by itself.

    What counts as a success is fitted anew, on this round's episodes: the policy's own, which are
    what it will be asked about. The general rule stays where the fit is no better.
    """
    out = at / "fine-tune"
    options = config_to_dict(config.fine_tune)
    processes = options.pop("processes")
    argv = ["train", "world-model", "--data", sans, "--autoencoder", base, "--init", base,
            "--out", out, "--sample-every", 0, "--seed", config.seed]  # fmt: skip
    for name, value in options.items():
        argv += ["--" + name.replace("_", "-"), value]
    run_job(argv, at / "jobs/fine-tune.log", processes)
    # Frames and latents as arrays: a gigabyte for 400 episodes, which no later stage reads.
    shutil.rmtree(sans / ".cache", ignore_errors=True)
    rows = read_rows(out / "metrics.jsonl")
    best = config.fine_tune.keep == "best"
    kept = min(rows, key=lambda row: row["held_out_loss"]) if best else rows[-1]
    facts = {k: v for k, v in kept.items() if k.startswith("held_out_")}
    curve = [[row["step"], row["held_out_flow"], row["held_out_reward"]] for row in rows]
    rule = calibrate(config, out / "model", episodes)
    facts |= {"kept_step": kept["step"], **rule, "curve": curve}
    return Made({"world": out / "model"}, facts)


def calibrate(config: RoundConfig, model: Path, episodes: Path) -> dict[str, Any]:
    """Fit the world model's success rule on episodes of a policy, and write it there.

    Where all of them end alike, or a fit on one half tells the other half no better than the
    model's general rule, the rule stays as it is. Returns both agreements, and the fit where it
    was taken; the same when it is done again.
    """
    grpo = config.grpo
    world = WorldModel.from_pretrained(model, device=grpo.device)
    real = load_held_out(episodes, None, world, least=1, frames=False)
    real = real.first(len(real.episodes), grpo.horizon)
    true = np.array([held_success(e.reward, config.true.held_frames) for e in real.episodes])
    with autocast(device_of(grpo.device), grpo.precision):
        rollout, _ = imagine(
            world, real, real.actions, grpo.world_steps, config.seed, max_batch=grpo.max_batch,
            decode="none",
        )  # fmt: skip
    general = RewardFit(world.config.reward_threshold, world.config.held_frames, 0.0)
    before = outcome_alignment(true, general.success(rollout.reward))
    facts: dict[str, Any] = {"agreement_general_rule": before.rate}
    if true.any() and not true.all():
        after = crossfit_alignment(rollout.reward, true, config.seed) or before
        facts["agreement_fitted_rule"] = after.rate
        if after.rate > before.rate:
            fit = fit_reward(rollout.reward, true)
            rule = Calibration(fit.threshold, fit.held_frames, len(true), after.rate)
            said = real.episodes[0].instruction
            write_world_config(model, world.config.with_rule(real.env_id, said, rule))
            facts |= {"threshold": fit.threshold, "reward_held_frames": fit.held_frames}
    return facts


def improve(
    config: RoundConfig, at: Path, r: int, start: Path, world: Path, starts: Path, *judges: Path
) -> Made:
    """GRPO inside the world model, watched by the alarm; no simulator step inside RL.

    starts: the dataset whose first frames episodes begin from. judges: world models that the alarm
    asks where there is no simulator.
    """
    out = at / "improve"
    alarm = replace(
        config.grpo.alarm, true=config.true, processes=config.processes, limit_s=config.limit_s
    )
    if judges and not alarm.judges:
        alarm = replace(alarm, judges=tuple(map(str, judges)))
    grpo = replace(
        config.grpo, out=out, policy=str(start), world=str(world), starts=starts,
        seed=1000 * config.seed + r, alarm=alarm,
    )  # fmt: skip
    settings = at / "jobs/grpo.json"
    atomic_write_text(settings, json.dumps(config_to_dict(grpo), indent=2) + "\n")
    run_job(["grpo", "--config", settings], at / "jobs/improve.log")
    done = read_json(out / "done.json")
    rows = read_rows(out / "metrics.jsonl")
    checks = [load_check(out / f"alarm/{n:06d}", alarm) for n in check_steps(out / "alarm")]
    outputs = {"policy": out / f"policies/{done['steps']:06d}"}
    greedy = {"before": imagined_success(grpo, start),
              "after": imagined_success(grpo, outputs["policy"])}  # fmt: skip
    for check in checks:
        if count_episodes(check.folder / "episodes"):
            outputs[f"fooled-{check.step:06d}"] = check.folder / "episodes"
    return Made(outputs, {
        "steps": done["steps"], "stopped_by_alarm": done["alarm"],
        "alarm": [{"step": check.step, **check.row} for check in checks],
        "curve": [[row["step"], row["imagined_success"]] for row in rows
                  if "imagined_success" in row],
        "imagined_greedy": greedy,
        "imagined_frames": sum(row.get("frames", 0) for row in rows),
        "true_frames": config.true.horizon * sum(c.counts.count for c in checks
                                                 if not alarm.judges),
    })  # fmt: skip


def imagined_success(grpo: GRPOConfig, policy: Path) -> dict[str, Any]:
    """Greedy success of a policy inside the world model that GRPO ran in, with its 95 % interval.

    Beside the true evaluation it shows what RL gained by flattery alone: the alarm's replays are
    too few to see ten points, and they sample.
    """
    world = WorldModel.from_pretrained(grpo.world, device=grpo.device)
    actor = VLAPolicy.from_pretrained(policy, temperature=0.0, device=grpo.device)
    with autocast(device_of(grpo.device), grpo.precision):
        rollout = RolloutEngine(world, actor, steps=grpo.world_steps).rollout(
            load_starts(grpo.starts, world, GREEDY), horizon=grpo.horizon, group_size=1,
            seed=grpo.seed, max_batch=grpo.max_batch, stop_on_success=True,
        )  # fmt: skip
    count, wins = len(rollout.success), int(rollout.success.sum())
    interval = wilson_interval(wins, count)
    return {"success": wins / count, "ci95": list(interval), "episodes": count}


def evaluate(config: RoundConfig, at: Path, r: int, policy: Path) -> Made:
    """Greedy success over the same unseen start states in every round."""
    out = at / "evaluate/evaluation.json"
    if config.recorded:
        found = _entered(at, r, policy)
    else:
        found = _measured(config, at, policy)
    success = [bool(flag) for flag in found["success"]]
    low, high = wilson_interval(sum(success), len(success))
    atomic_write_text(out, json.dumps(found, indent=2) + "\n")
    return Made({"evaluation": out}, {
        "success": sum(success) / len(success), "ci95": [low, high], "successes": sum(success),
        "episodes": len(success), "dropped": found["dropped"], "true_frames": found["frames"],
    })  # fmt: skip


def _entered(at: Path, r: int, policy: Path) -> dict[str, Any]:
    """Outcomes that a human wrote down."""
    paths = [path for path in (at / "evaluate/outcomes.csv", at / "evaluate/outcomes.json")
             if path.is_file()]  # fmt: skip
    if not paths:
        (at / "evaluate").mkdir(parents=True, exist_ok=True)
        raise Waiting(
            f"round {r} waits for outcomes: play {policy} on the robot and write a line for each "
            f"episode into {at}/evaluate/outcomes.csv (columns episode, success), then run the "
            "loop again"
        )
    labels = read_labels(paths[0])
    success = [label.success for label in labels.values()]
    return {"episodes": list(labels), "success": success, "frames": 0, "dropped": 0}


def _measured(config: RoundConfig, at: Path, policy: Path) -> dict[str, Any]:
    setting = Evaluating(str(policy), config.evaluation_seed, config.seed, config.grpo.horizon)
    made_by = text_sha256([config_to_dict(setting), config_to_dict(config.true)])[:8]
    results = Tally(at / f"evaluate/results-{made_by}.json", every=SHARD)
    count = config.evaluations
    left = [i for i in range(count) if str(i) not in results.rows]
    play = partial(measure, config.true, setting)
    with (
        Progress(count, "evaluate", unit="ep", initial=count - len(left)) as progress,
        Children(play, config.processes, config.limit_s) as children,
    ):
        for number, answer in zip(left, children.map(left), strict=True):
            row: dict[str, Any] = {"dropped": True}
            if not isinstance(answer, Dropped):
                row = {"start": answer.starts[0], "success": bool(answer.success[0]),
                       "steps": int(answer.steps[0]), "frames": answer.frames}  # fmt: skip
            results.add(str(number), row)
            progress.update()
    results.save()
    rows = [results.rows[str(i)] for i in range(count)]
    played = [row for row in rows if "dropped" not in row]
    return {
        "starts": [row["start"] for row in played],
        "success": [row["success"] for row in played],
        "steps": [row["steps"] for row in played],
        "frames": sum(row["frames"] for row in played),
        "dropped": len(rows) - len(played),
    }


def decide(config: RoundConfig, at: Path, r: int, best: Path, new: Path) -> Made:
    """Accept the round's policy where it succeeds at least as often as the best so far."""
    before, after = (np.mean(read_json(path)["success"]) for path in (best, new))
    return Made({}, {"accepted": bool(after >= before), "best_before": float(before),
                     "success": float(after)})  # fmt: skip
