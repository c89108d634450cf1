"""What every benchmark does alike: time, ceilings, launches, memory, and the file that is written.

Times are wall-clock seconds with the device idle before and after; on a GPU also the seconds
between two CUDA events. Arms that are compared take turns (ABAB...) in one process, so that a
change of clock or load meets them all. Ceilings are measured in the same run: a speed is a share
of what this machine did just then.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from worldloop import __version__, native
from worldloop.config import config_to_dict
from worldloop.engine import precision
from worldloop.errors import UserError
from worldloop.files import atomic_write_text
from worldloop.track import git_commit

Run = Callable[[], Any]
Name = TypeVar("Name", bound=str)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU
HEAD_START = 2_000_000  # clock cycles, a millisecond: more than any launcher takes
_RUNTIME_LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")


# Device ------------------------------------------------------------------------------------------


def device_of(name: str | None) -> torch.device:
    """The device of that name, made the current one; None takes the GPU where there is one."""
    device = precision.device_of(name or "auto")
    if device.index is not None:
        torch.cuda.set_device(device)  # events are recorded on the current device
    return device


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; None takes bfloat16 on a GPU and float32 elsewhere."""
    name = name or ("bfloat16" if device.type == "cuda" else "float32")
    if name not in DTYPES:
        raise UserError(f"dtype is {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def synchronise(device: torch.device) -> None:
    """Wait until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Time --------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of one arm's repeats: wall clock and, on a GPU, between two CUDA events."""

    wall: list[float] = field(default_factory=list)
    events: list[float] = field(default_factory=list)

    @property
    def p50(self) -> float:
        return statistics.median(self.wall)

    @property
    def p95(self) -> float:
        return percentile(self.wall, 0.95)

    def add(self, run: Run, device: torch.device) -> None:
        """Run once and keep its seconds."""
        wall, events = time_once(run, device)
        self.wall.append(wall)
        if events is not None:
            self.events.append(events)

    def to_dict(self) -> dict[str, Any]:
        """Median, 95th percentile, least and number of repeats."""
        return {
            "p50_s": self.p50,
            "p95_s": self.p95,
            "min_s": min(self.wall),
            "gpu_p50_s": statistics.median(self.events) if self.events else None,
            "repeats": len(self.wall),
        }


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000 * len(ordered)) // 1000) - 1)]


def time_once(run: Run, device: torch.device) -> tuple[float, float | None]:
    """Wall seconds of one run and, on a GPU, the seconds between the events around it."""
    if device.type != "cuda":
        since = time.perf_counter()
        run()
        return time.perf_counter() - since, None
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    since = time.perf_counter()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize(device)
    return time.perf_counter() - since, first.elapsed_time(last) / 1000


def seconds_of(run: Run, repeats: int, device: torch.device, warmup: int = 2) -> list[float]:
    """Wall-clock seconds of each repeat, after `warmup` runs that do not count."""
    for _ in range(warmup):
        run()
    return [time_once(run, device)[0] for _ in range(repeats)]


def kernel_seconds(
    run: Run, repeats: int, device: torch.device, *, warmup: int = 3, cold: bool = True
) -> list[float]:
    """Seconds of a single kernel: between CUDA events on a GPU, wall clock elsewhere.

    cold: overwrite the GPU's L2 cache before each repeat, so that inputs come from memory.
    """
    for _ in range(warmup):
        run()
    if device.type != "cuda":
        return [time_once(run, device)[0] for _ in range(repeats)]
    flush = torch.empty(FLUSH_BYTES if cold else 1, dtype=torch.int8, device=device)
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(HEAD_START)  # the host enqueues the kernel meanwhile
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        pairs.append((first, last))
    torch.cuda.synchronize(device)
    return [first.elapsed_time(last) / 1000 for first, last in pairs]


def interleaved(arms: Mapping[Name, Run], rounds: int, device: torch.device) -> dict[Name, Times]:
    """Each arm in turn, and again for every round; arms must be warm."""
    times = {name: Times() for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            times[name].add(run, device)
    return times


# Ceilings ----------------------------------------------------------------------------------------


def gemm_ceiling(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """FLOP/s of a large square matrix product of random numbers, the best of the repeats.

    On a CPU also of a large convolution: its products are another library's (oneDNN's beside
    MKL's), and on some processors twice as fast.
    """
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = 2 * side**3 / min(seconds_of(lambda: a @ b, repeats, device))
    if device.type == "cuda":
        return product
    x, w = (
        torch.randn(*shape).to(dtype=dtype, memory_format=torch.channels_last)
        for shape in ((4, 256, 32, 32), (256, 256, 3, 3))
    )
    flops = 2 * x.numel() * w[0].numel()
    with torch.inference_mode():
        times = seconds_of(lambda: F.conv2d(x, w, padding=1), repeats, device)
    return max(product, flops / min(times))


def copy_ceiling(device: torch.device, repeats: int = 5) -> float:
    """Bytes/s read and written by a large copy, the best of the repeats."""
    size = (1 << 30) if device.type == "cuda" else (128 << 20)
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds_of(lambda: target.copy_(source), repeats, device))


@dataclass
class Ceilings:
    """The best seen so far in this run; `measure` it before and after what it is compared with."""

    dtype: torch.dtype
    device: torch.device
    gemm: float = 0.0  # FLOP/s
    copy: float = 0.0  # bytes/s

    def measure(self) -> Ceilings:
        self.gemm = max(self.gemm, gemm_ceiling(self.dtype, self.device))
        self.copy = max(self.copy, copy_ceiling(self.device))
        return self

    def to_dict(self) -> dict[str, Any]:
        return {
            "dtype": dtype_name(self.dtype),
            "gemm_tflops": self.gemm / 1e12,
            "copy_gb_per_s": self.copy / 1e9,
        }


# Launches and memory -----------------------------------------------------------------------------


def launches(run: Run, device: torch.device) -> dict[str, int]:
    """What one run sets off.

    On a GPU: `kernels` executed, and `host_launches`, the calls that the host made for them (one
    for a whole CUDA graph). Elsewhere: `operators`, torch's own, inner ones included.
    """
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities = [torch.profiler.ProfilerActivity.CUDA]
    synchronise(device)
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronise(device)
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = results.events()
    if not cuda:
        return {"operators": sum(event.name().startswith("aten::") for event in events)}
    kernels = [
        event
        for event in events
        if event.device_type() == DeviceType.CUDA
        and not event.name().startswith(("Memcpy", "Memset"))
    ]
    host = sum(event.name().startswith(_RUNTIME_LAUNCHES) for event in events)
    return {"kernels": len(kernels), "host_launches": host}


def peak_memory(run: Run, device: torch.device) -> dict[str, float | None]:
    """GiB during one run: on a GPU the most allocated and how much of it was there before.

    Elsewhere the most that the process ever held (the system tells no more).
    """
    if device.type != "cuda":
        run()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
        return {"process_peak_gib": most / 2**20}
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronise(device)
    peak = torch.cuda.max_memory_allocated(device)
    return {"peak_gib": peak / 2**30, "idle_gib": before / 2**30}


# The file that is written ------------------------------------------------------------------------


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What a speed depends on and `compare` insists on: GPU, CPU and threads."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"gpu": gpu, "cpu": _cpu_name(), "threads": threads}


def _cpu_name() -> str:
    """The processor's name and family, as Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(
        (key.strip(), value.strip())
        for key, colon, value in (line.partition(":") for line in reversed(lines))
        if colon
    )
    name = found.get("model name") or platform.machine()
    parts = [f"{key} {found[of]}" for key, of in _CPU_FACTS if of in found]
    return f"{name} ({', '.join(parts)})" if parts else name


_CPU_FACTS = (("family", "cpu family"), ("model", "model"))


def versions(*names: str) -> dict[str, str]:
    """Of worldloop, Python, torch and the named packages that are installed; `native`: "loaded"
    where kernels/csrc is in use.
    """
    found = {
        "native": "loaded" if native else "none",
        "worldloop": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def document(
    bench: str,
    config: Any,
    device: torch.device,
    threads: int,
    values: Mapping[str, Any],
    packages: Sequence[str] = (),
) -> dict[str, Any]:
    """A benchmark's JSON: its values between its name and where, with what and how it ran."""
    return {
        "bench": bench,
        **values,
        "machine": machine(device, threads),
        "versions": versions(*packages),
        "commit": git_commit(),
        "config": config_to_dict(config),
    }


def write(folder: Path, name: str, found: Mapping[str, Any]) -> Path:
    """Write a document as <name>-<cpu|gpu>.json into a folder; the path."""
    where = "gpu" if found["machine"]["gpu"] else "cpu"
    path = folder / f"{name}-{where}.json"
    atomic_write_text(path, json.dumps(found, indent=2) + "\n")
    return path
