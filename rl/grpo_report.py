"""`worldloop grpo-report`: what GRPO in imagination did to the true success rate.

Every kept policy of every run is evaluated in the true simulator, over the same fixed start states
that no training saw; results lie beside the policies, so that a stopped report goes on. Written
are grpo.json and the learning curve (the paper's Table 3 and Figure 4).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from worldloop.cli import parse_config
from worldloop.config import config_to_dict, read_json
from worldloop.errors import UserError
from worldloop.files import atomic_path, atomic_write_text
from worldloop.ledger import checkpoint_sha256
from worldloop.metrics import pooled_success
from worldloop.rl.evaluate import EvaluateConfig, evaluate_policy
from worldloop.track import git_commit, read_rows


@dataclass(frozen=True)
class ReportConfig:
    """Evaluate the policies of GRPO runs (one a seed) in the true simulator and report."""

    runs: tuple[Path, ...]
    """Output folders of `worldloop grpo`, all from one starting policy."""
    env: str = "PushCube-v1"
    episodes: int = 200
    """Start states of the first and the last policy."""
    curve_episodes: int = 100
    """Start states of the curve, for every policy the first ones of the same list."""
    first_seed: int = 6_000_000
    horizon: int = 72
    processes: int = 2
    out: Path = Path("runs/grpo-report/grpo.json")
    figure: Path = Path("runs/grpo-report/grpo-curve.png")
    command: str = ""
    """The commands that made the runs, for the record."""


def true_success(config: ReportConfig, policy: Path, episodes: int) -> dict[str, Any]:
    """`worldloop evaluate policy` on a kept policy, greedy; read back where it was done before."""
    out = policy.parent.parent / "true" / f"{policy.name}-{episodes}.json"
    wanted = EvaluateConfig(
        policy=str(policy), env=config.env, episodes=episodes, first_seed=config.first_seed,
        horizon=config.horizon, processes=config.processes, threads=1, out=out,
    )  # fmt: skip
    if not out.is_file():
        evaluate_policy(wanted)
    result = read_json(out)
    plain = config_to_dict(wanted)
    for key in ("env", "episodes", "first_seed", "horizon"):
        if result["config"][key] != plain[key]:
            raise UserError(f"{out}: has another {key}; delete it and run again")
    if result["policy_sha256"] != checkpoint_sha256(policy):
        raise UserError(f"{out}: is of another policy; delete it and run again")
    return result


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Success rate and its 95 % Wilson interval."""
    return {"success": result["rate"], "ci95": result["ci95"], "successes": result["successes"]}


def summarise(config: ReportConfig) -> dict[str, Any]:
    """The document of grpo.json."""
    if not config.runs:
        raise UserError("runs: give at least one output folder of `worldloop grpo`")
    seeds, imagined, true, frames, seconds = [], [], [], 0, 0.0
    for run in config.runs:
        settings = read_json(run / "config.json")
        if not (run / "done.json").is_file():
            raise UserError(f"{run}: is not finished (no done.json); run it again, it goes on")
        last = read_json(run / "done.json")["steps"]  # after an alarm, the last trusted policy
        policies = [p for p in sorted((run / "policies").glob("[0-9]*")) if int(p.name) <= last]
        if len(policies) < 2:
            raise UserError(f"{run}: holds {len(policies)} policies; 2 or more are compared")
        rows = read_rows(run / "metrics.jsonl")
        ends = [true_success(config, p, config.episodes) for p in (policies[0], policies[-1])]
        before, after = (figures(end) for end in ends)
        seeds.append({
            "seed": settings["seed"], "before": before, "after": after,
            "gain_points": 100 * (after["success"] - before["success"]),
            "steps": int(policies[-1].name),
        })  # fmt: skip
        between = [true_success(config, p, config.curve_episodes) for p in policies[1:-1]]
        true.append([
            [int(policy.name), float(np.mean(result["success"][: config.curve_episodes]))]
            for policy, result in zip(policies, [ends[0], *between, ends[1]], strict=True)
        ])  # fmt: skip
        imagined.append([[r["step"], r["imagined_success"]] for r in rows
                         if "imagined_success" in r])  # fmt: skip
        frames += sum(row.get("frames", 0) for row in rows)
        seconds += rows[-1]["seconds"]
    gains = np.array([seed["gain_points"] for seed in seeds])
    pooled = {
        name: pooled_success([seed[name]["successes"] for seed in seeds], config.episodes)
        for name in ("before", "after")
    }
    return {
        "task": config.env,
        "episodes": config.episodes,
        "curve_episodes": config.curve_episodes,
        "first_seed": config.first_seed,
        "horizon": config.horizon,
        "seeds": seeds,
        "pooled": pooled,
        "mean_gain_points": float(gains.mean()),
        "imagined_curve": imagined,
        "true_curve": true,
        "frames": int(frames),
        "seconds": float(seconds),
        "command": config.command,
        "commit": git_commit(),
    }


def draw(document: dict[str, Any], path: Path) -> None:
    """Imagined and true success against the GRPO step, one line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9.2, 3.6), sharey=True)
    count = document["curve_episodes"]
    titles = (
        "imagined (sampled, training starts)",
        f"true (greedy, the same {count} unseen starts)",
    )
    for panel, name, title in zip(axes, ("imagined_curve", "true_curve"), titles, strict=True):
        for facts, curve in zip(document["seeds"], document[name], strict=True):
            steps, rates = np.array(curve).T
            panel.plot(steps, 100 * rates, marker="." if name == "true_curve" else None,
                       label=f"seed {facts['seed']}", lw=1.4)  # fmt: skip
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("GRPO step")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("success, %")
    axes[0].set_ylim(0, 100)
    axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


def cell(value: dict[str, Any]) -> str:
    """Success and its interval."""
    low, high = value["ci95"]
    return f"{value['success']:.1%} ({low:.1%} – {high:.1%})"


def table(document: dict[str, Any]) -> str:
    """The table of the docs, in Markdown."""
    rows = ["| seed | before | after | gain |", "|---|---|---|---|"]
    for seed in document["seeds"]:
        rows.append(f"| {seed['seed']} | {cell(seed['before'])} | {cell(seed['after'])} | "
                    f"{seed['gain_points']:+.1f} points |")  # fmt: skip
    pooled = document["pooled"]
    rows.append(f"| all | {cell(pooled['before'])} | {cell(pooled['after'])} | "
                f"{document['mean_gain_points']:+.1f} points |")  # fmt: skip
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(ReportConfig, argv, "worldloop grpo-report")
    if not config.command:
        config = replace(config, command="worldloop grpo-report " + " ".join(argv))
    document = summarise(config)
    atomic_write_text(config.out, json.dumps(document, indent=2) + "\n")
    draw(document, config.figure)
    print(table(document))
    print(f"{config.out}, {config.figure}")
    return 0
