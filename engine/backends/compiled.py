"""torch.compile, one static graph a call; works on CPUs (needs a C++ compiler) and on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worldloop.engine.backends.base import Call, facts_of, require_like
from worldloop.errors import UserError

MANY = 256  # graphs; torch's default of 8 counts all calls of the process that share their code


def build(module: nn.Module, example: Sequence[Tensor]) -> Call:
    """See `Backend`. Compiles at once (tens of seconds on a CPU)."""
    # For the process, not just around this call: patching the limits costs milliseconds each time.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MANY)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, MANY)
    compiled = torch.compile(module, dynamic=False, fullgraph=True)
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
