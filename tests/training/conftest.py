"""Small datasets and an autoencoder: random pictures, arms that obey."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from worldloop.checkpoint import save_checkpoint
from worldloop.config import config_to_dict
from worldloop.engine.light_vae import PRESETS, LightVAE
from worldloop.episodes import DatasetMeta, EpisodeWriter
from worldloop.types import ActionSpec, Episode

SIZE, CHUNK = 32, 8
SPEC = ActionSpec(chunk=CHUNK)


def episode(seed: int, env_id: str, T: int, success: bool, info: dict | None = None) -> Episode:
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (T, 7)).astype(np.float32)
    start = rng.normal(0, 0.1, (1, 7)).astype(np.float32)
    states = np.concatenate([start, start + 0.02 * actions.cumsum(0)])
    states[1:, 6] = actions[:, 6]
    frames = rng.integers(0, 256, (T + 1, SIZE // 8, SIZE // 8, 3), np.uint8)
    reward = np.zeros(T, np.float32)
    reward[T // 2 :] = success
    return Episode(
        frames=frames.repeat(8, 1).repeat(8, 2),
        actions=actions,
        states=states,
        reward=reward,
        instruction=f"do {env_id}",
        env_id=env_id,
        seed=seed,
        success=success,
        info=info or {},
    )


def write(root: Path, env_id: str, T: int, outcomes: str, spec: ActionSpec = SPEC, **info) -> Path:
    """A dataset of one episode a letter: s a success, n a near-success, f a clear failure."""
    records = {"n": {"perturbation_m": [[0.03, 0]], "grade": "near"},
               "f": {"perturbation_m": [[0.2, 0]], "grade": "clear"}}  # fmt: skip
    writer = EpisodeWriter(root, DatasetMeta(spec, env_id, {"name": "test"}, T, SIZE))
    writer.add([
        episode(i, env_id, T, letter == "s", records.get(letter))
        for i, letter in enumerate(outcomes)
    ])  # fmt: skip
    return root


@pytest.fixture(scope="session")
def make_episode() -> Callable[..., Episode]:
    """An episode of (seed, env_id, T, success, info)."""
    return episode


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Path]:
    """Writes a dataset: (folder, env_id, T, outcomes, spec)."""
    return write


@pytest.fixture(scope="session")
def push(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("push"), "PushCube-v1", 16, "snsfsn")


@pytest.fixture(scope="session")
def stack(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("stack"), "StackCube-v1", 24, "sfsfsfsfsfsf")


@pytest.fixture(scope="session")
def pull(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("pull"), "PullCube-v1", 24, "sfsfs")


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["test"](), picture=(SIZE, SIZE))
    model, folder = LightVAE(config), tmp_path_factory.mktemp("ae") / "model"
    save_checkpoint(folder, model.state_dict(), config_to_dict(config), kind="light_vae")
    return folder
