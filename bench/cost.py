"""What reinforcement learning of one task costs: GPU hours from parts, measured or computed.

A workload is N optimisation steps, each over so many episodes of so many chunks. A chunk costs the
world model once, the policy's forward pass once and its update once (three forward passes' FLOPs).
Measured parts come from the benchmarks' files; computed ones are counted FLOPs and bytes over the
rates of `roofline.H200` (a floor) and `roofline.PLAN` (an estimate). They are never added up into
one figure without saying so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worldloop.bench.policy import policy_flops
from worldloop.bench.roofline import Rates, dit_pass
from worldloop.bench.worlds import (
    NULL_TEXT_TOKENS,
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
    """Parts by preset and picture of every rollout file of that device ("cpu" or "gpu").

    For each arm the batch size with the most frames a second.
    """
    found: dict[str, list[Part]] = {}
    for name, document in documents.items():
        if document["bench"] != "rollout" or not name.endswith(f"-{device}.json"):
            continue
        height, width = document["picture"]
        parts = found.setdefault(f"{document['preset']}, {height}x{width}", [])
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
    world = meta_world(config)
    vae = {work: vae_flops(world, work) for work in ("encode", "decode", "decode_last", "clip")}
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


def _null_text_seconds(config: WorldModelConfig, rates: Rates) -> float:
    """Of one row's pass: cross-attention to the null text and its modulation."""
    frames, (h, w) = config.block + 1, latent_sides(config)
    with_text = config.dit.flops(frames, h, w, context_tokens=NULL_TEXT_TOKENS)
    return (with_text - config.dit.flops(frames, h, w)) / rates.gemm


def total_hours(parts: Sequence[Part], world: str, episodes: int) -> float:
    """Hours of the world model's part whose name starts so, and of the policy's parts."""
    chosen = [p for p in parts if p.name.startswith((world, "policy"))]
    return sum(p.hours(episodes) for p in chosen)
