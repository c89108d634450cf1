"""torch.compile, one static graph a call; works on CPUs (needs a C++ compiler) and on GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from worldloop.engine.backends.base import Call, facts_of, require_like
from worldloop.engine.dit import DiT
from worldloop.engine.dit_layers import Block
from worldloop.errors import UserError

MANY = 256  # graphs; torch's default of 8 counts all calls of the process that share their code


def build(module: nn.Module, example: Sequence[Tensor]) -> Call:
    """See `Backend`. Compiles at once (tens of seconds on a CPU)."""
    compiled = _compile(module)
    expected = [facts_of(t) for t in example]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        require_like(expected, tensors)
        return compiled(*tensors)

    try:
        call(*example)
    except torch._inductor.exc.InvalidCxxCompiler as error:
        raise UserError(
            "backend 'compiled' needs a C++ compiler on a CPU; install g++ or take 'eager'"
        ) from error
    return call


def compile_blocks(dit: DiT) -> None:
    """From now on what is differentiated goes through torch.compile block by block, for training.

    In place; names of parameters stay. Blocks are also what is recomputed or sharded, and all of
    them share a graph for each shape. Passes without gradients stay plain: those of a checkpoint's
    figures and sample videos have shapes of their own, each worth half a minute of compilation.
    Where a CPU has no C++ compiler, the first pass raises UserError.
    """
    compiled = _compile(Block.forward)
    for block in cast(Sequence[Block], dit.blocks):
        block.__dict__["forward"] = functools.partial(_pass, compiled, block)


def _pass(compiled: Callable[..., Any], block: Block, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return Block.forward(block, *inputs)
    try:
        return compiled(block, *inputs)
    except torch._inductor.exc.InvalidCxxCompiler as error:
        raise UserError(
            "compiled blocks need a C++ compiler on a CPU; install g++ or pass --no-compile"
        ) from error


def _compile(call: Callable[..., Any]) -> Callable[..., Any]:
    # For the process, not just around this call: patching the limits costs milliseconds each time.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MANY)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, MANY)
    compiled: Callable[..., Any] = torch.compile(call, dynamic=False, fullgraph=True)
    return compiled
