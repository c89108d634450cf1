"""OpenVLA-OFT's continuous parts: the L1 action head and the proprioception projector.

Both live in files of their own beside a checkpoint (`action_head--*`, `proprio_projector--*`) and
so are modules of their own here, with the published parameter names. A checkpoint trained with
the L1 head never trained its action logits: it acts, but cannot start reinforcement learning over
tokens. Facts: openvla/openvla-oft at 213c5ff.

Shape letters: B rows, A action tokens, D width, S state numbers.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from worldloop.errors import UserError


class _ResnetBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class _MLPResnet(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, width)
        self.mlp_resnet_blocks = nn.ModuleList(_ResnetBlock(width) for _ in range(blocks))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1Head(nn.Module):
    """Hidden states of one step's action tokens, side by side, to that step's action."""

    def __init__(self, width: int, action_dim: int = 7) -> None:
        super().__init__()
        self.width, self.action_dim = width, action_dim
        self.model = _MLPResnet(action_dim * width, width, action_dim, blocks=2)

    def forward(self, hidden_BAD: Tensor) -> Tensor:
        """`OpenVLAOFT.hidden`'s [B,A,D] to normalised actions [B,chunk,action_dim]."""
        B, A, D = hidden_BAD.shape
        if A % self.action_dim or self.width != D:
            raise UserError(
                f"hidden_BAD has shape {[B, A, D]}; this head takes [B, a multiple of "
                f"{self.action_dim}, {self.width}]"
            )
        return self.model(hidden_BAD.reshape(B, A // self.action_dim, self.action_dim * D))


class ProprioProjector(nn.Module):
    """Normalised robot state [B,S] (`Statistics.normalise`) to one token [B,1,D]."""

    def __init__(self, width: int, state_dim: int = 8) -> None:
        super().__init__()
        self.state_dim = state_dim
        self.fc1 = nn.Linear(state_dim, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, state_BS: Tensor) -> Tensor:
        if state_BS.dim() != 2 or state_BS.shape[1] != self.state_dim:
            raise UserError(
                f"state has shape {list(state_BS.shape)}; expected [B, {self.state_dim}]"
            )
        return self.fc2(F.gelu(self.fc1(state_BS.to(self.fc1.weight.dtype))))[:, None]
