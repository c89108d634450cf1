"""Gradients of the one operator that has its own, and who gets the reference's."""

import pytest
import torch

from worldloop.kernels.action_logprobs import (
    _action_logprobs,
    action_logprobs,
    reference_action_logprobs,
)
from worldloop.kernels.gated_norm import gated_norm, reference_gated_norm
from worldloop.kernels.op import reference_only, uses_triton


def logits_and_tokens(device: str = "cpu", dtype: torch.dtype = torch.float32):
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(3, 5, 256, generator=generator, device=device, dtype=dtype) * 3
    return logits, torch.randint(256, (3, 5), generator=generator, device=device)


def loss_gradient(function, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    logprobs, entropy = function(logits, tokens, 1.6)
    weights = torch.linspace(-1, 1, tokens.numel(), device=logits.device).view(tokens.shape)
    (weights * logprobs + 0.3 * weights.flip(0) * entropy).sum().backward()
    assert logits.grad is not None
    return logits.grad


def through_operator(logits: torch.Tensor, tokens: torch.Tensor, temperature: float):
    found = _action_logprobs(logits.flatten(0, 1), tokens.flatten(), temperature)
    return tuple(x.view(tokens.shape) for x in found)


def test_closed_form_gradient_is_autograd_of_the_reference() -> None:
    """The formulas of the backward kernel, with the reference's arithmetic, on the CPU."""
    logits, tokens = logits_and_tokens()
    mine = loss_gradient(through_operator, logits, tokens)
    torch.testing.assert_close(mine, loss_gradient(reference_action_logprobs, logits, tokens))


def test_one_output_alone_can_be_differentiated() -> None:
    logits, tokens = logits_and_tokens()
    for which in (0, 1):
        grads = []
        for function in (through_operator, reference_action_logprobs):
            x = logits.clone().requires_grad_()
            function(x, tokens, 1.0)[which].sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads)


def test_impossible_bins_have_no_gradient_in_the_operator() -> None:
    """A logit of -1e30 (a masked bin): probability 0, entropy and gradients finite."""
    logits, tokens = logits_and_tokens()
    logits[..., 200:] = -1e30
    gradient = loss_gradient(through_operator, logits, tokens.clamp_max(199))
    assert torch.isfinite(gradient).all() and not gradient[..., 200:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_on_cuda(dtype: torch.dtype) -> None:
    logits, tokens = logits_and_tokens("cuda")
    logits = logits.to(dtype)
    with reference_only():
        exact = loss_gradient(action_logprobs, logits.float(), tokens)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    mine = loss_gradient(action_logprobs, logits, tokens)
    torch.testing.assert_close(mine.float(), exact, rtol=tolerance, atol=1e-6)


@pytest.mark.gpu
def test_a_wanted_gradient_takes_the_reference() -> None:
    x = torch.randn(2, 3, 4, 64, device="cuda")
    shift, scale, gate = torch.randn(2, 3, 192, device="cuda").chunk(3, -1)
    assert uses_triton(x, shift)
    with torch.autocast("cuda", torch.bfloat16):
        assert not uses_triton(x)
    with reference_only():
        assert not uses_triton(x)
    x.requires_grad_()
    assert not uses_triton(shift, x) and uses_triton(shift, x, differentiable=True)
    with torch.no_grad():
        assert uses_triton(shift, x)
    total, y = gated_norm(x, x.detach(), gate, shift, scale)
    (total + y).sum().backward()
    other = x.detach().clone().requires_grad_()
    sum(reference_gated_norm(other, other.detach(), gate, shift, scale)).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_cpu_takes_the_reference() -> None:
    assert not uses_triton(torch.zeros(1))
