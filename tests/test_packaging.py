"""The wheel, made from the sdist as a user's pip would: installed, imported, run elsewhere."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import worldloop

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "engine", "rl", "training", "bench")
SOURCES = [
    "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CMakeLists.txt",
    "constraints.txt", "Makefile", "worldloop", *ROOMS,
]  # fmt: skip


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without network and without this process's Python settings."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{words}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tree -> sdist -> wheel, all in a temporary folder."""
    work = tmp_path_factory.mktemp("package")
    tree, dist = work / "tree", work / "dist"
    tree.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignore)
        else:
            shutil.copy(source, tree / name)
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(dist)!r}))"
    name = run(sys.executable, "-c", code, cwd=tree).splitlines()[-1]
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, "-q", "-w", dist, dist / name, cwd=work)
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel; other libraries are borrowed."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    interpreter = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "install", "-q"]
    run(*pip, "--no-deps", "--no-index", wheel, cwd=venv)
    # A path in a .pth file brings the libraries, not the editable install's import hook.
    own = site_packages(interpreter)
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def site_packages(interpreter: Path) -> Path:
    (folder,) = interpreter.parents[1].glob("lib/python3*/site-packages")
    return folder


def test_site_packages_gets_one_name(python: Path) -> None:
    names = {p.name for p in site_packages(python).iterdir()} - {"borrowed.pth"}
    assert names == {"worldloop", f"worldloop-{worldloop.__version__}.dist-info"}


def test_imports_from_another_folder(python: Path, tmp_path: Path) -> None:
    code = (
        "import json, worldloop, worldloop.engine, worldloop.kernels, worldloop.rl.envs, "
        "worldloop.training, worldloop.bench\n"
        "print(json.dumps([worldloop.__file__, worldloop.engine.__file__]))"
    )
    for file in json.loads(run(python, "-c", code, cwd=tmp_path)):
        assert Path(file).is_relative_to(site_packages(python))


@pytest.mark.parametrize("room", ROOMS)
def test_no_generic_names(python: Path, tmp_path: Path, room: str) -> None:
    code = f"import importlib.util as u; print(u.find_spec({room!r}))"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "None"


def test_every_source_file_is_in_the_wheel(python: Path) -> None:
    package = site_packages(python) / "worldloop"
    for room in ("worldloop", *ROOMS):
        inside = package if room == "worldloop" else package / room
        for path in (ROOT / room).rglob("*.py"):
            assert (inside / path.relative_to(ROOT / room)).is_file(), path
    assert (package / "py.typed").is_file()


def test_shipped_weights_are_in_the_wheel(python: Path, tmp_path: Path) -> None:
    weights = ROOT / "worldloop" / "weights"
    shipped = [p for p in weights.rglob("*") if p.suffix in (".safetensors", ".json")]
    for path in shipped:
        installed = site_packages(python) / "worldloop" / path.relative_to(ROOT / "worldloop")
        assert installed.stat().st_size == path.stat().st_size, path
    code = "from worldloop.hub import shipped_presets; print(shipped_presets())"
    presets = sorted(str(p.parent.relative_to(weights)) for p in weights.rglob("config.json"))
    assert run(python, "-c", code, cwd=tmp_path).strip() == str(presets)


def test_console_script(python: Path, tmp_path: Path) -> None:
    out = run(python.with_name("worldloop"), "version", cwd=tmp_path)
    assert out.startswith(f"worldloop {worldloop.__version__}\n")
    assert "usage: worldloop VERB" in run(python, "-m", "worldloop", "--help", cwd=tmp_path)


def test_metadata(python: Path) -> None:
    (info,) = site_packages(python).glob("worldloop-*.dist-info")
    text = (info / "METADATA").read_text(encoding="utf-8")
    for line in ("Requires-Python: >=3.11", "License-Expression: Apache-2.0",
                 "Provides-Extra: sim", "Provides-Extra: libero", "Provides-Extra: serve",
                 "Provides-Extra: gpu", "Provides-Extra: dev"):  # fmt: skip
        assert line in text


def test_constraints_agree_with_setup() -> None:
    """Every pin is within setup.py's range (pip would refuse the set-up otherwise)."""
    requirements = importlib.import_module("packaging.requirements")
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in text.splitlines() if "==" in line)
    for line in importlib.metadata.requires("worldloop") or []:
        need = requirements.Requirement(line)
        if need.name in pins:
            assert pins[need.name] in need.specifier, f"{need} excludes {pins[need.name]}"
