"""OpenVLA checkpoints: the published key list, shards there and back, and every way to be wrong."""

import json
import math
from pathlib import Path

import pytest
import torch
from networks import SMALL_OPENVLA as SMALL
from torch import Tensor

from worldloop.checkpoint import load_tensors, save_tensors
from worldloop.engine.formats.openvla import (
    INDEX,
    STATISTICS,
    load_openvla,
    read_shards,
    save_openvla,
)
from worldloop.engine.policy.openvla_oft import PRESETS, OpenVLAOFT
from worldloop.errors import UserError

VALUE_HEAD = {
    "value_head.mlp.0.weight": (512, 40),
    "value_head.mlp.0.bias": (512,),
    "value_head.mlp.2.weight": (128, 512),
    "value_head.mlp.2.bias": (128,),
    "value_head.mlp.4.weight": (1, 128),
}


def random_model(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> OpenVLAOFT:
    model = OpenVLAOFT(SMALL)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model.to(dtype).eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of several shards, bfloat16 as published."""
    save_openvla(random_model(), tmp_path / "openvla", shard_bytes=40_000)
    return tmp_path / "openvla"


def change_json(path: Path, **changes: object) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (document | changes).items() if v is not None}))


def change_shard(folder: Path, remove: str = "", add: dict[str, Tensor] | None = None) -> str:
    """Rewrite the shard that holds `remove` (or the first), the index not; its name."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    name = weight_map.get(remove) or min(weight_map.values())
    tensors = load_tensors(folder / name)
    tensors.pop(remove, None)
    save_tensors(folder / name, {**{k: v.clone() for k, v in tensors.items()}, **(add or {})})
    return name


def to_one_file(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """The same checkpoint as model.safetensors without an index, tensors replaced or removed."""
    tensors = {**read_shards(folder), **changes}
    save_tensors(folder / "model.safetensors", {k: v for k, v in tensors.items() if v is not None})
    (folder / INDEX).unlink()


def assert_same(a: OpenVLAOFT, b: OpenVLAOFT) -> None:
    own, other = a.state_dict(), b.state_dict()
    assert own.keys() == other.keys()
    for key in own:
        assert own[key].dtype == other[key].dtype and torch.equal(own[key], other[key]), key


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------- the published key list


@pytest.fixture(scope="module")
def published() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = OpenVLAOFT(PRESETS["7b"]())
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def expected_keys() -> dict[str, tuple[int, ...]]:
    """The tensors of openvla-7b, family by family, written out independently of the network."""
    out: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        out[f"{name}.weight"] = (rows, columns)
        if bias:
            out[f"{name}.bias"] = (rows,)

    def norm(name: str, width: int) -> None:
        out[f"{name}.weight"] = out[f"{name}.bias"] = (width,)

    def tower(name: str, width: int, hidden: int, blocks: int, scales: bool) -> None:
        out[f"{name}.pos_embed"] = (1, 256, width)
        out[f"{name}.patch_embed.proj.weight"] = (width, 3, 14, 14)
        out[f"{name}.patch_embed.proj.bias"] = (width,)
        for i in range(blocks):
            block = f"{name}.blocks.{i}"
            norm(f"{block}.norm1", width)
            norm(f"{block}.norm2", width)
            linear(f"{block}.attn.qkv", 3 * width, width)
            linear(f"{block}.attn.proj", width, width)
            linear(f"{block}.mlp.fc1", hidden, width)
            linear(f"{block}.mlp.fc2", width, hidden)
            if scales:
                out[f"{block}.ls1.scale_factor"] = out[f"{block}.ls2.scale_factor"] = (width,)
        norm(f"{name}.norm", width)

    dino, siglip = "vision_backbone.featurizer", "vision_backbone.fused_featurizer"
    tower(dino, 1024, 4096, 24, scales=True)
    out[f"{dino}.cls_token"], out[f"{dino}.reg_token"] = (1, 1, 1024), (1, 4, 1024)
    tower(siglip, 1152, 4304, 27, scales=False)
    pool = f"{siglip}.attn_pool"
    out[f"{pool}.latent"] = (1, 1, 1152)
    linear(f"{pool}.q", 1152, 1152)
    linear(f"{pool}.kv", 2304, 1152)
    linear(f"{pool}.proj", 1152, 1152)
    norm(f"{pool}.norm", 1152)
    linear(f"{pool}.mlp.fc1", 4304, 1152)
    linear(f"{pool}.mlp.fc2", 1152, 4304)
    linear("projector.fc1", 8704, 2176)
    linear("projector.fc2", 4096, 8704)
    linear("projector.fc3", 4096, 4096)
    out["language_model.lm_head.weight"] = (32064, 4096)
    out["language_model.model.embed_tokens.weight"] = (32064, 4096)
    out["language_model.model.norm.weight"] = (4096,)
    for i in range(32):
        layer = f"language_model.model.layers.{i}"
        for name in "qkvo":
            linear(f"{layer}.self_attn.{name}_proj", 4096, 4096, bias=False)
        linear(f"{layer}.mlp.gate_proj", 11008, 4096, bias=False)
        linear(f"{layer}.mlp.up_proj", 11008, 4096, bias=False)
        linear(f"{layer}.mlp.down_proj", 4096, 11008, bias=False)
        out[f"{layer}.input_layernorm.weight"] = (4096,)
        out[f"{layer}.post_attention_layernorm.weight"] = (4096,)
    return out


def test_982_tensors_and_their_parameters(published):
    assert len(published) == 982
    assert sum(map(math.prod, published.values())) == 7_541_237_184


def test_every_published_key_and_shape(published):
    assert published == expected_keys()


@pytest.mark.parametrize(
    ("prefix", "count"),
    [
        ("vision_backbone.featurizer.", 343),
        ("vision_backbone.fused_featurizer.", 342),
        ("projector.", 6),
        ("language_model.", 291),
    ],
)
def test_size_of_each_family(published, prefix, count):
    assert sum(key.startswith(prefix) for key in published) == count


# ---------------------------------------------------------------- shards there and back


@pytest.mark.parametrize("shard_bytes", [1, 40_000, 10**9])
def test_save_and_load_again(shard_bytes, tmp_path):
    model = random_model()
    save_openvla(model, tmp_path, shard_bytes=shard_bytes)
    document = json.loads((tmp_path / INDEX).read_text())
    names = sorted(set(document["weight_map"].values()))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in
                     range(1, len(names) + 1)]  # fmt: skip
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == names
    count = {1: len(model.state_dict()), 10**9: 1}.get(shard_bytes, len(names))
    assert len(names) == count and (shard_bytes != 40_000 or 2 < count < 20)
    total = 2 * sum(p.numel() for p in model.parameters())
    assert document["metadata"]["total_size"] == total

    loaded = load_openvla(tmp_path)
    assert loaded.config == SMALL and not loaded.training
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    assert_same(loaded, model)


def test_dtype_of_storage_and_of_use(tmp_path):
    model = random_model(dtype=torch.float32)
    save_openvla(model, tmp_path)
    assert_same(load_openvla(tmp_path, dtype=torch.float32), model)
    assert_same(load_openvla(tmp_path), model.bfloat16())
    save_openvla(random_model(dtype=torch.float32), tmp_path, dtype=torch.bfloat16)
    assert {v.dtype for v in read_shards(tmp_path).values()} == {torch.bfloat16}


def test_a_save_replaces_the_earlier_one(folder):
    model = random_model(seed=1)
    save_openvla(model, folder, shard_bytes=60_000, statistics={"suite": {}})
    assert_same(load_openvla(folder), model)
    assert json.loads((folder / STATISTICS).read_text()) == {"suite": {}}


def test_a_half_written_folder_does_not_load(folder):
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match="no such file") as caught:
        load_openvla(folder)
    assert str(folder / INDEX) in one_line(caught)


def test_one_file_without_an_index(folder):
    to_one_file(folder, {})
    assert_same(load_openvla(folder), random_model())


def test_chunk_and_action_dimension_are_the_callers(folder):
    assert load_openvla(folder).config.action_tokens == 14
    aloha = load_openvla(folder, action_dim=14, chunk=25).config
    assert (aloha.action_dim, aloha.chunk, aloha.action_tokens) == (14, 25, 350)


def test_value_head_of_rlinf_may_be_there(folder):
    extra = {key: torch.ones(shape) for key, shape in VALUE_HEAD.items()}
    save_tensors(folder / "value.safetensors", extra)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    weight_map |= dict.fromkeys(extra, "value.safetensors")
    change_json(folder / INDEX, weight_map=weight_map)
    assert_same(load_openvla(folder), random_model())


# ---------------------------------------------------------------- wrong tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector.fc2.bias": None}, "1 missing: projector.fc2.bias"),
        ({"projector.fc4.bias": torch.zeros(3)}, "1 unexpected: projector.fc4.bias"),
        ({"value_head.mlp.4.bias": torch.zeros(1)}, "1 unexpected: value_head.mlp.4.bias"),
        ({"value_head.fc.weight": torch.zeros(1, 1)}, "1 unexpected: value_head.fc.weight"),
        (
            {"vision_backbone.featurizer.blocks.0.ls1.gamma": torch.ones(24)},
            "unexpected: vision_backbone.featurizer.blocks.0.ls1.gamma",
        ),
        (
            {"language_model.lm_head.weight": torch.zeros(300, 40)},
            r"lm_head.weight \(file \[300, 40\], model \[320, 40\]\)",
        ),
    ],
)
def test_a_foreign_tensor_is_refused_by_name(changes, message, folder):
    to_one_file(folder, changes)
    with pytest.raises(UserError, match=message) as caught:
        load_openvla(folder)
    assert str(folder) in one_line(caught) and "build the model from the" in one_line(caught)


def test_a_shard_that_lacks_what_the_index_lists(folder):
    name = change_shard(folder, remove="projector.fc1.weight")
    with pytest.raises(UserError, match=r"lacks projector.fc1.weight \(1 in all\)") as caught:
        load_openvla(folder)
    assert str(folder / name) in one_line(caught) and "download both again" in one_line(caught)


def test_a_shard_that_holds_what_the_index_does_not_list(folder):
    name = change_shard(folder, add={"extra.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"also holds extra.weight \(1 in all\)") as caught:
        load_openvla(folder)
    assert str(folder / name) in one_line(caught)


def test_a_key_missing_from_the_index(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    name = weight_map.pop("language_model.lm_head.weight")
    change_json(folder / INDEX, weight_map=weight_map)
    with pytest.raises(UserError, match="also holds language_model.lm_head.weight") as caught:
        load_openvla(folder)
    assert str(folder / name) in one_line(caught)


def test_missing_and_truncated_shards(folder):
    name = min(path.name for path in folder.glob("*.safetensors"))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-100])
    with pytest.raises(UserError, match=f"{name}: truncated.*copy it again"):
        load_openvla(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file") as caught:
        load_openvla(folder)
    one_line(caught)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "key 'weight_map' must be an object; download the file again"),
        ({}, "key 'weight_map' must be an object"),
        ([1], "key 'weight_map' must be an object"),
        ({"a": "../other.safetensors"}, "'../other.safetensors' is not a plain file name"),
        ({"a": "/etc/passwd"}, "'/etc/passwd' is not a plain file name"),
        ({"a": "x.safetensors", "b": 3}, "3 is not a plain file name"),
        ({"a": ["x.safetensors"]}, "is not a plain file name"),
    ],
)
def test_a_bad_index_is_refused(weight_map, message, folder):
    change_json(folder / INDEX, weight_map=weight_map)
    with pytest.raises(UserError, match=message) as caught:
        load_openvla(folder)
    assert str(folder / INDEX) in one_line(caught)
