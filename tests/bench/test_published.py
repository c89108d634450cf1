"""diffusers' network with our action embedder, and the published procedure, equal the engine."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from worldloop.bench.arms import TOLERANCES, gate, relative_l2, require_equal
from worldloop.bench.published import PublishedDiT, published_step
from worldloop.bench.worlds import (
    ACTIONS,
    random_actions,
    random_world,
    reference_flops,
    start_state,
    streaming_flops,
    vae_flops,
)
from worldloop.engine.backends import wrap_world
from worldloop.engine.dit_config import DiTConfig
from worldloop.engine.light_vae import LightVAEConfig
from worldloop.engine.reward import RewardConfig
from worldloop.engine.vae import WanVAEConfig
from worldloop.engine.world_config import WorldModelConfig
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError

CPU = torch.device("cpu")
PLAIN = DiTConfig(
    width=48, depth=2, heads=2, adaln_rank=8, context_dim=0, condition_channel=False,
    padding_channel=False, timestep_scale=1000.0, action_dim=7, action_layout="per_frame",
    learned_positions=(2, 2), prediction="sample",
)  # fmt: skip
COSMOS = DiTConfig(
    width=48, depth=2, heads=2, adaln_rank=8, context_dim=24, action_dim=7,
    action_layout="per_frame",
)  # fmt: skip
LIGHT = LightVAEConfig(widths=(8, 8, 8), blocks=(1, 1, 1), picture=(32, 32))
WAN = WanVAEConfig(dim=8, res_blocks=1)


def small_world(dit: DiTConfig, autoencoder: LightVAEConfig | WanVAEConfig) -> WorldModel:
    reward = RewardConfig(grid=(4, 4))
    return random_world(WorldModelConfig(dit, reward, autoencoder, ACTIONS), CPU, torch.float32)


@pytest.mark.parametrize(("dit", "autoencoder"), [(PLAIN, LIGHT), (COSMOS, WAN)])
def test_published_procedure_equals_the_engine(dit, autoencoder):
    world = small_world(dit, autoencoder)
    network = PublishedDiT(world.dit)
    found = gate(world, world, network, procedure=True)
    require_equal(found, torch.float32)
    assert max(found["forward"], found["chunk"], found["chunk_guided"]) <= 1e-4
    state, actions = start_state(world, 2), random_actions(world, 2)
    _, frames, reward, after = published_step(world, network, state, actions, guided=False)
    chunk, engine_after = world.step(state, actions, steps="reference")
    assert chunk.frames is not None and frames.shape == chunk.frames.shape == (2, 24, 1, 32, 32, 3)
    assert abs(frames.astype(int) - chunk.frames.astype(int)).max() <= 1
    assert abs(reward - chunk.reward).max() <= 1e-3
    # The next chunk begins where the engine's does.
    assert (after.poses == engine_after.poses).all() and after.chunk == engine_after.chunk == 1
    assert (after.past_actions == engine_after.past_actions).all()
    assert relative_l2(after.last_latent, engine_after.last_latent) <= 0.02  # a level of a pixel


def test_the_gate_looks_at_the_back_end():
    """With gradients a wrapped network runs as it was; then the gate would compare nothing."""
    plain = small_world(PLAIN, LIGHT)
    wrapped = wrap_world(plain, "eager")
    gate(plain, wrapped, PublishedDiT(plain.dit), procedure=False)
    assert wrapped.dit.calls.built and wrapped.autoencoder.calls.built


def test_the_arms_share_their_weights_and_see_each_change():
    world = small_world(PLAIN, LIGHT)
    network = PublishedDiT(world.dit)
    with torch.no_grad():
        world.dit.blocks[0].mlp.layer1.weight.mul_(0.5)
    assert gate(world, world, network, procedure=False)["forward"] <= 1e-4
    other = PublishedDiT(small_world(PLAIN, LIGHT).dit)
    found = gate(world, world, other, procedure=False)
    assert found["forward"] > TOLERANCES[torch.float32]
    with pytest.raises(UserError, match="no speed for unequal work"):
        require_equal(found, torch.float32)


def test_actions_reach_the_published_network():
    network = PublishedDiT(small_world(PLAIN, LIGHT).dit)
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 16, 7, 4, 4, generator=g), torch.rand(1, 7, generator=g)
    a, b = (torch.randn(1, 24, 7, generator=g) for _ in range(2))
    with torch.inference_mode():
        first = network(x, t, a, observed_frames=1).sample
        assert relative_l2(network(x, t, b, observed_frames=1).sample, first) > 1e-3
        assert torch.equal(network(x, t, a, observed_frames=1).sample, first)


def test_flattened_actions_are_refused():
    world = small_world(PLAIN, LIGHT)
    world.dit.config = replace(PLAIN, action_layout="chunk", chunk_actions=24)
    with pytest.raises(UserError, match="per_frame"):
        PublishedDiT(world.dit)


def counted(run) -> int:
    # Through the plain matrix products: attention's fused CPU kernel is not in the counter's table.
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("dit", "autoencoder"), [(PLAIN, LIGHT), (COSMOS, WAN)])
def test_counted_flops_are_those_that_run(dit, autoencoder):
    world = small_world(dit, autoencoder)
    network = PublishedDiT(world.dit)
    x, t, actions = torch.randn(1, 16, 7, 4, 4), torch.rand(1, 7), torch.randn(1, 24, 7)
    for module, published in ((network, True), (world.dit, False)):
        run = counted(lambda module=module: module(x, t, actions, observed_frames=1))
        expected = reference_flops(world.config, 1, published=published)
        # The formulas take one action row a frame; the observed frame has none.
        hidden = 4 * dit.width
        unused = 2 * hidden * (2 * dit.action_features + 4 * dit.width)
        assert run == expected - unused
    assert streaming_flops(world.config, 4) == 5 * streaming_flops(world.config, 1) // 2
    assert vae_flops(world, "decode_last") < vae_flops(world, "decode") < vae_flops(world, "clip")
