"""Where a name leads to: a folder, a preset shipped with the package, or a hub repository."""

import re
from pathlib import Path
from typing import Any

from worldloop.config import read_json
from worldloop.errors import UserError
from worldloop.files import PathLike

FILES = ["*.safetensors", "*.json"]  # of a checkpoint: nothing that could be run
WEIGHTS = Path(__file__).parent / "weights"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def shipped_presets() -> list[str]:
    """The names of the checkpoints that are part of the package."""
    return sorted(str(p.parent.relative_to(WEIGHTS)) for p in WEIGHTS.rglob("config.json"))


def resolve_pretrained(name: PathLike, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local folder, a shipped preset or a hub id "org/name"."""
    text = str(name)
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    if text in shipped_presets():
        return WEIGHTS / text
    if folder.is_dir():
        raise UserError(f"{folder}: no config.json in this folder; give a checkpoint folder")
    if _REPO_ID.fullmatch(text):
        return _download(text, revision)
    known = ", ".join(shipped_presets()) or "none"
    raise UserError(
        f"{text!r}: no such checkpoint folder, shipped preset ({known}) or hub id (org/name)"
    )


def _hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what}: not a local folder, and huggingface_hub is not installed; "
            "pip install 'worldloop[hub]' or give a folder"
        ) from error
    return huggingface_hub


def _download(repo_id: str, revision: str | None) -> Path:
    hub = _hub(repo_id)
    try:
        return Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=FILES))
    except Exception as error:  # offline, unknown, private: the library has a class for each
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{repo_id}: no such folder, and not available from the hub ({reason}); "
            "check the name, go online, or give a local folder"
        ) from error


def push_to_hub(folder: PathLike, repo_id: str, *, private: bool = True) -> str:
    """Upload a checkpoint folder, a world model's or a policy's; returns the address.

    What `resolve_pretrained` fetches is sent, weights and JSON, and a README.md.
    """
    source = Path(folder)
    read_json(source / "config.json")  # or it is no checkpoint
    api = _hub(repo_id).HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=source, allow_patterns=[*FILES, "README.md"])
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{repo_id}: upload failed ({reason}); log in or check the name") from error
    return str(address)
