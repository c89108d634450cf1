"""What the samplers do between two passes of the network, one launch each.

`flow_x0`: the clean latents that a velocity stands for, x_t - t v, with a time per latent frame.
`solver_step`: a weighted sum of two or three tensors, which is what every update of the samplers
is (renoising, Euler, and the two-step Adams-Bashforth solver of the published procedure): the
weights are host numbers known before the first step, so nothing waits for the device and a
captured CUDA graph replays them. Sums are in fp64, as published for the reference procedure.

Shape letters: B rows, C channels, F latent frames, H W latent height and width.
"""

import numpy as np
import torch
from torch import Tensor

from worldloop.kernels.op import Case, Op, define, require, tl, triton, uses_triton

BLOCK = 1024


def reference_flow_x0(x_BCFHW: Tensor, velocity_BCFHW: Tensor, t_BF: Tensor) -> Tensor:
    return x_BCFHW.float() - t_BF.float()[:, None, :, None, None] * velocity_BCFHW.float()


@triton.jit
def _flow_x0_kernel(
    x_ptr, v_ptr, t_ptr, out_ptr, size, frames, pixels, per_row, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    frame = i // per_row * frames + i // pixels % frames
    t = tl.load(t_ptr + frame, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, x - t * v, mask=inside)


def launch_flow_x0(x_BCFHW: Tensor, velocity_BCFHW: Tensor, t_BF: Tensor) -> Tensor:
    B, C, frames, H, W = x_BCFHW.shape
    require(velocity_BCFHW.shape == x_BCFHW.shape, "flow_x0", "x and velocity differ in shape")
    require(tuple(t_BF.shape) == (B, frames), "flow_x0", f"t must be [{B},{frames}]")
    x, v, t = x_BCFHW.contiguous(), velocity_BCFHW.contiguous(), t_BF.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _flow_x0_kernel[(triton.cdiv(out.numel(), BLOCK),)](
        x, v, t, out, out.numel(), frames, H * W, C * frames * H * W, BLOCK=BLOCK
    )
    return out


_flow_x0 = define(
    "flow_x0", launch_flow_x0, reference_flow_x0,
    lambda x_BCFHW, velocity_BCFHW, t_BF: torch.empty(
        x_BCFHW.shape, dtype=torch.float32, device=x_BCFHW.device
    ),
)  # fmt: skip


def flow_x0(x_BCFHW: Tensor, velocity_BCFHW: Tensor, t_BF: Tensor) -> Tensor:
    """x_t - t v in fp32; t [B,F]."""
    if uses_triton(x_BCFHW, velocity_BCFHW, t_BF):
        x0: Tensor = _flow_x0(x_BCFHW, velocity_BCFHW, t_BF)
        return x0
    return reference_flow_x0(x_BCFHW, velocity_BCFHW, t_BF)


def reference_solver_step(
    x: Tensor, y: Tensor, z: Tensor | None, a: float, b: float, c: float
) -> Tensor:
    total = a * x.double() + b * y.double()
    return (total if z is None else total + c * z.double()).float()


@triton.jit
def _solver_step_kernel(
    x_ptr, y_ptr, z_ptr, out_ptr, size, a, a_rest, b, b_rest, c, c_rest,
    THREE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A host float arrives as fp32; its rest makes it fp64 again."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float64) * (
        tl.cast(a, tl.float64) + tl.cast(a_rest, tl.float64)
    )
    total += tl.load(y_ptr + i, mask=inside, other=0.0).to(tl.float64) * (
        tl.cast(b, tl.float64) + tl.cast(b_rest, tl.float64)
    )
    if THREE:
        total += tl.load(z_ptr + i, mask=inside, other=0.0).to(tl.float64) * (
            tl.cast(c, tl.float64) + tl.cast(c_rest, tl.float64)
        )
    tl.store(out_ptr + i, total.to(tl.float32), mask=inside)


def _split(value: float) -> tuple[float, float]:
    """A float as the sum of two that fp32 holds (to 48 bits)."""
    high = float(np.float32(value))
    return high, value - high


def launch_solver_step(
    x: Tensor, y: Tensor, z: Tensor | None, a: float, b: float, c: float
) -> Tensor:
    given = [x, y] if z is None else [x, y, z]
    require(all(t.shape == x.shape for t in given), "solver_step", "tensors differ in shape")
    given = [t.contiguous() for t in given]
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _solver_step_kernel[(triton.cdiv(out.numel(), BLOCK),)](
        given[0], given[1], given[-1], out, out.numel(), *_split(a), *_split(b), *_split(c),
        THREE=z is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return out


_solver_step = define(
    "solver_step", launch_solver_step, reference_solver_step,
    lambda x, y, z, a, b, c: torch.empty(x.shape, dtype=torch.float32, device=x.device),
)  # fmt: skip


def solver_step(
    x: Tensor, y: Tensor, a: float, b: float, z: Tensor | None = None, c: float = 0.0
) -> Tensor:
    """a x + b y (+ c z), summed in fp64, in fp32."""
    if uses_triton(x, y, z):
        out: Tensor = _solver_step(x, y, z, a, b, c)
        return out
    return reference_solver_step(x, y, z, a, b, c)


def _flow_case(
    name: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, large: bool = False
) -> Case:
    B, C, frames, H, W = shape

    def make(device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        x, v = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        t = torch.rand(B, frames, generator=generator, device=device)
        return {"x_BCFHW": x, "velocity_BCFHW": v.to(dtype), "t_BF": t}

    n = B * C * frames * H * W
    return Case(name, make, 1e-6, (8 + dtype.itemsize) * n + 4 * B * frames, 2 * n, large)


def _step_case(
    name: str, shape: tuple[int, ...], weights: tuple[float, float, float], three: bool,
    large: bool = False,
) -> Case:  # fmt: skip
    def make(device: torch.device) -> dict[str, object]:
        generator = torch.Generator(device).manual_seed(0)
        x, y, z = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
        a, b, c = weights
        return {"x": 80 * x, "y": y, "z": z if three else None, "a": a, "b": b, "c": c}

    n = torch.Size(shape).numel()
    return Case(name, make, 2.5e-7, (16 if three else 12) * n, (5 if three else 3) * n, large)


FLOW_X0 = Op(
    "flow_x0", reference_flow_x0, launch_flow_x0, _flow_x0,
    (
        _flow_case("small fp32", (2, 3, 4, 5, 6), torch.float32),
        _flow_case("small bf16", (1, 4, 2, 8, 8), torch.bfloat16),
        _flow_case("2b bf16", (8, 16, 6, 32, 32), torch.bfloat16, large=True),
    ),
)  # fmt: skip
SOLVER_STEP = Op(
    "solver_step", reference_solver_step, launch_solver_step, _solver_step,
    (
        _step_case("small two", (2, 3, 4, 5, 6), (0.375, 0.625, 0.0), False),
        _step_case("small three", (2, 3, 4, 5, 7), (0.7391, 0.3912, -0.1303), True),
        _step_case("2b renoise", (8, 16, 6, 32, 32), (1 / 16, 15 / 16, 0.0), False, large=True),
        _step_case("2b reference", (8, 16, 7, 32, 32), (0.7391, 0.3912, -0.1303), True, large=True),
    ),
)  # fmt: skip
