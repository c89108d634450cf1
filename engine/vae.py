"""The causal video autoencoder of Wan2.1, which Cosmos-Predict2 uses as its tokenizer.

A clip of 1 + 4n frames becomes 1 + n latent frames of an eighth of the height and width. All
convolutions look only backwards in time, so a clip is encoded and decoded piece by piece; what a
convolution still has to see of the past is a `Stream`, which is passed in and handed back. Nothing
is kept on the module, and no tensor of a stream is ever written to: an old stream stays valid, and
a group of rollouts is forked from one encode.

Layout, names and numbers are those of the published `tokenizer.pth` (Wan-Video/Wan2.1, as loaded
by nvidia-cosmos/cosmos-predict2). Names in the state dict that look odd (`residual.2`, `head.0`)
are positions in the published `Sequential`s.

Shape letters: B batch, C channels, T pixel frames, F latent frames, H W picture height and width,
N tokens of one frame; a lower-case h or w is that side of the latent picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from worldloop.engine.vae_layers import (
    ALL,
    HISTORY,
    CausalConv3d,
    Downsample,
    Residual,
    Slots,
    Tape,
    Upsample,
    head,
    middle,
)

Only = Literal["last"]


# ---------------------------------------------------------------- what every autoencoder offers


@dataclass(frozen=True)
class Stream:
    """What an autoencoder remembers between two calls on the same clips; immutable.

    Each tensor has one row per clip (dimension 0). Empty tuples: that direction has not begun.
    `batch` None: a fresh stream that fits any number of clips.
    """

    encoder: Slots = ()
    decoder: Slots = ()
    batch: int | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Stream:
        """The stream with `f` applied to each tensor (`stream.map(lambda t: t.cpu())`)."""
        encoder, decoder = tuple(map(f, self.encoder)), tuple(map(f, self.decoder))
        slots = encoder + decoder
        return Stream(encoder, decoder, slots[0].shape[0] if slots else self.batch)

    def select(self, rows: Sequence[int] | Tensor) -> Stream:
        """The stream of the clips `rows` (indices, repeats allowed), in that order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        if index.ndim != 1 or index.numel() == 0:
            raise ValueError(f"rows: expected a non-empty list of indices, got {rows!r}")
        if not (self.encoder or self.decoder):
            return Stream(batch=None if self.batch is None else index.numel())
        index = index.to((self.encoder or self.decoder)[0].device)
        return self.map(lambda slot: _like(slot.index_select(0, index), slot))

    @staticmethod
    def cat(streams: Sequence[Stream]) -> Stream:
        """One stream over the clips of all `streams`.

        They may be of different age, but each direction must have begun in all of them or in none.
        """
        if len({(len(s.encoder), len(s.decoder)) for s in streams}) != 1:
            raise ValueError("streams: need at least one, and all begun or all not begun, each way")
        encoder = tuple(map(torch.cat, zip(*(s.encoder for s in streams), strict=True)))
        decoder = tuple(map(torch.cat, zip(*(s.decoder for s in streams), strict=True)))
        batches = [s.batch for s in streams]
        known = [b for b in batches if b is not None]
        return Stream(encoder, decoder, sum(known) if len(known) == len(batches) else None)


class Autoencoder(Protocol):
    """Frames to latents and back. Frames: float `[B,3,T,H,W]` in [-1,1]. Latents: unit scale.

    The first latent frame of a clip stands for one frame, each later one for `temporal` frames.
    A call without a stream starts a clip; a call with the stream of an earlier call continues it.
    """

    @property
    def spatial(self) -> int: ...

    @property
    def temporal(self) -> int: ...

    @property
    def latent_channels(self) -> int: ...

    def new_stream(self, batch: int | None = None) -> Stream: ...

    def encode(self, frames: Tensor, stream: Stream | None = None) -> tuple[Tensor, Stream]: ...

    def decode(
        self, latents: Tensor, stream: Stream | None = None, only: Only | None = None
    ) -> tuple[Tensor, Stream]: ...


def _like(tensor: Tensor, model: Tensor) -> Tensor:
    # Indexing forgets channels-last strides; one contiguous slot would make every later
    # concatenation with it contiguous too, and each convolution would convert its input.
    if model.ndim == 5 and model.is_contiguous(memory_format=torch.channels_last_3d):
        return tensor.contiguous(memory_format=torch.channels_last_3d)
    return tensor


# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of a `WanVAE`; the defaults are the published Wan2.1 ones.

    latent_mean, latent_std: statistics per latent channel; latents leave `encode` normalised.
    window: latent frames per pass of the network after the first. More means fewer, larger
        launches and more memory; it changes no result.
    """

    dim: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    latent_channels: int = 16
    res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    # fmt: off
    latent_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
    latent_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
    # fmt: on
    window: int = 1

    def __post_init__(self) -> None:
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise ValueError(
                    f"{name}: {len(getattr(self, name))} values for {self.latent_channels} latent "
                    "channels; give one per channel"
                )
        if min(self.latent_std) <= 0:
            raise ValueError("latent_std: every value must be positive")
        if len(self.temporal_downsample) != len(self.multipliers) - 1:
            raise ValueError(
                f"temporal_downsample: {len(self.temporal_downsample)} values; needs one for each "
                f"step between the {len(self.multipliers)} levels of multipliers"
            )
        if min(self.dim, self.res_blocks, self.window, *self.multipliers) < 1:
            raise ValueError("dim, res_blocks, window and multipliers must be at least 1")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution, finest first."""
        return tuple(self.dim * m for m in self.multipliers)


PRESETS: dict[str, WanVAEConfig] = {
    "wan2.1": WanVAEConfig(),
    "tiny": WanVAEConfig(
        dim=8, latent_channels=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4, res_blocks=1
    ),
}


# ---------------------------------------------------------------- encoder and decoder


class Encoder(nn.Module):
    """Frames to latent moments, one pass over a stretch of a clip; a pure function."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        width = config.widths[0]
        for level, c in enumerate(config.widths):
            for _ in range(config.res_blocks):
                blocks.append(Residual(width, c))
                width = c
            if level < len(config.temporal_downsample):
                blocks.append(Downsample(c, config.temporal_downsample[level]))
        self.conv1 = CausalConv3d(3, config.widths[0])
        self.downsamples = nn.Sequential(*blocks)
        self.middle = middle(width)
        self.head = head(width, 2 * config.latent_channels)

    def forward(self, x_B3THW: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        """T = 1 with no slots (first pass), else a multiple of `temporal` with the last pass's.

        Returns moments `[B, 2*latent_channels, F, h, w]` and the slots for the next pass.
        """
        tape = Tape(slots)
        x: Tensor = self.conv1(x_B3THW, tape)
        for block in (*self.downsamples, *self.middle):
            x = block(x, tape)
        norm, _, conv = self.head
        return conv(x, tape, norm=norm), tape.finish()


class Decoder(nn.Module):
    """Latents to frames, one pass over a stretch of a clip; a pure function."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        temporal = config.temporal_downsample[::-1]
        blocks: list[nn.Module] = []
        width = widths[0]
        for level, c in enumerate(widths):
            for _ in range(config.res_blocks + 1):
                blocks.append(Residual(width, c))
                width = c
            if level < len(temporal):
                blocks.append(Upsample(c, temporal[level]))
                width = c // 2
        self.conv1 = CausalConv3d(config.latent_channels, widths[0])
        self.middle = middle(widths[0])
        self.upsamples = nn.Sequential(*blocks)
        self.head = head(width, 3)

    def plan(self, frames: int) -> list[tuple[int, int]]:
        """How many trailing frames each stage must put out for the last `frames` of the picture.

        One (need, rate) per stage: conv1, middle, upsamples, head; rate is the stage's frames per
        latent frame. Follows each convolution's reach backwards from the output, so it also covers
        all that a stream must remember (the last 2 inputs of each convolution).
        """
        blocks = [*self.middle, *self.upsamples]
        needs = [frames, frames + HISTORY]
        for block in reversed(blocks):
            needs.append(block.need_in(needs[-1]))
        rates = [1]
        for block in blocks:
            doubles = isinstance(block, Upsample) and block.time_conv is not None
            rates.append(rates[-1] * 2 if doubles else rates[-1])
        rates.append(rates[-1])
        return list(zip(reversed(needs), rates, strict=True))

    def forward(
        self, z_BCFhw: Tensor, slots: Slots, needs: Sequence[int] | None = None
    ) -> tuple[Tensor, Slots]:
        """F = 1 with no slots (first pass), else any F with the last pass's slots.

        `needs`: trailing frames that each stage puts out in this pass, None for all; a first pass
        takes None. Returns frames `[B,3,T,H,W]`, T possibly 0, and the slots for the next pass.
        """
        tape = Tape(slots)
        needs = needs or [ALL] * (len(self.middle) + len(self.upsamples) + 2)
        x: Tensor = self.conv1(z_BCFhw, tape, needs[0])
        for block, need in zip((*self.middle, *self.upsamples), needs[1:-1], strict=True):
            if x.shape[2] == 0:
                break
            x = block(x, tape, need)
        if x.shape[2] == 0:
            scale = 2 ** sum(isinstance(block, Upsample) for block in self.upsamples)
            size = (scale * z_BCFhw.shape[3], scale * z_BCFhw.shape[4])
            return x.new_empty(x.shape[0], 3, 0, *size), tape.finish()
        norm, _, conv = self.head
        return conv(x, tape, needs[-1], norm), tape.finish()


# ---------------------------------------------------------------- the autoencoder


class WanVAE(nn.Module):
    """The Wan2.1 autoencoder; satisfies `Autoencoder`. Source: the module's docstring."""

    latent_mean: Tensor
    latent_inv_std: Tensor

    def __init__(self, config: WanVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or WanVAEConfig()
        self.spatial = 2 ** len(config.temporal_downsample)
        self.temporal = 2 ** sum(config.temporal_downsample)
        self.latent_channels = c = config.latent_channels
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * c, 2 * c, 1)
        self.conv2 = nn.Conv3d(c, c, 1)
        self.decoder = Decoder(config)
        # Not in the state dict, as the published file has no such keys; on the CPU by name, so
        # that a module built on the meta device is complete once its parameters are assigned.
        # They follow .to(bfloat16), as in the reference.
        mean = torch.tensor(config.latent_mean, device="cpu").view(-1, 1, 1, 1)
        inv_std = 1 / torch.tensor(config.latent_std, device="cpu").view(-1, 1, 1, 1)
        self.register_buffer("latent_mean", mean, persistent=False)
        self.register_buffer("latent_inv_std", inv_std, persistent=False)

    def new_stream(self, batch: int | None = None) -> Stream:
        """A stream at the start of `batch` clips (None: of as many as the first call brings)."""
        return Stream(batch=batch)

    def encode(self, frames: Tensor, stream: Stream | None = None) -> tuple[Tensor, Stream]:
        """Normalised posterior means of a stretch of video.

        frames: floating `[B,3,T,H,W]` in [-1,1]; H and W multiples of `spatial`; T is
        1 + temporal*n at the start of a clip and temporal*n (n >= 1) when `stream` continues one.
        Returns latents `[B,latent_channels,F,h,w]` in the dtype of the weights, and the stream.
        Raises ValueError naming what does not fit.
        """
        stream = stream or self.new_stream()
        frames_B3THW = self._checked("frames", frames, 3, stream.encoder, stream)
        first, rest = (0 if stream.encoder else 1), frames_B3THW.shape[2]
        if frames_B3THW.shape[3] % self.spatial or frames_B3THW.shape[4] % self.spatial:
            raise ValueError(f"frames: height and width must be multiples of {self.spatial}")
        if rest < 1 or rest % self.temporal != first % self.temporal:
            form = f"{self.temporal}*n" if stream.encoder else f"1 + {self.temporal}*n"
            raise ValueError(f"frames: {form} frames fit at this point of the clip, got {rest}")
        slots, moments = stream.encoder, []
        for piece in self._pieces(frames_B3THW, first, self.config.window * self.temporal):
            x, slots = self.encoder(piece, slots)
            moments.append(self.conv1(x))
        mu_BCFhw = torch.cat(moments, dim=2)[:, : self.latent_channels]
        latents = (mu_BCFhw - self.latent_mean) * self.latent_inv_std
        return latents, Stream(slots, stream.decoder, frames_B3THW.shape[0])

    def decode(
        self, latents: Tensor, stream: Stream | None = None, only: Only | None = None
    ) -> tuple[Tensor, Stream]:
        """Frames of a stretch of normalised latents.

        latents: floating `[B,latent_channels,F,h,w]`, F >= 1. Returns frames `[B,3,T,H,W]` in
        [-1,1] in the dtype of the weights, and the stream; T is 1 + temporal*(F-1) at the start of
        a clip, temporal*F later. `only="last"` returns just the last of those frames (T = 1) and
        leaves out every convolution output that neither it nor the stream depends on; frame and
        stream are those of the full decode. Raises ValueError naming what does not fit.
        """
        if only not in (None, "last"):
            raise ValueError(f'only: expected None or "last", got {only!r}')
        stream = stream or self.new_stream()
        z_BCFhw = self._checked("latents", latents, self.latent_channels, stream.decoder, stream)
        if z_BCFhw.shape[2] < 1:
            raise ValueError("latents: at least one latent frame is needed, got none")
        z_BCFhw = self.conv2(z_BCFhw / self.latent_inv_std + self.latent_mean)
        plan = self.decoder.plan(1)
        slots, frames, after = stream.decoder, [], z_BCFhw.shape[2]
        for piece in self._pieces(z_BCFhw, 0 if slots else 1, self.config.window):
            after -= piece.shape[2]
            # What the last frame needs of this pass, less what later passes will bring of it.
            needs = [need - rate * after for need, rate in plan] if only and slots else None
            x, slots = self.decoder(piece, slots, needs)
            frames.append(x)
        frames_B3THW = torch.cat(frames, dim=2) if only is None else frames[-1]
        return frames_B3THW.clamp(-1, 1), Stream(stream.encoder, slots, z_BCFhw.shape[0])

    def channels_last(self) -> WanVAE:
        """Put the weights into channels-last order (faster on recent GPUs); returns the module."""
        for p in self.parameters():
            if p.ndim == 5:
                p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
            elif p.ndim == 4 and p.shape[-1] > 1:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        return self

    @staticmethod
    def _pieces(x: Tensor, first: int, window: int) -> list[Tensor]:
        # The first frame of a clip goes alone: it is treated differently by both resamplers.
        lead = [x[:, :, :first]] if first else []
        return lead + [p for p in x[:, :, first:].split(window, dim=2) if p.shape[2]]

    def _checked(self, name: str, x: Tensor, c: int, slots: Slots, stream: Stream) -> Tensor:
        if x.ndim != 5 or x.shape[1] != c or not x.is_floating_point():
            raise ValueError(
                f"{name}: expected floating [B,{c},T,H,W], got {x.dtype} {list(x.shape)}"
            )
        if stream.batch is not None and stream.batch != x.shape[0]:
            raise ValueError(
                f"{name}: {x.shape[0]} clips, but the stream holds {stream.batch}; "
                "select its rows first"
            )
        x = x.to(self.conv2.weight.dtype)
        for what, of in (("size", lambda t: list(t.shape[3:])), ("dtype", lambda t: t.dtype)):
            if slots and of(slots[0]) != of(x):
                raise ValueError(
                    f"{name}: {what} {of(x)}, but the stream began with {of(slots[0])}; "
                    "start a new stream"
                )
        return x
