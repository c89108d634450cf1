"""fp8 (e4m3, row-wise scales) for the products of a DiT that cost time.

A row of the input (a token) and a row of the weight (an output channel) each get the scale that
puts their largest value on 448, the largest number of e4m3; weights once, inputs at every call. On
a GPU with fp8 units (Hopper and newer) the product is torch._scaled_mm; elsewhere it is emulated:
the same rounding to e4m3, then the product in fp32, so that quality can be measured anywhere.

Only the projections of self-attention and the MLPs are quantised (LAYERS): every token goes through
them, so they are nearly all of the products. What embeds noise, actions and latents, the
modulations and the output stay as they are. Which groups of layers are sensitive is measured by
`worldloop bench agreement --compare groups` (docs/backends.md).

For inference: no gradient passes a quantised layer. On a GPU use it with backend "compiled", which
fuses the rounding of the inputs into what comes before.

Shape letters: N rows, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloop.engine.dit import DiT
from worldloop.errors import UserError

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
TINIEST = 1e-12  # least scale: a row of zeros stays one
MULTIPLE = 16  # of both features, for the product on a GPU

LAYERS = ("blocks.*.self_attn.*_proj", "blocks.*.mlp.layer?")
"""Module names (with * and ?) that are quantised unless told otherwise."""


def to_e4m3(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to e4m3 [N,D], and their scales [N,1] fp32: x is about rounded * scale."""
    x = x_ND.float()
    scale_N1 = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(TINIEST)
    # The division can end a hair above 448, which e4m3 would make a NaN.
    return (x / scale_N1).clamp(-LARGEST, LARGEST).to(E4M3), scale_N1


def has_fp8_units(device: torch.device) -> bool:
    """Whether torch._scaled_mm takes row-wise scales there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class FP8Linear(nn.Module):
    """A Linear without bias whose product is taken in fp8; results in the input's dtype."""

    weight: Tensor  # [O,D] e4m3
    scale: Tensor  # [O,1] fp32

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = to_e4m3(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        # Asked once for each device, not in `forward`: a compiler cannot look into the question.
        self.native = has_fp8_units(weight.device)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, e4m3"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP8Linear:
        # Of module.to(device, dtype) only the device concerns these: their dtypes are the point.
        device = fn(torch.empty(0, device=self.weight.device)).device
        self.weight, self.scale = self.weight.to(device), self.scale.to(device)
        self.native = has_fp8_units(device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        rounded_ND, scale_N1 = to_e4m3(x.reshape(-1, self.in_features).to(dtype))
        if self.native:
            # Row-wise scales give bf16, which is what a network on a GPU computes in.
            out = torch._scaled_mm(
                rounded_ND, self.weight.t(), scale_a=scale_N1, scale_b=self.scale.t(),
                out_dtype=torch.bfloat16, use_fast_accum=True,
            )  # fmt: skip
        else:
            with torch.autocast(x.device.type, enabled=False):
                out = F.linear(rounded_ND.float(), self.weight.float())
                out = out * scale_N1 * self.scale.t()
        return out.to(dtype).unflatten(0, x.shape[:-1])


def quantize_fp8(dit: DiT, layers: Sequence[str] = LAYERS) -> DiT:
    """Put the named Linears of a DiT into fp8, in place; returns it.

    layers: patterns of module names. Raises UserError for a pattern that names no Linear, and for
    a Linear with a bias or with features that are no multiple of 16.
    """
    linears = {name: m for name, m in dit.named_modules() if isinstance(m, nn.Linear)}
    chosen: list[str] = []
    for pattern in layers:
        found = [name for name in linears if fnmatchcase(name, pattern)]
        if not found:
            raise UserError(
                f"layers: {pattern!r} names no Linear of this DiT (or it is fp8 by now)"
            )
        chosen += found
    for name in dict.fromkeys(chosen):
        linear = linears[name]
        if linear.bias is not None:
            raise UserError(f"layers: {name} has a bias; fp8 is for Linears without one")
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            raise UserError(
                f"layers: {name} is {linear.out_features}x{linear.in_features}; fp8 needs "
                f"multiples of {MULTIPLE}"
            )
    for name in dict.fromkeys(chosen):
        parent, _, last = name.rpartition(".")
        dit.get_submodule(parent).register_module(last, FP8Linear(linears[name]))
    return dit


def quantized_share(dit: DiT) -> float:
    """The share of the DiT's matrix weights that are in fp8."""
    small = sum(m.weight.numel() for m in dit.modules() if isinstance(m, FP8Linear))
    whole = sum(m.weight.numel() for m in dit.modules() if isinstance(m, nn.Linear))
    return small / (small + whole)
