"""Clocks, ceilings, launches and the file that every benchmark writes."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from worldloop.bench import timing
from worldloop.config import positive
from worldloop.errors import UserError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Config:
    out: Path = Path("results")
    repeats: int = 3


def test_percentiles():
    assert timing.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.percentile(range(1, 21), 0.95) == 19
    assert timing.percentile([7.0], 0.95) == 7.0


def test_times_are_wall_clock_seconds():
    times = timing.Times()
    for _ in range(3):
        times.add(lambda: time.sleep(0.02), CPU)
    found = times.to_dict()
    assert 0.02 <= found["min_s"] <= found["p50_s"] <= found["p95_s"] and found["repeats"] == 3
    assert found["gpu_p50_s"] is None


def test_arms_take_turns():
    calls: list[str] = []
    arms = {name: (lambda name=name: calls.append(name)) for name in "AB"}
    times = timing.interleaved(arms, 3, CPU)
    assert calls == ["A", "B"] * 3 and all(len(t.wall) == 3 for t in times.values())


def test_warm_up_does_not_count():
    calls: list[int] = []
    assert len(timing.seconds_of(lambda: calls.append(1), 4, CPU, warmup=2)) == 4
    assert len(calls) == 6
    assert len(timing.kernel_seconds(lambda: calls.append(1), 5, CPU, warmup=1)) == 5


def test_ceilings_keep_the_best_and_are_physical():
    ceilings = timing.Ceilings(torch.float32, CPU).measure()
    assert 1e9 < ceilings.gemm < 1e13 and 1e8 < ceilings.copy < 1e13
    ceilings.gemm = 1e15
    assert ceilings.measure().gemm == 1e15
    assert ceilings.to_dict()["gemm_tflops"] == 1000.0


def test_operators_are_counted():
    x = torch.randn(4)
    one = timing.launches(lambda: x + x, CPU)["operators"]
    three = timing.launches(lambda: x + x + x + x, CPU)["operators"]
    assert three - one == 2


@pytest.mark.gpu
def test_kernels_launches_events_and_memory_on_a_gpu():
    device = torch.device("cuda")
    x = torch.randn(1 << 20, device=device)
    x + 1
    assert timing.launches(lambda: x + 1, device)["kernels"] == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(8):
            x.mul_(1.0)
    found = timing.launches(graph.replay, device)
    assert found["kernels"] == 8 and found["host_launches"] == 1
    wall, events = timing.time_once(lambda: torch.cuda._sleep(20_000_000), device)
    assert events is not None and 0.5 * wall < events <= 1.05 * wall
    memory = timing.peak_memory(lambda: torch.empty(256 << 20, device=device), device)
    assert memory["peak_gib"] - memory["idle_gib"] >= 1.0  # 2**28 fp32 numbers
    cold = timing.kernel_seconds(lambda: x + 1, 5, device)
    assert all(0 < s < 0.1 for s in cold)


def test_document_and_file(tmp_path):
    found = timing.document("demo", Config(), CPU, 2, {"value": 1.5}, ("numpy", "no-such-package"))
    path = timing.write(tmp_path, "demo", found)
    assert path.name == "demo-cpu.json"
    read = json.loads(path.read_text())
    assert read["bench"] == "demo" and read["value"] == 1.5
    assert read["config"] == {"out": "results", "repeats": 3}
    assert read["machine"]["gpu"] is None and read["machine"]["threads"] == 2
    assert {"torch", "python", "worldloop", "numpy"} <= read["versions"].keys()
    assert read["commit"]


def test_bad_input_is_named():
    with pytest.raises(UserError, match="repeats is 0; must be at least 1"):
        positive(Config(repeats=0), "repeats")
    with pytest.raises(UserError, match="dtype is 'int4'"):
        timing.dtype_of("int4", CPU)
    with pytest.raises(UserError, match="device is 'gpu'; expected auto, cpu, cuda or cuda:N"):
        timing.device_of("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device is 'cuda', but .* sees no such device"):
            timing.device_of("cuda")
