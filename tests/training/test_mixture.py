"""World-model training beyond one dataset: mixtures, broken data, starts, sharding."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from worldloop.checkpoint import load_training_state
from worldloop.engine.arm import HeadConfig, ObjectHead
from worldloop.engine.dit import DiT
from worldloop.engine.dit_config import DiTConfig
from worldloop.engine.formats.cosmos import save_cosmos
from worldloop.engine.light_vae import PRESETS
from worldloop.engine.reward import RewardConfig
from worldloop.engine.vae import PRESETS as WAN_PRESETS
from worldloop.engine.vae import WanVAE
from worldloop.engine.world_config import WorldModelConfig
from worldloop.engine.world_model import WorldModel
from worldloop.episodes import EpisodeDataset, EpisodeWriter
from worldloop.errors import UserError
from worldloop.files import exclusive
from worldloop.training import data as data_module
from worldloop.training import optimizer, starting, world_model
from worldloop.training.data import is_near_success, load_arrays, load_mixture
from worldloop.training.latents import Batches, autoencoder_of, latent_cache
from worldloop.training.world_loss import training_flops, training_loss
from worldloop.types import ActionSpec

CPU = torch.device("cpu")
SPEC = ActionSpec(chunk=8)
CHUNK = SPEC.chunk


def training(data: tuple[Path, ...], autoencoder: Path, out: Path, **changes):
    return world_model.WorldModelTraining(**{
        "data": data, "autoencoder": autoencoder, "out": out, "width": 48, "depth": 1, "steps": 4,
        "batch": 3, "save_every": 2, "held_out": 1, "sample_every": 0, "precision": "fp32",
        "device": "cpu", "arm_steps": 0, "pose_head_steps": 0, **changes,
    })  # fmt: skip


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- mixtures


def test_a_mixture_counts_tasks_alike_and_keeps_one_horizon(push, stack, pull, autoencoder):
    roots = (push, stack, pull)
    parts = load_mixture(roots)
    latents = [latent_cache(d, root, autoencoder, CPU) for d, root in zip(parts, roots)]
    assert [x.shape[1] for x in latents] == [5, 7, 7]
    config = training(roots, autoencoder, Path("x"), batch=8)
    batches = Batches(parts, latents, config)
    seen: dict[str, int] = {}
    horizons, second = [], []
    for step in range(150):
        batch = batches.at(step, 0)
        horizons.append(batch.poses.shape[1])
        second.append((horizons[-1], batch.episodes[1].split("-")[0]))
        for name in batch.episodes:
            seen[name] = seen.get(name, 0) + 1
        assert batches.at(step, 1).poses.shape[1] == horizons[-1], "ranks differ in horizon"
    task = {t: sum(n for name, n in seen.items() if name.startswith(t))
            for t in ("PushCube", "StackCube", "PullCube")}  # fmt: skip
    assert set(horizons) == {16, 24}
    # What a row is says nothing of the horizon that was drawn before it.
    (shared,) = (h for h in (16, 24) if len({t for k, t in second if k == h}) == 2)
    among = [t for k, t in second if k == shared]
    assert 0.3 < np.mean([t == among[0] for t in among]) < 0.7
    for count in task.values():  # 1200 rows: a third each, standard deviation about 46
        assert count == pytest.approx(400, abs=150)
    # The last episode of each dataset is held out.
    assert "PushCube-v1 episode 5" not in seen and "StackCube-v1 episode 11" not in seen
    assert len(seen) == 5 + 11 + 4
    held = [name for batch in batches.held(6) for name in batch.episodes]
    assert sorted(held) == sorted(
        ["PushCube-v1 episode 5", "StackCube-v1 episode 11", "PullCube-v1 episode 4"]
    )
    # A row is its episode, whatever else is in the batch.
    both = batches.of(np.array([6, 18 + 2]))
    alone = Batches(parts[2:], latents[2:], config).of(np.array([2]))
    assert torch.equal(both.latents[1], alone.latents[0])
    assert torch.equal(both.poses[1], alone.poses[0])
    assert torch.equal(both.reward[1], alone.reward[0])
    torch.testing.assert_close(both.weight[1], alone.weight[0])
    assert not torch.equal(both.latents[0], both.latents[1])


def test_a_mixture_is_trained_recorded_and_fine_tuned(push, stack, autoencoder, tmp_path, capsys):
    config = training((push, stack), autoencoder, tmp_path / "a", arm_steps=3, pose_head_steps=3)
    world = WorldModel.from_pretrained(world_model.train(config))
    assert world.config.env_ids == ("PushCube-v1", "StackCube-v1")
    assert [t.instruction for t in world.config.tasks] == ["do PushCube-v1", "do StackCube-v1"]
    assert world.arm is not None and world.action_spec.controller is not None
    # Three steps teach no pose head: held-out episodes are better without it.
    assert world.arm.pose_head is None
    assert re.search(r"pose head: .* left out", capsys.readouterr().out)
    # The fit is over both datasets, not that of the first.
    assert world.action_spec.pose_mean != load_arrays(push).action_spec.pose_mean
    row = rows_of(tmp_path / "a")[-1]
    assert 0 < row["mfu"] < 2 and row["share_compute"] > 0.1
    assert sum(row[f"share_{k}"] for k in ("data", "compute", "update")) < 1.0
    # Adaptation with few episodes of another task.
    tuned = WorldModel.from_pretrained(world_model.train(training(
        (stack,), autoencoder, tmp_path / "b", init=tmp_path / "a/model", width=None, depth=None,
        limit=4, steps=1,
    )))  # fmt: skip
    assert tuned.action_spec.pose_mean == world.action_spec.pose_mean
    assert [t.env_id for t in tuned.config.tasks] == ["PushCube-v1", "StackCube-v1"]


def test_of_two_arms_the_one_that_ends_nearer_is_kept(
    push, autoencoder, tmp_path, monkeypatch, capsys
):
    first = training((push,), autoencoder, tmp_path / "a", arm_steps=40, steps=1)
    world = WorldModel.from_pretrained(world_model.train(first))
    good, bad = world.arm, copy.deepcopy(world.arm)
    bad.linear.data.mul_(3)
    for name, known, fitted in (("fitted", bad, good), ("that of init", good, bad)):
        world.arm = known
        init = world.save(tmp_path / f"{name}-init")
        monkeypatch.setattr(starting, "fit_arm", lambda *_, fitted=fitted: copy.deepcopy(fitted))
        config = training(
            (push,), autoencoder, tmp_path / name, init=init, width=None, depth=None, arm_steps=1,
            steps=1,
        )  # fmt: skip
        kept = WorldModel.from_pretrained(world_model.train(config)).arm
        torch.testing.assert_close(kept.linear, good.linear)
        assert f"kept: {name}" in capsys.readouterr().out


def test_an_arm_keeps_the_object_head_of_init_where_recordings_have_objects(
    push, autoencoder, tmp_path
):
    config, part = training((push,), autoencoder, tmp_path / "a", arm_steps=2), load_arrays(push)
    head = ObjectHead(HeadConfig())
    assert starting._object_head(config, [part], [], head) is None
    seen = np.zeros((len(part), part.states.shape[1], 1, 7), np.float32)
    seeing = dataclasses.replace(part, objects=seen)
    assert starting._object_head(config, [seeing], [], head) is head
    assert starting._object_head(config, [seeing, part], [], head) is None


def test_episodes_begin_later_too_but_are_never_watched_there(push, stack, autoencoder, tmp_path):
    config = training(
        (push, stack), autoencoder, tmp_path, later_starts=(3, 8), steps=2, sample_every=2
    )
    parts, latents = world_model.load_parts(config, world_model.Workers(CPU), CPU)
    names = [(part.env_id, part.first, part.actions.shape[1]) for part in parts]
    assert names == [
        ("PushCube-v1", 0, 16), ("StackCube-v1", 0, 24), ("PushCube-v1", 3, 8),
        ("StackCube-v1", 3, 16), ("PushCube-v1", 8, 8), ("StackCube-v1", 8, 16),
    ]  # fmt: skip
    whole, later = parts[1], parts[3]
    np.testing.assert_array_equal(later.frames[2], whole.frames[2, 3:20])
    np.testing.assert_array_equal(later.states[2, 0], whole.states[2, 3])
    np.testing.assert_array_equal(later.actions[2, -1], whole.actions[2, 18])
    np.testing.assert_array_equal(later.reward[2, -1], whole.reward[2, 18])
    # Its latents are of a clip that begins there: the first one shows a single frame.
    frame = torch.from_numpy(np.array(whole.frames[2, 3:4])).permute(3, 0, 1, 2)[None]
    alone, _ = autoencoder_of(autoencoder).encode(frame.float() / 127.5 - 1)
    np.testing.assert_allclose(latents[3][2, 0], alone[0, :, 0].detach(), atol=2e-3)
    batches = Batches(parts, latents, config)
    seen = {name for step in range(60) for name in batches.at(step, 0).episodes}
    assert {"StackCube-v1 episode 0 from frame 8 on", "StackCube-v1 episode 0"} <= seen
    assert not any(name.startswith("PushCube-v1 episode 5") for name in seen)
    held = [name for batch in batches.held() for name in batch.episodes]
    assert held == ["PushCube-v1 episode 5", "StackCube-v1 episode 11"]
    world = WorldModel.from_pretrained(world_model.train(config))
    assert [task.env_id for task in world.config.tasks] == ["PushCube-v1", "StackCube-v1"]
    for first in (0, 9):
        with pytest.raises(UserError, match=f"later_starts: {first}; .* at frame 1 to 8"):
            parts[0].begun_at(first)


def test_bad_mixtures_are_named(push, autoencoder, tmp_path, make_dataset):
    alike = make_dataset(tmp_path / "alike", "PullCube-v1", 16, "sss")
    with pytest.raises(UserError, match="PullCube-v1: all 3 episodes end in success"):
        load_mixture([push, alike])
    assert len(load_mixture([push, alike], one_outcome=True)) == 2
    # Successes alone are welcome where another dataset of the task has the failures.
    more = make_dataset(tmp_path / "more", "PushCube-v1", 16, "ss")
    assert len(load_mixture([push, more])) == 2
    slow = make_dataset(
        tmp_path / "slow", "PullCube-v1", 16, "sf", dataclasses.replace(SPEC, control_hz=10)
    )
    with pytest.raises(ValueError, match="control_hz: 20.0 here, 10.* there"):
        load_mixture([push, slow])
    with pytest.raises(UserError, match="data: no dataset is named"):
        load_mixture([])
    with pytest.raises(UserError, match="held_out is 2; .*more has 2 episodes"):
        world_model.train(training((push, more), autoencoder, tmp_path / "x", held_out=2))
    assert not (tmp_path / "x").exists()


def test_two_instructions_in_one_dataset_are_refused(push, tmp_path):
    """They would all be trained under the first."""
    dataset = EpisodeDataset(push)
    said = [dataclasses.replace(e, instruction=f"do {i}", seed=i)
            for i, e in enumerate(dataset.stream())]  # fmt: skip
    EpisodeWriter(tmp_path / "two", dataset.meta).add(said[:2])
    with pytest.raises(UserError, match="two: holds 2 instructions .'do 0', 'do 1' ..."):
        load_arrays(tmp_path / "two")


def test_a_wan_autoencoder_is_found_inside_a_world_model(tmp_path):
    sizes = WAN_PRESETS["tiny"]
    dit = DiTConfig(
        width=48, depth=1, heads=2, latent_channels=4, action_dim=7, chunk_actions=CHUNK
    )
    config = WorldModelConfig(
        dit=dit, autoencoder=sizes, reward=RewardConfig(latent_channels=4, grid=(4, 4)),
        action_spec=SPEC,
    )  # fmt: skip
    world = WorldModel(config)
    found = autoencoder_of(world.save(tmp_path / "world"))
    assert isinstance(found, WanVAE)
    for a, b in zip(found.parameters(), world.autoencoder.parameters(), strict=True):
        torch.testing.assert_close(a, b.float())


def test_near_successes_can_be_left_out(push, make_episode):
    assert list(load_arrays(push).success) == [True, False, True, False, True, False]
    without = load_arrays(push, near_success=False)
    assert list(without.numbers) == [0, 2, 3, 4] and without.key() != load_arrays(push, 4).key()
    np.testing.assert_array_equal(without.frames[2], load_arrays(push).frames[3])
    assert not is_near_success(
        make_episode(0, "PushCube-v1", 8, True, {"perturbation_m": [[0, 0]]})
    )


def test_a_full_disk_is_a_clear_error(monkeypatch, tmp_path, make_dataset):
    def full(*_):
        raise OSError(28, "No space left on device")

    root = make_dataset(tmp_path / "data", "PushCube-v1", 16, "sf")
    monkeypatch.setattr(data_module.os, "posix_fallocate", full)
    with pytest.raises(UserError, match="the disk is full"):
        load_arrays(root)
    assert not list((root / ".cache").glob("*.npy")) and not list((root / ".cache").glob("*.tmp"))


# ---------------------------------------------------------------- the loop


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(
    push, stack, autoencoder, tmp_path, monkeypatch
):
    good = tmp_path / "good"
    world_model.train(training((push, stack), autoencoder, good, steps=2))
    kept = {f.name: f.read_bytes() for f in (good / "model").iterdir()}
    original, seen = world_model.training_loss, []

    def poisoned(model, batch, *rest):
        if len(batch.latents) == 3 and len(seen) == 1:
            batch = dataclasses.replace(batch, latents=batch.latents * float("nan"))
        if len(batch.latents) == 3:
            seen.append(batch.episodes)
        return original(model, batch, *rest)

    monkeypatch.setattr(world_model, "training_loss", poisoned)
    with pytest.raises(UserError, match=r"step 3: the loss is nan") as caught:
        world_model.train(training((push, stack), autoencoder, good, steps=6))
    message = str(caught.value)
    assert all(name in message for name in seen[1]) and len(seen) == 2
    assert f"{good / 'model'} keeps the last good checkpoint" in message
    assert {f.name: f.read_bytes() for f in (good / "model").iterdir()} == kept
    assert load_training_state(good / "state")[1]["step"] == 2
    monkeypatch.undo()
    world_model.train(training((push, stack), autoencoder, good, steps=4))  # goes on all the same
    assert [row["step"] for row in rows_of(good)] == [2, 4]


def test_one_process_a_run_folder(push, autoencoder, tmp_path):
    with exclusive(tmp_path), pytest.raises(UserError, match="another process is working in it"):
        world_model.train(training((push,), autoencoder, tmp_path))


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5


def small_trainee(config, part, latents) -> world_model.Trainee:
    torch.manual_seed(0)
    sizes = starting.dit_sizes(config, part, latents.shape[2:], None)
    reward = world_model.RewardConfig(latent_channels=latents.shape[2], grid=latents.shape[3:5])
    model = world_model.Trainee(DiT(sizes), world_model.RewardHead(reward))
    randomise(model)
    return model


def test_recomputed_blocks_give_the_same_gradients(push, autoencoder, tmp_path):
    part = load_arrays(push)
    latents = latent_cache(part, push, autoencoder, CPU)
    grads = []
    for again in (False, True):
        config = training((push,), autoencoder, tmp_path, depth=2, checkpoint_blocks=again)
        model = small_trainee(config, part, latents)
        batch = Batches([part], [latents], config).of(np.array([0, 1]))
        torch.manual_seed(3)
        sizes = world_model.config_of(model, [part], autoencoder_of(autoencoder))
        training_loss(model, batch, config, sizes, False)["loss"].backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
    assert max(float(g.abs().max()) for g in grads[0].values()) > 1e-3
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("sink", "window"), [(1, 12), (0, 2)])
def test_counted_flops_are_those_of_torch(push, autoencoder, tmp_path, sink, window):
    from torch.utils.flop_counter import FlopCounterMode

    part = load_arrays(push)
    latents = latent_cache(part, push, autoencoder, CPU)
    config = training((push,), autoencoder, tmp_path, width=48, depth=8)
    model = small_trainee(config, part, latents)
    batch = Batches([part], [latents], config).of(np.array([0, 1]))
    sizes = dataclasses.replace(
        world_model.config_of(model, [part], autoencoder_of(autoencoder)), sink=sink, window=window
    )
    with FlopCounterMode(display=False) as counter:
        training_loss(model, batch, config, sizes, False)["loss"].backward()
    counted = training_flops(sizes, batch)
    # We leave the reward head out; the last block of a commit gets hardly any gradient.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.gpu
def test_a_gpu_trains_and_resumes(push, stack, autoencoder, tmp_path):
    """bf16 on CUDA, blocks computed again: finite, below the ceiling, and saved whole."""
    for steps in (4, 8):
        folder = world_model.train(training(
            (push, stack), autoencoder, tmp_path, device="cuda", precision="bf16", steps=steps,
            checkpoint_blocks=True, sample_every=4, arm_steps=2, pose_head_steps=2,
        ))  # fmt: skip
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert all(np.isfinite(row["loss"]) and 0 < row["mfu"] < 1 for row in rows)
    assert WorldModel.from_pretrained(folder).config.trained_steps == 8


# ---------------------------------------------------------------- published starts


def test_a_published_checkpoint_is_a_start_where_shapes_allow(push, autoencoder, tmp_path, capsys):
    from worldloop.engine.formats import cosmos

    sizes = starting.DiTConfig(
        width=48, depth=2, heads=4, latent_channels=PRESETS["test"]().latent_channels,
        context_dim=0, adaln_rank=8, action_dim=7, action_layout="chunk", chunk_actions=12,
    )  # fmt: skip
    published = DiT(sizes)
    randomise(published)
    file = tmp_path / "cosmos.pt"
    save_cosmos(published, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cosmos.ROPE_RATIO_HWT, 48, (3.0, 3.0, 1.0))
        folder = world_model.train(training(
            (push,), autoencoder, tmp_path / "run", init=file, width=None, depth=None, steps=1,
            lr=0.0, lr_vectors=0.0,
        ))  # fmt: skip
        with pytest.raises(UserError, match=r"cosmos.pt: only \d+ of \d+ tensors fit"):
            world_model.train(training((push,), autoencoder, tmp_path / "y", init=file, width=96))
    world = WorldModel.from_pretrained(folder)
    assert world.config.dit.action_layout == "per_frame" and world.streams
    own, theirs = world.dit.state_dict(), published.state_dict()
    fresh = {"action_embedder_B_D.fc1.weight", "action_embedder_B_3D.fc1.weight"}
    assert {k for k in own if own[k].shape != theirs[k].shape} == fresh
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[k], theirs[k]) for k in own if k not in fresh)
    said = capsys.readouterr().out
    assert re.search(r"tensors taken over; 2 start afresh: action_embedder_B_3D.fc1", said)


# ---------------------------------------------------------------- sharded


@pytest.mark.parametrize("fast, tolerance", [(True, 1e-6), (False, 5e-2)])
def test_our_muon_is_torchs(fast, tolerance, monkeypatch):
    """To the last bit where it computes in bf16 as torch's does; in fp32, to bf16's error."""
    monkeypatch.setattr(optimizer, "has_fast_bf16", lambda device: fast)
    generator = torch.Generator().manual_seed(0)
    shapes = ((24, 8), (8, 24), (16, 16))
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    a = optimizer.Muon(ours, 0.1, 0.01, 0.95)
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, momentum=0.95,
                         adjust_lr_fn="match_rms_adamw")  # fmt: skip
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        moved = (q - 1).norm()
        assert (p - q).norm() < tolerance * moved


TWO = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from worldloop.training import starting, world_model
out, data, autoencoder, fsdp, steps, again = sys.argv[1:]
world_model.train(world_model.WorldModelTraining(
    data=(Path(data),), autoencoder=Path(autoencoder), out=Path(out), width=48, depth=2,
    steps=int(steps), batch=2, save_every=2, held_out=1, sample_every=3, precision="fp32",
    device="cpu", arm_steps=2, pose_head_steps=2, fsdp=fsdp == "fsdp",
    checkpoint_blocks=again == "again", compile=fsdp == "fsdp"))
"""


def launch(script: Path, processes: int, *words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               str(processes), str(script), *map(str, words)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_sharded_training_is_plain_training_and_resumes(push, autoencoder, tmp_path):
    """Two gloo processes, blocks compiled and recomputed: the same weights as data-parallel plain
    ones; resumed by two and by one."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    folders = {}
    for name, mode, steps, again in (
        ("plain", "plain", 4, ""), ("whole", "fsdp", 4, "again"), ("cut", "fsdp", 2, "again"),
    ):  # fmt: skip
        folders[name] = tmp_path / name
        done = launch(script, 2, folders[name], push, autoencoder, mode, steps, again or "no")
        assert done.returncode == 0, done.stderr[-3000:]
    state = folders["cut"] / "state"
    assert sorted(p.name for p in (state / "step-00000002").iterdir()) == ["rank-0", "rank-1"]
    halves = [load_training_state(state / f"step-00000002/rank-{r}")[0]["model"] for r in (0, 1)]
    name = "dit.blocks.0.mlp.layer1.weight"
    assert halves[0][name]["rows"].shape == halves[1][name]["rows"].shape == (96, 48)
    done = launch(script, 2, folders["cut"], push, autoencoder, "fsdp", 4, "again")
    assert done.returncode == 0, done.stderr[-3000:]
    found = {k: WorldModel.from_pretrained(v / "model").state_dict() for k, v in folders.items()}
    for key, tensor in found["whole"].items():
        assert torch.equal(found["cut"][key], tensor), key
        torch.testing.assert_close(found["plain"][key], tensor, rtol=2e-3, atol=2e-4)
    moved = WorldModel.from_pretrained(folders["whole"] / "model").config.trained_steps
    assert moved == 4 and (folders["whole"] / "samples/000003.mp4").stat().st_size > 500
    refused = launch(script, 2, folders["plain"], push, autoencoder, "fsdp", 6, "no")
    assert "holds a run that was not sharded" in refused.stderr
    plain = launch(script, 1, folders["whole"], push, autoencoder, "plain", 6, "no")
    assert "holds a sharded run; go on with --fsdp" in plain.stderr
    alone = launch(script, 1, tmp_path / "one", push, autoencoder, "fsdp", 2, "no")
    assert "fsdp needs several processes" in alone.stderr


def test_poses_that_move_farther_keep_their_answer():
    """Weights trained on a closed hand learn to open it; what they knew they still know."""
    torch.manual_seed(0)
    base = dataclasses.replace(SPEC, pose_mean=(0.0,) * 6 + (-1.0,), pose_std=(0.05,) * 7)
    wide = dataclasses.replace(
        base,
        pose_mean=(0.01, 0.3, 0.0, 0.0, 0.0, 0.0, 0.2),
        pose_std=(0.06, 0.15, 0.05, 0.04, 0.05, 0.05, 1.0),
    )
    sizes = dataclasses.replace(
        starting.PRESETS["tiny"](), width=48, depth=1, action_dim=7, action_layout="per_frame"
    )
    dit = starting.DiT(sizes)
    before = {k: v.clone() for k, v in dit.state_dict().items()}
    after = dict(before)
    spec = starting.keep_statistics(after, base, wide)
    assert spec.pose_mean == (0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.2)
    assert spec.pose_std == (0.05, 0.15, 0.05, 0.05, 0.05, 0.05, 1.0)
    poses = 0.1 * torch.randn(5, 4, 7).double()
    poses[..., 6] = -1.0

    def answer(state, spec):
        scaled = (poses - torch.tensor(spec.pose_mean)) / torch.tensor(spec.pose_std)
        weight, bias = (state[f"action_embedder_B_D.fc1.{k}"].double() for k in ("weight", "bias"))
        return scaled.flatten(1) @ weight.T + bias

    torch.testing.assert_close(answer(after, spec), answer(before, base), rtol=0, atol=1e-5)
    # An opening is 40 of the old deviations and would shout down everything else.
    grip = "action_embedder_B_D.fc1.weight"
    torch.testing.assert_close(after[grip][:, 6::7], starting.STEEPEST * before[grip][:, 6::7])
    assert starting.keep_statistics(dict(before), base, base) == base
