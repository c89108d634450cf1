"""worldloop: reinforcement learning of vision-language-action policies in a world model.

The names below are imported on first use, so `import worldloop` stays light
(no torch, no GPU, no network).
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

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
