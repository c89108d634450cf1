"""config.json of OpenVLA checkpoints: as published, as we write it, and what is not supported."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from worldloop.engine.formats.openvla import read_config, save_openvla
from worldloop.engine.policy.openvla_oft import PRESETS, OpenVLAConfig, OpenVLAOFT
from worldloop.errors import UserError

# The published file's keys; its text_config is transformers' LlamaConfig() but for these.
PUBLISHED = {
    "architectures": ["OpenVLAForActionPrediction"],
    "arch_specifier": "no-align+fused-gelu-mlp",
    "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "image_resize_strategy": "resize-naive",
    "image_sizes": [224, 224],
    "llm_backbone_id": "llama2-7b-pure",
    "llm_max_length": 2048,
    "model_type": "openvla",
    "n_action_bins": 256,
    "norm_stats": {},
    "output_projector_states": False,
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
    "text_config": {
        "model_type": "llama",
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
    "timm_model_ids": [
        "vit_large_patch14_reg4_dinov2.lvd142m",
        "vit_so400m_patch14_siglip_224",
    ],
    "timm_override_act_layers": [None, None],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_fused_vision_backbone": True,
    "vision_backbone_id": "dinosiglip-vit-so-224px",
}


def write(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps(PUBLISHED | changes))
    return folder


def text(**changes: object) -> dict[str, object]:
    return {**PUBLISHED["text_config"], **changes}


def test_the_published_file_is_preset_7b(tmp_path):
    config = read_config(write(tmp_path))
    assert config == PRESETS["7b"]() == OpenVLAConfig()
    assert (config.pad_id, config.first_action_id, config.space_id) == (32000, 31744, 29871)
    assert (config.action_dim, config.chunk) == (7, 8)


def test_llama_defaults_are_those_of_transformers(tmp_path):
    """What text_config leaves out, the published code takes from LlamaConfig's defaults."""
    from transformers import LlamaConfig

    theirs, ours = LlamaConfig(), read_config(write(tmp_path)).llama
    assert ours.eps == theirs.rms_norm_eps
    assert (ours.width, ours.mlp_width) == (theirs.hidden_size, theirs.intermediate_size)
    assert (ours.depth, ours.heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
    assert ours.rope_theta == 10000


def test_text_config_counts(tmp_path):
    llama = read_config(
        write(
            tmp_path,
            text_config=text(
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                intermediate_size=96,
                vocab_size=32128,
                rope_theta=500000,
                rms_norm_eps=1e-5,
            ),
        )
    ).llama
    assert (llama.width, llama.depth, llama.heads, llama.mlp_width) == (64, 3, 4, 96)
    assert (llama.vocab_rows, llama.rope_theta, llama.eps) == (32128, 500000.0, 1e-5)


def test_our_file_keeps_everything(tmp_path):
    config = dataclasses.replace(PRESETS["tiny"](), chunk=5, action_dim=6)
    with torch.device("meta"):
        shell = OpenVLAOFT(config)
    save_openvla(shell.to_empty(device="cpu"), tmp_path)
    assert read_config(tmp_path) == config


def test_our_file_of_7b_is_the_published_one(tmp_path, monkeypatch):
    """Without our own key it still reads as 7b, and the published code finds its names."""
    import worldloop.engine.formats.openvla as module

    monkeypatch.setattr(module, "save_tensors", lambda path, tensors: None)
    with torch.device("meta"):
        save_openvla(OpenVLAOFT(PRESETS["7b"]()), tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    ours = document.pop("worldloop")
    assert ours["llama"]["vocab_rows"] == 32064
    for key, value in PUBLISHED.items():
        if key in document and key != "text_config":
            assert document[key] == value, key
    needed = {"vision_backbone_id", "llm_backbone_id", "timm_model_ids", "image_resize_strategy"}
    assert needed <= set(document)
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert read_config(tmp_path) == PRESETS["7b"]()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava'; expected 'openvla'"),
        ({"timm_model_ids": ["vit_base", "vit_so"]}, r"timm_model_ids is \['vit_base', 'vit_so'\]"),
        ({"image_sizes": [384, 384]}, r"image_sizes is \[384, 384\]; this loader knows \[224"),
        ({"n_action_bins": 512}, "n_action_bins is 512; this loader knows 256"),
        ({"pad_token_id": 2}, "pad_token_id is 2"),
        ({"text_config": [1]}, r"text_config is \[1\]; expected an object"),
        ({"text_config": text(num_key_value_heads=8)}, "num_key_value_heads: grouped keys are not"),
        ({"text_config": text(hidden_size="4096")}, "text_config.llama.width: expected int, got"),
        ({"text_config": text(hidden_size=100)}, "width 100 over 32 heads"),
        ({"text_config": text(vocab_size=32000)}, "fewer than llama.vocab_rows"),
        ({"worldloop": {"chunks": 8}}, "worldloop.chunks: unknown key"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        read_config(write(tmp_path, **changes))
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "config.json")) and "\n" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("{", "not valid JSON"), ("[]", "expected a JSON object")],
)
def test_an_unreadable_file(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
