"""`worldloop bench vae`: the autoencoder's encode and decode, beside the matrix-product ceiling.

What rollouts ask of it: encode one first frame, encode a chunk of frames that continues a clip,
decode a chunk (every frame, or only the last, which the policy sees), and decode a whole clip as
the published procedure does. FLOPs are counted while it runs. Correctness comes first: the last
frame alone must equal the last frame of all, and a batch must equal its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from worldloop.bench import timing
from worldloop.bench.arms import relative_l2
from worldloop.bench.worlds import (
    VAEWork,
    bench_world,
    check_preset,
    default_preset,
    vae_flops,
    vae_work,
)
from worldloop.cli import parse_config
from worldloop.config import positive
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError

WORKS: tuple[VAEWork, ...] = get_args(VAEWork)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative L2


@dataclass(frozen=True)
class VAEBench:
    """Time encode and decode of the autoencoder; write bench JSON."""

    out: Path = Path("runs/bench")
    preset: str | None = None
    """tiny (the light autoencoder, trained) or 2b (Wan2.1's, random weights)."""
    picture: tuple[int, int] | None = None
    """Height and width in pixels, for 2b: 256 256 where none is given."""
    batches: tuple[int, ...] = (1, 4)
    repeats: int = 7
    window: int | None = None
    """Latent frames per pass of the Wan decoder; without it what the preset says."""
    channels_last: bool = True
    """Keep the Wan autoencoder's weights in channels-last order on a GPU."""
    dtype: str | None = None
    threads: int = 2
    device: str | None = None

    def __post_init__(self) -> None:
        check_preset(self.preset)
        positive(self, "repeats", "threads", "window")
        if min(self.batches) < 1:
            raise UserError("batches must be at least 1")


def gate(world: WorldModel, dtype: torch.dtype) -> dict[str, float]:
    """decode_last against decode, and two clips against each alone; UserError beyond tolerance."""
    every, last = vae_work(world, "decode", 2)(), vae_work(world, "decode_last", 2)()
    found = {"last_frame": relative_l2(last, every[:, :, -1:])}
    vae, config = world.autoencoder, world.config
    shape = (2, config.dit.latent_channels, config.block + 1, *config.reward.grid)
    latents = torch.randn(shape, device=world.device).to(dtype)
    together = vae.decode(latents)[0]
    alone = torch.cat([vae.decode(latents[i : i + 1])[0] for i in range(2)])
    found["rows"] = relative_l2(together, alone)
    for name, value in found.items():
        if not value <= TOLERANCE[dtype]:
            raise UserError(f"the autoencoder's {name} differ by {value:.1e}; no speed for that")
    return found


@torch.inference_mode()
def bench(config: VAEBench) -> dict[str, Any]:
    """Measure; the document that is written."""
    torch.set_num_threads(config.threads)
    device = timing.device_of(config.device)
    dtype = timing.dtype_of(config.dtype, device)
    preset = default_preset(config.preset, device)
    world = bench_world(
        preset, config.picture, device, dtype, window=config.window,
        channels_last=config.channels_last,
    )  # fmt: skip
    parity = gate(world, dtype)
    with torch.inference_mode(False):
        flops = {work: vae_flops(world, work) for work in WORKS}
    ceilings = timing.Ceilings(dtype, device).measure()
    rows: list[dict[str, Any]] = []
    full: set[str] = set()  # kinds of work that ran out of memory at a smaller batch
    for batch in sorted(config.batches):
        runs: dict[VAEWork, Callable[[], Any]] = {}
        try:
            runs = {work: vae_work(world, work, batch) for work in WORKS}
        except torch.cuda.OutOfMemoryError:
            rows.append({"work": "encode", "batch": batch, "out_of_memory": True})
        if not runs:
            torch.cuda.empty_cache()
            break
        memory: dict[str, dict[str, float | None]] = {}
        for work, run in runs.items():
            if work in full:
                continue
            try:
                run()
                memory[work] = timing.peak_memory(run, device)
            except torch.cuda.OutOfMemoryError:
                full.add(work)
                rows.append({"work": work, "batch": batch, "out_of_memory": True})
            if work in full:  # while the error is handled, it holds what ran out
                torch.cuda.empty_cache()
        ready = {work: run for work, run in runs.items() if work in memory}
        times = timing.interleaved(ready, config.repeats, device)
        ceilings.measure()
        for work, run in ready.items():
            rate = flops[work] * batch / times[work].p50
            frames = 1 if work == "encode" else world.action_spec.chunk
            rows.append(
                {
                    "work": work,
                    "batch": batch,
                    **times[work].to_dict(),
                    "tflop": flops[work] * batch / 1e12,
                    "tflops": rate / 1e12,
                    "share_of_gemm_ceiling": rate / ceilings.gemm,
                    "frames_per_s": frames * batch / times[work].p50,
                    "memory": memory[work],
                    "launches": timing.launches(run, device),
                }
            )
    values = {
        "preset": preset,
        "picture": list(world.config.picture),
        "dtype": timing.dtype_name(dtype),
        "parity": parity,
        "ceilings": ceilings.to_dict(),
        "works": rows,
    }
    return timing.document("vae", config, device, config.threads, values, ("triton",))


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(VAEBench, argv, "worldloop bench vae")
    found = bench(config)
    height, width = found["picture"]
    path = timing.write(config.out, f"vae-{found['preset']}-{height}x{width}", found)
    for row in found["works"]:
        if "out_of_memory" in row:
            print(f"{row['work']:>12} batch {row['batch']}: out of memory")
            continue
        print(
            f"{row['work']:>12} batch {row['batch']:<3} {1000 * row['p50_s']:9.1f} ms, "
            f"{row['tflops']:.3g} TFLOP/s = {row['share_of_gemm_ceiling']:.0%} of the ceiling, "
            f"{row['frames_per_s']:.1f} frames/s"
        )
    print(path)
    return 0
