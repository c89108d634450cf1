"""`worldloop bench rollout`: the published procedure against the engine, arms in turn.

    A0   as published, around diffusers' own network: guidance pass included, 72 passes a chunk
    A1   A0 without the guidance pass, which changes nothing: 36 passes
    A2   A1 through torch.compile
    B    the engine, the same 35 steps and one more evaluation
    C4 C2 C1     the engine's streaming sampler: 4, 2 or 1 steps and the pass that commits
    C4p C2p C1p  the same, decoding only the frame that the policy sees

Same weights, noise, sigma schedule, actions and shapes, in one process, arm after arm in every
round. B over A2 is engineering, C over B another algorithm: the two are never mixed. Nothing is
printed before the arms' latents agree in fp32.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worldloop.bench import timing
from worldloop.bench.arms import (
    ARMS,
    PASSES,
    TOLERANCES,
    Arm,
    Episodes,
    VAECost,
    exact_products,
    gate,
    require_compiled_equal,
    require_equal,
    vae_costs,
)
from worldloop.bench.parts import Parts, engine_shares
from worldloop.bench.published import PublishedDiT
from worldloop.bench.worlds import bench_world, check_preset, default_preset
from worldloop.cli import parse_config
from worldloop.config import positive
from worldloop.engine.backends import BACKENDS, wrap_world
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError

RATIOS = (("A1", "A0"), ("A2", "A1"), ("B", "A0"), ("B", "A1"), ("B", "A2"), ("C4", "B"),
          ("C4", "A0"), ("C4p", "A0"), ("C1p", "A0"))  # fmt: skip


@dataclass(frozen=True)
class RolloutBench:
    """Time whole chunks, published procedure and engine in turn; write bench JSON."""

    out: Path = Path("runs/bench")
    preset: str | None = None
    """tiny (trained) or 2b, 14b (random weights); without it 2b on a GPU, else tiny."""
    picture: tuple[int, int] | None = None
    """Height and width in pixels, for 2b and 14b: 256 256 where none is given."""
    arms: tuple[str, ...] = ARMS
    reference_batches: tuple[int, ...] = (1,)
    """Batch sizes of A0, A1, A2 and B."""
    batches: tuple[int, ...] = (1, 4)
    """Batch sizes of the streaming arms."""
    rounds: int = 7
    per_round: int = 1
    """Repeats of a streaming arm in each round; the others run once."""
    compile: bool = True
    """Run A2, whose compilation takes a while (its time is given apart)."""
    backend: str | None = None
    """The engine's back end (docs/backends.md); without it cudagraph on a GPU, else eager."""
    attention: str | None = None
    """The engine's attention: auto, or a name; without it torch's own."""
    gate_procedure: bool = True
    """Compare whole chunks of 35 steps in fp32, not only one pass of the network."""
    shares: bool = True
    """Measure DiT, VAE and policy inside whole rollouts with a policy."""
    shares_batch: int = 8
    dtype: str | None = None
    """float32 or bfloat16; without it bfloat16 on a GPU, else float32."""
    threads: int = 2
    device: str | None = None

    def __post_init__(self) -> None:
        check_preset(self.preset)
        for name in self.arms:
            if name not in ARMS:
                raise UserError(f"arms: {name!r} is unknown; known: {', '.join(ARMS)}")
        if self.backend is not None and ":" not in self.backend and self.backend not in BACKENDS:
            raise UserError(f"backend is {self.backend!r}; known: {', '.join(BACKENDS)}")
        positive(self, "rounds", "per_round", "threads", "shares_batch")
        if min((*self.reference_batches, *self.batches)) < 1:
            raise UserError("reference_batches and batches must be at least 1")


# One batch size ----------------------------------------------------------------------------------


class Bench:
    """The two worlds (plain and behind the back end), the published networks, what fits."""

    def __init__(
        self, config: RolloutBench, plain: WorldModel, world: WorldModel, network: PublishedDiT
    ) -> None:
        self.config, self.plain, self.world = config, plain, world
        self.device = plain.device
        self.networks = {"A1": network}
        self.wanted = [a for a in config.arms if a != "A2" or config.compile]
        if "A2" in self.wanted:
            self.networks["A2"] = PublishedDiT(plain.dit).compile()
        self.costs = vae_costs(plain)
        self.too_large: set[str] = set()  # arms that ran out of memory at a smaller batch

    def batch(self, rows: int, ceilings: timing.Ceilings) -> list[dict[str, Any]]:
        """Warm the arms of one batch size, time them in turn, and look at each once more."""
        config, device = self.config, self.device
        found: dict[str, dict[str, Any]] = {}
        arms: dict[str, Arm] = {}
        streaming: Episodes | None = None
        for name in self.wanted:
            sizes = config.reference_batches if name in PASSES else config.batches
            if rows not in sizes or name in self.too_large:
                continue
            found[name] = {"arm": name, "batch": rows}
            try:
                if name[0] == "C":
                    episodes = streaming = streaming or Episodes(self.world, rows, history=True)
                else:
                    episodes = Episodes(self.plain, rows, history=False)
                arms[name], warmed = self.arm(name, episodes)
                found[name] |= warmed
            except torch.cuda.OutOfMemoryError:
                pass  # cleaned up below: while it is handled, it holds the arm's tensors
            if name not in arms:
                self.out_of_memory(found[name])
                if streaming is not None and name[0] == "C":
                    streaming.restart()  # they stopped half-way
                    for other in [a for a in arms.values() if a.streams][:1]:
                        warm(other, device)
        times = {name: timing.Times() for name in arms}
        for _ in range(config.rounds):
            for name, arm in arms.items():
                for _ in range(config.per_round if arm.streams else 1):
                    times[name].add(arm, device)
        ceilings.measure()
        for name, arm in arms.items():
            row = results_of(arm, times[name], found[name], self.costs[name], ceilings.gemm)
            if name not in ("A0", "A2"):  # A0 is twice A1; a profile of it takes minutes
                row["launches"] = timing.launches(arm, device)
            print(line_of(row), flush=True)
        return list(found.values())

    def arm(self, name: str, episodes: Episodes) -> tuple[Arm, dict[str, Any]]:
        """An arm that has run every shape, and what `warm` found."""
        world = self.plain if name[0] == "A" else self.world
        arm = Arm(name, world, self.networks.get(name, self.networks["A1"]), episodes)
        found = warm(arm, self.device)
        if name == "A2":
            two = self.networks["A2"], self.networks["A1"]
            found["forward_against_a1"] = require_compiled_equal(world, *two, arm.rows)
        return arm, found

    def out_of_memory(self, row: dict[str, Any]) -> None:
        """Note it in the row, leave the arm out of larger batches, give the memory back."""
        row["out_of_memory"] = True
        self.too_large.add(row["arm"])
        print(f"{row['arm']:>4} batch {row['batch']}: out of memory", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def warm(arm: Arm, device: torch.device) -> dict[str, Any]:
    """Fill the history and run every shape; the first chunk's seconds and the last one's memory."""
    first = timing.time_once(arm, device)[0]
    full = arm.world.config.sink + arm.world.config.window
    for _ in range(1 + -(-full // arm.world.config.block) if arm.streams else 0):
        arm()
    return {"first_s": first, "memory": timing.peak_memory(arm, device)}


def results_of(
    arm: Arm, times: timing.Times, row: dict[str, Any], cost: VAECost, gemm: float
) -> dict[str, Any]:
    """The row of one arm: rates, shares of the ceiling, where its time goes."""
    frames = arm.rows * arm.world.action_spec.chunk
    vae = arm.rows * cost.flops
    parts = Parts(arm.world, arm.network)
    with parts:
        total = timing.time_once(arm, arm.world.device)[0]
    split = {**parts.seconds, "total": total}
    row |= times.to_dict()
    row |= {
        "frames_per_s": frames / times.p50,
        "dit_tflop": arm.flops / 1e12,
        "vae_tflop": vae / 1e12,
        "dit_gb": arm.moved(arm.world.dit.dtype.itemsize) / 1e9,
        "vae_gb": arm.rows * cost.moved / 1e9,
        "mfu": (arm.flops + vae) / times.p50 / gemm,
        "dit_mfu": arm.flops / split["dit"] / gemm,
        "vae_tflops": vae / split["vae"] / 1e12,
        "split_s": split,
    }
    if arm.name == "A2":
        row["compile_s"] = row["first_s"] - times.p50
    return row


def speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios of frames/s, of arms at the same batch size only."""
    rate = {(r["arm"], r["batch"]): r["frames_per_s"] for r in rows if "frames_per_s" in r}
    return [
        {"arm": a, "over": b, "batch": rows_, "times": rate[a, rows_] / rate[b, rows_]}
        for a, b in RATIOS
        for rows_ in sorted({batch for _, batch in rate})
        if (a, rows_) in rate and (b, rows_) in rate
    ]


# Whole -------------------------------------------------------------------------------------------


def bench(config: RolloutBench) -> dict[str, Any]:
    """Measure; the document that is written."""
    torch.set_num_threads(config.threads)
    device = timing.device_of(config.device)
    dtype = timing.dtype_of(config.dtype, device)
    preset = default_preset(config.preset, device)
    backend = config.backend or ("cudagraph" if device.type == "cuda" else "eager")
    plain = bench_world(preset, config.picture, device, torch.float32)
    networks = {"A1": PublishedDiT(plain.dit)}
    world = wrap_world(plain, backend, attention=config.attention)
    with exact_products():
        found_gate = gate(plain, world, networks["A1"], config.gate_procedure)
    require_equal(found_gate, torch.float32)
    print(f"gate, fp32: {found_gate}", flush=True)
    parity = found_gate
    if dtype != torch.float32:
        networks.clear()
        del world  # its captured graphs hold the fp32 weights
        gc.collect()
        plain = plain.to(dtype)
        networks = {"A1": PublishedDiT(plain.dit)}
        world = wrap_world(plain, backend, attention=config.attention)
        parity = gate(plain, world, networks["A1"], config.gate_procedure)
        print(f"parity, {timing.dtype_name(dtype)}: {parity}", flush=True)
        require_equal(parity, dtype)
    runs = Bench(config, plain, world, networks["A1"])
    ceilings = timing.Ceilings(dtype, device).measure()
    rows: list[dict[str, Any]] = []
    for batch in sorted({*config.reference_batches, *config.batches}):
        rows += runs.batch(batch, ceilings)
        gc.collect()
    values = {
        "preset": preset,
        "picture": list(world.config.picture),
        "dtype": timing.dtype_name(dtype),
        "backend": backend,
        "attention": config.attention or "torch",
        "gate_fp32": found_gate,
        "parity": parity,
        "tolerance": TOLERANCES[torch.float32],
        "ceilings": ceilings.to_dict(),
        "arms": rows,
        "speedups": speedups(rows),
    }
    if config.shares:
        del runs
        values["shares"] = engine_shares(world, preset, config.shares_batch, device, dtype)
    packages = ("diffusers", "triton", "numpy")
    return timing.document("rollout", config, device, config.threads, values, packages)


def line_of(row: dict[str, Any]) -> str:
    """One printed line of an arm."""
    return (
        f"{row['arm']:>4} batch {row['batch']:<3} {row['p50_s']:8.3f} s a chunk "
        f"(p95 {row['p95_s']:.3f}), {row['frames_per_s']:8.1f} frames/s, MFU {row['mfu']:.0%}"
    )


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(RolloutBench, argv, "worldloop bench rollout")
    found = bench(config)
    height, width = found["picture"]
    name = f"rollout-{found['preset']}-{height}x{width}"
    if config.backend is not None:  # beside, not over, the default's results
        name += f"-{config.backend.replace(':', '-')}"
    path = timing.write(config.out, name, found)
    for ratio in found["speedups"]:
        print(f"{ratio['arm']} / {ratio['over']}, batch {ratio['batch']}: {ratio['times']:.2f}x")
    if config.shares:
        print(f"outside DiT, VAE and policy: {found['shares']['outside']:.1%} of a rollout")
    print(path)
    return 0
