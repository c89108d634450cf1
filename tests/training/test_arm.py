"""The arm is fitted where the linear sum fails: on a hand that is pressed on a table."""

import dataclasses

import numpy as np
import torch

from worldloop.training.arm import fit_arm, fit_object_head, fit_pose_head, position_error
from worldloop.training.data import EpisodeArrays, fit_action_spec
from worldloop.training.latents import rollout_poses
from worldloop.types import ActionSpec

GAIN = 0.03  # metres a command


def episodes(count: int, seed: int, T: int = 32, up: int = 0) -> EpisodeArrays:
    """Hands that sink onto a table at z = 9 mm, where they stop and drag at half their speed.

    up: the first actions, which lead upwards.
    """
    rng = np.random.default_rng(seed)
    # Each episode goes its own way, so that some press on the table for long.
    way = rng.uniform(-0.4, 0.4, (count, 1, 7))
    actions = (way + rng.uniform(-0.2, 0.2, (count, T, 7))).clip(-1, 1).astype(np.float32)
    actions[:, :up, 2] = np.abs(actions[:, :up, 2]) / 4
    states = np.zeros((count, T + 1, 7), np.float32)
    states[:, 0, 2] = rng.uniform(0.02, 0.15, count)
    for t in range(T):
        move = GAIN * actions[:, t]
        touches = states[:, t, 2] + move[:, 2] <= 0.009
        move[touches, :2] *= 0.5
        states[:, t + 1] = states[:, t] + move
        states[touches, t + 1, 2] = 0.009
        states[:, t + 1, 6] = actions[:, t, 6]
    return EpisodeArrays(
        frames=np.zeros((count, T + 1, 8, 8, 3), np.uint8),
        actions=actions,
        states=states,
        reward=np.zeros((count, T), np.float32),
        success=np.zeros(count, bool),
        object_pixels=None,
        action_spec=fit_action_spec(ActionSpec(chunk=8), actions, states),
        env_id="PushCube-v1",
        instruction="push the cube",
        seeds=tuple(range(count)),
        numbers=np.arange(count),
    )


def test_contact_is_learned():
    data, unseen = episodes(96, 0), episodes(48, 1)
    actions, states = unseen.actions, unseen.states
    linear = position_error(data.action_spec.to_absolute(actions, states[:, 0]), states)
    arm = fit_arm([data], 0, steps=400)
    fitted = position_error(arm.poses(actions, states[:, 0]), states)
    assert linear > 0.04
    assert fitted < linear / 4


def test_the_end_of_long_episodes_is_learned_beside_short_ones():
    """Contact comes after the end of the short ones."""
    parts = [episodes(48, 0, 16, up=16), episodes(96, 1, 48, up=16)]
    unseen = episodes(48, 2, 48, up=16)
    actions, states = unseen.actions, unseen.states
    spec = fit_action_spec(ActionSpec(chunk=8), parts[1].actions, parts[1].states)
    parts = [dataclasses.replace(part, action_spec=spec) for part in parts]
    linear = position_error(spec.to_absolute(actions, states[:, 0]), states)
    fitted = position_error(fit_arm(parts, 0, steps=400).poses(actions, states[:, 0]), states)
    assert linear > 0.04
    assert fitted < linear / 4


def test_the_last_episodes_stay_unseen_and_a_seed_repeats():
    data = episodes(12, 0)
    changed = data.actions.copy()
    changed[8:] = 1
    other = dataclasses.replace(data, actions=changed)
    one, two = fit_arm([data], 4, steps=3), fit_arm([other], 4, steps=3)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


def latents_of(data: EpisodeArrays, grid: int = 8) -> np.ndarray:
    """Latents [N,F,2,grid,grid] that show the hand: a spot at (x, y), its height as brightness.

    Out of the picture, beyond 0.3 m, they show nothing.
    """
    hand = data.states[:, ::4, :3]  # [N,F,3]
    cells = np.linspace(-0.3, 0.3, grid)
    spots = [np.exp(-(((hand[..., i, None] - cells) / 0.08) ** 2)) for i in (0, 1)]
    spot = spots[0][..., :, None] * spots[1][..., None, :]
    shown = np.abs(hand[..., :2]).max(-1) < 0.3
    spot = spot * shown[..., None, None]
    return np.stack([spot, spot * hand[..., 2, None, None] * 10], 2).astype(np.float16)


def stopped(data: EpisodeArrays, seed: int) -> EpisodeArrays:
    """Half of the hands lie still for good from step 4 on: no command tells which."""
    states = data.states.copy()
    lying = np.random.default_rng(seed).random(len(data)) < 0.5
    states[lying, 5:, :6] = states[lying, 4:5, :6]
    return dataclasses.replace(data, states=states)


def test_what_no_command_tells_is_seen():
    data, unseen = stopped(episodes(128, 0), 0), stopped(episodes(64, 1), 1)
    arm = fit_arm([data], 0, steps=200)
    blind = position_error(rollout_poses(unseen, arm, latents_of(unseen)), unseen.states)
    seeing = fit_pose_head(arm, [data], [latents_of(data)], held_out=8, steps=500)
    mended = position_error(rollout_poses(unseen, seeing, latents_of(unseen)), unseen.states)
    assert blind > 0.1
    assert mended < blind / 2
    for name, tensor in arm.state_dict().items():
        assert torch.equal(seeing.state_dict()[name], tensor), name


def test_the_pose_head_never_sees_the_last_episodes_and_a_seed_repeats():
    data = episodes(12, 0)
    arm = fit_arm([data], 4, steps=2)
    z, changed = latents_of(data), latents_of(data)
    changed[8:] = 1
    one, two = (fit_pose_head(arm, [data], [each], held_out=4, steps=3) for each in (z, changed))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


def over_cubes(count: int, seed: int, T: int = 16) -> tuple[EpisodeArrays, np.ndarray]:
    """Hands that sink, and stop at 5 cm where a cube lies below; latents that show the cube."""
    data = episodes(count, seed, T)
    rng = np.random.default_rng(seed + 100)
    objects = np.zeros((count, T + 1, 1, 7), np.float32)
    objects[..., :2] = rng.uniform(-0.12, 0.12, (count, 1, 1, 2))
    objects[..., 2], actions = 0.02, data.actions.copy()
    actions[..., :2] *= 0.05
    actions[..., 2] = -0.25
    states = data.states.copy()
    states[:, 0, :2] = objects[:, 0, 0, :2] + rng.uniform(-0.12, 0.12, (count, 2))
    states[:, 0, 2] = states[:, 0, 2].clip(0.06)
    for t in range(T):
        states[:, t + 1] = states[:, t] + GAIN * actions[:, t]
        over = np.abs(states[:, t, :2] - objects[:, t, 0, :2]).max(-1) < 0.06
        lowest = np.where(over & (states[:, t, 2] >= 0.05), 0.05, 0.009)
        states[:, t + 1, 2] = np.maximum(states[:, t + 1, 2], lowest)
    cells = np.linspace(-0.3, 0.3, 8)
    spots = [np.exp(-(((objects[:, ::4, 0, i, None] - cells) / 0.08) ** 2)) for i in (0, 1)]
    spot = spots[0][..., :, None] * spots[1][..., None, :]
    z = np.stack([spot, 1 - spot], 2).astype(np.float16)
    return dataclasses.replace(data, actions=actions, states=states, objects=objects), z


def test_a_hand_that_comes_down_on_a_cube_is_foreseen():
    (data, z), (unseen, unseen_z) = over_cubes(256, 0), over_cubes(256, 1)
    head, off = fit_object_head([data], [z], held_out=32, steps=300)
    assert off < 0.01
    blind = fit_arm([data], 32, steps=600)
    seeing = fit_arm([data], 32, steps=600, object_head=head)
    ends = unseen.states[:, -1, :3]
    missed, met = (
        np.linalg.norm(rollout_poses(unseen, arm, unseen_z)[:, -1, :3] - ends, axis=-1) > 0.015
        for arm in (blind, seeing)
    )
    assert missed.mean() > 0.1
    assert met.mean() < missed.mean() / 2  # what is left are hands near a cube's edge
    for name, tensor in head.state_dict().items():
        assert torch.equal(seeing.object_head.state_dict()[name], tensor), name


def test_the_object_head_never_sees_the_last_episodes_and_a_seed_repeats():
    data, z = over_cubes(12, 0)
    changed, moved = z.copy(), data.objects.copy()
    changed[8:], moved[8:] = 1, 5
    other = dataclasses.replace(data, objects=moved)
    (one, _), (two, _) = (
        fit_object_head([part], [each], held_out=4, steps=3)
        for part, each in ((data, z), (other, changed))
    )
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
