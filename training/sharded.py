"""Training shared out over processes with FSDP2, and checkpoints of one file a process.

Every process holds a row range of each tensor (Muon, which needs whole matrices, gathers them:
`optimizer.py`). A checkpoint counts once ``sharded.json`` names it, which is written after every
process has written its part; it may be resumed by another number of processes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from worldloop.checkpoint import load_training_state, save_training_state
from worldloop.config import read_json
from worldloop.engine.dit import DiT
from worldloop.engine.reward import RewardHead
from worldloop.errors import UserError
from worldloop.files import atomic_write_text
from worldloop.training.common import EMA, Workers


def shard(dit: DiT, reward: RewardHead, workers: Workers, device: torch.device) -> None:
    """Replace every parameter by this process's rows of it; call it before the optimizer is made.

    Each transformer block is gathered when it runs and let go afterwards.
    """
    mesh = init_device_mesh(device.type, (workers.size,))
    for block in dit.blocks:
        fully_shard(block, mesh=mesh)
    for module in (dit, reward):
        fully_shard(module, mesh=mesh)


def whole_state(module: nn.Module, *, keep: bool) -> dict[str, Tensor] | None:
    """Every tensor of a sharded module, whole, on the CPU of the processes that ``keep`` it.

    All processes must call it; the others get None and hold one whole tensor at a time.
    """
    kept = {}
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            kept[name] = whole.cpu()
    return kept if keep else None


def refuse_sharded(folder: Path) -> None:
    """Raise UserError where a sharded run was here: without --fsdp it would begin anew."""
    if (folder / "sharded.json").is_file():
        raise UserError(
            f"{folder}: holds a sharded run; go on with --fsdp under torchrun, or choose another "
            "folder"
        )


class ShardedState:
    """The training state of a sharded run: ``step-N/rank-R`` folders, and which of them counts."""

    def __init__(self, folder: Path, workers: Workers) -> None:
        self.folder, self.workers = folder, workers

    def save(self, module: nn.Module, opt: torch.optim.Optimizer, ema: EMA, step: int) -> None:
        """Write this process's part; returns when the checkpoint is whole. All must call it."""
        state = {"model": module.state_dict(), "optimizer": opt.state_dict(), "ema": ema.shadow}
        name, workers = f"step-{step:08d}", self.workers
        rank = f"rank-{workers.rank}"
        save_training_state(self.folder / name / rank, _to_local(state), {"step": step}, keep=1)
        workers.barrier()
        if workers.rank == 0:
            document = {"step": step, "processes": workers.size}
            atomic_write_text(self.folder / "sharded.json", json.dumps(document) + "\n")
            for old in self.folder.glob("step-*"):
                if old.name != name:
                    shutil.rmtree(old, ignore_errors=True)
        workers.barrier()

    def load(self, module: nn.Module, opt: torch.optim.Optimizer, ema: EMA) -> int:
        """Restore the checkpoint that counts; the step to go on from (0 where there is none)."""
        path = self.folder / "sharded.json"
        if not path.is_file():
            if any(self.folder.glob("state-*")):
                raise UserError(
                    f"{self.folder}: holds a run that was not sharded; leave --fsdp out, or choose "
                    "another folder"
                )
            return 0
        document = read_json(path)
        step, processes = int(document["step"]), int(document["processes"])
        found = []
        for rank in range(processes):
            part = self.folder / f"step-{step:08d}" / f"rank-{rank}"
            loaded = load_training_state(part)
            if loaded is None:
                raise UserError(f"{part}: is missing; restore it, or choose another folder")
            found.append(loaded[0])
        mesh = next(p.device_mesh for p in module.parameters() if isinstance(p, DTensor))
        state = _to_sharded(found, mesh)
        try:
            module.load_state_dict(state["model"])
        except RuntimeError as error:
            text = " ".join(str(error).split())[:300]
            raise UserError(f"{self.folder}: the run to resume does not fit ({text})") from error
        opt.load_state_dict(state["optimizer"])
        for name, value in state["ema"].items():
            ema.shadow[name].copy_(value)
        return step


def _to_local(value: Any) -> Any:
    """Sharded tensors as {"rows": this process's part}; containers are copied."""
    if isinstance(value, DTensor):
        return {"rows": value.to_local()}
    if isinstance(value, dict):
        return {key: _to_local(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_local(item) for item in value]
    return value


def _to_sharded(parts: list[Any], mesh: DeviceMesh) -> Any:
    """The inverse, from the states of all processes, whatever their number was."""
    first = parts[0]
    if isinstance(first, dict) and first.keys() == {"rows"}:
        whole = torch.cat([part["rows"] for part in parts])
        return distribute_tensor(whole.to(mesh.device_type), mesh, [Shard(0)], src_data_rank=None)
    if isinstance(first, dict):
        return {key: _to_sharded([part[key] for part in parts], mesh) for key in first}
    if isinstance(first, list):
        return [_to_sharded(list(items), mesh) for items in zip(*parts, strict=True)]
    return first
