"""Attention implementations, each against the reference; choosing and its errors."""

import json

import pytest
import torch

from worldloop.engine import attention
from worldloop.engine.attention import NAMES, attend, fastest, measure, missing, require
from worldloop.errors import UserError
from worldloop.kernels.attention import reference_attention as reference

CPU = torch.device("cpu")


def inputs(B, h, N, M, K, dtype=torch.float32, device="cpu"):
    generator = torch.Generator(device).manual_seed(1)
    shapes = [(B, N, h, K), (B, M, h, K), (B, M, h, K)]
    qkv = (torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)
    return tuple(t.transpose(1, 2) for t in qkv)


def error(a, b) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_reference_is_the_definition():
    q, k, v = (t.double() for t in inputs(1, 1, 3, 5, 4))
    for i in range(3):
        scores = [float(q[0, 0, i] @ k[0, 0, j]) / 2 for j in range(5)]
        weights = torch.tensor(scores, dtype=torch.float64).exp()
        weights /= weights.sum()
        expected = sum(w * v[0, 0, j] for j, w in enumerate(weights))
        torch.testing.assert_close(reference(q, k, v)[0, 0, i], expected)


@pytest.mark.parametrize("name", ["auto", "products", "sdpa", "triton", "native"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)]
)
def test_equals_the_reference_on_a_cpu(name, dtype, tolerance):
    q, k, v = inputs(2, 3, 17, 29, 24, dtype)
    out = attend(q, k, v, name)
    assert out.dtype == dtype
    assert error(out, reference(q, k, v)) < tolerance


def test_products_stay_in_bf16_under_autocast_and_learn():
    q, k, v = (t.requires_grad_() for t in inputs(2, 3, 17, 29, 24))
    reference(q, k, v).square().sum().backward()
    expected = [t.grad for t in (q, k, v)]
    half = [t.detach().bfloat16().requires_grad_() for t in (q, k)] + [v.detach().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*half)  # keys and values may come from a cache of another dtype
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for tensor, gradient in zip(half, expected, strict=True):
        assert error(tensor.grad, gradient) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 4, 384, 832, 64), (1, 16, 256, 256, 128)])
def test_equals_the_reference_on_a_gpu(name, shape):
    device = torch.device("cuda")
    q, k, v = inputs(*shape, torch.bfloat16, "cuda")
    problem = missing(name, device, torch.bfloat16)
    if problem is not None:
        with pytest.raises(UserError, match=name):
            require(name, device, torch.bfloat16)
        return
    assert error(attend(q, k, v, name), reference(q, k, v)) < 1e-2
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, name), fullgraph=True, dynamic=False)
    assert error(compiled(q, k, v), reference(q, k, v)) < 1e-2


# The Triton kernel itself is tested with all others, in tests/kernels/test_ops.py.


def test_the_ops_of_libraries_have_the_right_fakes():
    q, k, v = (t.transpose(1, 2) for t in inputs(2, 3, 8, 12, 16))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (q, k, v)]
        for op in (attention._flash_op, attention._xformers_op):
            out = op(*fakes)
            assert out.shape == q.shape and out.is_contiguous()


# Choosing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cudnn", "flash", "xformers", "triton"])
def test_an_implementation_for_gpus_says_so_on_a_cpu(name):
    with pytest.raises(UserError, match="CUDA device; take 'sdpa'"):
        require(name, "cpu")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="'flesh'; known: auto, products"):
        require("flesh")


@pytest.mark.parametrize(
    ("name", "needed"), [("xformers", "pip install xformers"), ("flash", "pip install flash-attn")]
)
def test_a_missing_library_is_named(monkeypatch, name, needed):
    monkeypatch.setattr(attention, "find_spec", lambda library: None)
    with pytest.raises(UserError, match=needed):
        require(name, "cuda", torch.bfloat16)


def test_the_measured_choice_is_made_once(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLDLOOP_CACHE", str(tmp_path))
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(attention, "measure", spy)
    shape = (1, 2, 32, 48, 16, CPU, torch.float32)
    first = fastest(*shape)
    assert first in ("products", "sdpa")
    assert fastest(*shape) == first and len(calls) == 1
    times = json.loads((tmp_path / "attention.json").read_text())
    (measured,) = times.values()
    assert set(measured) == {"products", "sdpa"} and min(measured, key=measured.get) == first
    fastest(1, 2, 16, 48, 16, CPU, torch.float32)
    assert len(calls) == 2


def test_a_wrong_implementation_is_never_the_fastest(monkeypatch):
    wrong = {"products": lambda q, k, v: q, "sdpa": attention._sdpa}
    monkeypatch.setattr(attention, "_IMPLEMENTATIONS", wrong)
    assert set(measure(1, 2, 16, 16, 16, CPU, torch.float32)) == {"sdpa"}
    monkeypatch.setattr(attention, "_IMPLEMENTATIONS", dict.fromkeys(wrong, wrong["products"]))
    with pytest.raises(UserError, match="no implementation agrees"):
        measure(1, 2, 16, 16, 16, CPU, torch.float32)


def test_a_spoilt_cache_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLDLOOP_CACHE", str(tmp_path))
    (tmp_path / "attention.json").write_text("{")
    with pytest.raises(UserError, match="delete it"):
        fastest(1, 2, 16, 16, 16, CPU, torch.float32)
