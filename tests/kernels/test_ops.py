"""Every operator at every case: kernel against reference, schema, fake results."""

import pytest
import torch

from worldloop.errors import UserError
from worldloop.kernels import op as op_module
from worldloop.kernels.cases import OPS, load_op
from worldloop.kernels.op import INTERPRETED, Case, Op, error

CPU = torch.device("cpu")
ALL = [(load_op(name), case) for name in OPS for case in load_op(name).cases]
SMALL = [(op, case) for op, case in ALL if not case.large]


def names(pairs: list[tuple[Op, Case]]) -> list[str]:
    return [f"{op.name}-{case.name.replace(' ', '-')}" for op, case in pairs]


@pytest.mark.parametrize(("op", "case"), SMALL, ids=names(SMALL))
def test_kernel_under_the_interpreter(op: Op, case: Case) -> None:
    if torch.cuda.is_available():
        pytest.fail("run on CUDA by test_kernel_on_cuda; deselect with -m gpu")
    assert INTERPRETED, "tests/conftest.py sets TRITON_INTERPRET=1 where there is no GPU"
    assert op.error_of(op.launch, case.make(CPU)) <= case.tolerance


@pytest.mark.parametrize(("op", "case"), SMALL, ids=names(SMALL))
def test_tolerance_is_tight(op: Op, case: Case) -> None:
    """One element that is off by 5 % (a pixel by 1), or not a number, is caught."""
    for result in op.results(op.reference, case.make(CPU)):
        exact = result.flatten()
        wrong = exact.clone().float()
        at = int(wrong.abs().argmax())
        wrong[at] += 0.05 * wrong[at] if result.is_floating_point() else -1
        assert error(wrong, exact) > case.tolerance
        assert error(torch.full_like(wrong, torch.nan), exact) > case.tolerance


@pytest.mark.parametrize(("op", "case"), SMALL, ids=names(SMALL))
def test_operator_is_well_formed(op: Op, case: Case) -> None:
    """Schema, fake tensors and dispatch, by torch's own check; the reference is the CPU kernel
    (but for bf16 where kernels/csrc is built: tests/kernels/test_native.py).
    """
    inputs = case.make(CPU)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.custom, (), inputs, test_utils=tests)
    with op_module.reference_only():
        found = op.results(op.custom, inputs)
    for result, wanted in zip(found, op.results(op.reference, inputs), strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case"), ALL, ids=names(ALL))
def test_kernel_on_cuda(op: Op, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    inputs = case.make(torch.device("cuda"))
    assert op.error_of(op.custom, inputs) <= case.tolerance


@pytest.mark.parametrize("name", OPS)
def test_cases_say_what_they_cost(name: str) -> None:
    """Each operator has small and large cases, told apart by name, with bytes and tolerances."""
    op = load_op(name)
    assert op.name == name and len({case.name for case in op.cases}) == len(op.cases)
    assert any(case.large for case in op.cases) and any(not case.large for case in op.cases)
    for case in op.cases:
        assert case.bytes > 0 and case.flops >= 0 and 0 <= case.tolerance <= 0.05


def test_unknown_operator() -> None:
    with pytest.raises(UserError, match="known: modulated_norm"):
        load_op("softmax")


def test_reference_only_ends_with_its_block() -> None:
    with pytest.raises(RuntimeError, match="inside"), op_module.reference_only():
        assert op_module._reference_only
        raise RuntimeError("inside")
    assert not op_module._reference_only


def test_error_measure() -> None:
    exact = torch.tensor([1.0, -1.0, 0.0, 1.0])
    assert error(exact, exact) == 0
    assert error(exact.reshape(2, 2), exact) == float("inf")
    off = exact.clone()
    off[2] = 0.1
    assert 0.1 < error(off, exact) < 0.12
