"""Checkpoints, configs and training state: strict, atomic, resumable, clear when they fail."""

import errno
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from worldloop import checkpoint as ck
from worldloop import hub
from worldloop.config import read_json
from worldloop.errors import UserError


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 4, generator=g), "half": torch.ones(2, dtype=torch.bfloat16)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------- files


def test_atomic_write_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    ck.atomic_write_text(path, "one é")
    ck.atomic_write_text(path, "two")
    assert path.read_text() == "two" and names(path.parent) == {"a.txt"}
    known = "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"
    assert ck.file_sha256(path) == known


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "not writable"), (errno.EIO, "Errno 5")],
)
def test_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def fail(path: Any) -> None:
        raise OSError(code, os.strerror(code))

    path = tmp_path / "a.txt"
    ck.atomic_write_text(path, "old")
    monkeypatch.setattr("worldloop.files.fsync_path", fail)
    with pytest.raises((UserError, OSError), match=words):
        ck.atomic_write_text(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == {"a.txt"}


def test_full_disk_in_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def fail(*args: Any, **kwargs: Any) -> None:
        raise safetensors.SafetensorError("IoError(Os { code: 28, kind: StorageFull })")

    ck.save_checkpoint(tmp_path / "c", tensors(), {"a": 1}, kind="test")
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(UserError, match=r"c/model-new\.safetensors: the disk is full"):
        ck.save_checkpoint(tmp_path / "c", tensors(1), {"a": 2}, kind="test")
    assert ck.load_checkpoint(tmp_path / "c").config == {"a": 1}
    with pytest.raises(UserError, match="disk is full"):
        ck.save_training_state(tmp_path / "s", tensors(), {"step": 1})
    assert ck.load_training_state(tmp_path / "s") is None


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        ck.save_checkpoint(tmp_path / "file", tensors(), {}, kind="test")


# ---------------------------------------------------------------- tensors


def test_tensors_round_trip(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    odd = {"tied": base, "tied2": base, "view": base[2:4], "t": base.reshape(3, 4).T,
           "scalar": torch.tensor(3), "empty": torch.zeros(0, 2), **tensors()}  # fmt: skip
    ck.save_tensors(tmp_path / "a.safetensors", odd)
    back = ck.load_tensors(tmp_path / "a.safetensors")
    assert back.keys() == odd.keys()
    for name, tensor in odd.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def cut(data: bytes) -> bytes:
    return data[:-5]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "truncated: needs"),
        (lambda d: d[:20], "truncated: the header alone"),
        (lambda d: d[:4], "not a safetensors file"),
        (lambda d: b"", "empty file"),
        (lambda d: d + b"x", "foreign bytes"),
        (lambda d: b"PK\x03\x04" + d, "not a safetensors file; .pt and .pth"),
        (lambda d: struct.pack("<Q", 2**60) + d[8:], "not a safetensors file"),
        (lambda d: d[:9] + b"}" + d[10:], "unreadable header"),
        (lambda d: struct.pack("<Q", 2) + b"[]", "not a safetensors file"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[bytes], bytes], words: str) -> None:
    path = tmp_path / "a.safetensors"
    ck.save_tensors(path, tensors())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=words) as error:
        ck.load_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file"):
        ck.load_tensors(tmp_path / "gone.safetensors")


def test_load_into_is_strict() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    good = {k: torch.full_like(v, 2.0) for k, v in model.state_dict().items()}
    ck.load_into(model, good, "a.safetensors")
    assert all(bool((p == 2).all()) for p in model.parameters())
    bad = dict(good, extra=torch.zeros(1))
    del bad["0.bias"]
    bad["0.weight"] = torch.zeros(4, 3)
    bad["1.weight"] = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(UserError) as error:
        ck.load_into(model, bad, "a.safetensors")
    text = str(error.value)
    for words in ("a.safetensors: does not fit Sequential", "1 missing: 0.bias",
                  "1 unexpected: extra", "0.weight (file [4, 3], model [3, 4])",
                  "1.weight (file torch.int64", "config.json"):  # fmt: skip
        assert words in text
    assert "\n" not in text
    assert all(bool((p == 2).all()) for p in model.parameters()), "nothing may be half-loaded"


def test_load_into_lists_only_the_first() -> None:
    with pytest.raises(UserError, match=r"9 unexpected: k0, k1, k2 and 6 more\."):
        ck.load_into(nn.Module(), {f"k{i}": torch.zeros(1) for i in range(9)}, "f")


def test_load_into_meta_module_and_dtypes() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    given = {k: torch.ones(v.shape, dtype=torch.bfloat16) for k, v in model.state_dict().items()}
    ck.load_into(model, given, "f")
    assert model.weight.dtype is torch.bfloat16 and not model.weight.is_meta
    model = nn.Linear(2, 2)
    ck.load_into(model, given, "f")
    assert model.weight.dtype is torch.float32


# ---------------------------------------------------------------- checkpoint folders


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    ck.save_checkpoint(tmp_path / "c", {"dit": tensors(1), "reward": tensors(2)},
                       {"width": 8, "name": "é"}, kind="world_model")  # fmt: skip
    assert names(tmp_path / "c") == {"config.json", "dit.safetensors", "reward.safetensors"}
    document = read_json(tmp_path / "c" / "config.json")
    assert document["format"] == 1 and document["kind"] == "world_model"
    assert document["worldloop_version"]
    got = ck.load_checkpoint(tmp_path / "c", kind="world_model")
    assert got.config == {"width": 8, "name": "é"}
    assert torch.equal(got.parts["reward"]["w"], tensors(2)["w"])


def test_saving_over_a_checkpoint_leaves_no_litter(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    for step in range(4):
        ck.save_checkpoint(folder, tensors(step), {"step": step}, kind="test")
        got = ck.load_checkpoint(folder)
        assert got.config == {"step": step}
        assert torch.equal(got.parts["model"]["w"], tensors(step)["w"])
        assert len(names(folder)) == 3 and "README.md" in names(folder)


def test_checkpoint_errors(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        ck.load_checkpoint(folder)
    ck.save_checkpoint(folder, tensors(), {}, kind="policy")
    with pytest.raises(UserError, match="kind is 'policy', expected 'world_model'"):
        ck.load_checkpoint(folder, kind="world_model")
    document = read_json(folder / "config.json")
    for key, value, words in [
        ("format", 99, "format 99, this version reads 1"),
        ("files", {"model": "../../secret.safetensors"}, "not a plain file name"),
        ("files", {"model": "gone.safetensors"}, r"gone\.safetensors: no such file"),
        ("config", [1], "must be objects"),
    ]:
        (folder / "config.json").write_text(json.dumps({**document, key: value}))
        with pytest.raises(UserError, match=words):
            ck.load_checkpoint(folder)
    (folder / "config.json").write_text('{"format": 1,')
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        ck.load_checkpoint(folder)
    with pytest.raises(ValueError, match="nothing to save"):
        ck.save_checkpoint(folder, {}, {}, kind="test")
    with pytest.raises(ValueError, match="part '../x'"):
        ck.save_checkpoint(folder, {"../x": tensors()}, {}, kind="test")


SAVER = """
import sys, torch
from worldloop import checkpoint as ck
folder, step = sys.argv[1], 0
while True:
    step += 1
    value = {"w": torch.full((100_000,), float(step))}
    ck.save_checkpoint(folder + "/c", value, {"step": step}, kind="test")
    ck.save_training_state(folder + "/s", value, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011, 0.017])
def test_killed_while_saving(tmp_path: Path, delay: float) -> None:
    """SIGKILL at any moment leaves the last or the one before it, whole."""
    command = [sys.executable, "-c", SAVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    got = ck.load_checkpoint(tmp_path / "c")
    assert got.config["step"] >= 3
    assert bool((got.parts["model"]["w"] == got.config["step"]).all())
    state = ck.load_training_state(tmp_path / "s")
    assert state is not None and state[1]["step"] >= 3
    assert bool((state[0]["w"] == state[1]["step"]).all())
    # And the next process goes on from there, clearing what the killed one left.
    ck.save_checkpoint(tmp_path / "c", tensors(), {"step": -1}, kind="test")
    ck.save_training_state(tmp_path / "s", tensors(), {"step": -1})
    assert len(names(tmp_path / "c")) == 2
    again = ck.load_training_state(tmp_path / "s")
    assert again is not None and again[1]["step"] == -1


# ---------------------------------------------------------------- training state


def test_training_state_resumes_the_same_curve(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = (model(torch.randn(8, 4)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, optimizer = fresh()
    whole = steps(model, optimizer, 8)
    model, optimizer = fresh()
    first = steps(model, optimizer, 4)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "rng": torch.get_rng_state()}  # fmt: skip
    ck.save_training_state(tmp_path, state, {"step": 4})
    model, optimizer = fresh()
    torch.manual_seed(99)
    loaded = ck.load_training_state(tmp_path)
    assert loaded is not None
    back, meta = loaded
    assert meta == {"step": 4}
    model.load_state_dict(back["model"])
    optimizer.load_state_dict(back["optimizer"])
    torch.set_rng_state(back["rng"])
    assert first + steps(model, optimizer, 4) == whole


def test_training_state_keeps_two_and_falls_back(tmp_path: Path) -> None:
    assert ck.load_training_state(tmp_path / "none") is None
    for step in (10, 20, 5):  # the last one saved counts, whatever its step
        ck.save_training_state(tmp_path, {"a": torch.tensor(step)}, {"step": step})
    assert names(tmp_path) == {"state-000001", "state-000002"}
    newest = tmp_path / "state-000002" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    loaded = ck.load_training_state(tmp_path)
    assert loaded is not None and loaded[1] == {"step": 20}
    (tmp_path / "state-000001" / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="truncated"):
        ck.load_training_state(tmp_path)


def test_training_state_nested_values(tmp_path: Path) -> None:
    state = {"a": (1, [2.5, None, "x"], {"b": torch.ones(2)}), "n": {0: {"s": torch.tensor(1.0)}},
             "$tensor": True, "big": 2**100, "e": {}}  # fmt: skip
    ck.save_training_state(tmp_path, state, {})
    loaded = ck.load_training_state(tmp_path)
    assert loaded is not None
    back = loaded[0]
    assert isinstance(back["a"], tuple) and back["a"][:2] == (1, [2.5, None, "x"])
    assert torch.equal(back["a"][2]["b"], torch.ones(2)) and list(back["n"]) == [0]
    assert back["$tensor"] is True and back["big"] == 2**100 and back["e"] == {}
    with pytest.raises(TypeError, match="training state: f: function cannot be saved"):
        ck.save_training_state(tmp_path, {"f": cut}, {})


# ---------------------------------------------------------------- configs


@dataclass(frozen=True)
class Inner:
    """A nested config."""

    width: int = 4
    scales: tuple[float, float] = (1.0, 2.0)


@dataclass(frozen=True)
class Config:
    """One field of every kind."""

    name: str
    inner: Inner = Inner()
    layers: tuple[Inner, ...] = ()
    mode: Literal["fast", "exact"] = "fast"
    limit: int | None = None
    rate: float = 0.1
    folder: Path = Path(".")
    on: bool = False
    tags: list[str] = field(default_factory=list)
    table: dict[str, Inner] = field(default_factory=dict)
    maybe: Inner | None = None

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate: {self.rate} is negative; choose 0 or more")


def test_config_round_trip() -> None:
    config = Config("a", Inner(2, (0.5, math.inf)), (Inner(1), Inner(2)), "exact", 3, 1.0,
                    Path("x/y"), True, ["p"], {"k": Inner(9)}, Inner(7))  # fmt: skip
    plain = json.loads(json.dumps(ck.config_to_dict(config)))
    assert ck.config_from_dict(Config, plain) == config
    assert ck.config_from_dict(Config, {"name": "a", "rate": 2}) == Config("a", rate=2.0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "a", "nmae": 1}, "config.nmae: unknown key of Config; known: name, inner"),
        ({}, "config.name: missing key of Config"),
        ({"name": 3}, "config.name: expected str, got 3"),
        ({"name": "a", "inner": {"depth": 1}}, "config.inner.depth: unknown key of Inner"),
        ({"name": "a", "inner": 5}, "config.inner: expected an object, got 5"),
        ({"name": "a", "layers": [{}, {"width": "w"}]}, "config.layers[1].width: expected int"),
        ({"name": "a", "inner": {"scales": [1]}}, "config.inner.scales: expected 2 values, got 1"),
        ({"name": "a", "mode": "slow"}, "config.mode: 'slow' is not one of 'fast', 'exact'"),
        ({"name": "a", "limit": 1.5}, "config.limit: expected int or NoneType, got 1.5"),
        ({"name": "a", "limit": True}, "config.limit: expected int or NoneType, got True"),
        ({"name": "a", "rate": "x"}, "config.rate: expected float, got 'x'"),
        ({"name": "a", "rate": -1}, "config: rate: -1.0 is negative"),
        ({"name": "a", "maybe": {"depth": 1}}, "config.maybe.depth: unknown key"),
        ({"name": "a", "table": {"k": {"w": 1}}}, "config.table.k.w: unknown key"),
    ],
)
def test_config_errors(data: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        ck.config_from_dict(Config, data)
    assert words in str(error.value)


def test_config_to_dict_refuses_the_rest() -> None:
    with pytest.raises(TypeError, match="expected a dataclass instance"):
        ck.config_to_dict({"a": 1})
    with pytest.raises(TypeError, match="name: Tensor cannot be written"):
        ck.config_to_dict(Config(torch.zeros(1)))  # type: ignore[arg-type]


# ---------------------------------------------------------------- where a name leads


def test_resolve_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ck.save_checkpoint(tmp_path / "weights" / "tiny", tensors(), {}, kind="test")
    monkeypatch.setattr(hub, "WEIGHTS", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    assert hub.shipped_presets() == ["tiny"]
    assert ck.resolve_pretrained("tiny") == tmp_path / "weights" / "tiny"
    assert ck.resolve_pretrained(tmp_path / "weights/tiny") == tmp_path / "weights/tiny"
    with pytest.raises(UserError, match=r"'tyni': no such checkpoint folder, .*\(tiny\)"):
        ck.resolve_pretrained("tyni")
    with pytest.raises(UserError, match=r"no config\.json in this folder"):
        ck.resolve_pretrained("weights")


def test_hub_offline_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        def snapshot_download(self, *args: Any, **kwargs: Any) -> str:
            raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Offline())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"org/wm: .*not available from the hub \(no route\)"):
        ck.resolve_pretrained("org/wm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'worldloop\[hub\]'"):
        ck.resolve_pretrained("org/wm")


def test_hub_download_and_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def snapshot_download(self, repo_id: str, **options: Any) -> str:
            calls.append((repo_id, options))
            return str(tmp_path)

        def HfApi(self) -> "Hub":
            return self

        def create_repo(self, repo_id: str, **options: Any) -> str:
            return f"hub/{repo_id}"

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub())  # type: ignore[arg-type]
    assert ck.resolve_pretrained("org/wm") == tmp_path
    assert calls.pop()[1]["allow_patterns"] == ["*.safetensors", "*.json"]
    folder = ck.save_checkpoint(tmp_path / "c", tensors(), {}, kind="test")
    assert ck.push_to_hub(folder, "org/wm") == "hub/org/wm"
    assert calls.pop()[1]["allow_patterns"] == ["*.safetensors", "*.json", "README.md"]
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        ck.push_to_hub(tmp_path / "empty", "org/wm")
