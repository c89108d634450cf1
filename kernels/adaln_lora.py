"""adaLN-LoRA of many heads at once: the shift, scale and gate of every branch of every block.

    head i:   up_i(down_i(silu(e))) + shared

All heads read the same embedding and none depends on a block's output, so they can be computed
together before the first block: two launches in place of five a branch. With few rows (one per
episode and latent frame) the time is that of reading the weights once. The weights stay where
they are: the kernels find them through a table of addresses, so nothing is stacked or copied.

Shape letters: R rows, D width, r rank, H heads, P = 3D results a head.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from worldloop.kernels.op import INTERPRETED, Case, Op, define, require, tl, triton, uses_triton


def reference_adaln_lora(
    e_RD: Tensor, shared_RP: Tensor, down_rD: list[Tensor], up_Pr: list[Tensor]
) -> Tensor:
    s = F.silu(e_RD)
    return torch.stack(
        [F.linear(F.linear(s, a), b) + shared_RP for a, b in zip(down_rD, up_Pr, strict=True)]
    )


@triton.jit
def _grouped_linear_kernel(
    x_ptr, table_ptr, bias_ptr, out_ptr,
    rows, features, results, x_h, x_r,
    SILU: tl.constexpr, BIAS: tl.constexpr, FP32_DOT: tl.constexpr,
    ROWS: tl.constexpr, RESULTS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One tile [ROWS, RESULTS] of head program_id(2): x @ weight^T (+ bias, [rows, results])."""
    head = tl.program_id(2).to(tl.int64)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    p = tl.program_id(0) * RESULTS + tl.arange(0, RESULTS)
    weight_ptr = tl.load(table_ptr + head).to(tl.pointer_type(x_ptr.dtype.element_ty))
    weight_ptr = tl.multiple_of(weight_ptr, 16)  # bytes; the launcher checks it
    total = tl.zeros((ROWS, RESULTS), dtype=tl.float32)
    for first in range(0, features, FEATURES):
        f = first + tl.arange(0, FEATURES)
        x = tl.load(
            x_ptr + head * x_h + r[:, None] * x_r + f[None, :],
            mask=(r < rows)[:, None] & (f < features)[None, :], other=0.0,
        )  # fmt: skip
        if SILU:
            value = x.to(tl.float32)
            x = (value / (1.0 + tl.exp(-value))).to(x.dtype)
        w = tl.load(
            weight_ptr + p[None, :] * features + f[:, None],
            mask=(f < features)[:, None] & (p < results)[None, :], other=0.0,
        )  # fmt: skip
        if FP32_DOT:  # the interpreter multiplies the bits of a bf16
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision="ieee")
    inside = (r < rows)[:, None] & (p < results)[None, :]
    if BIAS:
        # Rounded first, as a linear layer rounds its result.
        bias = tl.load(bias_ptr + r[:, None] * results + p[None, :], mask=inside, other=0.0)
        total = total.to(bias.dtype).to(tl.float32) + bias.to(tl.float32)
    at = (head * rows + r[:, None]) * results + p[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@cache
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept, so that a captured CUDA graph copies nothing from the host and its table stays valid.
    with torch.inference_mode(False):
        return torch.tensor(addresses, dtype=torch.int64, device=device)


def _grouped_linear(x: Tensor, weights: list[Tensor], bias: Tensor | None, silu: bool) -> Tensor:
    """[rows,features] or [heads,rows,features] -> [heads,rows,results], a weight for each head."""
    heads, (results, features) = len(weights), weights[0].shape
    rows = x.shape[-2]
    out = x.new_empty(heads, rows, results)
    ROWS = min(64, max(16, triton.next_power_of_2(rows)))
    RESULTS = 64
    grid = (triton.cdiv(results, RESULTS), triton.cdiv(rows, ROWS), heads)
    table = _table(tuple(w.data_ptr() for w in weights), x.device)
    _grouped_linear_kernel[grid](
        x, table, bias, out, rows, features, results,
        x.stride(0) if x.dim() == 3 else 0, x.stride(-2),
        SILU=silu, BIAS=bias is not None, FP32_DOT=INTERPRETED,
        ROWS=ROWS, RESULTS=RESULTS, FEATURES=64 if x.dtype != torch.float32 else 32,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def launch_adaln_lora(
    e_RD: Tensor, shared_RP: Tensor, down_rD: list[Tensor], up_Pr: list[Tensor]
) -> Tensor:
    name = "adaln_lora"
    (R, D), P, r = e_RD.shape, shared_RP.shape[1], down_rD[0].shape[0]
    require(len(down_rD) == len(up_Pr), name, f"{len(down_rD)} down and {len(up_Pr)} up weights")
    require(shared_RP.shape[0] == R, name, f"e has {R} rows, shared {shared_RP.shape[0]}")
    require(e_RD.is_contiguous() and shared_RP.is_contiguous(), name, "e, shared: not contiguous")
    require(D % 8 == 0 and r % 8 == 0, name, f"width {D} and rank {r} must be multiples of 8")
    require(shared_RP.dtype == e_RD.dtype, name, f"e is {e_RD.dtype}, shared {shared_RP.dtype}")
    for kind, weights, shape in (("down", down_rD, (r, D)), ("up", up_Pr, (P, r))):
        for i, w in enumerate(weights):
            good = tuple(w.shape) == shape and w.dtype == e_RD.dtype and w.is_contiguous()
            if not good or w.data_ptr() % 16:  # words for a hundred weights would cost 0.3 ms
                problem = f"must be {e_RD.dtype} {list(shape)}, contiguous and aligned"
                require(False, name, f"{kind}[{i}] {problem}")
    hidden = _grouped_linear(e_RD, down_rD, None, silu=True)
    return _grouped_linear(hidden, up_Pr, shared_RP, silu=False)


_adaln_lora = define(
    "adaln_lora", launch_adaln_lora, reference_adaln_lora,
    lambda e_RD, shared_RP, down_rD, up_Pr: shared_RP.new_empty(len(down_rD), *shared_RP.shape),
)  # fmt: skip


def adaln_lora(
    e_RD: Tensor, shared_RP: Tensor, down_rD: list[Tensor], up_Pr: list[Tensor]
) -> Tensor:
    """up_i(down_i(silu(e))) + shared for every head i: [H,R,P] in the dtype of e.

    down_rD, up_Pr: the heads' weights, all of one shape, [r,D] and [P,r].
    """
    if uses_triton(e_RD, shared_RP, *down_rD, *up_Pr):
        out: Tensor = _adaln_lora(e_RD, shared_RP, down_rD, up_Pr)
        return out
    return reference_adaln_lora(e_RD, shared_RP, down_rD, up_Pr)


def _case(
    name: str, R: int, D: int, r: int, H: int, dtype: torch.dtype, tolerance: float,
    large: bool = False,
) -> Case:  # fmt: skip
    P = 3 * D

    def make(device: torch.device) -> dict[str, object]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            x = torch.randn(rows, columns, generator=generator, device=device)
            return (x * scale).to(dtype)

        return {
            "e_RD": normal(R, D), "shared_RP": normal(R, P),
            "down_rD": [normal(r, D, D**-0.5) for _ in range(H)],
            "up_Pr": [normal(P, r, r**-0.5) for _ in range(H)],
        }  # fmt: skip

    weights = H * (r * D + P * r)
    moved = (weights + R * (D + P + H * P)) * dtype.itemsize
    return Case(name, make, tolerance, moved, 2 * R * weights, large)


ADALN_LORA = Op(
    "adaln_lora", reference_adaln_lora, launch_adaln_lora, _adaln_lora,
    (
        _case("small fp32", 5, 48, 8, 3, torch.float32, 1e-5),
        _case("small bf16", 18, 64, 16, 2, torch.bfloat16, 2.5e-2),
        _case("tiny fp32", 24, 256, 64, 12, torch.float32, 1e-5, large=True),
        _case("2b bf16", 48, 2048, 256, 56, torch.bfloat16, 2.5e-2, large=True),
        _case("2b one row bf16", 6, 2048, 256, 56, torch.bfloat16, 2.5e-2, large=True),
    ),
)  # fmt: skip
