"""The demo's report: targets, the printed table, and one HTML page that opens from disk."""

from __future__ import annotations

import html
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from worldloop.errors import UserError
from worldloop.files import atomic_write_text, disk_error, left_behind
from worldloop.metrics import Comparison
from worldloop.rl.charts import psnr_chart
from worldloop.rl.pictures import Pair, outcome

# ---------------------------------------------------------------- figures and targets

# name, label, smallest or largest value, unit
_TARGETS: tuple[tuple[str, str, str, float, str], ...] = (
    ("psnr", "PSNR of imagined frames", ">=", 24.0, "dB"),
    ("psnr_over_static", "PSNR above repeating the first frame", ">=", 3.0, "dB"),
    ("ssim", "SSIM", ">=", 0.85, ""),
    ("object_within_4px", "Object within 4 pixels of the true one", ">=", 0.75, "%"),
    ("reward_alignment", "Reward alignment", ">=", 0.80, "%"),
    (
        "reward_over_actions_only",
        "Reward alignment above the actions-only one",
        ">=",
        0.10,
        "points",
    ),
    ("visual_alignment", "Visual alignment (classifier of final frames)", ">=", 0.80, "%"),
    ("shuffled_cost", "PSNR lost with another episode's actions", ">=", 3.0, "dB"),
    ("speedup_vs_reference", "Speed-up over the 35-step reference", ">=", 5.0, "x"),
    ("seconds_per_chunk", "One chunk at batch 1", "<=", 1.0, "s"),
    ("peak_memory_mb", "Peak memory", "<=", 4096.0, "MiB"),
    ("seconds", "The whole demo", "<=", 480.0, "s"),
    ("episodes", "Held-out episodes", ">=", 40.0, ""),
)
# Figures without a target.
_PLAIN: tuple[tuple[str, str, str], ...] = (
    ("psnr_static", "PSNR of the first frame repeated", "dB"),
    ("psnr_with_shuffled_actions", "PSNR with another episode's actions", "dB"),
    ("mse", "Mean squared error, pixels in [0,1]", ""),
    ("lpips", "LPIPS", ""),
    ("actions_only_alignment", "Outcome guessed from the actions alone", "%"),
    ("true_success_share", "True successes among the episodes", "%"),
    ("object_hidden_share", "Frames with the object hidden (left out)", "%"),
    ("frames_per_second", "Imagined frames a second, all episodes", ""),
)


def plain(value: Any) -> Any:
    """JSON has neither nan nor infinity nor numpy's numbers."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def targets(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of targets: name, label, value, bound, unit, met (None: unmeasured)."""
    derived = {
        "psnr_over_static": _less(values["psnr"], values["psnr_static"]),
        "shuffled_cost": _less(values["psnr"], values["psnr_with_shuffled_actions"]),
        "reward_over_actions_only": _less(
            values["reward_alignment"], values["actions_only_alignment"]
        ),
    }
    rows = []
    for name, label, relation, bound, unit in _TARGETS:
        value = {**values, **derived}.get(name)
        met = None
        if value is not None and not math.isnan(value):
            met = bool(value >= bound if relation == ">=" else value <= bound)
        rows.append(
            {"name": name, "label": label, "value": value, "relation": relation,
             "bound": bound, "unit": unit, "met": met}
        )  # fmt: skip
    return rows


def shown(value: float | None, unit: str) -> str:
    """A figure as text with its unit."""
    if value is None or math.isnan(value):
        return "not measured"
    if unit == "%":
        return f"{100 * value:.1f} %"
    if unit == "points":
        return f"{100 * value:.1f} points"
    digits = (
        0 if float(value).is_integer() or abs(value) >= 1000 else (2 if abs(value) < 100 else 1)
    )
    if 0 < abs(value) < 0.1:
        digits = 4
    return f"{value:.{digits}f} {unit}".strip()


def _verdict(row: dict[str, Any]) -> str:
    return {True: "met", False: "MISSED", None: "not measured"}[row["met"]]


def print_table(values: dict[str, Any]) -> None:
    """Print every figure, those with a target first."""
    rows = [
        (row["label"], shown(row["value"], row["unit"]),
         f"{row['relation']} {shown(row['bound'], row['unit'])}", _verdict(row))
        for row in values["targets"]
    ]  # fmt: skip
    rows += [(label, shown(values[name], unit), "", "") for name, label, unit in _PLAIN]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for label, value, bound, verdict in rows:
        line = f"{label:<{widths[0]}}  {value:>{widths[1]}}  {bound:<{widths[2]}}  {verdict}"
        print(line.rstrip())


def grpo_line(values: dict[str, Any]) -> str:
    """One sentence on the GRPO steps of the demo; "" where there were none."""
    found = values["grpo"]
    if found is None:
        return ""

    def rate(name: str) -> str:
        low, high = found[f"{name}_ci95"]
        return f"{found[name]:.0%} ({low:.0%} to {high:.0%})"

    return (
        f"{len(found['steps'])} GRPO steps of {found['policy']} inside the world model, "
        f"{found['seconds']:.0f} s: imagined success {rate('before')} before, {rate('after')} "
        f"after, over {found['episodes']} sampled episodes from the starts it learned from"
    )


def print_grpo(values: dict[str, Any]) -> None:
    """Print that sentence."""
    if values["grpo"] is not None:
        print(grpo_line(values))


# ---------------------------------------------------------------- the folder


@contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``out`` when everything in it is written.

    On any error it is removed and the earlier report stays. Raises UserError when ``out`` holds
    something other than an earlier report, which must not be deleted.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file stands where the report should go; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / "summary.json").is_file():
        raise UserError(f"{out}: is not empty and holds no earlier report; choose another --out")
    new = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        _sweep(out)
        new.mkdir(parents=True)
        yield new
        if out.exists():
            out.rename(old)
        new.rename(out)
    except OSError as error:
        raise disk_error(out, error) or error from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Clear up after killed runs: their new folders go, a report they had moved aside returns."""
    for path in out.parent.glob(f".{out.name}.*"):
        process, _, kind = path.name.removeprefix(f".{out.name}.").partition(".")
        if kind not in ("tmp", "old") or not left_behind(process):
            continue
        if kind == "old" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light; --ink: #1f2328; --faint: #6b7280; --line: #e3e5e9; --real: #25639b;
  --imagined: #c46210; --good: #1d7a46; --bad: #b02030; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #fff;
  max-width: 1080px; margin: 48px auto 96px; padding: 0 24px; }
h1 { font-size: 30px; margin: 0 0 4px; } h2 { font-size: 21px; margin: 52px 0 8px; }
p { max-width: 76ch; margin: 8px 0; } .faint { color: var(--faint); }
table { border-collapse: collapse; margin: 14px 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 22px 7px 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--faint); font-size: 14px; }
td.number { text-align: right; } .met { color: var(--good); }
.missed { color: var(--bad); font-weight: 600; }
svg { width: 100%; height: auto; margin: 8px 0; }
figure { margin: 18px 0 30px; } figcaption { font-size: 15px; margin-bottom: 6px; }
video, img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 0 28px; }
.tables { display: flex; gap: 64px; flex-wrap: wrap; } a { color: var(--real); }
"""


def _figure(pair: Pair, videos: bool) -> str:
    said = f"true {outcome(pair.success)}, reward says {outcome(pair.reward_success)}"
    if pair.visual_success is not None:
        said += f", picture says {outcome(pair.visual_success)}"
    within = "" if math.isnan(pair.within) else f", object within 4 px {pair.within:.0%}"
    style = "" if pair.agrees else ' class="missed"'
    caption = (
        f"<b>{pair.name}</b> <span{style}>{said}</span>"
        f'<br><span class="faint">{pair.psnr:.1f} dB{within}</span>'
    )
    clip = ""
    if videos:
        clip = (f'<video src="{pair.name}.mp4" poster="{pair.name}.jpg" controls loop muted '
                'playsinline preload="none"></video>')  # fmt: skip
    return f"<figure><figcaption>{caption}</figcaption>{clip}</figure>"


def _figures(pairs: Sequence[Pair], videos: bool) -> str:
    return f'<div class="pairs">{"".join(_figure(pair, videos) for pair in pairs)}</div>'


def _target_table(values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(row['label'])}</td>"
        f'<td class="number">{shown(row["value"], row["unit"])}</td>'
        f"<td>{'at least' if row['relation'] == '>=' else 'at most'} "
        f"{shown(row['bound'], row['unit'])}</td>"
        f'<td class="{_verdict(row).lower().replace(" ", "-")}">{_verdict(row).lower()}</td></tr>'
        for row in values["targets"]
    )
    head = "<tr><th>figure</th><th>measured</th><th>target</th><th></th></tr>"
    return f"<table>{head}{rows}</table>"


def _plain_table(values: dict[str, Any]) -> str:
    rows = ""
    for name, label, unit in _PLAIN:
        reason = values.get(f"{name}_reason")
        text = html.escape(str(reason)) if reason else shown(values[name], unit)
        rows += f'<tr><td>{label}</td><td class="number">{text}</td></tr>'
    return f"<table>{rows}</table>"


def confusion_table(title: str, counts: dict[str, int], note: str) -> str:
    """Imagined against true outcomes, and a line under them."""
    return (
        f"<div><p><b>{title}</b></p><table>"
        "<tr><th></th><th>imagined success</th><th>imagined failure</th></tr>"
        f'<tr><td>true failure</td><td class="number">{counts["false_success"]}</td>'
        f'<td class="number">{counts["true_failure"]}</td></tr>'
        f'<tr><td>true success</td><td class="number">{counts["true_success"]}</td>'
        f'<td class="number">{counts["false_failure"]}</td></tr></table>'
        f'<p class="faint">{note}</p></div>'
    )


def _confusion(title: str, counts: dict[str, int], interval: Sequence[float]) -> str:
    low, high = interval
    return confusion_table(
        title, counts, f"95 % interval of the agreement: {low:.0%} to {high:.0%}"
    )


def _grpo_section(values: dict[str, Any]) -> str:
    if values["grpo"] is None:
        return ""
    rows = "".join(
        f"<tr><td>{i}</td><td>{row['imagined_success']:.0%}</td><td>{row['group_yield']:.0%}</td>"
        f"<td>{row['entropy']:.2f}</td><td>{row['clip_fraction']:.1%}</td>"
        f"<td>{row['frames_per_second']:.0f}</td></tr>"
        for i, row in enumerate(values["grpo"]["steps"], 1)
    )
    return (
        f"<h2>A policy learns in imagination</h2><p>{html.escape(grpo_line(values))}.</p>"
        "<table><tr><th>step</th><th>imagined success</th><th>mixed groups</th>"
        "<th>entropy, nats a token</th><th>clipped</th><th>frames/s</th></tr>"
        f"{rows}</table>"
    )


def write_report(
    folder: Path,
    values: dict[str, Any],
    comparison: Comparison,
    pairs: Sequence[Pair],
    sheets: Sequence[Path],
    videos: bool,
) -> None:
    """Write report.html into the folder of the videos and contact sheets; links are relative."""
    wrong = [pair for pair in pairs if not pair.agrees]
    by_psnr = sorted(pairs, key=lambda pair: pair.psnr)
    picked = [by_psnr[0], by_psnr[len(by_psnr) // 2], by_psnr[-1]]
    missed = [row["label"] for row in values["targets"] if row["met"] is False]
    verdict = (
        '<p class="met">Every measured target is met.</p>'
        if not missed
        else f'<p class="missed">Missed: {html.escape("; ".join(missed))}.</p>'
    )
    tables = _confusion("by the reward head", values["reward_confusion"],
                        values["reward_alignment_interval"])  # fmt: skip
    if values["visual_alignment"] is not None:
        tables += _confusion("by the classifier of final frames", values["visual_confusion"],
                             values["visual_alignment_interval"])  # fmt: skip
    speed = values["speedup_details"]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>worldloop demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>Imagined and real</h1>
<p>{values["episodes"]} held-out episodes of {html.escape(values["env_id"])}, imagined from the
first frame and the recorded actions alone: {values["frames"]} frames, {values["config"]["steps"]}
denoising steps a chunk, world model {html.escape(values["config"]["world"])}, commit
{html.escape(values["commit"])}.</p>
{verdict}{_target_table(values)}
<h2>Other figures</h2>{_plain_table(values)}
{_grpo_section(values)}<h2>PSNR over time</h2>
<p>How far imagination drifts: every chunk of {speed_chunk(values)} frames starts from what was
imagined before it.</p>
{psnr_chart(comparison, speed_chunk(values))}
<h2>Outcomes</h2>
<p>Success is a reward above {values["reward_threshold"]:g}; the picture's verdict comes from a
classifier trained on real frames only.</p>
<div class="tables">{tables}</div>
<h2>Where reward and truth disagree</h2>
<p>{"All of them, nothing left out." if wrong else "None in this run."}</p>
{_figures(wrong, videos)}
<h2>Worst, median and best by PSNR</h2>{_figures(picked, videos)}
<h2>Every episode</h2>{_figures(pairs, videos)}
<h2>Contact sheets</h2><p>Every eighth frame, real above imagined.</p>
{
        "".join(
            f'<a href="{path.name}"><img src="{path.name}" loading="lazy" alt="contact sheet"></a>'
            for path in sheets
        )
    }
<h2>How it was measured</h2>
<p>The object is found by the same colour detector in real and imagined frames; frames in which the
hand hides the real one are left out, an imagined frame without an object is a miss.</p>
<p>Speed-up: {html.escape(speed["what"])}; {speed["episodes"]} episodes,
{speed["streaming_steps"]} steps against {speed["reference_steps"]},
{values["threads"]} threads. The actions-only guess is the larger of the figure
measured with the training data and the one cross-validated on these episodes.</p>
</body></html>
"""
    atomic_write_text(folder / "report.html", page)


def speed_chunk(values: dict[str, Any]) -> int:
    """Frames of a chunk, from the per-chunk PSNR."""
    per_episode = values["frames"] // values["episodes"]
    return int(per_episode // len(values["psnr_by_chunk"]))
