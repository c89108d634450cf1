"""The world model: start frames and actions in, the next frames and their rewards out.

    state = world.start(frames, poses, seeds)
    chunk, state = world.step(state, actions)          # again and again

A `WorldState` is passed in and handed back, never kept on the module. Streaming generation
attends to history through a ring of cached keys and values; the latents of a chunk are committed
as they are, without decoding and encoding again. The reference procedure generates each chunk as
published: observed latents inside the sequence, full attention, 35 steps, and the next chunk
starts from the re-encoded last frame.

Shape letters: B rows (episodes), T actions, V views, C latent channels, F latent frames,
h w latent sides, A action dim.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from worldloop.checkpoint import (
    load_checkpoint,
    load_into,
    resolve_pretrained,
    save_checkpoint,
)
from worldloop.config import config_from_dict, config_to_dict
from worldloop.engine.dit import DiT
from worldloop.engine.dit_config import DiTConfig
from worldloop.engine.kv_cache import KVRing
from worldloop.engine.light_vae import LightVAE, LightVAEConfig
from worldloop.engine.reward import RewardConfig, RewardHead
from worldloop.engine.sampler import (
    STREAMING_TIMES,
    derive_seed,
    dit_denoiser,
    noise_for,
    reference_sample,
    streaming_sample,
)
from worldloop.engine.vae import Stream, WanVAE, WanVAEConfig
from worldloop.errors import UserError
from worldloop.files import PathLike
from worldloop.types import Actions, ActionSpec, Chunk, Frames

Decode = Literal["all", "policy", "none"]
Steps = int | Literal["reference"]
Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WorldModelConfig:
    """Everything beside the weights; what an action means is part of it."""

    dit: DiTConfig
    reward: RewardConfig
    autoencoder: LightVAEConfig | WanVAEConfig
    action_spec: ActionSpec
    env_ids: tuple[str, ...] = ()
    reward_threshold: float = 0.9
    held_frames: int = 2
    """Consecutive frames above the threshold that make a success."""
    sink: int = 1
    window: int = 12
    """Latent frames of history kept beside the sink."""
    trained_steps: int = 0


@dataclass(frozen=True)
class WorldState:
    """Where B imagined episodes stand; rows are episodes.

    ``cursor`` is the number of latent frames so far and ``chunk`` the number of chunks: host
    integers, so that no step waits for the device.
    """

    ring: KVRing
    decoder: Stream
    last_latent: Tensor  # [B,C,1,h,w]
    seeds: tuple[int, ...]  # noise seed of each row
    poses: Float  # [B,A] pose after the last action
    past_actions: Actions  # [B,<=8,A] the commands a lagging controller still carries out
    high: npt.NDArray[np.int64]  # [B] consecutive frames above the reward threshold at the end
    done: npt.NDArray[np.bool_]  # [B] a success was held
    cursor: int = 1
    chunk: int = 0

    @property
    def rows(self) -> int:
        return len(self.seeds)

    def fork(self, n: int, seeds: Sequence[int] | None = None) -> WorldState:
        """Each row n times (row b becomes b*n .. b*n+n-1), as n fresh starts with these seeds.

        Without ``seeds`` the copies share their row's world noise.
        """
        rows = [row for row in range(self.rows) for _ in range(n)]
        forked = self.select(rows)
        if seeds is None:
            return forked
        if len(seeds) != len(rows):
            raise UserError(f"fork: {len(seeds)} seeds for {len(rows)} rows")
        return dataclasses.replace(forked, seeds=tuple(seeds))

    def select(self, rows: Sequence[int]) -> WorldState:
        """The given rows, in that order."""
        index = torch.tensor(list(rows), device=self.last_latent.device)
        return dataclasses.replace(
            self,
            ring=self.ring.select(rows),
            decoder=self.decoder.select(list(rows)),
            last_latent=self.last_latent.index_select(0, index),
            seeds=tuple(self.seeds[row] for row in rows),
            poses=self.poses[list(rows)],
            past_actions=self.past_actions[list(rows)],
            high=self.high[list(rows)],
            done=self.done[list(rows)],
        )


@dataclass
class Timer:
    """Seconds by part; exact on a CPU, launch times on a GPU unless it is synchronised."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, since: float) -> float:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - since
        return now


class WorldModel(nn.Module):
    """DiT, autoencoder and reward head behind ``start`` and ``step``."""

    def __init__(
        self,
        config: WorldModelConfig,
        dit: DiT | None = None,
        autoencoder: LightVAE | WanVAE | None = None,
        reward: RewardHead | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.dit = dit if dit is not None else DiT(config.dit)
        self.autoencoder = autoencoder if autoencoder is not None else build_autoencoder(
            config.autoencoder
        )
        self.reward = reward if reward is not None else RewardHead(config.reward)
        chunk, each = config.action_spec.chunk, config.dit.actions_per_frame
        if chunk % each:
            raise UserError(f"action_spec.chunk is {chunk}; must be a multiple of {each}")
        if config.dit.action_layout != "per_frame" and config.dit.action_dim:
            raise UserError("streaming needs action_layout 'per_frame'")
        if config.window < self.block:
            raise UserError(f"window is {config.window} latent frames; a chunk has {self.block}")

    # ------------------------------------------------------------ facts

    @property
    def action_spec(self) -> ActionSpec:
        return self.config.action_spec

    @property
    def reward_threshold(self) -> float:
        return self.config.reward_threshold

    @property
    def block(self) -> int:
        """Latent frames of a chunk."""
        return self.action_spec.chunk // self.config.dit.actions_per_frame

    @property
    def device(self) -> torch.device:
        return next(self.dit.parameters()).device

    # ------------------------------------------------------------ generation

    @torch.inference_mode()
    def start(self, frames: Frames, poses: Float, seeds: Sequence[int]) -> WorldState:
        """Encode and commit the first frames.

        frames: uint8 [B,1,1,H,W,3] (one view). poses: [B,A] end-effector state (metres, rotation
        vector, gripper). seeds: world noise of each row. Raises UserError naming the argument.
        """
        spec = self.action_spec
        if frames.dtype != np.uint8 or frames.ndim != 6 or frames.shape[1:3] != (1, 1):
            raise UserError(
                f"frames is {frames.dtype} {list(frames.shape)}; expected uint8 [B,1,1,H,W,3]"
            )
        B = len(frames)
        poses = np.asarray(poses, np.float32)
        if poses.shape != (B, spec.dim) or not np.isfinite(poses).all():
            raise UserError(
                f"poses is {list(poses.shape)}; expected finite [{B}, {spec.dim}] "
                f"({', '.join(spec.names)})"
            )
        if len(seeds) != B:
            raise UserError(f"seeds has {len(seeds)} entries for {B} start frames")
        pixels = torch.from_numpy(frames[:, 0]).to(self.device).permute(0, 4, 1, 2, 3)
        latent, stream = self.autoencoder.encode(pixels.float() / 127.5 - 1)
        _, stream = self.autoencoder.decode(latent, stream, only="last")
        _, C, _, h, w = latent.shape
        if self.config.dit.latent_channels != C:
            raise UserError(f"autoencoder makes {C} channels, the DiT takes "
                            f"{self.config.dit.latent_channels}")  # fmt: skip
        out = self.dit(latent, torch.zeros(B, device=self.device), observed_frames=1)
        ring = KVRing.empty(
            self.config.dit,
            B,
            (h // self.config.dit.patch) * (w // self.config.dit.patch),
            sink=self.config.sink,
            window=self.config.window,
            dtype=self.dit.dtype,
            device=self.device,
        ).append(out.kv)
        return WorldState(
            ring=ring,
            decoder=Stream((), stream.decoder, stream.batch),
            last_latent=latent.float(),
            seeds=tuple(int(s) for s in seeds),
            poses=poses,
            past_actions=np.zeros((B, 0, spec.dim), np.float32),
            high=np.zeros(B, np.int64),
            done=np.zeros(B, bool),
        )

    @torch.inference_mode()
    def step(
        self,
        state: WorldState,
        actions_BTA: npt.NDArray[Any],
        *,
        steps: Steps = 4,
        decode: Decode = "all",
        timer: Timer | None = None,
    ) -> tuple[Chunk, WorldState]:
        """Imagine the T frames that follow T = ``action_spec.chunk`` actions.

        steps: denoising steps of the streaming sampler (1, 2, 4), or "reference". decode: every
        frame, the one the policy sees next, or none. ``state`` is spent afterwards.
        """
        spec, timer = self.action_spec, timer or Timer()
        actions = spec.check(actions_BTA)
        if actions.shape[:2] != (state.rows, spec.chunk):
            raise UserError(
                f"actions has shape {list(actions.shape)}; expected "
                f"[{state.rows}, {spec.chunk}, {spec.dim}]"
            )
        if decode not in ("all", "policy", "none"):
            raise UserError(f"decode is {decode!r}; expected 'all', 'policy' or 'none'")
        if steps != "reference" and steps not in STREAMING_TIMES:
            known = ", ".join(map(str, STREAMING_TIMES))
            raise UserError(f"steps is {steps!r}; expected {known} or 'reference'")
        poses = spec.to_absolute(actions, state.poses, state.past_actions)
        clock = time.perf_counter()
        last = None
        if steps == "reference":
            latents, last, state = self._reference(state, poses, timer)
        else:
            latents, state = self._stream(state, poses, int(steps), timer)
        clock = time.perf_counter()
        reward = self.reward(latents).cpu().numpy().astype(np.float32)
        clock = timer.add("reward", clock)
        frames, decoder = self._decode(latents, state.decoder, decode)
        timer.add("decode", clock)
        success, high = self._held(reward, state.high)
        done = state.done | success.any(1)
        chunk = Chunk(frames, reward, success, done, np.zeros(state.rows, bool))
        past = np.concatenate([state.past_actions, actions], 1)[:, -8:]
        return chunk, dataclasses.replace(
            state,
            decoder=decoder,
            last_latent=latents[:, :, -1:] if last is None else last,
            poses=poses[:, -1],
            past_actions=past,
            high=high,
            done=done,
            cursor=state.cursor + self.block,
            chunk=state.chunk + 1,
        )

    def _noise(self, state: WorldState) -> Tensor:
        """Noise of this chunk; a row's depends on its seed and the chunk's number alone."""
        _, C, _, h, w = state.last_latent.shape
        seeds = [derive_seed(seed, state.chunk) for seed in state.seeds]
        return noise_for(seeds, (C, self.block, h, w), self.device)

    def _normalised(self, poses: Float) -> Tensor:
        spec = self.action_spec
        scaled = (poses - np.array(spec.pose_mean)) / np.array(spec.pose_std)
        return torch.from_numpy(scaled.astype(np.float32)).to(self.device)

    def _stream(
        self, state: WorldState, poses: Float, steps: int, timer: Timer
    ) -> tuple[Tensor, WorldState]:
        """Few steps against the cached history, then one clean pass to commit the result."""
        clock = time.perf_counter()
        conditioning = self._normalised(poses)
        inputs: dict[str, Any] = {
            "actions_BTA": conditioning,
            "first_frame": state.cursor,
            "history": state.ring.history(),
        }
        denoise = dit_denoiser(self.dit, self.config.dit.prediction, **inputs)
        latents = streaming_sample(denoise, self._noise(state), STREAMING_TIMES[steps])
        clock = timer.add("dit", clock)
        commit = self.dit(latents, latents.new_zeros(state.rows), **inputs)
        ring = state.ring.append(commit.kv)
        timer.add("commit", clock)
        return latents, dataclasses.replace(state, ring=ring)

    def _reference(
        self, state: WorldState, poses: Float, timer: Timer
    ) -> tuple[Tensor, Tensor, WorldState]:
        """As published: the observed latent inside the sequence, 35 steps and one more call.

        Also returns the next chunk's observed latent: the last decoded frame, encoded again.
        """
        clock = time.perf_counter()
        noise = self._noise(state)
        noise = torch.cat([torch.zeros_like(noise[:, :, :1]), noise], 2)
        denoise = dit_denoiser(
            self.dit,
            self.config.dit.prediction,
            actions_BTA=self._normalised(poses),
            first_frame=0,
            observed_frames=1,
        )
        sample = reference_sample(denoise, noise, observed=state.last_latent)
        clock = timer.add("dit", clock)
        pixels, _ = self.autoencoder.decode(sample, only="last")
        observed, _ = self.autoencoder.encode(pixels.float().clamp(-1, 1))
        timer.add("handover", clock)
        return sample[:, :, 1:], observed.float(), state

    def _decode(
        self, latents: Tensor, stream: Stream, decode: Decode
    ) -> tuple[Frames | None, Stream]:
        if decode == "none" and isinstance(self.autoencoder, LightVAE):
            return None, stream  # nothing streams through a frame-wise decoder
        only: Literal["last"] | None = "last" if decode != "all" else None
        pixels, after = self.autoencoder.decode(latents, stream, only=only)
        if decode == "none":
            return None, after
        scaled = ((pixels.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
        frames: Frames = scaled.permute(0, 2, 3, 4, 1).unsqueeze(2).cpu().numpy()
        return frames, after

    def _held(
        self, reward: Float, high: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Success [B,T]: the reward has been above the threshold for ``held_frames`` frames."""
        above = reward > self.config.reward_threshold
        success = np.zeros_like(above)
        for t in range(reward.shape[1]):
            high = np.where(above[:, t], high + 1, 0)
            success[:, t] = high >= self.config.held_frames
        return success, high

    # ------------------------------------------------------------ checkpoints

    def save(self, folder: PathLike) -> Path:
        """Write one checkpoint folder: dit, reward and autoencoder weights and config.json."""
        parts = {
            "dit": self.dit.state_dict(),
            "reward": self.reward.state_dict(),
            "autoencoder": self.autoencoder.state_dict(),
        }
        return save_checkpoint(folder, parts, config_to_dict(self.config), kind="world_model")

    @classmethod
    def from_pretrained(
        cls,
        name: PathLike,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> WorldModel:
        """A folder, the name of a shipped preset (``tiny``) or a hub id; strict."""
        checkpoint = load_checkpoint(resolve_pretrained(name), kind="world_model")
        where = str(checkpoint.folder)
        config = config_from_dict(WorldModelConfig, checkpoint.config, where)
        world = cls(config)
        for part in ("dit", "reward", "autoencoder"):
            if part not in checkpoint.parts:
                raise UserError(f"{where}: has no {part!r} weights; it is not a whole world model")
            load_into(getattr(world, part), checkpoint.parts[part], f"{where} ({part})")
        world.to(device=device, dtype=dtype)
        return world.eval()


def build_autoencoder(config: LightVAEConfig | WanVAEConfig) -> LightVAE | WanVAE:
    return LightVAE(config) if isinstance(config, LightVAEConfig) else WanVAE(config)


def load_autoencoder(folder: PathLike) -> LightVAE:
    """A checkpoint folder of `worldloop train autoencoder`."""
    checkpoint = load_checkpoint(folder, kind="light_vae")
    config = config_from_dict(LightVAEConfig, checkpoint.config, str(folder))
    model = LightVAE(config)
    load_into(model, checkpoint.parts["model"], str(folder))
    return model.eval()
