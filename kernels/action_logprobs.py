"""Log-probability and entropy of action tokens, forward and backward, for GRPO.

A policy's distribution is over the 256 action bins only, so its head is cut to 256 rows before
the product (`OpenVLAOFT.action_logits`): the logits of the other 31,744 entries are never made.
What is left are logits [N,256], an eighth of the hidden states that they come from (D = 4096, in
fp32 against bf16). So this operator starts from logits and leaves the two products of the head
(and their gradients) to cuBLAS; a kernel that started from the hidden states would save those few
bytes and pay with a matrix product of its own, forward and twice backward.

    lp = log softmax(logits / T)[token],   H = -sum p log p
    d lp / d logit_j = (1[j = token] - p_j) / T,   d H / d logit_j = -p_j (log p_j + H) / T

Shape letters: N tokens, K bins.
"""

import torch
from torch import Tensor

from worldloop.kernels.op import Case, Op, define, require, tl, triton, uses_triton

LEAST = -1e38  # log-probability of a bin that is masked out: 0 log 0 is 0


def reference_action_logprobs(
    logits_NK: Tensor, tokens_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits_NK.float() / temperature, -1)
    entropy = -(logp.exp() * logp.clamp_min(LEAST)).sum(-1)
    return logp.gather(-1, tokens_N[..., None])[..., 0], entropy


def reference_action_logprobs_backward(
    logits_NK: Tensor,
    tokens_N: Tensor,
    entropy_N: Tensor,
    d_logprobs_N: Tensor,
    d_entropy_N: Tensor,
    temperature: float,
) -> Tensor:
    logp = torch.log_softmax(logits_NK.float() / temperature, -1).clamp_min(LEAST)
    p = logp.exp()
    grad = -p * (d_logprobs_N[:, None] + d_entropy_N[:, None] * (logp + entropy_N[:, None]))
    grad.scatter_add_(-1, tokens_N[:, None], d_logprobs_N[:, None])
    return (grad / temperature).to(logits_NK.dtype)


@triton.jit
def _log_softmax(logits_ptr, n, bins, temperature, inside_n, BINS: tl.constexpr):
    """Log-probabilities [ROWS,BINS] of rows n; bins that are not there get probability 0."""
    k = tl.arange(0, BINS)
    inside = inside_n[:, None] & (k < bins)[None, :]
    at = n.to(tl.int64)[:, None] * bins + k[None, :]
    x = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32) / temperature
    x = tl.where((k < bins)[None, :], x, -1e38)
    x -= tl.max(x, axis=1)[:, None]
    return x - tl.log(tl.sum(tl.exp(x), axis=1))[:, None], k, at, inside


@triton.jit
def _forward_kernel(
    logits_ptr, tokens_ptr, logprobs_ptr, entropy_ptr, rows, bins, temperature,
    ROWS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_n = n < rows
    logp, k, at, inside = _log_softmax(logits_ptr, n, bins, temperature, inside_n, BINS)
    p = tl.exp(logp)
    entropy = -tl.sum(tl.where(p > 0, p * logp, 0.0), axis=1)  # 0 log 0 is 0
    token = tl.load(tokens_ptr + n, mask=inside_n, other=0)
    chosen = tl.sum(tl.where(k[None, :] == token[:, None], logp, 0.0), axis=1)
    tl.store(logprobs_ptr + n, chosen, mask=inside_n)
    tl.store(entropy_ptr + n, entropy, mask=inside_n)


@triton.jit
def _backward_kernel(
    logits_ptr, tokens_ptr, entropy_ptr, d_logprobs_ptr, d_entropy_ptr, grad_ptr,
    rows, bins, temperature, ROWS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_n = n < rows
    logp, k, at, inside = _log_softmax(logits_ptr, n, bins, temperature, inside_n, BINS)
    p = tl.exp(logp)
    token = tl.load(tokens_ptr + n, mask=inside_n, other=0)
    entropy = tl.load(entropy_ptr + n, mask=inside_n, other=0.0)[:, None]
    d_logprob = tl.load(d_logprobs_ptr + n, mask=inside_n, other=0.0)[:, None]
    d_entropy = tl.load(d_entropy_ptr + n, mask=inside_n, other=0.0)[:, None]
    chosen = tl.where(k[None, :] == token[:, None], 1.0, 0.0)
    surprise = tl.where(p > 0, p * (logp + entropy), 0.0)
    grad = (d_logprob * (chosen - p) - d_entropy * surprise) / temperature
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


ROWS = 4  # of 256 bins: 1,024 elements for 4 warps


def _check(logits_NK: Tensor, tokens_N: Tensor, temperature: float) -> tuple[int, int]:
    require(logits_NK.is_contiguous(), "action_logprobs", "logits must be contiguous")
    good = tokens_N.dtype == torch.int64 and tokens_N.is_contiguous()
    require(good, "action_logprobs", f"tokens are {tokens_N.dtype}; expected contiguous int64")
    N, K = logits_NK.shape
    require(tuple(tokens_N.shape) == (N,), "action_logprobs", f"{N} rows of logits need {N} tokens")
    require(temperature > 0, "action_logprobs", f"temperature is {temperature}; must be above 0")
    return N, K


def launch_action_logprobs(
    logits_NK: Tensor, tokens_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    N, K = _check(logits_NK, tokens_N, temperature)
    logprobs, entropy = (
        torch.empty(N, dtype=torch.float32, device=logits_NK.device) for _ in range(2)
    )
    _forward_kernel[(triton.cdiv(N, ROWS),)](
        logits_NK, tokens_N, logprobs, entropy, N, K, temperature,
        ROWS=ROWS, BINS=triton.next_power_of_2(K),
    )  # fmt: skip
    return logprobs, entropy


def launch_action_logprobs_backward(
    logits_NK: Tensor,
    tokens_N: Tensor,
    entropy_N: Tensor,
    d_logprobs_N: Tensor,
    d_entropy_N: Tensor,
    temperature: float,
) -> Tensor:
    N, K = _check(logits_NK, tokens_N, temperature)
    grad = torch.empty_like(logits_NK)
    _backward_kernel[(triton.cdiv(N, ROWS),)](
        logits_NK, tokens_N, entropy_N, d_logprobs_N.contiguous(), d_entropy_N.contiguous(), grad,
        N, K, temperature, ROWS=ROWS, BINS=triton.next_power_of_2(K),
    )  # fmt: skip
    return grad


def _fake(logits_NK: Tensor, tokens_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    values = torch.empty(logits_NK.shape[0], dtype=torch.float32, device=logits_NK.device)
    return values, torch.empty_like(values)


_action_logprobs = define(
    "action_logprobs", launch_action_logprobs, reference_action_logprobs, _fake
)
_action_logprobs_backward = define(
    "action_logprobs_backward", launch_action_logprobs_backward,
    reference_action_logprobs_backward,
    lambda logits_NK, *others, **options: torch.empty_like(logits_NK),
)  # fmt: skip


def _setup(ctx, inputs, output) -> None:
    logits_NK, tokens_N, ctx.temperature = inputs
    ctx.save_for_backward(logits_NK, tokens_N, output[1])


def _backward(ctx, d_logprobs_N: Tensor, d_entropy_N: Tensor) -> tuple[Tensor, None, None]:
    logits_NK, tokens_N, entropy_N = ctx.saved_tensors
    grad = _action_logprobs_backward(
        logits_NK, tokens_N, entropy_N, d_logprobs_N, d_entropy_N, ctx.temperature
    )
    return grad, None, None


_action_logprobs.register_autograd(_backward, setup_context=_setup)


def action_logprobs(
    logits_xK: Tensor, tokens_x: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [...] in nats, fp32, of tokens under logits [...,K].

    tokens: int64 in [0,K); one outside has no meaning (an error on a CPU, some number on CUDA,
    where asking would stall the device). temperature: above 0. Differentiable with respect to the
    logits, on CUDA by its own backward kernel (once: no second derivative there).
    """
    if uses_triton(logits_xK, differentiable=True):
        logprobs, entropy = _action_logprobs(
            logits_xK.flatten(0, -2).contiguous(), tokens_x.flatten().contiguous(), temperature
        )
        return logprobs.view(tokens_x.shape), entropy.view(tokens_x.shape)
    return reference_action_logprobs(logits_xK, tokens_x, temperature)


def _case(
    name: str, N: int, K: int, dtype: torch.dtype, temperature: float, backward: bool,
    tolerance: float, large: bool = False,
) -> Case:  # fmt: skip
    def make(device: torch.device) -> dict[str, object]:
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.randn(N, K, generator=generator, device=device) * 4
        logits = logits.to(dtype)
        tokens = torch.randint(K, (N,), generator=generator, device=device)
        inputs = {"logits_NK": logits, "tokens_N": tokens}
        if backward:
            _, inputs["entropy_N"] = reference_action_logprobs(logits, tokens, temperature)
            for of in ("d_logprobs_N", "d_entropy_N"):
                inputs[of] = torch.randn(N, generator=generator, device=device)
        return {**inputs, "temperature": temperature}

    size = dtype.itemsize
    moved = N * (2 * K * size + 20) if backward else N * (K * size + 16)
    return Case(name, make, tolerance, moved, (9 if backward else 7) * N * K, large)


def _cases(backward: bool) -> tuple[Case, ...]:
    f32, bf16 = torch.float32, torch.bfloat16
    return (
        _case("small fp32", 7, 256, f32, 1.6, backward, 1e-5),
        _case("few bins fp32", 5, 37, f32, 1.0, backward, 1e-5),
        _case("small bf16", 6, 256, bf16, 1.6, backward, 1.6e-2 if backward else 1e-5),
        _case("7b fp32", 32 * 56, 256, f32, 1.6, backward, 1e-5, large=True),
        _case("7b aloha fp32", 128 * 350, 256, f32, 1.6, backward, 1e-5, large=True),
    )


ACTION_LOGPROBS = Op(
    "action_logprobs", reference_action_logprobs, launch_action_logprobs, _action_logprobs,
    _cases(False),
)  # fmt: skip
ACTION_LOGPROBS_BACKWARD = Op(
    "action_logprobs_backward", reference_action_logprobs_backward,
    launch_action_logprobs_backward, _action_logprobs_backward, _cases(True),
)  # fmt: skip
