"""The policy network: parity of its parts with transformers, and how its tokens see each other."""

import pytest
import torch
from torch import Tensor

from worldloop.engine.policy.heads import L1Head, ProprioProjector
from worldloop.engine.policy.llama import LlamaConfig, LlamaTrunk
from worldloop.engine.policy.openvla_oft import (
    PRESETS,
    OpenVLAOFT,
    encode_bytes,
    pad_prompts,
    prompt_ids,
    tiny_config,
)
from worldloop.engine.policy.vision import (
    DINOV2_TINY,
    SIGLIP_TINY,
    VisionBackbone,
    ViT,
    normalise_frames,
)
from worldloop.errors import UserError

PARITY = 1e-5  # relative L2, float32


def randomise(module: torch.nn.Module, scale: float = 0.1) -> None:
    """Noise on every parameter; those of one axis (norms, scales, biases) around one half."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator) + 0.5 * (p.dim() == 1))


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def model() -> OpenVLAOFT:
    model = OpenVLAOFT(PRESETS["tiny"]())
    model.init_weights(seed=3)
    return model.eval()


@pytest.fixture(scope="module")
def inputs(model) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 6, 64, 64, generator=generator)
    ids, mask = pad_prompts([prompt_ids("push the cube", model.config)] * 2, model.config)
    assert mask is None
    return pixels, ids


# ---------------------------------------------------------------- against other implementations


def test_dinov2_tower_against_transformers():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    tower = ViT(DINOV2_TINY)
    randomise(tower)
    theirs = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=64,
            patch_size=8,
            num_register_tokens=4,
            layer_norm_eps=1e-6,
        )
    ).eval()
    own = tower.state_dict()
    no_cls_position = torch.zeros(1, 1, 96)
    state = {
        "embeddings.cls_token": own["cls_token"],
        "embeddings.register_tokens": own["reg_token"],
        "embeddings.mask_token": torch.zeros(1, 96),
        "embeddings.position_embeddings": torch.cat([no_cls_position, own["pos_embed"]], 1),
        "layernorm.weight": own["norm.weight"],
        "layernorm.bias": own["norm.bias"],
    }
    # The attention's four layers have other names in newer releases of transformers.
    *qkv_names, out_name = (
        ("q_proj", "k_proj", "v_proj", "o_proj")
        if "encoder.layer.0.attention.q_proj.weight" in theirs.state_dict()
        else ("attention.query", "attention.key", "attention.value", "output.dense")
    )
    for leaf in ("weight", "bias"):
        state[f"embeddings.patch_embeddings.projection.{leaf}"] = own[f"patch_embed.proj.{leaf}"]
        for i in range(4):
            ours, layer = f"blocks.{i}", f"encoder.layer.{i}"
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{layer}.{name}.{leaf}"] = own[f"{ours}.{name}.{leaf}"]
            qkv = own[f"{ours}.attn.qkv.{leaf}"].chunk(3)
            for name, part in zip(qkv_names, qkv):
                state[f"{layer}.attention.{name}.{leaf}"] = part
            state[f"{layer}.attention.{out_name}.{leaf}"] = own[f"{ours}.attn.proj.{leaf}"]
            for n in (1, 2):
                scale = own[f"{ours}.ls{n}.scale_factor"]
                state[f"{layer}.layer_scale{n}.lambda1"] = scale
    theirs.load_state_dict(state, strict=True)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[3][:, 5:]
        assert relative(tower(pixels), expected) <= PARITY


def test_siglip_tower_against_transformers():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    tower = ViT(SIGLIP_TINY)
    randomise(tower)
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=478,
            image_size=64,
            patch_size=8,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            vision_use_head=False,
        )
    ).eval()
    own = tower.state_dict()
    state = {"embeddings.position_embedding.weight": own["pos_embed"][0]}
    for leaf in ("weight", "bias"):
        state[f"embeddings.patch_embedding.{leaf}"] = own[f"patch_embed.proj.{leaf}"]
        state[f"post_layernorm.{leaf}"] = own[f"norm.{leaf}"]
        for i in range(4):
            ours, layer = f"blocks.{i}", f"encoder.layers.{i}"
            for name, other in (
                ("norm1", "layer_norm1"),
                ("norm2", "layer_norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
                ("attn.proj", "self_attn.out_proj"),
            ):
                state[f"{layer}.{other}.{leaf}"] = own[f"{ours}.{name}.{leaf}"]
            qkv = own[f"{ours}.attn.qkv.{leaf}"].chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), qkv):
                state[f"{layer}.self_attn.{name}.{leaf}"] = part
    prefix = "vision_model." if "vision_model.post_layernorm.bias" in theirs.state_dict() else ""
    theirs.load_state_dict({prefix + key: value for key, value in state.items()}, strict=True)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[3]
        assert relative(tower(pixels), expected) <= PARITY


@pytest.mark.parametrize("padded", [False, True])
def test_llama_against_transformers_with_a_bidirectional_mask(padded):
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaModel

    config = LlamaConfig(width=64, depth=3, heads=4, mlp_width=96, vocab_rows=50)
    trunk = LlamaTrunk(config)
    randomise(trunk)
    theirs = LlamaModel(
        TheirConfig(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=96,
            vocab_size=50,
            rms_norm_eps=1e-6,
            attn_implementation="eager",
        )
    ).eval()
    theirs.load_state_dict(trunk.state_dict(), strict=True)
    x = torch.randn(2, 17, 64)
    mask = torch.ones(2, 17, dtype=torch.bool)
    if padded:
        mask[1, 4:9] = False
    bias = torch.zeros(2, 1, 17, 17).masked_fill(~mask[:, None, None], -1e30)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = theirs(
            inputs_embeds=x, attention_mask=bias, position_ids=positions, use_cache=False
        ).last_hidden_state
        got = trunk(x, mask if padded else None)
        causal = theirs(inputs_embeds=x, use_cache=False).last_hidden_state
    assert relative(got[mask], expected[mask]) <= PARITY
    assert relative(got[mask], causal[mask]) > 0.01  # stock Llama is another model


# ---------------------------------------------------------------- the whole network


def test_logits_shape_and_the_7b_slice(model, inputs):
    with torch.no_grad():
        logits = model.logits(*inputs)
    assert logits.shape == (2, 56, 256) and logits.dtype == torch.float32
    published = PRESETS["7b"]()
    assert published.llama.eps == 1e-6  # transformers' default, not Llama-2's
    assert published.first_action_id == 31744 and published.llama.vocab_rows == 32064


@torch.no_grad()
def test_logits_are_those_of_the_sequence_written_out(model, inputs):
    """The same sequence put together by hand, all logits, shifted by one token."""
    pixels, ids = inputs
    trunk, config = model.language_model.model, model.config
    patches = model.projector(model.vision_backbone(pixels))
    text, stop = trunk.embed_tokens(ids), trunk.embed_tokens(torch.full((2, 1), 2))
    sequence = [text[:, :1], patches, text[:, 1:], torch.zeros(2, 56, config.llama.width), stop]
    every = model.language_model.lm_head(trunk(torch.cat(sequence, 1)))
    expected = every[:, -58:-2, config.first_action_id : config.first_action_id + 256]
    torch.testing.assert_close(model.logits(pixels, ids), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dropping_stop_changes_logits(model, inputs):
    assert relative(model.logits(*inputs, stop=False), model.logits(*inputs)) > 1e-3


@torch.no_grad()
def test_padding_and_batch_mates_do_not_change_logits(model, inputs):
    pixels, _ = inputs
    config = model.config
    prompts = [prompt_ids(text, config) for text in ("lift it", "push the cube to the far goal")]
    ids, mask = pad_prompts(prompts, config, length=140)
    together = model.logits(pixels, ids, mask)
    for row, prompt in enumerate(prompts):
        alone = model.logits(pixels[row : row + 1], torch.tensor([prompt]))[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)
    ids[~mask] = 77  # what stands in the padding is never read
    torch.testing.assert_close(model.logits(pixels, ids, mask), together)


@torch.no_grad()
def test_two_images_and_both_towers_count(model, inputs):
    pixels, ids = inputs
    plain = model.logits(pixels, ids)
    for channels in (slice(0, 3), slice(3, 6)):
        other = pixels.clone()
        other[:, channels] = 0
        assert relative(model.logits(other, ids), plain) > 1e-3
    double = model.vision_backbone(torch.cat([pixels, pixels.flip(0)], 1))
    assert double.shape == (2, 128, 224)
    torch.testing.assert_close(double[:, :64], model.vision_backbone(pixels))
    torch.testing.assert_close(double[:, 64:], model.vision_backbone(pixels.flip(0)))


def test_heads_and_proprio(model, inputs):
    head, proprio = L1Head(192), ProprioProjector(192, state_dim=8)
    token = proprio(torch.randn(2, 8))
    hidden = model.hidden(*inputs, proprio_B1D=token)
    actions = head(hidden)
    assert actions.shape == (2, 8, 7)
    assert relative(hidden, model.hidden(*inputs)) > 1e-4
    # One step's action comes from that step's seven tokens, side by side.
    torch.testing.assert_close(head.model(hidden[:, 7:14].flatten(1)), actions[:, 1])
    with pytest.raises(UserError, match="multiple of 7"):
        head(hidden[:, :5])
    with pytest.raises(UserError, match=r"expected \[B, 8\]"):
        proprio(torch.randn(2, 7))


def test_published_head_keys():
    with torch.device("meta"):
        head, proprio = L1Head(4096), ProprioProjector(4096)
    shapes = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    assert shapes["model.fc1.weight"] == (4096, 28672)
    assert shapes["model.mlp_resnet_blocks.1.ffn.1.weight"] == (4096, 4096)
    assert shapes["model.mlp_resnet_blocks.0.ffn.0.bias"] == (4096,)
    assert shapes["model.fc2.weight"] == (7, 4096) and len(shapes) == 16
    assert set(proprio.state_dict()) == {f"fc{i}.{x}" for i in (1, 2) for x in ("weight", "bias")}


def test_recomputation_gives_the_same_gradients(inputs):
    grads = []
    for recompute in (False, True):
        model = OpenVLAOFT(tiny_config(chunk=2))
        model.init_weights()
        model.logits(*inputs, checkpoint_blocks=recompute).square().mean().backward()
        grads.append(model.projector.fc1.weight.grad)
    torch.testing.assert_close(*grads)


def test_frames_are_normalised_with_the_published_figures():
    frames = torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8)
    frames[..., 0] = 255
    pixels = normalise_frames(frames)
    assert pixels.shape == (1, 6, 2, 2)
    expected = [
        (1 - 0.484375) / 0.228515625, -0.455078125 / 0.2236328125, -0.40625 / 0.224609375, 1, -1, -1
    ]  # fmt: skip
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor(expected))
    with pytest.raises(UserError, match="uint8"):
        normalise_frames(frames.float())


def test_prompts():
    config = PRESETS["tiny"]()
    text = "In: What action should the robot take to lift it?\nOut:"
    ids = prompt_ids("Lift it", config)
    assert bytes(i - 3 for i in ids[1:-1]).decode() == text
    assert ids[0] == 1 and ids[-1] == config.space_id
    # A tokenizer that already ends in the lone space gets no second one.
    spaced = prompt_ids("Lift it", config, lambda t: encode_bytes(t + " "))
    assert spaced == ids
    with pytest.raises(UserError, match="empty"):
        prompt_ids("  ", config)
    with pytest.raises(UserError, match="BOS"):
        prompt_ids("a", config, lambda t: [5, 6])
    with pytest.raises(UserError, match="515 ids"):
        prompt_ids("a", config, lambda t: [1, 31000])
    with pytest.raises(UserError, match="length allows 3"):
        pad_prompts([ids], config, length=3)


def test_bad_inputs_name_the_argument(model, inputs):
    pixels, ids = inputs
    for match, call in (
        ("expected .B, 3, 64, 64", lambda: model.logits(pixels[..., :32], ids)),
        ("6.images", lambda: model.logits(pixels[:, :5], ids)),
        ("1 rows", lambda: model.logits(pixels[:1], ids)),
        ("int64", lambda: model.logits(pixels, ids.float())),
        ("mask_BP", lambda: model.logits(pixels, ids, ids)),
        ("proprio_B1D", lambda: model.logits(pixels, ids, proprio_B1D=pixels)),
    ):
        with pytest.raises(UserError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_tiny_is_small_and_backbone_composes():
    config = PRESETS["tiny"]()
    with torch.device("meta"):
        model = OpenVLAOFT(config)
        backbone = VisionBackbone(config.dino, config.siglip)
    assert 2 * sum(p.numel() for p in model.parameters()) <= 12e6
    assert set(backbone.state_dict()) == set(model.vision_backbone.state_dict())
