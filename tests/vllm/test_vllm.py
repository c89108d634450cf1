"""The policy inside vLLM: parity with the network in process, weight updates, the server.

Needs vLLM (`make test-vllm` makes an environment with it); deselected where it is not installed.
"""

import os
import signal
import subprocess
import sys
from copy import deepcopy
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch

from worldloop.engine.policy.action_tokens import Statistics
from worldloop.engine.policy.base import Observation
from worldloop.engine.policy.openvla_oft import OpenVLAOFT, tiny_config
from worldloop.engine.policy.served import HTTPPolicy, VLLMPolicy
from worldloop.engine.policy.vla import PolicyConfig, VLAPolicy
from worldloop.engine.policy.wire import RequestError
from worldloop.errors import UserError
from worldloop.types import ActionSpec

pytestmark = pytest.mark.vllm

PARITY = 1e-4  # largest difference of a logit, float32; logits are of scale 1
DIM, CHUNK = 7, 8
WORDS = ("push the cube", "lift the peg upright and hold it there", "stack", "pull the cube back")


def policy_of(seed: int) -> VLAPolicy:
    """Preset tiny with random weights."""
    network = OpenVLAOFT(tiny_config(DIM, CHUNK))
    network.init_weights(seed)
    statistics = Statistics((-0.5,) * DIM, (0.5,) * DIM, (True,) * DIM)
    config = PolicyConfig(ActionSpec(dim=DIM, chunk=CHUNK), "test", rotate=True, crop=True)
    return VLAPolicy(network.eval(), config, statistics)


def frames_of(rows: int, seed: int = 0, views: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, views, 80, 96, 3), np.uint8)


def words_of(rows: int) -> list[str]:
    return [f"{WORDS[i % len(WORDS)]} {i}" for i in range(rows)]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape
    gap = (a - b).abs()
    off = (~(gap <= PARITY)).flatten(1).sum(1)  # not a number is off, too
    assert not off.any(), (
        f"off by more than {PARITY}: {({i: n for i, n in enumerate(off.tolist()) if n})} "
        f"(row: elements of {gap[0].numel()}), largest {gap.max():.2e}"
    )


@pytest.fixture(scope="module")
def local() -> VLAPolicy:
    return policy_of(0)


@pytest.fixture(scope="module")
def folder(local, tmp_path_factory) -> Path:
    return local.save(tmp_path_factory.mktemp("weights") / "policy")


def test_a_build_without_kernels_for_this_cpu_is_named(folder):
    code = (
        "from vllm.platforms.cpu import CpuPlatform\n"
        "CpuPlatform.import_kernels = classmethod(lambda cls: None)\n"  # as on AVX2
        "from worldloop.engine.policy.served import VLLMPolicy\n"
        f"VLLMPolicy({str(folder)!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError: vLLM " in result.stderr and "has no kernels for this CPU" in result.stderr
    assert "run the policy without vLLM" in result.stderr


@pytest.fixture(scope="module")
def served(folder):
    with VLLMPolicy(folder, views=2, max_batch=64) as policy:
        yield policy


def test_plugin_is_found_through_its_entry_point():
    (point,) = (p for p in entry_points(group="vllm.general_plugins") if p.name == "worldloop")
    assert point.value == "worldloop.engine.policy.vllm_plugin:register"
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm import ModelRegistry; print(ModelRegistry.get_supported_archs())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'WorldloopOpenVLAOFT'" in result.stdout, result.stderr


@pytest.mark.parametrize("rows", [1, 5, 64, 80])
def test_logits_are_those_of_the_network(local, served, rows):
    """Mixed prompt lengths; 80 rows are more than one pass takes."""
    frames, words = frames_of(rows), words_of(rows)
    answer = served.logits(frames, words)
    assert answer.shape == (rows, DIM * CHUNK, 256) and answer.abs().max() > 1
    close(answer, local.logits(frames, words))


def test_a_row_does_not_depend_on_its_batch(served):
    frames, words = frames_of(6), words_of(6)
    together = served.logits(frames, words)
    order = [3, 0, 5, 1, 4, 2]
    close(served.logits(frames[order], [words[i] for i in order]), together[order])
    close(served.logits(frames[4:5], words[4:5]), together[4:5])


def test_two_views(local, served):
    frames, words = frames_of(3, views=2), words_of(3)
    close(served.logits(frames, words), local.logits(frames, words))
    close(served.logits(frames[:, :1], words), local.logits(frames[:, :1], words))


def test_acts_as_the_network_in_process(local, served):
    assert served.action_spec == local.action_spec
    seen = Observation(
        frames_of(4)[:, None], np.zeros((4, DIM), np.float32), tuple(words_of(4)), (0, 7, 2, 3), 0
    )
    ours, theirs = served.act(seen, 11), local.act(seen, 11)
    assert (ours.tokens == theirs.tokens).mean() > 0.99  # a level may fall between two roundings
    same = ours.tokens == theirs.tokens
    np.testing.assert_allclose(ours.logprobs[same], theirs.logprobs[same], rtol=0, atol=PARITY)
    np.testing.assert_array_equal(ours.actions[same], theirs.actions[same])


def test_a_group_encodes_its_start_frame_once(served):
    calls = []
    (hook,) = served.engine.llm.apply_model(
        lambda model: model.network.projector.register_forward_hook(
            lambda module, args, out: calls.append(len(out))
        )
    )
    frames = np.repeat(frames_of(2, seed=5), 8, 0)
    served.logits(frames, words_of(16))
    hook.remove()
    assert sum(calls) == 2


# ---------------------------------------------------------------- malformed requests


@pytest.mark.parametrize(
    ("frames", "words", "message"),
    [
        (frames_of(2).astype(np.float32), words_of(2), "frames: float32"),
        (frames_of(2)[0], words_of(2), r"frames: uint8 \[1, 80, 96, 3\]"),
        (frames_of(2, views=3), words_of(2), "frames: 3 views"),
        (frames_of(2), words_of(1), "instructions: 1 for 2 rows"),
        (frames_of(2), ["push", ""], r"instructions\[1\]: ''"),
        (frames_of(2), ["push", "p" * 400], r"instructions\[1\]: a prompt of \d+ tokens"),
    ],
)
def test_malformed_requests_name_the_field(served, frames, words, message):
    with pytest.raises(RequestError, match=message):
        served.logits(frames, words)


@pytest.mark.parametrize(
    ("ids", "image", "message"),
    [
        ([5, 6, 7], frames_of(1)[0], "BOS"),
        ([1, 9999], frames_of(1)[0], "ids below"),
        ([1, 50, 60], frames_of(1)[0].astype(np.float32), "expected uint8"),
        ([1, 50, 60], frames_of(1, views=3)[0], "3 views"),
        ([1, *[50] * 900], frames_of(1)[0], "maximum|longer|max"),
    ],
)
def test_malformed_requests_past_the_client_do_no_harm(local, served, ids, image, message):
    """Checks of the engine; the good request beside a bad one fails too, the next works."""
    llm = served.engine.llm
    bad = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
    good = {"prompt_token_ids": [1, 50, 35], "multi_modal_data": {"image": frames_of(1)[0]}}
    with pytest.raises(Exception, match=message):
        llm.encode([good, bad], pooling_task="token_classify", use_tqdm=False)
    frames, words = frames_of(2, seed=9), words_of(2)
    close(served.logits(frames, words), local.logits(frames, words))


# ---------------------------------------------------------------- weights


def test_live_weight_update(local, served, folder):
    new, frames, words = policy_of(1), frames_of(3), words_of(3)
    before = served.logits(frames, words)
    version = served.version
    try:
        assert served.update_weights(new.network.state_dict()) == served.version == version + 1
        after = served.logits(frames, words)  # the same frames: no stale features of the old towers
        close(after, new.logits(frames, words))
        assert (after - before).abs().max() > 0.1
    finally:
        assert served.update_weights(folder) == version + 2
    close(served.logits(frames, words), before)
    with pytest.raises(RequestError, match="version"):
        served.update_weights(folder, version=version + 2)


def test_bad_weights_leave_the_old_ones(served, local):
    frames, words = frames_of(1), words_of(1)
    good = local.network.state_dict()
    name = "language_model.lm_head.weight"
    before, version = served.logits(frames, words), served.version
    for weights, message in (
        ({key: value for key, value in good.items() if key != name}, "1 missing"),
        ({**good, "extra": torch.zeros(1)}, "1 unexpected"),
        ({**good, name: good[name][:-1]}, "another shape"),
        ({**good, name: good[name] / 0}, "NaN"),
    ):
        with pytest.raises(UserError, match=message):
            served.update_weights(weights)
    assert served.version == version
    assert torch.equal(served.logits(frames, words), before)


# ---------------------------------------------------------------- over HTTP


def test_serve_policy_end_to_end(local, folder, tmp_path):
    new = policy_of(2)
    new.save(tmp_path / "new")
    process = subprocess.Popen(
        [sys.executable, "-m", "worldloop.cli", "serve", "policy", "--policy", str(folder)]
        + ["--backend", "vllm", "--port", "0", "--weights-root", str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "WORLDLOOP_TOKEN": "secret"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        url = next(line for line in lines if line.startswith("http://")).split()[0]
        client = HTTPPolicy(url, token="secret")
        frames, words = frames_of(64), words_of(64)
        close(client.logits(frames, words), local.logits(frames, words))
        assert client.version == 0

        with pytest.raises(RequestError, match="token"):
            HTTPPolicy(url, token="other")
        with pytest.raises(RequestError, match="views"):
            client.logits(frames_of(1, views=2), words_of(1))
        with pytest.raises(RequestError, match=r"instructions\[0\].*tokens"):
            client.logits(frames_of(1), ["ü" * 200])

        assert client.update_weights(tmp_path / "new") == 1
        close(client.logits(frames[:4], words[:4]), new.logits(frames[:4], words[:4]))
        assert client.update_weights(local.network.state_dict()) == client.version == 2
        close(client.logits(frames[:4], words[:4]), local.logits(frames[:4], words[:4]))
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_grpo_samples_from_vllm_with_the_learner_s_weights(tmp_path):
    from worldloop.engine.world_model import WorldModel
    from worldloop.rl.grpo import GRPO
    from worldloop.rl.grpo_config import GRPOConfig
    from worldloop.rl.learner import Experience, Learner, LearnerConfig, gap_metrics
    from worldloop.rl.starts import load_starts

    world = WorldModel.from_pretrained("tiny")
    network = OpenVLAOFT(tiny_config(DIM, world.action_spec.chunk))
    network.init_weights(0)
    statistics = Statistics((-0.5,) * DIM, (0.5,) * DIM, (True,) * 6 + (False,))
    learner = VLAPolicy(network.eval(), PolicyConfig(world.action_spec, "test"), statistics)
    folder = learner.save(tmp_path / "policy")
    config = GRPOConfig(
        out=tmp_path, policy=str(folder), groups=2, group_size=2, horizon=24, world_steps=1,
        accuracy_low=0.0, accuracy_high=1.0, evaluate_every=0, learner=LearnerConfig(mini_batch=4),
    )  # fmt: skip
    old = deepcopy(learner)
    with VLLMPolicy(folder) as actor:
        grpo = GRPO(config, world, learner, load_starts(None, world, limit=2), actor)
        assert grpo.step(0, tmp_path / "0")["gap_max"] < 1e-3
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # as if much had been learned
            for p in network.parameters():
                if p.dim() > 1:
                    p.add_(0.2 * p.std() * torch.randn(p.shape, generator=generator))
        grpo.send_weights()
        (rollout,) = grpo.collect(1, tmp_path / "1").rollouts
    sampled = Experience.of(rollout, np.zeros(len(rollout.success), np.float32))
    gaps = [
        gap_metrics(sampled.logprobs, Learner(p, config.learner).logprobs(sampled), sampled.valid)
        for p in (learner, old)
    ]
    assert gaps[0]["gap_max"] < 1e-3 and gaps[1]["gap_mean"] > 0.1
