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
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from worldloop.bench import timing
from worldloop.bench.parts import Parts, engine_shares
from worldloop.bench.published import PublishedDiT, published_step
from worldloop.bench.roofline import dit_pass, vae_bytes
from worldloop.bench.worlds import (
    VAEWork,
    bench_world,
    check_preset,
    default_preset,
    random_actions,
    reference_flops,
    start_state,
    streaming_flops,
    vae_flops,
)
from worldloop.engine.backends import BACKENDS, wrap_world
from worldloop.engine.world_model import Decode, Steps, WorldModel
from worldloop.errors import UserError

TOLERANCE = 1e-3  # relative L2 of the arms' latents, fp32
ARMS = ("A0", "A1", "A2", "B", "C4", "C4p", "C2", "C2p", "C1", "C1p")
PASSES = {"A0": 72, "A1": 36, "A2": 36, "B": 36}
RATIOS = (("A1", "A0"), ("A2", "A1"), ("B", "A0"), ("B", "A1"), ("B", "A2"), ("C4", "B"),
          ("C4", "A0"), ("C4p", "A0"), ("C1p", "A0"))  # fmt: skip


@dataclass(frozen=True)
class RolloutBench:
    """Time whole chunks, published procedure and engine in turn; write bench JSON."""

    out: Path = Path("bench/results")
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
        timing.positive(self, "rounds", "per_round", "threads", "shares_batch")
        if min((*self.reference_batches, *self.batches)) < 1:
            raise UserError("reference_batches and batches must be at least 1")


# Arms --------------------------------------------------------------------------------------------


class Arm:
    """One way to make a chunk, with its own episodes; each call makes the next chunk.

    world: for the A arms the plain one, for the engine's that of its back end.
    """

    def __init__(self, name: str, world: WorldModel, network: PublishedDiT, rows: int) -> None:
        self.name, self.world, self.network, self.rows = name, world, network, rows
        self.state = start_state(world, rows)
        self.actions = random_actions(world, rows)
        self.steps = int(re.sub(r"\D", "", name)) if name[0] == "C" else 36

    def moved(self, item_bytes: int) -> int:
        """Bytes that the DiT must move for one chunk of the batch, all elementwise work fused."""
        config = self.world.config
        if self.name in PASSES:
            one = dit_pass(config, config.block + 1, 0, self.rows, item_bytes)
            return PASSES[self.name] * one.moved
        history = config.sink + config.window
        one = dit_pass(config, config.block, history, self.rows, item_bytes)
        return (self.steps + 1) * one.moved

    @property
    def flops(self) -> int:
        """Of the DiT for one chunk of the batch, as this arm executes them."""
        config = self.world.config
        if self.name in PASSES:
            published = self.name != "B"
            return self.rows * reference_flops(config, PASSES[self.name], published=published)
        return self.rows * streaming_flops(config, self.steps)

    def __call__(self) -> np.ndarray:
        if self.name[0] == "A":
            _, frames, _, self.state = published_step(
                self.world, self.network, self.state, self.actions, guided=self.name == "A0"
            )
            return frames
        steps: Steps = "reference" if self.name == "B" else self.steps
        decode: Decode = "policy" if self.name.endswith("p") else "all"
        chunk, self.state = self.world.step(self.state, self.actions, steps=steps, decode=decode)
        assert chunk.frames is not None
        return chunk.frames


def relative_l2(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.inference_mode()
def gate(
    plain: WorldModel, world: WorldModel, network: PublishedDiT, procedure: bool
) -> dict[str, Any]:
    """Agreement of the arms in the world's dtype (fp32 for the gate); raises nothing.

    plain: what the A arms use; world: the same weights behind the engine's back end.

    forward: one pass of the network, engine against diffusers. chunk, chunk_guided: latents of a
    whole chunk of the reference procedure against A1 and A0. policy_frame: whether decode="policy"
    gives the last frame of decode="all", as the largest difference of a pixel.
    """
    state, actions = start_state(world, 1), random_actions(world, 1)
    shape = (1, world.config.dit.latent_channels, world.config.block + 1, *world.config.reward.grid)
    generator = torch.Generator(world.device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=world.device)
    t = torch.rand(1, shape[2], generator=generator, device=world.device)
    poses = torch.randn(actions.shape, generator=generator, device=world.device)
    ours = world.dit(x, t, poses, observed_frames=1, return_kv=False).sample
    found: dict[str, Any] = {
        "forward": relative_l2(ours, network(x, t, poses, observed_frames=1)[0])
    }
    if procedure:
        caught: list[Tensor] = []
        hook = world.reward.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        world.step(state, actions, steps="reference")
        hook.remove()
        for name, guided in (("chunk", False), ("chunk_guided", True)):
            latents = published_step(plain, network, state, actions, guided=guided)[0]
            found[name] = relative_l2(caught[0], latents)
    shown = [_last_frame(world, actions, decode) for decode in ("all", "policy")]
    found["policy_frame"] = int(np.abs(shown[0] - shown[1]).max())
    return found


def _last_frame(world: WorldModel, actions: np.ndarray, decode: Decode) -> np.ndarray:
    chunk, _ = world.step(start_state(world, len(actions)), actions, steps=1, decode=decode)
    assert chunk.frames is not None
    return chunk.frames[:, -1].astype(int)


def require_equal(found: dict[str, Any]) -> None:
    """Raise UserError where the arms do not make the same chunk: then no speed is printed."""
    for name in ("forward", "chunk", "chunk_guided"):
        if name in found and not found[name] <= TOLERANCE:
            raise UserError(
                f"the engine and diffusers differ by {found[name]:.1e} ({name}, relative L2, "
                f"fp32; at most {TOLERANCE:.0e}): no speed for unequal work"
            )
    if found["policy_frame"] > 1:
        raise UserError(
            f'decode="policy" differs from decode="all" by {found["policy_frame"]} levels'
        )


# One batch size ----------------------------------------------------------------------------------


def warm(arm: Arm, device: torch.device) -> dict[str, Any]:
    """Fill the history and run every shape; the first chunk's seconds and the last one's memory."""
    first = timing.time_once(arm, device)[0]
    full = arm.world.config.sink + arm.world.config.window
    for _ in range(1 + -(-full // arm.world.config.block) if arm.name[0] == "C" else 0):
        arm()
    return {"first_s": first, "memory": timing.peak_memory(arm, device)}


def measure(
    name: str, arms: dict[tuple[str, int], Arm], make: Callable[[str, int], Arm], rows: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Make and warm one arm; its row so far, with `out_of_memory` where it does not fit."""
    row: dict[str, Any] = {"arm": name, "batch": rows}
    try:
        arm = make(name, rows)
        row |= warm(arm, device)
        arms[name, rows] = arm
    except torch.cuda.OutOfMemoryError:
        row["out_of_memory"] = True
        gc.collect()
        torch.cuda.empty_cache()
    return row


@dataclass(frozen=True)
class VAECost:
    """What one row's chunk asks of the autoencoder."""

    flops: int
    moved: int  # bytes


def vae_costs(plain: WorldModel) -> dict[str, VAECost]:
    """By arm: the clip and the next first frame as published, or a chunk that continues."""
    item = next(plain.autoencoder.parameters()).element_size()
    works: tuple[VAEWork, ...] = ("encode", "decode", "decode_last", "clip")
    one = {work: VAECost(vae_flops(plain, work), vae_bytes(plain, work, item)) for work in works}
    clip, encode = one["clip"], one["encode"]
    published = VAECost(clip.flops + encode.flops, clip.moved + encode.moved)
    found = {}
    for name in ARMS:
        streaming = one["decode_last" if name.endswith("p") else "decode"]
        found[name] = published if name in PASSES else streaming
    return found


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
    """Ratios of frames/s at the same batch size; and of each arm's best to A0's best."""
    rate = {(r["arm"], r["batch"]): r["frames_per_s"] for r in rows if "frames_per_s" in r}
    found = [
        {"arm": a, "over": b, "batch": rows_, "times": rate[a, rows_] / rate[b, rows_]}
        for a, b in RATIOS
        for rows_ in sorted({batch for _, batch in rate})
        if (a, rows_) in rate and (b, rows_) in rate
    ]
    best = {arm: max(v for (a, _), v in rate.items() if a == arm) for arm, _ in rate}
    found += [
        {"arm": a, "over": b, "batch": "best", "times": best[a] / best[b]}
        for a, b in RATIOS
        if a in best and b in best
    ]
    return found


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
    found_gate = gate(plain, world, networks["A1"], config.gate_procedure)
    require_equal(found_gate)
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
    wanted = [a for a in config.arms if a != "A2" or config.compile]
    if "A2" in wanted:
        networks["A2"] = PublishedDiT(plain.dit).compile()
    ceilings = timing.Ceilings(dtype, device).measure()
    costs = vae_costs(plain)

    def make(name: str, rows: int) -> Arm:
        own = plain if name[0] == "A" else world
        return Arm(name, own, networks.get(name, networks["A1"]), rows)

    rows: list[dict[str, Any]] = []
    too_large: set[str] = set()
    for batch in sorted({*config.reference_batches, *config.batches}):
        arms: dict[tuple[str, int], Arm] = {}
        fresh: dict[str, dict[str, Any]] = {}
        for name in wanted:
            sizes = config.reference_batches if name in PASSES else config.batches
            if batch not in sizes or name in too_large:
                continue
            fresh[name] = measure(name, arms, make, batch, device)
            if "out_of_memory" in fresh[name]:
                too_large.add(name)
        times: dict[str, timing.Times] = {name: timing.Times() for name, _ in arms}
        for _ in range(config.rounds):
            for (name, _), arm in arms.items():
                for _ in range(config.per_round if name[0] == "C" else 1):
                    times[name].add(arm, device)
        ceilings.measure()
        for (name, _), arm in arms.items():
            row = results_of(arm, times[name], fresh[name], costs[name], ceilings.gemm)
            if name not in ("A0", "A2"):  # A0 is twice A1; a profile of it takes minutes
                row["launches"] = timing.launches(arm, device)
            print(line_of(row), flush=True)
        rows += fresh.values()
        del arms
        gc.collect()
    values = {
        "preset": preset,
        "picture": list(world.config.picture),
        "dtype": timing.dtype_name(dtype),
        "backend": backend,
        "attention": config.attention or "torch",
        "gate_fp32": found_gate,
        "parity": parity,
        "tolerance": TOLERANCE,
        "ceilings": ceilings.to_dict(),
        "arms": rows,
        "speedups": speedups(rows),
    }
    if config.shares:
        networks.clear()
        values["shares"] = engine_shares(world, preset, config.shares_batch, device, dtype)
    packages = ("diffusers", "triton", "numpy")
    return timing.document("rollout", config, device, config.threads, values, packages)


def line_of(row: dict[str, Any]) -> str:
    """One printed line of an arm."""
    return (
        f"{row['arm']:>4} batch {row['batch']:<3} {row['p50_s']:8.3f} s a chunk "
        f"(p95 {row['p95_s']:.3f}), {row['frames_per_s']:8.1f} frames/s, MFU {row['mfu']:.0%}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    config = tyro.cli(RolloutBench, args=argv, prog="worldloop bench rollout")
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


if __name__ == "__main__":
    raise SystemExit(main())
