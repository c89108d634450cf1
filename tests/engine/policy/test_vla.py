"""The policy around the network: sampling, log-probabilities, units, checkpoints, adapters."""

import dataclasses
import math

import numpy as np
import pytest
import tokenizers
import torch

from worldloop.engine.formats.openvla import merge_lora, read_shards
from worldloop.engine.policy.action_tokens import Statistics, from_tokens
from worldloop.engine.policy.base import Observation
from worldloop.engine.policy.lora import add_lora, merge_and_unload, save_lora
from worldloop.engine.policy.openvla_oft import OpenVLAConfig, OpenVLAOFT, tiny_config
from worldloop.engine.policy.vla import (
    PolicyConfig,
    VLAPolicy,
    sample_tokens,
    token_logprobs,
    tokenizer_of,
    uniform_draws,
)
from worldloop.errors import UserError
from worldloop.types import ActionSpec

CHUNK = 4
SPEC = ActionSpec(chunk=CHUNK)
STATISTICS = Statistics(
    (-0.5, -0.2, -1, 0, 0, 0, -1), (0.5, 0.6, 1, 0.1, 1, 1, 1), (True,) * 6 + (False,)
)


def make(**options) -> VLAPolicy:
    torch.set_num_threads(1)
    config = options.pop("config", PolicyConfig(SPEC, "test"))
    network = OpenVLAOFT(tiny_config(7, config.action_spec.chunk))
    network.init_weights(0)
    return VLAPolicy(network.eval(), config, options.pop("statistics", STATISTICS), **options)


@pytest.fixture(scope="module")
def policy() -> VLAPolicy:
    return make()


def observe(rows: int, seed: int = 0) -> Observation:
    rng = np.random.default_rng(seed)
    texts = ("push the cube", "pull the blue cube far", "lift it")
    return Observation(
        rng.integers(0, 256, (rows, 1, 1, 96, 96, 3), np.uint8), np.zeros((rows, 7), np.float32),
        tuple(texts[i % 3] for i in range(rows)), tuple(range(rows)), 0,
    )  # fmt: skip


# ---------------------------------------------------------------- tokens


def test_a_tokenizer_stays_with_the_policy(tmp_path):
    """Saved and read again, an instruction has the ids it had; without its file, it is refused."""
    words = ["<unk>", "<s>", "in", "out", "what", "action", "should", "the", "robot", "take", "to",
             "lift", "it"]  # fmt: skip
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    policy = make(tokenizer=tmp_path / "tokenizer.json")
    again = VLAPolicy.from_pretrained(policy.save(tmp_path / "saved"))
    assert again._prompt("lift it") == policy._prompt("lift it") != make()._prompt("lift it")
    assert tokenizer_of(tmp_path / "nowhere", tiny_config(7, CHUNK)) is None
    with pytest.raises(UserError, match="no tokenizer.json, which a vocabulary of 32000"):
        tokenizer_of(tmp_path / "nowhere", OpenVLAConfig())


def test_samples_follow_the_distribution_and_their_log_probabilities_are_true():
    logits = torch.tensor([0.0, 1.0, 2.0, -50.0]).repeat(1, 20000, 1)
    tokens, logprobs = sample_tokens(logits, uniform_draws([7], 20000, 1), temperature=2.0)
    weights = [math.exp(x / 2) for x in (0.0, 1.0, 2.0)]
    for token, weight in enumerate(weights):
        share = weight / sum(weights)
        assert (tokens == token).float().mean() == pytest.approx(share, abs=0.015)
        assert logprobs[tokens == token][0] == pytest.approx(math.log(share), abs=1e-5)
    assert not (tokens == 3).any()


def test_a_row_is_drawn_from_its_own_seed():
    logits = torch.randn(3, 50, 256, generator=torch.Generator().manual_seed(0))
    together, _ = sample_tokens(logits, uniform_draws([5, 6, 7], 10, 5), 1.6)
    alone, _ = sample_tokens(logits[1:2], uniform_draws([6], 10, 5), 1.6)
    assert torch.equal(together[1:2], alone)
    other, _ = sample_tokens(logits[1:2], uniform_draws([8], 10, 5), 1.6)
    assert not torch.equal(alone, other)
    greedy, logprobs = sample_tokens(logits, uniform_draws([0, 0, 0], 10, 5), 0)
    assert torch.equal(greedy, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


def test_coherent_draws_are_uniform_each_and_alike_from_step_to_step():
    draws = uniform_draws(range(4000), 6, 3, coherence=0.8).reshape(4000, 6, 3)
    for t in range(6):
        for a in range(3):
            shares, _ = np.histogram(draws[:, t, a], bins=10, range=(0, 1))
            assert np.abs(shares / 4000 - 0.1).max() < 0.025
    normal = torch.special.ndtri(torch.from_numpy(draws)).numpy()

    def correlation(x, y):
        return float(np.corrcoef(x.ravel(), y.ravel())[0, 1])

    for gap in (1, 2, 4):
        assert correlation(normal[:, :-gap], normal[:, gap:]) == pytest.approx(0.8**gap, abs=0.03)
    assert abs(correlation(normal[..., 0], normal[..., 1])) < 0.03  # dimensions stay independent
    alone = uniform_draws([7], 6, 3, coherence=0.8).reshape(6, 3)
    np.testing.assert_array_equal(alone, draws[7])
    with pytest.raises(UserError, match="coherence is 1"):
        uniform_draws([0], 6, 3, coherence=1)


def test_entropy_and_log_probability_against_torch_distributions():
    logits = torch.randn(2, 9, 256, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(256, (2, 9))
    logprobs, entropy = token_logprobs(logits, tokens, 1.6)
    outside = torch.distributions.Categorical(logits=logits / 1.6)
    torch.testing.assert_close(logprobs, outside.log_prob(tokens))
    torch.testing.assert_close(entropy, outside.entropy())


# ---------------------------------------------------------------- acting


def test_an_episode_acts_alike_in_any_company(policy):
    obs = observe(5)
    whole = policy.act(obs, seed=3)
    rows = [4, 1]
    part = policy.act(
        Observation(obs.frames[rows], obs.poses[rows], tuple(obs.instructions[r] for r in rows),
                    (4, 1), 0), seed=3,
    )  # fmt: skip
    np.testing.assert_array_equal(part.tokens, whole.tokens[rows])
    np.testing.assert_allclose(part.logprobs, whole.logprobs[rows], atol=1e-4)
    assert (policy.act(obs, seed=4).tokens != whole.tokens).mean() > 0.5


def test_recomputed_log_probabilities_are_those_of_acting(policy):
    obs = observe(3)
    acted = policy.act(obs, seed=0)
    logprobs, entropy = policy.logprobs(obs.frames[:, -1], obs.instructions, acted.tokens)
    np.testing.assert_allclose(logprobs.detach().numpy(), acted.logprobs, atol=1e-4)
    assert logprobs.requires_grad and entropy.shape == (3, CHUNK, 7)


def test_actions_are_in_environment_units_and_tokens_come_back(policy):
    obs = observe(4)
    acted = policy.act(obs, seed=0)
    assert acted.actions.shape == (4, CHUNK, 7) and acted.actions.dtype == np.float32
    low, high = np.array(STATISTICS.low), np.array(STATISTICS.high)
    scaled = 2 * (acted.actions - low) / (high - low) - 1
    np.testing.assert_allclose(scaled, from_tokens(acted.tokens), atol=1e-5)
    again = policy.to_tokens(acted.actions)
    # Tokens 0 and 1 share a centre: the largest action.
    np.testing.assert_array_equal(np.maximum(again, 1), np.maximum(acted.tokens, 1))


@pytest.mark.parametrize("gripper, opened", [("open_positive", 1.0), ("close_positive", -1.0)])
def test_the_published_gripper_is_binary(gripper, opened):
    spec = dataclasses.replace(SPEC, gripper=gripper)
    policy = make(config=PolicyConfig(spec, "test", binary_gripper=True))
    tokens = np.zeros((1, CHUNK, 7), np.int64)  # token 0: +0.996, open
    assert (policy.to_actions(tokens)[..., 6] == opened).all()
    tokens[:] = 255
    assert (policy.to_actions(tokens)[..., 6] == -opened).all()
    actions = np.full((1, CHUNK, 7), opened, np.float32)
    assert from_tokens(policy.to_tokens(actions)[0, 0, 6]) == pytest.approx(0.996, abs=1e-3)


# ---------------------------------------------------------------- checkpoints


def test_checkpoint_round_trip(policy, tmp_path):
    folder = policy.save(tmp_path / "p")
    again = VLAPolicy.from_pretrained(folder)
    assert again.config == policy.config and again.statistics == policy.statistics
    obs = observe(2)
    np.testing.assert_array_equal(again.act(obs, 1).tokens, policy.act(obs, 1).tokens)
    small = VLAPolicy.from_pretrained(policy.save(tmp_path / "half", torch.float16))
    size = sum(f.stat().st_size for f in (tmp_path / "half").iterdir())
    assert size <= 12e6
    stored = small.logits(obs.frames[:, -1], obs.instructions)
    assert (stored - policy.logits(obs.frames[:, -1], obs.instructions)).abs().max() < 0.02


def test_bad_checkpoints_and_arguments_are_one_line(policy, tmp_path):
    folder = policy.save(tmp_path / "p")
    (folder / "policy.json").unlink()
    with pytest.raises(UserError, match="has no policy.json.*from_openvla"):
        VLAPolicy.from_pretrained(folder)
    spec6 = dataclasses.replace(SPEC, chunk=9)
    with pytest.raises(UserError, match="chunk 4, its ActionSpec 7 and 9"):
        VLAPolicy(policy.network, PolicyConfig(spec6, "x"), STATISTICS)
    with pytest.raises(UserError, match="another robot"):
        make(statistics=Statistics((0.0,), (1.0,), (True,)))
    with pytest.raises(UserError, match="temperature is -1"):
        make(temperature=-1)
    with pytest.raises(UserError, match="coherence is 1"):
        make(coherence=1)
    with pytest.raises(UserError, match="frames is float32"):
        bad = dataclasses.replace(observe(1), frames=observe(1).frames.astype(np.float32))
        policy.act(bad, 0)


# ---------------------------------------------------------------- adapters


def test_adapters_start_as_nothing_train_alone_and_merge(policy, tmp_path):
    adapted = make()
    obs = observe(2)
    frames = obs.frames[:, -1]
    plain = adapted.logits(frames, obs.instructions)
    parameters = add_lora(adapted.network, rank=4, alpha=8)
    torch.testing.assert_close(adapted.logits(frames, obs.instructions), plain)
    assert sum(p.numel() for p in parameters) < 0.2 * sum(
        p.numel() for p in adapted.network.parameters()
    )
    names = {n for n, p in adapted.network.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in names) and not any("lm_head" in n for n in names)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    moved = adapted.logits(frames, obs.instructions)
    assert (moved - plain).abs().max() > 0.01
    folder = save_lora(adapted.network, tmp_path / "adapter")
    merge_and_unload(adapted.network)
    torch.testing.assert_close(
        adapted.logits(frames, obs.instructions), moved, rtol=1e-3, atol=1e-3
    )
    # The files, merged into the untouched checkpoint by the loader of published adapters.
    tensors = read_shards(policy.save(tmp_path / "base"))
    assert merge_lora(tensors, folder) == len(parameters) // 2
    for name, value in adapted.network.state_dict().items():
        torch.testing.assert_close(tensors[name], value, rtol=1e-5, atol=1e-6)


def test_bad_ranks_are_refused():
    with pytest.raises(UserError, match="rank is 0"):
        add_lora(make().network, 0, 1.0)
    with pytest.raises(UserError, match="no adapters"):
        save_lora(make().network, "unused")
