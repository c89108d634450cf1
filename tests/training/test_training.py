"""Training on a tiny dataset: losses, resuming, averages, weights, samples, two processes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from worldloop.checkpoint import load_tensors, load_training_state, save_checkpoint
from worldloop.cli import main as worldloop
from worldloop.engine.dit import DiT
from worldloop.engine.light_vae import load_autoencoder
from worldloop.engine.precision import autocast
from worldloop.engine.reward import RewardConfig, RewardHead
from worldloop.engine.sampler import derive_seed, noise_for
from worldloop.engine.world_config import TaskRecord
from worldloop.engine.world_model import WorldModel
from worldloop.episodes import DatasetMeta, EpisodeWriter
from worldloop.errors import UserError
from worldloop.training import autoencoder as ae
from worldloop.training import common, samples, starting, world_loss, world_model
from worldloop.training.common import EMA, learning_rate
from worldloop.training.data import fit_action_spec, load_arrays, object_weight
from worldloop.training.latents import autoencoder_of
from worldloop.training.optimizer import MuonAdamW
from worldloop.types import ActionSpec, Episode

SIZE, T, CHUNK = 32, 16, 8
POSITION, ROTATION = (0.012, 0.007, 0.003, 0.001), (0.03, 0.01, 0.004, 0.002)
CPU = torch.device("cpu")
SPEC = ActionSpec(chunk=CHUNK)


# ---------------------------------------------------------------- the dataset


def lagging_arm(actions: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Poses [T+1,7] of a controller that carries out a command over four steps."""
    poses = [start.astype(np.float64)]
    for t in range(len(actions)):
        pose = poses[-1].copy()
        for k in range(4):
            if t >= k:
                pose[:3] += POSITION[k] * actions[t - k, :3]
                pose[3:6] += ROTATION[k] * actions[t - k, 3:6]
        pose[6] = actions[t, 6]
        poses.append(pose)
    return np.array(poses, np.float32)


def episode(seed: int) -> Episode:
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (T, 7)).astype(np.float32)
    states = lagging_arm(actions, rng.normal(0, 0.1, 7))
    spots = np.clip(16 + 90 * (states[:, :2] - states[0, :2]), 4, 27)
    y, x = np.mgrid[:SIZE, :SIZE]
    pictures = []
    for column, row in spots:
        picture = np.stack([6 * x, 5 * y, 0 * x + 60], -1).astype(np.uint8)
        picture[(abs(x - column) < 4) & (abs(y - row) < 4)] = (250, 30, 40)
        pictures.append(picture)
    success = seed % 2
    reward = np.zeros(T, np.float32)
    reward[T // 2 :] = success
    return Episode(
        frames=np.stack(pictures),
        actions=actions,
        states=states,
        reward=reward,
        instruction="push the cube",
        env_id="PushCube-v1",
        seed=seed,
        success=bool(success),
        objects=np.zeros((T + 1, 1, 7), np.float32),
        object_pixels=spots[:, None].astype(np.float32),
    )


def write_dataset(root: Path, count: int = 6, spec: ActionSpec = SPEC) -> Path:
    writer = EpisodeWriter(root, DatasetMeta(spec, "PushCube-v1", {"name": "test"}, T, SIZE))
    writer.add([episode(seed) for seed in range(count)])
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def autoencoder_config(dataset: Path, out: Path, **changes) -> ae.AutoencoderConfig:
    return ae.AutoencoderConfig(**{
        "data": (dataset,), "out": out, "preset": "test", "steps": 4, "batch": 2, "save_every": 2,
        "held_out": 2, "precision": "fp32", "device": "cpu", **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def autoencoder(dataset, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return ae.train(autoencoder_config(dataset, tmp_path_factory.mktemp("ae"))) / "model"


def training_config(dataset: Path, autoencoder: Path, out: Path, **changes):
    return world_model.WorldModelTraining(**{
        "data": (dataset,), "autoencoder": autoencoder, "out": out, "width": 48, "depth": 1,
        "steps": 6, "batch": 2, "save_every": 2, "held_out": 2, "sample_every": 0,
        "precision": "fp32", "device": "cpu", "arm_steps": 2, "pose_head_steps": 2, **changes,
    })  # fmt: skip


def rows_of(folder: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("second", "mfu", "share_")
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder and, beside it, of the newest training state."""
    found = {}
    for name in json.loads((folder / "model/config.json").read_text())["files"].items():
        part, file = name
        for key, tensor in load_tensors(folder / "model" / file).items():
            found[f"{part}/{key}"] = tensor
    state, meta = load_training_state(folder / "state")
    found["step"] = torch.tensor(meta["step"])
    flat = [("state", state)]
    while flat:
        name, value = flat.pop()
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            flat.extend((f"{name}/{k}", v) for k, v in value.items())
        elif isinstance(value, list | tuple):
            flat.extend((f"{name}/{i}", v) for i, v in enumerate(value))
    return found


def assert_same_run(a: Path, b: Path) -> None:
    assert rows_of(a) == rows_of(b)
    left, right = weights_of(a), weights_of(b)
    assert left.keys() == right.keys()
    different = [k for k in left if not torch.equal(left[k], right[k])]
    assert not different


class Killed(BaseException):
    """Stands for SIGKILL: no handler catches it."""


def die_at(monkeypatch, module, name: str, call: int) -> None:
    """The n-th call of ``module.name`` (counted from 1) does not return."""
    original, calls = getattr(module, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, dying)


# ---------------------------------------------------------------- autoencoder


def test_the_autoencoder_overfits(dataset, tmp_path):
    data = load_arrays(dataset)
    torch.manual_seed(0)
    model = ae.LightVAE(dataclasses.replace(ae.PRESETS["test"](), picture=(SIZE, SIZE)))
    config = autoencoder_config(dataset, tmp_path)
    groups, near = ae.groups_of([data], [(0, i, i + 1) for i in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        torch.manual_seed(0)
        loss, mse = ae.weighted_loss(model, groups, near, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.4 * losses[0]


def test_every_camera_has_a_background_of_its_own(dataset):
    data = load_arrays(dataset)
    darker = dataclasses.replace(data, frames=np.asarray(data.frames) // 3, env_id="Darker-v1")
    torch.manual_seed(0)
    model = ae.LightVAE(dataclasses.replace(ae.PRESETS["test"](), picture=(SIZE, SIZE)))
    model.background.data[0] = ae.median_background(data)
    assert ae.add_cameras(model, [data]) is model
    grown = ae.add_cameras(model, [data, darker])
    assert grown.config.cameras == 2
    torch.testing.assert_close(grown.background[0], model.background[0], rtol=0, atol=0)
    torch.testing.assert_close(grown.encoder[1].weight, model.encoder[1].weight, rtol=0, atol=0)
    assert ae.add_cameras(grown, [data, darker]) is grown
    groups, near = ae.groups_of([data, darker], [(0, 1, 2), (1, 1, 2), (0, 3, 0), (1, 0, 1)])
    assert grown.nearest(groups).tolist() == [0, 1, 0, 1]
    # The decoder learns to read the camera from the latents.
    config = autoencoder_config(dataset, Path("unused"))
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        ae.weighted_loss(grown, groups, near, config)[0].backward()
        optimizer.step()
    with torch.no_grad():
        latents = grown.encode_groups(groups)
        assert grown.camera_logits(latents).argmax(1).tolist() == [0, 1, 0, 1]
        last = grown.decode_groups(latents, "last")
        torch.testing.assert_close(last, grown.decode_groups(latents)[:, -3:], rtol=0, atol=1e-6)


def test_groups_are_drawn_by_task_and_held_out_ones_are_kept_apart(dataset):
    data = load_arrays(dataset)
    other = dataclasses.replace(data, env_id="Other-v1")
    config = autoencoder_config(dataset, Path("unused"))
    rng = np.random.default_rng(0)
    chosen = ae.sample([data, data, other], config, rng, 4000)
    share = np.bincount([k for k, _, _ in chosen], minlength=3) / 4000
    np.testing.assert_allclose(share, [0.25, 0.25, 0.5], atol=0.03)
    first_held = len(data) - config.held_out
    assert max(e for _, e, _ in chosen) < first_held
    held = ae.sample([data, other], config, rng, 100, held_out=True)
    assert min(e for _, e, _ in held) == first_held


def test_groups_are_the_frames_behind_each_latent(dataset):
    data = load_arrays(dataset)
    groups, near = ae.groups_of([data], [(0, 1, 0), (0, 2, 3)])
    frames = ((groups + 1) * 127.5).round().numpy().reshape(2, 4, 3, SIZE, SIZE)
    for t in range(4):
        np.testing.assert_array_equal(frames[0, t].transpose(1, 2, 0), data.frames[1, 0])
        np.testing.assert_array_equal(frames[1, t].transpose(1, 2, 0), data.frames[2, 9 + t])
    column, row = data.object_pixels[1, 0, 0]
    assert near.shape == (2, 1, SIZE, SIZE)
    assert near[0, 0, round(float(row)), round(float(column))] > 0.9
    # What training encodes is what the model encodes.
    model = ae.LightVAE(ae.PRESETS["test"]())
    clip = torch.from_numpy(data.frames[2, :13].astype(np.float32) / 127.5 - 1)
    with torch.no_grad():
        latents, _ = model.encode(clip.permute(3, 0, 1, 2)[None])
        raw = model.encode_groups(groups[1:])
    torch.testing.assert_close(latents[:, :, 3], raw, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kill", [(ae, "weighted_loss", 4), (common, "save_state", 2), (ae, "write_samples", 2)]
)
def test_a_killed_autoencoder_run_resumes_exactly(dataset, tmp_path, monkeypatch, kill):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ae.train(autoencoder_config(dataset, whole, steps=5))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, *kill)
        ae.train(autoencoder_config(dataset, killed, steps=5))
    assert load_training_state(killed / "state")[1]["step"] == 2
    ae.train(autoencoder_config(dataset, killed, steps=5))
    assert_same_run(whole, killed)
    assert [row["step"] for row in rows_of(whole)] == [2, 4, 5]
    assert {"loss", "train_psnr", "held_out_psnr"} <= rows_of(whole)[0].keys()
    pictures = sorted(p.name for p in (whole / "samples").iterdir())
    assert pictures == ["000002.png", "000004.png", "000005.png"]


def test_autoencoder_latents_leave_normalised(dataset, autoencoder):
    model = load_autoencoder(autoencoder)
    data = load_arrays(dataset)
    clips = torch.from_numpy(data.frames[:4].astype(np.float32) / 127.5 - 1)
    with torch.no_grad():
        latents, _ = model.encode(clips.permute(0, 4, 1, 2, 3))
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.5
    assert ((latents.std((0, 2, 3, 4)) - 1).abs() < 0.5).all()


def test_a_frozen_encoder_keeps_the_latents(dataset, autoencoder, tmp_path):
    tuned = ae.train(
        autoencoder_config(dataset, tmp_path, init=autoencoder, freeze_encoder=True, steps=2)
    )
    before, after = load_autoencoder(autoencoder), load_autoencoder(tuned / "model")
    assert after.config == before.config
    old, new = before.state_dict(), after.state_dict()
    frozen = [k for k in old if not k.startswith("decoder")]
    assert frozen and all(torch.equal(old[k], new[k]) for k in frozen)
    assert any(not torch.equal(old[k], new[k]) for k in old if k.startswith("decoder"))


# ---------------------------------------------------------------- world model


def trainee(dataset: Path, autoencoder: Path, out: Path, **changes):
    """(model with random non-zero weights, batches, config), as `train` builds them."""
    config = training_config(dataset, autoencoder, out, **changes)
    data = load_arrays(dataset)
    latents = world_model.latent_cache(data, dataset, autoencoder, CPU)
    batches = world_model.Batches([data], [latents], config)
    torch.manual_seed(0)
    sizes = starting.dit_sizes(config, data, latents.shape[2:], None)
    reward = RewardConfig(latent_channels=16, grid=(4, 4))
    model = world_model.Trainee(DiT(sizes), RewardHead(reward))
    return model, batches, config, data


def test_the_world_model_overfits(dataset, autoencoder, tmp_path):
    model, batches, config, data = trainee(dataset, autoencoder, tmp_path, lr=5e-3, lr_vectors=5e-3)
    sizes = world_model.config_of(model, [data], autoencoder_of(autoencoder))
    optimizer = MuonAdamW(model, config)
    batch = batches.of(np.array([0, 1]))
    losses = []
    for step in range(40):
        torch.manual_seed(step % 2)
        losses.append(world_model.training_loss(model, batch, config, sizes, False))
        optimizer.schedule(step + 100, 10_000)
        optimizer.zero_grad()
        losses[-1]["loss"].backward()
        optimizer.step()
    curve = [float(row["loss"].detach()) for row in losses]
    assert np.isfinite(curve).all()
    assert np.mean(curve[-4:]) < 0.6 * np.mean(curve[:4])
    flow = [float(row["flow"]) for row in losses]
    assert np.mean(flow[-4:]) < 0.7 * np.mean(flow[:4])


def test_rewards_are_learned_at_shifted_places():
    """Made and true latents of an episode move alike, edges repeated; targets stay."""
    seen = []

    def head(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.mean((1, 3, 4))

    made, real = torch.randn(2, 6, 5, 2, 7, 9)
    torch.manual_seed(2)
    errors = world_loss.reward_errors(head, made, real, torch.zeros(6, 2), 2)
    torch.manual_seed(2)
    down, right = torch.randint(-2, 3, (2, 6, 1))
    assert len({*zip(down.ravel().tolist(), right.ravel().tolist())}) > 3
    for x, shifted, error in zip((made, real), seen, errors, strict=True):
        for b in range(6):
            padded = torch.nn.functional.pad(x[b], (2, 2, 2, 2), mode="replicate")
            r, c = int(down[b]) + 2, int(right[b]) + 2
            expected = padded[..., r : r + 7, c : c + 9]
            assert torch.equal(shifted[b], expected)
            mean = expected.mean((0, 2, 3)).square().mean()
            assert float(error[b]) == pytest.approx(float(mean), rel=1e-4)
    seen.clear()
    world_loss.reward_errors(head, made, real, torch.zeros(6, 2), 0)
    assert seen[0] is made and seen[1] is real


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5


@pytest.mark.parametrize(("sink", "window"), [(1, 12), (0, 2)])
def test_what_is_trained_is_what_generates(
    dataset, autoencoder, tmp_path, monkeypatch, sink, window
):
    """At t = 1 with its own history, training makes the latents of one-step streaming.

    With a window of one chunk as well, when the second chunk no longer sees the first frame.
    """
    model, batches, config, data = trainee(
        dataset, autoencoder, tmp_path, pure_noise=1.0, reward_shift=0
    )
    randomise(model)
    sizes = world_model.config_of(model, [data], autoencoder_of(autoencoder))
    sizes = dataclasses.replace(sizes, sink=sink, window=window)
    world = world_model.world_of(model, sizes, autoencoder_of(autoencoder), 0).eval()
    seen = []
    model.reward.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    state = world.start(data.frames[:2, :1, None], data.states[:2, 0], (3, 4))
    for k in range(2):
        _, state = world.step(state, data.actions[:2, CHUNK * k : CHUNK * (k + 1)], steps=1)
    generated = seen[:]
    seen.clear()
    noise = iter(noise_for([derive_seed(s, k) for s in (3, 4)], (16, 2, 4, 4)) for k in range(2))
    monkeypatch.setattr(torch, "randn_like", lambda like: next(noise))
    batch = batches.of(np.array([0, 1]))
    # The cache holds latents in half precision; generation encodes its start itself.
    pixels = torch.from_numpy(data.frames[:2, :1].astype(np.float32) / 127.5 - 1)
    with torch.no_grad():
        batch.latents[:, :, :1] = world.autoencoder.encode(pixels.permute(0, 4, 1, 2, 3))[0]
    losses = world_model.training_loss(model, batch, config, sizes, True)
    made = seen[::2]  # the reward head sees each prediction, then the true latents
    for a, b in zip(made, generated, strict=True):
        assert b.std() > 0.1
        assert float((a - b).norm() / b.norm()) < 1e-5
    expected = np.mean([(a - batch.latents[:, :, 1 + 2 * k : 3 + 2 * k]).square().mean()
                        for k, a in enumerate(made)])  # fmt: skip
    assert float(losses["flow"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("kill", [("training_loss", 6), ("save_state", 2)])
def test_a_killed_world_model_run_resumes_exactly(
    dataset, autoencoder, tmp_path, monkeypatch, kill, keep
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"steps": 5, "keep": keep}
    world_model.train(training_config(dataset, autoencoder, whole, **options))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, world_model, *kill)
        world_model.train(training_config(dataset, autoencoder, killed, **options))
    assert load_training_state(killed / "state")[1]["step"] in (2, 4)
    world_model.train(training_config(dataset, autoencoder, killed, **options))
    assert_same_run(whole, killed)
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == [0, 2, 4, 5][keep == "last" :]
    assert {"loss", "flow", "flow_last", "reward", "held_out_flow", "lr"} <= rows[-1].keys()
    assert all(np.isfinite(v) for row in rows for v in row.values())


def test_the_trained_model_is_whole_and_imagines(dataset, autoencoder, tmp_path, monkeypatch):
    shown = []

    def record(path, pictures, fps):
        shown.append((path, np.stack(list(pictures)), fps))

    monkeypatch.setattr(samples, "write_video", record)
    folder = world_model.train(
        training_config(dataset, autoencoder, tmp_path, steps=3, sample_every=2)
    )
    world = WorldModel.from_pretrained(folder)
    data = load_arrays(dataset)
    assert world.config.trained_steps == 3 and world.config.env_ids == ("PushCube-v1",)
    assert world.action_spec == data.action_spec
    [(path, video, fps)] = shown
    assert path == tmp_path / "samples" / "000002.mp4" and fps == 20
    assert video.shape == (T + 1, 2 * SIZE, 2 * SIZE, 3)
    for row in range(2):
        part = video[:, row * SIZE : (row + 1) * SIZE]
        np.testing.assert_array_equal(part[:, :, :SIZE], data.frames[4 + row])
        np.testing.assert_array_equal(part[0, :, SIZE:], data.frames[4 + row, 0])
    assert video[1:, :, SIZE:].std() > 5


def test_sampling_changes_nothing(dataset, autoencoder, tmp_path):
    with_, without = tmp_path / "with", tmp_path / "without"
    world_model.train(training_config(dataset, autoencoder, with_, steps=4, sample_every=1))
    world_model.train(training_config(dataset, autoencoder, without, steps=4))
    assert_same_run(with_, without)
    videos = sorted((with_ / "samples").iterdir())
    assert [v.name for v in videos] == [f"00000{i}.mp4" for i in range(1, 5)]
    assert all(v.stat().st_size > 500 for v in videos)
    assert not (without / "samples").exists()


def test_fine_tuning_keeps_sizes_and_pose_statistics(dataset, autoencoder, tmp_path):
    first = world_model.train(training_config(dataset, autoencoder, tmp_path / "a", steps=2))
    base = WorldModel.from_pretrained(first)
    nudged = tuple(v + 0.01 for v in base.action_spec.pose_mean)
    config = dataclasses.replace(
        base.config,
        action_spec=dataclasses.replace(base.action_spec, pose_mean=nudged),
        reward_threshold=0.7, sink=2, env_ids=("PullCube-v1",),
    )  # fmt: skip
    moved = WorldModel(config, base.dit, base.autoencoder, base.reward).save(tmp_path / "moved")
    options = {"init": moved, "width": None, "depth": None, "steps": 1, "save_every": 1}
    tuned = WorldModel.from_pretrained(
        world_model.train(
            training_config(dataset, autoencoder, tmp_path / "b", **options, lr=0.0, lr_vectors=0.0)
        )
    )
    assert tuned.config == dataclasses.replace(
        config, trained_steps=3, env_ids=("PullCube-v1", "PushCube-v1"),
        tasks=(TaskRecord("PushCube-v1", "push the cube"),),
    )  # fmt: skip
    own, theirs = base.state_dict(), tuned.state_dict()
    assert all(torch.equal(own[k], theirs[k]) for k in own)
    with pytest.raises(UserError, match="its width is 48, this run's 96"):
        world_model.train(
            training_config(dataset, autoencoder, tmp_path / "c", **{**options, "width": 96})
        )
    other = dataclasses.replace(
        config, action_spec=dataclasses.replace(config.action_spec, control_hz=10.0)
    )
    slow = WorldModel(other, base.dit, base.autoencoder, base.reward).save(tmp_path / "slow")
    with pytest.raises(ValueError, match="control_hz: 10.0 here, 20.0 there") as caught:
        world_model.train(
            training_config(dataset, autoencoder, tmp_path / "d", **{**options, "init": slow})
        )
    assert str(slow) in str(caught.value) and str(dataset) in str(caught.value)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("lr, best", [(3.0, 1), (100.0, 0)])
def test_fine_tuning_that_makes_it_worse_is_not_kept(dataset, autoencoder, tmp_path, lr, best):
    start = world_model.train(training_config(dataset, autoencoder, tmp_path / "a", steps=2))
    options = {"init": start, "width": None, "depth": None, "steps": 2, "save_every": 1}
    options |= {"lr": lr, "lr_vectors": lr / 3, "arm_steps": 0, "pose_head_steps": 0}
    kept = {}
    for keep in ("last", "best"):
        out = tmp_path / keep
        folder = world_model.train(training_config(dataset, autoencoder, out, keep=keep, **options))
        kept[keep] = WorldModel.from_pretrained(folder)
    losses = [row["held_out_loss"] for row in rows_of(tmp_path / "best")]
    assert len(losses) == 3 and np.argmin(losses) == best
    assert kept["best"].config.trained_steps == 2 + best
    assert kept["last"].config.trained_steps == 4
    first = WorldModel.from_pretrained(start).state_dict()
    unmoved = all(torch.equal(first[k], v) for k, v in kept["best"].state_dict().items())
    assert unmoved == (best == 0)


def test_bf16_trains_and_samples(dataset, autoencoder, tmp_path):
    ae.train(autoencoder_config(dataset, tmp_path / "ae", precision="bf16", steps=2))
    options = {"steps": 2, "precision": "bf16", "sample_every": 2}
    folder = world_model.train(training_config(dataset, autoencoder, tmp_path / "wm", **options))
    for row in rows_of(tmp_path / "ae") + rows_of(tmp_path / "wm"):
        assert all(np.isfinite(v) for v in row.values())
    assert {p.dtype for p in WorldModel.from_pretrained(folder).parameters()} == {torch.float32}
    with pytest.raises(UserError, match="precision is 'fp8'"):
        autocast(torch.device("cpu"), "fp8")


@pytest.mark.slow
def test_compiled_blocks_train_alike(dataset, autoencoder, tmp_path):
    """Recomputed and sharded ones: `test_mixture.py`."""
    rows = {}
    for name in ("plain", "compiled"):
        config = training_config(
            dataset, autoencoder, tmp_path / name, steps=2, sample_every=2,
            compile=name == "compiled",
        )  # fmt: skip
        folder = world_model.train(config)
        rows[name] = rows_of(tmp_path / name)
        assert "dit.blocks.0.mlp.layer1.weight" in WorldModel.from_pretrained(folder).state_dict()
    assert [row["step"] for row in rows["compiled"]] == [row["step"] for row in rows["plain"]]
    for row, expected in zip(rows["compiled"], rows["plain"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


TWO = """
import hashlib, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from worldloop.training import common, starting, world_model

kept = []
class Kept(world_model.MuonAdamW):
    def __init__(self, model, config):
        kept.append(model)
        super().__init__(model, config)
world_model.MuonAdamW = Kept

reduce = common.Workers.average_gradients
def checked(self, module):
    own = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    reduce(self, module)
    mean = [p.grad for p in module.parameters() if p.grad is not None]
    for a, b in zip(own, mean):
        other = 2 * b - a
        gathered = [torch.empty_like(a) for _ in range(2)]
        dist.all_gather(gathered, a.contiguous())
        torch.testing.assert_close(b, (gathered[0] + gathered[1]) / 2)
    assert any(not torch.equal(a, b) for a, b in zip(own, mean)), "both saw the same batch"
common.Workers.average_gradients = checked

out, data, autoencoder = map(Path, sys.argv[1:])
world_model.train(world_model.WorldModelTraining(
    data=(data,), autoencoder=autoencoder, out=out, width=48, depth=1, steps=3, batch=1,
    save_every=2, held_out=2, sample_every=3, precision="fp32", device="cpu", arm_steps=2,
    pose_head_steps=2))
digest = hashlib.sha256()
for tensor in kept[0].state_dict().values():
    digest.update(tensor.numpy().tobytes())
(out / f"digest-{os.environ['RANK']}").write_text(digest.hexdigest())
"""


def test_two_processes_end_with_the_same_weights(dataset, autoencoder, tmp_path):
    script, out = tmp_path / "two.py", tmp_path / "out"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", str(script), str(out), str(dataset), str(autoencoder)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    digests = [(out / f"digest-{rank}").read_text() for rank in range(2)]
    assert digests[0] == digests[1]
    assert [row["step"] for row in rows_of(out)] == [2, 3]
    assert [p.name for p in (out / "samples").iterdir()] == ["000003.mp4"]


# ---------------------------------------------------------------- parts


def test_ema_equals_numpy():
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    module.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
    ema = EMA(module, 0.9)
    assert ema.shadow.keys() == {"weight", "bias"}
    module.frozen = None
    expected = {k: p.detach().numpy().astype(np.float64) for k, p in module.named_parameters()}
    for step in range(40):
        with torch.no_grad():
            for p in module.parameters():
                p += torch.randn_like(p)
        ema.update(module, step)
        decay = min(0.9, (1 + step) / (10 + step))
        for k, p in module.named_parameters():
            expected[k] = decay * expected[k] + (1 - decay) * p.detach().numpy()
    own = {k: p.detach().clone() for k, p in module.named_parameters()}
    with ema.applied(module):
        for k, p in module.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), expected[k], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(own[k], p) for k, p in module.named_parameters())
    with pytest.raises(ValueError), ema.applied(module):
        raise ValueError  # the module's own weights come back all the same
    assert all(torch.equal(own[k], p) for k, p in module.named_parameters())


def test_learning_rate_schedule():
    curve = np.array([learning_rate(step, 1000, 2.0) for step in range(1000)])
    np.testing.assert_allclose(curve[:100], 2.0 * np.arange(1, 101) / 100)
    assert (curve[99:701] == 2.0).all()
    np.testing.assert_allclose(curve[700:], 2.0 * (1000 - np.arange(700, 1000)) / 300)
    assert learning_rate(1000, 1000, 2.0) == 0 == learning_rate(1200, 1000, 2.0)
    assert learning_rate(0, 1, 1.0) == pytest.approx(0.01)


def test_edm_weight_equals_float64():
    t = np.concatenate([np.linspace(0.02, 0.9999, 300), [1.0]])
    sigma = t / np.maximum(1 - t, 1e-4)
    expected = np.minimum((sigma**2 + 1) / sigma**2, 5.0)  # EDM with sigma_data = 1
    made = world_loss.edm_weight(torch.tensor(t, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(made, expected, rtol=2e-5)
    assert made[0] == 5.0 and made[-1] == pytest.approx(1.0)
    assert torch.isfinite(world_loss.edm_weight(torch.zeros(1))).all()


def test_noise_levels():
    config = world_model.WorldModelTraining(
        data=(Path("a"),), autoencoder=Path("b"), out=Path("c"), pure_noise=0.3
    )
    torch.manual_seed(0)
    t = world_loss.sample_times(config, 20_000)
    assert ((t > 0) & (t <= 1)).all()
    assert float((t == 1).float().mean()) == pytest.approx(0.3, abs=0.02)
    rest = t[t < 1].double()
    unshifted = torch.logit(rest / (5 - 4 * rest))  # the inverse of the shift by 5
    assert float(unshifted.mean()) == pytest.approx(0, abs=0.03)
    assert float(unshifted.std()) == pytest.approx(1, abs=0.03)


def test_object_weight_equals_a_gaussian():
    pixels = np.array([[[3.0, 5.5]], [[0.0, 7.0]]], np.float32)  # column, row
    made = object_weight(pixels, 8, 1.5)
    for g, (column, row) in enumerate(pixels[:, 0]):
        for y in range(8):
            for x in range(8):
                expected = np.exp(-((x - column) ** 2 + (y - row) ** 2) / (2 * 1.5**2))
                assert made[g, y, x] == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_loss_weights_follow_motion_and_the_object(dataset, autoencoder, tmp_path):
    _, batches, config, data = trainee(dataset, autoencoder, tmp_path)
    weight = batches.of(np.array([1])).weight
    assert weight.shape == (1, 1, T // 4, 4, 4)
    z = batches.latents[0][1].astype(np.float64)  # [F,C,4,4]
    for f in range(T // 4):
        change = np.square(z[f + 1] - z[0]).mean(0)
        expected = 1 + config.motion_weight * change / (change + 0.25)
        bump = np.zeros((4, 4))
        for t in range(4):  # the four frames of this latent frame
            column, row = (data.object_pixels[1, 1 + 4 * f + t, 0] + 0.5) / 8 - 0.5
            y, x = np.mgrid[:4, :4]
            bump = np.maximum(bump, np.exp(-((x - column) ** 2 + (y - row) ** 2) / 2.88))
        expected += config.object_weight * bump
        np.testing.assert_allclose(weight[0, 0, f], expected, rtol=1e-4)


def test_fit_action_spec_recovers_the_controller(dataset):
    rng = np.random.default_rng(3)
    actions = rng.uniform(-1, 1, (12, 40, 7)).astype(np.float32)
    states = np.stack([lagging_arm(a, rng.normal(0, 0.1, 7)) for a in actions])
    spec = fit_action_spec(SPEC, actions, states)
    np.testing.assert_allclose(spec.controller.position_taps, POSITION, atol=1e-6)
    np.testing.assert_allclose(spec.controller.rotation_taps, ROTATION, atol=1e-6)
    assert spec.controller.position_rmse < 1e-5 and spec.controller.rotation_rmse < 1e-5
    poses = spec.to_absolute(actions, states[:, 0])
    np.testing.assert_allclose(poses, states[:, 1:], atol=2e-5)
    np.testing.assert_allclose(spec.pose_mean, poses.mean((0, 1)), atol=1e-6)
    floor = np.maximum(poses.std((0, 1)), 0.05)
    np.testing.assert_allclose(spec.pose_std, floor, atol=1e-5)
    # In the middle of an episode the arm still carries out the commands before.
    for first in (1, 2, 3, 17):
        part = spec.to_absolute(actions[:, first:], states[:, first], actions[:, :first])
        np.testing.assert_allclose(part, states[:, first + 1 :], atol=2e-5)
    without = spec.to_absolute(actions[:, 17:], states[:, 17])
    assert np.abs(without - states[:, 18:]).max() > 1e-3
    assert spec.lag == 3
    absolute = dataclasses.replace(SPEC, kind="absolute_pose")
    assert fit_action_spec(absolute, states[:, 1:], states).controller is None


def test_missing_taps_are_named():
    with pytest.raises(ValueError, match=r"ActionSpec\.controller is missing"):
        SPEC.to_absolute(np.zeros((1, 2, 7), np.float32), np.zeros((1, 7), np.float32))


def test_latents_are_cached_by_the_autoencoders_weights(dataset, autoencoder, tmp_path):
    data = load_arrays(dataset)
    first = world_model.latent_cache(data, dataset, autoencoder, CPU)
    model = load_autoencoder(autoencoder)
    clip = torch.from_numpy(data.frames[3].astype(np.float32) / 127.5 - 1)
    with torch.no_grad():
        expected = model.encode(clip.permute(3, 0, 1, 2)[None])[0][0].transpose(0, 1)
    # Half precision on disk, and bf16 arithmetic where the machine has it.
    np.testing.assert_allclose(first[3], expected, atol=0.1, rtol=0.02)
    files = set((dataset / ".cache").glob("latents-*.npy"))
    again = world_model.latent_cache(data, dataset, autoencoder, CPU)
    assert set((dataset / ".cache").glob("latents-*.npy")) == files
    np.testing.assert_array_equal(first, again)
    other = ae.train(autoencoder_config(dataset, tmp_path, steps=1, seed=9)) / "model"
    changed = world_model.latent_cache(data, dataset, other, CPU)
    assert len(set((dataset / ".cache").glob("latents-*.npy")) - files) == 1
    assert np.abs(changed.astype(np.float32) - first).max() > 0.1
    assert not list((dataset / ".cache").glob("*.tmp"))


def test_frames_are_decoded_once_and_those_of_new_episodes_for_a_grown_dataset(tmp_path):
    root = write_dataset(tmp_path / "data", 2)
    two = load_arrays(root)
    assert len(two) == 2 and two.frames.shape == (2, T + 1, SIZE, SIZE, 3)
    cached = list((root / ".cache").glob("frames-*.npy"))
    stamp = cached[0].stat().st_mtime_ns
    load_arrays(root)
    assert cached[0].stat().st_mtime_ns == stamp
    np.load(cached[0], mmap_mode="r+")[1] = 7  # what is not decoded again stays as it is
    writer = EpisodeWriter(root, DatasetMeta(SPEC, "PushCube-v1", {"name": "test"}, T, SIZE))
    writer.add([episode(50)])
    three = load_arrays(root)
    assert len(three) == 3 and three.key() != two.key()
    np.testing.assert_array_equal(three.frames[0], two.frames[0])
    assert (three.frames[1] == 7).all() and len(np.unique(three.frames[2])) > 2
    assert len(load_arrays(root, limit=2)) == 2


# ---------------------------------------------------------------- bad input


def test_bad_options_are_named(dataset, autoencoder, tmp_path):
    for changes, message in (
        ({"preset": "huge"}, "preset is 'huge'; known: tiny, test"),
        ({"steps": 0}, "steps is 0"),
        ({"held_out": 0}, "held_out is 0"),
        ({"freeze_encoder": True}, "freeze_encoder needs init"),
    ):
        with pytest.raises(UserError, match=message):
            autoencoder_config(dataset, tmp_path, **changes)
    for changes, message in (
        ({"preset": "huge"}, "preset is 'huge'; known: tiny, 2b, 14b"),
        ({"batch": 0}, "batch is 0"),
        ({"held_out": 0}, "held_out is 0"),
        ({"sample_every": -1}, "sample_every is -1"),
        ({"own_history": 1.5}, r"own_history is 1.5; expected 0 \.\. 1"),
    ):
        with pytest.raises(UserError, match=message):
            training_config(dataset, autoencoder, tmp_path, **changes)


def test_wrong_paths_and_foreign_checkpoints_are_named(dataset, autoencoder, tmp_path):
    out = tmp_path / "out"
    nowhere = tmp_path / "nowhere"
    foreign = save_checkpoint(tmp_path / "foreign", {"a": torch.zeros(1)}, {}, kind="policy")
    cases = [
        (training_config(nowhere, autoencoder, out), FileNotFoundError, "nowhere/meta/info.json"),
        (training_config(dataset, nowhere, out), UserError, "nowhere/config.json: no such file"),
        (training_config(dataset, foreign, out), UserError, "kind is 'policy'"),
        (training_config(dataset, autoencoder, out, init=autoencoder), UserError,
         "kind is 'light_vae', expected 'world_model'"),
        (training_config(dataset, autoencoder, out, held_out=6), UserError, "held_out is 6; .* 6"),
    ]  # fmt: skip
    for config, kind, message in cases:
        with pytest.raises(kind, match=message):
            world_model.train(config)
    with pytest.raises(UserError, match="held_out is 9"):
        ae.train(autoencoder_config(dataset, out, held_out=9))
    with pytest.raises(UserError, match="kind is 'policy'"):
        ae.train(autoencoder_config(dataset, out, init=foreign))
    assert not out.exists()


def test_a_run_of_other_sizes_is_not_resumed(dataset, autoencoder, tmp_path):
    world_model.train(training_config(dataset, autoencoder, tmp_path, steps=1))
    with pytest.raises(UserError, match=r"state: the run to resume: does not fit Trainee"):
        world_model.train(training_config(dataset, autoencoder, tmp_path, steps=2, width=96))


def test_the_autoencoder_refuses_torchrun(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        ae.train(autoencoder_config(dataset, tmp_path))


# ---------------------------------------------------------------- the command line


def test_the_commands_from_a_dataset_to_a_rollout(dataset, tmp_path, capsys):
    data, out = str(dataset), str(tmp_path)
    common = ["--data", data, "--steps", "2", "--batch", "2", "--save-every", "2",
              "--held-out", "2", "--device", "cpu"]  # fmt: skip
    assert (
        worldloop(["train", "autoencoder", *common, "--out", f"{out}/ae", "--preset", "test"]) == 0
    )
    assert worldloop([
        "train", "world-model", *common, "--out", f"{out}/wm", "--autoencoder", f"{out}/ae/model",
        "--width", "48", "--depth", "1", "--sample-every", "2",
        "--arm-steps", "20", "--pose-head-steps", "20",
    ]) == 0  # fmt: skip
    assert worldloop([
        "rollout", "--episodes", data, "--world", f"{out}/wm/model", "--out", f"{out}/rollout",
        "--steps", "1", "--count", "2",
    ]) == 0  # fmt: skip
    for made in ("rollout/rollout.safetensors", "rollout/rollout.mp4", "wm/samples/000002.mp4"):
        assert (tmp_path / made).stat().st_size > 500
    capsys.readouterr()
    assert worldloop(["train", "world-model", *common, "--out", f"{out}/x",
                      "--autoencoder", f"{out}/nowhere"]) == 2  # fmt: skip
    assert "nowhere" in capsys.readouterr().err
