"""What every operator is made of: a reference, a Triton launcher, a public function and CASES.

Which one runs is decided by `uses_triton` and `uses_native`, here. The public function of an
operator is plain Python: on a CPU it is its reference (no dispatcher on the way, autograd as ever,
and an export to ONNX sees torch's own operators), of two operators in bf16 their version in
kernels/csrc; on CUDA the Triton kernel behind a `torch.library.custom_op`, which torch.compile
takes whole. Gradients are the reference's, except where an operator says that it has its own.

Triton is optional. Without it the operators are their references, on CUDA as well, and only a
direct call of a Triton launcher raises.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worldloop.errors import UserError
from worldloop.kernels.native import HAS_NATIVE

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:

    class _Kernel:
        """In the place of a kernel: any launch says what is missing."""

        def __getitem__(self, grid: object) -> Any:
            raise UserError("this needs triton, which is not installed; pip install 'triton>=3.6'")

    class _Language:
        constexpr = object

    class _Triton:
        @staticmethod
        def jit(function: object) -> _Kernel:
            return _Kernel()

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << (n - 1).bit_length()

    triton, tl = _Triton, _Language
    HAS_TRITON = False
else:
    HAS_TRITON = True

__all__ = [
    "HAS_TRITON", "INTERPRETED", "Case", "Op", "define", "error", "reference_only", "require",
    "tl", "triton", "uses_native", "uses_triton",
]  # fmt: skip

# Kernels run on CPU tensors, interpreted: for tests. Triton reads the variable when it is imported.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

_reference_only = False


@contextmanager
def reference_only() -> Iterator[None]:
    """Inside, every operator is its reference: the other arm of a comparison."""
    global _reference_only
    before, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = before


def uses_triton(first: Tensor, *others: Tensor | None, differentiable: bool = False) -> bool:
    """Whether the public operator of these inputs is its Triton kernel.

    Not on a CPU, not where a gradient is asked for (unless `differentiable`), not under autocast
    (a custom operator has no rule for it), and not in an export, which wants torch's operators.
    """
    if not first.is_cuda or not HAS_TRITON or _reference_only:
        return False
    if torch.compiler.is_exporting() or torch.is_autocast_enabled("cuda"):
        return False
    if differentiable or not torch.is_grad_enabled():
        return True
    return not any(t is not None and t.requires_grad for t in (first, *others))


def uses_native(first: Tensor, *others: Tensor | None, differentiable: bool = False) -> bool:
    """Whether an operator of these inputs runs in kernels/csrc, where it has a version there.

    In bf16 on a CPU that has units for it; not where a gradient is asked for (unless
    `differentiable`), and not in an export.
    """
    if not HAS_NATIVE or first.device.type != "cpu" or _reference_only:
        return False
    there = [first, *(t for t in others if t is not None)]
    if any(t.dtype != torch.bfloat16 for t in there) or torch.compiler.is_exporting():
        return False
    if differentiable or not torch.is_grad_enabled():
        return True
    return not any(t.requires_grad for t in there)


def define(
    name: str,
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: tuple[str, ...] = (),
    on_cpu: Callable[..., Any] | None = None,
) -> Any:
    """The operator worldloop::name: Triton on CUDA; `on_cpu`, or else the reference, on a CPU.

    The schema is read from the annotations of `launch`; `fake` makes empty results.
    """

    @functools.wraps(launch)  # which also keeps the annotations
    def on_its_device(*args: Any, **options: Any) -> Any:
        first = args[0] if args else next(iter(options.values()))
        with torch.cuda.device(first.device):  # a kernel is launched on the current device
            return launch(*args, **options)

    op = torch.library.custom_op(
        f"worldloop::{name}", on_its_device, mutates_args=mutates, device_types="cuda"
    )
    op.register_kernel("cpu")(on_cpu or reference)
    op.register_fake(fake)
    return op


def require(condition: bool, name: str, problem: str) -> None:
    """Raise UserError: an operator's input is not what its kernel reads."""
    if not condition:
        raise UserError(f"{name}: {problem}")


# Cases ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One shape and dtype at which an operator is tested and timed.

    make: inputs by name, random, on a device. tolerance: largest `error` of the kernel against
    the reference in fp32. bytes: read and written once each, what the operator cannot avoid.
    flops: of its arithmetic. large: too much for the interpreter.
    """

    name: str
    make: Callable[[torch.device], dict[str, Any]]
    tolerance: float
    bytes: int
    flops: int
    large: bool = False


@dataclass(frozen=True)
class Op:
    """An operator with everything that a test or a benchmark asks of it.

    reference, launch, custom and native take the same arguments, those that `Case.make` names.
    mutates: inputs that are written; they count as results. native: its version in kernels/csrc,
    for bf16 on a CPU.
    """

    name: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    custom: Any
    cases: tuple[Case, ...]
    mutates: tuple[str, ...] = ()
    native: Callable[..., Any] | None = None

    def results(self, function: Callable[..., Any], inputs: Mapping[str, Any]) -> list[Tensor]:
        """What a function returns for a copy of the inputs, and the inputs that it wrote."""
        own = {k: v.clone() if k in self.mutates else v for k, v in inputs.items()}
        out = function(**own)
        out = [] if out is None else [out] if isinstance(out, Tensor) else list(out)
        return [*out, *(own[name] for name in self.mutates)]

    def error_of(self, function: Callable[..., Any], inputs: Mapping[str, Any]) -> float:
        """Largest `error` of a function's results against the reference in fp32."""
        exact = self.results(self.reference, {k: _raised(v) for k, v in inputs.items()})
        return max(map(error, self.results(function, inputs), exact))


def _raised(value: Any) -> Any:
    """Half-precision tensors as fp32; everything else as it is."""
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    if isinstance(value, list):
        return [_raised(v) for v in value]
    return value


def error(found: Tensor, exact: Tensor) -> float:
    """Largest |found - exact| / (|exact| + rms of exact) over all elements; inf for a NaN.

    One wrong element shows, and an element near zero does not count as infinitely wrong.
    """
    if found.shape != exact.shape:
        return float("inf")
    a, b = found.double(), exact.double()
    share = (a - b).abs() / (b.abs() + b.square().mean().sqrt() + 1e-30)
    worst = float(share.max()) if share.numel() else 0.0
    return worst if worst == worst else float("inf")
