"""The arms of `worldloop bench rollout`: each makes whole chunks its own way; and their gate.

Shape letters: B rows (episodes).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldloop.bench.published import PublishedDiT, published_step
from worldloop.bench.roofline import dit_pass, vae_bytes
from worldloop.bench.worlds import (
    VAEWork,
    random_actions,
    reference_flops,
    start_state,
    streaming_flops,
    vae_flops,
)
from worldloop.engine.world_model import Decode, Steps, WorldModel
from worldloop.errors import UserError

# Relative L2 of the arms' latents.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
ARMS = ("A0", "A1", "A2", "B", "C4", "C4p", "C2", "C2p", "C1", "C1p")
PASSES = {"A0": 72, "A1": 36, "A2": 36, "B": 36}  # of the network, in the reference procedure


class Episodes:
    """B started episodes. All streaming arms of a batch size carry the same ones on: their history
    is most of the memory. The reference procedure looks at none, so it keeps none."""

    def __init__(self, world: WorldModel, rows: int, history: bool) -> None:
        self.world, self.rows, self.history = world, rows, history
        self.actions = random_actions(world, rows)
        self.restart()

    def restart(self) -> None:
        """Begin anew, with an empty history."""
        state = start_state(self.world, self.rows)
        self.state = state if self.history else replace(state, ring=None)


class Arm:
    """One way to make a chunk; each call makes the episodes' next one and returns its frames.

    world: for the A arms the plain one, for the engine's that of its back end.
    """

    def __init__(
        self, name: str, world: WorldModel, network: PublishedDiT, episodes: Episodes
    ) -> None:
        self.name, self.world, self.network, self.episodes = name, world, network, episodes
        self.rows, self.streams = episodes.rows, name[0] == "C"
        self.steps = int(re.sub(r"\D", "", name)) if self.streams else 36

    def moved(self, item_bytes: int) -> int:
        """Bytes that the DiT must move for one chunk of the batch, all elementwise work fused."""
        config = self.world.config
        if self.name in PASSES:
            one = dit_pass(config, config.block + 1, 0, self.rows, item_bytes)
            return PASSES[self.name] * one.moved
        history = config.sink + config.window
        one = dit_pass(config, config.block, history, self.rows, item_bytes)
        return (self.steps + 1) * one.moved

    @property
    def flops(self) -> int:
        """Of the DiT for one chunk of the batch, as this arm executes them."""
        config = self.world.config
        if self.name in PASSES:
            published = self.name != "B"
            return self.rows * reference_flops(config, PASSES[self.name], published=published)
        return self.rows * streaming_flops(config, self.steps)

    def __call__(self) -> np.ndarray:
        episodes = self.episodes
        if self.name[0] == "A":
            _, frames, _, episodes.state = published_step(
                self.world, self.network, episodes.state, episodes.actions,
                guided=self.name == "A0",
            )  # fmt: skip
            return frames
        steps: Steps = "reference" if self.name == "B" else self.steps
        decode: Decode = "policy" if self.name.endswith("p") else "all"
        chunk, episodes.state = self.world.step(
            episodes.state, episodes.actions, steps=steps, decode=decode
        )
        assert chunk.frames is not None
        return chunk.frames


@dataclass(frozen=True)
class VAECost:
    """What one row's chunk asks of the autoencoder."""

    flops: int
    moved: int  # bytes


def vae_costs(plain: WorldModel) -> dict[str, VAECost]:
    """By arm: the clip and the next first frame as published, or a chunk that continues."""
    item = next(plain.autoencoder.parameters()).element_size()
    works: tuple[VAEWork, ...] = ("encode", "decode", "decode_last", "clip")
    one = {work: VAECost(vae_flops(plain, work), vae_bytes(plain, work, item)) for work in works}
    clip, encode = one["clip"], one["encode"]
    published = VAECost(clip.flops + encode.flops, clip.moved + encode.moved)
    found = {}
    for name in ARMS:
        streaming = one["decode_last" if name.endswith("p") else "decode"]
        found[name] = published if name in PASSES else streaming
    return found


# Gate --------------------------------------------------------------------------------------------


def relative_l2(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 convolutions and products without TF32: a gate is about algorithms, not digits."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


@torch.inference_mode()  # with gradients the engine's back end would not run
def gate(
    plain: WorldModel, world: WorldModel, network: PublishedDiT, procedure: bool
) -> dict[str, Any]:
    """Agreement of the arms in the world's dtype (fp32 for the gate); raises nothing.

    plain: what the A arms use; world: the same weights behind the engine's back end.

    forward: one pass of the network, engine against diffusers. chunk, chunk_guided: latents of a
    whole chunk of the reference procedure against A1 and A0. policy_frame: whether decode="policy"
    gives the last frame of decode="all", as the largest difference of a pixel.
    """
    state, actions = start_state(world, 1), random_actions(world, 1)
    x, t, poses = _pass_inputs(world, 1)
    ours = world.dit(x, t, poses, observed_frames=1, return_kv=False).sample
    found: dict[str, Any] = {
        "forward": relative_l2(ours, network(x, t, poses, observed_frames=1)[0])
    }
    if procedure:
        caught: list[Tensor] = []
        hook = world.reward.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        world.step(state, actions, steps="reference")
        hook.remove()
        for name, guided in (("chunk", False), ("chunk_guided", True)):
            latents = published_step(plain, network, state, actions, guided=guided)[0]
            found[name] = relative_l2(caught[0], latents)
    shown = [_last_frame(world, actions, decode) for decode in ("all", "policy")]
    found["policy_frame"] = int(np.abs(shown[0] - shown[1]).max())
    return found


def _pass_inputs(world: WorldModel, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, their levels and poses of one pass."""
    config, device = world.config, world.device
    shape = (rows, config.dit.latent_channels, config.block + 1, *config.reward.grid)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device)
    t = torch.rand(rows, shape[2], generator=generator, device=device)
    poses = torch.randn(
        rows, config.action_spec.chunk, config.action_spec.dim, generator=generator, device=device
    )
    return x, t, poses


@torch.inference_mode()
def require_compiled_equal(
    world: WorldModel, compiled: PublishedDiT, plain: PublishedDiT, rows: int
) -> float:
    """Relative L2 of A2's network against A1's; raises UserError where they are not the same."""
    x, t, poses = _pass_inputs(world, rows)
    a, b = (network(x, t, poses, observed_frames=1)[0] for network in (compiled, plain))
    found, most = relative_l2(a, b), TOLERANCES[world.dit.dtype]
    if not found <= most:
        raise UserError(
            f"torch.compile changes diffusers' network by {found:.1e} (relative L2, batch {rows}; "
            f"at most {most:.0e}): no speed for unequal work; --no-compile leaves A2 out"
        )
    return found


def _last_frame(world: WorldModel, actions: np.ndarray, decode: Decode) -> np.ndarray:
    chunk, _ = world.step(start_state(world, len(actions)), actions, steps=1, decode=decode)
    assert chunk.frames is not None
    return chunk.frames[:, -1].astype(int)


def require_equal(found: dict[str, Any], dtype: torch.dtype) -> None:
    """Raise UserError where the arms do not make the same chunk: then no speed is printed.

    In low precision one pass is held to its tolerance alone; 36 of them add up their roundings.
    """
    exact, most = dtype == torch.float32, TOLERANCES[dtype]
    for name in ("forward", "chunk", "chunk_guided") if exact else ("forward",):
        if name in found and not found[name] <= most:
            raise UserError(
                f"the engine and diffusers differ by {found[name]:.1e} ({name}, relative L2, "
                f"{str(dtype).removeprefix('torch.')}; at most {most:.0e}): no speed for unequal "
                "work"
            )
    if exact and found["policy_frame"] > 1:
        raise UserError(
            f'decode="policy" differs from decode="all" by {found["policy_frame"]} levels'
        )
