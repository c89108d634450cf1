"""`worldloop distill`: from the many-step causal model to one that needs 4, 2 or 1 steps.

One network serves all three: it learns to name the clean latents from every noise level that the
few-step samplers visit, which is what a consistency model is. It learns on its own rollouts
(self-forcing): each chunk is made by the student, from its own noise, in as many steps as it will
have, after a history of its own making, exactly by the calls that generate. Only then is it told
what should have been there:

- the teacher's answer: the many-step sample from the same noise after the same history, which is
  where the teacher's probability flow carries that noise to;
- the truth: the latents that were recorded. The actions of a recorded episode are known, so even
  a rollout that has gone astray has a right continuation, and the answer pulls it back. Errors
  that do not pile up are learned here, and nowhere else.

Why not distribution matching (DMD)? It needs a second score network that follows the student's
distribution, at twice the memory, and it pays where one prompt has many right answers. Given a
frame and the actions there is nearly one right future; a regression is not blurred by others.
Why not shortcut models? They learn step sizes from their own half steps, without a teacher, and
off the student's own rollouts.

Long episodes: the sink frame and the window are farther apart than in any training episode. In
a share of steps the student therefore sees everything after the first frame later in time, as it
is then, while the teacher answers at the places that it knows: the right answer is the same.

Shape letters: B episodes, C channels, F latent frames, H W latent sides, T actions.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldloop.checkpoint import resolve_pretrained
from worldloop.cli import parse_config
from worldloop.config import positive
from worldloop.engine.arm import Arm
from worldloop.engine.dit import DiT
from worldloop.engine.precision import autocast
from worldloop.engine.sampler import (
    STREAMING_TIMES,
    dit_denoiser,
    streaming_sample,
    streaming_step,
    streaming_times,
)
from worldloop.engine.world_model import WorldModel, WorldModelConfig
from worldloop.errors import UserError
from worldloop.files import exclusive
from worldloop.track import Run
from worldloop.training.common import (
    EMA,
    Clock,
    TrainingOptions,
    device_for,
    load_state,
    save_state,
)
from worldloop.training.data import EpisodeArrays, load_mixture
from worldloop.training.latents import Ahead, Batch, Batches, latent_cache
from worldloop.training.optimizer import MuonAdamW
from worldloop.training.world_loss import History, Trainee, edm_weight, reward_errors


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainingOptions):
    """Turn a world model into one of few steps, on its own rollouts; run it again to resume."""

    world: Path
    """Checkpoint folder of the teacher, or a shipped name; the student starts from it."""
    data: tuple[Path, ...]
    """Dataset folders: first frames, actions and true latents."""
    steps: int = 600
    batch: int = 8
    students: tuple[int, ...] = (4, 2, 1)
    """Steps that the student is to manage; each training step draws one of them."""
    teacher_steps: int = 35
    """Steps of the teacher's probability flow (Euler)."""
    truth: float = 0.5
    """Weight of the recorded latents against the teacher's sample."""
    late: float = 0.3
    """Share of steps whose chunks are placed later in time, as in a long episode."""
    gap: int = 110
    """Most latent frames by which they are placed later (110: 440 frames)."""
    lr: float = 3e-4
    lr_vectors: float = 1.5e-4
    weight_decay: float = 0.0
    ema: float = 0.99
    motion_weight: float = 2.0
    object_weight: float = 12.0
    reward_weight: float = 0.5
    reward_shift: int = 2
    """As in `worldloop train world-model`."""
    limit: int | None = None
    """Use only the first episodes of each dataset."""
    save_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "teacher_steps")
        for name in ("truth", "late"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 0 .. 1")
        for name in ("gap", "reward_shift"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; must be at least 0")
        unknown = [n for n in self.students if n not in STREAMING_TIMES]
        if unknown or not self.students:
            known = ", ".join(map(str, STREAMING_TIMES))
            raise UserError(f"students is {list(self.students)}; expected some of {known}")


def denoiser(history: History, poses: Tensor, first: int) -> Any:
    """The clean latents of a chunk at this place, from noisy ones (`engine.sampler`)."""
    dit = history.dit
    return dit_denoiser(
        dit, dit.config.prediction, actions_BTA=poses, first_frame=first, history=history.kv
    )


def distill_gradients(
    student: Trainee,
    teacher: DiT,
    batch: Batch,
    config: DistillConfig,
    steps: int,
    sizes: WorldModelConfig,
    gap: int = 0,
) -> dict[str, Tensor]:
    """Losses of the student's own rollout of a batch in ``steps`` steps a chunk, and its gradients.

    No gradient passes from one chunk to another, so each chunk's are added to the parameters' and
    its graph is freed before the next begins; under `torch.no_grad` there are none. ``loss`` is
    what they are of; ``teacher`` and ``truth`` are the unweighted squared errors of the last
    estimates against either target, ``truth_last`` that of the last chunk. gap: latent frames by
    which the student's chunks are placed later than the teacher's.
    """
    z, chunk, each = batch.latents, sizes.action_spec.chunk, sizes.block
    B, device = len(z), z.device
    times = STREAMING_TIMES[steps]
    fine = streaming_times(config.teacher_steps)
    scale = float(edm_weight(torch.tensor(times[-1])))
    own, theirs = History(student.dit, sizes), History(teacher, sizes)
    with torch.no_grad(), autocast(device, config.precision):
        own.commit(z[:, :, :1], None, 0)
        theirs.commit(z[:, :, :1], None, 0)
    chunks = (z.shape[2] - 1) // each
    found: dict[str, list[Tensor]] = {"loss": [], "teacher": [], "truth": [], "reward": []}
    for k in range(chunks):
        frames = slice(1 + k * each, 1 + (k + 1) * each)
        poses, first = batch.poses[:, k * chunk : (k + 1) * chunk], frames.start
        noise, truth = torch.randn_like(z[:, :, frames]), z[:, :, frames]
        weight = batch.weight[:, :, frames.start - 1 : frames.stop - 1]
        true_reward = batch.reward[:, k * chunk : (k + 1) * chunk]
        with torch.no_grad(), autocast(device, config.precision):
            made = streaming_sample(denoiser(theirs, poses, first), noise, fine, "euler")
        with autocast(device, config.precision):
            denoise, x_t, loss = denoiser(own, poses, gap + first), noise, z.new_zeros(())
            for i, t in enumerate(times):
                x0 = denoise(x_t, torch.full((B, each), t, device=device))
                to_teacher, to_truth = (x0 - made).square(), (x0 - truth).square()
                mixed = (1 - config.truth) * to_teacher + config.truth * to_truth
                loss = loss + (weight * mixed).mean() / len(times)
                if i + 1 < len(times):  # on with its own estimate, as when it generates
                    x_t = streaming_step(x_t, x0.detach(), noise, t, times[i + 1])
            reward, real = reward_errors(
                student.reward, x0, truth, true_reward, config.reward_shift
            )
            loss = (loss + config.reward_weight * (scale * reward + real).mean()) / chunks
        if loss.requires_grad:
            loss.backward()
        for name, value in zip(found, (loss, to_teacher, to_truth, reward), strict=True):
            found[name].append(value.detach().mean())
        if k + 1 < chunks:
            with torch.no_grad(), autocast(device, config.precision):
                own.commit(x0.detach(), poses, gap + first)
                theirs.commit(x0.detach(), poses, first)
    means = {name: torch.stack(values).mean() for name, values in found.items()}
    return means | {"loss": means["loss"] * chunks, "truth_last": found["truth"][-1]}


# ---------------------------------------------------------------- training


def load_teacher(config: DistillConfig, device: torch.device) -> tuple[WorldModel, Trainee]:
    """The teacher, frozen, and a student with its weights."""
    teacher = WorldModel.from_pretrained(config.world)
    if teacher.config.dit.action_layout != "per_frame":
        raise UserError(
            f"{config.world}: takes the actions of a whole chunk and cannot stream; fine-tune it "
            "with `worldloop train world-model --init` first"
        )
    student = Trainee(deepcopy(teacher.dit), deepcopy(teacher.reward))
    return teacher.to(device).requires_grad_(False), student.to(device)


def load_data(
    config: DistillConfig, sizes: WorldModelConfig, device: torch.device, arm: Arm | None
) -> Batches:
    """The datasets with the teacher's action spec and latents of its autoencoder."""
    limits = None if config.limit is None else [config.limit] * len(config.data)
    parts: list[EpisodeArrays] = []
    for root, part in zip(config.data, load_mixture(config.data, limits, one_outcome=True)):
        sizes.action_spec.require_same(part.action_spec, str(config.world), str(root))
        if len(part) <= config.held_out:
            raise UserError(f"held_out is {config.held_out}; {root} has {len(part)} episodes")
        parts.append(replace(part, action_spec=sizes.action_spec))
    pairs = zip(parts, config.data, strict=True)
    latents = [latent_cache(part, root, config.world, device) for part, root in pairs]
    return Batches(parts, latents, config, arm)


def draw(config: DistillConfig, step: int) -> tuple[int, int]:
    """The student's steps and the gap of a training step; the same however often it is resumed."""
    rng = np.random.default_rng([config.seed, step, 7])
    steps = int(rng.choice(config.students))
    late = config.gap > 0 and rng.random() < config.late
    return steps, int(rng.integers(1, config.gap + 1)) if late else 0


def distill(config: DistillConfig) -> Path:
    """Train until ``config.steps``; returns the checkpoint folder of the averaged student."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    config = replace(config, world=Path(resolve_pretrained(str(config.world))))
    device = device_for(config.device)
    teacher, student = load_teacher(config, device)
    batches = load_data(config, teacher.config, device, teacher.arm)
    with exclusive(config.out):
        return _train(config, teacher, student, batches)


def _train(config: DistillConfig, teacher: WorldModel, student: Trainee, batches: Batches) -> Path:
    device, sizes = next(student.parameters()).device, teacher.config
    optimizer, ema = MuonAdamW(student, config), EMA(student, config.ema)
    step = load_state(config.out / "state", student, optimizer, ema)
    run = Run(config.out, config, resume_step=step or None)
    held = [batch.to(device) for batch in batches.held(8)]
    clock, seen, folder = Clock(), [], config.out / "model"
    ahead = Ahead(lambda n: batches.at(n, 0))
    with run.progress(config.steps, "distill", unit="step", initial=step) as progress:
        while step < config.steps:
            rate = optimizer.schedule(step, config.steps)
            torch.manual_seed(1_000_003 * config.seed + step)
            steps, gap = draw(config, step)
            batch = ahead.at(step, step + 1 == config.steps).to(device)
            optimizer.zero_grad()
            losses = distill_gradients(student, teacher.dit, batch, config, steps, sizes, gap)
            norm = float(nn.utils.clip_grad_norm_(student.parameters(), 1.0))
            values = {name: float(value) for name, value in losses.items()}
            if not np.isfinite(norm):
                raise UserError(
                    f"step {step}: the loss is {values['loss']}, the gradient's norm {norm}; the "
                    f"batch: {', '.join(batch.episodes)}. {folder} keeps the last good checkpoint;"
                    " lower --lr, and run the command again"
                )
            optimizer.step()
            ema.update(student, step)
            seen.append(values)
            step += 1
            progress.update(1, students=steps, **values)
            if step % config.save_every == 0 or step == config.steps:
                row = {k: float(np.mean([s[k] for s in seen])) for k in seen[0]}
                seen = []
                with ema.applied(student), torch.no_grad():
                    row |= _checks(config, teacher, student, held)
                    _save(teacher, student, step, folder)
                run.log(step, row | {"lr": rate, "seconds_per_save": clock.lap()})
                save_state(config.out / "state", student, optimizer, ema, step)
                shown = ", ".join(
                    f"{n} steps {row[f'held_out_{n}']:.4f} "
                    f"(last chunk {row[f'held_out_{n}_last']:.4f})"
                    for n in config.students
                )
                progress.write(f"step {step}: held-out error {shown}")
    ahead.close()
    run.close()
    return folder


def _checks(
    config: DistillConfig, teacher: WorldModel, student: Trainee, held: list[Batch]
) -> dict[str, float]:
    """Squared error of held-out rollouts against the truth, for each number of steps."""
    # The teacher's sample does not count here.
    quick = replace(config, teacher_steps=1, reward_shift=0)
    found: dict[str, float] = {}
    for steps in config.students:
        torch.manual_seed(1)
        rows = [
            distill_gradients(student, teacher.dit, b, quick, steps, teacher.config) for b in held
        ]
        for name, key in ((f"held_out_{steps}", "truth"), (f"held_out_{steps}_last", "truth_last")):
            found[name] = float(np.mean([float(row[key]) for row in rows]))
    return found


def _save(teacher: WorldModel, student: Trainee, step: int, folder: Path) -> None:
    """The whole world model: the student's parts, everything else the teacher's."""
    config = replace(teacher.config, trained_steps=teacher.config.trained_steps + step)
    whole = WorldModel(config, student.dit, teacher.autoencoder, student.reward, teacher.arm)
    whole.save(folder)


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(DistillConfig, argv, "worldloop distill")
    print(f"world model: {distill(config)}")
    return 0
