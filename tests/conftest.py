"""What every test shares: no network, no display, GPU tests only where there is a GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


def pytest_report_header() -> str:
    """Say which device the tests see."""
    if torch.cuda.is_available():
        return f"gpu tests: run on {torch.cuda.get_device_name(0)}"
    return f"gpu tests: deselected, torch {torch.__version__} sees no CUDA device"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    gone = [item for item in items if item.get_closest_marker("gpu")]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
