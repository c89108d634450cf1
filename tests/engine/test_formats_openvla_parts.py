"""What lies beside an OpenVLA checkpoint: LoRA adapters, statistics, the continuous heads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import SMALL_OPENVLA as SMALL
from torch import Tensor

from worldloop.checkpoint import save_tensors
from worldloop.engine.formats.openvla import (
    load_head,
    load_openvla,
    merge_lora,
    read_statistics,
    save_openvla,
)
from worldloop.engine.policy.action_tokens import Statistics
from worldloop.engine.policy.heads import L1Head, ProprioProjector
from worldloop.engine.policy.openvla_oft import OpenVLAOFT
from worldloop.errors import UserError

RANK, ALPHA = 4, 2
# As peft 0.11 writes it for the published fine-tuning script, whose rank is 32 and alpha 16.
ADAPTER = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": "gaussian",
    "lora_alpha": ALPHA,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "rank_pattern": {},
    "target_modules": ["q_proj", "qkv", "fc1"],
    "task_type": None,
    "use_dora": False,
    "use_rslora": False,
}


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator) + 0.5 * (p.dim() == 1))
    return module.eval()


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------- LoRA

TARGETS = (
    "language_model.model.layers.0.self_attn.q_proj",
    "language_model.model.layers.1.mlp.down_proj",
    "vision_backbone.featurizer.blocks.0.attn.qkv",
    "vision_backbone.fused_featurizer.blocks.0.mlp.fc1",
    "projector.fc2",
)


def adapter_tensors(model: OpenVLAOFT, infix: str = "") -> dict[str, Tensor]:
    """peft's names; `infix` is the adapter's name, which peft drops when it saves."""
    generator = torch.Generator().manual_seed(5)
    out: dict[str, Tensor] = {}
    for name in TARGETS:
        rows, columns = model.get_submodule(name).weight.shape
        for half, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
            key = f"base_model.model.{name}.{half}.{infix}weight"
            out[key] = 0.3 * torch.randn(shape, generator=generator)
    return out


def write_adapter(folder: Path, tensors: dict[str, Tensor], **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | changes))
    save_tensors(folder / "adapter_model.safetensors", tensors)
    return folder


@pytest.fixture
def model() -> OpenVLAOFT:
    return randomise(OpenVLAOFT(SMALL), seed=0)


@pytest.mark.parametrize("infix", ["", "default."])
def test_merged_weights_act_as_base_and_adapter_side_by_side(infix, model, tmp_path):
    """Against hooks that add scale * B(A(x)) to each adapted layer's output."""
    lora = adapter_tensors(model, infix)
    save_openvla(model, tmp_path / "base", shard_bytes=100_000)
    adapter = write_adapter(tmp_path / "lora_adapter", lora)
    merged = load_openvla(tmp_path / "base", dtype=torch.float32, adapter=adapter)

    def beside(name):
        A = lora[f"base_model.model.{name}.lora_A.{infix}weight"]
        B = lora[f"base_model.model.{name}.lora_B.{infix}weight"]
        return lambda module, args, out: out + ALPHA / RANK * (args[0] @ A.T @ B.T)

    pixels = torch.randn(1, 6, 16, 16, generator=torch.Generator().manual_seed(6))
    ids = torch.tensor([[1, 40, 50, 35]])
    with torch.no_grad():
        plain = model.logits(pixels, ids)
        for name in TARGETS:
            model.get_submodule(name).register_forward_hook(beside(name))
        expected, got = model.logits(pixels, ids), merged.logits(pixels, ids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_sum_in_float32_rounded_once(dtype, model, tmp_path):
    weights = {key: value.to(dtype) for key, value in model.state_dict().items()}
    lora = adapter_tensors(model)
    before = dict(weights)
    assert merge_lora(weights, write_adapter(tmp_path / "a", lora)) == len(TARGETS)
    adapted = {f"{name}.weight" for name in TARGETS}
    for key in weights.keys() - adapted:
        assert weights[key] is before[key]
    for name in TARGETS:
        A, B = (
            lora[f"base_model.model.{name}.lora_{x}.weight"].double().numpy() for x in ("A", "B")
        )
        key = f"{name}.weight"
        expected = before[key].double().numpy() + ALPHA / RANK * np.einsum("or,ri->oi", B, A)
        assert weights[key].dtype == dtype
        step = 2**-8 if dtype == torch.bfloat16 else 1e-6
        np.testing.assert_allclose(weights[key].double().numpy(), expected, rtol=step, atol=1e-6)


FIRST = f"base_model.model.{TARGETS[0]}.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({FIRST: None}, r"not pairs of lora_A and lora_B \(base_model.*q_proj.lora_B"),
        ({FIRST.replace("_A", "_B"): None}, r"not pairs of lora_A and lora_B \(base_model"),
        ({"base_model.model.projector.fc1.bias": torch.zeros(3)}, "not pairs .*fc1.bias"),
        ({FIRST: torch.zeros(RANK, 41)}, r"lora_A.weight \[4, 41\] and .*do not fit"),
        ({FIRST: torch.zeros(3, 40)}, r"\[3, 40\] and lora_B \[40, 4\].* at rank 4"),
        ({FIRST.replace("_A", "_B"): torch.zeros(40, 5)}, r"lora_B \[40, 5\] do not fit"),
        ({FIRST.replace("_A", "_B"): torch.zeros(39, 4)}, r"lora_B \[39, 4\] do not fit"),
        ({FIRST.replace("_A", "_B"): torch.zeros(40)}, r"lora_B \[40\] do not fit"),
        (
            {
                "base_model.model.head.lora_A.weight": torch.zeros(RANK, 2),
                "base_model.model.head.lora_B.weight": torch.zeros(2, RANK),
            },
            "adapts head.weight, which the model does not have",
        ),
        (
            {
                "base_model.model.vision_backbone.featurizer.patch_embed.proj.lora_A.weight": (
                    torch.zeros(RANK, 3, 8, 8)
                ),
                "base_model.model.vision_backbone.featurizer.patch_embed.proj.lora_B.weight": (
                    torch.zeros(24, RANK, 1, 1)
                ),
            },
            "do not fit vision_backbone.featurizer.patch_embed.proj.weight",
        ),
    ],
)
def test_a_bad_adapter_is_refused_by_name(changes, message, model, tmp_path):
    tensors = {**adapter_tensors(model), **changes}
    adapter = write_adapter(tmp_path / "a", {k: v for k, v in tensors.items() if v is not None})
    with pytest.raises(UserError, match=message) as caught:
        merge_lora(dict(model.state_dict()), adapter)
    assert one_line(caught).startswith(str(adapter / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rslora": True}, "use_rslora is not supported"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"rank_pattern": {"fc1": 8}}, "rank_pattern is not supported"),
        ({"alpha_pattern": {"fc1": 8}}, "alpha_pattern is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"r": None}, "keys r and lora_alpha: numbers wanted"),
        ({"r": 0}, "keys r and lora_alpha"),
        ({"lora_alpha": "16"}, "keys r and lora_alpha"),
    ],
)
def test_adapter_options_that_would_change_the_sum(changes, message, model, tmp_path):
    adapter = write_adapter(tmp_path / "a", adapter_tensors(model), **changes)
    with pytest.raises(UserError, match=message) as caught:
        merge_lora(dict(model.state_dict()), adapter)
    assert one_line(caught).startswith(str(adapter / "adapter_config.json"))


def test_a_folder_without_an_adapter(model, tmp_path):
    with pytest.raises(UserError, match=r"adapter_config.json: no such file"):
        merge_lora(dict(model.state_dict()), tmp_path)
    adapter = write_adapter(tmp_path / "a", adapter_tensors(model))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors: no such file"):
        merge_lora(dict(model.state_dict()), adapter)
    with pytest.raises(UserError, match="no lora_A key"):
        merge_lora({}, write_adapter(adapter, {}))


# ---------------------------------------------------------------- statistics


def entry(dim: int, state: int, offset: float = 0.0) -> dict[str, object]:
    def numbers(n: int) -> dict[str, list[float]]:
        names = ("mean", "std", "max", "min", "q01", "q99")
        return {name: [i + 0.1 * j + offset for j in range(n)] for i, name in enumerate(names)}

    mask = [True] * (dim - 1) + [False]
    return {
        "action": {**numbers(dim), "mask": mask},
        "proprio": numbers(state),
        "num_transitions": 100,
        "num_trajectories": 10,
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    document = {
        "libero_spatial_no_noops": entry(7, 8),
        "libero_object": entry(7, 8, 1),
        "libero_object_no_noops": entry(7, 8, 2),
        "aloha": entry(14, 14),
    }
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(document))
    (tmp_path / "config.json").write_text(json.dumps({"norm_stats": {"bridge": entry(7, 7)}}))
    return tmp_path


def tenths(start: float, n: int) -> tuple[float, ...]:
    return tuple(start + 0.1 * j for j in range(n))


def test_statistics_of_a_suite(folder):
    got = read_statistics(folder, "libero_object")
    assert got == Statistics(tenths(5, 7), tenths(6, 7), (True,) * 6 + (False,))


def test_a_suite_may_be_called_no_noops(folder):
    got = read_statistics(folder, "libero_spatial")
    assert got == read_statistics(folder, "libero_spatial_no_noops")
    assert got.low == tenths(4, 7)


def test_proprio_and_bounds_by_name(folder):
    proprio = read_statistics(folder, "libero_spatial", quantity="proprio", action_dim=8)
    assert proprio == Statistics(tenths(4, 8), tenths(5, 8), (True,) * 8)
    aloha = read_statistics(folder, "aloha", action_dim=14, low="min", high="max")
    assert (aloha.low, aloha.high) == (tenths(3, 14), tenths(2, 14))


def test_config_json_where_there_is_no_other_file(folder):
    with pytest.raises(UserError, match="no statistics of 'bridge'"):
        read_statistics(folder, "bridge")
    (folder / "dataset_statistics.json").unlink()
    assert read_statistics(folder, "bridge").low == tenths(4, 7)


def test_another_robots_statistics_are_refused(folder):
    with pytest.raises(UserError, match="aloha.action has 14 dimensions, expected 7") as caught:
        read_statistics(folder, "aloha")
    assert "another robot" in one_line(caught)
    assert str(folder / "dataset_statistics.json") in one_line(caught)


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        ("bridge", {}, "no statistics of 'bridge'; it has libero_spatial_no_noops, libero_object"),
        ("aloha", {"quantity": "state"}, "aloha has no 'state'; it has action, proprio"),
        ("aloha", {"low": "q05"}, "aloha.action: statistics: 'q05' is None; expected a list"),
    ],
)
def test_what_the_file_lacks_is_named(suite, options, message, folder):
    with pytest.raises(UserError, match=message) as caught:
        read_statistics(folder, suite, **options)
    assert one_line(caught).startswith(str(folder / "dataset_statistics.json"))


@pytest.mark.parametrize("value", [3, [1.0], {"action": 3}, {"action": [1.0]}, {"action": None}])
def test_a_damaged_entry_is_one_line(value, tmp_path):
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"suite": value}))
    with pytest.raises(UserError, match="dataset_statistics.json: suite.action: ") as caught:
        read_statistics(tmp_path, "suite")
    one_line(caught)


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize(
    "make", [lambda: L1Head(12, 3), lambda: ProprioProjector(12, 8)], ids=["l1", "proprio"]
)
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_a_head_from_its_published_file(make, prefix, tmp_path):
    head = randomise(make(), seed=2)
    file = tmp_path / "action_head--150000_checkpoint.pt"
    torch.save({prefix + k: v.bfloat16() for k, v in head.state_dict().items()}, file)
    loaded = load_head(make().train(), file)
    assert not loaded.training
    for key, value in loaded.state_dict().items():
        assert value.dtype == torch.float32  # the module's own
        assert torch.equal(value, head.state_dict()[key].bfloat16().float()), key


def no_tensor(state: dict[str, object]) -> None:
    state["module.fc1.bias"] = "text"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("module.fc1.bias"), "1 missing: fc1.bias"),
        (lambda s: s.update({"module.fc3.bias": torch.zeros(2)}), "1 unexpected: fc3.bias"),
        (
            lambda s: s.update({"module.fc1.weight": torch.zeros(12, 14)}),
            r"fc1.weight \(file \[12, 14\], model \[12, 8\]\)",
        ),
        (no_tensor, "module.fc1.bias is a str; expected a tensor"),
    ],
)
def test_a_head_that_does_not_fit(change, message, tmp_path):
    state = {f"module.{k}": v for k, v in ProprioProjector(12).state_dict().items()}
    change(state)
    file = tmp_path / "proprio_projector.pt"
    torch.save(state, file)
    with pytest.raises(UserError, match=message) as caught:
        load_head(ProprioProjector(12), file)
    assert one_line(caught).startswith(str(file))


class Payload:
    """A pickled object of a class of our own: code, as far as a loader is concerned."""


def test_a_file_that_is_no_head(tmp_path):
    file = tmp_path / "head.pt"
    with pytest.raises(UserError, match="head.pt: no such file"):
        load_head(ProprioProjector(12), file)
    file.write_bytes(b"not a checkpoint" * 9)
    with pytest.raises(UserError, match=r"head.pt: not a PyTorch checkpoint, or cut short"):
        load_head(ProprioProjector(12), file)
    torch.save({"module.fc1.weight": Payload()}, file)
    with pytest.raises(UserError, match=r"head.pt: unreadable .*Payload") as caught:
        load_head(ProprioProjector(12), file)
    one_line(caught)
