"""The procedure as published, around diffusers' own CosmosTransformer3DModel: arms A0 to A2.

Each chunk is a clip of its own: its first latent frame is the encoded last picture, held in its
place through 35 steps and one more evaluation; the whole clip is decoded, cut to uint8, and the
last frame encoded again. With guidance the network runs a second time on the very same inputs
(the published action pipeline has no other null condition), 72 passes in all.

diffusers' network has no action embedder. Here its time embedding is wrapped: the embedding of
each latent frame's four poses is added before the norm, and to the shared modulation, as the
published pipeline does inside its own network. Its forward pass stays diffusers' own, including
that it repeats a frame's timestep for each token and so computes adaLN per token. A model without
cross-attention (`tiny`) has none here either.

The weights are the engine's tensors themselves. Shape letters: B rows, C channels, F latent
frames, O observed frames, T action poses, A pose dimension, D width, H W latent sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import CosmosTransformer3DModel
from torch import Tensor, nn

from worldloop.bench.worlds import NULL_TEXT_TOKENS
from worldloop.engine.dit import DiT, DiTOutput
from worldloop.engine.formats.diffusers import config_to_diffusers, to_diffusers
from worldloop.engine.sampler import derive_seed, dit_denoiser, noise_for, reference_sample
from worldloop.engine.world_model import WorldModel
from worldloop.engine.world_state import WorldState
from worldloop.errors import UserError
from worldloop.types import Frames

GUIDANCE = 7.0  # the published script's default; it multiplies a difference that is exactly zero


class ActionTimeEmbed(nn.Module):
    """diffusers' time embedding plus the embedding of each latent frame's poses."""

    poses: Tensor

    def __init__(self, time_embed: nn.Module, dit: DiT) -> None:
        super().__init__()
        self.time_embed = time_embed
        self.embedding, self.modulation = dit.action_embedder_B_D, dit.action_embedder_B_3D
        self.register_buffer("poses", torch.empty(0), persistent=False)  # [B,F-O,features]
        self.observed = 1

    def hold(self, poses: Tensor, observed: int) -> None:
        """Keep the poses of the next forward passes, in place while the shape stays."""
        if self.poses.shape != poses.shape or observed != self.observed:
            with torch.inference_mode(False):
                self.poses = torch.empty(poses.shape, dtype=poses.dtype, device=poses.device)
            self.observed = observed
        self.poses.copy_(poses)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[B*F] timesteps to the shared modulation [B*F,3D] and the embedding [B*F,D]."""
        inner = self.time_embed
        sinusoid = inner.time_proj(timestep).type_as(hidden_states)  # type: ignore[operator]
        shared = inner.t_embedder(sinusoid)  # type: ignore[operator]
        padding = (0, 0, self.observed, 0)
        embedding = F.pad(self.embedding(self.poses), padding).flatten(0, 1)
        modulation = F.pad(self.modulation(self.poses), padding).flatten(0, 1)
        return shared + modulation, inner.norm(sinusoid + embedding)  # type: ignore[operator]


class PatchesWithPositions(nn.Module):
    """diffusers' patch embedding plus a learned table of positions [h*w,D]."""

    def __init__(self, patch_embed: nn.Module, positions: Tensor) -> None:
        super().__init__()
        self.patch_embed, self.positions = patch_embed, positions

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.patch_embed(hidden_states)
        return out + self.positions.view(1, 1, *out.shape[2:])


class NoModulation(nn.Module):
    """Stands where a network without cross-attention has no norm: the input, and a gate of 0."""

    def forward(self, hidden_states: Tensor, *_: Any) -> tuple[Tensor, float]:
        return hidden_states, 0.0


class NoAttention(nn.Module):
    """Stands where a network has no cross-attention: adds nothing."""

    def forward(self, hidden_states: Tensor, **_: Any) -> float:
        return 0.0


class PublishedDiT(nn.Module):
    """diffusers' network behind the call of `DiT.forward`, on the tensors of a given DiT."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        config = dit.config
        if config.action_layout != "per_frame" or config.context_proj_dim:
            raise UserError("PublishedDiT needs action_layout 'per_frame' and no text projection")
        self.config, self.dtype = config, dit.dtype
        plain = replace(
            config,
            action_dim=0,
            learned_positions=None,
            timestep_scale=1.0,
            context_dim=config.context_dim or config.width,
            padding_channel=False,  # given as an input channel: diffusers resizes it by torchvision
        )
        keywords = config_to_diffusers(plain)
        keywords["in_channels"] = config.input_channels
        with torch.device("meta"):  # its RoPE is computed in each call, so nothing is lost
            model = CosmosTransformer3DModel(**keywords)
        beside = ("action_embedder", "learned_positions")
        state = {k: v for k, v in dit.state_dict().items() if not k.startswith(beside)}
        missing, unexpected = model.load_state_dict(to_diffusers(state), strict=False, assign=True)
        if not config.context_dim:
            for block in model.transformer_blocks:
                block.norm2, block.attn2 = NoModulation(), NoAttention()
            missing = [key for key in missing if ".norm2." not in key and ".attn2." not in key]
        if missing or unexpected:
            raise UserError(f"diffusers' network differs in {(missing + unexpected)[0]}")
        model.time_embed = ActionTimeEmbed(model.time_embed, dit)
        if config.learned_positions is not None:
            positions = dit.learned_positions.view(*config.learned_positions, -1)
            model.patch_embed = PatchesWithPositions(model.patch_embed, positions)
        self.model = model.eval()
        self.call: Callable[..., Any] = self.model

    def compile(self) -> PublishedDiT:  # type: ignore[override]
        """Run through torch.compile from now on (static shapes)."""
        self.call = torch.compile(self.model, dynamic=False)
        return self

    def forward(
        self,
        x_BCFHW: Tensor,
        timesteps_BF: Tensor,
        actions_BTA: Tensor,
        *,
        condition_mask_B1FHW: Tensor | None = None,
        observed_frames: int = 0,
        return_kv: bool = False,
    ) -> DiTOutput:
        """As `DiT.forward`, per-frame actions, without history."""
        B, _, frames, H, W = x_BCFHW.shape
        channels = [x_BCFHW.to(self.dtype)]
        zeros = channels[0].new_zeros(B, 1, frames, H, W)
        if self.config.condition_channel:
            mask = condition_mask_B1FHW
            channels.append(zeros if mask is None else mask.to(self.dtype))
        if self.config.padding_channel:
            channels.append(zeros)
        poses = actions_BTA.reshape(B, frames - observed_frames, -1).to(self.dtype)
        self.model.time_embed.hold(poses, observed_frames)
        t = timesteps_BF.to(self.dtype).float() * self.config.timestep_scale
        text_width = self.config.context_dim or 1
        sample = self.call(
            hidden_states=torch.cat(channels, 1),
            timestep=t.reshape(B, 1, frames, 1, 1),
            encoder_hidden_states=zeros.new_zeros(B, NULL_TEXT_TOKENS, text_width),
            return_dict=False,
        )[0]
        return DiTOutput(sample, [])


@torch.inference_mode()
def published_step(
    world: WorldModel,
    network: Callable[..., DiTOutput],
    state: WorldState,
    actions_BTA: npt.NDArray[np.float32],
    *,
    guided: bool,
) -> tuple[Tensor, Frames, npt.NDArray[np.float32], WorldState]:
    """One chunk as published; autoencoder, reward head and noise are the world model's.

    Returns the chunk's latents [B,C,F,H,W], its frames, its rewards [B,T] and the next state.
    """
    spec, config = world.action_spec, world.config
    poses = world.poses(state, actions_BTA)
    scaled = (poses - np.array(spec.pose_mean)) / np.array(spec.pose_std)
    inputs: dict[str, Any] = {
        "actions_BTA": torch.from_numpy(scaled.astype(np.float32)).to(world.device),
        "observed_frames": 1,
    }
    _, C, _, H, W = state.last_latent.shape
    seeds = [derive_seed(seed, state.chunk) for seed in state.seeds]
    noise = noise_for(seeds, (C, config.block, H, W), world.device)
    noise = torch.cat([torch.zeros_like(noise[:, :, :1]), noise], 2)
    if config.dit.condition_channel:
        mask = torch.zeros_like(noise[:, :1])
        mask[:, :, :1] = 1
        inputs["condition_mask_B1FHW"] = mask
    denoise = dit_denoiser(network, config.dit.prediction, **inputs)
    sample = reference_sample(
        denoise,
        noise,
        observed=state.last_latent,
        guidance=GUIDANCE if guided else 0.0,
        unconditioned=denoise if guided else None,
    )
    pixels, _ = world.autoencoder.decode(sample)
    pictures = ((pixels.float() + 1) * 127.5).clamp_(0, 255).to(torch.uint8)
    observed, _ = world.autoencoder.encode(pictures[:, :, -1:].float() / 127.5 - 1)
    frames = pictures[:, :, 1:].permute(0, 2, 3, 4, 1).unsqueeze(2).cpu().numpy()
    reward = world.reward(sample[:, :, 1:]).cpu().numpy().astype(np.float32)
    after = replace(
        state,
        last_latent=observed.float(),
        poses=poses[:, -1],
        past_actions=np.concatenate([state.past_actions, actions_BTA], 1)[:, -max(1, world.lag) :],
        chunk=state.chunk + 1,
    )
    return sample[:, :, 1:], frames, reward, after
