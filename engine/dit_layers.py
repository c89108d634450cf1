"""Parts of the transformer: embedders, attention, the modulated block, the output layer.

Attribute names are the published state-dict keys. Shape letters as in dit.py: B rows, F latent
frames, C channels, H W latent height and width, S tokens per frame, N = F*S tokens, M history
tokens, L text tokens, D width, h heads, K head dimension, G rows of modulation (F or 1).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloop.engine.attention import attend
from worldloop.engine.dit_config import DiTConfig
from worldloop.kernels.gated_norm import gated_norm, modulated_norm
from worldloop.kernels.linear_gelu import linear_gelu
from worldloop.kernels.op import uses_native, uses_triton
from worldloop.kernels.qk_rope import qk_rope_behind, rotate

EPS = 1e-6  # of every RMSNorm

KV = tuple[Tensor, Tensor]  # keys (after norm and RoPE) and values, each [B,tokens,h,K]


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm that stays fused under autocast, where input and weight differ in dtype."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), EPS)


class Patchify(nn.Module):
    """[B,C,F,H,W] -> [B,F,S,C*p*p], channel slowest inside a patch."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        B, C, frames, H, W = x_BCFHW.shape
        p = self.patch
        x = x_BCFHW.reshape(B, C, frames, H // p, p, W // p, p).permute(0, 2, 3, 5, 1, 4, 6)
        return x.reshape(B, frames, (H // p) * (W // p), C * p * p)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            Patchify(patch), nn.Linear(channels * patch * patch, width, bias=False)
        )

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        x_BFSD: Tensor = self.proj(x_BCFHW)
        return x_BFSD


class Sinusoid(nn.Module):
    """c_noise [B,G] -> [B,G,D] fp32: cosines then sines of t * 10000^(-k/(D/2))."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.pairs, self.scale = width // 2, scale

    def forward(self, t_BG: Tensor) -> Tensor:
        k = torch.arange(self.pairs, device=t_BG.device, dtype=torch.float32)
        frequencies = torch.exp(k * (-math.log(10000.0) / self.pairs))
        angles = (t_BG.float() * self.scale)[..., None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepMLP(nn.Module):
    """The shared part of every modulation: D -> 3D (shift, scale, gate)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, 3 * width, bias=False)

    def forward(self, s_BGD: Tensor) -> Tensor:
        shared: Tensor = self.linear_2(F.silu(self.linear_1(s_BGD)))
        return shared


class MLP(nn.Module):
    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(width, ratio * width, bias=False)
        self.layer2 = nn.Linear(ratio * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.layer1) is nn.Linear:
            hidden = linear_gelu(x, self.layer1.weight)
        else:  # another arithmetic, such as fp8
            hidden = F.gelu(self.layer1(x))
        out: Tensor = self.layer2(hidden)
        return out


class ActionMLP(nn.Module):
    """Flattened poses -> an addition to the timestep embedding. The only biases of the network."""

    def __init__(self, features: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, poses: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(poses), approximate="tanh"))
        return out


class Attention(nn.Module):
    """Multi-head attention with per-head RMSNorm on queries and keys."""

    def __init__(self, width: int, heads: int, source_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.implementation = "auto"  # one of attention.NAMES; set by backends.set_attention
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(source_dim, width, bias=False)
        self.v_proj = nn.Linear(source_dim, width, bias=False)
        self.output_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(width // heads, eps=EPS)
        self.k_norm = RMSNorm(width // heads, eps=EPS)

    def forward(
        self, x_BND: Tensor, source: Tensor, rope: KV | None, history: KV | None
    ) -> tuple[Tensor, KV]:
        """Attend from x to [history, source]; returns the output and the new keys and values
        (possibly views behind their history)."""
        split = (self.heads, -1)
        q = self.q_proj(x_BND).unflatten(-1, split)
        k = self.k_proj(source).unflatten(-1, split)
        v = self.v_proj(source).unflatten(-1, split)
        weights = (self.q_norm.weight.to(v.dtype), self.k_norm.weight.to(v.dtype))
        inputs = (q, k, v, *weights, *(history or ()))
        if rope is not None and (uses_triton(*inputs) or uses_native(*inputs)):
            q, seen_k, seen_v = qk_rope_behind(q, k, v, weights, rope, history)
            k, v = seen_k[:, -k.shape[1] :], seen_v[:, -k.shape[1] :]
        else:
            q, k = self.q_norm(q), self.k_norm(k)
            if rope is not None:
                q, k = rotate(q, *rope), rotate(k, *rope)
            q, k = q.to(v.dtype), k.to(v.dtype)  # autocast may have left the norms in fp32
            seen_k, seen_v = k, v
            if history is not None:
                seen_k = torch.cat([history[0], k], dim=1)
                seen_v = torch.cat([history[1], v], dim=1)
        q, seen_k, seen_v = q.transpose(1, 2), seen_k.transpose(1, 2), seen_v.transpose(1, 2)
        out = attend(q, seen_k, seen_v, self.implementation)
        projected: Tensor = self.output_proj(out.transpose(1, 2).flatten(2))
        return projected, (k, v)


def _modulation(width: int, rank: int, parts: int) -> nn.Sequential:
    return nn.Sequential(
        nn.SiLU(), nn.Linear(width, rank, bias=False), nn.Linear(rank, parts * width, bias=False)
    )


class Block(nn.Module):
    """Self-attention, cross-attention and MLP, each shifted, scaled and gated per frame."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D, rank = config.width, config.adaln_rank
        self.self_attn = Attention(D, config.heads, D)
        self.adaln_modulation_self_attn = _modulation(D, rank, 3)
        if config.context_dim:
            self.cross_attn = Attention(D, config.heads, config.context_dim)
            self.adaln_modulation_cross_attn = _modulation(D, rank, 3)
        self.mlp = MLP(D, config.mlp_ratio)
        self.adaln_modulation_mlp = _modulation(D, rank, 3)

    def modulations(self, cross: bool) -> list[nn.Sequential]:
        """The heads that give shift, scale and gate to each branch, in the order of use."""
        found = [self.adaln_modulation_self_attn]
        if cross:
            found.append(self.adaln_modulation_cross_attn)
        return [*found, self.adaln_modulation_mlp]

    def forward(
        self,
        x_BFSD: Tensor,
        e_BGD: Tensor,
        shared_BG3D: Tensor,
        rope: KV,
        history: KV | None,
        context_BLD: Tensor | None,
        modulation: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the tokens and this call's keys and values of self-attention.

        modulation: [B,G,3D] for each branch; None: computed here from e and shared.
        """
        grid = x_BFSD.shape[1:3]
        if modulation is None:
            heads = self.modulations(context_BLD is not None)
            modulation = [head(e_BGD) + shared_BG3D for head in heads]
        (shift, scale, gate), *others = (m_BG3D.chunk(3, dim=-1) for m_BG3D in modulation)
        x_BND = modulated_norm(x_BFSD, shift, scale).flatten(1, 2)
        out_BND, (k, v) = self.self_attn(x_BND, x_BND, rope, history)
        if context_BLD is not None:
            shift, scale, next_gate = others[0]
            x_BFSD, y_BFSD = gated_norm(x_BFSD, out_BND.unflatten(1, grid), gate, shift, scale)
            out_BND, _ = self.cross_attn(y_BFSD.flatten(1, 2), context_BLD, None, None)
            gate = next_gate
        shift, scale, next_gate = others[-1]
        x_BFSD, y_BFSD = gated_norm(x_BFSD, out_BND.unflatten(1, grid), gate, shift, scale)
        return torch.addcmul(x_BFSD, next_gate[:, :, None], self.mlp(y_BFSD)), k, v


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.adaln_modulation = _modulation(config.width, config.adaln_rank, 2)
        self.linear = nn.Linear(config.width, config.patch**2 * config.latent_channels, bias=False)

    def forward(self, x_BFSD: Tensor, e_BGD: Tensor, shared_BG3D: Tensor) -> Tensor:
        shared_BG2D = shared_BG3D[..., : 2 * e_BGD.shape[-1]]
        shift, scale = (self.adaln_modulation(e_BGD) + shared_BG2D).chunk(2, dim=-1)
        out: Tensor = self.linear(modulated_norm(x_BFSD, shift, scale))
        return out
