"""What every trainer here does the same way: options, schedule, EMA, resume, and `fit`.

A batch depends only on (seed, step), so a resumed run sees the same batches as an unkilled one.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from worldloop.checkpoint import load_into, load_training_state, save_training_state
from worldloop.config import positive
from worldloop.engine.precision import device_of, takes_bf16
from worldloop.errors import UserError
from worldloop.track import Run


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What every trainer can be told; each adds its own options."""

    out: Path
    """Run folder: config.json, metrics.jsonl, state, model."""
    steps: int
    batch: int
    held_out: int = 32
    """Last episodes of each dataset, never trained on."""
    seed: int = 0
    threads: int = 1
    device: str = "auto"
    precision: str = "auto"
    save_every: int = 100
    """Steps between checkpoints."""
    wandb: str | None = None
    """Project at Weights & Biases that the metrics go to as well."""

    def __post_init__(self) -> None:
        positive(self, "steps", "batch", "held_out", "threads", "save_every")


def device_for(name: str) -> torch.device:
    """``auto`` takes the GPU where there is one; under torchrun, this process's own."""
    device = device_of(name)
    if device.type == "cuda" and device.index is None:
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    return device


def learning_rate(step: int, steps: int, base: float, warmup: int = 100) -> float:
    """Warm-up, constant, then linear decay over the last 30 %: a run may be prolonged any time."""
    decay = max(1.0, 0.3 * steps)
    return base * min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / decay))


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _frozen(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}


class EMA:
    """Exponential moving average of a module's trained parameters, kept in fp32.

    Frozen ones (a 7B under its adapters) are what they are: no copy of them is made.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: p.detach().clone().float() for k, p in _trained(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        # A short memory at first, or the random start would stay in the average for long.
        decay = min(self.decay, (1 + step) / (10 + step))
        shadow = list(self.shadow.values())
        torch._foreach_lerp_(shadow, [p.detach() for p in _trained(module).values()], 1 - decay)

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Within the block, the module has the averaged weights."""
        own = {k: p.detach().clone() for k, p in _trained(module).items()}
        self._copy(module, self.shadow)
        try:
            yield
        finally:
            self._copy(module, own)

    @staticmethod
    @torch.no_grad()
    def _copy(module: nn.Module, values: dict[str, Tensor]) -> None:
        for name, parameter in _trained(module).items():
            parameter.copy_(values[name])


class Workers:
    """Data-parallel processes under torchrun (gloo on CPUs, nccl on GPUs); one otherwise."""

    def __init__(self, device: torch.device) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if device.type == "cuda":
            torch.cuda.set_device(device)  # or what asks for "cuda" would all go to the first
        if self.size > 1 and not dist.is_initialized():
            # The others wait while one decodes, encodes and fits the arm: minutes to hours.
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=12))

    def average_gradients(self, module: nn.Module) -> None:
        """One flat all-reduce of every gradient."""
        if self.size == 1:
            return
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.size
        offset = 0
        for grad in grads:
            grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
            offset += grad.numel()

    def from_first(self, value: int) -> int:
        """The first process's value, on every process; they wait for it."""
        if self.size == 1:
            return value
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        shared = torch.tensor([value], dtype=torch.int64, device=device)
        dist.broadcast(shared, 0)
        return int(shared.item())

    def gather_text(self, text: str) -> list[str]:
        """The text of every process, on every process."""
        if self.size == 1:
            return [text]
        found: list[Any] = [None] * self.size
        # Bytes in tensors, not objects: gathering objects would pickle them.
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        data = torch.zeros(4096, dtype=torch.uint8, device=device)
        encoded = text.encode()[:4096]
        data[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        gathered = [torch.empty_like(data) for _ in found]
        dist.all_gather(gathered, data)
        return [bytes(x.tolist()).rstrip(b"\0").decode(errors="ignore") for x in gathered]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def save_state(
    folder: Path, module: nn.Module, opt: torch.optim.Optimizer, ema: EMA, step: int
) -> None:
    """Everything that a resumed run needs, at step boundaries; frozen weights it has by itself."""
    frozen = _frozen(module)
    learned = {k: v for k, v in module.state_dict().items() if k not in frozen}
    state = {"model": learned, "optimizer": opt.state_dict(), "ema": ema.shadow}
    save_training_state(folder, state, {"step": step})


def load_state(folder: Path, module: nn.Module, opt: torch.optim.Optimizer, ema: EMA) -> int:
    """Restore the newest state; the step to go on from (0 where there is none)."""
    found = load_training_state(folder)
    if found is None:
        return 0
    state, meta = found
    load_into(module, _frozen(module) | state["model"], f"{folder}: the run to resume")
    if state["ema"].keys() != ema.shadow.keys():
        raise UserError(f"{folder}: averages other parameters than this run; use another folder")
    opt.load_state_dict(state["optimizer"])
    for name, value in state["ema"].items():
        ema.shadow[name].copy_(value)
    return int(meta["step"])


def clip_gradients(module: nn.Module, step: int, out: Path) -> None:
    """Scale the gradients to a norm of at most 1.

    Raises UserError where they are not finite, before they can spoil weights and averages.
    """
    norm = float(nn.utils.clip_grad_norm_(module.parameters(), 1.0))
    if not math.isfinite(norm):
        raise UserError(
            f"step {step}: the gradient's norm is {norm}; {out} keeps the last good checkpoint: "
            "lower the learning rate and run the command again"
        )


class StepTime:
    """Seconds of the parts of a step: data, compute (forward and backward), update."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = {"data": 0.0, "compute": 0.0, "update": 0.0}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block; a GPU is waited for at its end, or its work would be counted later."""
        since = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.monotonic() - since

    def shares(self, seconds: float) -> dict[str, float]:
        """Each part's share of ``seconds``, and start again."""
        shares = {name: value / seconds for name, value in self.seconds.items()}
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return shares


def matmul_ceiling(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product on this device in the training's precision: MFU's 100 %."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if takes_bf16(device, precision) else torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):  # the first ones warm up
        since = time.monotonic()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.monotonic() - since)
    return 2 * size**3 / best


class Clock:
    """Seconds between calls, for rates."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def lap(self) -> float:
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        return seconds


Facts = Mapping[str, float | Tensor]


def fit(
    title: str,
    config: TrainingOptions,
    module: nn.Module,
    optimizer: Any,
    loss_at: Callable[[int], tuple[Tensor, Facts]],
    check: Callable[[int, dict[str, float]], dict[str, float]],
    *,
    rates: Sequence[float],
    ema: float,
    frames: int,
    warmup: int = 100,
) -> None:
    """Train a module in one process until ``config.steps``, from where the run's folder is.

    loss_at: a step's number to its loss and facts, whose means go to the metrics. check: with the
    averaged weights in the module, writes the checkpoint and adds to (or replaces) the metrics of
    the steps since the last one. rates: peak learning rate of each of the optimizer's groups.
    frames: how many a step sees. Raises UserError where gradients are not finite.
    """
    average = EMA(module, ema)
    step = load_state(config.out / "state", module, optimizer, average)
    run = Run(config.out, config, resume_step=step or None)
    clock, seen = Clock(), []
    with run.progress(config.steps, title, unit="step", initial=step) as progress:
        while step < config.steps:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = learning_rate(step, config.steps, rate, warmup)
            loss, facts = loss_at(step)
            optimizer.zero_grad()
            loss.backward()
            clip_gradients(module, step, config.out)
            optimizer.step()
            average.update(module, step)
            seen.append({name: float(x) for name, x in {"loss": loss.detach(), **facts}.items()})
            step += 1
            progress.update(1, **seen[-1])
            if step % config.save_every == 0 or step == config.steps:
                row = {name: float(np.mean([facts[name] for facts in seen])) for name in seen[0]}
                row["frames_per_second"] = frames * len(seen) / clock.lap()
                seen = []
                with average.applied(module):
                    row = check(step, row)
                run.log(step, row)
                # Last: a run killed before this line does these steps and their row again.
                save_state(config.out / "state", module, optimizer, average, step)
                progress.write(
                    f"step {step}: " + ", ".join(f"{name} {row[name]:.4g}" for name in row)
                )
    run.close()
