"""Weights of the Wan2.1 autoencoder, in both published layouts.

- `tokenizer.pth` / `Wan2.1_VAE.pth`: one flat dict of tensors, the names of `WanVAE` itself
  (Wan-Video/Wan2.1; nvidia-cosmos/cosmos-predict2).
- A diffusers folder of `AutoencoderKLWan`: config.json and safetensors under other names.

Every reader is strict: a file that is not exactly such a checkpoint raises a UserError of one
line, which names the file, what is missing or unexpected, and what to do.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldloop.checkpoint import load_tensors, save_tensors
from worldloop.engine.vae import WanVAE, WanVAEConfig
from worldloop.errors import UserError
from worldloop.files import PathLike, atomic_path, atomic_write_text

StateDict = dict[str, Tensor]
Shapes = Mapping[str, torch.Size]

WEIGHTS = "diffusion_pytorch_model.safetensors"

# ---------------------------------------------------------------- the .pth layout


def load_wan_vae(path: PathLike) -> WanVAE:
    """The autoencoder of a `.pth` file: memory-mapped, on the CPU, in the file's dtype, frozen.

    The sizes are read from the shapes; the latent statistics are the published ones (16 channels)
    or, for other channel counts, mean 0 and deviation 1. Do not write over the file while the
    module lives on the CPU; `save_wan_vae` replaces it safely. Raises UserError.
    """
    return _build(_read_pth(Path(path)), str(path))


def save_wan_vae(vae: WanVAE, path: PathLike) -> None:
    """Write the weights as a `.pth` file in the published layout, atomically."""
    with atomic_path(path) as temporary:
        torch.save(_cpu_state(vae), temporary)


def _read_pth(path: Path) -> StateDict:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a Wan2.1 VAE .pth file")
    try:
        # Files of torch before 1.6 are no zip archives and cannot be mapped.
        found = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: not a file of plain tensors, or truncated ({path.stat().st_size:,} bytes); "
            "fetch it again and compare its size and checksum"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: truncated or damaged ({path.stat().st_size:,} bytes; {reason}); "
            "fetch it again and compare its size and checksum"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UserError(
            f"{path}: expected a flat dict of tensors, found {type(found).__name__}"
            f"{_some(found, ' with entries ') if isinstance(found, dict) else ''}; "
            "save the bare state dict of the autoencoder"
        )
    return found


# ---------------------------------------------------------------- the diffusers layout

# (ours, diffusers), applied in this order to our names and in reverse to theirs: the convolutions
# called conv1 inside a residual block there must be renamed back before conv_in becomes conv1.
_RENAMES = (
    ("encoder.conv1.", "encoder.conv_in."),
    ("decoder.conv1.", "decoder.conv_in."),
    (".head.0.", ".norm_out."),
    (".head.2.", ".conv_out."),
    (".middle.0.", ".mid_block.resnets.0."),
    (".middle.1.", ".mid_block.attentions.0."),
    (".middle.2.", ".mid_block.resnets.1."),
    (".downsamples.", ".down_blocks."),
    (".residual.0.", ".norm1."),
    (".residual.2.", ".conv1."),
    (".residual.3.", ".norm2."),
    (".residual.6.", ".conv2."),
    (".shortcut.", ".conv_shortcut."),
)
_TOP = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_TOP_BACK = {theirs: ours for ours, theirs in _TOP.items()}


def to_diffusers_key(key: str, res_blocks: int) -> str:
    """The AutoencoderKLWan name of one of our parameters."""
    top, _, leaf = key.partition(".")
    if top in _TOP:
        return f"{_TOP[top]}.{leaf}"
    for ours, theirs in _RENAMES:
        key = key.replace(ours, theirs)
    if match := re.match(r"decoder\.upsamples\.(\d+)\.(.*)", key):
        # Theirs are grouped by resolution: res_blocks + 1 residual blocks, then the upsampler.
        level, position = divmod(int(match[1]), res_blocks + 2)
        place = "upsamplers.0" if position > res_blocks else f"resnets.{position}"
        key = f"decoder.up_blocks.{level}.{place}.{match[2]}"
    return key


def from_diffusers_key(key: str, res_blocks: int) -> str:
    """Our name of an AutoencoderKLWan parameter; the inverse of `to_diffusers_key`."""
    top, _, leaf = key.partition(".")
    if top in _TOP_BACK:
        return f"{_TOP_BACK[top]}.{leaf}"
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.*)", key):
        position = int(match[3]) if match[2] == "resnets" else res_blocks + 1
        key = f"decoder.upsamples.{int(match[1]) * (res_blocks + 2) + position}.{match[4]}"
    for ours, theirs in reversed(_RENAMES):
        key = key.replace(theirs, ours)
    return key


def from_diffusers_vae(source: PathLike | Mapping[str, Tensor]) -> WanVAE:
    """The autoencoder of a diffusers folder (config.json, safetensors) or of its state dict.

    A state dict alone has no latent statistics; see `load_wan_vae`. Only the Wan2.1 kind is read:
    the residual down- and upsampling and the patches of Wan2.2 raise UserError.
    """
    if isinstance(source, Mapping):
        return _build(_from_diffusers_state(source), "state dict")
    folder = Path(source)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(
            f"{config_path}: no such file; give the folder of the autoencoder (in a pipeline: vae/)"
        )
    config = _read_diffusers_config(config_path)
    state: StateDict = {}
    for path in _weight_files(folder):
        state.update(load_tensors(path))
    return _build(_from_diffusers_state(state), str(folder), config)


def to_diffusers_vae(vae: WanVAE) -> tuple[dict[str, Any], StateDict]:
    """(config.json, state dict) of the same autoencoder as a diffusers AutoencoderKLWan."""
    c = vae.config
    config = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": c.dim,
        "z_dim": c.latent_channels,
        "dim_mult": list(c.multipliers),
        "num_res_blocks": c.res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(c.temporal_downsample),
        "dropout": 0.0,
        "latents_mean": list(c.latent_mean),
        "latents_std": list(c.latent_std),
        "scale_factor_temporal": vae.temporal,
        "scale_factor_spatial": vae.spatial,
    }
    return config, {to_diffusers_key(k, c.res_blocks): t for k, t in _cpu_state(vae).items()}


def save_diffusers_vae(vae: WanVAE, folder: PathLike) -> None:
    """Write a folder that diffusers' AutoencoderKLWan.from_pretrained reads."""
    folder = Path(folder)
    config, state = to_diffusers_vae(vae)
    save_tensors(folder / WEIGHTS, state)
    atomic_write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


_FIXED = {  # options of AutoencoderKLWan of which WanVAE has one value
    "attn_scales": [],
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "decoder_base_dim": None,
}
_READ = {
    "base_dim": "dim",
    "dim_mult": "multipliers",
    "z_dim": "latent_channels",
    "num_res_blocks": "res_blocks",
    "temperal_downsample": "temporal_downsample",
    "latents_mean": "latent_mean",
    "latents_std": "latent_std",
}
_IGNORED = {"dropout", "scale_factor_temporal", "scale_factor_spatial"}  # no effect, or derived


def _read_diffusers_config(path: Path) -> WanVAEConfig:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(found, dict) or found.get("_class_name") != "AutoencoderKLWan":
        raise UserError(f"{path}: _class_name is not AutoencoderKLWan; not a Wan autoencoder")
    found = {k: v for k, v in found.items() if not k.startswith("_")}
    if found.get("decoder_base_dim") == found.get("base_dim", WanVAEConfig.dim):
        found.pop("decoder_base_dim", None)
    for name, value in found.items():
        if name in _FIXED and value != _FIXED[name]:
            raise UserError(
                f"{path}: {name} = {value!r} is not supported (only {_FIXED[name]!r}: Wan2.1)"
            )
    if unknown := found.keys() - _FIXED.keys() - _READ.keys() - _IGNORED:
        raise UserError(f"{path}: unknown option {', '.join(sorted(unknown))}; remove it")
    options: dict[str, Any] = {
        _READ[name]: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if name in _READ
    }
    try:
        return WanVAEConfig(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.index.json"
    names = {WEIGHTS}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; fetch it as well")
    return [folder / name for name in sorted(names)]


def _from_diffusers_state(state: Mapping[str, Tensor]) -> StateDict:
    pattern = re.compile(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.")
    found = [int(match[1]) for key in state if (match := pattern.match(key))]
    res_blocks = max(found, default=WanVAEConfig.res_blocks)
    return {from_diffusers_key(key, res_blocks): tensor for key, tensor in state.items()}


# ---------------------------------------------------------------- shared


def config_from_shapes(shapes: Shapes) -> WanVAEConfig:
    """The sizes of the autoencoder whose parameters (our names) have these shapes.

    Raises KeyError where the names are not those of a Wan2.1 autoencoder.
    """
    dim, channels = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
    blocks: dict[int, set[str]] = {}
    for key in shapes:
        if match := re.match(r"encoder\.downsamples\.(\d+)\.(.*)", key):
            blocks.setdefault(int(match[1]), set()).add(match[2])
    temporal = [
        "time_conv.weight" in leaves
        for _, leaves in sorted(blocks.items())
        if "resample.1.weight" in leaves
    ]
    levels = len(temporal) + 1
    res_blocks = (len(blocks) - len(temporal)) // levels
    last = (res_blocks + 1) * torch.arange(levels) + res_blocks - 1  # of each level
    widths = [shapes[f"encoder.downsamples.{i}.residual.6.weight"][0] for i in last.tolist()]
    statistics: dict[str, Any] = {}
    if channels != WanVAEConfig.latent_channels:
        statistics = {"latent_mean": (0.0,) * channels, "latent_std": (1.0,) * channels}
    return WanVAEConfig(
        dim=dim,
        multipliers=tuple(width // dim for width in widths),
        latent_channels=channels,
        res_blocks=res_blocks,
        temporal_downsample=tuple(temporal),
        **statistics,
    )


def _build(state: StateDict, source: str, config: WanVAEConfig | None = None) -> WanVAE:
    if config is None:
        try:
            config = config_from_shapes({key: tensor.shape for key, tensor in state.items()})
        except (KeyError, IndexError, ValueError, ZeroDivisionError):
            config = WanVAEConfig()  # not such a file; the comparison below says what is amiss
    with torch.device("meta"):
        vae = WanVAE(config)
    expected = vae.state_dict()
    wrong = [
        f"{key} {list(state[key].shape)} for {list(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (
            ("missing", [key for key in expected if key not in state]),
            ("unexpected", [key for key in state if key not in expected]),
            ("of another shape", wrong),
            ("not floating point", [k for k, t in state.items() if not t.is_floating_point()]),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"{source}: not a Wan2.1 autoencoder ({'; '.join(problems)}); {_hint(state)}"
        )
    vae.load_state_dict(state, strict=True, assign=True)
    vae.to(next(iter(state.values())).dtype)  # the latent statistics follow the weights
    return vae.eval().requires_grad_(False)


def _hint(state: Mapping[str, Tensor]) -> str:
    if any(".down_blocks." in key for key in state):
        return "for the diffusers layout call from_diffusers_vae"
    return "give Wan2.1_VAE.pth, or the tokenizer.pth beside a Cosmos-Predict2 checkpoint"


def _some(names: Any, prefix: str = "") -> str:
    names = [str(name) for name in names]
    return prefix + ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _cpu_state(vae: WanVAE) -> StateDict:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in vae.state_dict().items()}
