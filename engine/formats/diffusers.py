"""The DiT in diffusers' terms: CosmosTransformer3DModel's keys and configuration, both ways.

diffusers has no action embedder and no learned per-token positions; a model that has them cannot
be expressed there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from worldloop.engine.dit import DiT, DiTConfig
from worldloop.engine.formats.cosmos import from_state
from worldloop.errors import UserError

_OUTSIDE = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
    "crossattn_proj.0": "crossattn_proj.0",
}
_ATTENTION = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_IN_BLOCK = {
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{
        f"adaln_modulation_{part}.{layer}": f"norm{n}.linear_{layer}"
        for n, part in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for layer in (1, 2)
    },
}


def _renamed(
    state: Mapping[str, Tensor],
    outside: Mapping[str, str],
    in_block: Mapping[str, str],
    blocks: tuple[str, str],
) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        name = outside.get(module)
        if module.startswith(f"{blocks[0]}."):
            _, index, inner = module.split(".", 2)
            name = f"{blocks[1]}.{index}.{in_block[inner]}" if inner in in_block else None
        if name is None:
            raise UserError(f"{key}: no counterpart in the other layout")
        renamed[f"{name}.{leaf}"] = tensor
    return renamed


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`DiT.state_dict()` under the names of CosmosTransformer3DModel.

    Raises UserError naming a key that has no counterpart there (such as an action embedder's).
    """
    return _renamed(state, _OUTSIDE, _IN_BLOCK, ("blocks", "transformer_blocks"))


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`."""
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    in_block = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
    return _renamed(state, outside, in_block, ("transformer_blocks", "blocks"))


def config_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """Keyword arguments of CosmosTransformer3DModel; UserError where it has no equivalent."""
    lacking = {
        "action_dim": config.action_dim != 0,
        "learned_positions": config.learned_positions is not None,
        "context_dim": config.context_dim == 0,
        "timestep_scale": config.timestep_scale != 1.0,
        "rope_dtype": config.rope_dtype != "float32",
    }
    if found := [name for name, differs in lacking.items() if differs]:
        raise UserError(f"DiTConfig.{found[0]} has no equivalent in diffusers")
    ratio_h, ratio_w, ratio_t = config.rope_ratio_hwt
    side = config.max_grid * config.patch
    keywords: dict[str, Any] = {
        "in_channels": config.latent_channels + config.condition_channel,
        "out_channels": config.latent_channels,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.depth,
        "mlp_ratio": float(config.mlp_ratio),
        "text_embed_dim": config.context_dim,
        "adaln_lora_dim": config.adaln_rank,
        "max_size": (config.max_frames, side, side),
        "patch_size": (1, config.patch, config.patch),
        "rope_scale": (ratio_t, ratio_h, ratio_w),
        "concat_padding_mask": config.padding_channel,
        "extra_pos_embed_type": None,
    }
    if config.context_proj_dim:
        keywords["use_crossattn_projection"] = True
        keywords["crossattn_proj_in_channels"] = config.context_proj_dim
        keywords["encoder_hidden_states_channels"] = config.context_dim
    return keywords


def config_from_diffusers(values: Mapping[str, Any]) -> DiTConfig:
    """The configuration of a CosmosTransformer3DModel's config.json.

    Raises UserError for features that this network does not have (control blocks, image context,
    diffusers' factorised extra positions, patches over time).
    """
    for name in ("controlnet_block_every_n", "img_context_dim_in", "extra_pos_embed_type"):
        if values.get(name):
            raise UserError(f"config.json: {name} is {values[name]!r}; only models without it load")
    patch_t, patch, patch_w = values["patch_size"]
    if patch_t != 1 or patch != patch_w:
        raise UserError(f"config.json: patch_size is {values['patch_size']}; expected (1, p, p)")
    ratio_t, ratio_h, ratio_w = values["rope_scale"]
    projected = values.get("use_crossattn_projection", False)
    return DiTConfig(
        width=values["num_attention_heads"] * values["attention_head_dim"],
        depth=values["num_layers"],
        heads=values["num_attention_heads"],
        latent_channels=values["out_channels"],
        patch=patch,
        mlp_ratio=int(values["mlp_ratio"]),
        adaln_rank=values["adaln_lora_dim"],
        context_dim=values["text_embed_dim"],
        context_proj_dim=values["crossattn_proj_in_channels"] if projected else 0,
        condition_channel=values["in_channels"] == values["out_channels"] + 1,
        padding_channel=values["concat_padding_mask"],
        rope_ratio_hwt=(ratio_h, ratio_w, ratio_t),
        max_grid=values["max_size"][1] // patch,
        max_frames=values["max_size"][0],
    )


def load_diffusers(folder: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> DiT:
    """The DiT of a diffusers model folder (config.json and *.safetensors), strictly loaded.

    Raises UserError naming the folder and what is wrong with it.
    """
    folder = Path(folder)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config_from_diffusers(values)
        state: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            state.update(load_file(file))
        dit = from_state(config, from_diffusers(state))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no config.json") from error
    except KeyError as error:
        raise UserError(f"{folder}: config.json lacks {error.args[0]!r}") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from error
    return dit.to(dtype).eval()
