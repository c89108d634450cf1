"""Checkpoints of OpenVLA and OpenVLA-OFT: sharded safetensors, LoRA adapters, statistics.

    folder/config.json                         model_type openvla
    folder/model.safetensors.index.json        weight_map: tensor -> shard
    folder/model-00001-of-00003.safetensors    ...
    folder/dataset_statistics.json             {suite: {action: {q01, q99, mask ...}, proprio}}

The network's parameter names are the published ones. A tensor too many or too few is an error;
only RLinf's value head, five tensors that the policy does not use, may stand beside the others.
Facts: openvla/openvla-oft at 213c5ff, RLinf at a3816b5. Nothing here runs code from a checkpoint.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldloop.checkpoint import load_into, load_tensors, save_tensors
from worldloop.config import config_from_dict, config_to_dict, read_json
from worldloop.engine.formats.cosmos import read_cosmos
from worldloop.engine.policy.action_tokens import Statistics
from worldloop.engine.policy.openvla_oft import OpenVLAConfig, OpenVLAOFT
from worldloop.engine.policy.vision import DINOV2_L, SIGLIP_SO400M
from worldloop.errors import UserError
from worldloop.files import atomic_write_text

INDEX = "model.safetensors.index.json"
STATISTICS = "dataset_statistics.json"
VALUE_HEAD = tuple(
    f"value_head.mlp.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight")
)
TIMM_IDS = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
_PUBLISHED_NAMES = {  # by which the published code builds its parts
    "vision_backbone_id": "dinosiglip-vit-so-224px",
    "llm_backbone_id": "llama2-7b-pure",
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "timm_model_ids": TIMM_IDS,
    "timm_override_act_layers": [None, None],
    "image_resize_strategy": "resize-naive",
    "llm_max_length": 2048,
}
_LLAMA_KEYS = {  # text_config's names; what is absent there has LlamaConfig's default
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "vocab_size": "vocab_rows",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "eps",
}


def load_openvla(
    folder: str | Path,
    *,
    action_dim: int | None = None,
    chunk: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    adapter: str | Path | None = None,
) -> OpenVLAOFT:
    """The model in a folder of the published layout, in evaluation mode.

    action_dim, chunk: what the checkpoint was trained for. The published config.json does not say
        (LIBERO 7 and 8, the default there; ALOHA 14 and 25; Bridge 7 and 5).
    adapter: a folder with LoRA matrices to merge into the weights.
    Raises UserError naming the file and what is wrong with it.
    """
    folder = Path(folder)
    config = read_config(folder)
    config = dataclasses.replace(
        config,
        action_dim=config.action_dim if action_dim is None else action_dim,
        chunk=config.chunk if chunk is None else chunk,
    )
    with torch.device("meta"):
        model = OpenVLAOFT(config)
    tensors = read_shards(folder, dtype, device)
    policy = {key: value for key, value in tensors.items() if key not in VALUE_HEAD}
    if adapter is not None:
        merge_lora(policy, adapter)
    load_into(model, policy, str(folder))
    return model.requires_grad_(True).eval()


def read_config(folder: str | Path) -> OpenVLAConfig:
    """config.json, published or ours (which adds the key `worldloop`)."""
    path = Path(folder) / "config.json"
    document = read_json(path)
    if document.get("model_type") != "openvla":
        raise UserError(f"{path}: model_type is {document.get('model_type')!r}; expected 'openvla'")
    if "worldloop" in document:
        return config_from_dict(OpenVLAConfig, document["worldloop"], f"{path}: worldloop")
    base = OpenVLAConfig()
    for key, expected in (
        ("timm_model_ids", TIMM_IDS),
        ("image_sizes", [base.image_size] * 2),
        ("n_action_bins", 256),
        ("pad_token_id", base.pad_id),
    ):
        if document.get(key, expected) != expected:
            raise UserError(f"{path}: {key} is {document[key]!r}; this loader knows {expected!r}")
    text = document.get("text_config") or {}
    if not isinstance(text, dict):
        raise UserError(f"{path}: text_config is {text!r}; expected an object")
    own = {ours: text[theirs] for theirs, ours in _LLAMA_KEYS.items() if theirs in text}
    if text.get("num_key_value_heads", text.get("num_attention_heads", 32)) != own.get("heads", 32):
        raise UserError(f"{path}: text_config.num_key_value_heads: grouped keys are not supported")
    values = config_to_dict(base)
    values["llama"] |= own
    return config_from_dict(OpenVLAConfig, values, f"{path}: text_config")


def read_shards(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """All tensors of the shards that the index names, each checked to be where it says."""
    path = folder / INDEX
    if not path.is_file() and (folder / "model.safetensors").is_file():
        found = load_tensors(folder / "model.safetensors", device)
        return {key: value.to(dtype or value.dtype) for key, value in found.items()}
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{path}: key 'weight_map' must be an object; download the file again")
    tensors: dict[str, Tensor] = {}
    for name in shard_of.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{path}: weight_map: {name!r} is not a plain file name")
    for name in sorted(set(shard_of.values())):
        shard = load_tensors(folder / name, device)
        listed = {key for key, owner in shard_of.items() if owner == name}
        for what, keys in (("lacks", listed - set(shard)), ("also holds", set(shard) - listed)):
            if keys:
                raise UserError(
                    f"{folder / name}: {what} {', '.join(sorted(keys)[:3])} "
                    f"({len(keys)} in all), unlike {INDEX}; download both again"
                )
        tensors |= {key: value.to(dtype or value.dtype) for key, value in shard.items()}
    return tensors


def save_openvla(
    model: OpenVLAOFT,
    folder: str | Path,
    *,
    shard_bytes: int = 7_000_000_000,
    statistics: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the published layout; the index comes last, so a half-written folder does not load.

    dtype: store the weights so; None keeps the network's own.
    """
    folder = Path(folder)
    (folder / INDEX).unlink(missing_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for key, tensor in model.state_dict().items():
        tensor = tensor.to(dtype or tensor.dtype)
        need = tensor.numel() * tensor.element_size()
        if shards[-1] and size + need > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size, total = size + need, total + need
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    if statistics is not None:
        _write_json(folder / STATISTICS, statistics)
    _write_json(folder / "config.json", _published_config(model.config))
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    atomic_write_text(path, json.dumps(dict(document), indent=2) + "\n")


def _published_config(config: OpenVLAConfig) -> dict[str, Any]:
    text = {theirs: getattr(config.llama, ours) for theirs, ours in _LLAMA_KEYS.items()}
    known = config.dino == DINOV2_L and config.siglip == SIGLIP_SO400M
    return {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": "no-align+fused-gelu-mlp",
        **(_PUBLISHED_NAMES if known else {}),
        "image_sizes": [config.image_size] * 2,
        "n_action_bins": 256,
        "pad_token_id": config.pad_id,
        "pad_to_multiple_of": 64,
        "use_fused_vision_backbone": True,
        "text_config": {"model_type": "llama", **text},
        "worldloop": config_to_dict(config),
    }


# ---------------------------------------------------------------- LoRA


def merge_lora(tensors: dict[str, Tensor], adapter: str | Path) -> int:
    """Add scale * B @ A to each adapted weight of `tensors`; returns how many there were.

    adapter: a folder with adapter_config.json and adapter_model.safetensors, as peft writes them.
    The sum is made in float32 and stored in the weight's own dtype.
    """
    folder = Path(adapter)
    path = folder / "adapter_model.safetensors"
    options = read_json(folder / "adapter_config.json")
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if options.get(key):
            raise UserError(f"{folder / 'adapter_config.json'}: {key} is not supported")
    rank, alpha = options.get("r"), options.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{folder / 'adapter_config.json'}: keys r and lora_alpha: numbers wanted")
    lora = load_tensors(path)
    down = {key: key.replace(".lora_A.", ".lora_B.") for key in lora if ".lora_A." in key}
    strays = sorted(set(lora) - set(down) - set(down.values()))
    missing = sorted(set(down.values()) - set(lora))
    if strays or missing or not down:
        example = (strays + missing or ["no lora_A key"])[0]
        raise UserError(f"{path}: not pairs of lora_A and lora_B ({example})")
    for key_a, key_b in down.items():
        target = key_a.removeprefix("base_model.model.").partition(".lora_A.")[0] + ".weight"
        A, B = lora[key_a].float(), lora[key_b].float()
        if target not in tensors:
            raise UserError(
                f"{path}: {key_a} adapts {target}, which the model does not have; the adapter "
                "belongs to another network"
            )
        weight = tensors[target]
        out, inner = weight.shape if weight.dim() == 2 else (-1, -1)
        if (tuple(A.shape), tuple(B.shape)) != ((rank, inner), (out, rank)):
            raise UserError(
                f"{path}: {key_a} {list(A.shape)} and lora_B {list(B.shape)} do not fit "
                f"{target} {list(weight.shape)} at rank {rank}"
            )
        delta = (alpha / rank * (B @ A)).to(weight.device)
        tensors[target] = (weight.float() + delta).to(weight.dtype)
    return len(down)


# ---------------------------------------------------------------- statistics and heads


def read_statistics(
    folder: str | Path,
    suite: str,
    *,
    action_dim: int = 7,
    quantity: str = "action",
    low: str = "q01",
    high: str = "q99",
) -> Statistics:
    """The statistics of `suite`, or `suite_no_noops`, from dataset_statistics.json (or, where
    that is absent, config.json's norm_stats); `quantity` is action or proprio.

    Raises UserError where the suite is not there or is of another number of dimensions.
    """
    path = Path(folder) / STATISTICS
    if path.is_file():
        document = read_json(path)
    else:
        path = Path(folder) / "config.json"
        document = read_json(path).get("norm_stats") or {}
    key = next((k for k in (suite, f"{suite}_no_noops") if k in document), None)
    if key is None:
        raise UserError(f"{path}: no statistics of {suite!r}; it has {', '.join(document) or '-'}")
    try:
        statistics = Statistics.from_dict(document[key][quantity], low=low, high=high)
    except KeyError as error:
        has = ", ".join(document[key]) or "-"
        raise UserError(f"{path}: {key} has no {quantity!r}; it has {has}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {key}.{quantity}: {error}") from error
    if statistics.dim != action_dim:
        raise UserError(
            f"{path}: {key}.{quantity} has {statistics.dim} dimensions, expected {action_dim}; "
            "these are the statistics of another robot"
        )
    return statistics


def load_head(module: nn.Module, path: str | Path) -> nn.Module:
    """Fill an `L1Head` or `ProprioProjector` from its published `.pt`; in evaluation mode.

    Raises UserError naming the file and what does not fit.
    """
    path = Path(path)
    try:
        loaded = read_cosmos(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    tensors: dict[str, Tensor] = {}
    for key, value in loaded.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {key} is a {type(value).__name__}; expected a tensor")
        tensors[key.removeprefix("module.")] = value
    load_into(module, tensors, str(path))
    return module.eval()
