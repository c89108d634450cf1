"""Every kernel compiles for sm_90 with Triton's own compiler and ptxas; needs no GPU.

In a process of its own: interpreted kernels, as the other tests here use them, cannot be compiled.
"""

import os
import subprocess
import sys

import pytest

from worldloop.kernels.cases import OPS

SCRIPT = """
import inspect, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction
from worldloop.kernels.cases import load_op

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
compiled = set()

def compile_instead(self, *args, grid, warmup, **kwargs):
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    options = {name: value for name, value in options.items() if value is not None}
    kwargs = {k: v for k, v in kwargs.items() if k in self.arg_names}
    bound = inspect.signature(self.fn).bind(*args, **kwargs).arguments
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(bound.items()):
        if self.params[i].is_constexpr or value is None:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i64" if value >= 2**31 else "i32"
            if value == 1:  # as the launcher specialises it
                signature[name], constants[(i,)] = "constexpr", 1
            elif value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    key = repr((self.__name__, signature, constants, attributes, options))
    if key in compiled:
        return
    compiled.add(key)
    source = ASTSource(self, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(self.__name__, len(kernel.asm["cubin"]), kernel.metadata.shared, flush=True)
    assert kernel.metadata.shared <= 227 << 10, "more shared memory than an H100 has"

def every_config(self, *args, **kwargs):
    for config in self.configs:
        self.fn.run(*args, **kwargs, **config.all_kwargs())

class NoGenerator:  # meta tensors hold no numbers
    def __init__(self, device): pass
    def manual_seed(self, seed): return None

torch.Generator = NoGenerator
JITFunction.run, Autotuner.run = compile_instead, every_config
torch.set_num_threads(1)
for name in sys.argv[1:]:
    op = load_op(name)
    before = len(compiled)
    for case in op.cases:
        op.launch(**case.make(torch.device("meta")))  # shapes, strides, dtypes: all it asks
    assert len(compiled) > before, name
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_compiles_for_hopper(name: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, name], env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
