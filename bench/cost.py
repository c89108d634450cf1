"""What reinforcement learning of one task costs: GPU hours from parts, measured or computed.

A workload is N optimisation steps, each over so many episodes of so many chunks. A chunk costs the
world model once, the policy's forward pass once and its update once (three forward passes' FLOPs).
Measured parts come from the benchmarks' files; computed ones are counted FLOPs and bytes over the
rates of `roofline.H200` (a floor) and `roofline.PLAN` (an estimate). They are never added up into
one figure without saying so.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worldloop.bench.markdown import device_name, number, table
from worldloop.bench.policy import policy_flops
from worldloop.bench.roofline import H200, PLAN, Rates, dit_pass
from worldloop.bench.worlds import (
    NULL_TEXT_TOKENS,
    VAEWork,
    bench_config,
    latent_sides,
    meta_world,
    vae_flops,
)
from worldloop.engine.policy.openvla_oft import OpenVLAConfig
from worldloop.engine.world_config import WorldModelConfig

STEPS = 100  # optimisation steps
CHUNKS = 12  # chunks of an episode: 288 frames
GROUPS = {"8 x 8": 64, "64 x 8": 512}  # start states x members: episodes a step
UPDATE = 3  # forward passes that an update costs
UPDATE_RATE = 400e12  # FLOP/s that training a 7b policy is planned with
PROMPT = 30  # tokens
PAPER_HOURS = 30


@dataclass(frozen=True)
class Part:
    """Seconds of one chunk of one episode, and where they come from."""

    name: str
    seconds: float
    source: str  # "measured: file" or "computed: how"

    def hours(self, episodes: int) -> float:
        """Device hours of the whole workload with so many episodes a step."""
        return STEPS * episodes * CHUNKS * self.seconds / 3600


def measured(documents: Mapping[str, Mapping[str, Any]], device: str) -> dict[str, list[Part]]:
    """Parts by preset, picture and back end of every rollout file of that device ("cpu" or "gpu").

    For each arm the batch size with the most frames a second.
    """
    found: dict[str, list[Part]] = {}
    for name, document in documents.items():
        if document["bench"] != "rollout" or not name.endswith(f"-{device}.json"):
            continue
        height, width = document["picture"]
        label = f"{document['preset']}, {height}x{width}, {document['backend']}"
        if label in found:  # two runs of one kind are not one sum
            label += f" ({name})"
        parts = found.setdefault(label, [])
        best: dict[str, Mapping[str, Any]] = {}
        for row in document["arms"]:
            if "p50_s" in row:
                old = best.get(row["arm"])
                if old is None or row["frames_per_s"] > old["frames_per_s"]:
                    best[row["arm"]] = row
        for arm, row in best.items():
            label = f"world model, {arm} (batch {row['batch']})"
            parts.append(Part(label, row["p50_s"] / row["batch"], f"measured: {name}"))
        policy = documents.get(
            f"policy-{'tiny' if document['preset'] == 'tiny' else '7b'}-{device}.json"
        )
        if policy is not None:
            seconds = policy["ms_per_observation_with_image_chain"] / 1000
            source = f"policy-{policy['preset']}-{device}.json"
            parts.append(Part("policy forward", seconds, f"measured: {source}"))
            parts.append(
                Part("policy update", UPDATE * seconds, f"computed: {UPDATE} forward passes")
            )
    return found


def computed(picture: tuple[int, int], rates: Rates) -> list[Part]:
    """Parts of the 2b preset with a 7b policy on one GPU of those rates, at a large batch."""
    config, rows, item = bench_config("2b", picture), 32, 2
    vae = _vae_flops(picture)
    full = config.sink + config.window
    reference = dit_pass(config, config.block + 1, 0, rows, item).seconds(rates) / rows
    streaming = dit_pass(config, config.block, full, rows, item).seconds(rates) / rows
    text = _null_text_seconds(config, rates)
    published = (vae["clip"] + vae["encode"]) / rates.vae
    how = "computed: counted FLOPs and bytes over the rates"
    policy = policy_flops(OpenVLAConfig(chunk=config.action_spec.chunk), PROMPT)
    return [
        Part("world model, as published (A0)", 72 * (reference + text) + published, how),
        Part("world model, same steps (B)", 36 * reference + published, how),
        Part("world model, 4 steps (C4)", 5 * streaming + vae["decode"] / rates.vae, how),
        Part("world model, 4 steps (C4p)", 5 * streaming + vae["decode_last"] / rates.vae, how),
        Part("world model, 1 step (C1p)", 2 * streaming + vae["decode_last"] / rates.vae, how),
        Part("policy forward", policy / rates.gemm, how),
        Part("policy update", UPDATE * policy / UPDATE_RATE,
             f"computed: {UPDATE} forward passes at {UPDATE_RATE / 1e12:.0f} TFLOP/s"),
    ]  # fmt: skip


@functools.cache
def _vae_flops(picture: tuple[int, int]) -> dict[VAEWork, int]:
    world = meta_world(bench_config("2b", picture))
    works: tuple[VAEWork, ...] = ("encode", "decode", "decode_last", "clip")
    return {work: vae_flops(world, work) for work in works}


def _null_text_seconds(config: WorldModelConfig, rates: Rates) -> float:
    """Of one row's pass: cross-attention to the null text and its modulation."""
    frames, (h, w) = config.block + 1, latent_sides(config)
    with_text = config.dit.flops(frames, h, w, context_tokens=NULL_TEXT_TOKENS)
    return (with_text - config.dit.flops(frames, h, w)) / rates.gemm


def total_hours(parts: Sequence[Part], world: str, episodes: int) -> float:
    """Hours of the world model's part whose name starts so, and of the policy's parts."""
    chosen = [p for p in parts if p.name.startswith((world, "policy"))]
    return sum(p.hours(episodes) for p in chosen)


# The page -----------------------------------------------------------------------------------------

COST = f"""# What one task costs

Made by `worldloop bench report`. The workload is a choice of ours: {STEPS} optimisation steps,
{CHUNKS} chunks ({24 * CHUNKS} frames) an episode, groups of 8 over 8 or 64 start states.
Hours are of one device, all parts one after the other; nothing is modelled of communication between
devices, of episodes that end early or of groups that are thrown away. **Measured** parts are timed
by a run whose file is named; **computed** ones are arithmetic, and say so.
"""

PAPER = f"""## Against the paper

The paper reports {PAPER_HOURS} hours of reinforcement learning for one task within 50
optimisation steps, and about 7 seconds for a batched generation of 24 frames on a node of H100
GPUs. It does not say how many episodes a step has, how many GPUs the node has, how large a batch
is, or at which resolution. {PAPER_HOURS} h at 7 s are at most
{PAPER_HOURS * 3600 // 7:,} batched chunks; how many episodes that is depends on the batch.
**So no speed-up over the {PAPER_HOURS} hours can be claimed**, from any figure on this page:
the workloads are not known to be the same. What can be compared is the published *procedure* with
ours on the same workload and device: rows A0 and C above.
"""


def cost_rows(parts: Sequence[Part]) -> list[list[str]]:
    """Each part, and the whole with the published procedure and with the engine's cheapest."""
    rows = [
        [p.name, number(1000 * p.seconds), *(number(p.hours(n)) for n in GROUPS.values()),
         p.source]
        for p in parts
    ]  # fmt: skip
    names = [p.name for p in parts]
    for arm in ("A0", "C4p"):
        world = next((n for n in names if n.startswith(f"world model, {arm} ")), None)
        if world is not None and "policy update" in names:
            hours = [number(total_hours(parts, world, n)) for n in GROUPS.values()]
            rows.append([f"**all, with {arm}**", "", *hours, "measured, the update computed"])
    return rows


def cost_page(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole of docs/cost.md."""
    head = ["part", "ms a chunk and episode", *(f"h, {g}" for g in GROUPS), "source"]
    lines = [COST]
    gpu = measured(documents, "gpu")
    if gpu:
        lines += ["## On a GPU, measured", ""]
        for name, parts in gpu.items():
            lines += [f"### {name}", "", *table(head, cost_rows(parts)), ""]
    else:
        lines += [
            "## On a GPU",
            "",
            "**Not measured: no GPU run is committed.** Everything about `2b` below is computed.",
            "",
        ]
    lines += [
        "## `2b` with a 7b policy on one H200, computed",
        "",
        "Counted FLOPs and bytes over rates. *Floor*: "
        f"{H200.gemm / 1e12:.0f} TFLOP/s for matrix products, {H200.copy / 1e12:.1f} TB/s for "
        "copies (measured once on such a card, not by the runs here), "
        f"{H200.attention / 1e12:.0f} TFLOP/s for attention (an assumption), the autoencoder at "
        f"the matrix-product rate. *Plan*: {PLAN.gemm / 1e12:.0f}, {PLAN.copy / 1e12:.1f} TB/s, "
        f"{PLAN.attention / 1e12:.0f} and {PLAN.vae / 1e12:.0f} TFLOP/s, an estimate of what a "
        "tuned program reaches. Neither is a measurement.",
        "",
    ]
    for picture in ((256, 256), (480, 640)):
        floor, plan = (computed(picture, rates) for rates in (H200, PLAN))
        columns = ["part", *(f"h, {g}: floor / plan" for g in GROUPS)]
        body = [
            [a.name, *(f"{number(a.hours(n))} / {number(b.hours(n))}"
                       for n in GROUPS.values())]
            for a, b in zip(floor, plan, strict=True)
        ]  # fmt: skip
        for label, start in (
            ("**all, as published (A0)**", "world model, as published"),
            ("**all, 4 steps (C4p)**", "world model, 4 steps (C4p)"),
        ):
            sums = [
                f"{number(total_hours(floor, start, n))} / {number(total_hours(plan, start, n))}"
                for n in GROUPS.values()
            ]
            body.append([label, *sums])
        lines += [f"### {picture[0]}x{picture[1]}", "", *table(columns, body), ""]
    for name, parts in measured(documents, "cpu").items():
        machine = next(
            d["machine"] for d in documents.values()
            if d["bench"] == "rollout" and d["machine"]["gpu"] is None
        )  # fmt: skip
        lines += [
            f"## `{name}` on a CPU, measured",
            "",
            f"{device_name(machine)}. Hours of that machine; each row at "
            "the batch size that gave the most frames a second.",
            "",
            *table(head, cost_rows(parts)),
            "",
        ]
    lines += [PAPER]
    return "\n".join(lines).rstrip() + "\n"
