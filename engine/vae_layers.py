"""Layers of the causal video autoencoder (engine/vae.py), written for streams.

A layer is called with `(x, tape, need)`. The tape hands each convolution what it has to remember
of the past. `need` is how many trailing output frames anybody will read; a layer computes those
and no more. Its input then holds the trailing frames of this pass that are needed for them, as
planned by `Decoder.plan`: what lies further back is either in the history or is never read.
`need_in(need)` is the other half of that contract: the trailing input frames that `need` trailing
output frames depend on, histories included. Both may be negative in a pass that nobody reads.

Shape letters: B batch, C channels, T frames, H W height and width, M = B*T single pictures,
N pixels of one picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloop.kernels.vae_norm import reference_rms_norm, vae_norm

Slots = tuple[Tensor, ...]

ALL = 1 << 30  # "every frame is wanted"; survives the halvings of the upsamplers
HISTORY = 2  # frames of the past that a convolution of temporal width 3 sees


@dataclass
class Tape:
    """Hands each convolution its history, in order of execution, and collects the new ones."""

    old: Slots
    new: list[Tensor] = field(default_factory=list)

    def take(self) -> Tensor | None:
        """The history of the next convolution; None in the first pass over a clip."""
        return self.old[len(self.new)] if self.old else None

    def finish(self) -> Slots:
        """All histories; those of layers that did not run are as before."""
        return (*self.new, *self.old[len(self.new) :])


def _tail(x_BCTHW: Tensor, n: int) -> Tensor:
    return x_BCTHW[:, :, max(0, x_BCTHW.shape[2] - max(0, n)) :]


def _to_pictures(x_BCTHW: Tensor) -> Tensor:
    x_MCHW: Tensor = x_BCTHW.transpose(1, 2).flatten(0, 1)
    return x_MCHW


def _to_clips(x_MCHW: Tensor, like_BCTHW: Tensor) -> Tensor:
    if like_BCTHW.shape[2] == 1:
        # A view would leave the stride of a dimension of size 1 open, and concatenation would
        # then not recognise (and not keep) channels-last order.
        return x_MCHW.unsqueeze(2)
    x_BTCHW: Tensor = x_MCHW.unflatten(0, (like_BCTHW.shape[0], like_BCTHW.shape[2]))
    return x_BTCHW.transpose(1, 2)


class CausalConv3d(nn.Conv3d):
    """3-D convolution of temporal width 3 whose output at t sees its input at t-2, t-1 and t."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__(c_in, c_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(  # type: ignore[override]
        self, x: Tensor, tape: Tape, need: int = ALL, norm: RMSNorm | None = None
    ) -> Tensor:
        """norm: applied to x first, then SiLU; the history holds what came out of them."""
        history = tape.take()
        if history is None:
            # One frame with only zeros before it: two of the three temporal taps do no work.
            # The history has its full length from now on, so that clips of any age share a batch.
            x = x if norm is None else vae_norm(x, norm.gamma)
            tape.new.append(torch.cat([torch.zeros_like(x), x], dim=2))
            y: Tensor = self._conv_forward(x, self.weight[:, :, -1:], self.bias)
            return y
        n = max(0, min(need, x.shape[2]))
        if x.shape[2] >= n + HISTORY:
            seen = _tail(x, n + HISTORY)
            seen = seen if norm is None else vae_norm(seen, norm.gamma)
        elif norm is None:
            seen = torch.cat([history, x], dim=2)
        else:
            seen = vae_norm(x, norm.gamma, history)
        # clone: a view would keep the whole pass in memory.
        tape.new.append(_tail(seen, HISTORY).clone())
        if n == 0:
            return x.new_empty(x.shape[0], self.out_channels, 0, *x.shape[3:])
        y = self._conv_forward(_tail(seen, n + HISTORY), self.weight, self.bias)
        return y


class RMSNorm(nn.Module):
    """Unit length over the channels (dimension 1), times sqrt(C) times gamma; fp32 inside."""

    def __init__(self, dim: int, trailing: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * trailing))

    def forward(self, x: Tensor) -> Tensor:
        return reference_rms_norm(x, self.gamma)


class Residual(nn.Module):
    """Two rounds of norm, SiLU and causal convolution, beside a shortcut."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(c_in),
            nn.SiLU(),
            CausalConv3d(c_in, c_out),
            RMSNorm(c_out),
            nn.SiLU(),
            nn.Identity(),  # the published dropout, of rate 0
            CausalConv3d(c_out, c_out),
        )
        self.shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def need_in(self, need: int) -> int:
        return need + 2 * HISTORY

    def forward(self, x: Tensor, tape: Tape, need: int = ALL) -> Tensor:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual  # norm and SiLU go with what follows
        y: Tensor = conv1(x, tape, need + HISTORY, norm1)
        y = conv2(y, tape, need, norm2)
        if y.shape[2] == 0:
            return y
        out: Tensor = y + self.shortcut(_tail(x, y.shape[2]))
        return out


class Attention(nn.Module):
    """Single-head self-attention among the pixels of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, trailing=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def need_in(self, need: int) -> int:
        return need

    def forward(self, x: Tensor, tape: Tape, need: int = ALL) -> Tensor:
        pictures_MCHW = _to_pictures(x)
        # contiguous: fused attention wants the channels side by side.
        qkv_MNC = self.to_qkv(self.norm(pictures_MCHW)).flatten(2).transpose(1, 2).contiguous()
        q, k, v = (t.unsqueeze(1) for t in qkv_MNC.chunk(3, dim=-1))
        y_MNC = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        y_MCHW: Tensor = self.proj(y_MNC.transpose(1, 2).unflatten(2, pictures_MCHW.shape[2:]))
        return x + _to_clips(y_MCHW, x)


class Downsample(nn.Module):
    """Halves height and width and, if temporal, the number of frames after the first."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, tape: Tape, need: int = ALL) -> Tensor:
        x = _to_clips(self.resample(_to_pictures(x)), x)
        if self.time_conv is None:
            return x
        last = tape.take()
        tape.new.append(_tail(x, 1).clone())
        if last is None:
            return x
        y: Tensor = self.time_conv(torch.cat([last, x], dim=2))
        return y


class Upsample(nn.Module):
    """Doubles height and width, halves the channels; if temporal, doubles all frames but one."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
            nn.Conv2d(dim, dim // 2, 3, padding=1),
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def need_in(self, need: int) -> int:
        return need if self.time_conv is None else (need + 1) // 2 + HISTORY

    def forward(self, x: Tensor, tape: Tape, need: int = ALL) -> Tensor:
        if self.time_conv is not None and tape.take() is None:
            # The first latent frame is not doubled, and later ones do not see it here.
            tape.new.append(torch.cat([torch.zeros_like(x)] * HISTORY, dim=2))
        elif self.time_conv is not None:
            y: Tensor = self.time_conv(x, tape, (need + 1) // 2)
            # Each frame holds two: the former half of the channels comes first. One
            # concatenation, as a reshape would not keep channels-last order.
            x = torch.cat([t for pair in y.split(1, dim=2) for t in pair.chunk(2, dim=1)], dim=2)
        x = _tail(x, need)
        if x.shape[2] == 0:
            return x
        return _to_clips(self.resample(_to_pictures(x)), x)


def middle(c: int) -> nn.Sequential:
    """The layers of the coarsest resolution, the only ones with attention."""
    return nn.Sequential(Residual(c, c), Attention(c), Residual(c, c))


def head(c_in: int, c_out: int) -> nn.Sequential:
    """Norm, SiLU, convolution: the last layers of encoder and decoder."""
    return nn.Sequential(RMSNorm(c_in), nn.SiLU(), CausalConv3d(c_in, c_out))
