"""Counted FLOPs and bytes, what they cost at given rates, and the roofline picture.

Bytes are those that must move where every elementwise chain is one kernel: the weights once a
pass, the history's keys and values, and 18 times a block's tokens (`ELEMENTWISE`); a convolution's
input, output and weights once. Kernels that move more show as points below the roof.

Shape letters: B rows, N tokens of a pass, M history tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldloop.bench.worlds import VAEWork, latent_sides, vae_work
from worldloop.engine.dit import DiT
from worldloop.engine.dit_config import DiTConfig
from worldloop.engine.world_config import WorldModelConfig
from worldloop.engine.world_model import WorldModel
from worldloop.files import atomic_path

ELEMENTWISE = 18  # times a block's tokens are read or written, all fused


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products, attention and the autoencoder; bytes/s of a copy."""

    gemm: float
    attention: float
    vae: float
    copy: float


# One H200: matrix products and copies as measured on such a card; attention is an assumption.
H200 = Rates(gemm=790e12, attention=600e12, vae=790e12, copy=4.3e12)
# What a tuned program may reach of them: an estimate to plan with.
PLAN = Rates(gemm=620e12, attention=500e12, vae=300e12, copy=3.4e12)


@dataclass(frozen=True)
class Pass:
    """What one DiT pass over B rows does."""

    gemm: int  # FLOPs
    attention: int  # FLOPs
    moved: int  # bytes

    def seconds(self, rates: Rates) -> float:
        """Matrix products, attention and the elementwise traffic, one after the other."""
        return self.gemm / rates.gemm + self.attention / rates.attention + self.moved / rates.copy


def parameters(config: DiTConfig) -> int:
    """Of the transformer's parts that a pass without text reads."""
    with torch.device("meta"):
        named = DiT(config).named_parameters()
        return sum(p.numel() for name, p in named if "cross_attn" not in name)


def dit_pass(
    config: WorldModelConfig, frames: int, history_frames: int, rows: int, item_bytes: int
) -> Pass:
    """One pass over `frames` latent frames with so many in the history."""
    dit, (h, w) = config.dit, latent_sides(config)
    per_frame = (h // dit.patch) * (w // dit.patch)
    N, M = frames * per_frame, history_frames * per_frame
    attention = rows * dit.depth * 4 * N * (N + M) * dit.width
    flops = rows * dit.flops(frames, h, w, M)
    tokens = rows * dit.depth * dit.width * item_bytes * (ELEMENTWISE * N + 2 * M)
    return Pass(flops - attention, attention, parameters(dit) * item_bytes + tokens)


def vae_bytes(world: WorldModel, work: VAEWork, item_bytes: int) -> int:
    """Input, output and weights of every convolution of one row's work, each moved once."""
    moved = 0

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal moved
        weights = sum(p.numel() for p in module.parameters(recurse=False))
        moved += item_bytes * (inputs[0].numel() + output.numel() + weights)

    hooks = [
        module.register_forward_hook(count)
        for module in world.autoencoder.modules()
        if isinstance(module, nn.Conv2d | nn.Conv3d)
    ]
    run = vae_work(world, work)
    moved = 0  # making the work ran the autoencoder as well
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return moved


@dataclass(frozen=True)
class Point:
    """One thing in the picture: FLOPs, bytes, seconds."""

    label: str
    group: str
    flops: float
    moved: float
    seconds: float


def points_of(document: Mapping[str, Any]) -> list[Point]:
    """DiT and autoencoder of every arm of a rollout document."""
    found = []
    for row in document["arms"]:
        if "p50_s" not in row:
            continue
        label = f"{row['arm']}, batch {row['batch']}"
        split = row["split_s"]
        for group, part in (("DiT", "dit"), ("VAE", "vae")):
            work = (1e12 * row[f"{part}_tflop"], 1e9 * row[f"{part}_gb"], split[part])
            if work[0] and work[2]:
                found.append(Point(label, group, *work))
    return found


def draw(points: Sequence[Point], ceilings: Mapping[str, Any], title: str, path: Path) -> None:
    """Write the roofline as PNG: achieved FLOP/s over FLOPs a byte, under what was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gemm, copy = 1e12 * ceilings["gemm_tflops"], 1e9 * ceilings["copy_gb_per_s"]
    figure, axes = pyplot.subplots(figsize=(8.4, 4.8))
    intensities = [p.flops / p.moved for p in points]
    low, high = min([*intensities, gemm / copy]) / 3, max([*intensities, gemm / copy]) * 3
    roof = [low, gemm / copy, high]
    unit, name = (1e12, "TFLOP/s") if gemm >= 1e12 else (1e9, "GFLOP/s")
    axes.plot(roof, [min(gemm, copy * x) / unit for x in roof], color="black", lw=1.2)
    labels = list(dict.fromkeys(p.label for p in points))
    colours = pyplot.get_cmap("tab20")
    for p in points:
        axes.scatter(
            p.flops / p.moved, p.flops / p.seconds / unit, s=46, alpha=0.9,
            color=colours(labels.index(p.label) % 20), marker="o" if p.group == "DiT" else "s",
            edgecolors="black", linewidths=0.4,
        )  # fmt: skip
    handles = [
        pyplot.Line2D([], [], marker="o", ls="", color=colours(i % 20), label=label)
        for i, label in enumerate(labels)
    ]
    handles += [
        pyplot.Line2D([], [], marker=m, ls="", color="white", markeredgecolor="black", label=g)
        for m, g in (("o", "DiT"), ("s", "VAE"))
    ]
    ceiling = f"{gemm / unit:.3g} {name} (matrix product)\n{copy / 1e9:.0f} GB/s (copy)"
    handles.append(pyplot.Line2D([], [], color="black", label=ceiling))
    axes.legend(handles=handles, fontsize=7, frameon=False, loc="center left",
                bbox_to_anchor=(1, 0.5))  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("FLOP per byte that must move")
    axes.set_ylabel(name)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
