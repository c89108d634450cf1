"""The page that a round of the closed loop leaves: one HTML file with everything inside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worldloop.config import read_json
from worldloop.files import atomic_write_text
from worldloop.ledger import Ledger, Record
from worldloop.rl.charts import IMAGINED, TRUE, chart
from worldloop.rl.grpo_report import cell
from worldloop.rl.pictures import outcome
from worldloop.rl.report import STYLE, confusion_table

VIDEOS = 8  # embedded at most


# ---------------------------------------------------------------- parts of the page


def _rounds(ledger: Ledger, r: int) -> str:
    found = [(q, ledger.find(q, "evaluate")) for q in range(r + 1)]
    there = [(q, record.facts) for q, record in found if record is not None]
    drawn = chart(
        [("true success, 95 % interval", TRUE, [(q, f["success"]) for q, f in there])],
        [(q, *f["ci95"]) for q, f in there], "round; success in percent",
    )  # fmt: skip
    rows = ""
    for q, facts in there:
        decision = ledger.find(q, "decide")
        said = "base policy"
        if decision is not None:
            said = "accepted" if decision.facts["accepted"] else "rolled back"
        dropped = f", {facts['dropped']} dropped" if facts["dropped"] else ""
        rows += (f'<tr><td>{q}</td><td class="number">{cell(facts)}</td>'
                 f"<td>{facts['successes']} of {facts['episodes']}{dropped}</td>"
                 f"<td>{said}</td></tr>")  # fmt: skip
    head = "<tr><th>round</th><th>true success</th><th>episodes</th><th></th></tr>"
    return f"<h2>True success</h2>{drawn}<table>{head}{rows}</table>"


def _learning(improve: Record, world: Record | None, found: dict[str, Any]) -> str:
    curve = [(float(step), share) for step, share in improve.facts["curve"]]
    checks = improve.facts["alarm"]
    truth = []
    for check in checks:
        played = sum(check[f"alarm_{kind}"] for kind in (
            "false_success", "true_success", "false_failure", "true_failure"))  # fmt: skip
        true = check["alarm_true_success"] + check["alarm_false_failure"]
        if played:
            truth.append((float(check["step"]), true / played))
    lines = [("imagined, while learning", IMAGINED, curve)]
    if truth:
        lines.append(("true, of the alarm's episodes", TRUE, truth))
    out = f"<h2>Learning in imagination</h2>{chart(lines, [], 'GRPO step; success in percent')}"
    out += f"<p>{improve.facts['imagined_frames']:,} imagined frames"
    if world is not None and world.facts["curve"]:
        first, last = world.facts["curve"][0], world.facts["curve"][-1]
        kept = world.facts.get("kept_step", last[0])  # older records kept the last
        out += (f"; the world model's held-out flow error went from {first[1]:.4f} to "
                f"{last[1]:.4f} over {last[0]} steps of fine-tuning, its reward error from "
                f"{first[2]:.4f} to {last[2]:.4f}; the weights of step {kept} "
                "were kept")  # fmt: skip
    return f"{out}.</p>{_flattery(improve, found)}"


def _flattery(improve: Record, found: dict[str, Any]) -> str:
    """What the greedy policy gained in imagination, beside what it gained in truth."""
    if "imagined_greedy" not in improve.facts:  # older records
        return ""
    before, after = (improve.facts["imagined_greedy"][name] for name in ("before", "after"))
    return (f"<p>Greedy, from {after['episodes']} starts in this world model, the policy succeeds "
            f"in {cell(after)}, the one that the round began with in {cell(before)}; in truth the "
            f"new one has {cell(found)}.</p>")  # fmt: skip


def _alarm(improve: Record, folder: Path) -> str:
    checks = improve.facts["alarm"]
    if not checks:
        return "<h2>Imagined and true outcomes</h2><p>The alarm was off in this round.</p>"
    stopped = improve.facts["stopped_by_alarm"]
    said = "The alarm was silent."
    if stopped is not None:
        said = (f"<b>The alarm stopped RL at step {stopped}</b>; the policy of step "
                f"{improve.facts['steps']} is the last at which it was silent.")  # fmt: skip
    tables = ""
    for check in checks:
        counts = {kind: check[f"alarm_{kind}"] for kind in (
            "false_success", "true_success", "false_failure", "true_failure")}  # fmt: skip
        share, low = check["alarm_false_share"], check["alarm_false_share_low"]
        note = "no imagined success in the window"
        if share is not None:
            note = f"{share:.0%} of the window's imagined successes are false, at least {low:.0%}"
        tables += confusion_table(f"after step {check['step']}", counts, note)
    return (
        f"<h2>Imagined and true outcomes</h2><p>{said}</p>"
        f'<div class="tables">{tables}</div>{_clips(folder)}'
    )


def _clips(folder: Path) -> str:
    """Episodes of the latest checks as video, false successes first."""
    found = []
    for path in sorted(folder.glob("[0-9]*/check.json"), reverse=True):
        for episode in read_json(path)["episodes"]:
            if "video" in episode:
                found.append((int(path.parent.name), episode, path.parent / episode["video"]))
    found.sort(key=lambda clip: not (clip[1]["imagined"] and not clip[1]["true"]))
    figures = ""
    for step, episode, path in found[:VIDEOS]:
        wrong = episode["imagined"] != episode["true"]
        style = ' class="missed"' if wrong else ""
        said = f"imagined {outcome(episode['imagined'])}, true {outcome(episode['true'])}"
        figures += (
            f"<figure><figcaption><b>step {step}, simulator seed {episode['sim_seed']}</b> "
            f'<span{style}>{said}</span></figcaption><video controls loop muted playsinline '
            f'poster="{_inline(path.with_suffix(".jpg"), "image/jpeg")}" '
            f'src="{_inline(path, "video/mp4")}"></video></figure>'
        )  # fmt: skip
    if not figures:
        return ""
    return (
        "<h2>Episodes, imagined beside true</h2><p>Same start, same actions. Those that fooled the "
        f'world model come first, and join the data of the next round.</p><div class="pairs">'
        f"{figures}</div>"
    )


def _inline(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _stages(records: Sequence[Record]) -> str:
    rows = ""
    for record in records:
        facts = ", ".join(
            f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int) else
            f"{name.replace('_', ' ')} {value:.3g}"
            for name, value in record.facts.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        )  # fmt: skip
        made = record.made
        rows += (
            f'<tr><td>{record.stage}</td><td class="number">{made["seconds"] / 60:.1f} min</td>'
            f'<td class="number">{made["attempts"]}</td><td>{html.escape(facts)}</td>'
            f"<td><code>{record.digest[:12]}</code></td></tr>"
        )
    head = ("<tr><th>stage</th><th>time</th><th>starts</th><th>what came of it</th>"
            "<th>record</th></tr>")  # fmt: skip
    return (
        f"<h2>The ledger</h2><table>{head}{rows}</table>"
        '<p class="faint">Time is that of the start which finished the stage.</p>'
    )


def write_report(ledger: Ledger, r: int) -> Path:
    """Write report.html of a finished round; returns its path."""
    records = [record for record in ledger.records if record.round == r]
    by_stage = {record.stage: record for record in records}
    evaluation, decision = by_stage["evaluate"].facts, by_stage["decide"].facts
    said = "accepted" if decision["accepted"] else "rolled back"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Round {r}</title><style>{STYLE}</style></head><body><h1>Round {r}: {said}</h1>"
        f"<p>{cell(evaluation)} true success over {evaluation['episodes']} unseen start states; "
        f"the best before: {decision['best_before']:.1%}.</p>"
        f"{_rounds(ledger, r)}"
        f"{_learning(by_stage['improve'], by_stage.get('fine-tune'), evaluation)}"
        f"{_alarm(by_stage['improve'], ledger.round_folder(r) / 'improve/alarm')}"
        f"{_stages(records)}</body></html>\n"
    )
    path = ledger.round_folder(r) / "report.html"
    atomic_write_text(path, page)
    return path
