"""`worldloop bench train`: one optimiser step of the world model, beside the matrix ceiling.

The loss, the optimiser and the averaging are those of `worldloop train world-model`; latents are
synthetic, of the real shape (training reads encoded latents, so no autoencoder runs in a step).
MFU counts three forward passes of the DiT for each one (forward, and backward twice that), not
what checkpointing computes again nor the optimiser's own products. Blocks run as they are and,
where that changes no loss, compiled.

Shape letters: B episodes, C latent channels, F latent frames, T actions, A action dim.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldloop.bench import timing
from worldloop.bench.worlds import (
    bench_config,
    check_preset,
    default_preset,
    latent_sides,
    randomise,
)
from worldloop.cli import parse_config
from worldloop.config import positive
from worldloop.engine.backends.compiled import compile_blocks
from worldloop.engine.dit import DiT
from worldloop.engine.precision import autocast
from worldloop.engine.reward import RewardHead
from worldloop.engine.world_config import WorldModelConfig
from worldloop.errors import UserError
from worldloop.training.common import EMA
from worldloop.training.latents import Batch
from worldloop.training.optimizer import MuonAdamW
from worldloop.training.world_loss import Trainee, training_flops, training_loss
from worldloop.training.world_model import WorldModelTraining

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of a loss, once blocks are compiled


@dataclass(frozen=True)
class TrainBench:
    """Time training steps of the world model on synthetic latents; write bench JSON."""

    out: Path = Path("runs/bench")
    preset: str | None = None
    """tiny, 2b or 14b; without it 2b on a GPU, else tiny."""
    picture: tuple[int, int] | None = None
    """Height and width in pixels, for 2b and 14b: 256 256 where none is given."""
    batch: int | None = None
    """Episodes a step; 2 on a GPU (halved while it does not fit), else 4."""
    chunks: int = 2
    """Chunks of an episode."""
    repeats: int = 5
    checkpoint: bool | None = None
    """Compute blocks again in the backward pass; without it only for the large presets."""
    compile: bool = True
    """Time the step with compiled blocks, too (`worldloop train world-model --compile`)."""
    precision: str = "auto"
    """bf16 (autocast), fp32, or auto: bf16 where the machine has it."""
    threads: int = 2
    device: str | None = None

    def __post_init__(self) -> None:
        check_preset(self.preset)
        positive(self, "batch", "chunks", "repeats", "threads")


def synthetic_batch(
    config: WorldModelConfig, rows: int, chunks: int, device: torch.device
) -> Batch:
    """Random latents, poses, rewards and loss weights of the shapes that training sees."""
    generator = torch.Generator(device).manual_seed(0)
    h, w = latent_sides(config)
    frames, spec = config.block * chunks, config.action_spec

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return Batch(
        latents=normal(rows, config.dit.latent_channels, 1 + frames, h, w),
        poses=normal(rows, spec.chunk * chunks, spec.dim),
        reward=(normal(rows, spec.chunk * chunks) > 0).float(),
        weight=1 + normal(rows, 1, frames, h, w).abs(),
    )


@dataclass
class Split:
    """Seconds of one step's stages; each ends with the device idle."""

    device: torch.device
    seconds: dict[str, float]

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        timing.synchronise(self.device)
        since = time.perf_counter()
        result = work()
        timing.synchronise(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since
        return result


@contextmanager
def timed_forward(dit: DiT, split: Split) -> Iterator[None]:
    """Within the block, the DiT's forward passes are timed as `dit_forward`."""
    own = dit.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return split.run("dit_forward", lambda: own(*args, **kwargs))

    dit.__dict__["forward"] = forward
    try:
        yield
    finally:
        dit.__dict__["forward"] = own


class Trainer:
    """A model with its optimiser and averages, and one fixed batch."""

    def __init__(
        self, config: TrainBench, world: WorldModelConfig, rows: int, device: torch.device
    ) -> None:
        unused, large = Path("synthetic"), world.dit.learned_positions is None
        self.checkpoint = large if config.checkpoint is None else config.checkpoint
        self.settings = WorldModelTraining(
            data=(unused,), autoencoder=unused, out=unused, checkpoint_blocks=self.checkpoint
        )
        self.world, self.config, self.device = world, config, device
        with torch.device("meta"):
            model = Trainee(DiT(world.dit), RewardHead(world.reward))
        self.model = model.to_empty(device=device)
        randomise(self.model)
        self.optimizer = MuonAdamW(self.model, self.settings)
        self.optimizer.schedule(100, 10_000)  # past the warm-up
        self.ema = EMA(self.model, self.settings.ema)
        self.batch = synthetic_batch(world, rows, config.chunks, device)

    def loss(self) -> torch.Tensor:
        with autocast(self.device, self.config.precision):
            losses = training_loss(self.model, self.batch, self.settings, self.world, False)
        return losses["loss"]

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(self.model, 1000)

    def step(self) -> float:
        """One optimiser step; the loss before it."""
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.update()
        return float(loss.detach())

    def split_step(self) -> dict[str, float]:
        """The same step, its stages timed one by one; `rest` is what no stage covers."""
        split = Split(self.device, {})
        timing.synchronise(self.device)
        since = time.perf_counter()
        with timed_forward(self.model.dit, split):
            loss = self.loss()
        self.optimizer.zero_grad()
        split.run("backward", loss.backward)
        split.run("optimizer", self.update)
        total = time.perf_counter() - since
        rest = total - sum(split.seconds.values())
        return {**split.seconds, "rest": rest, "total": total}


def gate(trainer: Trainer) -> dict[str, float]:
    """Loss finite, and every parameter with a finite gradient that is not zero; else UserError."""
    torch.manual_seed(0)
    loss = trainer.loss()
    trainer.optimizer.zero_grad()
    loss.backward()
    norms = {
        name: math.nan if p.grad is None else float(p.grad.norm())
        for name, p in trainer.model.named_parameters()
    }
    # There is no text in training, so cross-attention takes no part.
    wrong = [n for n, v in norms.items() if "cross_attn" not in n and not 0 < v < math.inf]
    value = float(loss.detach())
    if not math.isfinite(value) or wrong:
        raise UserError(f"training step: loss {value}, no gradient in {wrong[:1]}; no speed")
    trainer.optimizer.zero_grad()
    return {"loss": value, "least_gradient": min(v for v in norms.values() if v > 0)}


def compile_equal(trainer: Trainer, most: float) -> float:
    """Compile the trainer's blocks; by how much (relative) that changes a loss, else UserError."""
    torch.manual_seed(0)
    before = float(trainer.loss().detach())
    compile_blocks(trainer.model.dit)
    torch.manual_seed(0)
    change = abs(float(trainer.loss().detach()) / before - 1)
    if not change <= most:
        raise UserError(
            f"compiled blocks change the loss by {change:.1e} (relative; at most {most:.0e}): no "
            "speed for unequal work; --no-compile leaves them out"
        )
    return change


def measure(trainer: Trainer, first: float) -> dict[str, Any]:
    """A step's time, split and memory; ``first``: seconds to the end of the first, compilation and
    all."""
    config, device = trainer.config, trainer.device
    memory = timing.peak_memory(trainer.step, device)
    times = timing.Times()
    for _ in range(config.repeats):
        times.add(trainer.step, device)
    split = trainer.split_step()
    rows = len(trainer.batch.latents)
    flops = training_flops(trainer.world, trainer.batch)
    return {
        **times.to_dict(),
        "first_s": first,
        "episodes_per_s": rows / times.p50,
        "frames_per_s": rows * config.chunks * trainer.world.action_spec.chunk / times.p50,
        "tflop": flops / 1e12,
        "tflops": flops / times.p50 / 1e12,
        "split_s": split,
        "dit_share": (split["dit_forward"] + split["backward"]) / split["total"],
        "memory": memory,
    }


def bench(config: TrainBench) -> dict[str, Any]:
    """Measure; the document that is written."""
    torch.set_num_threads(config.threads)
    device = timing.device_of(config.device)
    preset = default_preset(config.preset, device)
    world = bench_config(preset, config.picture)
    rows = config.batch or (2 if device.type == "cuda" else 4)
    too_large: list[int] = []
    while True:
        try:
            trainer = Trainer(config, world, rows, device)
            parity = gate(trainer)
            first = timing.time_once(trainer.step, device)[0]
            break
        except torch.cuda.OutOfMemoryError:
            if rows == 1:
                raise
        too_large.append(rows)
        trainer, rows = None, rows // 2  # type: ignore[assignment]
        torch.cuda.empty_cache()
    with autocast(device, config.precision):
        on = torch.is_autocast_enabled(device.type)
    dtype = torch.bfloat16 if on else torch.float32
    ceilings = timing.Ceilings(dtype, device).measure()
    measured = {"eager": measure(trainer, first)}
    left_out: dict[str, str] = {}
    if config.compile:
        since = time.perf_counter()
        try:
            parity["compiled_loss_change"] = compile_equal(trainer, TOLERANCES[dtype])
            trainer.step()
            measured["compiled"] = measure(trainer, time.perf_counter() - since)
        except (UserError, RuntimeError) as error:  # the compiler's, or memory; eager stands
            left_out["compiled"] = f"{type(error).__name__}: {error}".splitlines()[0]
    ceilings.measure()
    steps = [
        {
            "implementation": name,
            "batch": rows,
            **step,
            "mfu": step["tflops"] * 1e12 / ceilings.gemm,
            "out_of_memory": too_large,
        }
        for name, step in measured.items()
    ]
    values = {
        "preset": preset,
        "picture": list(world.picture),
        "dtype": timing.dtype_name(dtype),
        "chunks": config.chunks,
        "checkpoint": trainer.checkpoint,
        "gate": parity,
        "ceilings": ceilings.to_dict(),
        "steps": steps,
        "left_out": left_out,
    }
    return timing.document("train", config, device, config.threads, values)


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(TrainBench, argv, "worldloop bench train")
    found = bench(config)
    height, width = found["picture"]
    path = timing.write(config.out, f"train-{found['preset']}-{height}x{width}", found)
    for step in found["steps"]:
        print(
            f"train {found['preset']}, {step['implementation']}, batch {step['batch']} x "
            f"{found['chunks']} chunks, {found['dtype']}: {step['p50_s']:.3f} s a step, "
            f"{step['frames_per_s']:.1f} frames/s, MFU {step['mfu']:.0%}, "
            f"{step['dit_share']:.0%} of the time in the DiT; {path}"
        )
    for name, reason in found["left_out"].items():
        print(f"train {found['preset']}, {name}: left out, {reason}", file=sys.stderr)
    return 1 if found["left_out"] else 0
