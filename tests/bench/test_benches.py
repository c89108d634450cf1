"""Each benchmark runs on a CPU, writes what `compare` and `report` read, and gates its speeds."""

import json
import os

import pytest
import torch

from worldloop.bench import parts, rollout, timing, train, vae
from worldloop.bench.arms import Arm
from worldloop.bench.compare import rows_of
from worldloop.bench.cost import cost_page
from worldloop.bench.policy import main as policy_main
from worldloop.bench.published import PublishedDiT
from worldloop.bench.report import main as report_main
from worldloop.bench.report import read_results, speed_page
from worldloop.bench.worlds import bench_config, bench_world, random_actions, start_state
from worldloop.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One short run of every benchmark but the kernels', whose own tests run them."""
    folder = tmp_path_factory.mktemp("results")
    out = ["--out", str(folder), "--threads", "1"]
    arms = ["--arms", "B", "C1", "C1p", "--no-gate-procedure", "--shares-batch", "1"]
    assert rollout.main([*out, *arms, "--rounds", "1", "--batches", "1"]) == 0
    assert vae.main([*out, "--batches", "1", "--repeats", "1"]) == 0
    assert train.main([*out, "--batch", "1", "--repeats", "1"]) == 0
    assert policy_main([*out, "--batch", "2", "--repeats", "1"]) == 0
    return folder


@pytest.mark.slow
def test_rollout_document(results):
    found = json.loads((results / "rollout-tiny-128x128-cpu.json").read_text())
    assert found["gate_fp32"]["forward"] <= rollout.TOLERANCES[torch.float32]
    rows = {row["arm"]: row for row in found["arms"]}
    assert list(rows) == ["B", "C1", "C1p"]
    for row in rows.values():
        split = row["split_s"]
        assert split["dit"] + split["vae"] + split["reward"] <= split["total"] * 1.001
        assert row["mfu"] > 0 and row["frames_per_s"] == pytest.approx(24 / row["p50_s"])
        assert row["launches"]["operators"] > 100
    assert rows["C1"]["dit_tflop"] == rows["C1p"]["dit_tflop"] < rows["B"]["dit_tflop"]
    assert rows["C1p"]["vae_tflop"] < rows["C1"]["vae_tflop"] < rows["B"]["vae_tflop"]
    shares = found["shares"]
    assert min(shares["seconds"][name] for name in ("dit", "vae", "policy")) > 0
    assert 0 < shares["outside"] < 1
    assert {"torch", "diffusers"} <= found["versions"].keys()


@pytest.mark.slow
def test_every_document_can_be_compared_and_reported(results, tmp_path):
    documents = read_results(results)
    assert {d["bench"] for d in documents.values()} == {"rollout", "vae", "train", "policy"}
    assert all(rows_of(document) for document in documents.values())
    assert report_main(["--results", str(results), "--docs", str(tmp_path)]) == 0
    speed, cost = (tmp_path / "speed.md").read_text(), (tmp_path / "cost.md").read_text()
    there = os.path.relpath(results, tmp_path)
    assert speed == speed_page(documents).replace("../bench/results", there)
    assert cost == cost_page(documents).replace("../bench/results", there)
    for name in documents:
        assert f"({there}/{name})" in speed and (tmp_path / there / name).is_file()
    assert "No GPU run is committed yet" in speed and "Not measured" in cost
    assert "no speed-up over the 30 hours can be claimed" in cost
    assert (tmp_path / "img" / "roofline-tiny-128x128-cpu.png").stat().st_size > 10_000


def test_parts_count_each_call_once_and_leave_nothing_behind():
    world = bench_world("tiny", None, CPU, torch.float32)
    state, actions = start_state(world, 1), random_actions(world, 1)
    before = dict(world.dit.__dict__)
    with parts.Parts(world) as measured:
        world.step(state, actions, steps=1, decode="policy")
    assert measured.seconds["dit"] > 0 and measured.seconds["vae"] > 0
    assert measured.seconds["policy"] == 0
    assert world.dit.__dict__.keys() == before.keys()
    assert not {"encode", "decode"} & world.autoencoder.__dict__.keys()


def test_bad_options_are_named():
    with pytest.raises(UserError, match="arms: 'A3' is unknown"):
        rollout.RolloutBench(arms=("A3",))
    with pytest.raises(UserError, match="preset is '7b'"):
        vae.VAEBench(preset="7b")
    with pytest.raises(UserError, match="backend is 'magic'"):
        rollout.RolloutBench(backend="magic")
    with pytest.raises(UserError, match="sides must be multiples of 16"):
        bench_config("2b", (250, 256))
    with pytest.raises(UserError, match="made for"):
        bench_config("tiny", (256, 256))


def test_a_training_step_without_gradients_prints_no_speed(monkeypatch):
    config = train.TrainBench(threads=1, batch=1, chunks=1)
    trainer = train.Trainer(config, bench_config("tiny", None), 1, CPU)
    assert train.gate(trainer)["loss"] > 0
    loss = trainer.loss
    monkeypatch.setattr(trainer, "loss", lambda: loss() * float("nan"))
    with pytest.raises(UserError, match="no speed"):
        train.gate(trainer)


def test_blocks_that_compile_to_something_else_print_no_speed(monkeypatch):
    config = train.TrainBench(threads=1, batch=1, chunks=1)
    trainer = train.Trainer(config, bench_config("tiny", None), 1, CPU)
    scale = 1.0
    monkeypatch.setattr(
        train, "compile_blocks", lambda dit: dit.final_layer.linear.weight.data.mul_(scale)
    )
    assert train.compile_equal(trainer, 1e-4) == 0
    scale = 1.05
    with pytest.raises(UserError, match="no speed for unequal work"):
        train.compile_equal(trainer, 1e-4)


@pytest.mark.slow
def test_plain_figures_stand_where_compiled_blocks_fail(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        train, "compile_blocks", lambda dit: dit.final_layer.linear.weight.data.mul_(1.05)
    )
    argv = ["--out", str(tmp_path), "--threads", "1", "--batch", "1", "--repeats", "1"]
    assert train.main(argv) == 1
    found = json.loads((tmp_path / "train-tiny-128x128-cpu.json").read_text())
    assert [step["implementation"] for step in found["steps"]] == ["eager"]
    assert "no speed for unequal work" in found["left_out"]["compiled"]
    assert "compiled: left out, UserError" in capsys.readouterr().err


@pytest.mark.gpu
def test_rollout_on_a_gpu(tmp_path):
    options = ["--preset", "tiny", "--rounds", "1", "--batches", "1", "2", "--shares-batch", "2"]
    assert rollout.main(["--out", str(tmp_path), *options]) == 0
    found = json.loads((tmp_path / "rollout-tiny-128x128-gpu.json").read_text())
    rows = {(row["arm"], row["batch"]): row for row in found["arms"]}
    assert rows["A2", 1]["compile_s"] > 0
    assert rows["C4", 2]["launches"]["kernels"] > 0
    assert rows["C4", 2]["launches"]["host_launches"] < rows["C4", 2]["launches"]["kernels"]
    assert all(row["gpu_p50_s"] > 0 for row in rows.values())
    assert found["gate_fp32"]["chunk"] <= rollout.TOLERANCES[torch.float32]


def test_out_of_memory_is_recorded_and_the_rest_goes_on(monkeypatch):
    """The arm that does not fit is left out of larger batches; its batch mates are timed."""
    made = bench_world("tiny", None, CPU, torch.float32)
    config = rollout.RolloutBench(arms=("C1p", "C1"), batches=(1, 2), rounds=1, threads=1)
    runs = rollout.Bench(config, made, made, PublishedDiT(made.dit))
    whole = Arm.__call__

    def call(arm):
        if arm.name == "C1" and arm.episodes.state.chunk > 6:  # half-way through its warm-up
            made.step(arm.episodes.state, arm.episodes.actions, steps=1)  # these are spent now
            raise torch.cuda.OutOfMemoryError("does not fit")
        return whole(arm)

    monkeypatch.setattr(Arm, "__call__", call)
    ceilings = timing.Ceilings(torch.float32, CPU)
    ceilings.gemm = 1e11
    monkeypatch.setattr(ceilings, "measure", lambda: ceilings)
    first, second = runs.batch(1, ceilings)
    assert first["arm"] == "C1p" and first["frames_per_s"] > 0
    assert second == {"arm": "C1", "batch": 1, "out_of_memory": True}
    assert [row["arm"] for row in runs.batch(2, ceilings)] == ["C1p"]
