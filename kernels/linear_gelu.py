"""GELU (exact, erf) in the epilogue of the matrix product before it.

The published network's GELU is the exact one. Library epilogues are the tanh approximation, so
the product is a Triton kernel of its own here. What it saves is one pass over the hidden
activations (written once, not written, read and written again); what it can lose is the distance
between a Triton matrix product and cuBLAS's. Which is more is a question for the GPU at hand:
`worldloop bench kernels` answers it, and PREFER_TRITON holds the answer. Until it is measured on
a Hopper GPU the engine keeps cuBLAS and a separate GELU.

Shape letters: N tokens, D features, P results.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from worldloop.kernels.op import INTERPRETED, Case, Op, define, require, tl, triton, uses_triton

PREFER_TRITON = False


def reference_linear_gelu(x_ND: Tensor, weight_PD: Tensor) -> Tensor:
    return F.gelu(F.linear(x_ND, weight_PD))


@triton.jit
def _linear_gelu_kernel(
    x_ptr, w_ptr, out_ptr, tokens, results, features,
    FP32_DOT: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, RESULTS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One tile [TOKENS, RESULTS]; GROUP rows of tiles share their columns in L2."""
    tile = tl.program_id(0)
    across, down = tl.cdiv(results, RESULTS), tl.cdiv(tokens, TOKENS)
    group = tile // (GROUP * across)
    size = min(down - group * GROUP, GROUP)
    row = group * GROUP + (tile % (GROUP * across)) % size
    column = (tile % (GROUP * across)) // size
    n = (row * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    p = (column * RESULTS + tl.arange(0, RESULTS)).to(tl.int64)
    total = tl.zeros((TOKENS, RESULTS), dtype=tl.float32)
    for first in range(0, features, FEATURES):
        f = first + tl.arange(0, FEATURES)
        x = tl.load(
            x_ptr + n[:, None] * features + f[None, :],
            mask=(n < tokens)[:, None] & (f < features)[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(
            w_ptr + p[None, :] * features + f[:, None],
            mask=(f < features)[:, None] & (p < results)[None, :], other=0.0,
        )  # fmt: skip
        if FP32_DOT:  # the interpreter multiplies the bits of a bf16
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision="ieee")
    y = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    at = n[:, None] * results + p[None, :]
    inside = (n < tokens)[:, None] & (p < results)[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


def launch_linear_gelu(x_ND: Tensor, weight_PD: Tensor) -> Tensor:
    (N, D), P = x_ND.shape, weight_PD.shape[0]
    require(x_ND.is_contiguous() and weight_PD.is_contiguous(), "linear_gelu", "not contiguous")
    require(
        weight_PD.shape[1] == D and weight_PD.dtype == x_ND.dtype, "linear_gelu",
        f"weight is {weight_PD.dtype} {list(weight_PD.shape)}, x {x_ND.dtype} {[N, D]}",
    )  # fmt: skip
    out = x_ND.new_empty(N, P)
    if x_ND.dtype == torch.float32:
        TOKENS, RESULTS, FEATURES, warps, stages = 64, 64, 32, 4, 2
    else:  # 128 x 256 fp32 accumulators: a warp group's worth of registers each
        TOKENS, RESULTS, FEATURES, warps, stages = 128, 256, 64, 8, 3
    _linear_gelu_kernel[(triton.cdiv(N, TOKENS) * triton.cdiv(P, RESULTS),)](
        x_ND, weight_PD, out, N, P, D, FP32_DOT=INTERPRETED, GROUP=8,
        TOKENS=TOKENS, RESULTS=RESULTS, FEATURES=FEATURES, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


_linear_gelu = define(
    "linear_gelu", launch_linear_gelu, reference_linear_gelu,
    lambda x_ND, weight_PD: x_ND.new_empty(x_ND.shape[0], weight_PD.shape[0]),
)  # fmt: skip


def linear_gelu(x: Tensor, weight_PD: Tensor) -> Tensor:
    """gelu(x @ weight^T), exact erf, [...,D] -> [...,P]."""
    if PREFER_TRITON and uses_triton(x, weight_PD):
        out: Tensor = _linear_gelu(x.flatten(0, -2).contiguous(), weight_PD)
        return out.unflatten(0, x.shape[:-1])
    return reference_linear_gelu(x, weight_PD)


def _case(
    name: str, N: int, D: int, P: int, dtype: torch.dtype, tolerance: float, large: bool = False
) -> Case:
    def make(device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(N, D, generator=generator, device=device).to(dtype)
        w = torch.randn(P, D, generator=generator, device=device) * D**-0.5
        return {"x_ND": x, "weight_PD": w.to(dtype)}

    moved = (N * D + P * D + N * P) * dtype.itemsize
    return Case(name, make, tolerance, moved, 2 * N * D * P, large)


LINEAR_GELU = Op(
    "linear_gelu", reference_linear_gelu, launch_linear_gelu, _linear_gelu,
    (
        _case("small fp32", 37, 48, 80, torch.float32, 1e-5),
        _case("small bf16", 20, 72, 40, torch.bfloat16, 1e-2),
        _case("tiny fp32", 1536, 256, 1024, torch.float32, 1e-5, large=True),
        _case("2b bf16", 12288, 2048, 8192, torch.bfloat16, 1e-2, large=True),
        _case("2b one row bf16", 1536, 2048, 8192, torch.bfloat16, 1e-2, large=True),
    ),
)  # fmt: skip
