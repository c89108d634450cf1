"""RMSNorm of queries and keys, 3-D RoPE, and the write into the key/value cache, in one pass.

In plain torch a self-attention reads and writes its queries and keys several times (norm, RoPE in
fp32, rounding) and its values once more to stand behind the history. Here each is read once and
written once, to where attention will read it: token n goes to position start + n of `keys` and
`values`, or, from `high` on, back to `low` (a ring whose sink lies below `low`).

Shape letters: B rows, N tokens of this call, M tokens of the cache, h heads, K head dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worldloop.kernels import native
from worldloop.kernels.op import (
    Case,
    Op,
    define,
    require,
    tl,
    triton,
    uses_native,
)

EPS = 1e-6


def reference_qk_rope(
    q_BNhK: Tensor,
    k_BNhK: Tensor,
    v_BNhK: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys_BMhK: Tensor,
    values_BMhK: Tensor,
    start: int,
    low: int,
    high: int,
) -> Tensor:
    q, k = (
        rotate(F.rms_norm(x, x.shape[-1:], w.to(x.dtype), EPS), cos, sin)
        for x, w in ((q_BNhK, q_weight), (k_BNhK, k_weight))
    )
    N = k.shape[1]
    first = min(N, high - start)
    for cache, new in ((keys_BMhK, k), (values_BMhK, v_BNhK)):
        cache[:, start : start + first] = new[:, :first]
        cache[:, low : low + N - first] = new[:, first:]
    return q


def rotate(x_BNhK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head by the table's angles [N,K/2]; fp32, one rounding."""
    a, b = x_BNhK.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BNhK.dtype)


@triton.jit
def _norm_rotate(
    x_ptr, w_ptr, out_ptr, at, cos, sin, half, inside, in_half,
    EPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All heads of one token: `at` are the elements of the first halves, [heads, HALF]."""
    d = tl.arange(0, HALF)
    a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + half, mask=inside, other=0.0).to(tl.float32)
    square = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * half)
    rstd = (1.0 / tl.sqrt(square + EPS))[:, None]
    a *= rstd * tl.load(w_ptr + d, mask=in_half, other=0.0).to(tl.float32)[None, :]
    b *= rstd * tl.load(w_ptr + half + d, mask=in_half, other=0.0).to(tl.float32)[None, :]
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + at, (a * cos - b * sin).to(dtype), mask=inside)
    tl.store(out_ptr + at + half, (b * cos + a * sin).to(dtype), mask=inside)


@triton.jit
def _qk_rope_kernel(
    q_ptr, k_ptr, v_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, out_ptr, keys_ptr, values_ptr,
    tokens, heads, half, start, low, high,
    q_b, q_n, k_b, k_n, v_b, v_n, cache_b, cache_n,
    EPS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token a program."""
    n = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    h = tl.arange(0, HEADS)
    d = tl.arange(0, HALF)
    in_half = d < half
    inside = (h < heads)[:, None] & in_half[None, :]
    at = h[:, None] * (2 * half) + d[None, :]
    cos = tl.load(cos_ptr + n * half + d, mask=in_half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + n * half + d, mask=in_half, other=0.0)[None, :]
    place = start + n
    place = tl.where(place >= high, place - high + low, place)
    _norm_rotate(
        q_ptr + row * q_b + n * q_n, qw_ptr,
        out_ptr + (row * tokens + n) * heads * (2 * half),
        at, cos, sin, half, inside, in_half, EPS, HALF,
    )  # fmt: skip
    written = row * cache_b + place * cache_n
    _norm_rotate(
        k_ptr + row * k_b + n * k_n, kw_ptr, keys_ptr + written,
        at, cos, sin, half, inside, in_half, EPS, HALF,
    )  # fmt: skip
    v = v_ptr + row * v_b + n * v_n + at
    tl.store(values_ptr + written + at, tl.load(v, mask=inside), mask=inside)
    tl.store(values_ptr + written + half + at, tl.load(v + half, mask=inside), mask=inside)


def launch_qk_rope(
    q_BNhK: Tensor,
    k_BNhK: Tensor,
    v_BNhK: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys_BMhK: Tensor,
    values_BMhK: Tensor,
    start: int,
    low: int,
    high: int,
) -> Tensor:
    weights = (q_weight, k_weight)
    _check(q_BNhK, k_BNhK, v_BNhK, weights, cos, sin, keys_BMhK, values_BMhK, start, low, high)
    B, N, heads, K = q_BNhK.shape
    out = torch.empty((B, N, heads, K), dtype=q_BNhK.dtype, device=q_BNhK.device)
    _qk_rope_kernel[(N, B)](
        q_BNhK, k_BNhK, v_BNhK, q_weight, k_weight, cos, sin, out, keys_BMhK, values_BMhK,
        N, heads, K // 2, start, low, high,
        q_BNhK.stride(0), q_BNhK.stride(1), k_BNhK.stride(0), k_BNhK.stride(1),
        v_BNhK.stride(0), v_BNhK.stride(1), keys_BMhK.stride(0), keys_BMhK.stride(1),
        EPS=EPS, HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(K // 2),
        num_warps=4,
    )  # fmt: skip
    return out


def _check(
    q_BNhK: Tensor, k_BNhK: Tensor, v_BNhK: Tensor, weights: tuple[Tensor, Tensor],
    cos: Tensor, sin: Tensor, keys_BMhK: Tensor, values_BMhK: Tensor,
    start: int, low: int, high: int,
) -> None:  # fmt: skip
    B, N, heads, K = q_BNhK.shape
    require(K % 2 == 0, "qk_rope", f"{K} channels a head; halves of them are rotated")
    for weight in weights:
        good = tuple(weight.shape) == (K,) and weight.is_contiguous()
        require(good, "qk_rope", f"weights must be a contiguous [{K}]")
    M = keys_BMhK.shape[1]
    cache = (("keys", keys_BMhK), ("values", values_BMhK))
    for name, x in (("q", q_BNhK), ("k", k_BNhK), ("v", v_BNhK), *cache):
        dense = x.stride(3) == 1 and x.stride(2) == K
        fits = (x.shape[0], *x.shape[2:]) == (B, heads, K)
        require(dense and fits, "qk_rope", f"{name} must be [{B},tokens,{heads},{K}], heads dense")
        require(x.dtype == q_BNhK.dtype, "qk_rope", f"{name} is {x.dtype}, q {q_BNhK.dtype}")
    require(k_BNhK.shape == v_BNhK.shape == q_BNhK.shape, "qk_rope", "q, k, v differ in shape")
    require(keys_BMhK.stride() == values_BMhK.stride(), "qk_rope", "keys, values differ in strides")
    for name, table in (("cos", cos), ("sin", sin)):
        good = table.dtype == torch.float32 and table.is_contiguous()
        require(
            good and tuple(table.shape) == (N, K // 2), "qk_rope",
            f"{name} must be a contiguous fp32 [{N},{K // 2}]",
        )  # fmt: skip
    require(
        0 <= low <= start < high <= M and high - low >= N, "qk_rope",
        f"{N} tokens from {start} do not fit into the ring {low}..{high} of a cache of {M}",
    )  # fmt: skip


def native_qk_rope(
    q_BNhK: Tensor,
    k_BNhK: Tensor,
    v_BNhK: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys_BMhK: Tensor,
    values_BMhK: Tensor,
    start: int,
    low: int,
    high: int,
) -> Tensor:
    """kernels/csrc, bf16."""
    weights = (q_weight, k_weight)
    _check(q_BNhK, k_BNhK, v_BNhK, weights, cos, sin, keys_BMhK, values_BMhK, start, low, high)
    half = all(t.dtype == torch.bfloat16 for t in (q_BNhK, *weights))
    require(half, "qk_rope", "kernels/csrc takes bf16, weights as well")
    out = torch.empty_like(q_BNhK, memory_format=torch.contiguous_format)
    _norm_rotate_into(out, q_BNhK, q_weight, cos, sin)
    N = k_BNhK.shape[1]
    first = min(N, high - start)
    for into, new in ((start, slice(0, first)), (low, slice(first, N))):
        if new.start == new.stop:
            continue  # nothing goes past the end
        place = slice(into, into + new.stop - new.start)
        _norm_rotate_into(keys_BMhK[:, place], k_BNhK[:, new], k_weight, cos[new], sin[new])
        values_BMhK[:, place] = v_BNhK[:, new]
    return out


def _norm_rotate_into(
    out_BNhK: Tensor, x_BNhK: Tensor, weight: Tensor, cos: Tensor, sin: Tensor
) -> None:
    B, N, heads, K = x_BNhK.shape
    strides = [t.stride(i) for t in (x_BNhK, out_BNhK) for i in (0, 2, 1)]
    native.call(
        "worldloop_norm_rotate_bf16", (x_BNhK, out_BNhK, weight, cos, sin), (EPS,),
        (heads, N, K, *strides), items=B * N, work=30 * x_BNhK.numel(),
    )  # fmt: skip


def _on_cpu(q_BNhK: Tensor, k_BNhK: Tensor, v_BNhK: Tensor, *others: Any) -> Tensor:
    q_weight, k_weight, _, _, *cache = others[:6]
    takes = uses_native(q_BNhK, k_BNhK, v_BNhK, q_weight, k_weight, *cache)
    return (native_qk_rope if takes else reference_qk_rope)(q_BNhK, k_BNhK, v_BNhK, *others)


_qk_rope = define(
    "qk_rope", launch_qk_rope, reference_qk_rope,
    lambda q_BNhK, *others, **options: q_BNhK.new_empty(q_BNhK.shape),
    mutates=("keys_BMhK", "values_BMhK"), on_cpu=_on_cpu,
)  # fmt: skip


def qk_rope_behind(
    q_BNhK: Tensor,
    k_BNhK: Tensor,
    v_BNhK: Tensor,
    weights: tuple[Tensor, Tensor],
    table: tuple[Tensor, Tensor],
    history: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values behind their history: what self-attention reads.

    Only where `uses_triton` or `uses_native` says so.

    weights: of the query and key norms. table: cosine and sine [N,K/2]. history: keys and values
    [B,M,h,K], or None. Returns q [B,N,h,K] and keys, values [B,M+N,h,K], this call's last.
    """
    B, N, heads, K = q_BNhK.shape
    M = 0 if history is None else history[0].shape[1]
    keys, values = (q_BNhK.new_empty(B, M + N, heads, K) for _ in range(2))
    if history is not None:
        keys[:, :M].copy_(history[0])
        values[:, :M].copy_(history[1])
    # The operator is for torch.compile; its first call imports a second's worth of that.
    plain = uses_native(q_BNhK, k_BNhK, v_BNhK, *weights) and not torch.compiler.is_compiling()
    q: Tensor = (native_qk_rope if plain else _qk_rope)(
        q_BNhK, k_BNhK, v_BNhK, *weights, *table, keys, values, start=M, low=0, high=M + N
    )
    return q, keys, values


def _case(
    name: str, shape: tuple[int, int, int, int], M: int, dtype: torch.dtype, tolerance: float,
    *, start: int, low: int = 0, high: int | None = None, large: bool = False,
) -> Case:  # fmt: skip
    B, N, heads, K = shape

    def make(device: torch.device) -> dict[str, object]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        q, k, v = (normal(*shape).to(dtype) for _ in range(3))
        angles = normal(N, K // 2) * 3
        return {
            "q_BNhK": q, "k_BNhK": k, "v_BNhK": v,
            "q_weight": (1 + 0.1 * normal(K)).to(dtype),
            "k_weight": (1 + 0.1 * normal(K)).to(dtype),
            "cos": angles.cos(), "sin": angles.sin(),
            "keys_BMhK": normal(B, M, heads, K).to(dtype),
            "values_BMhK": normal(B, M, heads, K).to(dtype),
            "start": start, "low": low, "high": M if high is None else high,
        }  # fmt: skip

    n = B * N * heads * K
    moved = 6 * n * dtype.itemsize + N * K * 4 + 2 * K * dtype.itemsize
    return Case(name, make, tolerance, moved, 2 * 8 * n, large)


_CASES = (
    _case("small fp32", (2, 6, 2, 24), 10, torch.float32, 1e-5, start=4),
    _case("small bf16", (2, 5, 3, 16), 7, torch.bfloat16, 1.6e-2, start=2),
    _case("wrapped fp32", (1, 6, 2, 32), 12, torch.float32, 1e-5, start=7, low=2, high=10),
    _case("wrapped bf16", (1, 6, 2, 64), 12, torch.bfloat16, 1.6e-2, start=7, low=2, high=10),
    _case("tiny fp32", (4, 384, 4, 64), 832, torch.float32, 1e-5, start=448, large=True),
    _case("tiny bf16", (4, 384, 4, 64), 832, torch.bfloat16, 1.6e-2, start=448, large=True),
    _case("2b bf16", (8, 1536, 16, 128), 4864, torch.bfloat16, 1.6e-2, start=3328, large=True),
    _case("14b wrapped bf16", (1, 1536, 40, 128), 4864, torch.bfloat16, 1.6e-2,
          start=3840, low=256, large=True),
)  # fmt: skip
QK_ROPE = Op(
    "qk_rope", reference_qk_rope, launch_qk_rope, _qk_rope, _CASES, ("keys_BMhK", "values_BMhK"),
    native=native_qk_rope,
)  # fmt: skip
