"""Muon for the hidden matrices and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from worldloop.training.common import learning_rate
from worldloop.training.sharded import ShardedMuon


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
        self.muon: torch.optim.Optimizer
        if isinstance(matrices[0], DTensor):
            self.muon = ShardedMuon(matrices, config.lr, config.weight_decay, 0.95)
        else:
            self.muon = torch.optim.Muon(
                matrices,
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            )
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
