"""`worldloop bench kernels`: every operator at its cases, beside the floor of its bytes and FLOPs.

On a GPU three arms take turns on each case: the Triton kernel, the reference in plain torch, and
the reference under torch.compile; inputs come from memory (the L2 cache is overwritten before
each repeat). Elsewhere the reference is timed and, for bf16, the operator's version in
kernels/csrc where there is one. Correctness comes first: an arm whose error against the reference
in fp32 exceeds the case's tolerance gets no time, and the exit code is 1. The floor is
max(bytes / copy rate, FLOPs / matrix-product rate in the case's dtype), both measured in the same
run; a small case can beat it on a CPU, whose caches hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from worldloop.bench import timing
from worldloop.bench.timing import Ceilings, Times, kernel_seconds
from worldloop.cli import parse_config
from worldloop.config import positive
from worldloop.engine.precision import has_fast_bf16
from worldloop.errors import UserError
from worldloop.kernels.cases import OPS, load_op
from worldloop.kernels.native import HAS_NATIVE
from worldloop.kernels.op import HAS_TRITON, Case, Op

# Of a case on a CPU: what a core does in a few tenths of a second.
MOST_BYTES, MOST_FLOPS = 64 << 20, 5e9


@dataclass(frozen=True)
class KernelBench:
    """Time the operators; write bench JSON."""

    out: Path = Path("runs/bench")
    op: str | None = None
    """Only this operator."""
    repeats: int = 10
    rounds: int = 3
    """How often the arms take turns."""
    compiled: bool = True
    """Also the reference under torch.compile, on a GPU."""
    threads: int = 2
    device: str | None = None

    def __post_init__(self) -> None:
        positive(self, "repeats", "rounds", "threads")
        if self.op is not None and self.op not in OPS:
            raise UserError(f"op is {self.op!r}; known: {', '.join(OPS)}")


def products_of(inputs: dict[str, Any]) -> torch.dtype:
    """The dtype whose matrix products bound an operator of these inputs."""
    half = any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in inputs.values())
    return torch.bfloat16 if half else torch.float32


def arms_of(
    op: Op, inputs: dict[str, Any], device: torch.device, compiled: bool
) -> dict[str, Callable[..., Any]]:
    """Functions of the same arguments, by the name of their implementation."""
    if device.type != "cuda":
        arms = {"reference": op.reference}
        if op.native is not None and HAS_NATIVE and products_of(inputs) == torch.bfloat16:
            arms["native"] = op.native
        return arms
    arms = {"triton": op.custom} if HAS_TRITON else {}
    arms["reference"] = op.reference
    if compiled:
        torch.compiler.reset()
        arms["compiled"] = torch.compile(op.reference, dynamic=False)
    return arms


@torch.inference_mode()
def time_case(
    op: Op, case: Case, device: torch.device, config: KernelBench
) -> list[dict[str, Any]]:
    """One row an arm: its error and, where that passes the gate, its times."""
    inputs = case.make(device)
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], Any]] = {}
    times: dict[str, Times] = {}
    for name, function in arms_of(op, inputs, device, config.compiled).items():
        error = op.error_of(function, inputs)
        passed = error <= case.tolerance
        rows.append({
            "op": op.name, "case": case.name, "implementation": name,
            "dtype": timing.dtype_name(products_of(inputs)),
            "bytes": case.bytes, "flops": case.flops,
            "error": error, "tolerance": case.tolerance, "passed": passed,
        })  # fmt: skip
        if passed:
            runs[name], times[name] = partial(function, **inputs), Times()
    for _ in range(config.rounds):
        for name, run in runs.items():
            times[name].wall += kernel_seconds(run, config.repeats, device)
    for row in rows:
        if row["passed"]:
            row.update(times[row["implementation"]].to_dict())
            del row["gpu_p50_s"]  # on a GPU all of them are event times
    return rows


def beside_floor(row: dict[str, Any], ceilings: dict[str, Ceilings]) -> dict[str, Any]:
    """The row with its floor in seconds, what share of it its median reaches, and its rate."""
    if not row["passed"]:
        return row
    own = ceilings.get(row["dtype"], ceilings["float32"])
    floor = max(row["bytes"] / own.copy, row["flops"] / own.gemm)
    share, rate = floor / row["p50_s"], row["bytes"] / row["p50_s"] / 1e9
    return {**row, "floor_s": floor, "share_of_floor": share, "gb_per_s": rate}


def fits(case: Case, device: torch.device) -> bool:
    return device.type == "cuda" or (case.bytes <= MOST_BYTES and case.flops <= MOST_FLOPS)


def bench(config: KernelBench) -> dict[str, Any]:
    """Measure; the document that is written."""
    torch.set_num_threads(config.threads)
    device = timing.device_of(config.device)
    dtypes = [torch.float32]
    if has_fast_bf16(device):  # emulated products would take minutes and bound nothing
        dtypes.append(torch.bfloat16)
    ceilings = {timing.dtype_name(dtype): Ceilings(dtype, device).measure() for dtype in dtypes}
    rows: list[dict[str, Any]] = []
    left_out = []
    for name in [config.op] if config.op else OPS:
        op = load_op(name)
        for case in op.cases:
            if not case.large:
                continue  # small cases are for tests
            if fits(case, device):
                rows += time_case(op, case, device, config)
            else:
                left_out.append(f"{op.name}, {case.name}")
        for ceiling in ceilings.values():
            ceiling.measure()
    rows = [beside_floor(row, ceilings) for row in rows]
    found = [ceiling.to_dict() for ceiling in ceilings.values()]
    values = {"ceilings": found, "rows": rows, "left_out": left_out}
    return timing.document("kernels", config, device, config.threads, values, ["triton"])


def floors_table(copy: float, gemm: float) -> str:
    """Markdown: bytes, FLOPs and computed floor of every large case at given rates (docs)."""
    lines = ["| operator | case | MB | GFLOP | floor, us | bound by |", "|---|---|--:|--:|--:|---|"]
    for name in OPS:
        op = load_op(name)
        for case in op.cases:
            if case.large:
                move, count = case.bytes / copy, case.flops / gemm
                by = "memory" if move >= count else "products"
                lines.append(
                    f"| `{name}` | {case.name} | {case.bytes / 1e6:.4g} | {case.flops / 1e9:.3g} "
                    f"| {1e6 * max(move, count):.3g} | {by} |"
                )
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any]) -> str:
    """A row as the terminal shows it."""
    label = f"{row['op']:<26}{row['case']:<24}{row['implementation']:<11}"
    if not row["passed"]:
        return f"{label} WRONG: error {row['error']:.1e}, tolerance {row['tolerance']:.1e}"
    return (
        f"{label}{1e6 * row['p50_s']:11.1f} us {row['share_of_floor']:7.1%} of the floor "
        f"{row['gb_per_s']:8.1f} GB/s  error {row['error']:.1e}"
    )


def main(argv: list[str]) -> int:
    """Run from the command line; 1 where a result was wrong."""
    config = parse_config(KernelBench, argv, "worldloop bench kernels")
    found = bench(config)
    path = timing.write(config.out, f"kernels-{config.op}" if config.op else "kernels", found)
    print(*map(line, found["rows"]), sep="\n")
    products = ", ".join(f"{c['dtype']} {c['gemm_tflops']:.3g} TFLOP/s" for c in found["ceilings"])
    copy = max(c["copy_gb_per_s"] for c in found["ceilings"])
    print(f"ceilings: copy {copy:.1f} GB/s, products {products}; {path}")
    return int(not all(row["passed"] for row in found["rows"]))
