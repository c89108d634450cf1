"""The evaluation of a world model: figures recounted by hand, arms, calibration, the page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from worldloop import cli, hub
from worldloop.engine.policy.base import Observation
from worldloop.engine.policy.scripts.wander import BOX, REACH, Wander
from worldloop.engine.rollout import ReplayPolicy, RolloutEngine
from worldloop.engine.world_model import WorldModel
from worldloop.episodes import DatasetMeta, EpisodeWriter
from worldloop.errors import UserError
from worldloop.metrics import psnr, wilson_interval
from worldloop.outcome import OutcomeClassifier, OutcomeNet
from worldloop.rl import evaluate_world as module
from worldloop.rl.evaluate_world import EvaluateWorldConfig, Evaluation
from worldloop.rl.held_out import load_held_out
from worldloop.rl.made_up import KINDS, made_up, novel_episodes
from worldloop.rl.world_tables import on_recorded, thinned
from worldloop.types import ActionSpec, Episode

SIZE, T, N = 32, 32, 14


def episode(seed: int, env_id: str) -> Episode:
    rng = np.random.default_rng(seed)
    success = seed % 3 == 0
    reward = np.zeros(T, np.float32)
    reward[T // 2 :] = success
    actions = rng.uniform(-1, 1, (T, 7)).astype(np.float32)
    actions[:, 6] = -1
    return Episode(
        frames=rng.integers(0, 256, (T + 1, SIZE, SIZE, 3), np.uint8),
        actions=actions,
        states=rng.normal(0, 0.1, (T + 1, 7)).astype(np.float32),
        reward=reward,
        instruction=f"do {env_id}",
        env_id=env_id,
        seed=seed,
        success=success,
        info={"sim_seed": 100 + seed},
    )


@pytest.fixture(scope="module")
def home(small_world: WorldModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks' held-out episodes, a world model, another seed of it, a classifier."""
    root = tmp_path_factory.mktemp("evaluate")
    for env_id in ("PushCube-v1", "PullCube-v1"):
        camera = {"name": "c", "eye": [0.1, 0.5, 0.6], "target": [0.0, 0.0, 0.0], "fov": 0.6}
        meta = DatasetMeta(small_world.action_spec, env_id, camera, T, SIZE)
        EpisodeWriter(root / env_id, meta).add([episode(i, env_id) for i in range(N)])
    small_world.save(root / "world")
    with torch.no_grad():
        other = WorldModel.from_pretrained(root / "world")
        for p in other.dit.parameters():
            p.mul_(1.1)
    other.save(root / "other")
    torch.manual_seed(0)
    OutcomeClassifier(OutcomeNet(4), SIZE, "PushCube-v1", {}).save(root / "outcome")
    return root


def config(home: Path, out: Path, **changes) -> EvaluateWorldConfig:
    return EvaluateWorldConfig(**{
        "world": str(home / "world"), "episodes": (home / "PushCube-v1", home / "PullCube-v1"),
        "classifiers": (home / "outcome",), "out": out, "simulated": out / "sim", "frames": 16,
        "steps": 1, "by_steps": (35, 2, 1), "steps_count": 2, "novel": 0, "long": 0, "batch": 5,
        "threads": 1, **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def document(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("results")
    arms = (f"no-near-success={home / 'other'}", f"no-near-success={home / 'world'}",
            f"no-reward-head={home / 'other'}", f"transfer={home / 'world'}",
            f"scratch={home / 'other'}")  # fmt: skip
    settings = config(home, out, arms=arms, transfer=home / "PullCube-v1")
    made = Evaluation(settings, lambda text: None).run("the command")
    return out, made


def test_the_document_has_the_shape_that_is_asked_for(document):
    out, made = document
    assert json.loads((out / "world-model.json").read_text()) == made
    assert set(made["tasks"]) == {"PushCube-v1", "PullCube-v1"}
    for row in made["tasks"].values():
        for name in ("n", "psnr", "psnr_static", "ssim", "mse", "reward_alignment"):
            assert isinstance(row[name], int | float), name
        assert row["n"] == 10 and row["successes"] == 5  # balanced: 5 of 14 succeed
        off = row["pose_error_mm"]  # a world model without an arm sums up its commands
        assert off["arm"] == off["linear"] and off["arm"]["p90"] > 0
        assert row["lpips"] is not None or row["lpips_reason"]
        assert row["fvd"] is None and "I3D" in row["fvd_reason"]
        low, high = row["reward_alignment_ci95"]
        assert low <= row["reward_alignment"] <= high
    assert made["tasks"]["PushCube-v1"]["visual_alignment"] is not None
    assert made["tasks"]["PullCube-v1"]["visual_alignment"] is None
    assert "no outcome classifier" in made["tasks"]["PullCube-v1"]["visual_alignment_reason"]
    assert set(made["by_steps"]) == {"35", "2", "1"}
    assert made["drift"] == {"reason": "left out"} == made["action_following"]
    assert made["command"] == "the command" and made["commit"] and made["judge"] is None
    assert made["mean"]["n"] == 20
    expected = np.mean([row["psnr"] for row in made["tasks"].values()])
    assert made["mean"]["psnr"] == pytest.approx(expected)


def test_figures_are_those_of_a_plain_rollout(home, document):
    """Recounted without the code under test: same episodes, same seeds, one batch."""
    world = WorldModel.from_pretrained(home / "world")
    held_out = load_held_out(home / "PushCube-v1", None, world)
    ends = [e.reward[-1] > 0.5 for e in held_out.episodes]
    rows = [i for i in range(N) if ends[i]][:5] + [i for i in range(N) if not ends[i]][:5]
    chosen = [held_out.episodes[i] for i in sorted(rows)]
    held_out = dataclasses.replace(held_out, episodes=chosen)
    engine = RolloutEngine(world, ReplayPolicy(held_out.actions, world.action_spec), steps=1)
    rollout = engine.rollout(held_out.starts, horizon=T, seed=0, decode="all")
    real = np.stack([e.frames for e in chosen])
    row = document[1]["tasks"]["PushCube-v1"]
    assert row["psnr"] == pytest.approx(psnr(real[:, 1:17], rollout.frames[:, 1:17, 0]).mean())
    still = np.broadcast_to(real[:, :1], (10, 16, SIZE, SIZE, 3))
    assert row["psnr_static"] == pytest.approx(psnr(real[:, 1:17], still).mean())
    truth = np.array([e.success for e in chosen])
    assert row["reward_alignment"] == (rollout.success == truth).mean()
    judge = OutcomeClassifier.load(home / "outcome")
    said = judge.success(rollout.frames[:, -1, 0])
    assert row["visual_alignment"] == (said == truth).mean()

    found = document[1]["calibration"]["PushCube-v1"]
    score = rollout.reward
    windows = np.lib.stride_tricks.sliding_window_view(score, found["held_frames"], 1)
    told = (windows.min(-1).max(-1) > found["threshold"]) == truth
    assert found["fitted_on_same"] == pytest.approx(told.mean())  # balanced: the same
    assert found["cross_fitted"] <= 1 and found["episodes"] == 10


def test_the_reward_head_is_measured_on_recorded_frames_too(home, document):
    """A head that reads the truth is right on them, whatever the world model imagines."""
    world = WorldModel.from_pretrained(home / "world")
    held_out = load_held_out(home / "PushCube-v1", None, world).balanced(10)
    row = document[1]["tasks"]["PushCube-v1"]
    assert 0 <= row["reward_alignment_recorded"] <= 1
    assert row["reward_alignment_recorded_counts"] == on_recorded(world, held_out, T).to_dict()
    truth = iter([e.reward for e in held_out.episodes])
    world.reward.forward = lambda latents: torch.from_numpy(next(truth)[None, :T])
    assert on_recorded(world, held_out, T).rate == 1
    truth = iter([1 - e.reward.max() * np.ones(T, np.float32) for e in held_out.episodes])
    assert on_recorded(world, held_out, T).rate == 0


def test_arms_are_pooled_over_seeds_and_transfer_stands_apart(document):
    made = document[1]
    assert set(made["ablations"]) == {"no-near-success", "no-reward-head"}
    arm = made["ablations"]["no-near-success"]
    assert arm["n"] == 40 and len(arm["seeds"]) == 2
    assert arm["reward_alignment"] == pytest.approx(
        np.mean([seed["reward_alignment"] for seed in arm["seeds"]])
    )
    # The second seed is the very model that was measured.
    assert arm["seeds"][1]["psnr"] == pytest.approx(made["mean"]["psnr"])
    assert arm["seeds"][0]["psnr"] != arm["seeds"][1]["psnr"]
    # Two checkpoints on the same 20 starts tell no more of the starts than one does.
    assert arm["reward_alignment_ci95"] == list(wilson_interval(20 * arm["reward_alignment"], 20))
    transfer = made["transfer"]
    assert transfer["task"] == "PullCube-v1" and transfer["n"] == 10
    expected = made["tasks"]["PullCube-v1"]["reward_alignment"]
    assert transfer["transfer"]["reward_alignment"] == expected


def test_the_page_and_the_pictures(document):
    out, made = document
    page = (out / "world-model.md").read_text()
    for words in ("paper, table 1", "| PushCube-v1 | 10 |", "26.57", "Not measured", "Ablations",
                  "An unseen task: PullCube-v1", "no-reward-head", "Made-up actions"):  # fmt: skip
        assert words in page, words
    assert f"{made['mean']['psnr']:.2f}" in page
    drawn = sorted(p.name for p in out.glob("*.png"))
    assert drawn == ["world-model-calibration.png", "world-model-outcomes.png"]
    assert all((out / name).stat().st_size > 5000 for name in drawn)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    blocks: list[list[str]] = []
    for line in page.splitlines():
        if line.startswith("|"):
            (blocks[-1] if blocks and blocks[-1] else blocks.append([]) or blocks[-1]).append(line)
        elif blocks and blocks[-1]:
            blocks.append([])
    assert rows and all(len({row.count("|") for row in block}) == 1 for block in blocks if block)


def test_calibration_is_written_and_read_back(home, tmp_path):
    world = WorldModel.from_pretrained(home / "world").save(tmp_path / "world")
    weights = (world / "dit.safetensors").read_bytes()
    settings = config(
        home, tmp_path / "out", world=str(world), calibrate=True, steps_count=0,
        episodes=(home / "PushCube-v1",),
    )  # fmt: skip
    made = Evaluation(settings, lambda text: None).run("x")
    after = WorldModel.from_pretrained(world).config
    fitted = made["calibration"]["all"]
    assert after.reward_threshold == fitted["threshold"]
    assert after.held_frames == fitted["held_frames"]
    [task] = after.tasks
    assert task.env_id == "PushCube-v1" and task.instruction == "do PushCube-v1"
    assert task.calibration is not None and task.calibration.episodes == 10
    assert task.calibration.threshold == made["calibration"]["PushCube-v1"]["threshold"]
    assert [c[0] for c in task.calibration.curve] == sorted(c[0] for c in task.calibration.curve)
    assert (world / "dit.safetensors").read_bytes() == weights
    assert WorldModel.from_pretrained(home / "world").config.tasks == ()
    # With the fitted threshold the world model's own success is what the fit says.
    again = Evaluation(dataclasses.replace(settings, calibrate=False), lambda text: None)
    measured = again.measure(again.tasks["PushCube-v1"])
    assert measured.comparison.reward.rate == pytest.approx(fitted["fitted_on_same"])
    assert thinned([(i / 99, 1.0, 0.5) for i in range(100)], 3) == [
        (0.0, 1.0, 0.5), (pytest.approx(50 / 99), 1.0, 0.5), (1.0, 1.0, 0.5),
    ]  # fmt: skip


def test_the_judge_is_asked_about_imagined_frames(home, tmp_path, monkeypatch):
    asked = []

    def said(frames, texts, at):
        asked.append((frames, texts))
        return [None, *([True] * (len(frames) - 1))]

    monkeypatch.setattr(module, "judge", said)
    settings = config(home, tmp_path, judge=True, steps_count=0, episodes=(home / "PushCube-v1",))
    evaluation = Evaluation(settings, lambda text: None)
    measured = [evaluation.measure(h) for h in evaluation.tasks.values()]
    row = evaluation.judged(measured)
    assert row["model"].startswith("Qwen/Qwen3-VL")
    assert row["tasks"]["PushCube-v1"]["unclear"] == 1 and row["tasks"]["PushCube-v1"]["n"] == 10
    truth = measured[0].comparison.true_success
    assert row["reward_alignment"] == ((np.arange(10) > 0) == truth).mean()
    np.testing.assert_array_equal(asked[0][0], measured[0].rollout.frames[:, :, 0])
    assert asked[0][1] == ["do PushCube-v1"] * 10


# ---------------------------------------------------------------- made-up actions


def test_made_up_sequences_are_their_kinds():
    rng = np.random.default_rng(0)
    recorded = np.full((72, 7), 0.1, np.float32)
    recorded[:, 6] = -1
    made = {kind: made_up(kind, recorded, np.random.default_rng(1)) for kind in KINDS}
    for kind, actions in made.items():
        assert actions.shape == (72, 7) and np.abs(actions).max() <= 1, kind
        assert (actions[:, 6] == -1).all()
    path = REACH * made["there and back"][:, :3].cumsum(0)
    assert abs(path[17, 1]) == pytest.approx(0.09, abs=1e-3)  # aside
    assert path[36, 1] == pytest.approx(0, abs=1e-3) and path[-1, 2] == pytest.approx(
        0.05, abs=1e-3
    )
    swing = REACH * made["oscillations"][:, :3].cumsum(0)
    assert 0.02 < np.abs(swing[:, 0]).max() < 0.07 and 0.04 < np.abs(swing[:, 1]).max() < 0.11
    assert (np.diff(np.sign(np.diff(swing[:, 1]))) != 0).sum() >= 3
    np.testing.assert_allclose(made["detour, then the task"][24:], recorded[:48])
    apart = made["the task, disturbed"] - recorded
    assert 0.01 < np.abs(apart[:, :3]).mean() < 0.5 and np.allclose(apart[:, 3:6], 0)
    other = made_up(KINDS[3], recorded, rng)
    assert not np.array_equal(other, made[KINDS[3]])
    with pytest.raises(UserError, match="kind is 'dance'"):
        made_up("dance", recorded, rng)


def test_a_wandering_hand_stays_in_its_box():
    spec = ActionSpec(chunk=24)
    policy, pose = Wander(-1.0, spec), np.array([[0.0, 0, 0.1, 0, 0, 0, -1]], np.float32)
    goals = []
    for chunk in range(30):
        seen = Observation(np.zeros((1, 1, 1, 8, 8, 3), np.uint8), pose, ("",), (0,), chunk)
        actions = policy.act(seen, seed=chunk).actions
        assert actions.shape == (1, 24, 7) and (actions[..., 6] == -1).all()
        pose = pose.copy()
        pose[:, :3] += REACH * actions[:, :, :3].sum(1)
        goals.append(pose[0, :3].copy())
    low, high = np.array(BOX).T
    assert (np.array(goals) > low - 1e-3).all() and (np.array(goals) < high + 1e-3).all()
    assert np.array(goals).std(0).min() > 0.02


@pytest.mark.sim
def test_the_simulator_answers_made_up_actions(
    simulated: Callable[[str], object], tmp_path: Path, small_world: WorldModel
):
    """Real physics: the hand goes where it was sent, and the answer is kept."""
    found = simulated("PushCube-v1")
    held_out = module.HeldOut(
        [found.dataset.read(i) for i in range(len(found.dataset))], found.dataset.root,
        "PushCube-v1", 20.0,
    )  # fmt: skip
    first = novel_episodes(held_out, 2, tmp_path, 0)
    stamp = (first.root / "meta/info.json").stat().st_mtime_ns
    assert novel_episodes(held_out, 2, tmp_path, 0).root == first.root
    assert (first.root / "meta/info.json").stat().st_mtime_ns == stamp
    aside = first.read(0)
    assert aside.info["made_up"] == "there and back"
    np.testing.assert_array_equal(aside.frames.shape, held_out.episodes[0].frames.shape)
    moved = aside.states[:, 1] - aside.states[0, 1]
    assert 0.06 < np.abs(moved).max() < 0.12 and abs(moved[36]) < 0.03
    assert aside.states[-1, 2] - aside.states[0, 2] > 0.03
    # The first frame is the held-out one: same seed, same camera.
    apart = aside.frames[0].astype(int) - held_out.episodes[0].frames[0]
    assert np.abs(apart).mean() < 4


def test_without_a_simulator_the_reason_stands_there(home, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise UserError("ManiSkill is not importable; install it with `make setup-sim`")

    monkeypatch.setattr("worldloop.rl.made_up.make_simulator", missing)
    said: list[str] = []
    settings = config(home, tmp_path, novel=2, long=2, steps_count=0)
    made = Evaluation(settings, said.append).run("x")
    assert "make setup-sim" in made["drift"]["reason"] and len(said) == 2
    assert "make setup-sim" in (tmp_path / "world-model.md").read_text()


def test_bad_options_are_named(home, tmp_path, capsys):
    for changes, message in (
        ({"count": 1}, "count is 1"),
        ({"by_steps": (3,)}, "by_steps has 3"),
        ({"arms": ("x",)}, "arms: 'x'; expected NAME=CHECKPOINT"),
        ({"arms": ("transfer=a",)}, "needs the unseen task's episodes: --transfer"),
        ({"novel": 1}, "novel is 1; expected 0, or 2 and more"),
        ({"calibrate": True, "world": "tiny"}, "'tiny' is a shipped or downloaded one; copy it"),
        ({"calibrate": True, "world": str(hub.WEIGHTS / "tiny")}, "a shipped or downloaded one"),
    ):
        with pytest.raises(UserError, match=message):
            config(home, tmp_path, **changes)
    twice = config(home, tmp_path, episodes=(home / "PushCube-v1",) * 2)
    with pytest.raises(UserError, match="a second dataset of PushCube-v1"):
        Evaluation(twice)
    assert cli.main(["evaluate", "world-model", "--world", str(tmp_path / "no")]) == 2
    assert str(tmp_path / "no") in capsys.readouterr().err
