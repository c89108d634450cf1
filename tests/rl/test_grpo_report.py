"""The report of GRPO runs: figures, intervals, curve and refusals, from evaluations on disk."""

import json
from pathlib import Path

import numpy as np
import pytest

from worldloop.config import config_to_dict
from worldloop.errors import UserError
from worldloop.ledger import checkpoint_sha256
from worldloop.metrics import wilson_interval
from worldloop.rl import grpo_report
from worldloop.rl.evaluate import Evaluation
from worldloop.rl.grpo_report import ReportConfig, draw, summarise, table

RATES = {0: {0: 0.35, 10: 0.4, 20: 0.55}, 1: {0: 0.35, 10: 0.5, 20: 0.6}}


def make_run(folder, seed: int):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    rows = [{"step": 0, "seconds": 1.0, "held_out_success": 0.3}] + [
        {"step": s, "seconds": 10.0 * s, "imagined_success": 0.02 * s, "frames": 100}
        for s in range(1, 21)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in RATES[seed]:
        policy = folder / f"policies/{step:06d}"
        policy.mkdir(parents=True)
        (policy / "config.json").write_text(json.dumps({"step": step}))
    (folder / "done.json").write_text(json.dumps({"steps": 20, "alarm": None}))
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs; the simulator's answers come from RATES and are counted."""
    asked = []

    def evaluate(config):
        step = int(config.policy.rsplit("/", 1)[1])
        seed = int(config.policy.split("run")[1][0])
        asked.append((seed, step, config.episodes))
        share = RATES[seed][step] * np.arange(config.episodes + 1) + 1e-9
        success = np.diff(np.floor(share)) > 0  # spread evenly over the starts
        found = Evaluation(
            tuple(config.first_seed + i for i in range(config.episodes)), success,
            np.full(config.episodes, 30), 100, 1.0,
        )  # fmt: skip
        config.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"config": config_to_dict(config), **found.to_dict(),
                    "policy_sha256": checkpoint_sha256(Path(config.policy))}  # fmt: skip
        config.out.write_text(json.dumps(document))

    monkeypatch.setattr(grpo_report, "evaluate_policy", evaluate)
    return tuple(make_run(tmp_path / f"run{seed}", seed) for seed in RATES), asked


def test_figures_and_curves(runs, tmp_path):
    folders, asked = runs
    config = ReportConfig(runs=folders, episodes=200, curve_episodes=50, command="made by hand")
    found = summarise(config)
    first, second = found["seeds"]
    assert first["before"] == {"success": 0.35, "ci95": list(wilson_interval(70, 200)),
                               "successes": 70}  # fmt: skip
    assert second["after"]["success"] == 0.6 and second["gain_points"] == pytest.approx(25)
    assert found["mean_gain_points"] == pytest.approx((20 + 25) / 2)
    assert found["pooled"]["after"] == {
        "success": 115 / 200, "ci95": list(wilson_interval(115, 200))
    }  # fmt: skip
    # Every point of a curve is of the same first 50 starts, the ends' too.
    assert found["true_curve"][1] == [[0, pytest.approx(0.35, abs=0.02)], [10, 0.5], [20, 0.6]]
    assert found["imagined_curve"][0][0] == [1, 0.02] and len(found["imagined_curve"][0]) == 20
    assert found["frames"] == 2 * 20 * 100 and found["seconds"] == 400
    assert {"task", "episodes", "command", "commit"} <= found.keys()
    assert (0, 10, 50) in asked and (0, 20, 200) in asked
    # A second report asks the simulator nothing.
    count = len(asked)
    assert summarise(config)["seeds"] == found["seeds"] and len(asked) == count
    draw(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    text = table(found)
    assert "| 1 | 35.0% (28.7% – 41.8%) | 60.0%" in text and "+22.5 points" in text


def test_refusals(runs, tmp_path):
    folders, _ = runs
    with pytest.raises(UserError, match="at least one output folder"):
        summarise(ReportConfig(runs=()))
    summarise(ReportConfig(runs=folders[:1]))
    with pytest.raises(UserError, match="has another first_seed; delete it"):
        summarise(ReportConfig(runs=folders[:1], first_seed=5))
    with pytest.raises(UserError, match="has another horizon; delete it"):
        summarise(ReportConfig(runs=folders[:1], horizon=48))
    (folders[0] / "policies/000020/config.json").write_text('{"step": 21}')
    with pytest.raises(UserError, match="000020-200.json: is of another policy; delete it"):
        summarise(ReportConfig(runs=folders[:1]))
    (tmp_path / "empty/policies").mkdir(parents=True)
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(UserError, match="is not finished"):
        summarise(ReportConfig(runs=(tmp_path / "empty",)))
    (tmp_path / "empty/done.json").write_text('{"steps": 5}')
    with pytest.raises(UserError, match="holds 0 policies; 2 or more are compared"):
        summarise(ReportConfig(runs=(tmp_path / "empty",)))
