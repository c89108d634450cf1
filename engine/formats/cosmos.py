"""Checkpoints of NVIDIA Cosmos-Predict2 and 2.5: a flat `.pt` of `net.*` (and `net_ema.*`) keys.

The network's parameter names are the published ones, so loading is: pick the prefix, drop what is
no weight, read the configuration off the shapes, load strictly. The published loader is lenient
(strict=False); a checkpoint that does not fit its network then yields a model that ignores its
actions, so here anything unexpected is an error.
"""

import dataclasses
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from worldloop.engine.dit import DiT, DiTConfig
from worldloop.errors import UserError

PREFIXES = {"ema": "net_ema.", "net": "net."}
DROPPED_PREFIXES = ("accum_", "pos_embedder.")  # counters, and buffers that follow from the config
DROPPED_SUFFIX = "_extra_state"  # TransformerEngine's scaling state, empty in bf16

# What no shape tells, by model width.
ROPE_RATIO_HWT = {
    1280: (4.0, 4.0, 1.0),
    2048: (3.0, 3.0, 1.0),
    5120: (2.0, 2.0, 0.8333333333333334),
}


def load_cosmos(
    path: str | Path,
    *,
    weights: Literal["auto", "ema", "net"] = "auto",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    action_dim: int = 7,
    chunk_actions: int = 12,
    actions_per_frame: int = 4,
    rope_ratio_hwt: tuple[float, float, float] | None = None,
) -> DiT:
    """A DiT with the checkpoint's weights, in evaluation mode.

    weights: which copy to take where the file has two; auto prefers the averaged one.
    action_dim: numbers per pose. First-layer inputs of chunk_actions * action_dim mean one vector
    for the whole chunk, actions_per_frame * action_dim mean poses per latent frame; else an error.
    rope_ratio_hwt: needed only for a width that NVIDIA never published.
    Raises UserError naming the file and what is wrong with it.
    """
    path = Path(path)
    try:
        state = strip_cosmos(read_cosmos(path), weights)
        config = infer_config(
            state,
            action_dim=action_dim,
            chunk_actions=chunk_actions,
            actions_per_frame=actions_per_frame,
            rope_ratio_hwt=rope_ratio_hwt,
        )
        dit = from_state(config, state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return dit.to(device=device, dtype=dtype).eval()


def save_cosmos(dit: DiT, path: str | Path, *, prefix: str = "net.") -> None:
    """Write the weights in the published layout; complete under its name or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    torch.save(to_cosmos(dit, prefix=prefix), partial)
    partial.replace(path)


def to_cosmos(dit: DiT, *, prefix: str = "net.") -> dict[str, Tensor]:
    """The published keys of a model. Raises UserError for parts that the layout does not have."""
    state = {f"{prefix}{key}": value.detach() for key, value in dit.state_dict().items()}
    if f"{prefix}learned_positions" in state:
        raise UserError(
            "learned_positions: the Cosmos layout has none; this model cannot be stored"
        )
    return state


def read_cosmos(path: Path) -> dict[str, object]:
    """The file's flat dictionary, memory-mapped, without running any code that it may hold."""
    if not path.is_file():
        raise UserError("no such file")
    if not zipfile.is_zipfile(path):
        raise UserError("not a PyTorch checkpoint, or cut short; download it again")
    try:
        # TransformerEngine stores byte buffers; they carry nothing executable.
        with torch.serialization.safe_globals([io.BytesIO, bytes]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        # torch's message is a page on how to trust the file anyway; the cause follows this mark.
        cause = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or repr(error)
        reason = cause.splitlines()[0].split(". Please use")[0][:200]
        raise UserError(f"unreadable as a checkpoint of plain tensors ({reason})") from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UserError("holds no flat dictionary of named tensors")
    return loaded


def strip_cosmos(
    loaded: Mapping[str, object], weights: Literal["auto", "ema", "net"] = "auto"
) -> dict[str, Tensor]:
    """One network's tensors under the names of `DiT.state_dict`, bookkeeping dropped."""
    present = [name for name, p in PREFIXES.items() if any(key.startswith(p) for key in loaded)]
    if not present:
        example = next(iter(loaded), "none")
        raise UserError(f"no keys with prefix 'net.' or 'net_ema.' (first key: {example})")
    chosen = present[0] if weights == "auto" else weights
    if chosen not in present:
        raise UserError(f"has no {PREFIXES[chosen]}* keys; load weights={present[0]!r}")

    state: dict[str, Tensor] = {}
    for key, value in loaded.items():
        owner = next((p for p in PREFIXES.values() if key.startswith(p)), None)
        if owner is None:
            raise UserError(f"unexpected key {key}")
        name = key.removeprefix(owner)
        if owner != PREFIXES[chosen] or name.startswith(DROPPED_PREFIXES):
            continue
        if name.endswith(DROPPED_SUFFIX):
            continue
        if not isinstance(value, Tensor):
            raise UserError(f"{key} is a {type(value).__name__}; expected a tensor")
        state[name] = value
    return state


def infer_config(
    state: Mapping[str, Tensor],
    *,
    action_dim: int = 7,
    chunk_actions: int = 12,
    actions_per_frame: int = 4,
    rope_ratio_hwt: tuple[float, float, float] | None = None,
) -> DiTConfig:
    """The configuration that the tensors' shapes imply (patch size 2). Arguments: `load_cosmos`."""
    patch = 2
    width, patch_values = _shape(state, "x_embedder.proj.1.weight", 2)
    channels = _shape(state, "final_layer.linear.weight", 2)[0] // patch**2
    masks = patch_values // patch**2 - channels
    if masks not in (0, 1, 2):
        raise UserError(
            f"x_embedder.proj.1.weight takes {patch_values} values; expected "
            f"{patch**2} times {channels} latent and up to 2 mask channels"
        )
    blocks = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
    ratio = ROPE_RATIO_HWT.get(width) if rope_ratio_hwt is None else rope_ratio_hwt
    if ratio is None:
        raise UserError(f"width {width} is none of {sorted(ROPE_RATIO_HWT)}; pass rope_ratio_hwt")
    has_context = "blocks.0.cross_attn.k_proj.weight" in state
    projected = "crossattn_proj.0.weight" in state  # Cosmos-Predict2.5's text
    config = DiTConfig(
        width=width,
        depth=max(blocks, default=-1) + 1,
        heads=width // _shape(state, "blocks.0.self_attn.q_norm.weight", 1)[0],
        latent_channels=channels,
        patch=patch,
        mlp_ratio=_shape(state, "blocks.0.mlp.layer1.weight", 2)[0] // width,
        adaln_rank=_shape(state, "blocks.0.adaln_modulation_self_attn.1.weight", 2)[0],
        context_dim=_shape(state, "blocks.0.cross_attn.k_proj.weight", 2)[1] if has_context else 0,
        context_proj_dim=_shape(state, "crossattn_proj.0.weight", 2)[1] if projected else 0,
        condition_channel=masks == 2,  # a single mask is the padding mask (text-to-image)
        padding_channel=masks >= 1,
        rope_ratio_hwt=ratio,
        rope_dtype="bfloat16_exponents" if projected else "bfloat16",
    )
    if not any(key.startswith("action_embedder") for key in state):
        return config
    features = _shape(state, "action_embedder_B_D.fc1.weight", 2)[1]
    layouts: dict[int, Literal["chunk", "per_frame"]] = {
        actions_per_frame * action_dim: "per_frame",
        chunk_actions * action_dim: "chunk",
    }
    if features not in layouts:
        raise UserError(
            f"action_embedder_B_D.fc1 takes {features} values; expected "
            f"{chunk_actions}*{action_dim} (whole chunk) or {actions_per_frame}*{action_dim} "
            "(per latent frame); pass action_dim, chunk_actions or actions_per_frame"
        )
    return dataclasses.replace(
        config,
        action_dim=action_dim,
        action_layout=layouts[features],
        chunk_actions=chunk_actions,
        actions_per_frame=actions_per_frame,
    )


def from_state(config: DiTConfig, state: Mapping[str, Tensor]) -> DiT:
    """A DiT that takes over `state`'s tensors (no copy); every key and shape must fit."""
    with torch.device("meta"):
        dit = DiT(config)
    expected = dit.state_dict()
    for what, keys in (
        ("missing", expected.keys() - state),
        ("unexpected", state.keys() - expected),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(f"{what} key {', '.join(sorted(keys)[:3])}{more}")
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise UserError(
                f"{key} has shape {list(state[key].shape)}; expected {list(tensor.shape)}"
            )
    dit.load_state_dict(dict(state), strict=True, assign=True)
    return dit.requires_grad_(True)


def _shape(state: Mapping[str, Tensor], key: str, dims: int) -> tuple[int, ...]:
    if key not in state:
        raise UserError(f"missing key {key}")
    shape = tuple(state[key].shape)
    if len(shape) != dims:
        raise UserError(f"{key} has shape {list(shape)}; expected {dims} dimensions")
    return shape
