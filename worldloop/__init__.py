"""worldloop: reinforcement learning of vision-language-action policies in a world model.

The names below are imported on first use, so `import worldloop` stays light
(no torch, no GPU, no network).
"""

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _load_native() -> ctypes.CDLL | None:
    """kernels/csrc, where CMake has built it and the processor has AVX-512.

    ``WORLDLOOP_NATIVE=0`` leaves it out; a path there takes the library of that name.
    """
    near, chosen = Path(__file__).parent, os.environ.get("WORLDLOOP_NATIVE", "")
    places = [near / "kernels" / "_native.so", near.parent / "kernels" / "_native.so"]
    found = [p for p in ([Path(chosen)] if chosen else places) if p.is_file()]
    processor = Path("/proc/cpuinfo")
    if not found or not processor.is_file():
        return None
    if " avx512f " not in processor.read_text(encoding="utf-8"):
        return None
    try:
        return ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:  # half built, or of another machine: slower, not broken
        print(f"worldloop: kernels/csrc is left out: {error}", file=sys.stderr)
        return None


# torch's symbols are bound when it is loaded: what stands in MKL's place must be there before.
mkl_answered = "torch" not in sys.modules
native = _load_native()
mkl_answered = mkl_answered and native is not None

if TYPE_CHECKING:
    from worldloop.engine.rollout import RolloutEngine
    from worldloop.engine.world_model import WorldModel
    from worldloop.rl.loop import Loop
    from worldloop.rl.round_config import RoundConfig
    from worldloop.types import ActionSpec, Chunk, Episode, Rollout

_FACADE = {
    "RolloutEngine": "worldloop.engine.rollout:RolloutEngine",
    "WorldModel": "worldloop.engine.world_model:WorldModel",
    "Loop": "worldloop.rl.loop:Loop",
    "RoundConfig": "worldloop.rl.round_config:RoundConfig",
    "ActionSpec": "worldloop.types:ActionSpec",
    "Episode": "worldloop.types:Episode",
    "Rollout": "worldloop.types:Rollout",
    "Chunk": "worldloop.types:Chunk",
}

__all__ = [
    "ActionSpec", "Chunk", "Episode", "Loop", "Rollout", "RolloutEngine", "RoundConfig",
    "WorldModel",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _FACADE:
        raise AttributeError(f"module 'worldloop' has no attribute {name!r}")
    from worldloop.registry import load

    value = load(_FACADE[name])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_FACADE})
