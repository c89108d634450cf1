"""Noise schedules and solvers: the published 35-step procedure and few-step streaming.

Everything speaks rectified flow: x_t = (1-t) x0 + t noise, t in [0,1] per latent frame. The
published EDM-style sigma is t = sigma/(1+sigma), and its scaled network input c_in * x_sigma =
x_sigma/(1+sigma) is exactly x_t, so c_skip x_sigma + c_out v = x_t - t v. A denoiser is any
callable (x_t [B,C,F,H,W] fp32, t [B,F] fp32) -> x0 of the same shape.

Facts: [P2] nvidia-cosmos/cosmos-predict2 at 661da47; the streaming times are those of the
interactive models of cosmos-predict2.5.

Shape letters: B rows, C channels, F latent frames, H W latent height and width, O observed frames.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from worldloop.errors import UserError
from worldloop.kernels.solver import flow_x0, solver_step

Denoiser = Callable[[Tensor, Tensor], Tensor]
Prediction = Literal["velocity", "sample"]

SIGMA_MAX, SIGMA_MIN, RHO = 80.0, 0.002, 7.0
SIGMA_OBSERVED = 1e-4  # noise level that a given latent frame is said to have [P2]


# Noise ------------------------------------------------------------------------------------------


def derive_seed(*parts: int) -> int:
    """One 63-bit seed of several integers, such as (seed, group, member, chunk).

    Each part is mixed in with a round of splitmix64, so order matters, neighbours are unrelated,
    and the result depends on nothing else.
    """
    mask, state = (1 << 64) - 1, 0
    for part in parts:
        state = (state ^ (part & mask)) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1


def noise_for(
    seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal [len(seeds), *shape] fp32; row i depends on seeds[i] and `shape` alone.

    Drawn on the host with Philox, by as many threads as torch has, hence the same on every device
    and beside any batch mates; a GPU takes it over while the host goes on.
    (torch's CPU generator keeps only the low 32 bits of a seed: too few for millions of chunks.)
    """
    device = torch.device(device)
    noise = torch.empty(
        len(seeds), *shape, dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda"
    )
    rows = noise.numpy()

    def draw(i: int) -> None:
        generator = np.random.Generator(np.random.Philox(key=seeds[i]))
        generator.standard_normal(dtype=np.float32, out=rows[i])  # without the interpreter's lock

    threads = min(torch.get_num_threads(), len(seeds))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, range(len(seeds))))
    else:  # to wake a thread would take longer than to draw
        for i in range(len(seeds)):
            draw(i)
    return noise.to(device, non_blocking=True)


# What the network predicts ----------------------------------------------------------------------


def per_frame(t_BF: Tensor) -> Tensor:
    """[B,F] -> [B,1,F,1,1], to broadcast over latents."""
    return t_BF[:, None, :, None, None]


def add_noise(x0: Tensor, noise: Tensor, t_BF: Tensor) -> Tensor:
    """x_t = (1-t) x0 + t noise."""
    t = per_frame(t_BF)
    return (1 - t) * x0 + t * noise


def to_x0(prediction: Prediction, output: Tensor, x_t: Tensor, t_BF: Tensor) -> Tensor:
    """The clean latents that a network output stands for, in fp32."""
    if prediction == "sample":
        return output.float()
    return flow_x0(x_t, output, t_BF)


def dit_denoiser(dit: Callable[..., Any], prediction: Prediction, **inputs: Any) -> Denoiser:
    """A denoiser of a DiT, or of anything with its signature; `inputs` as in `DiT.forward`."""

    def denoise(x_t: Tensor, t_BF: Tensor) -> Tensor:
        output = dit(x_t, t_BF, return_kv=False, **inputs).sample
        return to_x0(prediction, output, x_t, t_BF)

    return denoise


# Reference --------------------------------------------------------------------------------------


def edm_sigmas(steps: int = 35) -> list[float]:
    """steps + 1 noise levels from 80 down to 0.002, evenly spaced in sigma^(1/7)."""
    if steps < 1:
        raise UserError(f"reference steps is {steps}; expected at least 1")
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return [(high + i / steps * (low - high)) ** RHO for i in range(steps + 1)]


def ab2_step(
    x: Tensor, x0: Tensor, sigma: float, sigma_next: float, previous: tuple[Tensor, float] | None
) -> Tensor:
    """One step of the exponential Adams-Bashforth solver in lambda = -ln sigma, fp64 inside.

    x: noisy latents on the sigma scale (x0 + sigma noise). previous: the last step's (x0, sigma);
    None makes this an Euler step. Result in fp32.
    """
    ratio = sigma_next / sigma  # e^-h
    if previous is None:
        return solver_step(x, x0, ratio, 1 - ratio)
    h = math.log(sigma / sigma_next)
    c2 = math.log(sigma / previous[1]) / h  # the last step's place, in units of this one: < 0
    phi1 = (ratio - 1) / -h
    phi2 = (phi1 - 1) / -h
    return solver_step(x, x0, ratio, h * (phi1 - phi2 / c2), previous[0], h * phi2 / c2)


def reference_sample(
    denoise: Denoiser,
    noise: Tensor,
    *,
    observed: Tensor | None = None,
    reference_steps: int = 35,
    guidance: float = 0.0,
    unconditioned: Denoiser | None = None,
) -> Tensor:
    """The published sampler: RectifiedFlowAB2 over `reference_steps`, then one more x0 call.

    noise: standard normal [B,C,F,H,W]. observed: [B,C,O,H,W], the given first latent frames; the
    network sees them unscaled at noise level 1e-4 and their x0 is overwritten. guidance g gives
    c + g (c - u). The published action model's unconditioned pass has the same inputs as its
    conditioned one, so u = c and the term is exactly 0: `unconditioned=None` leaves it out.
    Returns x0 fp32, O observed frames included.
    """
    B, _, frames, _, _ = noise.shape
    given = 0 if observed is None else observed.shape[2]
    if observed is not None and (given > frames or observed.shape[:2] != noise.shape[:2]):
        raise UserError(
            f"observed has shape {list(observed.shape)}; it must fit into {list(noise.shape)}"
        )

    def clean(x: Tensor, sigma: float) -> Tensor:
        t = sigma / (1 + sigma)
        x_t = x * (1 - t)
        t_BF = torch.full((B, frames), t, dtype=torch.float32, device=x.device)
        if observed is not None:
            x_t[:, :, :given] = observed
            t_BF[:, :given] = SIGMA_OBSERVED / (1 + SIGMA_OBSERVED)
        x0 = denoise(x_t, t_BF)
        if unconditioned is not None:
            x0 = x0 + guidance * (x0 - unconditioned(x_t, t_BF))
        if observed is not None:
            x0 = torch.cat([observed.to(x0.dtype), x0[:, :, given:]], dim=2)
        return x0

    sigmas = edm_sigmas(reference_steps)
    x = noise.float() * sigmas[0]
    previous: tuple[Tensor, float] | None = None
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        x0 = clean(x, sigma)
        x = ab2_step(x, x0, sigma, sigma_next, previous)
        previous = (x0, sigma)
    return clean(x, sigmas[-1])


# Streaming --------------------------------------------------------------------------------------


def streaming_times(steps: int, shift: float = 5.0) -> tuple[float, ...]:
    """Times s = 1, 1-1/n, ... warped by shift s / (1 + (shift-1) s).

    Four steps at shift 5 give 1, 15/16, 5/6, 5/8: the distilled models' TrigFlow angles pi/2,
    atan 15, atan 5 and atan 5/3, where t = tan / (1 + tan).
    """
    if steps < 1 or shift <= 0:
        raise UserError(f"streaming steps {steps} and shift {shift} must be positive")
    even = [1 - i / steps for i in range(steps)]
    return tuple(shift * s / (1 + (shift - 1) * s) for s in even)


STREAMING_TIMES = {steps: streaming_times(steps) for steps in (1, 2, 4)}


def streaming_step(
    x_t: Tensor, x0: Tensor, noise: Tensor, t: float, t_next: float, update: str = "renoise"
) -> Tensor:
    """From x_t and its estimated x0 to the next time.

    renoise: (1-t') x0 + t' noise with the block's own first noise, as distilled models are
    trained. euler: along the straight line from x_t to x0 (deterministic probability flow).
    """
    if update == "renoise":
        return solver_step(x0, noise, 1 - t_next, t_next)
    if update == "euler":
        return solver_step(x0, x_t, 1 - t_next / t, t_next / t)
    raise UserError(f"update is {update!r}; expected 'renoise' or 'euler'")


def streaming_sample(
    denoise: Denoiser,
    noise: Tensor,
    times: Sequence[float] = STREAMING_TIMES[4],
    update: Literal["renoise", "euler"] = "renoise",
) -> Tensor:
    """Few-step sampling of one block of latent frames: noise [B,C,F,H,W] -> x0 fp32.

    times fall from 1 and stay above 0; the last denoiser call is the result.
    """
    if (
        times[0] != 1
        or times[-1] <= 0
        or any(a <= b for a, b in zip(times, times[1:], strict=False))
    ):
        raise UserError(f"times {list(times)} must start at 1 and fall strictly, staying above 0")
    x_t = noise.float()
    x0 = x_t
    like = torch.ones(noise.shape[0], noise.shape[2], dtype=torch.float32, device=noise.device)
    for i, t in enumerate(times):
        x0 = denoise(x_t, t * like)
        if i + 1 < len(times):
            x_t = streaming_step(x_t, x0, noise, t, times[i + 1], update)
    return x0
