"""The command line: verbs, help, one-line errors, exit codes; and the lazy tables."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import worldloop
from worldloop import cli
from worldloop.errors import UserError
from worldloop.registry import Table, load, resolve

ROOT = Path(__file__).parents[1]


def failing(message: str, kind: type[Exception] = UserError) -> str:
    """A verb table entry that raises; returns the registry target."""

    def main(argv: list[str]) -> int:
        raise kind(message)

    setattr(cli, "_failing", main)  # noqa: B010
    return "worldloop.cli:_failing"


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb, (_, line) in cli.VERBS.items():
        assert verb in out and line in out


def test_no_arguments_shows_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage:" in capsys.readouterr().out


def test_help_is_fast_and_light() -> None:
    code = (
        "import sys; from worldloop.cli import main; main(['--help']); "
        "heavy = {'torch', 'numpy', 'tyro', 'av'} & set(sys.modules); sys.exit(len(heavy))"
    )
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0, result.stderr
    assert min(seconds) < 0.5


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    out = capsys.readouterr().out
    assert f"worldloop {worldloop.__version__}" in out and "torch " in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["dance"], ["unknown verb 'dance'", "collect", "train world-model"]),
        (["train"], ["one more word", "train autoencoder", "train world-model"]),
        (["train", "house"], ["one more word", "train autoencoder"]),
        (["version", "now"], ["unexpected argument 'now'"]),
    ],
)
def test_wrong_verbs(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("worldloop: error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize("kind", [UserError, ValueError, FileNotFoundError, OSError])
def test_bad_input_is_one_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLDLOOP_TRACEBACK", raising=False)
    monkeypatch.setitem(cli.VERBS, "break", (failing("steps: must be positive", kind), ""))
    assert cli.main(["break"]) == 2
    assert capsys.readouterr().err == "worldloop: error: steps: must be positive\n"


def test_traceback_on_request_and_for_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.VERBS, "break", (failing("steps: wrong"), ""))
    monkeypatch.setenv("WORLDLOOP_TRACEBACK", "1")
    with pytest.raises(UserError):
        cli.main(["break"])
    monkeypatch.delenv("WORLDLOOP_TRACEBACK")
    monkeypatch.setitem(cli.VERBS, "break", (failing("a bug", KeyError), ""))
    with pytest.raises(KeyError):
        cli.main(["break"])


def test_missing_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("WORLDLOOP_TRACEBACK", raising=False)
    (tmp_path / "needs_sim.py").write_text("import mani_skill.envs\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "mani_skill", None)
    monkeypatch.setitem(cli.VERBS, "sim", ("needs_sim:main", ""))
    assert cli.main(["sim"]) == 2
    assert "pip install 'worldloop[sim]'" in capsys.readouterr().err


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.VERBS, "break", (failing("", KeyboardInterrupt), ""))  # type: ignore[arg-type]
    assert cli.main(["break"]) == 130


def test_closed_pipe_is_quiet() -> None:
    script = "import sys; from worldloop.cli import main; sys.exit(main(['version']))"
    command = f'"{sys.executable}" -c "{script}" | true'
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.stderr == ""


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_its_function(verb: str) -> None:
    module, function = cli.VERBS[verb][0].split(":")
    path = Path(*module.split(".")[1:]).with_suffix(".py")
    file = next((f for f in (ROOT / path, ROOT / "worldloop" / path) if f.is_file()), None)
    assert file is not None, f"{module} does not exist"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in names, f"{file} has no {function}()"


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        sys.exit(cli.main([*words, "--help"]))
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "version"])
def test_every_verb_and_each_of_its_presets_can_be_asked(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = verb.split()
    usage = help_of(words, capsys).split("\n\n")[0]
    presets = re.search(r"\{(\w+(?:,\w+)*)\}$", usage)
    for preset in presets[1].split(",") if presets else ():
        assert "--" in help_of([*words, preset], capsys)


@dataclasses.dataclass(frozen=True)
class Small:
    """A config for the parser."""

    steps: int = 3
    name: str = "a"


def test_parse_config(tmp_path: Path) -> None:
    assert cli.parse_config(Small, ["--steps", "5"], "t") == Small(steps=5)
    presets = {"one": ("first", Small()), "two": ("second", Small(name="b"))}
    whole = tmp_path / "config.json"
    whole.write_text('{"steps": 9, "name": "c"}')
    for argv in (["--config", str(whole)], [f"--config={whole}"]):
        assert cli.parse_config(Small, argv, "t") == Small(9, "c")
        assert cli.parse_config(presets, argv, "t") == Small(9, "c")
    assert cli.parse_config(presets, ["two", "--steps", "7"], "t") == Small(7, "b")
    for argv in (["three"], ["one", "--stepz", "1"], ["one", "--steps", "x"]):
        with pytest.raises(SystemExit) as stop:
            cli.parse_config(presets, argv, "t")
        assert stop.value.code == 2


def test_facade() -> None:
    assert set(worldloop.__all__) <= set(dir(worldloop))
    with pytest.raises(AttributeError, match="no attribute 'Rollouts'"):
        worldloop.Rollouts  # type: ignore[attr-defined]  # noqa: B018


def test_facade_names_exist() -> None:
    for name in worldloop.__all__:
        assert getattr(worldloop, name).__name__ == name


def test_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("backend", {"eager": "pathlib:Path", "gone": "worldloop.nowhere:X"})
    assert resolve(table, "eager") is Path
    assert resolve(table, "os.path:join") is os.path.join
    assert load("pathlib:Path.cwd")() == Path.cwd()
    with pytest.raises(UserError, match="unknown backend 'fast'; known: eager, gone"):
        resolve(table, "fast")
    with pytest.raises(UserError, match=r"no module named 'worldloop\.nowhere'"):
        resolve(table, "gone")
    with pytest.raises(UserError, match="module pathlib has no 'Pth'"):
        resolve(table, "pathlib:Pth")
    with pytest.raises(UserError, match="is not of the form"):
        load("pathlib:")
    # A missing dependency of a module that exists is not "no such module".
    (tmp_path / "plugin.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        load("plugin:X")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_verbs_keep_freed_memory_unless_the_user_chose() -> None:
    # 6 blocks of 16 MiB, freed and taken again: new pages mean page faults, 4 KiB each.
    code = (
        "import resource, ctypes; from worldloop import cli; cli.main(['version'])\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p\n"
        "libc.free.argtypes = [ctypes.c_void_p]; size = 16 << 20\n"
        "def touch():\n"
        "    blocks = [libc.malloc(ctypes.c_size_t(size)) for _ in range(6)]\n"
        "    for block in blocks: ctypes.memset(block, 1, size)\n"
        "    for block in blocks: libc.free(block)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "first = touch(); print('faults', touch() - first)"
    )

    def faults(**environment: str) -> int:
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        return int(result.stdout.split("faults")[1])

    assert faults() < 100
    assert faults(MALLOC_ARENA_MAX="2") > 10_000
