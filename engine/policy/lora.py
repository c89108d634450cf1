"""Low-rank adapters on every linear layer but the output matrix, in peft's file layout.

Train with `add_lora`, keep with `save_lora`; `formats.openvla.merge_lora` adds the files to the
weights. Published OpenVLA-OFT settings: rank 32, alpha 16, no dropout, "all-linear".
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloop.checkpoint import save_tensors
from worldloop.errors import UserError
from worldloop.files import PathLike, atomic_write_text


class LoRALinear(nn.Module):
    """A frozen linear layer plus ``alpha / rank * B A``; starts as the layer itself (B = 0)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        weight = base.weight
        noise = torch.randn(rank, base.in_features, generator=generator)
        self.lora_A = nn.Parameter((noise / base.in_features**0.5).to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return self.base(x) + self.scale * low


def add_lora(network: nn.Module, rank: int, alpha: float, seed: int = 0) -> list[nn.Parameter]:
    """Wrap every `nn.Linear` but ``lm_head`` in place, freeze the rest; the adapters' parameters.

    Raises UserError for a rank below 1.
    """
    if rank < 1:
        raise UserError(f"LoRA rank is {rank}; expected at least 1")
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            owner = network.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], LoRALinear(module, rank, alpha, generator))
    return [p for p in network.parameters() if p.requires_grad]


@torch.no_grad()
def merge_and_unload(network: nn.Module) -> None:
    """Add the adapters to the weights they wrap and put the plain layers back, in place."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoRALinear):
            weight = module.base.weight
            merged = weight.float() + module.scale * (module.lora_B @ module.lora_A)
            weight.copy_(merged.to(weight.dtype))
            owner = network.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], module.base)
    network.requires_grad_(True)


def save_lora(network: nn.Module, folder: PathLike) -> Path:
    """Write adapter_model.safetensors and adapter_config.json as peft does."""
    target = Path(folder)
    tensors: dict[str, Tensor] = {}
    rank, alpha = 0, 0.0
    for name, module in network.named_modules():
        if isinstance(module, LoRALinear):
            rank, alpha = len(module.lora_A), module.scale * len(module.lora_A)
            tensors[f"base_model.model.{name}.lora_A.weight"] = module.lora_A.detach()
            tensors[f"base_model.model.{name}.lora_B.weight"] = module.lora_B.detach()
    if not tensors:
        raise UserError("save_lora: this network has no adapters; call add_lora first")
    save_tensors(target / "adapter_model.safetensors", tensors)
    options = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0,
               "target_modules": "all-linear", "bias": "none"}  # fmt: skip
    atomic_write_text(target / "adapter_config.json", json.dumps(options, indent=2) + "\n")
    return target
