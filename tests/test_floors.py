"""The floors of the house, read from the imports.

    worldloop <- kernels <- engine <- {rl | training} <- bench

Only the lazy facade and the verb table may name a higher floor, and only as strings.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("worldloop", "kernels", "engine", "rl", "training", "bench")
BELOW = {
    "worldloop": {"worldloop"},
    "kernels": {"worldloop", "kernels"},
    "engine": {"worldloop", "kernels", "engine"},
    "rl": {"worldloop", "kernels", "engine", "rl"},
    "training": {"worldloop", "kernels", "engine", "training"},
    "bench": set(ROOMS),
}
# Heavy or optional libraries, and the one file that may import each.
ONLY_IN = {
    "vllm": {"engine/policy/vllm_plugin.py", "engine/attention.py"},  # it carries FlashAttention
    "flash_attn": {"engine/attention.py"},
    "flash_attn_interface": {"engine/attention.py"},
    "xformers": {"engine/attention.py"},
    "tensorrt": {"engine/backends/tensorrt.py"},
    "torch_tensorrt": set[str](),
    "onnx": set[str](),
    "onnxruntime": set[str](),
    "mani_skill": {"rl/envs/maniskill.py"},
    "sapien": {"rl/envs/maniskill.py"},
    "libero": {"rl/envs/libero.py"},
    "robosuite": {"rl/envs/libero.py"},
    "ray": {"rl/cluster.py"},
    "lpips": {"worldloop/metrics.py"},
    "wandb": {"worldloop/track.py"},
    "huggingface_hub": {"worldloop/hub.py"},
    "diffusers": {"bench/published.py"},
    "transformers": {"engine/policy/vllm_plugin.py"},  # vLLM's model configurations are its own
    "torchvision": set[str](),
    "timm": set[str](),
}
NAMES_UPWARD = {"worldloop/__init__.py", "worldloop/cli.py"}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def facade() -> dict[str, str]:
    import worldloop

    return worldloop._FACADE


def room_of(module: str) -> str:
    """The room of an import name: worldloop.engine.dit -> engine, worldloop.types -> worldloop."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "worldloop"


def type_checking_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                lines.update(range(child.lineno, (child.end_lineno or child.lineno) + 1))
    return lines


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, full name) of every import, inside functions too; relative ones start with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def wrong_imports(name: str, source: str) -> list[str]:
    """Every import of one file that its floor does not allow."""
    room = name.split("/")[0]
    tree = ast.parse(source)
    typing_only = type_checking_lines(tree) if name in NAMES_UPWARD else set()
    wrong = []
    for line, target in imports(tree):
        where = f"{name}:{line}: "
        top = target.split(".")[0]
        if line in typing_only:
            continue
        if target.startswith("."):
            wrong.append(f"{where}relative import {target}; write worldloop.{room}...")
        elif top in ROOMS and top != "worldloop":
            wrong.append(f"{where}{target}; write worldloop.{target}")
        elif top == "worldloop":
            last = target.removeprefix("worldloop.")
            goal = room_of(facade()[last].split(":")[0]) if last in facade() else room_of(target)
            if goal not in BELOW[room]:
                wrong.append(f"{where}{room} must not import {target} ({goal} is above or beside)")
        elif top in ONLY_IN and name not in ONLY_IN[top]:
            allowed = ", ".join(sorted(ONLY_IN[top])) or "tests only"
            wrong.append(f"{where}{top} may be imported in: {allowed}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if not re.fullmatch(r"worldloop(\.\w+)+(:\w+)?", node.value):
                continue
            goal = room_of(node.value.split(":")[0])
            if goal not in BELOW[room] and name not in NAMES_UPWARD:
                wrong.append(f"{name}:{node.lineno}: {room} must not name {node.value!r}")
        elif isinstance(node, ast.Call):
            wrong += [f"{name}:{node.lineno}: {problem}" for problem in unsafe_call(node, name)]
    return wrong


def unsafe_call(node: ast.Call, name: str) -> list[str]:
    """Pickle in any dress: a file that we read must not be able to run code."""
    called = ast.unparse(node.func)
    options = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if called.startswith("pickle."):
        return [f"{called}: no pickle; use safetensors and JSON"]
    if called == "torch.load" and options.get("weights_only") != "True":
        return ["torch.load needs weights_only=True"]
    if called == "torch.save" and not name.startswith("engine/formats/"):  # foreign files only
        return ["torch.save writes a pickle; use worldloop.checkpoint"]
    return []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_floor(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    assert wrong_imports(name, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("engine/x.py", "from worldloop.rl import grpo"),
        ("engine/x.py", "import worldloop.training.data"),
        ("rl/x.py", "def f():\n    from worldloop.training.data import main"),
        ("training/x.py", "from worldloop.rl.collect import main"),
        ("kernels/x.py", "from worldloop import RolloutEngine"),
        ("kernels/x.py", "TABLE = {'a': 'worldloop.engine.dit:DiT'}"),
        ("worldloop/x.py", "import worldloop.engine.dit"),
        ("engine/x.py", "from .dit import DiT"),
        ("engine/x.py", "from engine.dit import DiT"),
        ("engine/x.py", "import vllm"),
        ("rl/x.py", "import mani_skill.envs"),
        ("rl/x.py", "import pickle\npickle.loads(b'')"),
        ("engine/x.py", "import torch\ntorch.load('a.pt')"),
        ("engine/x.py", "import torch\ntorch.load('a.pt', weights_only=False)"),
        ("training/x.py", "import torch\ntorch.save({}, 'a.pt')"),
    ],
)
def test_the_check_itself_bites(name: str, source: str) -> None:
    assert len(wrong_imports(name, source)) == 1


def test_packages_are_whole() -> None:
    """A folder with modules and no __init__.py would be left out of the wheel."""
    folders = {path.parent for path in FILES}
    missing = [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file()]
    assert missing == [], "add an __init__.py"


@pytest.mark.parametrize("room", [room for room in ROOMS[1:] if room != "kernels"])
def test_rooms_are_not_importable_by_bare_name(room: str) -> None:
    """From the repository root `import engine` would load a second copy; it says what to do."""
    code = f"import {room}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert f"`worldloop.{room}`" in result.stderr


def test_bare_kernels_is_an_empty_shell() -> None:
    """transformers probes for a package of that name: it must find nothing usable, and go on."""
    code = "import kernels; assert kernels.__version__ == '0' and kernels.__path__ == []"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    code = "import transformers.modeling_utils"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_typing_mirror_is_complete() -> None:
    mirror = ROOT / ".typing" / "worldloop"
    wanted = {p.name for p in (ROOT / "worldloop").glob("*.py")} | set(ROOMS[1:]) | {"py.typed"}
    assert {p.name for p in mirror.iterdir()} == wanted, "run `make typing`"
    assert all(p.exists() for p in mirror.iterdir()), "run `make typing`"


def test_import_is_light() -> None:
    """`import worldloop` takes under a second and brings in neither torch nor numpy."""
    code = (
        "import sys, time; start = time.perf_counter(); import worldloop; "
        "heavy = {'torch', 'numpy', 'tyro', 'av'} & set(sys.modules); "
        "print(time.perf_counter() - start); sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1.0
