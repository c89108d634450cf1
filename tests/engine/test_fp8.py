"""fp8: rounding, product, choice of layers; the quality gate on the shipped weights."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import worldloop
from worldloop.engine.agreement import Gate, agreement, imagine
from worldloop.engine.backends import make_backend, wrap_world
from worldloop.engine.fp8 import (
    E4M3,
    LARGEST,
    LAYERS,
    FP8Linear,
    quantize_fp8,
    quantized_share,
    to_e4m3,
)
from worldloop.engine.policy.vla import VLAPolicy
from worldloop.engine.world_model import WorldModel
from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.types import Starts

EPISODES = Path(worldloop.__file__).parent / "data" / "demo-pushcube"


def relative(a, b) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def linear_of(features, out, seed=0):
    linear = nn.Linear(features, out, bias=False)
    generator = torch.Generator().manual_seed(seed)
    linear.weight.data = torch.randn(out, features, generator=generator) / features**0.5
    return linear


# Rounding ---------------------------------------------------------------------------------------


def test_rows_round_to_the_nearest_e4m3():
    """Against the format's own table: 3 bits of mantissa, exponents -6 .. 8, subnormals below."""
    grid = {0.0}
    for exponent in range(-6, 9):
        grid |= {2.0**exponent * (1 + m / 8) for m in range(8)}
    grid |= {2.0**-6 * m / 8 for m in range(8)}
    values = torch.tensor(sorted(v for v in grid if v <= LARGEST), dtype=torch.float64)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(3)) * 5
    rounded, scale = to_e4m3(x)
    assert rounded.dtype == E4M3 and scale.shape == (4, 1)
    torch.testing.assert_close(scale[:, 0], x.abs().amax(1) / LARGEST)
    exact = (x / scale).double()
    nearest = values[(exact.abs()[..., None] - values).abs().argmin(-1)] * exact.sign()
    wrong = rounded.double() != nearest
    # At the middle of two numbers (ties to even) the table may choose the other one.
    distance = (exact - rounded.double()).abs() - (exact - nearest).abs()
    assert wrong.float().mean() < 0.02 and float(distance.abs().max()) < 1e-6
    assert rounded.float().abs().amax(1).tolist() == [LARGEST] * 4


def test_odd_rows_stay_finite():
    x = torch.zeros(3, 16)
    x[1] = 1e-30
    x[2, 0] = 3e38
    rounded, scale = to_e4m3(x)
    assert torch.isfinite(rounded.float() * scale).all()
    assert torch.equal(rounded[0].float(), torch.zeros(16))


# The product ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_close_to_its_linear(dtype):
    linear, x = linear_of(64, 48), torch.randn(2, 5, 64)
    layer = FP8Linear(linear)
    out = layer(x.to(dtype))
    assert out.shape == (2, 5, 48) and out.dtype == dtype
    assert 1e-3 < relative(out, linear(x)) < 0.06


def test_the_emulation_equals_torchs_own_product():
    """torch._scaled_mm with row-wise scales, which on a CPU gives bf16 as well."""
    linear, x = linear_of(64, 48), torch.randn(7, 64)
    layer = FP8Linear(linear)
    rounded, scale = to_e4m3(x)
    want = torch._scaled_mm(
        rounded, layer.weight.t(), scale_a=scale, scale_b=layer.scale.t(), out_dtype=torch.bfloat16
    )
    assert relative(layer(x).bfloat16(), want) < 4e-3  # one rounding to bf16


def test_autocast_and_casts_leave_the_stored_weights_alone():
    layer = FP8Linear(linear_of(32, 16))
    weight, scale = layer.weight.clone(), layer.scale.clone()
    layer.to(torch.bfloat16).half()
    assert layer.weight.dtype == E4M3 and layer.scale.dtype == torch.float32
    assert torch.equal(layer.weight.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(layer.scale, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 32)).dtype == torch.bfloat16


@pytest.mark.gpu
def test_the_product_of_a_gpu_equals_the_emulation():
    linear, x = linear_of(2048, 512), torch.randn(300, 2048)
    here = FP8Linear(linear)(x.bfloat16())
    there = copy.deepcopy(FP8Linear(linear)).cuda()(x.bfloat16().cuda())
    # Fast accumulation on the GPU; one rounding to bf16 on both.
    assert relative(there.cpu(), here) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["compiled", "cudagraph", "compiled-graph"])
def test_back_ends_take_an_fp8_network(small, backend):
    world = small.world_of().cuda().bfloat16()
    config = world.config.dit
    assert config.width % 16 == 0
    quantize_fp8(world.dit)
    wrapped = wrap_world(world, backend, buckets=(2,))
    x, t = torch.randn(2, config.latent_channels, 2, 4, 4).cuda(), torch.ones(2, 2).cuda()
    poses = torch.randn(2, 8, 7).cuda()
    with torch.inference_mode():
        want = world.dit(x, t, poses, first_frame=1).sample
        assert relative(wrapped.dit(x, t, poses, first_frame=1).sample, want) < 3e-2


# Choosing layers --------------------------------------------------------------------------------


def test_only_the_named_layers_change(small):
    world = small.world_of()
    dit = quantize_fp8(copy.deepcopy(world.dit))
    changed = {name for name, m in dit.named_modules() if isinstance(m, FP8Linear)}
    per_block = [f"self_attn.{p}_proj" for p in ("q", "k", "v", "output")] + [
        "mlp.layer1", "mlp.layer2",
    ]  # fmt: skip
    assert changed == {f"blocks.{i}.{name}" for i in range(2) for name in per_block}
    weights = sum(
        m.weight.numel() for m in world.dit.modules() if isinstance(m, nn.Linear)
    )  # fmt: skip
    assert quantized_share(dit) == pytest.approx(2 * 12 * 48 * 48 / weights)
    with pytest.raises(UserError, match="names no Linear"):
        quantize_fp8(dit)  # a second time
    with pytest.raises(UserError, match="x_embedder.proj.1 is 48x60"):
        quantize_fp8(odd(world.dit), ["x_embedder.proj.1"])
    with pytest.raises(UserError, match="has a bias"):
        quantize_fp8(copy.deepcopy(world.dit), ["action_embedder_B_D.fc1"])


def odd(dit):
    dit = copy.deepcopy(dit)
    dit.x_embedder.proj[1].in_features = 60
    dit.x_embedder.proj[1].weight = nn.Parameter(torch.zeros(48, 60))
    return dit


def test_a_compiled_back_end_takes_an_fp8_network(small):
    """One graph (the eager compiler): the layer breaks none."""
    dit = quantize_fp8(copy.deepcopy(small.world_of().dit)).eval()
    whole = torch.compile(dit, fullgraph=True, backend="eager")
    x, t = torch.randn(1, 16, 2, 4, 4), torch.ones(1, 2)
    with torch.no_grad():
        want = dit(x, t, torch.zeros(1, 8, 7)).sample
        torch.testing.assert_close(whole(x, t, torch.zeros(1, 8, 7)).sample, want)


# The gate ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def episodes():
    """Two successes and two failures of the shipped real episodes: starts and 48 actions."""
    dataset = EpisodeDataset(EPISODES)
    chosen = [dataset.read(i) for i in (0, 15, 30, 45)]
    starts = Starts(
        frames=np.stack([e.frames[0] for e in chosen])[:, None, None],
        poses=np.stack([e.states[0] for e in chosen]),
        instructions=tuple(e.instruction for e in chosen),
    )
    return starts, np.stack([e.actions[:48] for e in chosen])


@pytest.fixture(scope="module")
def plain(episodes):
    torch.set_num_threads(1)
    policy = VLAPolicy.from_pretrained("policy/pushcube", temperature=0.0)
    world = WorldModel.from_pretrained("tiny")
    return policy, imagine(world, *episodes, policy, steps=1)


def test_the_shipped_weights_pass_the_gate_in_fp8_and_bf16(episodes, plain):
    """docs/backends.md has the figures of 32 whole episodes."""
    policy, reference = plain
    for dtype, quantize in ((torch.bfloat16, False), (torch.float32, True)):
        world = WorldModel.from_pretrained("tiny", dtype=dtype)
        if quantize:
            quantize_fp8(world.dit)
        found = agreement(reference, imagine(world, *episodes, policy, steps=1), 0.9)
        assert Gate().failures(found) == []
        assert found["latent_relative_l2"] > 1e-4  # they are not the same computation


def test_the_gate_stops_a_spoilt_world(episodes, plain):
    """Scales that are half too large: nothing crashes, and the gate says what is wrong."""
    policy, reference = plain
    world = WorldModel.from_pretrained("tiny")
    quantize_fp8(world.dit)
    for layer in world.dit.modules():
        if isinstance(layer, FP8Linear):
            layer.scale *= 3 / 2
    found = agreement(reference, imagine(world, *episodes, policy, steps=1), 0.9)
    failures = Gate().failures(found)
    assert any("latent_relative_l2" in line for line in failures)
    assert any("token_agreement" in line for line in failures)


def test_agreement_with_itself_and_with_known_differences(plain):
    _, reference = plain
    same = agreement(reference, reference, 0.9)
    assert same["psnr_db"] is None and same["latent_relative_l2"] == 0
    assert same["token_agreement"] == 1 and same["reward_flip_rate"] == 0
    reward, frames, tokens = (
        getattr(reference, name).copy() for name in ("reward", "frames", "tokens")
    )
    reward[0, :6] = np.where(reward[0, :6] > 0.9, 0, 1)
    frames[:] = np.where(frames > 127, frames - 1, frames + 1)
    tokens[0] += 1
    success = ~reference.success
    other = dataclasses.replace(
        reference, reward=reward, frames=frames, tokens=tokens, success=success,
        latents=reference.latents * 1.5,
    )  # fmt: skip
    found = agreement(reference, other, 0.9)
    assert found["reward_flip_rate"] == pytest.approx(6 / reward.size)
    assert found["psnr_db"] == pytest.approx(20 * np.log10(255), abs=1e-3)
    assert found["token_agreement"] == pytest.approx(0.75)
    assert found["success_flip_rate"] == 1
    assert found["latent_relative_l2"] == pytest.approx(0.5)
    with pytest.raises(UserError, match="same episodes"):
        agreement(reference, dataclasses.replace(other, reward=reward[:2]), 0.9)


def test_the_batch_changes_no_episode(episodes, plain):
    policy, reference = plain
    world = WorldModel.from_pretrained("tiny")
    apart = imagine(world, *episodes, policy, steps=1, max_batch=3)
    found = agreement(reference, apart, 0.9)
    assert found["latent_relative_l2"] < 1e-4 and found["token_agreement"] > 0.999


def test_every_default_layer_is_a_pattern_of_the_2b():
    from worldloop.engine.dit import DiT
    from worldloop.engine.dit_config import PRESETS

    with torch.device("meta"):
        dit = DiT(PRESETS["2b"]())
    with pytest.raises(UserError, match="names no Linear"):
        quantize_fp8(dit, [*LAYERS, "blocks.*.nothing"])
    assert not any(isinstance(m, FP8Linear) for m in dit.modules())  # all or nothing


def test_an_fp8_network_cannot_be_built_by_tensorrt(small, tmp_path):
    """It says so: TensorRT takes the bf16 network."""
    from worldloop.engine.backends.networks import DiTPass
    from worldloop.engine.backends.tensorrt import export_onnx

    dit = quantize_fp8(copy.deepcopy(small.world_of().dit)).eval()
    module = DiTPass(dit, ("x_BCFHW", "timesteps_BF"), False, return_kv=False)
    example = [torch.randn(1, 16, 1, 4, 4), torch.ones(1, 1), torch.zeros(1, dtype=torch.long)]
    with torch.inference_mode():
        make_backend("eager", module, example)(*example)
    with pytest.raises(UserError, match="fp8"):
        export_onnx(module, example, tmp_path / "x.onnx")
