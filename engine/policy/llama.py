"""A Llama trunk in which every token sees every other: OpenVLA-OFT's language model.

Parameter names are those of published Llama checkpoints. There is no causal mask at all; padding
is masked as keys. The published fork does this in its SDPA attention only, so stock Llama code on
the same weights is a different model.

Shape letters: B rows, S tokens, D width, h heads, K head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from worldloop.engine import attention
from worldloop.errors import UserError


@dataclass(frozen=True)
class LlamaConfig:
    """Defaults are Llama-2-7B with OpenVLA's padded vocabulary.

    eps is not Llama-2's 1e-5: OpenVLA's conversion wrote a config without it, so every published
    checkpoint was fine-tuned and evaluated at transformers' default (openvla/openvla,
    vla-scripts/extern/convert_openvla_weights_to_hf.py).
    """

    width: int = 4096
    depth: int = 32
    heads: int = 32
    mlp_width: int = 11008
    vocab_rows: int = 32064
    rope_theta: float = 10000.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise UserError(
                f"LlamaConfig: width {self.width} over {self.heads} heads must give an even "
                "head dimension"
            )


def rope_tables(config: LlamaConfig, positions_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """cos and sin, stacked [2,B,1,S,K]; angles in float32 whatever `dtype` is returned."""
    K = config.width // config.heads
    exponents = torch.arange(0, K, 2, device=positions_BS.device, dtype=torch.float32) / K
    angles = positions_BS.float()[..., None] / config.rope_theta**exponents
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def _rotate(x_BhSK: Tensor, rope: Tensor) -> Tensor:
    first, second = x_BhSK.chunk(2, dim=-1)
    return x_BhSK * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]


def attend(q_BhSK: Tensor, k_BhSK: Tensor, v_BhSK: Tensor, keys_B11S: Tensor | None) -> Tensor:
    """Every token sees every key that `keys_B11S` does not hide; [B,h,S,K]."""
    if keys_B11S is None:
        return attention.attend(q_BhSK, k_BhSK, v_BhSK)
    return F.scaled_dot_product_attention(q_BhSK, k_BhSK, v_BhSK, attn_mask=keys_B11S)


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attend: Callable[..., Tensor] = attend  # vllm_plugin.py puts vLLM's here
        self.heads = config.heads
        D = config.width
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x_BSD: Tensor, rope: Tensor, keys_B11S: Tensor | None) -> Tensor:
        q, k, v = (
            proj(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        rope = rope.to(q.dtype)  # under autocast it is fp32, and would make q and k so
        q, k = _rotate(q, rope), _rotate(k, rope)
        out = self.attend(q, k, v, keys_B11S)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.eps)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.eps)

    def forward(self, x_BSD: Tensor, rope: Tensor, keys_B11S: Tensor | None) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, keys_B11S)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class LlamaTrunk(nn.Module):
    """Token embeddings, layers and final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_rows, config.width)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=config.eps)

    def forward(
        self, x_BSD: Tensor, mask_BS: Tensor | None = None, *, checkpoint_blocks: bool = False
    ) -> Tensor:
        """Embeddings [B,S,D] to normed hidden states [B,S,D].

        mask_BS: bool, False where a token is padding: no key, and no position of its own
        (positions count the real tokens only), so padding anywhere leaves the others unchanged.
        checkpoint_blocks: recompute layers in the backward pass instead of storing them.
        """
        B, S, _ = x_BSD.shape
        if mask_BS is None:
            positions = torch.arange(S, device=x_BSD.device)[None]
            keys = None
        else:
            if mask_BS.dtype != torch.bool or tuple(mask_BS.shape) != (B, S):
                raise UserError(
                    f"mask is {mask_BS.dtype} {list(mask_BS.shape)}; expected bool {[B, S]}"
                )
            positions = (mask_BS.long().cumsum(1) - 1).clamp_min(0)
            keys = mask_BS[:, None, None, :]
        return self.run(x_BSD, positions, keys, checkpoint_blocks=checkpoint_blocks)

    def run(
        self,
        x_BSD: Tensor,
        positions_BS: Tensor,
        keys_B11S: Tensor | None,
        *,
        checkpoint_blocks: bool = False,
    ) -> Tensor:
        """`forward` where positions and the mask of keys are known already."""
        rope = rope_tables(self.config, positions_BS, x_BSD.dtype)
        for layer in self.layers:
            if checkpoint_blocks and torch.is_grad_enabled():
                x_BSD = checkpoint(layer, x_BSD, rope, keys_B11S, use_reentrant=False)
            else:
                x_BSD = layer(x_BSD, rope, keys_B11S)
        return self.norm(x_BSD)


class LlamaLM(nn.Module):
    """The trunk and its output matrix, under the published names; untied."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaTrunk(config)
        self.lm_head = nn.Linear(config.width, config.vocab_rows, bias=False)
