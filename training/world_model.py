"""`worldloop train world-model`: flow matching and reward, block by block (paper section 3.2).

The model is trained through the very calls that generate: the first frame is committed, then each
chunk is denoised against the keys and values of what came before it, and committed in its turn
(teacher forcing). There is no mask to get wrong. What is committed is disturbed, either by noise
or by being the model's own prediction, because at generation time history is never quite true.

Shape letters: B episodes, C channels, F latent frames, H W latent sides, T actions, A action dim.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import tyro
from torch import Tensor, nn

from worldloop.checkpoint import file_sha256, load_checkpoint, load_into, save_checkpoint
from worldloop.config import config_from_dict, config_to_dict, read_json
from worldloop.engine.arm import Arm, ArmConfig
from worldloop.engine.dit import DiT
from worldloop.engine.dit_config import PRESETS, DiTConfig
from worldloop.engine.reward import RewardConfig, RewardHead
from worldloop.engine.sampler import add_noise, to_x0
from worldloop.engine.world_model import WorldModel, WorldModelConfig, load_autoencoder
from worldloop.errors import UserError
from worldloop.track import Run
from worldloop.training.arm import fit_arm, position_error
from worldloop.training.common import (
    EMA,
    Clock,
    Workers,
    autocast,
    device_for,
    load_state,
    save_state,
)
from worldloop.training.data import EpisodeArrays, load_arrays, object_weight
from worldloop.training.optimizer import MuonAdamW
from worldloop.training.samples import write_sample_video

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WorldModelTraining:
    """Train the diffusion transformer and its reward head; run it again to resume."""

    data: Path
    autoencoder: Path
    """Checkpoint folder of `worldloop train autoencoder`, or of a world model."""
    out: Path
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
    held_out: int = 32
    limit: int | None = None
    seed: int = 0
    threads: int = 1
    device: str = "auto"
    precision: str = "auto"
    save_every: int = 100
    init: Path | None = None
    """Start from this world-model checkpoint (fine-tuning): its sizes and its pose statistics."""
    lowest_z: float | None = None
    """Metres: below it the hand is against the table, see `WorldModelConfig.lowest_z`."""
    arm_steps: int = 4000
    """Steps of fitting the arm, which turns commands into poses (`worldloop.engine.arm`); 0: keep
    that of `init`, or the linear fit of the action spec."""
    sample_every: int = 500
    """Steps between sample videos (samples/*.mp4: real | imagined, two held-out episodes); 0: none.
    """

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"preset is {self.preset!r}; known: {', '.join(PRESETS)}")
        for name in ("steps", "batch", "threads", "save_every", "held_out"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; must be at least 1")
        for name in ("sample_every", "arm_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; must be at least 0")
        for name in ("pure_noise", "history_noise", "own_history"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 0 .. 1")


# ---------------------------------------------------------------- data


@torch.inference_mode()
def latent_cache(
    data: EpisodeArrays, root: Path, autoencoder: Path, device: torch.device
) -> npt.NDArray[np.float16]:
    """Latents [N,F,C,H,W] of every episode, encoded once and kept beside the dataset.

    The file's name holds the hash of the autoencoder's weights: another one gets another cache.
    """
    model = load_autoencoder(autoencoder)  # first, so that a foreign folder is named
    files = read_json(autoencoder / "config.json")["files"]
    weights = files.get("autoencoder") or files["model"]  # a world model holds one, too
    digest = file_sha256(autoencoder / weights)[:12]
    path = root / ".cache" / f"latents-{data.key}-{digest}.npy"
    if not path.exists():
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        out: Any = None  # a memory map
        try:
            for i in range(len(data)):
                frames = torch.from_numpy(data.frames[i].copy()).to(device).float() / 127.5 - 1
                with autocast(device, "auto"):
                    latents, _ = model.encode(frames.permute(3, 0, 1, 2)[None])
                array = latents[0].transpose(0, 1).float().cpu().numpy().astype(np.float16)
                if out is None:
                    shape = (len(data), *array.shape)
                    out = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
                out[i] = array
            out.flush()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # [B,C,1+F,H,W]
    poses: Tensor  # [B,T,A] normalised absolute poses
    reward: Tensor  # [B,T]
    weight: Tensor  # [B,1,F,H,W] loss weights of the latent frames after the first


class Batches:
    """The batch of (seed, step, rank): independent of how often the run was interrupted."""

    def __init__(
        self,
        data: EpisodeArrays,
        latents: npt.NDArray[np.float16],
        config: WorldModelTraining,
        arm: Arm | None = None,
    ) -> None:
        self.data, self.latents, self.config = data, latents, config
        spec = data.action_spec
        to_poses = spec.to_absolute if arm is None else arm.poses
        poses = to_poses(data.actions, data.states[:, 0])
        self.poses = ((poses - np.array(spec.pose_mean)) / np.array(spec.pose_std)).astype(
            np.float32
        )

    def at(self, step: int, rank: int) -> Batch:
        rng = np.random.default_rng([self.config.seed, step, rank])
        trained = len(self.data) - self.config.held_out
        return self.of(rng.integers(trained, size=self.config.batch))

    def of(self, episodes: npt.NDArray[np.int64]) -> Batch:
        z = torch.from_numpy(self.latents[episodes].astype(np.float32)).transpose(1, 2)
        return Batch(
            z,
            torch.from_numpy(self.poses[episodes]),
            torch.from_numpy(self.data.reward[episodes]),
            self._weights(z, episodes),
        )

    def _weights(self, z: Tensor, episodes: npt.NDArray[np.int64]) -> Tensor:
        """More where a latent differs from the first frame's, and around the tracked object."""
        change = (z[:, :, 1:] - z[:, :, :1]).square().mean(1, keepdim=True)
        moving = change / (change + 0.25)
        weight = 1 + self.config.motion_weight * moving
        if self.data.object_pixels is not None:
            grid, size = z.shape[-1], self.data.frames.shape[2]
            pixels = self.data.object_pixels[episodes, 1:, :1]  # [B,T,1,2]
            cells = (pixels + 0.5) * (grid / size) - 0.5
            bump = object_weight(cells.reshape(-1, 1, 2), grid, 1.2)
            bump = bump.reshape(*pixels.shape[:2], grid, grid)
            per_latent = bump.reshape(len(episodes), -1, 4, grid, grid).max(2)
            weight = weight + self.config.object_weight * torch.from_numpy(per_latent)[:, None]
        return weight


# ---------------------------------------------------------------- loss


class Trainee(nn.Module):
    """The parts that are trained together."""

    def __init__(self, dit: DiT, reward: RewardHead) -> None:
        super().__init__()
        self.dit, self.reward = dit, reward


def sample_times(config: WorldModelTraining, rows: int) -> Tensor:
    """Noise levels t [B] in (0,1]: pure noise, or a shifted logit-normal."""
    u = torch.sigmoid(torch.randn(rows))
    shifted = config.time_shift * u / (1 + (config.time_shift - 1) * u)
    return torch.where(torch.rand(rows) < config.pure_noise, torch.ones(rows), shifted)


def edm_weight(t: Tensor, most: float = 5.0) -> Tensor:
    """lambda(sigma) = (sigma^2 + 1) / sigma^2 (EDM with unit data), sigma = t / (1-t), bounded."""
    sigma = t / (1 - t).clamp_min(1e-4)
    return (1 + 1 / sigma.square()).clamp_max(most)


def training_loss(
    model: Trainee, batch: Batch, config: WorldModelTraining, chunk: int, own_history: bool
) -> dict[str, Tensor]:
    """Flow-matching and reward losses summed over an episode's chunks.

    ``loss`` is what is differentiated; ``flow`` the unweighted x0 error, ``reward`` the squared
    reward error, ``flow_last`` the x0 error of the last chunk.
    """
    dit, z = model.dit, batch.latents
    B, each = len(z), chunk // dit.config.actions_per_frame
    device = z.device
    zero = torch.zeros(B, device=device)
    first = dit(z[:, :, :1], zero, first_frame=0, observed_frames=1)
    history = [[pair] for pair in first.kv]
    chunks = (z.shape[2] - 1) // each
    total = z.new_zeros(())
    flows, rewards = [], []
    for k in range(chunks):
        frames = slice(1 + k * each, 1 + (k + 1) * each)
        poses = batch.poses[:, k * chunk : (k + 1) * chunk]
        past = [(torch.cat([p[0] for p in b], 1), torch.cat([p[1] for p in b], 1)) for b in history]
        x0 = z[:, :, frames]
        t = sample_times(config, B).to(device)
        noise = torch.randn_like(x0)
        x_t = add_noise(x0, noise, t[:, None].expand(-1, each))
        out = dit(x_t, t, poses, first_frame=frames.start, history=past, return_kv=False).sample
        x0_hat = to_x0(dit.config.prediction, out, x_t, t[:, None].expand(-1, each))
        error = (x0_hat - x0).square()
        weight = batch.weight[:, :, frames.start - 1 : frames.stop - 1]
        weighted = (error * weight).mean((1, 2, 3, 4))
        # The velocity's error is x0's over t; bounded, since 1/t^2 would be all about nothing.
        flow = (weighted / t.clamp_min(0.5).square()).mean()
        true_reward = batch.reward[:, k * chunk : (k + 1) * chunk]
        made = (model.reward(x0_hat) - true_reward).square().mean(1)
        real = (model.reward(x0) - true_reward).square().mean()
        total = total + flow + config.reward_weight * ((edm_weight(t) * made).mean() + real)
        flows.append(error.mean().detach())
        rewards.append(made.mean().detach())
        if k + 1 < chunks:
            if own_history:
                seen, level = x0_hat.detach(), zero
            else:
                level = config.history_noise * torch.rand(B, device=device)
                seen = add_noise(x0, torch.randn_like(x0), level[:, None].expand(-1, each))
            commit = dit(seen, level, poses, first_frame=frames.start, history=past)
            for block, pair in zip(history, commit.kv, strict=True):
                block.append(pair)
    return {
        "loss": total / chunks,
        "flow": torch.stack(flows).mean(),
        "flow_last": flows[-1],
        "reward": torch.stack(rewards).mean(),
    }


# ---------------------------------------------------------------- training


def train(config: WorldModelTraining) -> Path:
    """Train until ``config.steps``; returns the checkpoint folder of the averaged model."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = device_for(config.device)
    workers = Workers(device)
    count = 0
    if workers.rank == 0:
        data = load_arrays(config.data, config.limit)
        latents = latent_cache(data, config.data, config.autoencoder, device)
        count = len(data)
    # Collection may go on meanwhile: every process must see the very same episodes.
    count = workers.from_first(count)
    if workers.rank:
        data = load_arrays(config.data, count)
        latents = latent_cache(data, config.data, config.autoencoder, device)
    if len(data) <= config.held_out:
        raise UserError(f"held_out is {config.held_out}; {config.data} has {len(data)} episodes")
    base, start = None, None
    if config.init is not None:
        base, start = load_start(config.init)
        base.action_spec.require_same(data.action_spec, str(config.init), str(config.data))
        # The weights know poses by the statistics that they were trained with.
        spec = replace(
            data.action_spec,
            pose_mean=base.action_spec.pose_mean,
            pose_std=base.action_spec.pose_std,
        )
        data = replace(data, action_spec=spec)
    arm = arm_of(config, data, base, start, workers)
    batches = Batches(data, latents, config, arm)
    sizes = dit_sizes(config, data, latents.shape[2:], base)
    reward = RewardConfig(latent_channels=latents.shape[2], grid=latents.shape[3:5])
    model = Trainee(DiT(sizes), RewardHead(reward)).to(device)
    if start is not None:
        for part, module in (("dit", model.dit), ("reward", model.reward)):
            load_into(module, start[part], f"{config.init} ({part})")
    optimizer = MuonAdamW(model, config)
    ema = EMA(model, config.ema)
    step = load_state(config.out / "state", model, optimizer, ema)
    run = Run(config.out, config, resume_step=step or None, overwrite=True)
    held = batches.of(np.arange(len(data) - min(config.held_out, 16), len(data)))
    held = Batch(*(x.to(device) for x in held.__dict__.values()))
    chunk = data.action_spec.chunk
    clock, seen = Clock(), []
    with run.progress(config.steps, "world model", unit="step", initial=step) as progress:
        while step < config.steps:
            rate = optimizer.schedule(step, config.steps)
            torch.manual_seed(1_000_003 * config.seed + 2 * step * workers.size + workers.rank)
            batch = Batch(*(x.to(device) for x in batches.at(step, workers.rank).__dict__.values()))
            own = step > 200 and bool(torch.rand(()) < config.own_history)
            with autocast(device, config.precision):
                losses = training_loss(model, batch, config, chunk, own)
            optimizer.zero_grad()
            losses["loss"].backward()
            workers.average_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.update(model, step)
            seen.append({k: float(v.detach()) for k, v in losses.items()})
            step += 1
            progress.update(1, **seen[-1])
            if step % config.save_every == 0 or step == config.steps:
                row = {k: float(np.mean([s[k] for s in seen])) for k in seen[0]}
                seconds = clock.lap()
                episodes = config.batch * workers.size * len(seen)
                seen = []
                if workers.rank == 0:
                    with ema.applied(model):
                        with torch.no_grad(), autocast(device, config.precision):
                            torch.manual_seed(1)
                            pure = replace(config, pure_noise=1.0)
                            check = training_loss(model, held, pure, chunk, True)
                        world_of(model, data, config, step, base, arm).save(config.out / "model")
                    row |= {f"held_out_{k}": float(v) for k, v in check.items()}
                    run.log(step, row | {"lr": rate, "episodes_per_second": episodes / seconds})
                    # Last: a run killed before this line does these steps and their row again.
                    save_state(config.out / "state", model, optimizer, ema, step)
                    progress.write(
                        f"step {step}: flow {row['flow']:.4f}, held-out one-step flow "
                        f"{row['held_out_flow']:.4f} (last chunk {row['held_out_flow_last']:.4f}), "
                        f"reward {row['held_out_reward']:.4f}, {episodes / seconds:.2f} episodes/s"
                    )
                workers.barrier()
            if config.sample_every and step % config.sample_every == 0 and workers.rank == 0:
                with ema.applied(model):
                    world = world_of(model, data, config, step, base, arm)
                    shown = range(len(data) - min(2, config.held_out), len(data))
                    path = config.out / "samples" / f"{step:06d}.mp4"
                    write_sample_video(world.to(device), data, shown, path)
    run.close()
    workers.close()
    return config.out / "model"


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
    sizes = PRESETS[config.preset]() if base is None else base.dit
    channels, height, width = latent_CHW
    changes: dict[str, Any] = {
        "width": config.width or sizes.width,
        "depth": config.depth or sizes.depth,
        "latent_channels": channels,
        "action_dim": data.action_spec.dim,
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


def world_of(
    model: Trainee,
    data: EpisodeArrays,
    config: WorldModelTraining,
    step: int,
    base: WorldModelConfig | None = None,
    arm: Arm | None = None,
) -> WorldModel:
    """The whole world model: the trained parts (shared, not copied) and their autoencoder."""
    autoencoder = load_autoencoder(config.autoencoder)
    new = WorldModelConfig(
        dit=model.dit.config,
        reward=model.reward.config,
        autoencoder=autoencoder.config,
        action_spec=data.action_spec,
        env_ids=(data.env_id,),
        trained_steps=step,
        lowest_z=config.lowest_z,
    )
    if base is not None:
        new = replace(
            new,
            env_ids=tuple(dict.fromkeys([*base.env_ids, data.env_id])),
            reward_threshold=base.reward_threshold,
            held_frames=base.held_frames,
            sink=base.sink,
            window=base.window,
            trained_steps=base.trained_steps + step,
            lowest_z=base.lowest_z if config.lowest_z is None else config.lowest_z,
        )
    new = replace(new, arm=None if arm is None else arm.config)
    return WorldModel(new, model.dit, autoencoder, model.reward, arm)


def arm_of(
    config: WorldModelTraining,
    data: EpisodeArrays,
    base: WorldModelConfig | None,
    start: dict[str, dict[str, Tensor]] | None,
    workers: Workers,
) -> Arm | None:
    """Fitted on this data once a run and kept in ``out/arm``; or that of ``init``; or None."""
    spec, folder = data.action_spec, config.out / "arm"
    if spec.kind != "delta_pose" or (config.arm_steps == 0 and (base is None or base.arm is None)):
        return None
    if config.arm_steps == 0:
        assert base is not None and base.arm is not None and start is not None
        arm = Arm(base.arm)
        load_into(arm, start["arm"], f"{config.init} (arm)")
        return arm
    if workers.rank == 0 and not (folder / "config.json").is_file():
        trained = len(data) - config.held_out
        arm = fit_arm(data, trained, config.arm_steps, config.seed)
        actions, states = data.actions[trained:], data.states[trained:]
        linear, fitted = (
            1000 * position_error(poses(actions, states[:, 0]), states)
            for poses in (spec.to_absolute, arm.poses)
        )
        print(f"arm: {linear:.1f} mm off at the end of held-out episodes, fitted {fitted:.1f} mm")
        save_checkpoint(folder, {"arm": arm.state_dict()}, config_to_dict(arm.config), kind="arm")
    workers.barrier()
    checkpoint = load_checkpoint(folder, kind="arm")
    arm = Arm(config_from_dict(ArmConfig, checkpoint.config, str(folder)))
    load_into(arm, checkpoint.parts["arm"], str(folder))
    return arm.eval()


def main(argv: list[str]) -> int:
    config = tyro.cli(WorldModelTraining, args=argv, prog="worldloop train world-model")
    print(f"world model: {train(config)}")
    return 0
