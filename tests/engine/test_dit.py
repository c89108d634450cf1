"""The transformer against masked attention, independent arithmetic and its published shapes.

Against diffusers: test_formats_diffusers.py.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from networks import randomised, relative_l2
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from worldloop.engine import dit_layers
from worldloop.engine.dit import PRESETS, DiT, DiTConfig
from worldloop.engine.rope import rope_table
from worldloop.errors import UserError

SMALL = DiTConfig(
    width=64,
    depth=3,
    heads=2,
    adaln_rank=16,
    context_dim=24,
    action_dim=7,
    action_layout="per_frame",
)


def random_inputs(config: DiTConfig, B: int, frames: int, H: int, W: int, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, config.latent_channels, frames, H, W, generator=g)
    t = torch.rand(B, frames, generator=g)
    actions = torch.randn(B, 4 * frames, config.action_dim, generator=g)
    return x, t, actions


# Published shapes -------------------------------------------------------------------------------


def published_2b() -> dict[str, tuple[int, ...]]:
    """Every weight of the action-conditioned 2B checkpoint, without its `net.` prefix."""
    D, rank = 2048, 256
    keys: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.1.weight": (D, 72),
        "t_embedder.1.linear_1.weight": (D, D),
        "t_embedder.1.linear_2.weight": (3 * D, D),
        "t_embedding_norm.weight": (D,),
        "final_layer.adaln_modulation.1.weight": (rank, D),
        "final_layer.adaln_modulation.2.weight": (2 * D, rank),
        "final_layer.linear.weight": (64, D),
    }
    for name, out in (("action_embedder_B_D", D), ("action_embedder_B_3D", 3 * D)):
        keys |= {f"{name}.fc1.weight": (4 * D, 84), f"{name}.fc1.bias": (4 * D,)}
        keys |= {f"{name}.fc2.weight": (out, 4 * D), f"{name}.fc2.bias": (out,)}
    for i in range(28):
        block = f"blocks.{i}."
        for attention, source in (("self_attn", D), ("cross_attn", 1024)):
            for name in ("q_proj", "output_proj"):
                keys[f"{block}{attention}.{name}.weight"] = (D, D)
            for name in ("k_proj", "v_proj"):
                keys[f"{block}{attention}.{name}.weight"] = (D, source)
            for name in ("q_norm", "k_norm"):
                keys[f"{block}{attention}.{name}.weight"] = (128,)
        keys[f"{block}mlp.layer1.weight"] = (4 * D, D)
        keys[f"{block}mlp.layer2.weight"] = (D, 4 * D)
        for part in ("self_attn", "cross_attn", "mlp"):
            keys[f"{block}adaln_modulation_{part}.1.weight"] = (rank, D)
            keys[f"{block}adaln_modulation_{part}.2.weight"] = (3 * D, rank)
    return keys


def test_2b_has_the_published_keys_and_parameters():
    with torch.device("meta"):
        state = DiT(PRESETS["2b"]()).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published_2b()
    assert sum(value.numel() for value in state.values()) == 2_024_923_136


def test_14b_constructs_and_runs_on_meta():
    with torch.device("meta"):
        dit = DiT(PRESETS["14b"]())
        out = dit(torch.empty(1, 16, 2, 12, 20), torch.empty(1, 2))
    assert out.sample.shape == (1, 16, 2, 12, 20)
    assert 14.0e9 < sum(p.numel() for p in dit.parameters()) < 14.5e9


# Exact savings and conditioning -----------------------------------------------------------------


def test_skipping_null_cross_attention_is_exact():
    dit = randomised(DiT(SMALL)).eval()
    x, t, actions = random_inputs(SMALL, 2, 3, 6, 8)
    with torch.no_grad():
        skipped = dit(x, t, actions).sample
        computed = dit(x, t, actions, skip_null_context=False).sample
        other = dit(x, t, actions, context=torch.randn(1, 5, 24)).sample
    assert torch.equal(skipped, computed)
    assert not torch.allclose(skipped, other)


def embeddings(dit: DiT, *args: Tensor | None, **kwargs: object) -> tuple[Tensor, Tensor]:
    """What a call hands to its first block: e [B,G,D] and the shared modulation [B,G,3D]."""
    seen: list[tuple[Tensor, ...]] = []
    hook = dit.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    with torch.no_grad():
        dit(*args, **kwargs)
    hook.remove()
    return seen[0][1], seen[0][2]


def independent_embeddings(
    dit: DiT, t: Tensor, poses: Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """The same in float64 numpy; poses [B,G,features] already grouped."""
    w = {k: v.double().numpy() for k, v in dit.state_dict().items()}
    half = dit.config.width // 2
    angles = t.double().numpy()[..., None] * 10000.0 ** (-np.arange(half) / half)
    s = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    hidden = s @ w["t_embedder.1.linear_1.weight"].T
    shared = (hidden / (1 + np.exp(-hidden))) @ w["t_embedder.1.linear_2.weight"].T
    for name in ("action_embedder_B_D", "action_embedder_B_3D"):
        if poses is None:
            continue
        u = poses.double().numpy() @ w[f"{name}.fc1.weight"].T + w[f"{name}.fc1.bias"]
        u = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        out = u @ w[f"{name}.fc2.weight"].T + w[f"{name}.fc2.bias"]
        s, shared = (s + out, shared) if name.endswith("B_D") else (s, shared + out)
    e = s / np.sqrt((s**2).mean(-1, keepdims=True) + 1e-6) * w["t_embedding_norm.weight"]
    return e, shared


def test_action_embedding_per_frame_and_observed():
    dit = randomised(DiT(SMALL)).eval()
    x, t, actions = random_inputs(SMALL, 2, 3, 4, 4)
    e, shared = embeddings(dit, x, t, actions)
    e64, shared64 = independent_embeddings(dit, t, actions.reshape(2, 3, 28))
    assert relative_l2(e, torch.from_numpy(e64)) < 1e-6
    assert relative_l2(shared, torch.from_numpy(shared64)) < 1e-6

    # A leading observed frame has the embedding of no action; the others are unchanged.
    mixed = embeddings(dit, x, t, actions[:, 4:], observed_frames=1)
    silent = independent_embeddings(dit, t, None)
    for got, acted, none in zip(mixed, (e, shared), silent, strict=True):
        assert relative_l2(got[:, 0], torch.from_numpy(none[:, 0])) < 1e-6
        assert relative_l2(got[:, 1:], acted[:, 1:]) < 1e-6


def test_action_embedding_of_a_whole_chunk():
    config = dataclasses.replace(SMALL, action_layout="chunk", chunk_actions=12)
    dit = randomised(DiT(config)).eval()
    x, t, _ = random_inputs(config, 2, 4, 4, 4)
    actions = torch.randn(2, 12, 7)
    e, shared = embeddings(dit, x, t, actions)
    e64, shared64 = independent_embeddings(dit, t, actions.reshape(2, 1, 84))
    assert relative_l2(e, torch.from_numpy(e64)) < 1e-6
    assert relative_l2(shared, torch.from_numpy(shared64)) < 1e-6


# History ----------------------------------------------------------------------------------------


def masked_attention(mask_NN: Tensor):
    """Plain attention under a mask, to stand in for the fused one in a full computation."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return scores.masked_fill(~mask_NN, -torch.inf).softmax(-1) @ v

    return attend


def block_causal_mask(blocks: Sequence[int], tokens_per_frame: int) -> Tensor:
    """True where a token (row) may look: its own block of frames and everything before."""
    block_of = torch.repeat_interleave(
        torch.arange(len(blocks)), torch.tensor(blocks) * tokens_per_frame
    )
    return block_of[:, None] >= block_of[None, :]


def run_in_blocks(dit: DiT, x, t, actions, blocks, positions_as_tensor=False):
    """Block after block, each seeing the keys and values of all before it."""
    outputs, history, first = [], None, 0
    for i, frames in enumerate(blocks):
        part = slice(first, first + frames)
        out = dit(
            x[:, :, part],
            t[:, part],
            None if i == 0 else actions[:, 4 * first : 4 * (first + frames)],
            first_frame=torch.arange(first, first + frames) if positions_as_tensor else first,
            history=history,
        )
        outputs.append(out.sample)
        history = (
            out.kv
            if history is None
            else [
                (torch.cat([hk, k], 1), torch.cat([hv, v], 1))
                for (hk, hv), (k, v) in zip(history, out.kv, strict=True)
            ]
        )
        first += frames
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("blocks", [(1, 2, 2), (1, 4), (2, 1, 1, 1)])
def test_cached_calls_equal_one_masked_computation(blocks, monkeypatch):
    dit = randomised(DiT(SMALL)).double().eval()
    x, t, actions = (a.double() for a in random_inputs(SMALL, 2, 5, 6, 4))
    parameters = [p for name, p in dit.named_parameters() if "cross_attn" not in name]  # skipped
    cached = run_in_blocks(dit, x, t, actions, blocks)
    cached_grads = torch.autograd.grad(cached.square().sum(), parameters)
    by_tensor = run_in_blocks(dit, x, t, actions, blocks, positions_as_tensor=True)
    assert torch.equal(cached, by_tensor)

    mask = block_causal_mask(blocks, tokens_per_frame=6)
    monkeypatch.setattr(dit_layers.F, "scaled_dot_product_attention", masked_attention(mask))
    full = dit(x, t, actions[:, 4 * blocks[0] :], observed_frames=blocks[0]).sample
    full_grads = torch.autograd.grad(full.square().sum(), parameters)
    assert relative_l2(cached, full) < 1e-6
    for a, b in zip(cached_grads, full_grads, strict=True):
        assert relative_l2(a, b) < 1e-5


def test_rows_do_not_see_each_other():
    dit = randomised(DiT(SMALL)).eval()
    x, t, actions = random_inputs(SMALL, 3, 2, 4, 4)
    with torch.no_grad():
        together = dit(x, t, actions).sample
        alone = dit(x[1:2], t[1:2], actions[1:2]).sample
    assert relative_l2(together[1:2], alone) < 1e-6


# Arithmetic -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "bfloat16", "bfloat16_exponents"])
def test_rope_angles_and_their_rounding(name):
    config = dataclasses.replace(SMALL, rope_dtype=name, rope_ratio_hwt=(3.0, 2.0, 0.5))
    cos, sin = rope_table(config, torch.tensor([5, 9]), 3, 4)
    assert cos.shape == (2 * 3 * 4, config.head_dim // 2) and cos.dtype == torch.float32

    def bf16(value: float) -> float:
        return torch.tensor(value, dtype=torch.float32).bfloat16().item()

    round_all = bf16 if name == "bfloat16" else float
    round_exponent = float if name == "float32" else bf16
    side = config.head_dim // 6 * 2
    axes = [  # (position of token (frame 1, row 2, column 3), dimensions, ratio)
        (9, config.head_dim - 2 * side, 0.5),
        (2, side, 3.0),
        (3, side, 2.0),
    ]
    expected = []
    for position, dim, ratio in axes:
        theta = round_all(10000.0 * ratio ** (dim / (dim - 2)))
        for i in range(dim // 2):
            exponent = round_exponent(np.float32(2 * i / dim))
            frequency = round_all(1.0 / round_all(theta**exponent))
            expected.append(round_all(position * frequency))
    token = (1 * 3 + 2) * 4 + 3
    np.testing.assert_allclose(cos[token], np.cos(expected), atol=2e-6)
    np.testing.assert_allclose(sin[token], np.sin(expected), atol=2e-6)


def test_bfloat16_forward_is_close_to_float32():
    dit = randomised(DiT(SMALL)).eval()
    x, t, actions = random_inputs(SMALL, 2, 2, 6, 6)
    t = t.bfloat16().float()  # the network rounds its noise levels to its own dtype
    with torch.no_grad():
        exact = dit(x, t, actions).sample
        out = dit.to(torch.bfloat16)(x, t, actions)
    assert out.sample.dtype == out.kv[0][0].dtype == torch.bfloat16
    assert relative_l2(out.sample, exact) < 0.03


def test_autocast_and_block_checkpointing_train():
    dit = randomised(DiT(SMALL))
    x, t, actions = random_inputs(SMALL, 1, 2, 4, 4)
    parameters = [p for n, p in dit.named_parameters() if "cross_attn" not in n]

    def grads(**options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(dit(x, t, actions, **options).sample.square().sum(), parameters)

    for a, b in zip(grads(), grads(checkpoint_blocks=True), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        past = dit(x, t, actions)
        out = dit(x, t, actions, first_frame=2, history=past.kv)
    assert out.sample.dtype == torch.bfloat16 and out.sample.isfinite().all()


def test_a_rope_table_cached_in_inference_mode_serves_training():
    dit = randomised(DiT(SMALL))
    x, t, actions = random_inputs(SMALL, 1, 2, 4, 10)
    with torch.inference_mode():
        dit(x, t, actions, first_frame=77)
    dit(x, t, actions, first_frame=77).sample.sum().backward()


def test_exports_with_positions_as_a_tensor():
    dit = randomised(DiT(dataclasses.replace(SMALL, depth=1, context_dim=0))).eval()
    x, t, actions = random_inputs(SMALL, 1, 2, 4, 4)
    history = dit(x, t, actions).kv
    inputs = {"first_frame": torch.tensor([2, 3]), "history": history}
    program = torch.export.export(dit, (x, t, actions), inputs)
    expected = dit(x, t, actions, first_frame=2, history=history).sample
    torch.testing.assert_close(program.module()(x, t, actions, **inputs).sample, expected)


def test_compiles_into_one_graph():
    dit = randomised(DiT(dataclasses.replace(SMALL, depth=1))).eval()
    compiled = torch.compile(dit, fullgraph=True, backend="eager")
    x, t, actions = random_inputs(SMALL, 1, 2, 4, 4)
    with torch.no_grad():
        for first in (0, 2):
            expected = dit(x, t, actions, first_frame=first)
            got = compiled(x, t, actions, first_frame=first)
            torch.testing.assert_close(got.sample, expected.sample)


def test_fresh_weights_predict_zero_and_learn():
    dit = DiT(PRESETS["tiny"]())
    x, t, actions = random_inputs(dit.config, 1, 2, 16, 16)
    sample = dit(x, t, actions).sample
    assert sample.count_nonzero() == 0
    (sample - x).square().mean().backward()
    assert dit.final_layer.linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("context_tokens", [0, 7])
def test_flops_are_what_torch_counts(context_tokens):
    dit = randomised(DiT(SMALL)).eval()
    x, t, actions = random_inputs(SMALL, 1, 2, 6, 8)
    history = [(torch.randn(1, 24, 2, 32), torch.randn(1, 24, 2, 32))] * SMALL.depth
    context = torch.randn(1, context_tokens, 24) if context_tokens else None
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math_only, FlopCounterMode(display=False) as counter:
        dit(x, t, actions, history=history, context=context)
    counted = SMALL.flops(2, 6, 8, 24, context_tokens=context_tokens)
    assert counted == counter.get_total_flops()


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BCFHW": torch.zeros(1, 15, 2, 4, 4)}, r"x_BCFHW has shape \[1, 15"),
        ({"x_BCFHW": torch.zeros(1, 16, 2, 5, 4)}, "multiples of 2"),
        ({"x_BCFHW": torch.zeros(16, 2, 4, 4)}, "expected 5"),
        ({"timesteps_BF": torch.zeros(1, 3)}, r"timesteps_BF .* expected \[1, 2\]"),
        ({"actions_BTA": torch.zeros(1, 7, 7)}, "7 poses for 2 latent frames; expected 8"),
        ({"observed_frames": 1}, "8 poses for 1 latent frames; expected 4"),
        ({"actions_BTA": torch.zeros(1, 8, 6)}, r"actions_BTA has shape \[1, 8, 6\]"),
        ({"condition_mask_B1FHW": torch.zeros(1, 1, 1, 4, 4)}, "condition_mask_B1FHW"),
        ({"context": torch.zeros(1, 3, 25)}, "context has shape"),
        ({"history": []}, "history has 0 blocks; expected 3"),
        ({"history": [(torch.zeros(2, 4, 2, 32),) * 2] * 3}, r"history\[0\]\[0\] has shape"),
        ({"first_frame": torch.tensor([0])}, "first_frame has shape"),
    ],
)
def test_a_wrong_shape_names_the_argument(change, message):
    inputs = {
        "x_BCFHW": torch.zeros(1, 16, 2, 4, 4),
        "timesteps_BF": torch.zeros(1, 2),
        "actions_BTA": torch.zeros(1, 8, 7),
    }
    with pytest.raises(UserError, match=message):
        DiT(SMALL)(**{**inputs, **change})


def test_config_round_trip_and_bad_values():
    config = PRESETS["tiny"]()
    import json

    assert DiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UserError, match="depht"):
        DiTConfig.from_dict({**config.to_dict(), "depht": 3})
    with pytest.raises(UserError, match="prediction"):
        dataclasses.replace(config, prediction="noise")
    with pytest.raises(UserError, match="heads"):
        dataclasses.replace(config, heads=7)
