"""kernels/csrc, built with CMake's compiler and loaded by `import worldloop`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
HAS_AVX512 = " avx512f " in Path("/proc/cpuinfo").read_text(encoding="utf-8")
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
print(json.dumps([worldloop.native, plain[::50, ::50].tolist(), attention[:, :, ::30, 0].tolist(),
                  float((plain - exact).abs().max())]))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """worldloop's front door with the library beside it, as CMake leaves it in a checkout."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here; kernels/csrc is for those who have one")
    root = tmp_path_factory.mktemp("native")
    for folder in ("worldloop", "kernels"):
        (root / folder).mkdir()
    shutil.copy(ROOT / "worldloop" / "__init__.py", root / "worldloop")
    sources = sorted((ROOT / "kernels" / "csrc").glob("*.c"))
    built = root / "kernels" / "_native.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, *sources], check=True)
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
