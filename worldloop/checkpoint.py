"""Checkpoints: safetensors beside a config.json, strict and atomic; no pickle.

    folder/config.json          format, worldloop_version, kind, files, config
    folder/model.safetensors    or one file per part: dit.safetensors, reward.safetensors ...

config.json names the weight files and is replaced last, so a reader sees the old
checkpoint or the new one, never a mixture.  Training state (optimizer moments, step,
random state) is a row of numbered folders, each renamed into place when it is whole.
"""

import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from worldloop import __version__
from worldloop.config import config_from_dict, config_to_dict, read_json
from worldloop.errors import UserError
from worldloop.files import (
    PathLike,
    atomic_path,
    atomic_write_bytes,
    atomic_write_text,
    disk_error,
    file_sha256,
    fsync_path,
)
from worldloop.hub import push_to_hub, resolve_pretrained

__all__ = [
    "Checkpoint", "atomic_write_bytes", "atomic_write_text", "config_from_dict", "config_to_dict",
    "file_sha256", "load_checkpoint", "load_into", "load_tensors", "load_training_state",
    "push_to_hub", "resolve_pretrained", "save_checkpoint", "save_tensors", "save_training_state",
]  # fmt: skip

FORMAT = 1
CONFIG = "config.json"
_MAX_HEADER = 100 * 2**20


# ---------------------------------------------------------------- tensors in one file


def save_tensors(path: PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to one safetensors file, atomically."""
    with atomic_path(path) as temporary:
        _write_safetensors(temporary, tensors, Path(path))


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], shown: Path) -> None:
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()  # tied weights and views: safetensors stores each by itself
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    try:
        safetensors.torch.save_file(plain, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~_umask())  # safetensors makes it private to this user
    except safetensors.SafetensorError as error:
        clear = disk_error(shown, error)
        raise clear or UserError(f"{shown}: cannot be written: {error}") from error


def load_tensors(path: PathLike, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read one safetensors file; a truncated or foreign file gives one clear error."""
    file = Path(path)
    _check_safetensors(file)
    try:
        return safetensors.torch.load_file(file, device=str(device))
    except safetensors.SafetensorError as error:
        raise UserError(f"{file}: damaged safetensors file ({error}); copy it again") from error


def _check_safetensors(file: Path) -> None:
    """Compare the header with the size of the file, before anything is mapped."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        first = stream.read(1)
        if first == b"{" and length <= _MAX_HEADER:
            text = first + stream.read(length - 1)
        elif size == 0:
            raise UserError(f"{file}: empty file; copy or save it again")
        else:
            raise UserError(
                f"{file}: not a safetensors file; .pt and .pth checkpoints are read by "
                "worldloop.engine.formats, not here"
            )
    if size < 8 + length:
        raise UserError(
            f"{file}: truncated: the header alone needs {8 + length} bytes, the file has {size}; "
            "copy it again"
        )
    try:
        header = json.loads(text)
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{file}: not a safetensors file (unreadable header)") from error
    need = 8 + length + max(ends, default=0)
    if size != need:
        state = "truncated" if size < need else "has foreign bytes at its end"
        raise UserError(f"{file}: {state}: needs {need} bytes, has {size}; copy it again")


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Copy `tensors` into `module`, strictly; `name` (a file) stands in the error.

    A module on the meta device takes the tensors themselves; otherwise its dtypes stay.
    """
    own = module.state_dict()
    problems = [
        _listed("missing", [k for k in own if k not in tensors]),
        _listed("unexpected", [k for k in tensors if k not in own]),
        _listed(
            "of another shape",
            [
                f"{k} (file {list(tensors[k].shape)}, model {list(own[k].shape)})"
                for k in own
                if k in tensors and tensors[k].shape != own[k].shape
            ],
        ),
        _listed(
            "of another kind",
            [
                f"{k} (file {tensors[k].dtype}, model {own[k].dtype})"
                for k in own
                if k in tensors and tensors[k].is_floating_point() != own[k].is_floating_point()
            ],
        ),
    ]
    if any(problems):
        raise UserError(
            f"{name}: does not fit {type(module).__name__}: {'; '.join(filter(None, problems))}. "
            "The file belongs to another preset or version: build the model from the "
            "config.json beside it"
        )
    on_meta = any(tensor.is_meta for tensor in own.values())
    module.load_state_dict(dict(tensors), strict=True, assign=on_meta)


def _listed(what: str, items: list[str], most: int = 3) -> str:
    if not items:
        return ""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return f"{len(items)} {what}: {', '.join(items[:most])}{more}"


# ---------------------------------------------------------------- a checkpoint folder


class Checkpoint(NamedTuple):
    """What `load_checkpoint` reads: `parts` maps a part (or "model") to its tensors."""

    config: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]
    folder: Path


def save_checkpoint(
    folder: PathLike,
    state: Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    *,
    kind: str,
) -> Path:
    """Write weights and config.  `state` is one state dict, or {part: state dict}.

    Saving over an earlier checkpoint replaces it in one step; other files stay.
    """
    target = Path(folder)
    parts = _parts(state)
    old = target / CONFIG
    keep = set(read_json(old).get("files", {}).values()) if old.is_file() else set()
    files: dict[str, str] = {}
    for part, tensors in parts.items():
        name = f"{part}.safetensors"
        if name in keep:  # do not touch what the present config.json points at
            name = f"{part}-new.safetensors"
        save_tensors(target / name, tensors)
        files[part] = name
    document = {
        "format": FORMAT,
        "worldloop_version": __version__,
        "kind": kind,
        "files": files,
        "config": dict(config),
    }
    atomic_write_text(old, json.dumps(document, indent=2) + "\n")
    # What the old config.json named, and what a process killed in here has left.
    ours = keep | {f"{part}{suffix}.safetensors" for part in parts for suffix in ("", "-new")}
    for name in ours - set(files.values()):
        (target / name).unlink(missing_ok=True)
    # (The third is what safetensors calls a file before it is whole.)
    for pattern in (".*.safetensors.*.tmp", f".{CONFIG}.*.tmp", ".tmp??????"):
        for leftover in target.glob(pattern):
            leftover.unlink(missing_ok=True)
    return target


def _parts(state: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
    if not state:
        raise ValueError("state: nothing to save")
    if all(isinstance(value, Tensor) for value in state.values()):
        return {"model": state}
    for part, tensors in state.items():
        if not isinstance(tensors, Mapping):
            raise TypeError(f"state[{part!r}]: expected a state dict, got {type(tensors).__name__}")
        if not part.replace("_", "").isalnum():
            raise ValueError(f"state: part {part!r} must be letters, digits and underscores")
    return dict(state)


def load_checkpoint(
    folder: PathLike,
    *,
    kind: str | None = None,
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Read a folder written by `save_checkpoint`; `kind`, where given, must match."""
    source = Path(folder)
    document = read_json(source / CONFIG)
    where = source / CONFIG
    if document.get("format") != FORMAT:
        raise UserError(
            f"{where}: format {document.get('format')!r}, this version reads {FORMAT}; "
            "use the worldloop version that wrote it (worldloop_version in the file)"
        )
    if kind is not None and document.get("kind") != kind:
        raise UserError(f"{where}: kind is {document.get('kind')!r}, expected {kind!r}")
    files, config = document.get("files"), document.get("config")
    if not isinstance(files, dict) or not isinstance(config, dict):
        raise UserError(f"{where}: keys 'files' and 'config' must be objects; restore the file")
    for name in files.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{where}: files: {name!r} is not a plain file name")
    parts = {part: load_tensors(source / name, device) for part, name in files.items()}
    return Checkpoint(config, parts, source)


# ---------------------------------------------------------------- training state


def save_training_state(
    folder: PathLike, state: Mapping[str, Any], meta: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write a nested state (optimizer.state_dict(), random states ...) and `meta` (step ...).

    The newest `keep` states stay.  A process killed in here leaves the earlier ones readable.
    """
    root = Path(folder)
    tensors: dict[str, Tensor] = {}
    document = {"format": FORMAT, "meta": dict(meta), "state": _pack(state, "", tensors)}
    states = _numbered(root)
    final = root / f"state-{states[-1][0] + 1 if states else 0:06d}"
    temporary = root / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_safetensors(temporary / "state.safetensors", tensors, final)
        (temporary / "meta.json").write_text(json.dumps(document), encoding="utf-8")
        for path in (temporary / "state.safetensors", temporary / "meta.json", temporary):
            fsync_path(path)
        os.rename(temporary, final)
        fsync_path(root)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        clear = disk_error(root, error)
        if clear is not None:
            raise clear from error
        raise
    for _, stale in states[: len(states) + 1 - max(keep, 1)]:
        shutil.rmtree(stale, ignore_errors=True)
    return final


def load_training_state(folder: PathLike) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The newest readable (state, meta), or None where nothing was saved yet."""
    errors: list[UserError] = []
    for _, path in reversed(_numbered(Path(folder))):
        try:
            document = read_json(path / "meta.json")
            tensors = load_tensors(path / "state.safetensors")
            return _unpack(document["state"], tensors), document["meta"]
        except UserError as error:
            errors.append(error)
        except KeyError as error:
            errors.append(UserError(f"{path}: {error} is missing; delete this state"))
    if errors:
        raise errors[0]
    return None


def _numbered(root: Path) -> list[tuple[int, Path]]:
    found = [(p.name.removeprefix("state-"), p) for p in root.glob("state-*") if p.is_dir()]
    return sorted((int(number), path) for number, path in found if number.isdigit())


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Nested containers as JSON; tensors go to `tensors` and leave their name behind."""
    if isinstance(value, Tensor):
        tensors[where] = value
        return {"$tensor": where}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        pairs = [[k, _pack(v, f"{where}/{k}" if where else str(k), tensors)]
                 for k, v in value.items()]  # fmt: skip
        if any(not isinstance(k, str | int) for k, _ in pairs):
            raise TypeError(f"training state: {where}: keys must be str or int")
        return {"$dict": pairs}
    if isinstance(value, list | tuple):
        items = [_pack(v, f"{where}/{i}", tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise TypeError(f"training state: {where}: {type(value).__name__} cannot be saved")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "$tensor":
        return tensors[content]
    if tag == "$tuple":
        return tuple(_unpack(item, tensors) for item in content)
    return {key: _unpack(item, tensors) for key, item in content}
