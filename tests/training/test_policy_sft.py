"""Fine-tuning of the policy and its towers: data, resuming, adapters, refusals."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from worldloop.checkpoint import load_training_state
from worldloop.engine.formats.openvla import read_shards
from worldloop.engine.policy.vla import VLAPolicy
from worldloop.episodes import DatasetMeta, EpisodeWriter
from worldloop.errors import UserError
from worldloop.files import exclusive
from worldloop.training import autoencoder, common, decoder, policy_sft, towers
from worldloop.training.data import augment, load_arrays
from worldloop.training.policy_sft import Demonstrations, PolicyTraining, fit_statistics
from worldloop.types import ActionSpec, Episode

SIZE, T, CHUNK = 32, 8, 4
SPEC = ActionSpec(chunk=CHUNK)


def episode(seed: int, success: bool) -> Episode:
    """A spot at a random column; the actions' x is that column, so a policy can read it."""
    rng = np.random.default_rng(seed)
    column = int(rng.integers(5, SIZE - 5))
    frames = np.full((T + 1, SIZE, SIZE, 3), 90, np.uint8)
    frames[:, 12:20, column - 4 : column + 4] = (20, 40, 230)
    actions = np.zeros((T, 7), np.float32)
    actions[:, 0] = column / SIZE * 2 - 1
    actions[:, 1] = np.linspace(-0.5, 0.5, T)
    actions[:, 6] = -1
    reward = np.zeros(T, np.float32)
    reward[-2:] = success
    spot = np.tile(np.array([[column, 16.0]], np.float32), (T + 1, 1, 1))
    return Episode(
        frames, actions, np.zeros((T + 1, 7), np.float32) + actions[0, 0], reward, "push the cube",
        "PushCube-v1", seed, success, np.zeros((T + 1, 1, 7), np.float32), spot,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("demos")
    writer = EpisodeWriter(root, DatasetMeta(SPEC, "PushCube-v1", {"name": "test"}, T, SIZE))
    writer.add([episode(seed, seed % 3 > 0) for seed in range(12)])
    return root


def config_of(dataset, out, **changes) -> PolicyTraining:
    values = {"data": dataset, "out": out, "steps": 4, "batch": 2, "held_out": 2, "save_every": 2,
              "precision": "fp32", "device": "cpu", "warmup": 1, **changes}  # fmt: skip
    return PolicyTraining(**values)


def weights_of(folder) -> dict[str, torch.Tensor]:
    return VLAPolicy.from_pretrained(folder).network.state_dict()


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    torch.set_num_threads(1)
    return policy_sft.train(config_of(dataset, tmp_path_factory.mktemp("sft")))


# ---------------------------------------------------------------- data


def test_only_successes_and_the_actions_that_follow_a_frame(dataset, trained):
    data = load_arrays(dataset)
    policy = VLAPolicy.from_pretrained(trained)
    rows = np.flatnonzero(data.success)
    demos = Demonstrations(data, policy, rows)
    assert len(demos) == 8 and demos.last == T - CHUNK
    pictures, tokens = demos.batch(np.array([1, 5]), np.array([3, 0]))
    side = policy.network_config.image_size
    assert pictures.shape == (2, 1, side, side, 3) and tokens.shape == (2, CHUNK, 7)
    expected = policy.to_tokens(data.actions[rows[[1]], 3 : 3 + CHUNK])
    np.testing.assert_array_equal(tokens[0], expected[0])
    seen, _ = demos.all_ends()
    assert len(seen) == 8 * 2  # frames 0 and 4 of each


def test_statistics_are_quantiles_and_leave_the_gripper_alone():
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.3, 0.6, (50, 20, 7)).astype(np.float32)
    actions[..., 2] = 0.25  # never moves
    found = fit_statistics(actions, ActionSpec())
    assert found.low[0] == pytest.approx(-0.29, abs=0.02) and found.mask == (True,) * 6 + (False,)
    assert found.high[1] == pytest.approx(0.59, abs=0.02)
    assert found.high[2] > found.low[2]


def test_augmentation_keeps_type_and_place():
    pictures = torch.full((3, 1, 8, 8, 3), 100, dtype=torch.uint8)
    pictures[:, :, 2, 3] = 250
    out = augment(pictures, 0.1, np.random.default_rng(0))
    assert out.dtype == torch.uint8 and not torch.equal(out, pictures)
    assert (out.float().mean(-1).flatten(1).argmax(1) == 2 * 8 + 3).all()
    assert augment(pictures, 0.0, np.random.default_rng(0)) is pictures


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_resumed_run_equals_an_unbroken_one(dataset, trained, tmp_path, lora_rank):
    base = {"init": str(trained), "lora_rank": lora_rank} if lora_rank else {}

    def config(out):
        return config_of(dataset, out, steps=4, **base)

    out = tmp_path / "run"
    policy_sft.train(config(out))
    # A run killed after its second step: the state of step 2 is what it finds.
    broken = tmp_path / "broken"
    with pytest.MonkeyPatch.context() as patch:
        plain = common.save_state

        def dies(folder, module, optimizer, ema, step):
            plain(folder, module, optimizer, ema, step)
            raise KeyboardInterrupt

        patch.setattr(common, "save_state", dies)
        with pytest.raises(KeyboardInterrupt):
            policy_sft.train(config(broken))
    state, _ = load_training_state(broken / "state")
    if lora_rank:  # the frozen network, 15 GB of a 7B, is not in it
        assert all("lora_" in name for name in state["model"])
    resumed = policy_sft.train(config(broken))
    for a, b in zip(weights_of(out / "model").values(), weights_of(resumed).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    rows = [json.loads(line) for line in (broken / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(np.isfinite(row["held_out_loss"]) for row in rows)


def test_a_checkpoint_remembers_how_it_was_made(trained):
    policy = VLAPolicy.from_pretrained(trained)
    assert policy.config.record["demos"] == 6 and policy.config.record["steps"] == 4
    assert policy.config.suite == "PushCube-v1" and policy.action_spec.chunk == CHUNK


def test_adapters_leave_the_base_alone_and_are_merged_in_the_checkpoint(dataset, trained, tmp_path):
    config = config_of(dataset, tmp_path / "lora", init=str(trained), lora_rank=2, lr_vectors=1e-2)
    merged = policy_sft.train(config)
    assert (config.out / "lora_adapter/adapter_model.safetensors").is_file()
    base, new = read_shards(trained), read_shards(merged)
    assert base.keys() == new.keys()
    changed = {name for name in base if not torch.equal(base[name], new[name])}
    assert changed and all(base[name].dim() == 2 for name in changed)
    assert not any("lm_head" in name or "embed" in name for name in changed)


def test_full_fine_tuning_from_a_checkpoint(dataset, trained, tmp_path):
    moved = policy_sft.train(config_of(dataset, tmp_path / "full", init=str(trained)))
    base, new = read_shards(trained), read_shards(moved)
    assert not torch.equal(base["language_model.lm_head.weight"],
                           new["language_model.lm_head.weight"])  # fmt: skip


# ---------------------------------------------------------------- towers


def test_towers_learn_where_things_are_and_start_a_policy(dataset, tmp_path):
    config = towers.TowersTraining(
        data=dataset, out=tmp_path / "towers", steps=60, batch=8, held_out=2, save_every=30,
        precision="fp32", device="cpu", lr=3e-3, jitter=0.0,
    )  # fmt: skip
    folder = towers.train(config)
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").open()]
    assert rows[1]["object_pixels"] < 0.8 * rows[0]["object_pixels"]
    policy = policy_sft.train(
        config_of(dataset, tmp_path / "sft", towers=folder, steps=1, lr=0.0, lr_vectors=0.0,
                  save_every=1)
    )  # fmt: skip
    stored = towers.load_checkpoint(folder).parts["model"]
    network = weights_of(policy)
    for name, value in stored.items():
        torch.testing.assert_close(network[f"vision_backbone.{name}"], value, rtol=0.02, atol=1e-3)


# ---------------------------------------------------------------- refusals


def test_bad_input_is_one_clear_line(dataset, trained, tmp_path):
    with pytest.raises(UserError, match="adapters need a checkpoint"):
        config_of(dataset, tmp_path, lora_rank=4)
    with pytest.raises(UserError, match="give one of both"):
        config_of(dataset, tmp_path, init="x", towers=tmp_path)
    with pytest.raises(UserError, match="2 successful episodes are used and held_out is 2"):
        policy_sft.train(config_of(dataset, tmp_path / "few", demos=2))
    with pytest.raises(UserError, match="held_out is 12"):
        towers.train(towers.TowersTraining(data=dataset, out=tmp_path / "t", held_out=12))
    other = tmp_path / "other"
    spec = dataclasses.replace(SPEC, control_hz=10.0)
    writer = EpisodeWriter(other, DatasetMeta(spec, "PushCube-v1", {"name": "test"}, T, SIZE))
    writer.add([episode(seed, True) for seed in range(4)])
    with pytest.raises(ValueError, match="control_hz"):
        policy_sft.train(config_of(other, tmp_path / "x", init=str(trained)))


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights(dataset, tmp_path, monkeypatch):
    config = config_of(dataset, tmp_path / "nan")
    policy_sft.train(dataclasses.replace(config, steps=2))
    before = weights_of(config.out / "model")
    loss = policy_sft.policy_loss
    monkeypatch.setattr(policy_sft, "policy_loss", lambda *args: loss(*args) * float("nan"))
    with pytest.raises(UserError, match="step 2: the gradient's norm is nan; .* last good"):
        policy_sft.train(config)
    for a, b in zip(before.values(), weights_of(config.out / "model").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("module", [autoencoder, decoder, policy_sft, towers])
def test_two_runs_do_not_write_into_one_folder(module, tmp_path):
    with (
        exclusive(tmp_path / "run"),
        pytest.raises(UserError, match="another process is working in it"),
    ):
        module.main(["--data", str(tmp_path), "--out", str(tmp_path / "run")])
