"""Micro-benchmarks of the operators' cases, behind their correctness gate (pytest-benchmark).

    pytest tests/kernels/test_speed.py --benchmark-sort=name

On a CPU the small cases of what runs there, the reference; on a GPU every large case, as kernel.
`worldloop bench kernels` writes the committed figures.
"""

from functools import partial
from pathlib import Path

import pytest
import torch

from worldloop.bench.kernels import (
    KernelBench,
    arms_of,
    bench,
    beside_floor,
    floors_table,
    main,
    time_case,
)
from worldloop.bench.timing import Ceilings
from worldloop.engine.precision import has_fast_bf16
from worldloop.errors import UserError
from worldloop.kernels.cases import OPS, load_op
from worldloop.kernels.op import Case, Op

CPU = torch.device("cpu")
PAIRS = [(load_op(name), case) for name in OPS for case in load_op(name).cases]
SMALL = [(op, case) for op, case in PAIRS if not case.large]
LARGE = [(op, case) for op, case in PAIRS if case.large]


def names(pairs: list[tuple[Op, Case]]) -> list[str]:
    return [f"{op.name}-{case.name.replace(' ', '-')}" for op, case in pairs]


def measure(benchmark, op: Op, case: Case, function, device: torch.device) -> None:
    inputs = case.make(device)
    with torch.inference_mode():
        assert op.error_of(function, inputs) <= case.tolerance, "no speed for a wrong result"
        run = partial(function, **inputs)

        def once() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.extra_info.update(bytes=case.bytes, flops=case.flops)
        benchmark.pedantic(once, rounds=5, iterations=1, warmup_rounds=2)


@pytest.mark.parametrize(("op", "case"), SMALL, ids=names(SMALL))
def test_speed_of_reference(benchmark, op: Op, case: Case) -> None:
    measure(benchmark, op, case, op.reference, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case"), LARGE, ids=names(LARGE))
def test_speed_on_cuda(benchmark, op: Op, case: Case) -> None:
    measure(benchmark, op, case, op.custom, torch.device("cuda"))


def test_a_wrong_result_gets_no_time() -> None:
    """The gate: an arm beyond its tolerance is named and has no times."""
    import dataclasses

    op = load_op("modulated_norm")
    case = op.cases[0]
    config = KernelBench(repeats=2, rounds=2, device="cpu")
    (row,) = time_case(op, case, CPU, config)
    assert row["passed"] and row["p50_s"] > 0 and row["repeats"] == 4
    slow = {"float32": Ceilings(torch.float32, CPU, gemm=1e12, copy=case.bytes / row["p50_s"])}
    assert beside_floor(row, slow)["share_of_floor"] == pytest.approx(1)
    wrong = dataclasses.replace(op, reference=Perturbed(op.reference))
    (row,) = time_case(wrong, case, CPU, config)
    assert beside_floor(row, slow) == row
    assert not row["passed"] and "p50_s" not in row and row["error"] > case.tolerance


class Perturbed:
    """Right when it is the exact one (the first call), off by 1 % afterwards."""

    def __init__(self, function) -> None:
        self.function, self.calls = function, 0

    def __call__(self, **inputs):
        self.calls += 1
        return self.function(**inputs) * (1.0 if self.calls == 1 else 1.01)


def test_the_page_has_every_case() -> None:
    """docs/kernels.md shows bytes, FLOPs and floors as CASES have them."""
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert floors_table(copy=4.3e12, gemm=790e12) in page


@pytest.mark.parametrize("built", [True, False])
def test_arms_on_a_cpu(monkeypatch: pytest.MonkeyPatch, built: bool) -> None:
    """kernels/csrc is an arm where it is built, for bf16 and what has a version there."""
    monkeypatch.setattr("worldloop.bench.kernels.HAS_NATIVE", built)
    for name in ("gated_norm", "attention"):
        op = load_op(name)
        for case in op.cases:
            if not case.large:
                native = built and name == "attention" and "bf16" in case.name
                expected = ["reference", "native"] if native else ["reference"]
                assert list(arms_of(op, case.make(CPU), CPU, True)) == expected


def test_document_and_options(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(KernelBench(op="flow_x0", repeats=2, rounds=1, threads=1, device="cpu"))
    assert {row["case"] for row in found["rows"]} == {"2b bf16"} and not found["left_out"]
    expected = ["float32", "bfloat16"] if has_fast_bf16(CPU) else ["float32"]
    assert [c["dtype"] for c in found["ceilings"]] == expected
    assert all(c["copy_gb_per_s"] > 0 for c in found["ceilings"]) and found["commit"]
    with pytest.raises(UserError, match="op is 'solver-step'"):
        KernelBench(op="solver-step")
    options = ["--op", "solver_step", "--out", str(tmp_path), "--repeats", "1", "--rounds", "1"]
    assert main([*options, "--threads", "1"]) == 0
    assert (tmp_path / "kernels-solver_step-cpu.json").is_file() or torch.cuda.is_available()
    assert "of the floor" in capsys.readouterr().out
