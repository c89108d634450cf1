"""softmax(q k^T / sqrt(K)) v behind one option, each implementation tested against one
reference (`kernels.attention.reference_attention`).

    auto       the rule below for the device at hand, or a measured choice (`fastest`)
    products   two plain matrix products: on CPUs the only one that uses bf16 matrix units
    sdpa       torch's fused attention, its own pick among its kernels
    cudnn      torch's fused attention, cuDNN's kernel alone (Hopper and newer)
    flash      FlashAttention: its own package, or the FlashAttention-3 that vLLM carries
    xformers   xformers' memory-efficient attention
    triton     our kernel, worldloop.kernels.attention
    native     its version in kernels/csrc, for bf16 on CPUs

`auto` without a measurement takes, for bf16 on a CPU, `sdpa` where the CPU has AMX and there is no
backward pass, else `native` where it is built, else `products`; elsewhere `sdpa`. flash, xformers
and triton have no backward pass here: they are for inference.

Shape letters: B rows, h heads, N queries, M keys, K head dimension.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from worldloop.errors import UserError
from worldloop.files import atomic_write_text
from worldloop.kernels.attention import attention, native_takes, reference_attention
from worldloop.kernels.native import HAS_NATIVE

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

HAS_AMX = bool(torch.cpu._is_amx_tile_supported())  # read once: torch.compile cannot look into it
NAMES = ("auto", "products", "sdpa", "cudnn", "flash", "xformers", "triton", "native")


def _products(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> Tensor:
    # torch's CPU flash attention leaves the bf16 matrix units idle: forward and backward of
    # 384 queries on 832 keys took 55 ms of one core there, 24 ms as two plain products.
    # Autocast would take the softmax to fp32 and back; its kernel sums in fp32 as it is.
    with torch.autocast(q_BhNK.device.type, enabled=False):
        k, v = k_BhMK.to(q_BhNK.dtype), v_BhMK.to(q_BhNK.dtype)
        scores = torch.matmul(q_BhNK * q_BhNK.shape[-1] ** -0.5, k.transpose(-1, -2))
        return torch.matmul(torch.softmax(scores, dim=-1), v)


def _sdpa(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BhNK, k_BhMK, v_BhMK)


def _cudnn(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q_BhNK, k_BhMK, v_BhMK)


# The libraries take [B,N,h,K]. Behind custom ops they stay whole under torch.compile, which
# cannot look into them, and are loaded at the first call.


@torch.library.custom_op("worldloop::flash_attention", mutates_args=())
def _flash_op(q_BNhK: Tensor, k_BMhK: Tensor, v_BMhK: Tensor) -> Tensor:
    return _flash_library()(q_BNhK, k_BMhK, v_BMhK).contiguous()


@torch.library.custom_op("worldloop::xformers_attention", mutates_args=())
def _xformers_op(q_BNhK: Tensor, k_BMhK: Tensor, v_BMhK: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(q_BNhK, k_BMhK, v_BMhK)
    return out.contiguous()


@_flash_op.register_fake
def _flash_shape(q_BNhK: Tensor, k_BMhK: Tensor, v_BMhK: Tensor) -> Tensor:
    return torch.empty_like(q_BNhK, memory_format=torch.contiguous_format)


@_xformers_op.register_fake
def _xformers_shape(q_BNhK: Tensor, k_BMhK: Tensor, v_BMhK: Tensor) -> Tensor:
    return torch.empty_like(q_BNhK, memory_format=torch.contiguous_format)


def _flash(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> Tensor:
    swapped = (t.transpose(1, 2) for t in (q_BhNK, k_BhMK, v_BhMK))
    return _flash_op(*swapped).transpose(1, 2)


def _xformers(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> Tensor:
    swapped = (t.transpose(1, 2) for t in (q_BhNK, k_BhMK, v_BhMK))
    return _xformers_op(*swapped).transpose(1, 2)


def _kernel(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor) -> Tensor:
    return attention(q_BhNK, k_BhMK, v_BhMK)


@functools.cache
def _flash_library() -> Attend:
    """FlashAttention over [B,N,h,K]: version 3's package, vLLM's copy of it, version 2's."""
    if find_spec("flash_attn_interface") is not None:  # FlashAttention-3, built from source
        third: Any = importlib.import_module("flash_attn_interface")

        def by_version_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = third.flash_attn_func(q, k, v)
            return out[0] if isinstance(out, tuple) else out  # older builds add the log-sums

        return by_version_3
    if find_spec("vllm") is not None and torch.version.cuda is not None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        def by_vllm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # vLLM's build has the packed form only: rows one behind the other.
            (B, N), M = q.shape[:2], k.shape[1]
            ends = torch.arange(B + 1, dtype=torch.int32, device=q.device)
            packed = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
            version = 3 if torch.cuda.get_device_capability(q.device)[0] == 9 else 2
            out: Tensor = flash_attn_varlen_func(
                *packed, max_seqlen_q=N, cu_seqlens_q=ends * N, max_seqlen_k=M,
                cu_seqlens_k=ends * M, causal=False, fa_version=version,
            )  # fmt: skip
            return out.unflatten(0, (B, N))

        return by_vllm
    from flash_attn import flash_attn_func

    second: Attend = flash_attn_func
    return second


_IMPLEMENTATIONS: dict[str, Attend] = {
    "products": _products,
    "sdpa": _sdpa,
    "cudnn": _cudnn,
    "flash": _flash,
    "xformers": _xformers,
    "triton": _kernel,
    "native": _kernel,
}


def attend(q_BhNK: Tensor, k_BhMK: Tensor, v_BhMK: Tensor, implementation: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(K)) v, [B,h,N,K], by one of NAMES (checked by `require` beforehand)."""
    if implementation == "auto":
        bf16_on_cpu = q_BhNK.device.type == "cpu" and q_BhNK.dtype == torch.bfloat16
        # With AMX torch's forward pass takes half the time of the products (a quarter for 832
        # keys), its backward pass three times as long.
        learns = torch.is_grad_enabled() and (q_BhNK.requires_grad or k_BhMK.requires_grad)
        implementation = "sdpa"
        if bf16_on_cpu and (learns or not HAS_AMX):
            takes = native_takes(q_BhNK, k_BhMK, v_BhMK)
            implementation = "native" if takes else "products"
    return _IMPLEMENTATIONS[implementation](q_BhNK, k_BhMK, v_BhMK)


# ---------------------------------------------------------------- choosing


def missing(implementation: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps an implementation from running there, with the remedy; None where it runs."""
    if implementation in ("auto", "products", "sdpa"):
        return None
    if implementation == "native":
        if device.type == "cpu" and dtype == torch.bfloat16 and HAS_NATIVE:
            return None
        return (
            "needs bf16 on a CPU with AVX512-BF16, and kernels/csrc: cmake -B build && "
            "cmake --build build"
        )
    if device.type != "cuda":
        return "needs a CUDA device; take 'sdpa' or 'products' on a CPU"
    if implementation == "triton":
        return None if find_spec("triton") else "needs triton: pip install 'worldloop[gpu]'"
    if dtype not in (torch.float16, torch.bfloat16) and implementation in ("cudnn", "flash"):
        return f"needs fp16 or bf16, the network is {str(dtype).removeprefix('torch.')}"
    if implementation == "cudnn":
        capable = torch.backends.cudnn.is_available() and _capability(device) >= (9, 0)
        return None if capable else "needs cuDNN and a Hopper GPU or newer; take 'sdpa'"
    if implementation == "xformers":
        return None if find_spec("xformers") else "needs xformers: pip install xformers"
    known = ("flash_attn_interface", "vllm", "flash_attn")
    if any(find_spec(name) for name in known):
        return None
    return "needs flash-attn (pip install flash-attn, built from source) or vllm"


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def require(
    implementation: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Raises UserError for an unknown name, or one that cannot run there, saying what to do."""
    if implementation not in NAMES:
        raise UserError(f"attention is {implementation!r}; known: {', '.join(NAMES)}")
    problem = missing(implementation, torch.device(device), dtype)
    if problem is not None:
        raise UserError(f"attention {implementation!r} {problem}")


def measure(
    rows: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 5,
) -> dict[str, float]:
    """Milliseconds (median) of every implementation that runs here and agrees with the reference.

    Raises UserError where none agrees: a wrong result is never the fastest.
    """  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(rows, heads, queries, head_dim), *[(rows, heads, keys, head_dim)] * 2]
    q, k, v = (
        torch.randn(s, generator=generator, device=device, dtype=torch.float32).to(dtype)
        for s in shapes
    )
    expected = reference_attention(q[:1], k[:1], v[:1]).float()
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2
    found: dict[str, float] = {}
    for name in NAMES[1:]:
        if missing(name, device, dtype) is not None:
            continue
        run = functools.partial(_IMPLEMENTATIONS[name], q, k, v)
        try:
            error = (run()[:1].float() - expected).norm() / expected.norm()
        except torch.OutOfMemoryError:
            raise
        except (ImportError, OSError, RuntimeError, TypeError):
            continue  # installed, but made for another torch or GPU: the others will do
        if float(error) <= tolerance:
            found[name] = _median_ms(run, repeats, device)
    if not found:
        raise UserError(f"attention: no implementation agrees with the reference on {device}")
    return found


def _median_ms(run: Callable[[], Tensor], repeats: int, device: torch.device) -> float:
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    run()  # loads and tunes
    times = []
    for _ in range(repeats):
        since = clock()
        run()
        times.append(clock() - since)
    return 1000 * sorted(times)[repeats // 2]


def cache_folder() -> Path:
    """Where measured choices and built engines are kept: WORLDLOOP_CACHE or ~/.cache/worldloop."""
    chosen = os.environ.get("WORLDLOOP_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "worldloop"


@torch.inference_mode()
def fastest(
    rows: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """The fastest implementation for a shape: measured once on a machine, then read from a file.

    The file is `cache_folder()/attention.json`: {device, versions, shape: {name: milliseconds}}.
    """  # fmt: skip
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    installed = [n for n in NAMES[1:] if missing(n, device, dtype) is None]
    key = (
        f"{where} torch {torch.__version__} threads {threads} {','.join(installed)} {dtype} "
        f"[{rows},{heads},{queries},{keys},{head_dim}]"
    )
    path = cache_folder() / "attention.json"
    known: dict[str, dict[str, float]] = {}
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not JSON ({error}); delete it to measure again") from error
    if key not in known:
        known[key] = measure(rows, heads, queries, keys, head_dim, device, dtype)
        atomic_write_text(path, json.dumps(known, indent=1) + "\n")
    return min(known[key], key=lambda name: known[key][name])
