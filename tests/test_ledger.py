"""The ledger's hashes and records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from worldloop.checkpoint import save_checkpoint
from worldloop.errors import UserError
from worldloop.ledger import Ledger, checkpoint_sha256, code_sha256, path_sha256, text_sha256
from worldloop.outcome import save_actions_only


def test_a_checkpoint_is_its_content_whatever_its_files_are_called(tmp_path: Path) -> None:
    state = {"dit": {"w": torch.ones(3)}, "reward": {"w": torch.zeros(2)}}
    once = save_checkpoint(tmp_path / "a", state, {"width": 3}, kind="test")
    before = checkpoint_sha256(once)
    save_checkpoint(tmp_path / "a", state, {"width": 3}, kind="test")  # other names
    assert json.loads((once / "config.json").read_text())["files"]["dit"] == "dit-new.safetensors"
    assert checkpoint_sha256(once) == before
    save_checkpoint(tmp_path / "a", {**state, "dit": {"w": torch.ones(3) * 2}}, {"width": 3},
                    kind="test")  # fmt: skip
    assert checkpoint_sha256(once) != before
    save_checkpoint(tmp_path / "b", state, {"width": 4}, kind="test")
    assert checkpoint_sha256(tmp_path / "b") != before


def test_a_policy_is_all_its_files(tmp_path: Path) -> None:
    """Published layout: config.json names no parts, the weights lie in shards."""
    (tmp_path / "config.json").write_text("{}")
    shard = tmp_path / "model-00001-of-00001.safetensors"
    shard.write_bytes(b"one")
    before = path_sha256(tmp_path)
    shard.write_bytes(b"two")
    assert path_sha256(tmp_path) != before
    (tmp_path / ".lock").touch()
    shard.write_bytes(b"one")
    assert path_sha256(tmp_path) == before


def test_reading_a_datasets_card_does_not_change_it(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text("{}")
    before = path_sha256(tmp_path)
    save_actions_only(tmp_path, {"accuracy": 0.5})
    assert path_sha256(tmp_path) == before


def test_records_are_chained_sealed_and_movable(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "loop")
    made = ledger.round_folder(1) / "work/a.json"
    made.parent.mkdir(parents=True)
    made.write_text("[1]")
    for stage, seconds in (("collect", 1.0), ("label", 2.0)):
        ledger.add(1, stage, inputs={"config": "x"}, outputs={"a": made}, facts={"n": 1},
                   made={"seconds": seconds})  # fmt: skip
    (tmp_path / "loop").rename(tmp_path / "moved")
    again = Ledger(tmp_path / "moved")
    assert [r.digest for r in again.records] == [r.digest for r in ledger.records]
    assert again.records[1].previous == again.records[0].digest
    assert again.output(1, "label", "a") == tmp_path / "moved/round-01/work/a.json"
    (tmp_path / "moved/round-01/work/a.json").write_text("[2]")
    with pytest.raises(UserError, match=r"a.json: is not what .*label.json says"):
        again.output(1, "label", "a")
    path = again.path(1, "label")
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "made": {"seconds": 0.0}}))
    with pytest.raises(UserError, match="label.json: was changed after it was written"):
        Ledger(tmp_path / "moved")
    # One that was made to fit its own hashes, but not the record before it.
    content = {k: values[k] for k in values if k not in ("digest", "made", "seal")}
    content["previous"] = "0" * 64
    digest = text_sha256(content)
    forged = {**content, "digest": digest, "made": {}, "seal": text_sha256([digest, {}])}
    path.write_text(json.dumps(forged))
    with pytest.raises(UserError, match="does not follow from the record before it"):
        Ledger(tmp_path / "moved")
    path.write_text(json.dumps({**values, "colour": 1}))
    with pytest.raises(UserError, match="colour: unknown key"):
        Ledger(tmp_path / "moved")


def test_the_code_has_a_hash() -> None:
    assert len(code_sha256()) == 64
