"""Full (unmasked) attention, softmax(q k^T / sqrt(K)) v, without storing the scores.

On CUDA forward alone, by flash attention's recurrence: keys pass in blocks, each query row keeps
its running maximum, its running sum and its weighted values. On CPUs in bf16 with a backward pass
(kernels/csrc), where the scores of a few queries at a time stay in the first cache.

Queries see every key, which is all that block-causal generation with a cache needs. Bytes: q, k, v
and the result once; FLOPs: 4 N M K a head and row.

Shape letters: B rows, h heads, N queries, M keys, K head dimension.
"""

from typing import Any

import torch
from torch import Tensor

from worldloop.kernels import native
from worldloop.kernels.op import (
    HAS_TRITON,
    INTERPRETED,
    Case,
    Op,
    define,
    require,
    tl,
    triton,
    uses_native,
    uses_triton,
)

LOG2_E = 1.4426950408889634


def reference_attention(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> Tensor:
    """The definition, in fp32 (fp64 for fp64), rounded once; lies as [B,N,h,K] in memory."""
    wide = torch.float64 if q_BhNK.dtype == torch.float64 else torch.float32
    scores = q_BhNK.to(wide) @ k_BhMK.to(wide).transpose(-1, -2) * q_BhNK.shape[-1] ** -0.5
    out = (torch.softmax(scores, dim=-1) @ v_BhMK.to(wide)).to(v_BhMK.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _configs() -> list[Any]:
    # (queries, keys) a program, warps, stages: what fits Hopper's registers and shared memory.
    tiles = [(128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2)]
    return [
        triton.Config({"BLOCK_N": n, "BLOCK_M": m}, num_warps=warps, num_stages=stages)
        for n, m, warps, stages in (tiles[-1:] if INTERPRETED else tiles)
    ]


def _tuned(kernel: Any) -> Any:
    if not HAS_TRITON:
        return kernel
    return triton.autotune(configs=_configs(), key=["N", "M", "K", "WIDE"])(kernel)


@_tuned
@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,
    heads, N, M, scale_log2,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, o_b, o_h, o_n,
    K: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head. WIDE: operands of the products in fp32."""
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    q_ptrs = q_ptr + row * q_b + head * q_h + n[:, None].to(tl.int64) * q_n + k[None, :]
    k_ptrs = k_ptr + row * k_b + head * k_h + m[None, :] * k_m + k[:, None]  # transposed
    v_ptrs = v_ptr + row * v_b + head * v_h + m[:, None] * v_m + k[None, :]
    q = tl.load(q_ptrs, mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, M, BLOCK_M):
        there = start + m < M
        keys = tl.load(k_ptrs, mask=there[None, :] & (k[:, None] < K), other=0.0)
        values = tl.load(v_ptrs, mask=there[:, None] & (k[None, :] < K), other=0.0)
        if WIDE:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        scores = tl.dot(q, keys, input_precision="ieee") * scale_log2
        scores = tl.where(there[None, :], scores, float("-inf"))
        # The first block has a key for certain, so `highest` is finite from then on.
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        highest = higher
        k_ptrs += BLOCK_M * k_m
        v_ptrs += BLOCK_M * v_m
    out = acc / total[:, None]
    o_ptrs = out_ptr + row * o_b + head * o_h + n[:, None].to(tl.int64) * o_n + k[None, :]
    tl.store(
        o_ptrs, out.to(out_ptr.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K)
    )  # fmt: skip


def launch_attention(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> Tensor:
    """Run the kernel (on a GPU, or interpreted); the result lies as [B,N,h,K] in memory."""
    _check(q_BhNK, k_BhMK, v_BhMK)
    B, heads, N, K = q_BhNK.shape
    M = k_BhMK.shape[2]
    out = _like_tokens(q_BhNK)
    strides = _strides(q_BhNK, k_BhMK, v_BhMK, out)
    # The interpreter multiplies bf16 as raw bits: its operands have to be fp32.
    wide = q_BhNK.dtype == torch.float32 or (INTERPRETED and q_BhNK.dtype == torch.bfloat16)
    _attention_kernel[lambda meta: (triton.cdiv(N, meta["BLOCK_N"]), B * heads)](
        q_BhNK, k_BhMK, v_BhMK, out, heads, N, M, K**-0.5 * LOG2_E, *strides,
        K=K, BLOCK_K=max(16, triton.next_power_of_2(K)), WIDE=wide,
    )  # fmt: skip
    return out


def _check(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> None:
    B, heads, N, K = q_BhNK.shape
    M = k_BhMK.shape[2]
    for name, tensor in (("q", q_BhNK), ("k", k_BhMK), ("v", v_BhMK)):
        expected = (B, heads, N if name == "q" else M, K)
        require(
            tuple(tensor.shape) == expected and tensor.dtype == q_BhNK.dtype,
            "attention", f"{name} must be {q_BhNK.dtype} {list(expected)}",
        )  # fmt: skip
        require(tensor.stride(-1) == 1, "attention", f"{name}: channels must lie side by side")
    require(M > 0, "attention", "there are no keys")


_attention = define(
    "attention", launch_attention, reference_attention,
    lambda q_BhNK, k_BhMK, v_BhMK: _like_tokens(q_BhNK),
)  # fmt: skip


# kernels/csrc ------------------------------------------------------------------------------------


def _forward(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and of each query what the backward pass makes its weights from, [B,h,N,2]."""
    _check(q_BhNK, k_BhMK, v_BhMK)
    B, h, N, K = q_BhNK.shape
    M = k_BhMK.shape[2]
    require(q_BhNK.dtype == torch.bfloat16, "attention", "kernels/csrc takes bf16")
    require(K % 2 == 0, "attention", f"{K} channels a head; kernels/csrc takes them in pairs")
    out, stats = _native_shape(q_BhNK, k_BhMK, v_BhMK)
    native.call(
        "worldloop_attention_bf16", (q_BhNK, k_BhMK, v_BhMK, out, stats), (),
        (h, N, M, K, *_strides(q_BhNK, k_BhMK, v_BhMK, out)),
        items=B * h, work=4 * B * h * N * M * K,
    )  # fmt: skip
    return out, stats


_native = torch.library.custom_op(
    "worldloop::native_attention", _forward, mutates_args=(), device_types="cpu"
)


@torch.library.custom_op(
    "worldloop::native_attention_backward", mutates_args=(), device_types="cpu"
)
def _native_backward(
    q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor, out: Tensor, grad: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q_BhNK, k_BhMK, v_BhMK)
    require(out.stride(-1) == 1 and stats.is_contiguous(), "attention", "not its own results")
    B, h, N, K = q_BhNK.shape
    M = k_BhMK.shape[2]
    grad = grad.to(q_BhNK.dtype)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()  # it may be expanded
    dq, dk, dv = (_like_tokens(t) for t in (q_BhNK, k_BhMK, v_BhMK))
    native.call(
        "worldloop_attention_backward_bf16",
        (q_BhNK, k_BhMK, v_BhMK, out, grad, stats, dq, dk, dv), (),
        (h, N, M, K, *_strides(q_BhNK, k_BhMK, v_BhMK, out, grad, dq, dk, dv)),
        items=B * h, work=10 * B * h * N * M * K,
    )  # fmt: skip
    return dq, dk, dv


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _like_tokens(x_BhNK: Tensor) -> Tensor:
    """Empty, as [B,N,h,K] in memory."""
    B, h, N, K = x_BhNK.shape
    return x_BhNK.new_empty(B, N, h, K).transpose(1, 2)


@_native.register_fake
def _native_shape(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> tuple[Tensor, Tensor]:
    return _like_tokens(q_BhNK), q_BhNK.new_empty((*q_BhNK.shape[:3], 2), dtype=torch.float32)


@_native_backward.register_fake
def _native_backward_shape(
    q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor, out: Tensor, grad: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_tokens(q_BhNK), _like_tokens(k_BhMK), _like_tokens(v_BhMK)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, stats = ctx.saved_tensors
    return _native_backward(q, k, v, out, grad, stats)


_native.register_autograd(_backward, setup_context=_setup)


def native_attention(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> Tensor:
    """kernels/csrc: bf16 on a CPU, with its own backward pass (once)."""
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q_BhNK, k_BhMK, v_BhMK))
    # The operator is for autograd and torch.compile; its first call imports a second's worth.
    plain = not learns and not torch.compiler.is_compiling()
    out: Tensor = (_forward if plain else _native)(q_BhNK, k_BhMK, v_BhMK)[0]
    return out


def native_takes(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> bool:
    """Whether `attention` of these inputs runs in kernels/csrc."""
    tensors = (q_BhNK, k_BhMK, v_BhMK)
    if not uses_native(*tensors, differentiable=True) or q_BhNK.ndim != 4 or k_BhMK.ndim != 4:
        return False
    (B, h, _, K), M = q_BhNK.shape, k_BhMK.shape[2]
    alike = k_BhMK.shape == v_BhMK.shape == (B, h, M, K)
    return alike and M > 0 and K % 2 == 0 and all(t.stride(-1) == 1 for t in tensors)


def attention(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, [B,h,N,K]; fp32, fp16 or bf16."""
    if uses_triton(q_BhNK, k_BhMK, v_BhMK):
        out: Tensor = _attention(q_BhNK, k_BhMK, v_BhMK)
        return out
    if native_takes(q_BhNK, k_BhMK, v_BhMK):
        return native_attention(q_BhNK, k_BhMK, v_BhMK)
    return reference_attention(q_BhNK, k_BhMK, v_BhMK)


def _case(
    name: str, B: int, h: int, N: int, M: int, K: int, dtype: torch.dtype, tolerance: float,
    large: bool = False,
) -> Case:  # fmt: skip
    def make(device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(tokens: int) -> Tensor:  # transposed views, as the transformer gives them
            x = torch.randn(B, tokens, h, K, generator=generator, device=device)
            return x.to(dtype).transpose(1, 2)

        return {"q_BhNK": normal(N), "k_BhMK": normal(M), "v_BhMK": normal(M)}

    bytes_ = B * h * 2 * (N + M) * K * dtype.itemsize
    return Case(name, make, tolerance, bytes_, 4 * B * h * N * M * K, large)


_F32, _BF16 = torch.float32, torch.bfloat16
ATTENTION = Op(
    "attention", reference_attention, launch_attention, _attention,
    (
        _case("odd fp32", 2, 3, 37, 75, 24, _F32, 1e-5),
        _case("one key fp32", 1, 2, 5, 1, 16, _F32, 1e-5),
        _case("odd bf16", 1, 2, 40, 130, 64, _BF16, 2e-2),
        _case("narrow bf16", 2, 3, 7, 65, 18, _BF16, 2e-2),
        _case("wide bf16", 1, 2, 6, 31, 80, _BF16, 2e-2),
        _case("tiny fp32", 2, 4, 384, 832, 64, _F32, 1e-5, large=True),
        _case("tiny bf16", 2, 4, 384, 832, 64, _BF16, 2e-2, large=True),
        _case("2b first frame bf16", 8, 16, 256, 256, 128, _BF16, 2e-2, large=True),
        _case("2b 256x256 bf16", 8, 16, 1536, 4864, 128, _BF16, 2e-2, large=True),
    ),
    native=native_attention,
)  # fmt: skip
