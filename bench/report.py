"""`worldloop bench report`: docs/speed.md, docs/cost.md and the roofline pictures from results.

Every figure on the pages comes from a file in bench/results, or is marked as computed. A page is
written anew each time: to change a sentence, change it here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldloop.bench.compare import IDENTITY
from worldloop.bench.cost import cost_page
from worldloop.bench.markdown import device_name, number, table
from worldloop.bench.roofline import draw, points_of
from worldloop.cli import parse_config
from worldloop.config import read_json
from worldloop.errors import UserError
from worldloop.files import atomic_write_text

Document = Mapping[str, Any]

# What issue and roofline ask for: (device, preset, picture, what, value in the file, least).
CPU_TARGETS = (("B", "A0", 2.2), ("C4", "A0", 8.0))
GPU_TARGETS = (("B", "A2", 1.25), ("C4", "A0", 10.0))
OUTSIDE = 0.10


@dataclass(frozen=True)
class Report:
    """Write the speed and cost pages from benchmark results."""

    results: Path = Path("runs/bench")
    docs: Path = Path("runs/bench")
    """Folder of the pages, speed.md and cost.md, and of their pictures."""


def read_results(folder: Path) -> dict[str, Document]:
    """Every bench document of a folder by file name. Raises UserError where there is none."""
    found: dict[str, Document] = {p.name: read_json(p) for p in sorted(folder.glob("*.json"))}
    if not found:
        raise UserError(f"{folder}: holds no results; run `worldloop bench rollout` first")
    for name, document in found.items():
        if "bench" not in document or "machine" not in document:
            raise UserError(f"{folder / name}: not a benchmark's result; move it elsewhere")
    return found


def where(document: Document) -> str:
    """One line: what ran, on what."""
    machine, versions = document["machine"], document["versions"]
    native = "; kernels/csrc loaded" if versions.get("native") == "loaded" else ""
    ran = f"torch {versions['torch']}{native}"
    return f"{device_name(machine)}; {ran}; commit `{document['commit']}`"


# speed.md ----------------------------------------------------------------------------------------

FLOOR = (
    "*Floor: the operator's least bytes or FLOPs at the copy or product rate of this run. Above "
    "100 %: the case fits into caches. Implementation `reference` is plain torch, what a CPU runs.*"
)

SPEED = """# Speed

Made by `worldloop bench report` from the files in [bench/results](../bench/results). No figure here
is without the run that made it.

Rules of the measurement: same weights, noise, sigma schedule, actions and shapes for all arms; one
process; arms in turn in every round (ABAB...); warm; random or real data, never zeros; matrix
product and copy ceilings measured before and after in the same run; compile time apart. Before any
speed the arms' latents must agree to a relative L2 of 1e-3 in fp32. `worldloop bench compare OLD
NEW` fails where a new run is slower than an old one.

- **A0**: as published, around diffusers' own `CosmosTransformer3DModel`: 35 steps and one more
  evaluation, each with its guidance pass (72 passes); the whole clip decoded, the last frame
  encoded again.
- **A1**: A0 without the guidance pass, whose inputs are those of the other one: exact.
- **A2**: A1 through `torch.compile`.
- **B**: the engine, the same 36 evaluations, equal output.
- **C4, C2, C1**: the engine's streaming sampler: 4, 2 or 1 steps, and the pass that commits the
  chunk to the history (full: 13 latent frames).
- **C4p, C2p, C1p**: the same, decoding only the frame that the policy sees next (exact).

B over A is engineering, C over B is another algorithm (few steps against a cached history, for
which the weights must be trained); the pages never multiply the two. diffusers' network has no
action embedder: the arms add the embedding of each latent frame's poses to its time embedding, as
the published pipeline does. Two things in A are diffusers' own: it repeats a frame's timestep for
each token and so computes the modulation per token, and, where the model has cross-attention, it
attends to 512 null tokens. `tiny` has no cross-attention, so its A arms have none either. The
autoencoder, the reward head and the solver are the engine's own in all arms, so what they gained
does not show in B over A; behind a back end that captures graphs, B and C replay the autoencoder as
one, and A calls it.

MFU: counted FLOPs of DiT and autoencoder over time and the measured matrix-product ceiling; DiT MFU
is that of the DiT alone. A convolution may pass 100 %: it can do with fewer multiplications than
are counted. The split is timed call by call in one more chunk.
"""


def rollout_section(name: str, document: Document) -> list[str]:
    """One rollout file: gate, arms, speed-ups, shares, picture."""
    height, width = document["picture"]
    ceilings, gate = document["ceilings"], document["gate_fp32"]
    checked = {k: v for k, v in gate.items() if k != "policy_frame"}
    lines = [
        f"## Rollout: `{document['preset']}`, {height}x{width}, {document['dtype']}",
        "",
        f"[{name}](../bench/results/{name}): {where(document)}; engine back end "
        f"`{document['backend']}`, attention `{document['attention']}`. Ceilings in this run: "
        f"{number(ceilings['gemm_tflops'])} TFLOP/s, {number(ceilings['copy_gb_per_s'])} GB/s.",
        "",
        "Gate, fp32, relative L2 of the engine against diffusers: "
        + ", ".join(f"{k.replace('_', ' ')} {v:.1e}" for k, v in checked.items())
        + ("" if "chunk" in gate else " (whole chunks were not compared in this run)")
        + ".",
        "",
    ]
    rows = []
    for row in document["arms"]:
        if "p50_s" not in row:
            rows.append([row["arm"], str(row["batch"]), "out of memory", *[""] * 8])
            continue
        split, launches = row["split_s"], row.get("launches") or {}
        memory = row["memory"].get("peak_gib") or row["memory"].get("process_peak_gib")
        rows.append(
            [
                row["arm"],
                str(row["batch"]),
                number(row["p50_s"]),
                number(row["p95_s"]),
                number(row["frames_per_s"]),
                f"{row['mfu']:.0%}",
                f"{row['dit_mfu']:.0%}",
                number(row["vae_tflops"]),
                f"{split['dit'] / split['total']:.0%} / {split['vae'] / split['total']:.0%}",
                f"{next(iter(launches.values())):,}" if launches else "",
                number(memory),
            ]
        )
    gpu = document["machine"]["gpu"]
    head = ["arm", "batch", "s/chunk p50", "p95", "frames/s", "MFU", "DiT MFU", "VAE TFLOP/s",
            "DiT / VAE time", "kernels" if gpu else "torch operators",
            "peak GiB" if gpu else "process peak GiB"]  # fmt: skip
    lines += table(head, rows)
    compiled = [r for r in document["arms"] if "compile_s" in r]
    for row in compiled:
        lines += [
            "",
            f"Compilation of A2 at batch {row['batch']}, apart: {number(row['compile_s'])} s.",
        ]
    lines += ["", *table(["speed-up", "batch", "times"], speedup_rows(document))]
    lines += ["", *target_lines(document)]
    picture = roofline_name(name)
    lines += [
        "",
        f"![roofline](img/{picture})",
        "",
        "*Bytes are the least that must move (weights once a pass, history, elementwise work "
        "fused); the roof is what this machine did in this run.*",
        "",
    ]
    return lines


def speedup_rows(document: Document) -> list[list[str]]:
    return [
        [f"{r['arm']} over {r['over']}", str(r["batch"]), f"{r['times']:.2f}"]
        for r in same_batch(document)
    ]


def same_batch(document: Document) -> list[Mapping[str, Any]]:
    """The speed-ups of arms at one batch size; older files also have those of each arm's best."""
    return [r for r in document["speedups"] if r["batch"] != "best"]


def target_lines(document: Document) -> list[str]:
    """Each target, met or missed."""
    targets: tuple[tuple[str, str, float], ...] = ()
    if document["preset"] == "tiny" and document["machine"]["gpu"] is None:
        targets = CPU_TARGETS
    elif document["preset"] == "2b" and document["machine"]["gpu"]:
        targets = GPU_TARGETS
    lines = []
    for arm, over, least in targets:
        found = [r for r in same_batch(document) if (r["arm"], r["over"]) == (arm, over)]
        if not found:
            lines.append(f"- {arm} at least {least}x {over}: not measured in this run.")
            continue
        batch, times = found[-1]["batch"], found[-1]["times"]  # the largest that both ran
        verdict = "met" if times >= least else "**missed**"
        lines.append(f"- {arm} at least {least}x {over}: {times:.2f}x at batch {batch}, {verdict}.")
    shares = document.get("shares")
    if shares:
        part = shares["seconds"]
        total = shares["total_s"]
        verdict = "met" if shares["outside"] <= OUTSIDE else "**missed**"
        lines.append(
            f"- Outside DiT, VAE and policy at most {OUTSIDE:.0%} of a rollout: "
            f"{shares['outside']:.1%}, {verdict} (`RolloutEngine`, batch {shares['batch']}, "
            f"{shares['steps']} steps, policy's frame only: DiT {part['dit'] / total:.0%}, VAE "
            f"{part['vae'] / total:.0%}, policy {part['policy'] / total:.0%}, reward head "
            f"{part['reward'] / total:.1%}; {number(shares['frames_per_s'])} frames/s with the "
            "policy in the loop)."
        )
    return lines


def roofline_name(result: str) -> str:
    return f"roofline-{result.removeprefix('rollout-').removesuffix('.json')}.png"


def rows_section(title: str, name: str, document: Document, key: str) -> list[str]:
    """A file whose list `key` holds timed rows: what tells them apart, and their figures."""
    rows = [row for row in document[key] if "p50_s" in row]
    wrong = [row for row in document[key] if not row.get("passed", True)]
    if not rows and not wrong:
        return []
    first = (rows or wrong)[0]
    labels = [k for k in IDENTITY if k in first]
    shown = [
        ("ms p50", lambda r: number(1000 * r["p50_s"])),
        ("p95", lambda r: number(1000 * r["p95_s"])),
        ("TFLOP/s", lambda r: number(r["tflops"])),
        ("GB/s", lambda r: number(r["gb_per_s"])),
        ("of the GEMM ceiling", lambda r: f"{r['share_of_gemm_ceiling']:.0%}"),
        ("of the floor", lambda r: f"{r['share_of_floor']:.0%}"),
        ("MFU", lambda r: f"{r['mfu']:.0%}"),
        ("frames/s", lambda r: number(r["frames_per_s"])),
        ("DiT share of time", lambda r: f"{r['dit_share']:.0%}"),
    ]
    needed = {"TFLOP/s": "tflops", "GB/s": "gb_per_s", "frames/s": "frames_per_s", "MFU": "mfu",
              "of the GEMM ceiling": "share_of_gemm_ceiling", "of the floor": "share_of_floor",
              "DiT share of time": "dit_share"}  # fmt: skip
    shown = [(h, f) for h, f in shown if needed.get(h, "p50_s") in first]
    body = [[str(row[k]) for k in labels] + [f(row) for _, f in shown] for row in rows]
    return [
        f"## {title}",
        "",
        f"[{name}](../bench/results/{name}): {where(document)}.",
        "",
        *table([*labels, *(h for h, _ in shown)], body),
        "",
        *([FLOOR, ""] if "share_of_floor" in first else []),
        *(
            f"**Wrong, so not timed**: {', '.join(str(row[k]) for k in labels)}: error "
            f"{row['error']:.1e}, at most {row['tolerance']:.1e}.\n"
            for row in wrong
        ),
    ]


def policy_section(name: str, document: Document) -> list[str]:
    chain = ""
    if "frames" in document:  # older files timed frames of the towers' own size
        height, width = document["frames"]
        chain = (
            f", {number(document['ms_per_observation_with_image_chain'])} ms with the image chain "
            f"from {height}x{width}"
        )
    acting = ""
    if "ms_per_episode_acting" in document:
        apart, alike = (
            number(document[f"ms_per_episode_acting{way}"]) for way in ("", "_in_groups")
        )
        acting = (
            f" A chunk's actions take {apart} ms an episode, {alike} ms in groups of 8 that begin "
            "alike: one forward pass, eight draws."
        )
    return [
        f"## Policy: `{document['preset']}`",
        "",
        f"[{name}](../bench/results/{name}): {where(document)}. Batch {document['batch']}, "
        f"{document['dtype']}: {number(document['ms_per_observation'])} ms an observation (p95 "
        f"{number(document['ms_per_observation_p95'])}){chain}; "
        f"{document['share_of_gemm_ceiling']:.0%} of the matrix-product ceiling.{acting}",
        "",
    ]


def speed_page(documents: Mapping[str, Document]) -> str:
    """The whole of docs/speed.md."""
    lines = [SPEED]
    if not any(d["machine"]["gpu"] for d in documents.values()):
        lines += [
            "**No GPU run is committed yet**: the GPU paths and targets of this page are not "
            "measured. `make gpu` on a GPU machine runs them all.",
            "",
        ]
    for name, document in documents.items():
        kind = document["bench"]
        if kind == "rollout":
            lines += rollout_section(name, document)
    for name, document in documents.items():
        kind, preset = document["bench"], document.get("preset")
        if kind == "vae":
            height, width = document["picture"]
            title = f"Autoencoder: `{preset}`, {height}x{width}, {document['dtype']}"
            lines += rows_section(title, name, document, "works")
        elif kind == "train":
            height, width = document["picture"]
            title = (
                f"Training step: `{preset}`, {height}x{width}, {document['dtype']}, "
                f"{document['chunks']} chunks an episode"
            )
            lines += rows_section(title, name, document, "steps")
        elif kind == "policy":
            lines += policy_section(name, document)
        elif kind == "kernels":
            rows = next((k for k, v in document.items() if _is_timed(v)), None)
            if rows is not None:
                lines += rows_section("Kernels", name, document, rows)
    return "\n".join(lines).rstrip() + "\n"


def _is_timed(value: Any) -> bool:
    return isinstance(value, list) and any("p50_s" in row for row in value)


# Whole -------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(Report, argv, "worldloop bench report")
    documents = read_results(config.results)
    for name, document in documents.items():
        points = points_of(document) if document["bench"] == "rollout" else []
        if points:
            height, width = document["picture"]
            title = f"{document['preset']}, {height}x{width}, {document['dtype']}, " + device_name(
                document["machine"]
            )
            path = config.docs / "img" / roofline_name(name)
            draw(points, document["ceilings"], title, path)
            print(path)
    to_results = os.path.relpath(config.results, config.docs)
    for page, text in (("speed.md", speed_page(documents)), ("cost.md", cost_page(documents))):
        text = text.replace("../bench/results", to_results)
        atomic_write_text(config.docs / page, text)
        print(config.docs / page)
    return 0
