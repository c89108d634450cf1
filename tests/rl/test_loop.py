"""The closed loop: what a round leaves, that it resumes, and what it refuses.

A second small world stands for the simulator (`loop_home.py`). `test_loop_kill.py` kills it.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # child processes look for loop_home as well

from loop_home import HORIZON, make_home, small_world, triple, write_pool

import worldloop
from worldloop.checkpoint import resolve_pretrained
from worldloop.engine.world_model import WorldModel, WorldModelConfig
from worldloop.episodes import EpisodeDataset, EpisodeWriter
from worldloop.errors import UserError
from worldloop.files import exclusive
from worldloop.ledger import Ledger
from worldloop.metrics import Alignment
from worldloop.rl import loop as loop_module
from worldloop.rl.children import Children, Dropped
from worldloop.rl.jobs import _first_failure, run_job
from worldloop.rl.loop import STAGES, Loop, main
from worldloop.rl.loop_results import main as report
from worldloop.rl.round_config import PRESETS, RoundConfig
from worldloop.rl.stages import Waiting, calibrate, collect, decide, imagined_success
from worldloop.rl.starts import load_starts
from worldloop.rl.true_env import TrueEnv


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, RoundConfig]:
    """A loop after round 1, of a few seconds a stage."""
    home = tmp_path_factory.mktemp("home")
    config = make_home(home)
    Loop(home / "loop", config).run(1)
    return home, config


@pytest.fixture
def copied(finished, tmp_path) -> tuple[Path, RoundConfig]:
    """A copy to spoil."""
    home, config = finished
    shutil.copytree(home / "loop", tmp_path / "loop")
    return tmp_path / "loop", config


def digests(folder: Path) -> list[str]:
    return [record.digest for record in Ledger(folder).records]


# ---------------------------------------------------------------- what a round leaves


def test_a_round_goes_through_every_stage(finished):
    home, config = finished
    ledger = Ledger(home / "loop")
    names = ["evaluate", *(stage.name for stage in STAGES)]
    assert [record.stage for record in ledger.records] == names
    facts = {record.stage: record.facts for record in ledger.records if record.round == 1}
    collected = EpisodeDataset(ledger.output(1, "collect", "episodes"))
    assert collected.seeds == list(range(500_000, 500_010)) and facts["collect"]["dropped"] == 0
    sans = EpisodeDataset(ledger.output(1, "extend", "sans"))
    assert sans.seeds == [*range(9), *collected.seeds]
    assert facts["improve"]["steps"] == 3 and facts["improve"]["imagined_frames"] > 0
    assert [check["step"] for check in facts["improve"]["alarm"]] == [0, 2]
    assert facts["evaluate"]["episodes"] == 12
    greedy = facts["improve"]["imagined_greedy"]
    assert greedy["before"]["episodes"] == greedy["after"]["episodes"] == len(sans)
    for found in (facts["evaluate"], greedy["before"], greedy["after"]):
        low, high = found["ci95"]
        assert low <= found["success"] <= high
    # The world model is trained anew from the pretrained one, and the policy has changed.
    before = ledger.records[0].inputs["path 0"]
    assert ledger.find(1, "improve").outputs["policy"].sha256 != before
    world = json.loads((home / "loop/round-01/fine-tune/model/config.json").read_text())
    assert world["config"]["trained_steps"] == 6


@pytest.mark.sim
def test_rl_begins_from_fresh_starts_where_they_are_asked_for(finished, tmp_path):
    home, _ = finished
    true = TrueEnv("PushCube-v1", horizon=24)
    config = RoundConfig(true=true, episodes=1, starts=9)
    policy = Path(resolve_pretrained("policy/pushcube"))
    made = collect(config, tmp_path, 2, policy)
    starts = EpisodeDataset(made.outputs["starts"])
    first = config.first_seed + 100 + 9  # behind the episodes of 100 rounds and round 1's starts
    assert starts.seeds == list(range(first, first + 9))
    assert made.facts["true_frames"] == 25 + 9 * 2
    for i in (0, 8):
        episode = starts.read(i)
        assert not episode.actions.any() and not episode.success
        np.testing.assert_allclose(episode.states[1, :6], episode.states[0, :6], atol=2e-3)
        np.testing.assert_allclose(episode.objects[1], episode.objects[0], atol=1e-3)
    assert collect(config, tmp_path, 2, policy) == made, "nothing is recorded twice"
    world = WorldModel.from_pretrained("tiny")
    assert load_starts(starts.root, world).frames.shape == (9, 1, 1, 128, 128, 3)

    loop = Loop(home / "loop")
    assert loop.inputs("starts", 1) == loop.inputs("sans", 1)
    loop.config = dataclasses.replace(loop.config, starts=9, true=true)
    with pytest.raises(UserError, match="starts"):  # this loop has recorded none
        loop.inputs("starts", 1)


def test_imagined_success_is_that_of_the_greedy_policy_in_the_world_model_of_rl(tmp_path):
    config = make_home(tmp_path)
    noisy = dataclasses.replace(config.grpo, starts=tmp_path / "pool", seed=3, temperature=5.0)
    policy = Path(config.policy)
    for threshold, wanted in ((0.0, 1.0), (1.0, 0.0)):
        small_world(threshold).save(tmp_path / "other")
        grpo = dataclasses.replace(noisy, world=str(tmp_path / "other"))
        found = imagined_success(grpo, policy)
        assert found["success"] == wanted and found["episodes"] == 9
    grpo = dataclasses.replace(noisy, world=config.world)
    cold = dataclasses.replace(grpo, temperature=0.1)
    assert imagined_success(grpo, policy) == imagined_success(cold, policy)


def test_episodes_that_fooled_it_join_the_next_round(finished):
    home, config = finished
    loop = Loop(home / "loop")
    fooled = loop.inputs("fooled", 2)
    checks = loop.ledger.find(1, "improve").facts["alarm"]
    parted = [c for c in checks if c["alarm_false_success"] + c["alarm_false_failure"]]
    assert len(fooled) == len(parted) and loop.inputs("fooled", 1) == []
    for path, check in zip(fooled, parted, strict=True):
        count = check["alarm_false_success"] + check["alarm_false_failure"]
        assert len(EpisodeDataset(path)) == count


def test_the_report_is_one_file_that_shows_truth_beside_imagination(finished):
    page = (finished[0] / "loop/round-01/report.html").read_text()
    assert "true success" in page and "imagined success" in page and "<svg" in page
    assert "Greedy, from 19 starts in this world model" in page
    assert page.count("data:video/mp4;base64,") == 4 and "data:image/jpeg;base64," in page
    outside = [link for link in re.findall(r'(?:src|href|poster)="([^"]+)"', page)
               if not link.startswith("data:")]  # fmt: skip
    assert outside == [], "self-contained"


def test_status_names_success_time_frames_and_what_is_next(finished, capsys):
    home, _ = finished
    text = Loop(home / "loop").status()
    lines = text.splitlines()
    assert re.search(r"0 +\d+\.\d% \(\d+\.\d% \.\. \d+\.\d%\) +base", lines[1])
    assert re.search(r"1 +\d+\.\d% \(.*\) +(accepted|rolled back) ", lines[2])
    assert "next: nothing" in lines[3]
    assert loop_module.status_main([str(home / "loop")]) == 0
    assert capsys.readouterr().out.strip() == text


def test_the_facade_and_presets():
    assert worldloop.Loop is Loop and worldloop.RoundConfig is RoundConfig
    for config in (RoundConfig(), *(config for _, config in PRESETS.values())):
        assert config.grpo.alarm.every > 0 and config.true.env == "PushCube-v1"
    tiny = PRESETS["tiny"][1]
    assert not tiny.grpo.steps % tiny.grpo.alarm.every, "the last policy is checked, too"
    assert tiny.true.horizon == tiny.grpo.horizon and tiny.starts and tiny.start == "last"


def test_the_success_rule_is_fitted_on_the_rounds_own_episodes(finished, tmp_path, monkeypatch):
    home, config = finished

    def fitted_with(agreement: Alignment) -> tuple[dict, WorldModelConfig]:
        """What `calibrate` says and leaves behind where a fit agrees so on unseen episodes."""
        shutil.rmtree(tmp_path / "world", ignore_errors=True)
        shutil.copytree(home / "world", tmp_path / "world")
        monkeypatch.setattr("worldloop.rl.stages.crossfit_alignment", lambda *_: agreement)
        facts = calibrate(config, tmp_path / "world", home / "pool")
        # A kill after the rule was written must not change the record.
        assert calibrate(config, tmp_path / "world", home / "pool") == facts
        return facts, WorldModel.from_pretrained(tmp_path / "world").config

    before = WorldModel.from_pretrained(home / "world").config
    facts, after = fitted_with(Alignment(5, 0, 0, 5))  # better than the general rule
    assert facts["agreement_general_rule"] < facts["agreement_fitted_rule"] == 1
    assert after.success_rule("do it") == (facts["threshold"], facts["reward_held_frames"])
    assert after.success_rule("something else") == before.success_rule()
    facts, after = fitted_with(Alignment(0, 5, 5, 0))  # worse: the general rule stays
    assert facts["agreement_fitted_rule"] == 0 and "threshold" not in facts
    assert after == before
    # What ends alike tells nothing of a threshold.
    alike = write_pool(tmp_path / "alike", success=False)
    assert set(calibrate(config, tmp_path / "world", alike)) == {"agreement_general_rule"}
    assert WorldModel.from_pretrained(tmp_path / "world").config == before


def test_loops_are_reported_together(finished, tmp_path, capsys):
    home, config = finished
    to = ["--out", "loop.json", "--figure", "loop.png", "--sheet", "loop.jpg"]
    to[1::2] = [str(tmp_path / name) for name in to[1::2]]
    assert report(["--loops", str(home / "loop"), "--rounds", "1", *to]) == 0
    document = json.loads((tmp_path / "loop.json").read_text())
    facts = {r: Ledger(home / "loop").find(r, "evaluate").facts for r in (0, 1)}
    found = document["tasks"]["world"]
    for name, r in (("base", 0), ("round1", 1)):
        assert found["seeds"][0][name]["success"] == facts[r]["success"]
        assert found["pooled"][name]["ci95"] == facts[r]["ci95"]
    gain = 100 * (facts[1]["success"] - facts[0]["success"])
    assert document["mean_gain_points"]["round1"] == pytest.approx(gain)
    assert document["frames"]["imagined"] > 0 and document["hours"] > 0
    for again in found["fooled_round1"]:
        assert set(again["imagined_success"]) == {"pretrained", "round1"}
        assert max(again["imagined_success"].values()) <= again["episodes"]
    assert (tmp_path / "loop.png").stat().st_size > 1000
    assert "| world | all |" in capsys.readouterr().out
    with pytest.raises(UserError, match="round 2 is not evaluated yet"):
        report(["--loops", str(home / "loop"), *to])
    # A report of another machine's loop, another seed of the same task.
    other, path = copy.deepcopy(document), tmp_path / "other.json"
    other["tasks"]["world"]["seeds"][0]["seed"] = 7
    path.write_text(json.dumps(other))
    both = ["--loops", str(home / "loop"), "--reports", str(path), "--rounds", "1"]
    assert report([*both, *to]) == 0
    joined = json.loads((tmp_path / "loop.json").read_text())
    assert [seed["seed"] for seed in joined["tasks"]["world"]["seeds"]] == [0, 7]
    assert joined["hours"] == pytest.approx(2 * document["hours"])
    assert joined["frames"]["imagined"] == 2 * document["frames"]["imagined"]
    assert joined["tasks"]["world"]["pooled"]["base"] == found["pooled"]["base"]
    fewer = copy.deepcopy(other)
    fewer["tasks"]["world"]["seeds"][0]["base"]["episodes"] = 3
    for change, said in (
        ({"horizon": 1}, "measured differently"), ({"tasks": {"world": {}}}, "is no report"),
        ({"tasks": document["tasks"]}, "seed 0 is there twice"),
        ({"tasks": fewer["tasks"]}, "world: evaluated over .*; report them apart"),
    ):  # fmt: skip
        path.write_text(json.dumps(other | change))
        with pytest.raises(UserError, match=said):
            report([*both, *to])


# ---------------------------------------------------------------- resuming


def test_finished_stages_are_not_run_again(copied, monkeypatch):
    folder, config = copied
    monkeypatch.setattr(Loop, "_run", lambda *_: pytest.fail("nothing is left to do"))
    assert Loop(folder, config).run(1).stage == "decide"
    assert Loop(folder).run().round == 1


def test_an_interrupted_evaluation_goes_on_and_ends_alike(copied):
    folder, config = copied
    wanted = digests(folder)
    for name in ("evaluate.json", "decide.json", "report.html", "evaluate/evaluation.json"):
        (folder / "round-01" / name).unlink()
    (path,) = (folder / "round-01/evaluate").glob("results-*.json")
    rows = json.loads(path.read_text())
    path.write_text(json.dumps({n: row for n, row in rows.items() if int(n) < 8}))
    Loop(folder, config).run(1)
    assert digests(folder) == wanted
    assert (folder / "round-01/report.html").is_file()


def test_an_interrupted_collection_goes_on_and_ends_alike(copied):
    folder, config = copied
    wanted, at = digests(folder), folder / "round-01"
    whole = at / "collect/episodes"
    # As a kill after the first shard leaves it: the second one is not counted.
    info = json.loads((whole / "meta/info.json").read_text())
    first = dict(info, total_episodes=8, total_frames=8 * (HORIZON + 1), worldloop_shards=1,
                 splits={"train": "0:8"})  # fmt: skip
    (whole / "meta/info.json").write_text(json.dumps(first, indent=2) + "\n")
    made = collect(config, at, 1, Path(config.policy))
    assert made.facts["episodes"] == 10
    for episode in EpisodeDataset(whole).stream(frames=False):  # drawn as in RL
        assert (episode.info["temperature"], episode.info["coherence"]) == (1.6, 0.5)
    ledger = Ledger(folder)
    ledger.output(1, "collect", "episodes")  # raises unless it is what the record says
    assert digests(folder) == wanted


def test_resume_from_the_command_line(copied, capsys):
    folder, _ = copied
    assert main(["--resume", "--out", str(folder)]) == 0
    assert "next: nothing" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no loop"):
        main(["--resume", "--out", str(folder / "elsewhere")])


# ---------------------------------------------------------------- what it refuses


def test_a_record_edited_by_hand_is_refused(copied):
    folder, config = copied
    path = folder / "round-01/evaluate.json"
    text = path.read_text()
    for old, new in (('"dropped": 0', '"dropped": 1'), ('"attempts": 1', '"attempts": 2')):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=r"evaluate.json: was changed after it was written"):
            Loop(folder, config)
    path.unlink()
    with pytest.raises(UserError, match="record 6 is missing"):
        Loop(folder, config)
    path.write_text(text[:100])
    with pytest.raises(UserError, match="not valid JSON"):
        Loop(folder, config)


def test_other_settings_code_or_data_are_refused(copied, monkeypatch, tmp_path):
    folder, config = copied
    other = dataclasses.replace(config, evaluations=13)
    with pytest.raises(UserError, match="evaluations is 12 there, 13 here; begin.*accept-changes"):
        Loop(folder, other).run(1)
    Loop(folder, other, accept_changes=True).run(1)
    with pytest.raises(UserError, match="was made with another configuration"):
        Loop(folder).run(1)
    Loop(folder, config, accept_changes=True).run(1)
    faster = dataclasses.replace(config, processes=2, limit_s=99.0)
    Loop(folder, faster).run(1)  # how fast is nobody's business
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "code_sha256", lambda: "0" * 64)
        with pytest.raises(UserError, match="was made by other code .commit"):
            Loop(folder, config).run(1)
    pool = tmp_path / "pool"
    moved = dataclasses.replace(config, data=(pool,))
    write_pool(pool)
    begun = tmp_path / "begun"
    begun.mkdir()
    Loop(begun, moved)._open(1)
    rows = next((pool / "data").rglob("*.parquet"))
    rows.write_bytes(rows.read_bytes() + b" ")
    with pytest.raises(UserError, match="pool: is not what this loop began with"):
        Loop(begun, moved).run(1)


def test_an_output_that_was_changed_is_refused(copied):
    folder, config = copied
    (folder / "round-01/decide.json").unlink()
    path = folder / "round-01/evaluate/evaluation.json"
    path.write_text(path.read_text().replace("false", "true"))
    with pytest.raises(UserError, match=r"evaluation.json: is not what .*evaluate.json says"):
        Loop(folder, config).run(1)


def test_two_loops_do_not_share_a_folder(copied):
    folder, config = copied
    with exclusive(folder), pytest.raises(UserError, match="another process is working in it"):
        Loop(folder, config).run(1)


def test_a_full_disk_loses_nothing(copied, monkeypatch):
    folder, config = copied
    wanted = digests(folder)
    (folder / "round-01/decide.json").unlink()
    write = Path.write_bytes

    def full(self, data):
        if "decide.json" in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"decide.json: the disk is full; free some space"):
            Loop(folder, config).run(1)
    assert len(digests(folder)) == 7 and not list((folder / "round-01").glob(".*.tmp"))
    Loop(folder, config).run(1)
    assert digests(folder) == wanted


def test_bad_settings_are_named():
    for match, changes in (
        ("episodes is 0", {"episodes": 0}), ("limit_s is 0", {"limit_s": 0.0}),
        ("seeds of the evaluation", {"first_seed": 5_999_999}),
        ("seeds of the evaluation", {"first_seed": 6_000_000}),
        ("seeds of the evaluation", {"first_seed": 6_000_050}),
        ("starts is -1", {"starts": -1}),
        ("starts: fresh start states need", {"starts": 8, "recorded": True}),
        ("seeds of the evaluation", {"first_seed": 5_900_000, "starts": 2000}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            RoundConfig(**changes)


def test_data_that_does_not_fit_the_truth_is_refused_at_once(tmp_path):
    """Before a simulator or a trainer starts."""
    push = write_pool(tmp_path / "push", "PushCube-v1", 72)
    fits = TrueEnv("PushCube-v1", image_size=32)
    for match, true, changes in (
        ("its episodes are of PushCube-v1, the true environment is PullCube-v1",
         TrueEnv("PullCube-v1", image_size=32), {}),
        ("horizon is 48, but the true environment's is 24",
         TrueEnv("PushCube-v1", horizon=24, image_size=32), {}),
        ("its horizon is 72; give true.horizon 72",
         TrueEnv("PushCube-v1", horizon=96, image_size=32), {}),
        ("its image_size is 32; give true.image_size 32", TrueEnv("PushCube-v1"), {}),
        ("holds start states of the evaluation .seeds 8 to 207", fits, {"evaluation_seed": 8}),
    ):  # fmt: skip
        config = RoundConfig(true=true, data=(push,), **changes)
        with pytest.raises(UserError, match=match):
            Loop(tmp_path / "loop", config).run(1)


# ---------------------------------------------------------------- decisions


def test_worse_is_rolled_back(tmp_path, finished):
    _, config = finished
    paths = []
    for name, successes in (("best", 5), ("worse", 4), ("same", 5)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"success": [i < successes for i in range(10)]}))
    best, worse, same = paths
    assert decide(config, tmp_path, 1, best, worse).facts["accepted"] is False
    assert decide(config, tmp_path, 1, best, same).facts["accepted"] is True


def test_after_a_rollback_the_best_policy_acts(copied, monkeypatch):
    folder, config = copied
    loop = Loop(folder)
    base = [Path(config.policy)]
    mine = [loop.ledger.output(1, "improve", "policy")]
    for accepted, wanted in ((True, mine), (False, base)):
        record = loop.ledger.find(1, "decide")
        facts = {**record.facts, "accepted": accepted}
        changed = dataclasses.replace(record, facts=facts)
        monkeypatch.setattr(loop.ledger, "records", [*loop.ledger.records[:-1], changed])
        assert loop.inputs("best policy", 2) == wanted
        assert loop.inputs("start policy", 2) == base, "as in the paper"
        loop.config = dataclasses.replace(config, start="last")
        assert loop.inputs("start policy", 2) == wanted
        loop.config = config


# ---------------------------------------------------------------- simulators that misbehave


def test_children_that_hang_or_die_are_replaced_and_failing_items_dropped(tmp_path):
    work = partial(triple, str(tmp_path))
    with Children(work, processes=2, limit_s=300) as children:
        assert list(children.map([1, 2])) == [3, 6]  # both have started
        children.limit_s = 10
        out = list(children.map([1, 2, 3]))
        children.limit_s = 300
        out += children.map([4, 5, 6, 7, 8])
    dropped = out.pop(6)
    assert out == [3, 6, 9, 12, 15, 18, 24], "in order, none lost"
    assert isinstance(dropped, Dropped) and "RuntimeError: stuck" in dropped.reason


def test_a_simulator_that_never_works_is_an_error(tmp_path):
    work = partial(triple, str(tmp_path))
    with (
        Children(work, limit_s=300) as children,
        pytest.raises(UserError, match="no simulator here"),
    ):
        list(children.map([1, 99, 2]))
    told = []
    with (
        Children(work, limit_s=300) as children,
        pytest.raises(UserError, match="failed 5 episodes in a row.*never works"),
    ):
        told.extend(children.map(list(range(201, 220))))
    assert told == [], "none counts as dropped: they are tried again when it works"


def test_a_dropped_episode_is_counted_and_not_tried_for_ever(tmp_path, finished):
    home, config = finished
    (tmp_path / "sim").mkdir()
    for name in ("die", "unlucky"):
        (tmp_path / "sim" / name).touch()
    true = TrueEnv("loop_home:PointRecorder", HORIZON, 32, 1, world=str(tmp_path / "sim"))
    here = dataclasses.replace(config, true=true, first_seed=10, episodes=5, limit_s=300.0)
    at = tmp_path / "round-01"
    made = collect(here, at, 1, Path(config.policy))
    assert made.facts["episodes"] == 4 and made.facts["dropped"] == 1
    assert EpisodeDataset(made.outputs["episodes"]).seeds == [10, 11, 12, 14]
    told = json.loads((at / "collect/dropped-episodes.json").read_text())
    assert told == {"13": "RuntimeError: the arm is stuck"}
    assert collect(here, at, 1, Path(config.policy)).facts == made.facts


# ---------------------------------------------------------------- jobs


def test_a_job_that_fails_says_its_own_line(tmp_path):
    log = tmp_path / "jobs/train.log"
    argv = ["train", "world-model", "--data", tmp_path / "none", "--autoencoder", tmp_path,
            "--out", tmp_path / "out"]  # fmt: skip
    with pytest.raises(UserError, match=r"none/meta/info.json is missing.*\(log: .*train.log\)"):
        run_job(argv, log)


def test_a_rank_that_fails_ends_the_job_at_once():
    begun = time.monotonic()
    ranks = [
        subprocess.Popen([sys.executable, "-c", code])
        for code in ("import time; time.sleep(600)", "raise SystemExit(3)")
    ]
    try:
        assert _first_failure(ranks) == 3 and time.monotonic() - begun < 60
    finally:
        ranks[0].kill()
        ranks[0].wait()


def test_a_job_dies_with_its_parent(tmp_path):
    """A loop that is killed leaves no trainer behind that would write into the same folder."""
    code = (
        "import os, subprocess; from worldloop.rl.jobs import dies_with; "
        "job = subprocess.Popen(['sleep', '1000'], preexec_fn=dies_with(os.getpid())); "
        "print(job.pid, flush=True); job.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True,
                               text=True).stdout.strip()  # fmt: skip
        if not state or state.startswith("Z"):
            return
        time.sleep(0.05)
    pytest.fail("the job lives on")


# ---------------------------------------------------------------- without a simulator


@pytest.mark.slow
def test_rounds_of_recorded_episodes_and_outcomes_entered_by_hand(tmp_path, finished):
    home, config = finished
    config = dataclasses.replace(
        config, recorded=True,
        grpo=dataclasses.replace(config.grpo, alarm=dataclasses.replace(
            config.grpo.alarm, limit=1.0, again=2)),
    )  # fmt: skip
    folder = tmp_path / "loop"
    with pytest.raises(Waiting, match=r"round 0 waits for outcomes: play .*outcomes.csv"):
        Loop(folder, config).run(1)
    entered = folder / "round-00/evaluate/outcomes.csv"
    entered.parent.mkdir(parents=True, exist_ok=True)
    entered.write_text("episode,success\n" + "".join(f"{i},{i % 3 == 0:d}\n" for i in range(15)))
    with pytest.raises(Waiting, match=r"round 1 waits for recorded episodes.*data import"):
        Loop(folder, config).run(1)
    rng = np.random.default_rng(5)
    source = write_pool(tmp_path / "recorded")
    dataset = EpisodeDataset(source)
    new = [dataclasses.replace(e, seed=100 + i, actions=rng.uniform(-1, 1, e.actions.shape).astype(
        np.float32)) for i, e in enumerate(dataset.stream())]  # fmt: skip
    EpisodeWriter(folder / "round-01/collect/episodes", dataset.meta).add(new)
    with pytest.raises(Waiting, match="round 1 waits for outcomes"):
        Loop(folder, config).run(1)
    improve = Ledger(folder).find(1, "improve")
    assert len(improve.facts["alarm"]) == 2 and improve.facts["true_frames"] == 0
    better = folder / "round-01/evaluate/outcomes.csv"
    better.write_text("episode,success\n" + "".join(f"{i},{i % 3 != 0:d}\n" for i in range(15)))
    decision = Loop(folder, config).run(1)
    assert decision.facts == {"accepted": True, "best_before": 5 / 15, "success": 10 / 15}
    assert "66.7%" in Loop(folder).status()
