"""What every test shares: no network, no display, tests only where what they need is there."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton kernels run on CPU tensors, interpreted. Triton reads this when it is imported, which
    # any test module may do first.
    os.environ.setdefault("TRITON_INTERPRET", "1")
HAS_SIM = find_spec("mani_skill") is not None
HAS_VLLM = find_spec("vllm") is not None


def _imports(name: str) -> bool:
    """Whether a package is there and works: timm fails beside another torch's torchvision."""
    try:
        return find_spec(name) is not None and bool(import_module(name))
    except Exception:
        return False


HAS_TIMM = _imports("timm")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tests measure numbers that depend on the order of sums


def pytest_report_header() -> list[str]:
    """Say which device, simulator, timm and vLLM the tests see."""
    gpu = f"run on {torch.cuda.get_device_name(0)}" if HAS_GPU else (
        f"deselected, torch {torch.__version__} sees no CUDA device"
    )  # fmt: skip
    sim = "run" if HAS_SIM else "deselected, ManiSkill is not installed (make setup-sim)"
    timm = "run" if HAS_TIMM else "deselected, timm cannot be imported (pip install timm)"
    vllm = "run" if HAS_VLLM else "deselected, vLLM is not installed (make test-vllm)"
    return [
        f"gpu tests: {gpu}", f"sim tests: {sim}", f"timm tests: {timm}", f"vllm tests: {vllm}",
    ]  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `gpu`, `sim`, `timm` or `vllm` where there is no such thing."""
    there = {"gpu": HAS_GPU, "sim": HAS_SIM, "timm": HAS_TIMM, "vllm": HAS_VLLM}
    absent = [name for name in there if not there[name]]
    gone = [item for item in items if any(map(item.get_closest_marker, absent))]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]
