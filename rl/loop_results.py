"""`worldloop loop report`: true success by round over tasks and seeds, and what it took.

Reads finished loops, one folder a task and seed (or reports of loops elsewhere), and writes
loop.json, the curve of true success, and a sheet of episodes that fooled the world model of
round 1, as the last round's imagines them (the paper's section 4.3 and Figure 3).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from worldloop.cli import parse_config
from worldloop.config import read_json
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.files import atomic_path, atomic_write_text
from worldloop.metrics import held_success, pooled_success
from worldloop.rl.grpo_report import cell
from worldloop.rl.held_out import HeldOut, imagine, load_held_out
from worldloop.rl.loop import Loop
from worldloop.rl.pictures import Pair, contact_sheet, plain_pair
from worldloop.track import git_commit
from worldloop.types import Rollout


@dataclass(frozen=True)
class LoopReportConfig:
    """Put finished loops together: true success by round, cost, what fooled round 1."""

    loops: tuple[Path, ...] = ()
    """Output folders of `worldloop loop`, one a task and seed."""
    reports: tuple[Path, ...] = ()
    """loop.json of loops that lie elsewhere, by this command: their seeds and cost are added."""
    rounds: int = 2
    """The last round that is reported."""
    out: Path = Path("runs/loop-report/loop.json")
    figure: Path = Path("runs/loop-report/loop-success.png")
    sheet: Path = Path("runs/loop-report/loop-fooled.jpg")
    pictures: int = 4
    """Most episodes on the sheet."""
    threads: int = 1
    command: str = ""
    """The commands that made the loops, for the record."""


# ---------------------------------------------------------------- success and cost


def success_by_round(loop: Loop, rounds: int) -> dict[str, Any]:
    """One loop's row of loop.json. Raises UserError where a round is not finished."""
    found: dict[str, Any] = {
        "seed": loop.config.seed,
        "commit": loop.ledger.records[-1].made["commit"],
    }
    for r in range(rounds + 1):
        record = loop.ledger.find(r, "evaluate")
        if record is None:
            raise UserError(f"{loop.folder}: round {r} is not evaluated yet; run the loop again")
        facts = record.facts
        name = f"round{r}" if r else "base"
        found[name] = {key: facts[key] for key in ("success", "ci95", "successes", "episodes")}
        decision, improve = loop.ledger.find(r, "decide"), loop.ledger.find(r, "improve")
        if decision is not None:
            found[name]["accepted"] = decision.facts["accepted"]
        if improve is not None:
            found[name]["steps"] = improve.facts["steps"]
            found[name]["stopped_by_alarm"] = improve.facts["stopped_by_alarm"]
            found[name]["alarm"] = improve.facts["alarm"]
            if "imagined_greedy" in improve.facts:  # older ledgers have none
                found[name]["imagined_greedy"] = improve.facts["imagined_greedy"]
    return found


def cost(loops: Sequence[Loop], rounds: int) -> dict[str, Any]:
    """Frames, true and imagined, and process-hours by stage, of all loops together."""
    hours: dict[str, float] = defaultdict(float)
    true: dict[str, int] = defaultdict(int)
    imagined = 0
    for loop in loops:
        for record in loop.ledger.records:
            if record.round <= rounds:
                hours[record.stage] += record.made["seconds"] / 3600
                true[record.stage] += record.facts.get("true_frames", 0)
                imagined += record.facts.get("imagined_frames", 0)
    return {
        "frames": {
            "imagined": imagined, "true_collected": true["collect"],
            "true_alarm": true["improve"], "true_evaluated": true["evaluate"],
        },
        "hours": sum(hours.values()), "hours_by_stage": dict(hours),
    }  # fmt: skip


def total(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sum of what `cost` returns."""
    summed: dict[str, Any] = {"hours": sum(each["hours"] for each in costs)}
    for part in ("frames", "hours_by_stage"):
        names = {name: None for each in costs for name in each[part]}
        summed[part] = {n: sum(each[part].get(n, 0) for each in costs) for n in names}
    return summed


REPORTED = ("evaluation_seed", "horizon", "frames", "hours", "hours_by_stage", "tasks")


def load_report(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """A loop.json with the rounds ``names``; UserError where it is none."""
    document = read_json(path)
    whole = all(key in document for key in REPORTED) and all(
        "fooled_round1" in task and all(n in seed for seed in task.get("seeds", ()) for n in names)
        for task in document["tasks"].values()
    )
    if not whole:
        last = len(names) - 1
        raise UserError(f"{path}: is no report of `worldloop loop report` over {last} rounds")
    return document


# ---------------------------------------------------------------- what fooled round 1


def fooling(loop: Loop, world: WorldModel) -> HeldOut | None:
    """Episodes of round 1's alarm that were imagined as successes and failed in truth."""
    record, held = loop.ledger.find(1, "improve"), loop.config.true.held_frames
    assert record is not None
    found: HeldOut | None = None
    for name in sorted(n for n in record.outputs if n.startswith("fooled-")):
        folder = loop.ledger.output(1, "improve", name)
        each = load_held_out(folder, None, world, least=1)
        each = each.first(len(each.episodes), loop.config.grpo.horizon)
        rows = [i for i, e in enumerate(each.episodes)
                if e.info["imagined_success"] and not held_success(e.reward, held)]  # fmt: skip
        episodes = [*(found.episodes if found else []), *each.pick(rows).episodes]
        found = replace(each, episodes=episodes)
    return found if found and found.episodes else None


def worlds_of(loop: Loop, rounds: int) -> dict[str, Path]:
    """The pretrained world model and those of the rounds."""
    return {
        "pretrained": loop.inputs("pretrained world", 1)[0],
        **{f"round{r}": loop.ledger.output(r, "fine-tune", "world") for r in range(1, rounds + 1)},
    }


def reimagine(loop: Loop, rounds: int) -> tuple[HeldOut | None, dict[str, Rollout]]:
    """The episodes that fooled round 1, imagined once more by each world model of the loop."""
    rollouts: dict[str, Rollout] = {}
    episodes: HeldOut | None = None
    for name, path in worlds_of(loop, rounds).items():
        world = WorldModel.from_pretrained(path)
        episodes = episodes or fooling(loop, world)
        if episodes is None:
            break
        steps, seed = loop.config.grpo.world_steps, loop.config.seed
        rollouts[name], _ = imagine(world, episodes, episodes.actions, steps, seed)
    return episodes, rollouts


# ---------------------------------------------------------------- pictures


def draw(tasks: dict[str, Any], rounds: int, path: Path) -> None:
    """True success by round, a panel a task, a thin line a seed, the pooled one with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ["base", *(f"round{r}" for r in range(1, rounds + 1))]
    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(4.6 * len(tasks), 3.6), sharey=True, squeeze=False
    )
    for panel, (task, found) in zip(axes[0], tasks.items()):
        for seed in found["seeds"]:
            each = [100 * seed[name]["success"] for name in names]
            panel.plot(each, color="#9aa4b1", lw=1, marker=".", label=f"seed {seed['seed']}")
        rates = np.array([found["pooled"][name]["success"] for name in names])
        ends: npt.NDArray[np.float64] = np.array([found["pooled"][name]["ci95"] for name in names])
        panel.errorbar(range(len(names)), 100 * rates, 100 * np.abs(ends.T - rates),
                       color="#25639b", lw=2, capsize=4, marker="o", label="all, 95 %")  # fmt: skip
        panel.set_title(task, fontsize=10)
        panel.set_xticks(range(len(names)), ["base", *(f"round {r}" for r in range(1, rounds + 1))])
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylim(0, 100)
    axes[0, 0].set_ylabel("true success, %")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


# ---------------------------------------------------------------- all of it


def summarise(config: LoopReportConfig) -> tuple[dict[str, Any], list[Pair]]:
    """The document of loop.json, and the rows of the sheet."""
    if not config.loops and not config.reports:
        raise UserError("loops: give at least one output folder of `worldloop loop`")
    loops = [Loop(folder) for folder in config.loops]
    last = f"round{config.rounds}"
    names = ["base", *(f"round{r}" for r in range(1, config.rounds + 1))]
    tasks: dict[str, Any] = {}
    rows: list[Pair] = []
    for loop in loops:
        task = tasks.setdefault(loop.config.true.env, {"seeds": [], "fooled_round1": []})
        task["seeds"].append(success_by_round(loop, config.rounds))
        episodes, rollouts = reimagine(loop, config.rounds)
        if episodes is None:
            continue
        task["fooled_round1"].append({
            "seed": loop.config.seed, "episodes": len(episodes.episodes),
            "imagined_success": {k: int(r.success.sum()) for k, r in rollouts.items()},
        })  # fmt: skip
        healed = np.flatnonzero(rollouts["round1"].success & ~rollouts[last].success)
        each = -(-config.pictures // len(loops))
        for i in healed[:each].tolist():
            for name in ("round1", last):
                said = f"{name[:5]} {name[5:]}, seed {loop.config.seed}"
                episode = episodes.episodes[i]
                rows.append(
                    plain_pair(i, episode, rollouts[name], i, success=False, instruction=said)
                )
    measured = [
        {"evaluation_seed": loop.config.evaluation_seed, "horizon": loop.config.grpo.horizon}
        for loop in loops
    ]
    costs = [cost(loops, config.rounds)]
    for path in config.reports:
        other = load_report(path, names)
        measured.append({key: other[key] for key in ("evaluation_seed", "horizon")})
        costs.append({key: other[key] for key in ("frames", "hours", "hours_by_stage")})
        for name, found in other["tasks"].items():
            task = tasks.setdefault(name, {"seeds": [], "fooled_round1": []})
            task["seeds"] += found["seeds"]
            task["fooled_round1"] += found["fooled_round1"]
    if unlike := [one for one in measured if one != measured[0]]:
        raise UserError(
            f"loops were measured differently ({measured[0]} and {unlike[0]}); report them apart"
        )
    for name, found in tasks.items():
        seeds = [seed["seed"] for seed in found["seeds"]]
        if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
            raise UserError(f"{name}: seed {twice[0]} is there twice; give each loop once")
        if len(counts := {seed[n]["episodes"] for seed in found["seeds"] for n in names}) > 1:
            raise UserError(f"{name}: evaluated over {sorted(counts)} episodes; report them apart")
        found["pooled"] = {
            name: pooled_success([seed[name]["successes"] for seed in found["seeds"]], *counts)
            for name in names
        }
        found["gain_points"] = {
            name: 100 * (found["pooled"][name]["success"] - found["pooled"]["base"]["success"])
            for name in names[1:]
        }
    document = {
        "tasks": tasks,
        "mean_gain_points": {
            name: float(np.mean([found["gain_points"][name] for found in tasks.values()]))
            for name in names[1:]
        },
        **measured[0], **total(costs), "command": config.command, "commit": git_commit(),
    }  # fmt: skip
    return document, rows


def table(document: dict[str, Any]) -> str:
    """The table of the docs, in Markdown."""
    names = ["base", *document["mean_gain_points"]]
    heads = [f"round {name[5:]}" if name != "base" else name for name in names]
    rows = [f"| task | seed | {' | '.join(heads)} |", "|---" * (2 + len(names)) + "|"]
    for task, found in document["tasks"].items():
        for seed in found["seeds"]:
            cells = " | ".join(cell(seed[name]) for name in names)
            rows.append(f"| {task} | {seed['seed']} | {cells} |")
        cells = " | ".join(cell(found["pooled"][name]) for name in names)
        rows.append(f"| {task} | all | {cells} |")
    gains = ", ".join(f"{head} {gain:+.1f} points" for head, gain in zip(
        heads[1:], document["mean_gain_points"].values()))  # fmt: skip
    return "\n".join(rows) + f"\n\nMean gain over the tasks: {gains}."


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(LoopReportConfig, argv, "worldloop loop report")
    if not config.command:
        config = replace(config, command="worldloop loop report " + " ".join(argv))
    torch.set_num_threads(config.threads)
    document, rows = summarise(config)
    atomic_write_text(config.out, json.dumps(document, indent=2) + "\n")
    draw(document["tasks"], config.rounds, config.figure)
    print(table(document))
    if rows:
        with atomic_path(config.sheet) as temporary:
            contact_sheet(rows, told=True).save(temporary, format="JPEG", quality=88)
        print(config.sheet)
    print(f"{config.out}, {config.figure}")
    return 0
