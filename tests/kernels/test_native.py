"""kernels/csrc, built with CMake's compiler and loaded by `import worldloop`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from worldloop.kernels.native import ABI

ROOT = Path(__file__).parents[2]
PROCESSOR = Path("/proc/cpuinfo").read_text(encoding="utf-8")
HAS_AVX512, HAS_BF16 = (f" {name} " in PROCESSOR for name in ("avx512f", "avx512_bf16"))
PRODUCTS = """
import json, sys
{first}
import worldloop, torch
torch.manual_seed(0)
x, w = torch.randn(300, 256), torch.randn(512, 256)
q, k = torch.randn(2, 4, 64, 64), torch.randn(2, 4, 200, 64)
plain = x @ w.T
attention = torch.nn.functional.scaled_dot_product_attention(q, k, k)
exact = (x.double() @ w.double().T).float()
print(json.dumps([
    worldloop.mkl_answered, plain[::50, ::50].tolist(), attention[:, :, ::30, 0].tolist(),
    float((plain - exact).abs().max()),
]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kernels/csrc as CMake builds it, without a warning."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here; kernels/csrc is for those who have one")
    sources = sorted((ROOT / "kernels" / "csrc").glob("*.c"))
    built = tmp_path_factory.mktemp("library") / "_native.so"
    flags = ["-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", built, *sources], check=True)
    return built


@pytest.fixture(scope="module")
def package(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """worldloop's front door with the library beside it, as CMake leaves it in a checkout."""
    root = tmp_path_factory.mktemp("native")
    for folder in ("worldloop", "kernels"):
        (root / folder).mkdir()
    shutil.copy(ROOT / "worldloop" / "__init__.py", root / "worldloop")
    shutil.copy(library, root / "kernels")
    return root


def run(package: Path, first: str = "", **changes: str) -> list:
    env = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", **changes}
    command = [sys.executable, "-c", PRODUCTS.format(first=first)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=package)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_products_stay_what_they_are(package):
    used, product, attention, error = run(package)
    assert used is HAS_AVX512
    unused, plain, plain_attention, plain_error = run(package, WORLDLOOP_NATIVE="0")
    assert unused is False
    assert error < 2 * plain_error < 2e-4  # sums of 256 products of unit size
    np.testing.assert_allclose(product, plain, rtol=0, atol=1e-4)
    np.testing.assert_allclose(attention, plain_attention, rtol=0, atol=1e-5)


def test_it_says_when_it_came_too_late(package):
    assert run(package, first="import torch")[0] is False


OPERATORS = """
import json, torch
from worldloop.engine.attention import _products, attend
from worldloop.engine.dit import DiT
from worldloop.engine.dit_config import DiTConfig
from worldloop.kernels.cases import OPS, load_op
from worldloop.kernels.native import HAS_NATIVE
from worldloop.kernels.op import reference_only, uses_native
from worldloop.kernels.attention import native_attention, native_takes, reference_attention

torch.set_num_threads({threads})
cpu, errors = torch.device("cpu"), {{}}
for op in map(load_op, OPS):
    for case in op.cases if op.native and HAS_NATIVE else ():
        if "bf16" in case.name and case.bytes < 16e6:
            inputs = case.make(cpu)
            error = max(op.error_of(f, inputs) for f in (op.native, op.custom))
            errors[f"{{op.name}}, {{case.name}}"] = [error, case.tolerance]

q, k, v = (torch.randn(2, n, 3, 64).bfloat16().transpose(1, 2) for n in (7, 70, 70))
learns = q.clone().requires_grad_()
routes = [native_takes(q, k, v), native_takes(learns, k, v), uses_native(learns), uses_native(q),
          native_takes(q.float(), k, v)]
with reference_only():
    routes.append(native_takes(q, k, v))
# Left to plain torch: one row of keys for all, no keys, values of another width, no batch.
routes += [native_takes(q, k[:1], v[:1]), native_takes(q, k[:, :, :0], v[:, :, :0]),
           native_takes(q, k, v[..., :32]), native_takes(q[0], k[0], v[0])]
large = attend(q.float().mul(1e5).bfloat16(), k.float().mul(1e5).bfloat16(), v)

def gradients(function, tensors, weight):
    own = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad((function(*own).float() * weight).sum(), own)

slopes = []  # [ours, plain torch's in bf16] of each gradient: distance from fp32, by norm
for B, h, N, M, K in ((2, 3, 7, 5, 18), (1, 2, 101, 67, 80), (2, 2, 200, 130, 32)):
    half = [torch.randn(B, n, h, K).bfloat16().transpose(1, 2) for n in (N, M, M)]
    weight = torch.randn(B, h, N, K)
    exact = gradients(reference_attention, [t.float() for t in half], weight)
    for function in (native_attention, _products) if HAS_NATIVE else ():
        found = gradients(function, half, weight)
        slopes.append([float((a - b).norm() / b.norm()) for a, b in zip(found, exact)])
if HAS_NATIVE:
    one = [torch.randn(1, 1, 1, 64).bfloat16() for _ in range(3)]
    summed = gradients(native_attention, one, torch.ones(()))[2]  # its gradient is expanded
    slopes.append(float((summed - 1).abs().max()))

hurt = v.clone()
hurt[1, 2, 5, 3] = torch.nan
broken = torch.isnan(attend(q, k, hurt))

config = DiTConfig(width=128, depth=2, heads=2, action_dim=7, action_layout="per_frame")
network = DiT(config).eval()
for p in network.parameters():
    torch.nn.init.normal_(p, std=0.05)
def run(x, **more):
    frames = x.shape[2]
    return network(x, torch.full((2,), 0.3), torch.ones(2, 4 * frames, 7), **more)
passes = []
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
    x = torch.randn(2, 16, 5, 8, 8)
    def generate():
        history = run(x[:, :, :3]).kv
        return run(x[:, :, 3:], first_frame=3, history=history).sample.float()
    found = generate()
    with reference_only():
        plain = generate()
with torch.inference_mode(), reference_only():
    exact = run(x[:, :, 3:], first_frame=3, history=run(x[:, :, :3]).kv).sample
def apart(a):
    return float((a - exact).norm() / exact.norm())
print(json.dumps([HAS_NATIVE, errors, routes, slopes, bool(large.isfinite().all()),
                  broken.nonzero().tolist(),
                  [apart(found), apart(plain)]]))
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_operators_equal_their_references(library, threads):
    env = {**os.environ, "WORLDLOOP_NATIVE": str(library)}
    code = OPERATORS.format(threads=threads)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=library.parent
    )
    assert done.returncode == 0, done.stderr
    has, errors, routes, slopes, finite, broken, apart = json.loads(done.stdout)
    assert has is HAS_BF16
    assert all(error <= tolerance for error, tolerance in errors.values()), errors
    assert len(errors) == (7 if has else 0)
    # bf16 alone; with a gradient where an operator has a backward pass
    assert routes == [has, has, False, has, *[False] * 6]
    assert finite, "however large the scores"
    if has:
        assert slopes.pop() == 0
        for ours, plain in zip(slopes[::2], slopes[1::2], strict=True):
            assert all(a < 1.1 * b + 1e-3 < 1e-2 for a, b in zip(ours, plain, strict=True))
    # A value that is not a number reaches every query of its head and channel, and nothing else.
    assert broken == [[1, 2, query, 3] for query in range(7)]
    # A pass with history is as near to fp32 as plain torch's in bf16.
    assert apart[0] < 1.5 * apart[1] < 0.05


INTERRUPTED = """
import signal, time, torch
from worldloop.kernels.attention import native_attention
torch.set_num_threads(2)
def stop(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, stop)
def once():
    q, k, v = (torch.randn(1, n, 3, 64).bfloat16().transpose(1, 2) for n in (400, 30000, 30000))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    try:
        native_attention(q, k, v)
    except KeyboardInterrupt:
        return
    raise SystemExit("not interrupted")
once()
fresh = [torch.zeros(1, 400, 3, 64, dtype=torch.bfloat16) for _ in range(20)]
time.sleep(0.5)
assert not any(t.any() for t in fresh), "a thread still wrote where it no longer may"
"""


@pytest.mark.skipif(not HAS_BF16, reason="needs a processor with AVX512-BF16")
def test_what_a_thread_writes_outlives_an_interrupted_call(library):
    env = {**os.environ, "WORLDLOOP_NATIVE": str(library)}
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=library.parent)
    assert done.returncode == 0, done.stderr


def test_a_library_of_other_signatures_is_left_alone(library, tmp_path):
    source = (ROOT / "kernels" / "csrc" / "avx512_bf16.c").read_text(encoding="utf-8")
    assert f"enum {{ ABI = {ABI} }}" in source
    older = tmp_path / "older.c"
    older.write_text(source.replace(f"ABI = {ABI}", f"ABI = {ABI - 1}"), encoding="utf-8")
    built = tmp_path / "_native.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", built, older], check=True)
    code = "from worldloop.kernels.native import HAS_NATIVE; print(HAS_NATIVE)"
    for path, expected in ((library, HAS_BF16), (built, False)):
        env = {**os.environ, "WORLDLOOP_NATIVE": str(path)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.strip() == str(expected), done.stderr
