"""`worldloop train world-model`: flow matching and reward, block by block (paper section 3.2).

The model is trained through the very calls that generate: the first frame is committed, then each
chunk is denoised against the keys and values of what came before it, and committed in its turn
(teacher forcing). There is no mask to get wrong. What is committed is disturbed, either by noise
or by being the model's own prediction, because at generation time history is never quite true.

Shape letters: B episodes, C channels, F latent frames, H W latent sides, T actions, A action dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from worldloop.checkpoint import load_into
from worldloop.cli import parse_config
from worldloop.engine.arm import Arm
from worldloop.engine.backends.compiled import compile_blocks
from worldloop.engine.dit import DiT
from worldloop.engine.dit_config import PRESETS
from worldloop.engine.light_vae import LightVAE
from worldloop.engine.precision import autocast
from worldloop.engine.reward import RewardConfig, RewardHead
from worldloop.engine.vae import WanVAE
from worldloop.engine.world_config import TaskRecord
from worldloop.engine.world_model import WorldModel, WorldModelConfig
from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.files import exclusive
from worldloop.track import Run, read_rows
from worldloop.training.common import (
    EMA,
    Clock,
    StepTime,
    TrainingOptions,
    Workers,
    device_for,
    load_state,
    matmul_ceiling,
    save_state,
)
from worldloop.training.data import EpisodeArrays, load_mixture
from worldloop.training.latents import Ahead, Batch, Batches, autoencoder_of, latent_cache
from worldloop.training.optimizer import MuonAdamW
from worldloop.training.samples import write_sample_video
from worldloop.training.sharded import ShardedState, refuse_sharded, shard, whole_state
from worldloop.training.starting import (
    arm_of,
    dit_sizes,
    keep_statistics,
    load_published,
    load_start,
)
from worldloop.training.world_loss import Trainee, training_flops, training_loss


@dataclass(frozen=True, kw_only=True)
class WorldModelTraining(TrainingOptions):
    """Train the diffusion transformer and its reward head; run it again to resume."""

    data: tuple[Path, ...]
    """Dataset folders. Tasks count alike, however many episodes they have."""
    autoencoder: Path
    """Checkpoint folder of `worldloop train autoencoder` or of a world model, or a Wan `.pth`."""
    preset: str = "tiny"
    width: int | None = None
    depth: int | None = None
    steps: int = 3000
    batch: int = 8
    """Episodes a step and process."""
    lr: float = 2e-3
    """Peak learning rate of the matrices (Muon); vectors take `lr_vectors` (AdamW)."""
    lr_vectors: float = 1e-3
    weight_decay: float = 0.01
    ema: float = 0.998
    pure_noise: float = 0.5
    """Share of blocks trained at t = 1, where every generation starts."""
    time_shift: float = 5.0
    """The other blocks take t from a logit-normal, shifted towards noise."""
    history_noise: float = 0.15
    """History is committed with noise levels uniform in [0, this]."""
    own_history: float = 0.5
    """Share of steps (after warm-up) whose history is the model's own prediction."""
    motion_weight: float = 2.0
    object_weight: float = 12.0
    reward_weight: float = 0.5
    reward_shift: int = 2
    """Latent cells by which latents are shifted at random before the reward head, at most."""
    limit: int | None = None
    """Use only the first episodes of each dataset."""
    later_starts: tuple[int, ...] = ()
    """Episodes begin at these frames as well: other chunks, starts amid the motion, one more latent
    cache each. For few episodes (docs/training.md)."""
    near_success: bool = True
    """False: leave near-successes out (the paper's table 4)."""
    one_outcome: bool = False
    """Train on tasks all of whose episodes end alike, too."""
    init: Path | None = None
    """Start from this world-model checkpoint (fine-tuning): its sizes and its pose statistics. Or
    from a published Cosmos `.pt`: every tensor whose shape fits."""
    checkpoint_blocks: bool = False
    """Recompute transformer blocks in the backward pass: less memory, a third more time."""
    keep: Literal["last", "best"] = "last"
    """Which weights `model` holds: those of the last save, or those with the least held-out loss so
    far. That of the start counts, too: a few episodes more can make a good model worse."""
    compile: bool = False
    """Run transformer blocks through torch.compile: shorter steps and less memory, after a minute
    or more of compilation at the first (a CPU needs a C++ compiler for it)."""
    fsdp: bool = False
    """Under torchrun: share weights, gradients and moments out over the processes (FSDP2)."""
    arm_steps: int = 10_000
    """Steps of fitting the arm, which turns commands into poses (`worldloop.engine.arm`); 0: keep
    that of `init`, or the linear fit of the action spec."""
    object_head_steps: int = 0
    """Steps of fitting what reads from latents where the object is, for the arm to see; needs
    recordings that say it, is left out where it misreads held-out ones by a centimetre; 0: that of
    `init`, or none."""
    pose_head_steps: int = 4000
    """Steps of fitting what reads the hand's pose from latents at the end of each chunk, which is
    left out where held-out episodes end nearer without; 0: none, or that of `init`'s kept arm."""
    sample_every: int = 500
    """Steps between sample videos (samples/*.mp4: real | imagined, two held-out episodes); 0: none.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise UserError(f"preset is {self.preset!r}; known: {', '.join(PRESETS)}")
        if self.keep not in ("last", "best"):
            raise UserError(f"keep is {self.keep!r}; expected 'last' or 'best'")
        steps = ("sample_every", "arm_steps", "object_head_steps", "pose_head_steps")
        for name in (*steps, "reward_shift"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; must be at least 0")
        for name in ("pure_noise", "history_noise", "own_history"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 0 .. 1")


# ---------------------------------------------------------------- training


def train(config: WorldModelTraining) -> Path:
    """Train until ``config.steps``; returns the checkpoint folder of the averaged model.

    Raises UserError when a loss is not finite, naming the batch; the last checkpoint stays.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = device_for(config.device)
    workers = Workers(device)
    if config.fsdp and workers.size == 1:
        raise UserError("fsdp needs several processes; start it with torchrun, or leave it out")
    parts, latents = load_parts(config, workers, device)
    base, start = None, None
    if config.init is not None and config.init.suffix != ".pt":
        base, start = load_start(config.init)
        base.action_spec.require_same(parts[0].action_spec, str(config.init), str(config.data[0]))
        spec = keep_statistics(start["dit"], base.action_spec, parts[0].action_spec)
        parts = [replace(part, action_spec=spec) for part in parts]
    sizes = dit_sizes(config, parts[0], latents[0].shape[2:], base)
    reward = RewardConfig(latent_channels=latents[0].shape[2], grid=latents[0].shape[3:5])
    if base is not None:
        reward = base.reward
    model = Trainee(DiT(sizes), RewardHead(reward))
    if start is not None:
        for part, module in (("dit", model.dit), ("reward", model.reward)):
            load_into(module, start[part], f"{config.init} ({part})")
    elif config.init is not None:
        load_published(model.dit, config.init)
    with ExitStack() as stack:
        if workers.rank == 0:
            stack.enter_context(exclusive(config.out))
        whole = len(config.data)
        arm = arm_of(config, parts[:whole], latents[:whole], base, start, workers)
        batches = Batches(parts, latents, config, arm)
        parts = parts[:whole]
        return _Training(config, parts, batches, model.to(device), base, arm, workers).run()


def load_parts(
    config: WorldModelTraining, workers: Workers, device: torch.device
) -> tuple[list[EpisodeArrays], list[Any]]:
    """Episodes and cached latents of every dataset, the same on every process.

    Those that begin later come after all that begin at their first frame.
    """
    most = config.limit or 1 << 62
    # Collection may go on meanwhile: every process must see the very same episodes.
    counts = [workers.from_first(min(most, len(EpisodeDataset(root)))) for root in config.data]

    def load() -> tuple[list[EpisodeArrays], list[Any]]:
        parts = load_mixture(config.data, counts, config.near_success, config.one_outcome)
        for root, part in zip(config.data, parts):
            if len(part) <= config.held_out:
                raise UserError(f"held_out is {config.held_out}; {root} has {len(part)} episodes")
        roots = list(config.data) * (1 + len(config.later_starts))
        parts += [part.begun_at(first) for first in config.later_starts for part in parts]
        pairs = zip(parts, roots, strict=True)
        return parts, [latent_cache(d, root, config.autoencoder, device) for d, root in pairs]

    if workers.rank == 0:  # first, since it writes the caches
        loaded = load()
    workers.barrier()
    return loaded if workers.rank == 0 else load()


class _Training:
    """The loop and what it keeps."""

    def __init__(
        self,
        config: WorldModelTraining,
        parts: list[EpisodeArrays],
        batches: Batches,
        model: Trainee,
        base: WorldModelConfig | None,
        arm: Arm | None,
        workers: Workers,
    ) -> None:
        self.config, self.parts, self.batches, self.workers = config, parts, batches, workers
        self.model, self.arm = model, arm
        self.autoencoder = autoencoder_of(config.autoencoder)
        self.device = next(model.parameters()).device
        if config.compile:
            compile_blocks(model.dit)
        self.shards = ShardedState(config.out / "state", workers) if config.fsdp else None
        if config.fsdp:
            shard(model.dit, model.reward, workers, self.device)
        self.optimizer, self.ema = MuonAdamW(model, config), EMA(model, config.ema)
        if self.shards is not None:
            self.step = self.shards.load(model, self.optimizer, self.ema)
        else:
            refuse_sharded(config.out / "state")
            self.step = load_state(config.out / "state", model, self.optimizer, self.ema)
        self.held = [batch.to(self.device) for batch in batches.held()]
        self.least = math.inf  # held-out loss of any save so far
        self.sizes = config_of(model, parts, self.autoencoder, base, arm)

    def run(self) -> Path:
        config, workers = self.config, self.workers
        run = Run(config.out, config, resume_step=self.step or None)
        if self.step and workers.rank == 0:  # who writes the model
            rows = read_rows(run.metrics_path)
            self.least = min((row["held_out_loss"] for row in rows), default=math.inf)
        elif not self.step and config.keep == "best":
            run.log(0, self.save())
        ceiling = matmul_ceiling(self.device, config.precision) if workers.rank == 0 else 1.0
        ahead = Ahead(lambda step: self.batches.at(step, workers.rank))
        clock, time, seen, flops = Clock(), StepTime(self.device), [], 0
        with run.progress(config.steps, "world model", unit="step", initial=self.step) as progress:
            while self.step < config.steps:
                rate = self.optimizer.schedule(self.step, config.steps)
                torch.manual_seed(
                    1_000_003 * config.seed + 2 * self.step * workers.size + workers.rank
                )
                with time.part("data"):
                    batch = ahead.at(self.step, self.step + 1 == config.steps).to(self.device)
                flops += training_flops(self.sizes, batch)
                seen.append(self.update(batch, time))
                self.step += 1
                progress.update(1, **seen[-1])
                if self.step % config.save_every == 0 or self.step == config.steps:
                    row = {k: float(np.mean([s[k] for s in seen])) for k in seen[0]}
                    seconds = clock.lap()
                    episodes = config.batch * workers.size * len(seen)
                    shares = time.shares(seconds)
                    mfu = flops / (seconds * ceiling)
                    seen, flops = [], 0
                    row |= self.save()
                    row |= {"lr": rate, "episodes_per_second": episodes / seconds,
                            "mfu": mfu, **{f"share_{k}": v for k, v in shares.items()}}  # fmt: skip
                    run.log(self.step, row)
                    # Last: a run killed before this line does these steps and their row again.
                    self.keep_state()
                    progress.write(
                        f"step {self.step}: flow {row['flow']:.4f}, held-out one-step flow "
                        f"{row['held_out_flow']:.4f} (last chunk {row['held_out_flow_last']:.4f}), "
                        f"reward {row['held_out_reward']:.4f}, {episodes / seconds:.2f} episodes/s,"
                        f" {shares['compute']:.0%} of the time in the network, MFU {mfu:.1%}"
                    )
                    workers.barrier()
                if config.sample_every and self.step % config.sample_every == 0:
                    self.sample()
        ahead.close()
        run.close()
        workers.close()
        return config.out / "model"

    def update(self, batch: Batch, time: StepTime) -> dict[str, float]:
        """One optimizer step; raises UserError before it where the loss is not finite."""
        config, model = self.config, self.model
        own = self.step > 200 and bool(torch.rand(()) < config.own_history)
        with time.part("compute"):
            with autocast(self.device, config.precision):
                losses = training_loss(model, batch, config, self.sizes, own)
            self.optimizer.zero_grad()
            losses["loss"].backward()
        with time.part("update"):
            if not config.fsdp:
                self.workers.average_gradients(model)
            total: Any = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            norm = float(total.full_tensor() if config.fsdp else total)
            values = {k: float(v.detach()) for k, v in losses.items()}
            if not np.isfinite(norm):
                raise self.not_finite(batch, values["loss"], norm)
            self.optimizer.step()
            self.ema.update(model, self.step)
        return values

    def not_finite(self, batch: Batch, loss: float, norm: float) -> UserError:
        """What to say when training has broken down; the same on every process."""
        names = ", ".join(batch.episodes) if not np.isfinite(loss) or self.workers.size == 1 else ""
        batches = "; ".join(name for name in self.workers.gather_text(names) if name)
        kept = self.config.out / "model"
        stays = f"{kept} keeps the last good checkpoint" if kept.is_dir() else "nothing was saved"
        return UserError(
            f"step {self.step}: the loss is {loss}, the gradient's norm {norm}; the batch: "
            f"{batches or 'of all processes'}. {stays}; look at these episodes with `worldloop "
            "data validate`, or lower --lr, and run the command again"
        )

    @torch.no_grad()
    def save(self) -> dict[str, float]:
        """Write the averaged model if it is to be kept; its errors on held-out episodes."""
        config, workers = self.config, self.workers
        if workers.rank and not config.fsdp:
            return {"held_out_flow": 0.0, "held_out_flow_last": 0.0, "held_out_reward": 0.0}
        checks = []
        with self.ema.applied(self.model):
            torch.manual_seed(1)
            pure = replace(config, pure_noise=1.0, reward_shift=0)
            for held in self.held:
                with autocast(self.device, config.precision):
                    checks.append(training_loss(self.model, held, pure, self.sizes, True))
            counts = [len(held.latents) for held in self.held]
            found = {
                f"held_out_{k}": sum(float(c[k]) * n for c, n in zip(checks, counts)) / sum(counts)
                for k in checks[0]
            }
            world = self.world()
            if world is not None and (config.keep == "last" or found["held_out_loss"] < self.least):
                world.save(config.out / "model")
        self.least = min(self.least, found["held_out_loss"])
        return found

    def keep_state(self) -> None:
        if self.shards is not None:
            self.shards.save(self.model, self.optimizer, self.ema, self.step)
        elif self.workers.rank == 0:
            state = self.config.out / "state"
            save_state(state, self.model, self.optimizer, self.ema, self.step)

    def world(self) -> WorldModel | None:
        """The whole world model with the present weights, on the first process (None on others).

        Sharded weights are gathered on its CPU, so every process must call this.
        """
        model = self.model
        if self.config.fsdp:
            state = whole_state(model, keep=self.workers.rank == 0)
            if state is None:
                return None
            with torch.device("meta"):
                model = Trainee(DiT(model.dit.config), RewardHead(model.reward.config))
            model.load_state_dict(state, assign=True)
        return world_of(model, self.sizes, self.autoencoder, self.step, self.arm)

    def sample(self) -> None:
        """A video of two held-out episodes; the datasets take turns."""
        if self.workers.rank and not self.config.fsdp:
            return
        turn = self.step // self.config.sample_every - 1
        data = self.parts[turn % len(self.parts)]
        with self.ema.applied(self.model):
            world = self.world()
            if world is not None:
                shown = range(len(data) - min(2, self.config.held_out), len(data))
                path = self.config.out / "samples" / f"{self.step:06d}.mp4"
                write_sample_video(world.to(self.device), data, shown, path)


def config_of(
    model: Trainee,
    parts: Sequence[EpisodeArrays],
    autoencoder: LightVAE | WanVAE,
    base: WorldModelConfig | None = None,
    arm: Arm | None = None,
) -> WorldModelConfig:
    """The world model's configuration, before its first step here."""
    tasks = {part.env_id: TaskRecord(part.env_id, part.instruction) for part in parts}
    new = WorldModelConfig(
        dit=model.dit.config,
        reward=model.reward.config,
        autoencoder=autoencoder.config,
        action_spec=parts[0].action_spec,
        env_ids=tuple(tasks),
        tasks=tuple(tasks.values()),
        arm=None if arm is None else arm.config,
    )
    if base is None:
        return new
    return replace(
        new,
        env_ids=tuple(dict.fromkeys([*base.env_ids, *tasks])),
        tasks=(*(t for t in base.tasks if t.env_id not in tasks), *tasks.values()),
        reward_threshold=base.reward_threshold,
        held_frames=base.held_frames,
        sink=base.sink,
        window=base.window,
        trained_steps=base.trained_steps,
    )


def world_of(
    model: Trainee,
    sizes: WorldModelConfig,
    autoencoder: LightVAE | WanVAE,
    step: int,
    arm: Arm | None = None,
) -> WorldModel:
    """The whole world model after ``step`` steps: the trained parts (shared, not copied)."""
    sizes = replace(sizes, trained_steps=sizes.trained_steps + step)
    return WorldModel(sizes, model.dit, autoencoder, model.reward, arm)


def main(argv: list[str]) -> int:
    config = parse_config(WorldModelTraining, argv, "worldloop train world-model")
    print(f"world model: {train(config)}")
    return 0
