"""Muon for the hidden matrices and AdamW for the rest, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from worldloop.engine.precision import has_fast_bf16
from worldloop.training.common import learning_rate

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Muon's published coefficients, five rounds


def orthogonalised(matrix: Tensor) -> Tensor:
    """Muon's direction: all singular values brought near 1 by Newton-Schulz.

    In bf16 as published; in fp32 where bf16 is emulated (a hundred times slower).
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16() if has_fast_bf16(matrix.device) else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` (Nesterov, adjusted to AdamW's step size), in a precision that is fast
    here, and on matrices cut by rows: a cut one's momentum is gathered, orthogonalised alike on
    every process, and each keeps its rows."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                if isinstance(p, DTensor):
                    whole = orthogonalised(update.full_tensor()).to(p.dtype)
                    update = distribute_tensor(
                        whole, p.device_mesh, p.placements, src_data_rank=None
                    )
                else:
                    update = orthogonalised(update).to(p.dtype)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


class Rates(Protocol):
    """What `MuonAdamW` reads of a training configuration."""

    @property
    def lr(self) -> float: ...

    @property
    def lr_vectors(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices, AdamW for embeddings, heads and vectors, as one optimiser."""

    def __init__(self, model: nn.Module, config: Rates) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            layer = ".blocks." in f".{name}" or ".layers." in f".{name}"
            hidden = parameter.ndim == 2 and layer
            (matrices if hidden else others).append(parameter)
        self.muon = Muon(matrices, config.lr, config.weight_decay, 0.95)
        self.adamw = torch.optim.AdamW(
            others, lr=config.lr_vectors, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
        self.bases = [config.lr, config.lr_vectors]

    def schedule(self, step: int, steps: int) -> float:
        for group, base in zip(self.param_groups, self.bases, strict=True):
            group["lr"] = learning_rate(step, steps, base)
        return float(self.param_groups[0]["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, object]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.muon.load_state_dict(state["muon"])  # type: ignore[arg-type]
        self.adamw.load_state_dict(state["adamw"])  # type: ignore[arg-type]
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
