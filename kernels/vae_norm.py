"""RMSNorm over channels, SiLU and the causal padding in front of a video convolution.

The convolution wants its input behind the two last frames of the past. In plain torch the norm,
SiLU and the concatenation each read and write the whole activation; here it is read once and
written once, to its place behind the history. Channels-last only (a pixel's channels side by
side), which is also what the convolutions of recent GPUs want.

Shape letters: B clips, C channels, T frames, P frames of history (0 or 2), H W height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from worldloop.kernels.op import Case, Op, define, require, tl, triton, uses_triton

LAST = torch.channels_last_3d


def reference_rms_norm(x_BCxx: Tensor, gamma: Tensor) -> Tensor:
    """Unit length over dimension 1, times sqrt(C) times gamma [C,1...]; fp32 inside."""
    length = torch.linalg.vector_norm(x_BCxx, dim=1, keepdim=True, dtype=torch.float32)
    scaled = x_BCxx.float() * (gamma.numel() ** 0.5 / length.clamp_min(1e-12))
    return (scaled * gamma.float()).to(x_BCxx.dtype)


def reference_vae_norm(x_BCTHW: Tensor, gamma: Tensor, history_BCPHW: Tensor | None) -> Tensor:
    y = F.silu(reference_rms_norm(x_BCTHW, gamma))
    return y if history_BCPHW is None else torch.cat([history_BCPHW, y], dim=2)


@triton.jit
def _vae_norm_kernel(
    x_ptr, gamma_ptr, history_ptr, out_ptr,
    pixels, channels, frames, past, x_b, x_t, history_b, history_t, root,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """PIXELS pixels of one frame of the result: program (pixels, frame, clip)."""
    t = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, CHANNELS)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    at = p.to(tl.int64)[:, None] * channels + c[None, :]
    out = out_ptr + (b * (past + frames) + t) * pixels * channels + at
    if t < past:
        source = history_ptr + b * history_b + t * history_t + at
        tl.store(out, tl.load(source, mask=inside), mask=inside)
    else:
        source = x_ptr + b * x_b + (t - past) * x_t + at
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        gamma = tl.load(gamma_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(x * x, axis=1))
        y = x * (root / tl.maximum(length, 1e-12))[:, None] * gamma[None, :]
        y = y / (1.0 + tl.exp(-y))
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


def _is_last(x_BCTHW: Tensor) -> bool:
    """Pixels dense and their channels side by side; frames and clips anywhere."""
    _, C, _, _, W = x_BCTHW.shape
    return (x_BCTHW.stride(1), x_BCTHW.stride(4), x_BCTHW.stride(3)) == (1, C, W * C)


def launch_vae_norm(x_BCTHW: Tensor, gamma: Tensor, history_BCPHW: Tensor | None) -> Tensor:
    B, C, T, H, W = x_BCTHW.shape
    require(_is_last(x_BCTHW), "vae_norm", f"x must be channels-last, strides {x_BCTHW.stride()}")
    require(gamma.numel() == C and gamma.is_contiguous(), "vae_norm", f"gamma must hold {C} values")
    past, history = 0, x_BCTHW
    if history_BCPHW is not None:
        past, history = history_BCPHW.shape[2], history_BCPHW
        fits = (*history.shape[:2], *history.shape[3:]) == (B, C, H, W)
        require(
            fits and _is_last(history) and history.dtype == x_BCTHW.dtype, "vae_norm",
            f"history must be channels-last {x_BCTHW.dtype} [{B},{C},P,{H},{W}]",
        )  # fmt: skip
    out = torch.empty(
        (B, C, past + T, H, W), dtype=x_BCTHW.dtype, device=x_BCTHW.device, memory_format=LAST
    )
    CHANNELS = triton.next_power_of_2(C)
    PIXELS = max(1, 4096 // CHANNELS)
    _vae_norm_kernel[(triton.cdiv(H * W, PIXELS), past + T, B)](
        x_BCTHW, gamma, history, out, H * W, C, T, past,
        x_BCTHW.stride(0), x_BCTHW.stride(2), history.stride(0), history.stride(2), C**0.5,
        PIXELS=PIXELS, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    return out


def _fake(x_BCTHW: Tensor, gamma: Tensor, history_BCPHW: Tensor | None) -> Tensor:
    B, C, T, H, W = x_BCTHW.shape
    past = 0 if history_BCPHW is None else history_BCPHW.shape[2]
    shape = (B, C, past + T, H, W)
    return torch.empty(shape, dtype=x_BCTHW.dtype, device=x_BCTHW.device, memory_format=LAST)


def _reference_last(x_BCTHW: Tensor, gamma: Tensor, history_BCPHW: Tensor | None) -> Tensor:
    # The custom operator promises its layout.
    return reference_vae_norm(x_BCTHW, gamma, history_BCPHW).contiguous(memory_format=LAST)


_vae_norm = define("vae_norm", launch_vae_norm, _reference_last, _fake)


def vae_norm(x_BCTHW: Tensor, gamma: Tensor, history_BCPHW: Tensor | None = None) -> Tensor:
    """[history, silu(RMSNorm(x))] along the frames: [B,C,P+T,H,W].

    gamma: [C,1,1,1]. The kernel takes channels-last inputs on CUDA; others go to the reference.
    """
    if uses_triton(x_BCTHW, gamma, history_BCPHW) and _is_last(x_BCTHW) and x_BCTHW.numel():
        if history_BCPHW is not None and not _is_last(history_BCPHW):
            history_BCPHW = history_BCPHW.contiguous(memory_format=LAST)
        y: Tensor = _vae_norm(x_BCTHW, gamma, history_BCPHW)
        return y
    return reference_vae_norm(x_BCTHW, gamma, history_BCPHW)


def _case(
    name: str, shape: tuple[int, int, int, int, int], past: int, dtype: torch.dtype,
    tolerance: float, large: bool = False,
) -> Case:  # fmt: skip
    B, C, T, H, W = shape

    def make(device: torch.device) -> dict[str, Tensor | None]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(dtype)

        def last(frames: int) -> Tensor:
            # The trailing frames of a longer clip, as the decoder hands them on.
            whole = normal(B, C, frames + 1, H, W).contiguous(memory_format=LAST)
            return whole[:, :, 1:]

        gamma = 1 + 0.1 * normal(C, 1, 1, 1)
        history = last(past) if past else None
        return {"x_BCTHW": last(T), "gamma": gamma.to(dtype), "history_BCPHW": history}

    n, frame = B * C * T * H * W, B * C * H * W
    moved = (2 * n + 2 * past * frame + C) * dtype.itemsize
    return Case(name, make, tolerance, moved, 9 * n, large)


VAE_NORM = Op(
    "vae_norm", reference_vae_norm, launch_vae_norm, _vae_norm,
    (
        _case("small fp32", (2, 24, 3, 5, 4), 2, torch.float32, 1e-5),
        _case("small bf16", (1, 16, 2, 3, 4), 2, torch.bfloat16, 1.6e-2),
        _case("first frame fp32", (2, 12, 1, 4, 3), 0, torch.float32, 1e-5),
        _case("96 channels bf16", (8, 96, 4, 256, 256), 2, torch.bfloat16, 1.6e-2, large=True),
        _case("384 channels bf16", (8, 384, 2, 64, 64), 2, torch.bfloat16, 1.6e-2, large=True),
    ),
)  # fmt: skip
