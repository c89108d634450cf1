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


def _load_native() -> bool:
    """Load kernels/csrc, where CMake has built it; True where it takes effect.

    It must come before torch, whose symbols are bound when it is loaded, and helps only
    processors with AVX-512. ``WORLDLOOP_NATIVE=0`` leaves it out.
    """
    near = Path(__file__).parent
    found = [p for p in (near / "kernels", near.parent / "kernels") if (p / "_native.so").is_file()]
    if not found or "torch" in sys.modules or os.environ.get("WORLDLOOP_NATIVE") == "0":
        return False
    processor = Path("/proc/cpuinfo")
    if not processor.is_file() or " avx512f " not in processor.read_text(encoding="utf-8"):
        return False
    try:
        ctypes.CDLL(str(found[0] / "_native.so"), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:  # half built, or of another machine: slower, not broken
        print(f"worldloop: kernels/csrc is left out: {error}", file=sys.stderr)
        return False
    return True


native = _load_native()

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
