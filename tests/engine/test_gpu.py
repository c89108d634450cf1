"""The same numbers on a GPU as on the CPU, and training steps there. Deselected without CUDA."""

from pathlib import Path

import numpy as np
import pytest
import torch

import worldloop
from worldloop.engine.rollout import ReplayPolicy, RolloutEngine
from worldloop.engine.world_model import WorldModel
from worldloop.episodes import EpisodeDataset
from worldloop.types import Starts

pytestmark = pytest.mark.gpu
EPISODES = Path(worldloop.__file__).parent / "data" / "demo-pushcube"


def shipped_starts(count: int) -> tuple[Starts, np.ndarray, np.ndarray]:
    dataset = EpisodeDataset(EPISODES)
    episodes = [dataset.read(i * len(dataset) // count) for i in range(count)]
    starts = Starts(
        frames=np.stack([e.frames[0] for e in episodes])[:, None, None],
        poses=np.stack([e.states[0] for e in episodes]),
        instructions=tuple(e.instruction for e in episodes),
    )
    actions = np.stack([e.actions for e in episodes])
    return starts, actions, np.array([e.success for e in episodes])


def imagine(device: str, dtype: torch.dtype, count: int, decode: str = "policy"):
    starts, actions, true = shipped_starts(count)
    world = WorldModel.from_pretrained("tiny", device=device, dtype=dtype)
    engine = RolloutEngine(world, ReplayPolicy(actions, world.action_spec))
    return engine.rollout(starts, horizon=72, decode=decode), true


def test_fp32_rollout_equals_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    here, _ = imagine("cpu", torch.float32, 4)
    there, _ = imagine("cuda", torch.float32, 4)
    np.testing.assert_allclose(there.reward, here.reward, atol=1e-3)
    assert np.abs(there.frames.astype(int) - here.frames.astype(int)).max() <= 2


def test_bf16_rollout_has_the_true_outcomes() -> None:
    rollout, true = imagine("cuda", torch.bfloat16, 20)
    assert (rollout.success == true).mean() >= 0.8


@pytest.mark.parametrize("name", ["2b"])
def test_published_size_runs_in_bf16(name: str) -> None:
    """Random weights of the real shape: one pass of the transformer, finite and of its shape."""
    from worldloop.engine.dit import DiT
    from worldloop.engine.dit_config import PRESETS

    with torch.device("cuda"):
        dit = DiT(PRESETS[name]()).to(torch.bfloat16)
        x = torch.randn(1, 16, 4, 32, 32)
        actions = torch.randn(1, 12, 7)
        with torch.inference_mode():
            out = dit(x, torch.full((1,), 0.5), actions, return_kv=False).sample
    assert out.shape == x.shape and torch.isfinite(out).all()
