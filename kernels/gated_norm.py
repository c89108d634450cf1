"""Gated residual, LayerNorm, scale and shift: what stands between two branches of a DiT block.

    x' = x + gate * branch;   y = (1 + scale) * LayerNorm(x') + shift

In plain torch these are five passes over the tokens (11 times their size read or written); here
x and branch are read once and x' and y written once. Gate, scale and shift are per latent frame.

Shape letters: B rows, F latent frames, S tokens per frame, D width, G rows of modulation (F or 1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from worldloop.kernels.op import Case, Op, define, require, tl, triton, uses_triton

EPS = 1e-6


def reference_modulated_norm(x_BFSD: Tensor, shift_BGD: Tensor, scale_BGD: Tensor) -> Tensor:
    normed = F.layer_norm(x_BFSD, x_BFSD.shape[-1:], eps=EPS)
    return torch.addcmul(shift_BGD[:, :, None], normed, 1 + scale_BGD[:, :, None])


def reference_gated_norm(
    x_BFSD: Tensor, branch_BFSD: Tensor, gate_BGD: Tensor, shift_BGD: Tensor, scale_BGD: Tensor
) -> tuple[Tensor, Tensor]:
    x_BFSD = torch.addcmul(x_BFSD, gate_BGD[:, :, None], branch_BFSD)
    return x_BFSD, reference_modulated_norm(x_BFSD, shift_BGD, scale_BGD)


@triton.jit
def _gated_norm_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, sum_ptr, out_ptr,
    width, tokens, frames,
    gate_b, gate_g, shift_b, shift_g, scale_b, scale_g,
    EPS: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program."""
    row = tl.program_id(0).to(tl.int64)
    frame = row // tokens
    b, g = frame // frames, frame % frames
    d = tl.arange(0, BLOCK)
    inside = d < width
    x = tl.load(x_ptr + row * width + d, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        branch = tl.load(branch_ptr + row * width + d, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + b * gate_b + g * gate_g + d, mask=inside, other=0.0)
        x += gate.to(tl.float32) * branch
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + d, rounded, mask=inside)
        x = rounded.to(tl.float32)  # the norm is of what the next block will read
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + EPS)
    scale = tl.load(scale_ptr + b * scale_b + g * scale_g + d, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + b * shift_b + g * shift_g + d, mask=inside, other=0.0)
    y = centred * rstd * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
    tl.store(out_ptr + row * width + d, y.to(out_ptr.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    B, frames, S, D = x.shape
    require(x.is_contiguous(), "gated_norm", "x must be contiguous")
    require(
        branch is None or (branch.is_contiguous() and branch.shape == x.shape),
        "gated_norm", "branch must be contiguous and of the shape of x",
    )  # fmt: skip
    strides: list[int] = []
    for name, m in (("gate", gate), ("shift", shift), ("scale", scale)):
        if m is None:
            strides += [0, 0]
            continue
        fits = m.shape[0] == B and m.shape[1] in (1, frames) and m.shape[2] == D
        require(fits and m.stride(2) == 1, "gated_norm", f"{name} must be [B,F|1,D], D dense")
        strides += [m.stride(0), m.stride(1) if m.shape[1] > 1 else 0]
    y = torch.empty_like(x)
    total = torch.empty_like(x) if branch is not None else y
    _gated_norm_kernel[(B * frames * S,)](
        x, branch, gate, shift, scale, total, y, D, S, frames, *strides,
        EPS=EPS, GATED=branch is not None, BLOCK=triton.next_power_of_2(D),
        num_warps=8 if D > 2048 else 4,
    )  # fmt: skip
    return total, y


def launch_modulated_norm(x_BFSD: Tensor, shift_BGD: Tensor, scale_BGD: Tensor) -> Tensor:
    return _launch(x_BFSD, None, None, shift_BGD, scale_BGD)[1]


def launch_gated_norm(
    x_BFSD: Tensor, branch_BFSD: Tensor, gate_BGD: Tensor, shift_BGD: Tensor, scale_BGD: Tensor
) -> tuple[Tensor, Tensor]:
    return _launch(x_BFSD, branch_BFSD, gate_BGD, shift_BGD, scale_BGD)


_modulated_norm = define(
    "modulated_norm", launch_modulated_norm, reference_modulated_norm,
    lambda x_BFSD, shift_BGD, scale_BGD: torch.empty_like(x_BFSD),
)  # fmt: skip
_gated_norm = define(
    "gated_norm", launch_gated_norm, reference_gated_norm,
    lambda x_BFSD, branch_BFSD, gate_BGD, shift_BGD, scale_BGD: (
        torch.empty_like(x_BFSD), torch.empty_like(x_BFSD),
    ),
)  # fmt: skip


def modulated_norm(x_BFSD: Tensor, shift_BGD: Tensor, scale_BGD: Tensor) -> Tensor:
    """LayerNorm without weights, then (1 + scale) * x + shift, per frame; fp32 inside on CUDA."""
    if uses_triton(x_BFSD, shift_BGD, scale_BGD):
        y: Tensor = _modulated_norm(x_BFSD, shift_BGD, scale_BGD)
        return y
    return reference_modulated_norm(x_BFSD, shift_BGD, scale_BGD)


def gated_norm(
    x_BFSD: Tensor, branch_BFSD: Tensor, gate_BGD: Tensor, shift_BGD: Tensor, scale_BGD: Tensor
) -> tuple[Tensor, Tensor]:
    """x' = x + gate * branch and y = `modulated_norm`(x'); returns (x', y)."""
    if uses_triton(x_BFSD, branch_BFSD, gate_BGD, shift_BGD, scale_BGD):
        total, y = _gated_norm(x_BFSD, branch_BFSD, gate_BGD, shift_BGD, scale_BGD)
        return total, y
    return reference_gated_norm(x_BFSD, branch_BFSD, gate_BGD, shift_BGD, scale_BGD)


def _case(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, tolerance: float, gated: bool,
    shared: bool = False, large: bool = False,
) -> Case:  # fmt: skip
    B, frames, S, D = shape
    G = 1 if shared else frames

    def make(device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(dtype)

        # As in the network: slices of one [B,G,3D] tensor, so not contiguous.
        shift, scale, gate = normal(B, G, 3 * D).chunk(3, dim=-1)
        inputs = {"x_BFSD": normal(*shape) + 0.5, "shift_BGD": shift, "scale_BGD": scale}
        if not gated:
            return inputs
        x = inputs.pop("x_BFSD")
        return {"x_BFSD": x, "branch_BFSD": normal(*shape), "gate_BGD": gate, **inputs}

    n, size = B * frames * S * D, dtype.itemsize
    modulation = (3 if gated else 2) * B * G * D * size
    return Case(
        name, make, tolerance, (4 if gated else 2) * n * size + modulation,
        (11 if gated else 9) * n, large,
    )  # fmt: skip


def _cases(gated: bool) -> tuple[Case, ...]:
    f32, bf16 = torch.float32, torch.bfloat16
    return (
        _case("small fp32", (2, 3, 4, 48), f32, 1e-5, gated),
        _case("small bf16", (2, 3, 4, 64), bf16, 3e-2, gated),
        _case("one noise level fp32", (2, 2, 3, 80), f32, 1e-5, gated, shared=True),
        _case("tiny fp32", (4, 6, 64, 256), f32, 1e-5, gated, large=True),
        _case("2b bf16", (8, 6, 256, 2048), bf16, 3e-2, gated, large=True),
        _case("14b bf16", (1, 6, 256, 5120), bf16, 3e-2, gated, large=True),
    )


MODULATED_NORM = Op(
    "modulated_norm", reference_modulated_norm, launch_modulated_norm, _modulated_norm,
    _cases(False),
)  # fmt: skip
GATED_NORM = Op(
    "gated_norm", reference_gated_norm, launch_gated_norm, _gated_norm, _cases(True)
)  # fmt: skip
