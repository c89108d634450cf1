"""GRPO as a run: what it trains on, that it learns, resumes, and stops with a reason."""

import dataclasses
import json
import shutil
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from worldloop.engine.policy.served import HTTPPolicy, LocalPolicy, PolicyServerError
from worldloop.engine.policy.server import ServePolicyConfig, Server
from worldloop.engine.policy.vla import VLAPolicy
from worldloop.engine.precision import autocast
from worldloop.engine.rollout import RolloutEngine
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.files import exclusive
from worldloop.rl import demo
from worldloop.rl import grpo as module
from worldloop.rl.advantage import group_advantages
from worldloop.rl.demo import DemoConfig
from worldloop.rl.grpo import GRPO, train
from worldloop.rl.grpo_config import GRPOConfig
from worldloop.rl.learner import Experience, Learner, LearnerConfig
from worldloop.rl.loss import trajectory_weights
from worldloop.rl.report import grpo_line
from worldloop.rl.starts import load_starts

LEARN = LearnerConfig(lr=1e-3, mini_batch=8, micro_batch=5)


def config_of(tmp_path, **changes) -> GRPOConfig:
    values = {
        "out": tmp_path / "run", "policy": str(tmp_path / "policy"), "steps": 2, "groups": 2,
        "group_size": 4, "horizon": 16, "world_steps": 1, "accuracy_low": 0.0,
        "accuracy_high": 1.0, "evaluate_every": 0, "keep_every": 1, "learner": LEARN, **changes,
    }  # fmt: skip
    return GRPOConfig(**values)


@pytest.fixture
def at_home(tmp_path, monkeypatch, small_world, small_policy, pool):
    """`train` with the small world, a small policy on disk, and nine starts."""
    small_policy().save(tmp_path / "policy")
    monkeypatch.setattr(module.WorldModel, "from_pretrained", lambda *_, **__: small_world)
    monkeypatch.setattr(module, "load_starts", lambda *_: pool)
    return tmp_path


def experience(world, policy, pool, **options) -> Experience:
    engine = RolloutEngine(world, policy, steps=1)
    rollout = engine.rollout(pool.select(range(3)), horizon=16, group_size=4, **options)
    return Experience.of(rollout, group_advantages(rollout.success, rollout.group_id))


def weights_of(folder) -> dict[str, torch.Tensor]:
    return VLAPolicy.from_pretrained(folder).network.state_dict()


def test_recomputed_log_probabilities_are_those_of_the_rollout(small_world, small_policy, pool):
    policy = small_policy()
    e = experience(small_world, policy, pool, stop_on_success=True)
    again = Learner(policy, LEARN).logprobs(e)
    assert 0 < e.valid.mean() < 1, "episodes of unequal length are what this is about"
    np.testing.assert_allclose(again[e.valid], e.logprobs[e.valid], atol=1e-4)
    # An action is a token of its own chunk: another chunk's frame gives other numbers.
    swapped = dataclasses.replace(e, frames=e.frames[:, ::-1])
    assert np.abs(Learner(policy, LEARN).logprobs(swapped) - e.logprobs)[e.valid].max() > 1e-3


def test_gradients_do_not_depend_on_the_micro_batch(small_world, small_policy, pool):
    grads = []
    for micro in (3, 100):
        policy = small_policy()
        e = experience(small_world, policy, pool, stop_on_success=True)
        config = dataclasses.replace(LEARN, micro_batch=micro, mini_batch=100, grad_clip=1e9)
        learner = Learner(policy, config)
        learner.update(e, seed=0)
        grads.append([p.grad.clone() for p in learner.parameters if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_gradient_of_this_machine_s_precision_is_that_of_fp32():
    """Of the shipped policy, `auto` against fp32."""
    world = WorldModel.from_pretrained("tiny")
    policy = VLAPolicy.from_pretrained("policy/pushcube", temperature=0.7)
    engine = RolloutEngine(world, policy, steps=1)
    rollout = engine.rollout(load_starts(None, world, limit=4), horizon=48, group_size=2, seed=1)
    e = Experience.of(rollout, np.tile(np.array([1, -1], np.float32), 4))
    gradients, logprobs = [], []
    for precision in ("fp32", "auto"):
        within = autocast(torch.device("cpu"), precision)
        learner = Learner(policy, dataclasses.replace(LEARN, lr=0.0), within)
        logprobs.append(learner.logprobs(e))
        learner.update(e, seed=0)
        learned = [p.grad.flatten() for p in learner.parameters if p.grad is not None]
        gradients.append(torch.cat(learned).double())
    assert np.abs(logprobs[1] - logprobs[0])[e.valid].mean() < 0.03  # nats
    assert torch.cosine_similarity(*gradients, 0) > 0.99  # 0.9996 on an AMD Zen 5


def test_what_is_seen_alike_is_one_forward_pass(small_world, small_policy, pool, monkeypatch):
    """Three groups of four begin with three pictures: as many rows, and the gradient of twelve."""
    policy, gradients, rows = small_policy(), [], []
    e = experience(small_world, policy, pool)
    e = dataclasses.replace(e, advantages=np.random.default_rng(0).normal(size=(12, 2)).astype("f"))
    forward = policy.forward

    def counted(pictures, *args, **options):
        rows[-1] += len(pictures)
        return forward(pictures, *args, **options)

    monkeypatch.setattr(policy, "forward", counted)
    for shared in (True, False):
        if not shared:
            for place in ("engine.policy.vla", "rl.learner"):
                monkeypatch.setattr(
                    f"worldloop.{place}.distinct", lambda frames, _: [np.arange(len(frames))] * 2
                )
        learner = Learner(policy, dataclasses.replace(LEARN, old_logprobs="rollout"))
        weights = trajectory_weights(e.valid, e.tokens.shape[-1])
        learner.optimizer.zero_grad()
        rows.append(0)
        learner._accumulate(e, np.arange(12), e.logprobs, weights)
        gradients.append([p.grad.clone() for p in learner.parameters if p.grad is not None])
    later = int(e.valid[:, policy.action_spec.chunk].sum())
    assert rows == [3 + later, 12 + later] and later > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_decisions_without_an_advantage_are_not_passed_through(
    small_world, small_policy, pool, monkeypatch
):
    policy, seen = small_policy(), []
    e = experience(small_world, policy, pool)
    advantages = np.zeros((12, 2), np.float32)
    advantages[3, 0], advantages[5, 1] = 1, -1
    e = dataclasses.replace(e, advantages=advantages)
    learner = Learner(policy, dataclasses.replace(LEARN, old_logprobs="rollout"))
    forward = learner._forward

    def counted(e, part):
        seen.extend(part.tolist())
        return forward(e, part)

    monkeypatch.setattr(learner, "_forward", counted)
    weights = trajectory_weights(e.valid, e.tokens.shape[-1])
    found = learner._accumulate(e, np.arange(12), e.logprobs, weights)
    assert sorted(seen) == [[3, 0], [5, 1]]
    assert found["ratio"] == pytest.approx(1, abs=1e-3) and found["entropy"] > 1
    nothing = learner._accumulate(e, np.array([0, 1]), e.logprobs, weights)
    assert len(seen) == 2 and set(nothing.values()) == {0.0}


def test_frozen_vision_stays_as_it_is_and_the_rest_learns_as_before(
    small_world, small_policy, pool
):
    gradients = []
    for frozen in (False, True):
        policy = small_policy()
        before = {name: p.detach().clone() for name, p in policy.network.named_parameters()}
        e = experience(small_world, policy, pool)
        config = dataclasses.replace(LEARN, mini_batch=100, freeze_vision=frozen)
        Learner(policy, config).update(e, seed=0)
        named = dict(policy.network.named_parameters())
        moved = {
            name.split(".")[0] for name, p in named.items() if not torch.equal(p, before[name])
        }
        assert "language_model" in moved
        assert ("vision_backbone" in moved) == ("projector" in moved) == (not frozen)
        gradients.append({name: p.grad for name, p in named.items() if "language_model" in name})
    for name, gradient in gradients[0].items():
        # Clipping is by the norm of what is learned: the same direction, another length.
        a, b = gradient.flatten(), gradients[1][name].flatten()
        if a.norm() > 0:
            assert torch.cosine_similarity(a, b, 0) > 0.9999, name


def test_an_update_makes_good_tokens_likelier_and_bad_ones_less(small_world, small_policy, pool):
    policy = small_policy()
    e = experience(small_world, policy, pool)
    e = dataclasses.replace(
        e, advantages=np.where(np.arange(24).reshape(12, 2) // 2 % 2, 1, -1).astype("f")
    )
    learner = Learner(policy, dataclasses.replace(LEARN, lr=3e-4, mini_batch=12))
    metrics = [learner.update(e, seed=0) for _ in range(5)]
    change = (learner.logprobs(e) - e.logprobs).mean((1, 2))
    # Every logit moves, so that all tokens may get rarer: what counts is how they part.
    assert change[1::2].mean() - change[::2].mean() > 0.05, change
    assert metrics[0]["gap_max"] < 1e-3 < metrics[1]["gap_max"]
    assert [m["optimizer_steps"] for m in metrics] == [1] * 5 and policy.version == 5


def test_optimizer_steps_are_of_equally_many_episodes(small_world, small_policy, pool, monkeypatch):
    """Twelve episodes, at most seven a step: six and six, not seven and five."""
    policy = small_policy()
    e = experience(small_world, policy, pool)
    config = dataclasses.replace(LEARN, mini_batch=7, old_logprobs="rollout")
    learner, seen = Learner(policy, config), []
    decisions = learner._decisions

    def counted(e, rows):
        seen.append(sorted(rows))
        return decisions(e, rows)

    monkeypatch.setattr(learner, "_decisions", counted)
    assert learner.update(e, seed=0)["optimizer_steps"] == 2
    assert [len(rows) for rows in seen] == [6, 6] and sorted(sum(seen, [])) == list(range(12))


def test_frames_are_those_that_were_imagined(tmp_path, small_world, small_policy, pool):
    """Episodes that end with the first chunk have no second one."""
    config = config_of(tmp_path, groups=3, rounds=1)
    grpo = GRPO(config, small_world, small_policy(), pool)
    rolled = []
    grpo.imagine = lambda *args, **options: (
        rolled.append(GRPO.imagine(grpo, *args, **options)) or rolled[-1]
    )
    found = grpo.collect(0, tmp_path / "rounds")
    ends = [np.flatnonzero(valid)[-1] for valid in rolled[0].valid]
    assert found.frames == sum(8 * (end // 8 + 1) for end in ends) < 12 * config.horizon


def test_run_writes_metrics_policies_and_learns_on_mixed_groups_only(at_home):
    config = config_of(at_home, accuracy_low=0.1, accuracy_high=0.9, evaluate_every=1,
                       evaluate_starts=3)  # fmt: skip
    last = train(config)
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for name in ("imagined_success", "group_yield", "entropy", "ratio", "clip_fraction",
                 "gap_mean", "frames_per_second", "seconds_rollout", "seconds_learn",
                 "seconds_dit", "seconds_policy", "held_out_success"):  # fmt: skip
        assert np.isfinite(rows[2][name]), name
    assert rows[2]["groups"] >= config.groups
    assert (config.out / "samples/000002/rollout.mp4").is_file()
    start, end = weights_of(config.out / "policies/000000"), weights_of(last)
    assert any(not torch.equal(start[k], end[k]) for k in start)
    assert not (config.out / "rollouts").exists() or not any((config.out / "rollouts").iterdir())


def test_branches_learn_from_every_moment(tmp_path, small_world, small_policy, pool, monkeypatch):
    """Frames count once; decisions of one episode have advantages of their own."""
    options = {"group_size": 6, "branching": (2, 3), "groups": 2, "rounds": 1}
    grpo = GRPO(config_of(tmp_path, **options), small_world, small_policy(), pool)
    imagined, seen = [], []
    step, update = small_world.step, grpo.learner.update

    def counted(state, actions, **options):
        imagined.append(actions.shape[0] * actions.shape[1])
        return step(state, actions, **options)

    def updated(e, *args, **options):
        seen.append(e)
        return update(e, *args, **options)

    monkeypatch.setattr(small_world, "step", counted)
    monkeypatch.setattr(grpo.learner, "update", updated)
    metrics = grpo.step(0, tmp_path / "rounds")
    assert metrics["frames"] == sum(imagined) and {"spread_1", "spread_2"} <= metrics.keys()
    (e,) = seen
    assert e.advantages.shape == (len(e.tokens), 2)
    assert (e.advantages[:, 0].reshape(-1, 3).std(1) == 0).all()
    assert (e.tokens[:, :8].reshape(-1, 3, 8, 7) == e.tokens[::3, None, :8]).all()
    assert np.isfinite(metrics["loss"]) and metrics["gap_max"] < 1e-3
    for wrong in ((2, 2), (-2, -3)):
        with pytest.raises(UserError, match=r"branching is .*; expected .* whose product is"):
            config_of(tmp_path, group_size=6, branching=wrong)


def test_an_experience_has_the_frames_that_the_policy_saw(small_world, small_policy, pool):
    with pytest.raises(UserError, match='with decode="policy"'):
        experience(small_world, small_policy(), pool, decode="all")


def test_refill_rounds_go_on_until_there_are_enough(
    tmp_path, small_world, small_policy, pool, monkeypatch
):
    config = config_of(tmp_path, groups=3, accuracy_low=0.2, accuracy_high=0.8, rounds=20)
    grpo = GRPO(config, small_world, small_policy(), pool)
    found = grpo.collect(0, tmp_path / "rounds")
    assert found.mixed >= 3 and found.groups_tried >= found.mixed
    for rollout in found.rollouts:
        for name in np.unique(rollout.group_id):
            assert 0.2 <= rollout.success[rollout.group_id == name].mean() <= 0.8


@pytest.mark.parametrize("where", ["between steps", "in a refill round"])
@pytest.mark.parametrize("likely", [False, True])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(at_home, monkeypatch, where, likely):
    options = {
        "groups": 4, "accuracy_low": 0.2, "accuracy_high": 0.8, "rounds": 20, "likely_mixed": likely
    }  # fmt: skip
    whole = train(config_of(at_home, **options, out=at_home / "whole", device="auto"))
    config = config_of(at_home, **options)
    if where == "between steps":
        train(dataclasses.replace(config, steps=1))
    else:
        calls = 0

        def dies(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 3:
                raise RuntimeError("killed")
            return imagine(self, *args, **kwargs)

        imagine = GRPO.imagine
        monkeypatch.setattr(GRPO, "imagine", dies)
        with pytest.raises(RuntimeError, match="killed"):
            train(config)
        kept = list((config.out / "rollouts").rglob("rollout.json"))
        assert len(kept) >= 1, "finished rounds stay"
    resumed = train(config)
    a, b = weights_of(whole), weights_of(resumed)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)
    steps = [json.loads(row)["step"] for row in (config.out / "metrics.jsonl").open()]
    assert steps == [1, 2]


def test_uniform_groups_stop_the_run_with_the_reason(
    tmp_path, small_world, small_policy, pool, monkeypatch
):
    monkeypatch.setattr(
        small_world, "config", dataclasses.replace(small_world.config, reward_threshold=1.0)
    )
    config = config_of(tmp_path, accuracy_low=0.1, accuracy_high=0.9, rounds=2)
    grpo = GRPO(config, small_world, small_policy(), pool)
    with pytest.raises(UserError, match="2 rounds were too uniform .imagined success 0%") as error:
        grpo.step(0, tmp_path / "rounds")
    assert "\n" not in str(error.value)


def test_a_policy_that_always_succeeds_ends_the_run(at_home, small_world, monkeypatch, capsys):
    """From its second step on, and again when it is started again: it does not fail for ever."""
    config = config_of(at_home, steps=3, accuracy_low=0.1, accuracy_high=0.9, rounds=20)
    train(dataclasses.replace(config, steps=1))
    monkeypatch.setattr(
        small_world, "config",
        dataclasses.replace(small_world.config, reward_threshold=0.0, held_frames=1),
    )  # fmt: skip
    for _ in range(2):
        assert train(config).name == "000001"
        assert json.loads((config.out / "done.json").read_text())["steps"] == 1
        assert "step 1: 100% imagined success, no mixed group; the run ends" in (
            capsys.readouterr().out
        )


def failed_at_step_0(at_home, small_world, monkeypatch) -> GRPOConfig:
    """Of a run whose rounds are on disk, and in which no episode succeeded."""
    config = config_of(at_home, groups=4, accuracy_low=0.1, accuracy_high=0.9, rounds=2)
    with monkeypatch.context() as patch:
        patch.setattr(
            small_world, "config", dataclasses.replace(small_world.config, reward_threshold=1.0)
        )
        with pytest.raises(UserError, match="too uniform"):
            train(config)
    return config


def test_rounds_of_other_settings_are_not_trained_on(at_home, small_world, monkeypatch):
    config = failed_at_step_0(at_home, small_world, monkeypatch)
    rounds = config.out / "rollouts/000000"
    assert len(list(rounds.iterdir())) == 2
    with pytest.raises(UserError, match="too uniform"):
        train(config)  # the same settings: read back
    again = dataclasses.replace(config, temperature=config.temperature + 0.1)
    assert train(again).name == "000002"


def test_rounds_of_other_weights_at_the_same_path_are_not_trained_on(
    at_home, small_world, small_policy, monkeypatch
):
    config = failed_at_step_0(at_home, small_world, monkeypatch)
    shutil.rmtree(at_home / "policy")
    policy = small_policy()
    with torch.no_grad():
        next(policy.network.parameters()).add_(0.01)
    policy.save(at_home / "policy")  # trained further, as the message advises
    assert train(config).name == "000002"


def test_bad_input_is_one_clear_line(tmp_path, small_world, small_policy, pool):
    for match, changes in (
        ("group_size is 1", {"group_size": 1}),
        ("temperature is 0", {"temperature": 0.0}),
        ("coherence is 1", {"coherence": 1.0}),
        ("accuracy_low", {"accuracy_low": 0.9, "accuracy_high": 0.1}),
        ("precision is 'fp8'", {"precision": "fp8"}),
    ):
        with pytest.raises(UserError, match=match):
            config_of(tmp_path, **changes)
    with pytest.raises(UserError, match="held out"):
        GRPO(config_of(tmp_path, evaluate_every=1, evaluate_starts=9), small_world,
             small_policy(), pool)  # fmt: skip
    with pytest.raises(UserError, match="chunks of 8 actions, the policy gives 4"):
        GRPO(config_of(tmp_path), small_world, small_policy(chunk=4), pool)
    with pytest.raises(UserError, match="old_logprobs"):
        LearnerConfig(old_logprobs="guess")


def test_the_demo_shows_what_a_few_steps_do(tmp_path, small_world, small_policy, pool, monkeypatch):
    small_policy().save(tmp_path / "policy")
    monkeypatch.setattr(demo, "TINY", config_of(tmp_path, temperature=1.6))
    config = DemoConfig(policy=str(tmp_path / "policy"), grpo_steps=2)
    held_out = SimpleNamespace(starts=pool)
    found = demo.improve(small_world, held_out, config, tmp_path / "work")
    assert len(found["steps"]) == 2 and found["episodes"] == 9
    assert 0 <= found["before_ci95"][0] <= found["before"] <= found["before_ci95"][1] <= 1
    line = grpo_line({"grpo": found})
    assert f"{found['before']:.0%}" in line and f"{found['after']:.0%}" in line
    assert demo.improve(small_world, held_out, DemoConfig(grpo_steps=0), tmp_path) is None
    with pytest.raises(UserError, match="grpo_steps is -1"):
        DemoConfig(grpo_steps=-1)


# ---------------------------------------------------------------- acting elsewhere


@contextmanager
def serving(policy: VLAPolicy, port: int = 0):
    """`worldloop serve policy` in a thread of this process."""
    local = LocalPolicy(policy.network, policy.config, policy.statistics)
    server = Server(local, ServePolicyConfig("test", port=port))
    thread = threading.Thread(target=server.run)
    thread.start()
    server.thread = thread
    try:
        yield server
    finally:
        server.stop()
        thread.join(timeout=60)


class Impatient(HTTPPolicy):
    """Gives up after one retry."""

    def __init__(self, url: str, **options) -> None:
        super().__init__(url, retries=1, backoff_s=0.01, **options)


def test_rollouts_sampled_by_a_server_follow_the_learner(at_home, small_policy):
    with serving(small_policy(seed=1)) as server:  # other weights: the first sync replaces them
        config = config_of(at_home, actor=server.url, evaluate_every=1, evaluate_starts=3)
        served = train(config)
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").open()]
    assert rows[1]["gap_max"] < 1e-3 and rows[2]["gap_max"] < 1e-3
    own = train(config_of(at_home, out=at_home / "own", evaluate_every=1, evaluate_starts=3))
    for a, b in zip(weights_of(served).values(), weights_of(own).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_server_that_is_gone_ends_the_run_cleanly_and_nothing_is_lost(
    at_home, small_policy, monkeypatch
):
    options = {"groups": 4, "accuracy_low": 0.2, "accuracy_high": 0.8, "rounds": 20}
    monkeypatch.setattr(module, "HTTPPolicy", Impatient)
    imagine, calls = GRPO.imagine, 0
    with serving(small_policy()) as server:

        def dies(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 2:
                server.stop()
                server.thread.join(timeout=60)  # it answers what it has begun
            return imagine(self, *args, **kwargs)

        monkeypatch.setattr(GRPO, "imagine", dies)
        config = config_of(at_home, actor=server.url, **options)
        with pytest.raises(PolicyServerError, match=server.url) as error:
            train(config)
    assert "\n" not in str(error.value)
    assert len(list((config.out / "rollouts").rglob("rollout.json"))) == 1
    monkeypatch.setattr(GRPO, "imagine", imagine)
    with serving(small_policy()) as again:
        resumed = train(dataclasses.replace(config, actor=again.url))
    whole = train(config_of(at_home, out=at_home / "whole", **options))
    for a, b in zip(weights_of(resumed).values(), weights_of(whole).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_gap_is_logged_either_way(small_world, small_policy, pool):
    for old in ("recompute", "rollout"):
        policy = small_policy()
        e = experience(small_world, policy, pool)
        off = dataclasses.replace(e, logprobs=e.logprobs + 0.25)  # a sampler with another sum
        config = dataclasses.replace(LEARN, old_logprobs=old)
        metrics = Learner(policy, config).update(off, seed=0)
        assert metrics["gap_mean"] == pytest.approx(0.25, abs=1e-3), old
        assert metrics["gap_max"] == pytest.approx(0.25, abs=1e-3), old


def test_the_learning_rate_warms_up_and_cools_down(small_policy):
    learner = Learner(small_policy(), LearnerConfig(lr=1.0, warmup=10, cooldown=0.4))
    assert learner.learning_rate(0.0) == pytest.approx(0.1)
    learner.steps = 100
    rates = [learner.learning_rate(done) for done in (0.0, 0.6, 0.8, 1.0)]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert Learner(small_policy(), LearnerConfig(lr=1.0)).learning_rate(1.0) == 1.0


def test_two_runs_do_not_share_a_folder(at_home):
    config = config_of(at_home, steps=1)
    with exclusive(config.out), pytest.raises(UserError, match="another process is working in it"):
        train(config)
    train(config)  # the lock is gone with its holder
