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
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

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
from worldloop.engine.arm import Arm
from worldloop.engine.dit import DiT
from worldloop.engine.kv_cache import KVRing
from worldloop.engine.light_vae import LightVAE, LightVAEConfig
from worldloop.engine.precision import device_of
from worldloop.engine.reward import RewardHead
from worldloop.engine.sampler import (
    STREAMING_TIMES,
    derive_seed,
    dit_denoiser,
    noise_for,
    reference_sample,
    streaming_sample,
)
from worldloop.engine.still import keep_still, still_of
from worldloop.engine.vae import Stream, WanVAE
from worldloop.engine.world_config import PRESETS, WorldModelConfig
from worldloop.engine.world_state import WorldState
from worldloop.errors import UserError
from worldloop.files import PathLike
from worldloop.kernels.frames import to_uint8
from worldloop.types import ActionSpec, Chunk, Frames

__all__ = [
    "PRESETS", "Decode", "Steps", "Timer", "WorldModel", "WorldModelConfig", "WorldState",
]  # fmt: skip

Decode = Literal["all", "policy", "none"]
Steps = int | Literal["reference"]
Float = npt.NDArray[np.float32]


@dataclass
class Timer:
    """Seconds by part; exact on a CPU, launch times on a GPU unless it is synchronised."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, since: float) -> float:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - since
        return now


Method = TypeVar("Method", bound=Callable[..., Any])


def _own_precision(method: Method) -> Method:
    """Weights of half precision run as they are, outside of the caller's autocast.

    Autocast is for weights in fp32; kernels and graphs do not work under it.
    """

    @functools.wraps(method)
    def within(self: WorldModel, *args: Any, **options: Any) -> Any:
        kind, whole = self.device.type, self.dit.dtype == torch.float32
        dtype, wanted = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with torch.autocast(kind, dtype, enabled=wanted and whole):
            return method(self, *args, **options)

    return cast(Method, within)


class WorldModel(nn.Module):
    """DiT, autoencoder, reward head and arm behind ``start`` and ``step``."""

    def __init__(
        self,
        config: WorldModelConfig,
        dit: DiT | None = None,
        autoencoder: LightVAE | WanVAE | None = None,
        reward: RewardHead | None = None,
        arm: Arm | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.dit = dit if dit is not None else DiT(config.dit)
        if autoencoder is None:
            sizes = config.autoencoder
            autoencoder = LightVAE(sizes) if isinstance(sizes, LightVAEConfig) else WanVAE(sizes)
        self.autoencoder = autoencoder
        self.reward = reward if reward is not None else RewardHead(config.reward)
        self.arm = arm if arm is not None or config.arm is None else Arm(config.arm)

    # ------------------------------------------------------------ facts

    @property
    def action_spec(self) -> ActionSpec:
        return self.config.action_spec

    @property
    def block(self) -> int:
        """Latent frames of a chunk."""
        return self.config.block

    @property
    def streams(self) -> bool:
        """Whether the streaming sampler fits: it needs actions for each latent frame."""
        return self.config.dit.action_layout == "per_frame"

    @property
    def device(self) -> torch.device:
        return next(self.dit.parameters()).device

    @property
    def lag(self) -> int:
        """How many past actions the next pose depends on."""
        return self.action_spec.lag if self.arm is None else self.arm.config.past - 1

    def poses(self, state: WorldState, actions_BTA: Float) -> Float:
        """Absolute poses [B,T,A] that actions lead to from where ``state`` is."""
        past, start = state.past_actions, state.poses
        if self.arm is None:
            return self.action_spec.to_absolute(actions_BTA, start, past)
        return self.arm.poses(actions_BTA, start, past, state.last_latent[:, :, -1])

    # ------------------------------------------------------------ generation

    @_own_precision
    @torch.inference_mode()
    def start(
        self,
        frames: Frames,
        poses: Float,
        seeds: Sequence[int],
        instructions: Sequence[str] | None = None,
    ) -> WorldState:
        """Encode and commit the first frames.

        frames: uint8 [B,1,1,H,W,3] (one view). poses: [B,A] end-effector state (metres, rotation
        vector, gripper). seeds: world noise of each row. instructions: of each row, by which a
        task's own success rule is found; None: the model's rule for all. Raises UserError naming
        the argument.
        """
        frames, poses = self._check_start(frames, poses, seeds)
        config, B = self.config, len(frames)
        rules = [config.success_rule(text) for text in instructions or [""] * B]
        if len(rules) != B:
            raise UserError(f"instructions has {len(rules)} entries for {B} start frames")
        # A copy: frames may be a read-only memory map.
        pixels = torch.from_numpy(frames[:, 0].copy()).to(self.device).permute(0, 4, 1, 2, 3)
        pixels = pixels.float() / 127.5 - 1
        latent, stream = self.autoencoder.encode(pixels)
        decoded, stream = self.autoencoder.decode(latent, stream, only="last")
        ring = None
        if self.streams:
            out = self.dit(latent, torch.zeros(B, device=self.device), observed_frames=1)
            tokens = (latent.shape[3] // config.dit.patch) * (latent.shape[4] // config.dit.patch)
            ring = KVRing.empty(
                config.dit,
                B,
                tokens,
                sink=config.sink,
                window=config.window,
                dtype=out.kv[0][0].dtype,  # bf16 under autocast, whatever the weights
                device=self.device,
            ).append(out.kv)
        return WorldState(
            ring=ring,
            decoder=Stream((), stream.decoder, stream.batch),
            still=still_of(pixels[:, :, 0], decoded[:, :, 0]),
            last_latent=latent.float(),
            seeds=tuple(int(seed) for seed in seeds),
            poses=poses,
            past_actions=np.zeros((B, 0, self.action_spec.dim), np.float32),
            high=np.zeros(B, np.int64),
            done=np.zeros(B, bool),
            threshold=np.array([threshold for threshold, _ in rules], np.float32),
            held_frames=np.array([held for _, held in rules], np.int64),
        )

    def _check_start(
        self, frames: Frames, poses: Float, seeds: Sequence[int]
    ) -> tuple[Frames, Float]:
        spec, size = self.action_spec, self.config.picture
        expected = f"uint8 [B,1,1,{size[0]},{size[1]},3]"
        if not isinstance(frames, np.ndarray):
            raise UserError(f"frames is a {type(frames).__name__}; expected a numpy {expected}")
        if (
            frames.dtype != np.uint8
            or frames.ndim != 6
            or frames.shape[1:] != (1, 1, *size, 3)
            or not len(frames)
        ):
            raise UserError(
                f"frames is {frames.dtype} {list(frames.shape)}; expected {expected}: one view, "
                "of the size that this world model was made for"
            )
        B = len(frames)
        poses = np.asarray(poses)
        if poses.dtype.kind != "f":
            raise UserError(f"poses has dtype {poses.dtype}; expected a float array")
        if poses.shape != (B, spec.dim):
            raise UserError(
                f"poses has shape {list(poses.shape)}; expected [{B}, {spec.dim}] "
                f"({', '.join(spec.names)})"
            )
        if not np.isfinite(poses).all():
            b, a = (int(i) for i in np.argwhere(~np.isfinite(poses))[0])
            raise UserError(f"poses[{b},{a}] ({spec.names[a]}) is {poses[b, a]}; must be finite")
        if len(seeds) != B:
            raise UserError(f"seeds has {len(seeds)} entries for {B} start frames")
        return frames, poses.astype(np.float32)

    @_own_precision
    @torch.inference_mode()
    def step(
        self,
        state: WorldState,
        actions_BTA: npt.NDArray[Any],
        *,
        steps: Steps = 4,
        decode: Decode = "all",
        commit: bool = True,
        timer: Timer | None = None,
    ) -> tuple[Chunk, WorldState]:
        """Imagine the T frames that follow T = ``action_spec.chunk`` actions.

        steps: denoising steps of the streaming sampler (1, 2, 4), or "reference". decode: every
        frame, the one the policy sees next, or none. commit: False saves the pass that adds this
        chunk to the history, where no other chunk will follow; the state handed back is then at
        its end, and a further step raises. ``state`` is spent afterwards.
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
        poses = self.poses(state, actions)
        if steps == "reference":
            latents, frames, last = self._reference(state, poses, decode, timer)
            ring, decoder = state.ring, state.decoder
        else:
            latents, ring = self._stream(state, poses, int(steps), commit, timer)
            clock = time.perf_counter()
            frames, decoder = None, state.decoder
            if commit or decode != "none":  # else nobody sees this chunk, and no other follows
                frames, decoder = self._decode(latents, state, decode)
            timer.add("decode", clock)
            last = latents[:, :, -1:]
        end = poses[:, -1]
        if self.arm is not None:
            end = self.arm.look(latents[:, :, -1], end)
        clock = time.perf_counter()
        reward = self.reward(latents).cpu().numpy().astype(np.float32)
        timer.add("reward", clock)
        success, high = state.judge(reward)
        done = state.done | success.any(1)
        chunk = Chunk(frames, reward, success, done, np.zeros(state.rows, bool))
        past = np.concatenate([state.past_actions, actions], 1)
        return chunk, dataclasses.replace(
            state,
            ring=ring,
            decoder=decoder,
            last_latent=last,
            poses=end,
            past_actions=past[:, max(0, past.shape[1] - self.lag) :],
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
        self, state: WorldState, poses: Float, steps: int, commit: bool, timer: Timer
    ) -> tuple[Tensor, KVRing]:
        """Few steps against the cached history, then one clean pass to commit the result."""
        if state.ring is None:
            raise UserError(
                f"steps is {steps}, but action_layout is 'chunk': this model takes the actions "
                'of a whole chunk as one vector and can only be sampled with steps="reference"'
            )
        if state.ring.frames != state.cursor:
            raise UserError(
                f"steps is {steps}, but the last chunk is not in this episode's history: it was "
                "made by the reference procedure or with commit=False; start again"
            )
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
        if not commit:
            return latents, state.ring
        committed = self.dit(latents, latents.new_zeros(state.rows), **inputs)
        ring = state.ring.append(committed.kv)
        timer.add("commit", clock)
        return latents, ring

    def _reference(
        self, state: WorldState, poses: Float, decode: Decode, timer: Timer
    ) -> tuple[Tensor, Frames | None, Tensor]:
        """As published: the observed latent inside the sequence, 35 steps and one more call.

        Each chunk is a clip of its own, decoded from its observed latent on; frames are truncated
        to uint8. Returns the chunk's latents, its frames, and the next chunk's observed latent:
        the last frame, as uint8, encoded again.
        """
        clock = time.perf_counter()
        noise = self._noise(state)
        noise = torch.cat([torch.zeros_like(noise[:, :, :1]), noise], 2)
        inputs: dict[str, Any] = {"actions_BTA": self._normalised(poses)}
        if self.streams:
            inputs["observed_frames"] = 1
        if self.config.dit.condition_channel:
            mask = torch.zeros_like(noise[:, :1])
            mask[:, :, :1] = 1
            inputs["condition_mask_B1FHW"] = mask
        denoise = dit_denoiser(self.dit, self.config.dit.prediction, **inputs)
        sample = reference_sample(denoise, noise, observed=state.last_latent)
        clock = timer.add("dit", clock)
        only: Literal["last"] | None = None if decode == "all" else "last"
        pixels, _ = self.autoencoder.decode(sample, only=only)
        seen = to_uint8(pixels, rounded=False)
        clock = timer.add("decode", clock)
        last = seen[:, -1:].permute(0, 4, 1, 2, 3)
        observed, _ = self.autoencoder.encode(last.float() / 127.5 - 1)
        timer.add("handover", clock)
        frames = None if decode == "none" else _frames(seen[:, -1:] if only else seen[:, 1:])
        return sample[:, :, 1:], frames, observed.float()

    def _decode(
        self, latents: Tensor, state: WorldState, decode: Decode
    ) -> tuple[Frames | None, Stream]:
        if decode == "none" and isinstance(self.autoencoder, LightVAE):
            return None, state.decoder  # nothing streams through a frame-wise decoder
        only: Literal["last"] | None = "last" if decode != "all" else None
        pixels, after = self.autoencoder.decode(latents, state.decoder, only=only)
        if decode == "none":
            return None, after
        if self.config.still_tolerance:
            pixels = keep_still(pixels, state.still, self.config.still_tolerance)
        return _frames(to_uint8(pixels)), after

    # ------------------------------------------------------------ checkpoints

    def save(self, folder: PathLike, dtype: torch.dtype | None = None) -> Path:
        """Write one checkpoint folder: dit, reward, autoencoder and arm weights and config.json.

        ``dtype`` stores the weights so (float16 halves a shipped file); loading casts them back.
        """
        parts = {
            "dit": self.dit.state_dict(),
            "reward": self.reward.state_dict(),
            "autoencoder": self.autoencoder.state_dict(),
        }
        if dtype is not None:
            parts = {part: {k: t.to(dtype) for k, t in s.items()} for part, s in parts.items()}
        if self.arm is not None:  # always whole: rounding would add up over an episode
            parts["arm"] = self.arm.state_dict()
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
        device = device_of(device)
        checkpoint = load_checkpoint(resolve_pretrained(name), kind="world_model")
        where = str(checkpoint.folder)
        config = config_from_dict(WorldModelConfig, checkpoint.config, where)
        with torch.device("meta"):  # the weights take their places without a random start
            world = cls(config)
        arm = () if config.arm is None else ("arm",)
        for part in ("dit", "reward", "autoencoder", *arm):
            if part not in checkpoint.parts:
                raise UserError(f"{where}: has no {part!r} weights; it is not a whole world model")
            # Copies: a loaded tensor is a map of the file, unaligned, and lost if that is cut.
            tensors = {k: tensor.clone() for k, tensor in checkpoint.parts.pop(part).items()}
            load_into(getattr(world, part), tensors, f"{where} ({part})")
        world.to(device=device, dtype=dtype)
        if device.type == "cuda":  # the order in which its kernels are fast
            world.autoencoder.channels_last()
        return world.eval()

    @classmethod
    def from_cosmos(
        cls, dit: PathLike, autoencoder: PathLike, *, action_spec: ActionSpec, **options: Any
    ) -> WorldModel:
        """Published weights (Cosmos ``.pt`` and Wan ``.pth``, or diffusers folders), strict.

        Options and errors: `worldloop.engine.formats.world.load_published`.
        """
        from worldloop.engine.formats.world import load_published  # it imports this module

        return load_published(dit, autoencoder, action_spec=action_spec, **options)


def _frames(pixels_BTHW3: Tensor) -> Frames:
    """uint8 pixels on any device to Frames [B,T,1,H,W,3]: their only way to the host."""
    frames: Frames = pixels_BTHW3.unsqueeze(2).cpu().numpy()
    return frames
