"""What a world-model run starts from: an earlier checkpoint, published weights, a fitted arm.

Shape letters: A action dim, H hidden features, P poses a latent frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldloop.checkpoint import load_checkpoint, load_into, save_checkpoint
from worldloop.config import config_from_dict, config_to_dict
from worldloop.engine.arm import Arm, ArmConfig, ObjectHead
from worldloop.engine.dit import DiT
from worldloop.engine.dit_config import PRESETS, DiTConfig
from worldloop.engine.formats.cosmos import infer_config, read_cosmos, strip_cosmos
from worldloop.engine.world_model import WorldModelConfig
from worldloop.errors import UserError
from worldloop.training.arm import fit_arm, fit_object_head, fit_pose_head, position_error
from worldloop.training.common import Workers
from worldloop.training.data import EpisodeArrays
from worldloop.training.latents import rollout_poses
from worldloop.types import ActionSpec

if TYPE_CHECKING:
    from worldloop.training.world_model import WorldModelTraining

STEEPEST = 4.0  # most by which a pose's weights grow where its unit does


def load_published(dit: DiT, path: Path) -> None:
    """Take over every tensor of a Cosmos ``.pt`` whose name and shape fit; say what does not."""
    try:
        state = strip_cosmos(read_cosmos(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    own = dit.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if len(fitting) < 0.5 * len(own):
        raise UserError(
            f"{path}: only {len(fitting)} of {len(own)} tensors fit this network of width "
            f"{dit.config.width} and depth {dit.config.depth}; choose the preset it was made for"
        )
    dit.load_state_dict(fitting, strict=False)
    fresh = sorted(own.keys() - fitting.keys())
    print(f"{path}: {len(fitting)} tensors taken over; {len(fresh)} start afresh"
          + (f": {', '.join(fresh[:6])}" if fresh else ""))  # fmt: skip


def load_start(folder: Path) -> tuple[WorldModelConfig, dict[str, dict[str, Tensor]]]:
    """Configuration and weights of the world model to start from; raises UserError naming it."""
    checkpoint = load_checkpoint(folder, kind="world_model")
    config = config_from_dict(WorldModelConfig, checkpoint.config, str(folder))
    for part in ("dit", "reward", *(() if config.arm is None else ("arm",))):
        if part not in checkpoint.parts:
            raise UserError(f"{folder}: has no {part!r} weights; it is not a whole world model")
    return config, checkpoint.parts


def dit_sizes(
    config: WorldModelTraining,
    data: EpisodeArrays,
    latent_CHW: tuple[int, ...],
    base: WorldModelConfig | None,
) -> DiTConfig:
    """The transformer's sizes: the preset's or the starting checkpoint's, fitted to the data."""
    if base is not None:
        sizes = base.dit
    elif config.init is not None:
        sizes = infer_config(strip_cosmos(read_cosmos(config.init)))
    else:
        sizes = PRESETS[config.preset]()
    channels, height, width = latent_CHW
    changes: dict[str, Any] = {
        "width": config.width or sizes.width,
        "depth": config.depth or sizes.depth,
        "latent_channels": channels,
        "action_dim": data.action_spec.dim,
        "action_layout": "per_frame",  # the published one cannot stream
    }
    if sizes.learned_positions is not None:
        changes["learned_positions"] = (height // sizes.patch, width // sizes.patch)
    fitted = replace(sizes, **changes)
    if base is not None and fitted != sizes:
        unlike = [name for name in changes if getattr(fitted, name) != getattr(sizes, name)]
        raise UserError(
            f"{config.init}: its {unlike[0]} is {getattr(sizes, unlike[0])}, this run's "
            f"{getattr(fitted, unlike[0])}; start from a checkpoint of the same sizes"
        )
    return fitted


def keep_statistics(dit: dict[str, Tensor], base: ActionSpec, data: ActionSpec) -> ActionSpec:
    """The data's action spec with the pose statistics that the weights were trained with.

    Except where the data moves much farther than those allow for (a gripper that was always closed
    now opens): such a direction takes the data's mean and deviation, and the first layer of the
    action embedders in ``dit`` (its entries are replaced) is rescaled so that a pose is answered as
    before. By at most `STEEPEST`: what never moved has weights that were never trained.
    """
    mean, std = (np.array(getattr(base, f"pose_{name}"), np.float64) for name in ("mean", "std"))
    new_mean, new_std = (np.array(getattr(data, f"pose_{n}"), np.float64) for n in ("mean", "std"))
    wider = (new_std > 2 * std) | (np.abs(new_mean - mean) > 3 * std)
    scale = np.where(wider, np.minimum(new_std / std, STEEPEST), 1.0)
    shift = np.where(wider, scale * (new_mean - mean) / new_std, 0.0)
    if wider.any():
        for name in ("action_embedder_B_D.fc1", "action_embedder_B_3D.fc1"):
            weight_HPA = dit[f"{name}.weight"].double().unflatten(1, (-1, len(scale)))
            bias_H = dit[f"{name}.bias"] + (weight_HPA * torch.from_numpy(shift)).sum((1, 2))
            dit[f"{name}.weight"] = (weight_HPA * torch.from_numpy(scale)).flatten(1).float()
            dit[f"{name}.bias"] = bias_H.float()
    chosen_mean, chosen_std = np.where(wider, new_mean, mean), np.where(wider, new_std, std)
    return replace(
        data,
        pose_mean=tuple(float(v) for v in chosen_mean),
        pose_std=tuple(float(v) for v in chosen_std),
    )


def arm_of(
    config: WorldModelTraining,
    parts: Sequence[EpisodeArrays],
    latents: Sequence[npt.NDArray[Any]],
    base: WorldModelConfig | None,
    start: dict[str, dict[str, Tensor]] | None,
    workers: Workers,
) -> Arm | None:
    """Fitted on this data once a run and kept in ``out/arm``; or that of ``init``; or None.

    Of a fitted one and that of ``init`` the one that ends nearer on held-out episodes.
    """
    spec, folder = parts[0].action_spec, config.out / "arm"
    known = base is not None and base.arm is not None
    if spec.kind != "delta_pose" or (config.arm_steps == 0 and not known):
        return None
    if workers.rank == 0 and not (folder / "config.json").is_file():
        candidates, head = {}, None
        if known:
            assert base is not None and base.arm is not None and start is not None
            candidates["that of init"] = Arm(base.arm)
            load_into(candidates["that of init"], start["arm"], f"{config.init} (arm)")
            head = candidates["that of init"].object_head
        if config.arm_steps:
            head = _object_head(config, parts, latents, head)
            candidates["fitted"] = fit_arm(
                parts, config.held_out, config.arm_steps, config.seed, head
            )
        off = {
            name: off_at_the_end(arm, parts, latents, config.held_out)
            for name, arm in candidates.items()
        }
        chosen = min(off, key=lambda name: off[name][1])
        arm, (linear, fitted) = candidates[chosen], off[chosen]
        told = ", ".join(f"{name} {mm:.1f} mm" for name, (_, mm) in off.items())
        print(f"arm: {linear:.1f} mm off at the end of held-out episodes, {told}; kept: {chosen}")
        if config.pose_head_steps:
            seeing = fit_pose_head(
                arm, parts, latents, config.held_out, config.pose_head_steps, config.seed
            )
            _, seen = off_at_the_end(seeing, parts, latents, config.held_out)
            # 160 episodes are too few: the head knows them by heart, and misreads all others.
            kept = seen < fitted
            arm = seeing if kept else arm
            print(f"pose head: {seen:.1f} mm, " + ("kept" if kept else "worse than none: left out"))
        save_checkpoint(folder, {"arm": arm.state_dict()}, config_to_dict(arm.config), kind="arm")
    workers.barrier()
    checkpoint = load_checkpoint(folder, kind="arm")
    arm = Arm(config_from_dict(ArmConfig, checkpoint.config, str(folder)))
    load_into(arm, checkpoint.parts["arm"], str(folder))
    return arm.eval()


def _object_head(
    config: WorldModelTraining,
    parts: Sequence[EpisodeArrays],
    latents: Sequence[npt.NDArray[Any]],
    known: ObjectHead | None,
) -> ObjectHead | None:
    """Fitted, or the known one where no steps are asked for; None where it reads objects badly, or
    where not all recordings say where they are, which the arm is fitted with."""
    if any(part.objects is None for part in parts):
        return None
    if not config.object_head_steps:
        return known
    head, off = fit_object_head(
        parts, latents, config.held_out, config.object_head_steps, config.seed
    )
    kept = off < Arm.BESIDE[0] / 2
    said = "kept" if kept else "too far to tell what the hand meets: left out"
    print(f"object head: {1000 * off:.1f} mm off (median) on held-out episodes, {said}")
    return head if kept else None


def off_at_the_end(
    arm: Arm, parts: Sequence[EpisodeArrays], latents: Sequence[npt.NDArray[Any]], held_out: int
) -> tuple[float, float]:
    """How far from the truth held-out episodes end, in mm: by the linear sum, and by the arm."""
    linear, fitted = [], []
    for part, z in zip(parts, latents, strict=True):
        rows = slice(len(part) - held_out, None)
        held = replace(part, actions=part.actions[rows], states=part.states[rows])
        summed = held.action_spec.to_absolute(held.actions, held.states[:, 0])
        linear.append(position_error(summed, held.states))
        fitted.append(position_error(rollout_poses(held, arm, z[rows]), held.states))
    return 1000 * float(np.mean(linear)), 1000 * float(np.mean(fitted))
