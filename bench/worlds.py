"""The world models that the benchmarks time, with the inputs and the FLOPs that go with them.

`tiny` is the shipped, trained one. The large presets have random weights of the real shapes:
speed does not need trained ones. Nothing is zero, or a kernel could find its work done.

Shape letters: B rows, T actions, A action dim, F latent frames, h w latent sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from worldloop.engine.dit_config import DiTConfig
from worldloop.engine.reward import RewardConfig
from worldloop.engine.vae import WanVAE, WanVAEConfig
from worldloop.engine.world_config import PRESETS, WorldModelConfig, preset
from worldloop.engine.world_model import WorldModel
from worldloop.engine.world_state import WorldState
from worldloop.errors import UserError
from worldloop.rl.starts import load_starts
from worldloop.types import ActionSpec

# Of a random world: no controller is fitted to it, so its poses are given as they are.
ACTIONS = ActionSpec(kind="absolute_pose")
NULL_TEXT_TOKENS = 512  # the all-zero text of the published action pipeline


def check_preset(name: str | None) -> None:
    """Raise UserError for a preset that does not exist."""
    if name is not None and name not in PRESETS:
        raise UserError(f"preset is {name!r}; known: {', '.join(PRESETS)}")


def default_preset(name: str | None, device: torch.device) -> str:
    return name or ("2b" if device.type == "cuda" else "tiny")


def bench_config(name: str, picture: tuple[int, int] | None) -> WorldModelConfig:
    """The preset as it streams: actions per latent frame, chunks of 24 actions.

    picture: height and width in pixels, for the presets that were not trained for one size;
    None means 256x256 for them. RoPE angles are fp32, as in diffusers, which the arms compare with.
    """
    config = preset(name)
    if config.dit.learned_positions is not None:
        if picture not in (None, config.picture):
            raise UserError(f"picture is {picture}; preset {name} was made for {config.picture}")
        return config
    height, width = picture or (256, 256)
    multiple = 8 * config.dit.patch
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise UserError(f"picture is {height} {width}; sides must be multiples of {multiple}")
    dit = replace(config.dit, action_layout="per_frame", rope_dtype="float32")
    reward = RewardConfig(config.dit.latent_channels, (height // 8, width // 8))
    return replace(config, dit=dit, reward=reward, action_spec=ACTIONS)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values of the scale that keeps activations near one."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(generator=generator)
            scale = name.endswith("gamma") or ("norm" in name and p.dim() == 1)
            if scale:
                p.mul_(0.1).add_(1)
            elif p.dim() == 1:
                p.mul_(0.02)
            else:
                p.mul_(1 / math.sqrt(p[0].numel()))
    return module


def bench_world(
    name: str,
    picture: tuple[int, int] | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    channels_last: bool = True,
) -> WorldModel:
    """`tiny` as shipped, or a large preset with random weights made on the device.

    window: latent frames per pass of the Wan autoencoder; channels_last: its weights' order on a
    GPU, for every arm alike.
    """
    config = bench_config(name, picture)
    if window is not None:
        if not isinstance(config.autoencoder, WanVAEConfig):
            raise UserError(f"window is {window}; preset {name} has no Wan autoencoder")
        config = replace(config, autoencoder=replace(config.autoencoder, window=window))
    if name == "tiny":
        return WorldModel.from_pretrained("tiny", device=device, dtype=dtype)
    world = random_world(config, device, dtype)
    if channels_last and device.type == "cuda" and isinstance(world.autoencoder, WanVAE):
        world.autoencoder.channels_last()
    return world


def random_world(config: WorldModelConfig, device: torch.device, dtype: torch.dtype) -> WorldModel:
    """A world model with random weights, made on the device."""
    with torch.device("meta"):
        world = WorldModel(config)
    world = world.to(dtype).to_empty(device=device)
    # to_empty leaves the latents' statistics, which are no parameters, without values.
    mean = torch.tensor(config.autoencoder.latent_mean, device=device)
    spread = torch.tensor(config.autoencoder.latent_std, device=device)
    vae = world.autoencoder
    if isinstance(vae, WanVAE):
        vae.latent_mean.copy_(mean.view(-1, 1, 1, 1))
        vae.latent_inv_std.copy_((1 / spread).view(-1, 1, 1, 1))
    else:
        vae._statistics.copy_(torch.stack([mean, spread]))
    randomise(world)
    return world.eval()  # type: ignore[return-value]


def start_state(world: WorldModel, rows: int) -> WorldState:
    """B started episodes: shipped first frames for `tiny`, random pixels elsewhere."""
    seeds = list(range(rows))
    if world.config.env_ids:
        starts = load_starts(None, world)
        pick = [row % len(starts.instructions) for row in range(rows)]
        return world.start(starts.frames[pick], starts.poses[pick], seeds)
    rng = np.random.default_rng(0)
    height, width = world.config.picture
    frames = rng.integers(0, 256, (rows, 1, 1, height, width, 3), np.uint8)
    poses = rng.normal(size=(rows, world.action_spec.dim)).astype(np.float32)
    return world.start(frames, poses, seeds)


def random_actions(world: WorldModel, rows: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """One chunk of actions [B,T,A], uniform in half of the spec's bounds."""
    spec = world.action_spec
    rng = np.random.default_rng(seed)
    shape = (rows, spec.chunk, spec.dim)
    return (0.5 * rng.uniform(spec.low, spec.high, shape)).astype(np.float32)


# FLOPs -------------------------------------------------------------------------------------------


def latent_sides(config: WorldModelConfig) -> tuple[int, int]:
    return config.reward.grid


def reference_flops(config: WorldModelConfig, passes: int, *, published: bool) -> int:
    """DiT FLOPs of one row's chunk in the reference procedure.

    published: as diffusers' network does the work: cross-attention to the null text where the
    network has it, and each token's own copy of its frame's modulation.
    """
    dit, frames, (h, w) = config.dit, config.block + 1, latent_sides(config)
    text = NULL_TEXT_TOKENS if published and dit.context_dim else 0
    one = dit.flops(frames, h, w, context_tokens=text)
    if published:
        one += repeated_modulation_flops(dit, frames, h, w, text=bool(text))
    return passes * one


def repeated_modulation_flops(dit: DiTConfig, frames: int, h: int, w: int, *, text: bool) -> int:
    """What diffusers adds by computing adaLN for every token instead of every latent frame."""
    extra = frames * ((h // dit.patch) * (w // dit.patch) - 1)
    D, rank = dit.width, dit.adaln_rank
    per_block = (3 if text else 2) * (D * rank + rank * 3 * D)
    return 2 * extra * (dit.depth * per_block + D * rank + rank * 2 * D)


def streaming_flops(config: WorldModelConfig, steps: int) -> int:
    """DiT FLOPs of one row's chunk with a full history: the steps and the commit pass."""
    dit, (h, w) = config.dit, latent_sides(config)
    tokens = (h // dit.patch) * (w // dit.patch)
    history = (config.sink + config.window) * tokens
    return (steps + 1) * dit.flops(config.block, h, w, history)


VAEWork = Literal["encode", "encode_chunk", "decode", "decode_last", "clip"]


def vae_work(world: WorldModel, work: VAEWork, rows: int = 1) -> Callable[[], Tensor]:
    """Work of the autoencoder on random pixels and latents, ready to call.

    encode: one first frame. encode_chunk: a chunk's frames after it. decode, decode_last: a chunk
    that continues a stream, all its frames or the last one. clip: first frame and chunk, afresh.
    """
    vae, config = world.autoencoder, world.config
    like, (h, w) = next(vae.parameters()), latent_sides(config)
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, dtype=like.dtype, device=like.device)

    first = normal(3, 1, *config.picture).clamp(-1, 1)
    chunk = normal(3, config.action_spec.chunk, *config.picture).clamp(-1, 1)
    with torch.no_grad():
        latent, stream = vae.encode(first)
        _, stream = vae.decode(latent, stream)
    more = normal(config.dit.latent_channels, config.block, h, w)
    clip = torch.cat([latent, more], 2)
    return {
        "encode": lambda: vae.encode(first)[0],
        "encode_chunk": lambda: vae.encode(chunk, stream)[0],
        "decode": lambda: vae.decode(more, stream)[0],
        "decode_last": lambda: vae.decode(more, stream, only="last")[0],
        "clip": lambda: vae.decode(clip)[0],
    }[work]


def vae_flops(world: WorldModel, work: VAEWork) -> int:
    """Matrix and convolution FLOPs of one row's work, counted while it runs (or on `meta`)."""
    run = vae_work(world, work)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def meta_world(config: WorldModelConfig) -> WorldModel:
    """A world model of shapes only, to count with."""
    with torch.device("meta"):
        world = WorldModel(config)
    return world.to("meta")


def results_folder() -> Path:
    """Where this package's committed results lie."""
    return Path(__file__).parent / "results"
