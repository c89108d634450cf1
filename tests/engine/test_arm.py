"""Commands to poses: the linear sum as a special case, histories, precision, checkpoints."""

import dataclasses

import numpy as np
import pytest
import torch

from worldloop.engine.arm import Arm, ArmConfig, HeadConfig
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError


def arm_of(small, correcting: bool) -> Arm:
    """The linear fit of the tests' action spec, with random corrections or none."""
    torch.manual_seed(0)
    arm = Arm(ArmConfig(past=3, width=16))
    fit = small.SPEC.controller
    taps = [fit.position_taps] * 3 + [fit.rotation_taps] * 3
    arm.linear.data.copy_(torch.tensor(taps).T)
    if correcting:
        small.randomise(arm.fc3)
    return arm.eval()


def test_without_corrections_it_is_the_linear_sum(small):
    actions, start = small.actions_of(3, 20), small.poses_of(3)
    made = arm_of(small, correcting=False).poses(actions, start)
    np.testing.assert_allclose(made, small.SPEC.to_absolute(actions, start), atol=1e-6)


def test_chunk_after_chunk_is_the_whole_episode(small):
    arm, actions, start = arm_of(small, True), small.actions_of(2, 24), small.poses_of(2)
    whole = arm.poses(actions, start)
    assert np.abs(whole - small.SPEC.to_absolute(actions, start)).max() > 1e-3
    first = arm.poses(actions[:, :8], start)
    second = arm.poses(actions[:, 8:], first[:, -1], actions[:, 6:8])
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=1e-6)
    # What lies further back than it reads is of no account.
    longer = arm.poses(actions[:, 8:], first[:, -1], actions[:, :8])
    np.testing.assert_array_equal(longer, second)
    assert np.abs(arm.poses(actions[:, 8:], first[:, -1]) - second).max() > 1e-3


def world_with_arm(small) -> WorldModel:
    world = small.world_of(arm=ArmConfig(past=3, width=16))
    world.arm.load_state_dict(arm_of(small, True).state_dict())
    return world


def test_the_world_model_is_told_the_corrected_poses(small, monkeypatch):
    world = world_with_arm(small)
    actions, start = small.actions_of(2, 16), small.poses_of(2)
    whole = world.arm.poses(actions, start)
    _, _, state = small.generate(world, small.frames_of(2), start, actions, [1, 2])
    np.testing.assert_allclose(state.poses, whole[:, -1], atol=1e-6)
    assert state.past_actions.shape[1] == world.lag == 2


def seeing_world(small) -> WorldModel:
    """With a pose head that changes every pose."""
    channels = small.config_of().dit.latent_channels
    head = HeadConfig(channels, (4, 4), width=8, hidden=8)
    world = small.world_of(arm=ArmConfig(past=3, width=16, pose_head=head))
    world.arm.load_state_dict(arm_of(small, True).state_dict(), strict=False)
    small.randomise(world.arm.pose_head)
    return world


def test_each_chunk_starts_from_the_pose_that_is_seen(small):
    world = seeing_world(small)
    actions, start = small.actions_of(2, 16), small.poses_of(2)
    state = world.start(small.frames_of(2), start, [1, 2])
    for begin in (0, 8):
        told = world.poses(state, actions[:, begin : begin + 8])
        _, state = world.step(state, actions[:, begin : begin + 8], steps=1)
        pose = world.arm.look(state.last_latent[:, :, -1], told[:, -1])
        np.testing.assert_array_equal(state.poses, pose)
        assert np.abs(pose - told[:, -1])[:, :6].min() > 1e-4
        assert (pose[:, 6] == told[:, -1, 6]).all()


def test_the_pose_head_is_part_of_the_checkpoint(small, tmp_path):
    world = seeing_world(small)
    again = WorldModel.from_pretrained(world.save(tmp_path / "world"), dtype=torch.bfloat16)
    latent, pose = (
        torch.randn(2, again.arm.config.pose_head.latent_channels, 4, 4),
        small.poses_of(2),
    )
    with torch.autocast("cpu", torch.bfloat16):
        seen = again.arm.look(latent, pose)
    np.testing.assert_array_equal(seen, world.arm.look(latent, pose))


def test_an_arm_that_sees_the_object_is_told_where_each_chunk_finds_it(small, tmp_path):
    channels = small.config_of().dit.latent_channels
    head = HeadConfig(channels, (4, 4), width=8, hidden=8)
    world = small.world_of(arm=ArmConfig(past=3, width=16, object_head=head))
    small.randomise(world.arm)
    again = WorldModel.from_pretrained(world.save(tmp_path / "world"))
    actions, start = small.actions_of(2, 16), small.poses_of(2)
    state = again.start(small.frames_of(2), start, [1, 2])
    for begin in (0, 8):
        chunk, pose, past = actions[:, begin : begin + 8], state.poses, state.past_actions
        latent = state.last_latent[:, :, -1]
        seen = world.arm.poses(chunk, pose, past, latent)
        assert np.abs(seen - world.arm.poses(chunk, pose, past, latent.flip(0))).max() > 1e-4
        _, state = again.step(state, chunk, steps=1)
        np.testing.assert_array_equal(state.poses, seen[:, -1])
    with pytest.raises(UserError, match="give the latents"):
        world.arm.poses(actions, start)
    large = dataclasses.replace(head, grid=(8, 8))
    with pytest.raises(UserError, match="arm.object_head.grid"):
        small.world_of(arm=ArmConfig(object_head=large))


def test_it_stays_in_fp32_and_is_saved_so(small, tmp_path):
    world = world_with_arm(small)
    before = world.arm.state_dict()
    half = world.to(torch.bfloat16)
    assert half.dit.dtype == torch.bfloat16
    world.save(tmp_path / "world", torch.float16)
    again = WorldModel.from_pretrained(tmp_path / "world", dtype=torch.bfloat16)
    for name, tensor in before.items():
        assert again.arm.state_dict()[name].dtype == torch.float32
        assert torch.equal(again.arm.state_dict()[name], tensor)
    with torch.autocast("cpu", torch.bfloat16):
        actions, start = small.actions_of(2, 8), small.poses_of(2)
        inside = again.arm.poses(actions, start)
    np.testing.assert_array_equal(inside, world.arm.poses(actions, start))


def test_an_arm_needs_increments(small):
    config = small.config_of()
    absolute = dataclasses.replace(config.action_spec, kind="absolute_pose")
    with pytest.raises(UserError, match="arm is given, but action_spec.kind is 'absolute_pose'"):
        dataclasses.replace(config, action_spec=absolute, arm=ArmConfig())
