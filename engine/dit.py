"""The action-conditioned diffusion transformer: Cosmos-Predict2's published architecture.

A pure function: latents, noise levels, actions and the keys/values of the past go in, the
prediction and this call's keys/values come out; no state is kept. Parameter names are those of the
published checkpoints without their `net.` prefix, so such a file loads strictly. Facts are from
nvidia-cosmos/cosmos-predict2 at 661da47 ([P2]) and cosmos-predict2.5 ([P25]).

There is no attention mask anywhere: a call is bidirectional inside itself, and what it sees of the
past is what `history` holds, so block-causality is decided by the caller's cache.

Shape letters: B rows (episodes), F latent frames, C channels, H W latent height and width,
S tokens per frame, N = F*S tokens of this call, M history tokens, L text tokens, D width,
h heads, K head dimension, T action poses, A pose dimension, G rows of modulation (F, or 1 when
one noise level serves all frames).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from worldloop.engine.dit_config import PRESETS, DiTConfig
from worldloop.engine.dit_layers import (
    EPS,
    KV,
    ActionMLP,
    Block,
    FinalLayer,
    PatchEmbed,
    RMSNorm,
    Sinusoid,
    TimestepMLP,
)
from worldloop.engine.rope import cached_rope_table, rope_table
from worldloop.errors import UserError
from worldloop.kernels.adaln_lora import adaln_lora
from worldloop.kernels.op import uses_triton

__all__ = ["KV", "PRESETS", "DiT", "DiTConfig", "DiTOutput"]

NULL_CONTEXT_TOKENS = 512  # length of the all-zero text of the published action pipeline


def _require_shape(name: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(tensor.shape) not in allowed:
        expected = " or ".join(str(list(shape)) for shape in allowed)
        raise UserError(f"{name} has shape {list(tensor.shape)}; expected {expected}")


class DiTOutput(NamedTuple):
    sample: Tensor  # [B,C,F,H,W], dtype of the network; meaning: DiTConfig.prediction
    kv: list[KV]  # one (k, v) per block, [B,N,h,K]; empty with return_kv=False


class DiT(nn.Module):
    """Cosmos-Predict2's network with its action embedder; weights start as `init_weights` says."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.x_embedder = PatchEmbed(config.input_channels, config.patch, D)
        self.t_embedder = nn.Sequential(Sinusoid(D, config.timestep_scale), TimestepMLP(D))
        self.t_embedding_norm = RMSNorm(D, eps=EPS)
        if config.learned_positions is not None:
            tokens = math.prod(config.learned_positions)
            self.learned_positions = nn.Parameter(torch.empty(tokens, D))
        if config.action_dim:
            hidden = config.mlp_ratio * D
            self.action_embedder_B_D = ActionMLP(config.action_features, hidden, D)
            self.action_embedder_B_3D = ActionMLP(config.action_features, hidden, 3 * D)
        if config.context_proj_dim:
            self.crossattn_proj = nn.Sequential(
                nn.Linear(config.context_proj_dim, config.context_dim), nn.GELU()
            )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.init_weights()

    def init_weights(self) -> None:
        """From-scratch start: fan-in scaled Linears; every modulation and the output at zero.

        A zero gate makes each block the identity at first (adaLN-zero), so a fresh network
        predicts exactly 0 whatever its depth.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = 1 / math.sqrt(module.in_features)
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        modulations = [m for name, m in self.named_modules() if "adaln" in name.split(".")[-1]]
        zeroed = [m[-1] for m in modulations if isinstance(m, nn.Sequential)]
        zeroed += [self.get_submodule("t_embedder.1.linear_2"), self.final_layer.linear]
        if self.config.action_dim:
            zeroed.append(self.action_embedder_B_3D.fc2)
        for linear in zeroed:
            assert isinstance(linear, nn.Linear)
            nn.init.zeros_(linear.weight)
        if self.config.learned_positions is not None:
            nn.init.normal_(self.learned_positions, std=0.02)

    @property
    def dtype(self) -> torch.dtype:
        return self.t_embedding_norm.weight.dtype

    def forward(
        self,
        x_BCFHW: Tensor,
        timesteps_BF: Tensor,
        actions_BTA: Tensor | None = None,
        *,
        condition_mask_B1FHW: Tensor | None = None,
        padding_mask: Tensor | None = None,
        context: Tensor | None = None,
        skip_null_context: bool = True,
        first_frame: int | Tensor = 0,
        observed_frames: int = 0,
        history: Sequence[KV] | None = None,
        return_kv: bool = True,
        checkpoint_blocks: bool = False,
    ) -> DiTOutput:
        """One pass over F latent frames.

        x_BCFHW: latents (already scaled by c_in), any float dtype; cast to the network's.
        timesteps_BF: c_noise in [0, 1], [B,F], or [B] / [B,1] where all frames share it. Rounded to
            the network's dtype first, as published.
        actions_BTA: `chunk`: exactly chunk_actions poses. `per_frame`: actions_per_frame poses for
            each of the F - observed_frames last frames. None: a zero embedding (observed frames).
        observed_frames: leading frames of this call without actions (`per_frame` only).
        condition_mask_B1FHW, padding_mask [B|1,1,any,any] (resized, nearest): None means zeros.
        context: text states [B|1,L,context_dim], or [B|1,L,context_proj_dim] before projection.
            None is the published all-zero text: without biases its values are 0, so cross-attention
            is skipped, exactly; `skip_null_context=False` computes it all the same.
        first_frame: absolute latent-frame index of the first frame (temporal RoPE), or the [F]
            long tensor of all indices, which keeps one graph for every position.
        history: one (k, v) per block, each [B,M,h,K], as returned in `kv`; gradients flow through.
        checkpoint_blocks: recompute blocks in the backward pass instead of storing them.
        Raises UserError for shapes that do not fit, naming the argument.
        """
        config = self.config
        self._check(x_BCFHW, timesteps_BF, condition_mask_B1FHW, history, context)
        B, _, frames, H, W = x_BCFHW.shape
        grid_h, grid_w = H // config.patch, W // config.patch

        x_BFSD = self.x_embedder(self._with_masks(x_BCFHW, condition_mask_B1FHW, padding_mask))
        if config.learned_positions is not None:
            x_BFSD = x_BFSD + self.learned_positions
        e_BGD, shared_BG3D = self._embed_noise_and_actions(
            timesteps_BF, actions_BTA, frames, observed_frames
        )
        rope = self._rope(first_frame, frames, grid_h, grid_w, x_BFSD.device)
        context = self._context(context, B, skip_null_context)

        modulations = self._modulations(e_BGD, shared_BG3D, context is not None)

        kv: list[KV] = []
        for i, block in enumerate(self.blocks):
            past = None if history is None else history[i]
            inputs = (x_BFSD, e_BGD, shared_BG3D, rope, past, context, modulations[i])
            if checkpoint_blocks and torch.is_grad_enabled():
                x_BFSD, k, v = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_BFSD, k, v = block(*inputs)
            if return_kv:
                # Views behind their history are copied, so that the whole is freed.
                kv.append((k.contiguous(), v.contiguous()))
        out = self.final_layer(x_BFSD, e_BGD, shared_BG3D)
        # Output patches are (row, column, channel), channel fastest: not the input's order.
        out = out.reshape(B, frames, grid_h, grid_w, config.patch, config.patch, -1)
        return DiTOutput(out.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, -1, frames, H, W), kv)

    def _with_masks(
        self, x_BCFHW: Tensor, condition_mask_B1FHW: Tensor | None, padding_mask: Tensor | None
    ) -> Tensor:
        """The latents with their mask channels, in the network's dtype."""
        B, _, frames, H, W = x_BCFHW.shape
        channels = [x_BCFHW.to(self.dtype)]
        zeros = channels[0].new_zeros(B, 1, frames, H, W)
        if self.config.condition_channel:
            given = condition_mask_B1FHW
            channels.append(zeros if given is None else given.to(self.dtype))
        if self.config.padding_channel and padding_mask is None:
            channels.append(zeros)
        elif self.config.padding_channel and padding_mask is not None:
            resized = F.interpolate(padding_mask.to(self.dtype), size=(H, W), mode="nearest")
            channels.append(resized[:, :, None].expand(B, 1, frames, H, W))
        return torch.cat(channels, dim=1)

    def _context(self, context: Tensor | None, rows: int, skip_null: bool) -> Tensor | None:
        """Text states [B,L,context_dim] for cross-attention, or None to leave it out."""
        config = self.config
        if context is None:
            if skip_null or not config.context_dim:
                return None
            shape = (rows, NULL_CONTEXT_TOKENS, config.context_dim)
            return self.t_embedding_norm.weight.new_zeros(shape)
        context = context.to(self.dtype)
        if context.shape[-1] == config.context_proj_dim:
            context = self.crossattn_proj(context)
        return context.expand(rows, -1, -1)

    def _embed_noise_and_actions(
        self, timesteps_BF: Tensor, actions_BTA: Tensor | None, frames: int, observed: int
    ) -> tuple[Tensor, Tensor]:
        """The embedding e [B,G,D] and the shared modulation [B,G,3D], G = F or 1."""
        t_BG = timesteps_BF[:, None] if timesteps_BF.dim() == 1 else timesteps_BF
        s_BGD = self.t_embedder[0](t_BG.to(self.dtype)).to(self.dtype)
        shared_BG3D = self.t_embedder[1](s_BGD)
        if actions_BTA is not None:
            poses = self._poses(actions_BTA, t_BG.shape[0], frames, observed).to(self.dtype)
            # Observed frames get a zero embedding, not the embedding of zero poses.
            padding = (0, 0, observed, 0)
            s_BGD = s_BGD + F.pad(self.action_embedder_B_D(poses), padding)
            shared_BG3D = shared_BG3D + F.pad(self.action_embedder_B_3D(poses), padding)
        return self.t_embedding_norm(s_BGD), shared_BG3D

    def _modulations(
        self, e_BGD: Tensor, shared_BG3D: Tensor, cross: bool
    ) -> Sequence[Tensor | None]:
        """For each block [branches,B,G,3D], or None where the block is to compute its own.

        Together where the kernel runs; alone where gradients flow, so that recomputed or sharded
        blocks stay units of their own.
        """
        alone = [None] * self.config.depth
        if not uses_triton(e_BGD):
            return alone
        blocks = cast(Sequence[Block], self.blocks)
        heads = [head for block in blocks for head in block.modulations(cross)]
        if any(type(layer) is not nn.Linear for head in heads for layer in (head[1], head[2])):
            return alone  # another arithmetic, such as fp8
        if self.config.adaln_rank % 8 or self.config.width % 8:
            return alone
        down, up = ([cast(nn.Linear, head[i]).weight for head in heads] for i in (1, 2))
        if not uses_triton(e_BGD, shared_BG3D, *down, *up):
            return alone
        e_RD, shared_RP = e_BGD.flatten(0, 1).contiguous(), shared_BG3D.flatten(0, 1).contiguous()
        m_HRP = adaln_lora(e_RD, shared_RP, down, up)
        return m_HRP.view(self.config.depth, -1, *shared_BG3D.shape).unbind(0)

    def _poses(self, actions_BTA: Tensor, B: int, frames: int, observed: int) -> Tensor:
        """Poses grouped as the embedder takes them: [B,1,T*A] or [B,F-observed,poses*A]."""
        config = self.config
        if config.action_dim == 0:
            raise UserError("actions_BTA given to a model without actions; pass None")
        T = actions_BTA.shape[1]
        _require_shape("actions_BTA", actions_BTA, (B, T, config.action_dim))
        if config.action_layout == "chunk":
            if observed:
                raise UserError("observed_frames needs action_layout 'per_frame'; pass 0")
            if config.chunk_actions != T:
                raise UserError(
                    f"actions_BTA has {T} poses; expected {config.chunk_actions} (one chunk)"
                )
            return actions_BTA.flatten(1)[:, None]
        acted, each = frames - observed, config.actions_per_frame
        if not 0 <= observed < frames or acted * each != T:
            raise UserError(
                f"actions_BTA has {T} poses for {acted} latent frames; "
                f"expected {acted * each} ({each} per latent frame)"
            )
        return actions_BTA.reshape(B, acted, -1)

    def _rope(
        self, first_frame: int | Tensor, frames: int, height: int, width: int, device: torch.device
    ) -> KV:
        if isinstance(first_frame, Tensor):
            _require_shape("first_frame", first_frame, (frames,))
            return rope_table(self.config, first_frame, height, width)
        if torch.compiler.is_compiling():
            positions = torch.arange(first_frame, first_frame + frames, device=device)
            return rope_table(self.config, positions, height, width)
        return cached_rope_table(self.config, first_frame, frames, height, width, device)

    def _check(
        self,
        x_BCFHW: Tensor,
        timesteps_BF: Tensor,
        condition_mask_B1FHW: Tensor | None,
        history: Sequence[KV] | None,
        context: Tensor | None,
    ) -> None:
        config, p = self.config, self.config.patch
        if x_BCFHW.dim() != 5:
            raise UserError(f"x_BCFHW has {x_BCFHW.dim()} dimensions; expected 5")
        B, _, frames, H, W = x_BCFHW.shape
        grid = (H // p, W // p)
        _require_shape("x_BCFHW", x_BCFHW, (B, config.latent_channels, frames, H, W))
        _require_shape("timesteps_BF", timesteps_BF, (B, frames), (B, 1), (B,))
        if H % p or W % p:
            raise UserError(f"x_BCFHW is {H}x{W}; height and width must be multiples of {p}")
        if max(grid) > config.max_grid or frames > config.max_frames:
            most = f"{config.max_frames} frames of {config.max_grid * p}x{config.max_grid * p}"
            raise UserError(f"x_BCFHW is {frames} frames of {H}x{W}; at most {most}")
        if config.learned_positions not in (None, grid):
            raise UserError(
                f"x_BCFHW is {H}x{W}, or {grid} tokens; this model's learned positions are for "
                f"{config.learned_positions} tokens"
            )
        if condition_mask_B1FHW is not None:
            if not config.condition_channel:
                raise UserError("condition_mask_B1FHW: this model has no such channel; pass None")
            _require_shape("condition_mask_B1FHW", condition_mask_B1FHW, (B, 1, frames, H, W))
        if history is not None:
            if len(history) != config.depth:
                raise UserError(f"history has {len(history)} blocks; expected {config.depth}")
            k = history[0][0]
            _require_shape("history[0][0]", k, (B, k.shape[1], config.heads, config.head_dim))
        if context is not None:
            if not config.context_dim:
                raise UserError("context: this model has no cross-attention; pass None")
            features = [n for n in (config.context_dim, config.context_proj_dim) if n]
            tokens = context.shape[1]
            _require_shape("context", context, *[(b, tokens, n) for b in (B, 1) for n in features])
        elif config.context_proj_dim:
            # The projection has a bias, so no text is not zero and cannot be skipped.
            raise UserError("context is None; this model needs the embedding of its (empty) text")

    def extra_repr(self) -> str:
        return repr(self.config)  # what no weight tells: an engine's key is made from it
