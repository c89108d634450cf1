"""Fit the arm: poses from commands, on recorded episodes (`worldloop.engine.arm`).

`worldloop train world-model` does it first, in about five minutes on one core. Pieces of episodes
are followed from their true first pose and compared along the whole piece, so that what adds up is
what is trained. Episodes that the linear sum gets wrong, which are those with contact, are drawn
more often.

Before it the head that reads where the object is (`fit_object_head`), where the recordings say it:
the arm is fitted on the true positions, a little beside, and has the head's at work.

After it its pose head (`fit_pose_head`): on recorded latents beside the poses that the commands of
a chunk lead to, some of them pushed aside, as those of an imagined episode are.

Shape letters: N episodes, T actions, B pieces, P commands.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloop.engine.arm import MOVES, Arm, ArmConfig, HeadConfig, ObjectHead
from worldloop.training.data import EpisodeArrays

WORTH = (1 / 0.005,) * 3 + (1 / 0.05,) * 3  # 5 mm weigh as much as 0.05 rad
BATCH = 64
PIECE = 32  # actions
LR = 3e-3
HEAD_BATCH, HEAD_LR = 96, 2e-3
ASIDE = (0.02,) * 3 + (0.1,) * 3  # metres and radians: how far half of the poses are pushed
READ = 0.003, 0.008  # metres: how far the object is misread, in first frames and in later ones
FIRST_FRAMES = 0.4  # share of first frames, where nothing hides the object, for the object head
LATENT_NOISE = 0.15  # largest standard deviation: imagined latents are not quite the recorded


def fit_arm(
    parts: Sequence[EpisodeArrays],
    held_out: int,
    steps: int,
    seed: int = 0,
    object_head: ObjectHead | None = None,
) -> Arm:
    """An arm fitted on all but the last ``held_out`` episodes of each delta-pose dataset.

    object_head: becomes a part of it, as it is; the recordings' objects say what it is to see.
    """
    spec = parts[0].action_spec
    assert spec.controller is not None
    trained = [slice(len(part) - held_out) for part in parts]
    actions = [part.actions[rows] for part, rows in zip(parts, trained)]
    states = [part.states[rows] for part, rows in zip(parts, trained)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        arm, beside_object = Arm(ArmConfig()), None
        if object_head is not None:
            arm = Arm(ArmConfig(object_head=object_head.config))
            arm.object_head = copy.deepcopy(object_head).requires_grad_(False)
            seen_objects = [
                part.first_objects[rows, :, 0, :3] for part, rows in zip(parts, trained)
            ]
            beside_object = _together(seen_objects)
        taps = np.zeros((arm.config.past, MOVES), np.float32)
        for columns, fitted in (
            (slice(0, 3), spec.controller.position_taps),
            (slice(3, 6), spec.controller.rotation_taps),
        ):
            kept = fitted[: arm.config.past]
            taps[: len(kept), columns] = np.array(kept, np.float32)[:, None]
        arm.linear.data.copy_(torch.from_numpy(taps))
        commands = _together([arm.windows(each).numpy() for each in actions])
        poses = _together([each[..., :MOVES] for each in states])
        lengths = torch.tensor([len(row) for each in actions for row in each])
        all_poses = np.concatenate([each[..., :MOVES].reshape(-1, MOVES) for each in states])
        arm.pose_mean.copy_(torch.from_numpy(all_poses.mean(0)))
        arm.pose_std.copy_(torch.from_numpy(all_poses.std(0)).clamp_min(0.02))
        wrong = np.concatenate([
            np.abs(spec.to_absolute(a, s[:, 0]) - s[:, 1:])[..., :3].max((1, 2))
            for a, s in zip(actions, states)
        ])  # fmt: skip
        often = torch.from_numpy(1 + wrong / max(float(wrong.mean()), 1e-6))
        worth, piece = torch.tensor(WORTH), min(PIECE, int(lengths.min()))
        fitted_weights = [p for p in arm.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(fitted_weights, lr=LR, weight_decay=1e-4)
        for step in range(steps):
            fall = 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 50) * fall
            rows = torch.multinomial(often, BATCH, replacement=True)
            first = (torch.rand(BATCH) * (lengths[rows] - piece + 1)).long()
            at = first[:, None] + torch.arange(piece)
            # Half of the pieces start a little beside, where an earlier error may have led.
            beside = torch.randn(BATCH, MOVES) * 0.4 / worth * (torch.rand(BATCH, 1) < 0.5)
            seen = None
            if beside_object is not None:
                off = torch.where(first == 0, *READ)[:, None]
                seen = beside_object[rows, first] + off * torch.randn(BATCH, 3)
            made = arm(commands[rows[:, None], at], poses[rows, first] + beside, seen)
            error = (made - poses[rows[:, None], at + 1]) * worth
            loss = F.smooth_l1_loss(error, torch.zeros_like(error))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(fitted_weights, 1.0)
            optimizer.step()
    return arm.eval()


def _together(arrays: Sequence[npt.NDArray[np.float32]]) -> Tensor:
    """[N,T,...] of several horizons as one tensor, with zeros behind the ends of shorter ones."""
    longest = max(each.shape[1] for each in arrays)
    padded = [
        np.pad(each, [(0, 0), (0, longest - each.shape[1]), *[(0, 0)] * (each.ndim - 2)])
        for each in arrays
    ]
    return torch.from_numpy(np.concatenate(padded))


def fit_object_head(
    parts: Sequence[EpisodeArrays],
    latents: Sequence[npt.NDArray[Any]],
    held_out: int,
    steps: int,
    seed: int = 0,
) -> tuple[ObjectHead, float]:
    """A head fitted on all but the last ``held_out`` episodes of each dataset, and by how many
    metres (median) it misreads the first object in the frames that chunks of those start from.

    latents: [N,F,C,H,W] of each, of the first frame and those after the actions.
    """
    _, _, C, H, W = latents[0].shape
    per_latent = [p.actions.shape[1] // (z.shape[1] - 1) for p, z in zip(parts, latents)]
    places = [p.first_objects[:, ::n, 0, :3] for p, n in zip(parts, per_latent)]
    trained = np.concatenate([each[: len(each) - held_out].reshape(-1, 3) for each in places])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ObjectHead(HeadConfig(C, (H, W)))
        head.mean.copy_(torch.from_numpy(trained.mean(0)))
        head.std.copy_(torch.from_numpy(trained.std(0)).clamp_min(0.005))
        optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD_LR, weight_decay=1e-3)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = _head_rate(step, steps)
            part = int(torch.randint(len(parts), ()))
            z = latents[part]
            rows = torch.randint(len(z) - held_out, (HEAD_BATCH,)).numpy()
            later = torch.rand(HEAD_BATCH) > FIRST_FRAMES
            frame = (torch.randint(z.shape[1], (HEAD_BATCH,)) * later).numpy()
            read = head(_noisy(z[rows, frame]))
            error = (read - torch.from_numpy(places[part][rows, frame])) / head.std
            loss = F.smooth_l1_loss(error, torch.zeros_like(error), beta=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        misread = []
        chunk = parts[0].action_spec.chunk
        for z, place, n in zip(latents, places, per_latent, strict=True):
            unseen = slice(len(z) - held_out, None), slice(0, -1, chunk // n)
            with torch.no_grad():
                pictures = torch.from_numpy(np.asarray(z[unseen], np.float32)).flatten(0, 1)
                read = head(pictures).numpy()
            misread.append(np.linalg.norm(read - place[unseen].reshape(-1, 3), axis=-1))
    return head.eval(), float(np.median(np.concatenate(misread)))


def _head_rate(step: int, steps: int) -> float:
    fall = 0.5 * (1 + math.cos(math.pi * step / steps))
    return HEAD_LR * min(1.0, (step + 1) / 100) * fall


def _noisy(latents: npt.NDArray[Any]) -> Tensor:
    """Recorded latents [B,C,H,W] as unlike the true ones as imagined latents are."""
    latent = torch.from_numpy(np.asarray(latents, np.float32))
    return latent + LATENT_NOISE * torch.rand(len(latent), 1, 1, 1) * torch.randn_like(latent)


def fit_pose_head(
    arm: Arm,
    parts: Sequence[EpisodeArrays],
    latents: Sequence[npt.NDArray[Any]],
    held_out: int,
    steps: int,
    seed: int = 0,
) -> Arm:
    """The arm with a pose head, fitted on all but the last ``held_out`` episodes of each dataset.

    latents: [N,F,C,H,W] of each, of the first frame and those after the actions.
    """
    _, _, C, H, W = latents[0].shape
    told = [told_poses(arm, part, z) for part, z in zip(parts, latents, strict=True)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        seeing = Arm(replace(arm.config, pose_head=HeadConfig(C, (H, W))))
        seeing.load_state_dict(arm.state_dict(), strict=False)
        assert seeing.pose_head is not None
        worth, aside = torch.tensor(WORTH), torch.tensor(ASIDE)
        optimizer = torch.optim.AdamW(seeing.pose_head.parameters(), lr=HEAD_LR, weight_decay=1e-3)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = _head_rate(step, steps)
            part = int(torch.randint(len(parts), ()))
            z, states = latents[part], parts[part].states
            rows = torch.randint(len(z) - held_out, (HEAD_BATCH,)).numpy()
            frame = torch.randint(1, z.shape[1], (HEAD_BATCH,)).numpy()
            after = frame * (parts[part].actions.shape[1] // (z.shape[1] - 1))
            latent = _noisy(z[rows, frame])
            pose = torch.from_numpy(told[part][rows, after - 1])
            true = torch.from_numpy(states[rows, after, :MOVES])
            far = torch.rand(HEAD_BATCH, 1) * (torch.rand(HEAD_BATCH, 1) < 0.5)
            mended, read = seeing.seen(latent, pose + torch.randn(HEAD_BATCH, MOVES) * aside * far)
            loss = sum(
                share * F.smooth_l1_loss((made - true) * worth / 2, torch.zeros_like(true))
                for share, made in ((1.0, mended), (0.3, read))
            )
            assert isinstance(loss, torch.Tensor)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return seeing.eval()


def told_poses(arm: Arm, data: EpisodeArrays, latents: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Poses [N,T,6] that the commands of each chunk lead to from its true first pose."""
    return chunk_poses(data, arm, latents, lambda rows, end, _: data.states[rows, end])[..., :MOVES]


def chunk_poses(
    data: EpisodeArrays,
    arm: Arm | None,
    latents: npt.NDArray[Any],
    go_on: Callable[[npt.NDArray[np.int64], int, npt.NDArray[np.float32]], npt.NDArray[np.float32]],
) -> npt.NDArray[np.float32]:
    """Poses [N,T,A] after each action, by the commands of a chunk from where it starts.

    latents: [N,F,C,H,W]; an arm that sees the object sees those of each chunk's start. go_on: from
    some episodes' rows, the action's number at which a chunk ends, and the poses [n,A] there, to
    the poses that the next chunk starts from.
    """
    chunk, T = data.action_spec.chunk, data.actions.shape[1]
    per_latent = T // (latents.shape[1] - 1)
    made = np.empty_like(data.actions)
    # A few at a time: a head's features of a thousand pictures are gigabytes.
    for rows in np.array_split(np.arange(len(data)), -(-len(data) // 256)):
        pose = data.states[rows, 0]
        for begin in range(0, T, chunk):
            end = min(begin + chunk, T)
            actions, past = data.actions[rows, begin:end], data.actions[rows, :begin]
            if arm is None:
                poses = data.action_spec.to_absolute(actions, pose, past)
            else:
                seen = arm.object_head is not None
                z = torch.from_numpy(latents[rows, begin // per_latent]) if seen else None
                poses = arm.poses(actions, pose, past, z)
            made[rows, begin:end] = poses
            pose = go_on(rows, end, poses[:, -1])
    return made


def position_error(poses_NTA: npt.NDArray[np.float32], states: npt.NDArray[np.float32]) -> float:
    """Metres: root mean square over episodes of the distance at their end."""
    last = poses_NTA[:, -1, :3] - states[:, poses_NTA.shape[1], :3]
    return float(np.sqrt(np.square(last).sum(-1).mean()))
