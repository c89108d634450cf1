"""What every test shares: no network, no display, GPU tests only where there is a GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from importlib.util import find_spec

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HAS_SIM = find_spec("mani_skill") is not None


def pytest_report_header() -> list[str]:
    """Say which device and which simulator the tests see."""
    gpu = f"run on {torch.cuda.get_device_name(0)}" if HAS_GPU else (
        f"deselected, torch {torch.__version__} sees no CUDA device"
    )  # fmt: skip
    sim = "run" if HAS_SIM else "deselected, ManiSkill is not installed (make setup-sim)"
    return [f"gpu tests: {gpu}", f"sim tests: {sim}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `gpu` or `sim` where there is no CUDA device or no simulator."""
    absent = [name for name, there in (("gpu", HAS_GPU), ("sim", HAS_SIM)) if not there]
    gone = [item for item in items if any(map(item.get_closest_marker, absent))]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]
