"""A slower run fails, a noisy one does not; unlike runs are refused."""

import copy
import json
from pathlib import Path

import pytest

from worldloop.bench import compare
from worldloop.cli import main
from worldloop.errors import UserError

OLD = {
    "bench": "rollout",
    "preset": "tiny",
    "picture": [128, 128],
    "dtype": "float32",
    "arms": [
        {"arm": "A0", "batch": 1, "p50_s": 5.0, "min_s": 4.9},
        {"arm": "C4", "batch": 1, "p50_s": 0.40, "min_s": 0.39},
        {"arm": "C4", "batch": 8, "out_of_memory": True},
    ],
    "machine": {"gpu": None, "cpu": "x", "threads": 2},
}


def changed(**row):
    new = copy.deepcopy(OLD)
    new["arms"][1] |= row
    return new


def failures(new, tolerance=0.1):
    return compare.compare(OLD, new, tolerance, any_machine=False)[1]


def test_equal_and_faster_runs_pass():
    assert failures(OLD) == []
    assert failures(changed(p50_s=0.1, min_s=0.1)) == []


def test_a_slower_row_fails_beyond_the_tolerance_only():
    slower = changed(p50_s=0.5, min_s=0.48)
    (line,) = failures(slower)
    assert "arm C4, batch 1" in line and "+25.0% time" in line
    assert failures(slower, tolerance=0.3) == []
    # One noisy median whose fastest repeat is as fast as ever is no regression.
    assert failures(changed(p50_s=0.5, min_s=0.39)) == []


def test_a_row_that_is_gone_fails():
    new = copy.deepcopy(OLD)
    new["arms"][1] = {"arm": "C4", "batch": 1, "out_of_memory": True}
    assert "missing now" in failures(new)[0]


def test_unlike_runs_are_refused():
    new = copy.deepcopy(OLD)
    new["machine"]["threads"] = 1
    with pytest.raises(UserError, match="machines differ"):
        compare.compare(OLD, new, 0.1, any_machine=False)
    assert compare.compare(OLD, new, 0.1, any_machine=True)[1] == []
    for name, value in (("picture", [256, 256]), ("backend", "compiled"), ("chunks", 1)):
        with pytest.raises(UserError, match=f"{name} is"):
            compare.compare(OLD, {**OLD, name: value}, 0.1, any_machine=False)
    with pytest.raises(UserError, match="NEW is not a benchmark's result"):
        compare.compare(OLD, {}, 0.1, any_machine=False)


def test_the_committed_results_can_be_compared(capsys):
    results = str(Path(__file__).parents[2] / "bench/results")
    assert main(["bench", "compare", results, results]) == 0
    assert "agreement: no timed rows" in capsys.readouterr().out


def test_policy_and_doubled_rows():
    policy = {"bench": "policy", "ms_per_observation": 14.0, "batch": 16, "machine": {},
              "ms_per_observation_with_image_chain": 18.0}  # fmt: skip
    rows = compare.rows_of(policy)
    assert [row.median for row in rows.values()] == pytest.approx([0.014, 0.018])
    slower = policy | {"ms_per_observation_with_image_chain": 36.0}
    assert len(compare.compare(policy, slower, 0.1, any_machine=False)[1]) == 1
    with pytest.raises(UserError, match="two rows"):
        compare.rows_of({"arms": [OLD["arms"][0]] * 2})


def test_exit_codes(tmp_path, capsys):
    before, after = tmp_path / "before", tmp_path / "after"
    for folder, document in ((before, OLD), (after, changed(p50_s=0.8, min_s=0.8))):
        folder.mkdir()
        (folder / "rollout-tiny-cpu.json").write_text(json.dumps(document))
    assert main(["bench", "compare", str(before), str(before)]) == 0
    assert main(["bench", "compare", str(before), str(after)]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert main(["bench", "compare", str(before), str(after), "--tolerance", "1.5"]) == 0
    (after / "rollout-tiny-cpu.json").unlink()
    assert main(["bench", "compare", str(before), str(after)]) == 2
    assert "no such file" in capsys.readouterr().err
