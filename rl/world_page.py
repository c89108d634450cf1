"""The world model's results as a page of tables and as pictures, from world-model.json's values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloop.files import atomic_path, atomic_write_text
from worldloop.rl.pictures import Pair, contact_sheet

PAPER = {  # its averages, tables 1 and 2, and its LIBERO-Object tasks in table 4
    "libero": "| paper, LIBERO | | 26.57 | | 0.90 | 0.0024 | 0.031 | |",
    "average": "| paper, average | 140 | 87.9 % | 86.4 % | | |",
}
COLORS = ("#25639b", "#c46210", "#70767e", "#1d7a46")


def shown(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where it was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"


def share(row: dict[str, Any], name: str) -> str:
    """A share in percent with its interval."""
    if row.get(name) is None:
        return "–"
    interval = row.get(f"{name}_ci95")
    tail = "" if interval is None else f" ({100 * interval[0]:.0f}–{100 * interval[1]:.0f})"
    return f"{100 * row[name]:.1f} %{tail}"


def table(head: str, rows: Sequence[str]) -> list[str]:
    return [head, "|" + "---|" * head.count(" | ") + "---|", *rows, ""]


def page(document: dict[str, Any], pictures: Sequence[str]) -> str:
    """The page in Markdown."""
    tasks, mean = document["tasks"], document["mean"]
    first = next(iter(tasks.values()))
    lines = [
        "# World model: measured", "",
        f"`{document['command']}`, commit {document['commit']}, {document['seconds']:.0f} s. "
        f"Held-out real episodes, outcomes balanced, {document['steps']} denoising steps; brackets "
        "are 95 % Wilson intervals.", "",
        f"## Video quality, {first['frames']} frames (paper, table 1)", "",
    ]  # fmt: skip

    def quality(name: str, row: dict[str, Any]) -> str:
        near = share(row, "object_within_4px")
        return (f"| {name} | {row['n']} | {shown(row['psnr'])} | {shown(row['psnr_static'])} | "
                f"{shown(row['ssim'], 3)} | {shown(row['mse'], 4)} | {shown(row.get('lpips'), 3)} "
                f"| {near} |")  # fmt: skip

    rows = [quality(env_id, row) for env_id, row in tasks.items()]
    lines += table(
        "| task | episodes | PSNR, dB | first frame repeated, dB | SSIM | MSE | LPIPS | "
        "object within 4 px |",
        [*rows, quality("mean", mean), PAPER["libero"]],
    )
    reasons = {first.get(f"{name}_reason") for name in ("lpips", "fvd")} - {None}
    lines += [f"Not measured: {'; '.join(sorted(map(str, reasons)))}.", ""] if reasons else []
    rows = [
        f"| {env_id} | {row['n']} | {share(row, 'visual_alignment')} | "
        f"{share(row, 'reward_alignment')} | {share(row, 'reward_alignment_recorded')} | "
        f"{share(row, 'actions_only_alignment')} |"
        for env_id, row in [*tasks.items(), ("all", mean)]
    ]
    lines += ["## Outcomes (paper, table 2)", ""]
    head = "| task | episodes | visual | reward | reward head on recorded frames | actions only |"
    lines += table(head, [*rows, PAPER["average"]])
    lines += pose_lines(document) + steps_lines(document) + drift_lines(document)
    lines += arms_lines(document)
    lines += following_lines(document) + calibration_lines(document)
    lines += [f"![{name}]({name})" for name in pictures]
    return "\n".join(lines).rstrip() + "\n"


def pose_lines(document: dict[str, Any]) -> list[str]:
    """How far the hand is from where its commands put it."""
    rows = []
    for env_id, row in document["tasks"].items():
        if off := row.get("pose_error_mm"):
            cells = [f"{off[name][part]:.1f}" for name in ("arm", "linear")
                     for part in ("median", "p90")]  # fmt: skip
            rows.append(f"| {env_id} | {row['frames']} | {' | '.join(cells)} |")
    if not rows:
        return []
    head = "| task | actions | arm: median, mm | nine in ten below | linear sum | nine in ten |"
    return ["## The hand, from commands alone", "", *table(head, rows)]


def steps_lines(document: dict[str, Any]) -> list[str]:
    rows = [
        f"| {steps} | {row['n']} | {shown(row['psnr'])} | {shown(row['ssim'], 3)} | "
        f"{share(row, 'visual_alignment')} | {share(row, 'reward_alignment')} | "
        f"{row['frames_per_second']:.0f} |"
        for steps, row in document["by_steps"].items()
    ]
    head = "| steps | episodes | PSNR, dB | SSIM | visual | reward | frames/s |"
    return ["## Denoising steps (35: the reference procedure)", "", *table(head, rows)]


def drift_lines(document: dict[str, Any]) -> list[str]:
    drift = document["drift"]
    if "reason" in drift:
        return ["## Drift", "", f"Not measured: {drift['reason']}.", ""]
    rows = [
        f"| {mark} | {shown(row['psnr'])} | {shown(row['psnr_static'])} | "
        f"{share(row, 'object_within_4px')} |"
        for mark, row in drift.items()
        if mark.isdigit()
    ]
    head = "| the 24 frames up to | PSNR, dB | first frame repeated, dB | object within 4 px |"
    title = f"## Drift ({drift['episodes']} wandering episodes)"
    return [title, "", *table(head, rows)]


def arms_lines(document: dict[str, Any]) -> list[str]:
    arms = {"this model": document["mean"], **document["ablations"]}
    if document["judge"] is not None and "reason" not in document["judge"]:
        arms[f"judged by {document['judge']['model']}"] = document["judge"]
    lines: list[str] = []
    if len(arms) > 1:
        rows = [
            f"| {name} | {len(row.get('seeds', ())) or 1} | {share(row, 'visual_alignment')} | "
            f"{share(row, 'reward_alignment')} | {shown(row.get('psnr'))} |"
            for name, row in arms.items()
        ]
        head = "| arm | seeds | visual | reward | PSNR, dB |"
        lines += ["## Ablations (paper, tables 4 and 5)", "", *table(head, rows)]
    if document["transfer"] is not None:
        found = document["transfer"]
        rows = [
            f"| {name} | {share(row, 'visual_alignment')} | {share(row, 'reward_alignment')} | "
            f"{share(row, 'reward_alignment_recorded')} | {shown(row['psnr'])} |"
            for name, row in found.items()
            if isinstance(row, dict)
        ]
        title = f"## An unseen task: {found['task']}, {found['n']} episodes"
        head = "| start | visual | reward | reward head on recorded frames | PSNR, dB |"
        lines += [title, "", *table(head, rows)]
    return lines


def following_lines(document: dict[str, Any]) -> list[str]:
    found = document["action_following"]
    title = "## Made-up actions (paper, figure 6)"
    if "reason" in found:
        return [title, "", f"Not measured: {found['reason']}.", ""]
    rows = [
        f"| {env_id} | {row['n']} | {shown(row['psnr'])} | {shown(row['psnr_static'])} | "
        f"{share(row, 'object_within_4px')} | {share(row, 'reward_alignment')} | "
        + ", ".join(f"{kind} {value:.1f}" for kind, value in row["by_kind"].items()) + " |"
        for env_id, row in found.items()
    ]  # fmt: skip
    head = (
        "| task | episodes | PSNR, dB | first frame repeated, dB | object within 4 px | reward | "
        "PSNR by kind, dB |"
    )
    return [title, "", *table(head, rows)]


def calibration_lines(document: dict[str, Any]) -> list[str]:
    found = document["calibration"]
    rows = [
        f"| {name} | {row['threshold']:.3f} | {row['held_frames']} | {share(row, 'cross_fitted')} |"
        for name, row in found.items()
        if "precision_recall" in row
    ]
    used = found["in_checkpoint"]
    text = (
        f"The checkpoint was used with {used['threshold']:g} held for {used['held_frames']} frames."
        " A fit is judged on the half of the episodes that it has not seen."
    )
    head = "| task | threshold | frames held | agreement, cross-fitted |"
    return ["## Reward calibration", "", text, "", *table(head, rows)]


def write_page(document: dict[str, Any], pictures: Sequence[str], path: Path) -> None:
    """Write the page; pictures are names of files beside it."""
    atomic_write_text(path, page(document, pictures))


# ---------------------------------------------------------------- pictures


def write_figures(document: dict[str, Any], shown: Sequence[Pair], folder: Path) -> list[str]:
    """Draw outcomes by task and steps, drift, precision-recall, made-up actions; their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    names = []
    wide = max(6.5, 2.2 * len(document["tasks"]) + 4.2)
    for name, draw, size in (
        ("world-model-outcomes.png", _outcomes, (wide, 3.6)),
        ("world-model-drift.png", _drift, (6.5, 3.4)),
        ("world-model-calibration.png", _calibration, (4.8, 4.2)),
    ):
        figure = pyplot.figure(figsize=size)
        if draw(figure, document):
            figure.tight_layout()
            with atomic_path(folder / name) as temporary:
                figure.savefig(temporary, dpi=120, format="png")
            names.append(name)
        pyplot.close(figure)
    if shown:
        name = "world-model-following.png"
        with atomic_path(folder / name) as temporary:
            every = max(1, (len(shown[0].real) - 1) // 8)
            sheet = contact_sheet(shown, every, told=True)
            sheet.save(temporary, format="PNG", compress_level=6)
        names.append(name)
    return names


def _outcomes(figure: Any, document: dict[str, Any]) -> bool:
    """Left: alignment by task with intervals. Right: PSNR by number of steps."""
    tasks, steps = document["tasks"], document["by_steps"]
    left, right = figure.subplots(1, 2, width_ratios=(max(1.5, 0.9 * len(tasks)), 1.5))
    kinds = (("visual_alignment", "visual"), ("reward_alignment", "reward"),
             ("actions_only_alignment", "actions only"))  # fmt: skip
    for k, (name, label) in enumerate(kinds):
        for i, row in enumerate(tasks.values()):
            if row.get(name) is None:
                continue
            value, (low, high) = row[name], row.get(f"{name}_ci95") or (row[name],) * 2
            left.bar(i + 0.27 * (k - 1), 100 * value, 0.25, color=COLORS[k],
                     label=label if i == 0 else None)  # fmt: skip
            bar = [[100 * max(value - low, 0)], [100 * max(high - value, 0)]]
            left.errorbar(i + 0.27 * (k - 1), 100 * value, bar, color="black", lw=1, capsize=2)
    left.set_xticks(range(len(tasks)), [t.removesuffix("-v1") for t in tasks], fontsize=8)
    left.set_xlim(-0.6, len(tasks) - 0.4)
    left.set_ylim(0, 122)  # room for the legend above the bars
    left.set_yticks(range(0, 101, 20))
    left.set_title("outcomes told rightly, %", fontsize=10)
    left.legend(frameon=False, fontsize=8, loc="upper center", ncols=3, columnspacing=1)
    order = sorted(steps, key=int)
    right.plot(range(len(order)), [steps[s]["psnr"] for s in order], marker="o", color=COLORS[0])
    right.set_xticks(range(len(order)), order)
    right.set_xlabel("denoising steps")
    right.set_title("PSNR, dB", fontsize=10)
    right.margins(y=0.3)
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="y")
    return True


def _drift(figure: Any, document: dict[str, Any]) -> bool:
    drift = document["drift"]
    if "curve" not in drift:
        return False
    axes = figure.subplots()
    times = np.arange(1, len(drift["curve"]) + 1)
    for name, label, color in (("curve", "imagined", COLORS[1]),
                               ("curve_static", "first frame repeated", COLORS[2])):  # fmt: skip
        values = np.array(drift[name])
        axes.plot(times, values, color=color, alpha=0.25, lw=0.8)
        smooth = np.convolve(values, np.ones(24) / 24, "valid")
        axes.plot(times[23:], smooth, color=color, label=label)
    for mark in (int(m) for m in drift if m.isdigit()):
        axes.axvline(mark, color=COLORS[2], lw=0.8, ls=":")
    axes.set_xlabel("frame")
    axes.set_ylabel("PSNR, dB (bold: mean of 24 frames)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return True


def _calibration(figure: Any, document: dict[str, Any]) -> bool:
    axes = figure.subplots()
    rows = {k: v for k, v in document["calibration"].items() if "precision_recall" in v}
    if len(rows) == 2:  # one task: it is all
        rows.pop("all")
    for name, row in rows.items():
        _, precision, recall = np.array(row["precision_recall"]).T
        axes.step(recall, precision, where="post", label=name, lw=2 if name == "all" else 1.2)
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.set_title("success by reward, over all thresholds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return True
