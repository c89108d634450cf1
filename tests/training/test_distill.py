"""Few-step students: own rollouts as they are generated, targets, resuming, long positions."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from worldloop.checkpoint import load_training_state
from worldloop.cli import main as worldloop
from worldloop.engine.arm import Arm
from worldloop.engine.dit import DiT, DiTConfig
from worldloop.engine.sampler import derive_seed, noise_for
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.training import distill, world_model
from worldloop.training.data import load_arrays
from worldloop.training.optimizer import MuonAdamW

CPU, CHUNK = torch.device("cpu"), 8


@pytest.fixture(scope="module")
def teacher(push, stack, autoencoder, tmp_path_factory) -> Path:
    """A world model with random weights and a short window."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("teacher")
    config = world_model.WorldModelTraining(
        data=(push, stack), autoencoder=autoencoder, out=out, width=48, depth=2, steps=1, batch=2,
        held_out=1, sample_every=0, precision="fp32", device="cpu", arm_steps=2, pose_head_steps=2,
    )  # fmt: skip
    world = WorldModel.from_pretrained(world_model.train(config))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in world.dit.parameters():
            p += 0.7 * torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
    world.config = dataclasses.replace(world.config, window=3)
    return world.save(out / "random")


def config_for(teacher: Path, out: Path, data: tuple[Path, ...], **changes):
    return distill.DistillConfig(**{
        "world": teacher, "data": data, "out": out, "steps": 4, "batch": 2, "teacher_steps": 4,
        "held_out": 1, "save_every": 2, "precision": "fp32", "device": "cpu", **changes,
    })  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_students_rollout_is_what_is_generated(teacher, stack, tmp_path, monkeypatch, steps):
    """Three chunks with a window of three latent frames: same noise, same latents, same rewards."""
    config = config_for(teacher, tmp_path, (stack,), reward_shift=0)
    other, student = distill.load_teacher(config, CPU)
    sizes, arm = other.config, other.arm
    assert isinstance(arm, Arm)
    batches = distill.load_data(config, sizes, CPU, arm)
    batch = batches.of(np.array([0, 1]))
    world, data = WorldModel.from_pretrained(teacher), load_arrays(stack)
    seen = []
    world.reward.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    state = world.start(data.frames[:2, :1, None], data.states[:2, 0], (3, 4))
    batch.latents[:, :, :1] = state.last_latent  # the cache has half precision
    for k in range(3):
        actions = data.actions[:2, CHUNK * k : CHUNK * (k + 1)]
        _, state = world.step(state, actions, steps=steps)
    generated = seen[:]
    noise = iter(noise_for([derive_seed(s, k) for s in (3, 4)], generated[0].shape[1:])
                 for k in range(3))  # fmt: skip
    monkeypatch.setattr(torch, "randn_like", lambda like: next(noise))
    made = []
    student.reward.register_forward_pre_hook(lambda _, args: made.append(args[0].detach()))
    losses = distill.distill_gradients(student, other.dit, batch, config, steps, sizes)
    for ours, theirs in zip(made[::2], generated, strict=True):
        assert theirs.std() > 0.05
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    expected = np.mean([float((x - batch.latents[:, :, 1 + 2 * k : 3 + 2 * k]).square().mean())
                        for k, x in enumerate(generated)])  # fmt: skip
    assert float(losses["truth"]) == pytest.approx(expected, rel=1e-3)


def test_students_learn_the_teachers_answer_and_the_truth(teacher, push, tmp_path):
    """On one batch and one noise both targets come nearer, in one, two and four steps."""
    for truth, error in ((0.0, "teacher"), (1.0, "truth")):
        config = config_for(
            teacher, tmp_path, (push,), truth=truth, lr=4e-3, lr_vectors=4e-3, weight_decay=0.0
        )
        other, student = distill.load_teacher(config, CPU)
        sizes, arm = other.config, other.arm
        batch = distill.load_data(config, sizes, CPU, arm).of(np.array([0, 1]))
        optimizer = MuonAdamW(student, config)
        curve: dict[int, list[float]] = {1: [], 2: [], 4: []}
        for step in range(45):
            steps = (1, 2, 4)[step % 3]
            torch.manual_seed(0)
            optimizer.zero_grad()
            losses = distill.distill_gradients(student, other.dit, batch, config, steps, sizes)
            optimizer.schedule(step + 100, 10_000)
            assert all(p.grad is None for p in other.parameters())
            optimizer.step()
            curve[steps].append(float(losses[error]))
        for steps, errors in curve.items():
            assert errors[-1] < 0.7 * errors[0], (error, steps, errors[0], errors[-1])


def test_chunks_placed_later_change_the_answer_alone(teacher, push, tmp_path):
    config = config_for(teacher, tmp_path, (push,))
    other, student = distill.load_teacher(config, CPU)
    sizes, arm = other.config, other.arm
    batch = distill.load_data(config, sizes, CPU, arm).of(np.array([0, 1]))
    values = []
    for gap in (0, 0, 90):
        torch.manual_seed(0)
        loss = distill.distill_gradients(student, other.dit, batch, config, 1, sizes, gap)
        values.append(float(loss["truth"]))
    assert values[0] == values[1] and np.isfinite(values[2])
    assert values[2] != values[0]
    drawn = [distill.draw(dataclasses.replace(config, late=0.5), step) for step in range(400)]
    assert drawn == [distill.draw(dataclasses.replace(config, late=0.5), s) for s in range(400)]
    steps, gaps = np.array(drawn).T
    assert {int(s) for s in steps} == {1, 2, 4}
    assert (gaps == 0).mean() == pytest.approx(0.5, abs=0.1) and 90 < gaps.max() <= 110


@pytest.mark.parametrize("kill", [("distill_gradients", 14), ("save_state", 2)])
def test_a_killed_distillation_resumes_exactly(teacher, push, stack, tmp_path, monkeypatch, kill):
    class Killed(BaseException):
        pass

    name, call = kill
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    distill.distill(config_for(teacher, whole, (push, stack)))
    original, calls = getattr(distill, name), []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(distill, name, dying)
        distill.distill(config_for(teacher, cut, (push, stack)))
    assert load_training_state(cut / "state")[1]["step"] == 2
    distill.distill(config_for(teacher, cut, (push, stack)))
    a, b = (WorldModel.from_pretrained(f / "model") for f in (whole, cut))
    assert a.config == b.config and a.config.trained_steps == 5
    assert all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())
    rows = [[json.loads(r) for r in (f / "metrics.jsonl").read_text().splitlines()]
            for f in (whole, cut)]  # fmt: skip
    kept = [[{k: v for k, v in r.items() if "second" not in k} for r in half] for half in rows]
    assert kept[0] == kept[1] and {"held_out_4", "held_out_1_last"} <= kept[0][0].keys()
    # Everything but the network and its reward head is the teacher's.
    before = WorldModel.from_pretrained(teacher)
    for part in ("autoencoder", "arm"):
        old, new = (getattr(w, part).state_dict() for w in (before, a))
        assert all(torch.equal(old[k], new[k]) for k in old)
    assert any(
        not torch.equal(x, a.dit.state_dict()[k]) for k, x in before.dit.state_dict().items()
    )


def test_positions_beyond_max_frames_are_only_relative():
    """`max_frames` bounds one call; time enters by RoPE alone: a late window is an early one."""
    torch.manual_seed(0)
    config = DiTConfig(
        width=48, depth=2, heads=2, adaln_rank=8, context_dim=0, latent_channels=4,
        condition_channel=False, padding_channel=False, action_dim=7, action_layout="per_frame",
        learned_positions=(2, 2), prediction="sample", max_frames=16, timestep_scale=1000.0,
    )  # fmt: skip
    dit = DiT(config)
    with torch.no_grad():
        for p in dit.parameters():
            p += 0.3 * torch.randn(p.shape)
        made = []
        for first in (1, 15, 101, 1001):
            torch.manual_seed(1)
            past, now = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 4, 2, 4, 4)
            poses, t = torch.randn(2, 8, 7), torch.full((2,), 0.7)
            history = dit(past, torch.zeros(2), poses, first_frame=first).kv
            made.append(dit(now, t, poses, first_frame=first + 2, history=history).sample)
        farther = dit(now, t, poses, first_frame=1040, history=history).sample
    for late in made[1:]:
        torch.testing.assert_close(late, made[0], rtol=0, atol=2e-4 * float(made[0].abs().max()))
    assert not torch.allclose(farther, made[0], atol=1e-3)
    # Rounded angles (the published 2B) tell positions apart only up to 256 latent frames.
    rounded = DiT(dataclasses.replace(config, rope_dtype="bfloat16"))
    rounded.load_state_dict(dit.state_dict())
    with torch.no_grad():
        places = [rounded(now, t, poses, first_frame=f, history=history).sample
                  for f in (200, 201, 600, 601)]  # fmt: skip
    assert not torch.equal(places[0], places[1]) and torch.equal(places[2], places[3])


def test_a_rollout_of_560_frames_goes_on(teacher, stack):
    """Past `max_frames` latent frames, with a ring that has been overwritten many times."""
    world, data = WorldModel.from_pretrained(teacher), load_arrays(stack)
    state = world.start(data.frames[:1, :1, None], data.states[:1, 0], (1,))
    actions = np.random.default_rng(0).uniform(-1, 1, (1, 560, 7)).astype(np.float32)
    spread = []
    for k in range(70):
        chunk, state = world.step(state, actions[:, 8 * k : 8 * k + 8], steps=1, decode="policy")
        assert np.isfinite(chunk.reward).all()
        spread.append(float(state.last_latent.std()))
    assert state.cursor == 141 > world.config.dit.max_frames
    assert state.ring.filled == 4 and np.isfinite(spread).all()
    assert max(spread[40:]) < 10 * max(spread[:20])


def test_bad_options_and_the_command(teacher, push, tmp_path, capsys):
    for changes, message in (
        ({"students": (3,)}, r"students is \[3\]; expected some of 1, 2, 4"),
        ({"truth": 1.5}, r"truth is 1.5; expected 0 \.\. 1"),
        ({"teacher_steps": 0}, "teacher_steps is 0"),
        ({"gap": -1}, "gap is -1"),
    ):
        with pytest.raises(UserError, match=message):
            config_for(teacher, tmp_path, (push,), **changes)
    with pytest.raises(UserError, match="held_out is 9"):
        distill.distill(config_for(teacher, tmp_path / "x", (push,), held_out=9))
    assert not (tmp_path / "x").exists()
    words = ["distill", "--world", str(teacher), "--data", str(push), "--out", str(tmp_path / "y"),
             "--steps", "1", "--batch", "2", "--teacher-steps", "2", "--held-out", "1",
             "--students", "4", "1", "--device", "cpu"]  # fmt: skip
    assert worldloop(words) == 0
    assert "held-out error 4 steps" in capsys.readouterr().err
    assert WorldModel.from_pretrained(tmp_path / "y/model").config.trained_steps == 2


@pytest.mark.gpu
def test_a_gpu_distils(teacher, push, tmp_path):
    """Errors of the same size on both (the noise is drawn on the device that uses it)."""
    found = []
    for device in ("cpu", "cuda"):
        config = config_for(teacher, tmp_path / device, (push,), device=device, steps=2)
        folder = distill.distill(config)
        row = json.loads((tmp_path / device / "metrics.jsonl").read_text().splitlines()[-1])
        found.append(row)
        assert np.isfinite(row["loss"])
        assert WorldModel.from_pretrained(folder).config.trained_steps == 3
    assert found[1]["truth"] == pytest.approx(found[0]["truth"], rel=0.3)
