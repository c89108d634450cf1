"""A small distilled decoder for the latents of another autoencoder.

Trained to give what the autoencoder's own decoder gives (`worldloop train decoder`), several times
cheaper. Rewards come from latents and do not change; the pictures that the policy sees do, so it
is an option, with its agreement figures in docs/backends.md.

2-D convolutions over one latent frame, from which four frames come out, folded into channels (as
in `light_vae`; the kind is TAEHV's). A causal video autoencoder's frames depend on earlier latents
too: with `context` 1 the decoder sees the latent frame before as well.

Shape letters: B batch, C channels, T pixel frames, F latent frames, H W picture height and width;
h, w those of the latent picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloop.checkpoint import load_checkpoint, load_into, save_checkpoint
from worldloop.config import config_from_dict, config_to_dict
from worldloop.engine.light_vae import LightVAE, ResBlock
from worldloop.engine.vae import Only, Stream, WanVAE
from worldloop.errors import UserError
from worldloop.files import PathLike

KIND = "light_decoder"


@dataclass(frozen=True)
class LightDecoderConfig:
    """Sizes of a `LightDecoder`."""

    latent_channels: int = 16
    widths: tuple[int, int, int] = (16, 48, 96)  # at 1/2, 1/4 and 1/8 of the picture
    blocks: tuple[int, int, int] = (0, 1, 2)  # residual blocks at each of them
    picture: tuple[int, int] | None = None  # size of a learned background; None: without
    context: int = 0
    """Earlier latent frames that a latent frame is decoded with: 0, or 1 for a causal teacher."""

    def __post_init__(self) -> None:
        if self.context not in (0, 1):
            raise UserError(f"LightDecoderConfig.context is {self.context}; expected 0 or 1")
        if min(self.widths) < 1 or min(self.blocks) < 0:
            raise UserError("LightDecoderConfig: widths must be positive, blocks 0 or more")


PRESETS: dict[str, Callable[[], LightDecoderConfig]] = {
    "tiny": LightDecoderConfig,
    "wan": lambda: LightDecoderConfig(widths=(64, 128, 256), blocks=(2, 3, 3), context=1),
    "test": lambda: LightDecoderConfig(widths=(8, 8, 8), blocks=(1, 1, 1)),
}


class LightDecoder(nn.Module):
    """Normalised latents to frames; the decoding half of `vae.Autoencoder`."""

    temporal = 4
    spatial = 8

    def __init__(self, config: LightDecoderConfig) -> None:
        super().__init__()
        self.config = config
        (w2, w4, w8), (n2, n4, n8) = config.widths, config.blocks
        if config.picture is not None:
            self.background = nn.Parameter(torch.zeros(3, *config.picture))
        seen = config.latent_channels * (1 + config.context)
        self.body = nn.Sequential(
            nn.Conv2d(seen, w8, 3, padding=1), nn.ReLU(), *(ResBlock(w8) for _ in range(n8)),
            nn.Conv2d(w8, w4 * 4, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(),
            *(ResBlock(w4) for _ in range(n4)),
            nn.Conv2d(w4, w2 * 4, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(),
            *(ResBlock(w2) for _ in range(n2)),
        )  # fmt: skip
        self.head = nn.Conv2d(w2, 4 * 3 * self.temporal, 3, padding=1)

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def decode(
        self, latents: Tensor, stream: Stream | None = None, only: Only | None = None
    ) -> tuple[Tensor, Stream]:
        """Normalised latents [B,C,F,h,w] to frames [B,3,T,8h,8w] and the stream.

        T is 1 + 4(F-1) at the start of a clip, else 4F; ``only="last"`` gives the newest frame
        alone. The stream's decoder part is the last latent frame.
        """
        slots = () if stream is None else stream.decoder
        frames = self.decode_frames(latents, slots[0] if slots else None, only)
        # clone: a view would keep the whole chunk in memory.
        last = (latents[:, :, -1:].to(self.dtype).clone(),)
        return frames, Stream(() if stream is None else stream.encoder, last, latents.shape[0])

    def decode_frames(
        self, latents: Tensor, before: Tensor | None, only: Only | None = None
    ) -> Tensor:
        """`decode` as a pure function; before: the latent frame [B,C,1,h,w] before these, or None.

        A clip's first latent frame is taken for its own predecessor.
        """
        B, _, _, h, w = latents.shape
        self._check_picture(8 * h, 8 * w)
        latents = latents.to(self.dtype)
        seen = latents
        if self.config.context:
            earlier = latents[:, :, :1] if before is None else before.to(self.dtype)
            seen = torch.cat([latents, torch.cat([earlier, latents[:, :, :-1]], 2)], 1)
        if only == "last":
            # Of the last convolution, only the outputs that become the last frame.
            made = self.head.out_channels // self.temporal
            assert self.head.bias is not None
            weight, bias = self.head.weight[-made:], self.head.bias[-made:]
            groups = F.conv2d(self.body(seen[:, :, -1]), weight, bias, padding=1)
            return self._pictures(groups, 1).unsqueeze(2).clamp(-1, 1)
        groups = self.head(self.body(seen.transpose(1, 2).flatten(0, 1)))
        pictures = self._pictures(groups, self.temporal).unflatten(1, (self.temporal, 3))
        frames = pictures.unflatten(0, (B, -1)).flatten(1, 2).transpose(1, 2).clamp(-1, 1)
        return frames[:, :, self.temporal - 1 :] if before is None else frames

    def _pictures(self, groups: Tensor, frames: int) -> Tensor:
        pictures = F.pixel_shuffle(groups, 2)
        if self.config.picture is not None:
            pictures = pictures + self.background.repeat(frames, 1, 1)
        return pictures

    def _check_picture(self, height: int, width: int) -> None:
        picture = self.config.picture
        if picture is not None and (height, width) != tuple(picture):
            raise UserError(
                f"latents are of {height}x{width} frames; this decoder's background is "
                f"{picture[0]}x{picture[1]}"
            )

    def channels_last(self) -> LightDecoder:
        """Put the weights into channels-last order (faster); returns the module."""
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def save(self, folder: PathLike) -> None:
        """Write a checkpoint folder."""
        save_checkpoint(folder, self.state_dict(), config_to_dict(self.config), kind=KIND)

    @classmethod
    def load(cls, folder: PathLike) -> LightDecoder:
        """Read a checkpoint folder, strictly. Raises UserError naming the folder."""
        checkpoint = load_checkpoint(folder, kind=KIND)
        if "model" not in checkpoint.parts:
            raise UserError(f"{folder}: has no 'model' weights; it is not a whole decoder")
        model = cls(config_from_dict(LightDecoderConfig, checkpoint.config, str(folder)))
        load_into(model, checkpoint.parts["model"], str(folder))
        return model.eval()


class Redecoded(nn.Module):
    """An autoencoder whose decoding is a light decoder's; satisfies `vae.Autoencoder`.

    Raises UserError where the two do not fit.
    """

    def __init__(self, teacher: LightVAE | WanVAE, decoder: LightDecoder) -> None:
        super().__init__()
        for name in ("latent_channels", "spatial", "temporal"):
            if getattr(teacher, name) != getattr(decoder, name):
                raise UserError(
                    f"decoder: {name} is {getattr(decoder, name)}, the autoencoder's is "
                    f"{getattr(teacher, name)}"
                )
        self.teacher, self.decoder = teacher, decoder
        self.spatial, self.temporal = decoder.spatial, decoder.temporal

    @property
    def latent_channels(self) -> int:
        return self.decoder.latent_channels

    def new_stream(self, batch: int | None = None) -> Stream:
        return Stream(batch=batch)

    def encode(self, frames: Tensor, stream: Stream | None = None) -> tuple[Tensor, Stream]:
        """See `vae.Autoencoder`: the teacher's."""
        return self.teacher.encode(frames, stream)

    def decode(
        self, latents: Tensor, stream: Stream | None = None, only: Only | None = None
    ) -> tuple[Tensor, Stream]:
        """See `vae.Autoencoder`: the light decoder's."""
        return self.decoder.decode(latents, stream, only)
