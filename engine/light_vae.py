"""The light autoencoder: 2-D convolutions over frames folded 4:1 into channels.

The interface is that of the causal video autoencoder (`vae.Autoencoder`), the kind is that of
TAEHV: four frames become one latent frame of 1/8 the height and width, the first frame of a clip
stands alone (it is folded with itself). Every latent frame is decoded by itself, so streaming is
exact by construction and decoding only the newest frame costs one latent frame. On a CPU it trains
10-60 times faster than the Wan layout.

A fixed camera sees the same background for ever: it is a learned picture here, taken off before
encoding and put back after decoding, so that the network's capacity goes to what moves. There may
be several cameras: the encoder takes off the picture that is nearest to what it sees, the decoder
reads from the latents which one to put back.

Shape letters: B batch, C channels, T pixel frames, F latent frames, H W picture height and width,
N groups of four frames, K cameras.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloop.checkpoint import load_checkpoint, load_into
from worldloop.config import config_from_dict, read_json
from worldloop.engine.vae import Only, Stream
from worldloop.errors import UserError
from worldloop.files import PathLike


@dataclass(frozen=True)
class LightVAEConfig:
    """Sizes of a `LightVAE`. latent_mean, latent_std: per channel, so latents leave normalised."""

    latent_channels: int = 16
    widths: tuple[int, int, int] = (48, 96, 144)  # at 1/2, 1/4 and 1/8 of the picture
    blocks: tuple[int, int, int] = (1, 2, 2)  # residual blocks at each of them
    picture: tuple[int, int] | None = (128, 128)  # size of the learned backgrounds; None: without
    cameras: int = 1  # backgrounds
    latent_mean: tuple[float, ...] = (0.0,) * 16
    latent_std: tuple[float, ...] = (1.0,) * 16

    def __post_init__(self) -> None:
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise UserError(
                    f"LightVAEConfig.{name} has {len(getattr(self, name))} values; "
                    f"latent_channels is {self.latent_channels}"
                )


PRESETS: dict[str, Callable[[], LightVAEConfig]] = {
    "tiny": LightVAEConfig,
    "test": lambda: LightVAEConfig(widths=(8, 8, 8), blocks=(1, 1, 1), picture=None),
}


class ResBlock(nn.Module):
    """conv, ReLU, conv, plus the input; the last convolution starts at zero (identity)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


def _level(width: int, blocks: int) -> list[nn.Module]:
    return [ResBlock(width) for _ in range(blocks)]


class LightVAE(nn.Module):
    """Encoder and decoder; latents are normalised with the config's statistics."""

    temporal = 4
    spatial = 8

    def __init__(self, config: LightVAEConfig) -> None:
        super().__init__()
        self.config = config
        w2, w4, w8 = config.widths
        n2, n4, n8 = config.blocks
        C, folded = config.latent_channels, 3 * self.temporal
        if config.picture is not None:
            self.background = nn.Parameter(torch.zeros(config.cameras, 3, *config.picture))
        if config.picture is not None and config.cameras > 1:
            self.camera = nn.Linear(C, config.cameras)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(folded * 4, w2, 3, padding=1),
            nn.ReLU(),
            *_level(w2, n2),
            nn.Conv2d(w2, w4, 3, stride=2, padding=1),
            nn.ReLU(),
            *_level(w4, n4),
            nn.Conv2d(w4, w8, 3, stride=2, padding=1),
            nn.ReLU(),
            *_level(w8, n8),
            nn.Conv2d(w8, C, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(C, w8, 3, padding=1),
            nn.ReLU(),
            *_level(w8, n8),
            nn.Conv2d(w8, w4 * 4, 3, padding=1),
            nn.PixelShuffle(2),
            nn.ReLU(),
            *_level(w4, n4),
            nn.Conv2d(w4, w2 * 4, 3, padding=1),
            nn.PixelShuffle(2),
            nn.ReLU(),
            *_level(w2, n2),
            nn.Conv2d(w2, folded * 4, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self._statistics: Tensor
        # On the CPU by name: a module built on the meta device is complete once its parameters
        # are assigned.
        statistics = torch.tensor([config.latent_mean, config.latent_std], device="cpu")
        self.register_buffer("_statistics", statistics, persistent=False)

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder[0].weight.dtype  # type: ignore[return-value]

    def new_stream(self, batch: int | None = None) -> Stream:
        return Stream(batch=batch)

    def encode_groups(self, groups_NCHW: Tensor) -> Tensor:
        """Folded frames [N,4*3,H,W] (frame-major) to raw latents [N,C,H/8,W/8]."""
        if self.config.picture is not None:
            background: Tensor = self.background
            if self.config.cameras > 1:
                background = background[self.nearest(groups_NCHW)]
            groups_NCHW = groups_NCHW - background.repeat(1, self.temporal, 1, 1)
        latents: Tensor = self.encoder(groups_NCHW)
        return latents

    def nearest(self, groups_NCHW: Tensor) -> Tensor:
        """[N] the camera whose background is nearest to the last frame of each group."""
        last = groups_NCHW[:, None, -3:, ::4, ::4]  # coarse is enough to tell cameras apart
        return (last - self.background.detach()[..., ::4, ::4]).abs().mean((2, 3, 4)).argmin(1)

    def backgrounds_of(self, latents_NCHW: Tensor) -> Tensor:
        """[N,3,H,W] what the decoder puts back, a mixture where the camera is not certain."""
        if self.config.cameras == 1:
            return self.background
        share_NK = self.camera_logits(latents_NCHW).softmax(1)
        return (share_NK @ self.background.flatten(1)).unflatten(1, self.background.shape[1:])

    def camera_logits(self, latents_NCHW: Tensor) -> Tensor:
        """[N,K] which camera made these latents."""
        logits: Tensor = self.camera(latents_NCHW.mean((2, 3)))
        return logits

    def decode_groups(self, latents_NCHW: Tensor, only: Only | None = None) -> Tensor:
        """Raw latents [N,C,h,w] to folded frames [N,4*3,8h,8w], or the last of each [N,3,8h,8w]."""
        frames = self.temporal
        if only == "last":
            conv = self.decoder[-2]
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            x = self.decoder[:-2](latents_NCHW)
            # Of the last convolution, only the outputs that become the last frame.
            made = conv.out_channels // frames
            groups = F.conv2d(x, conv.weight[-made:], conv.bias[-made:], padding=1)
            groups, frames = F.pixel_shuffle(groups, 2), 1
        else:
            groups = self.decoder(latents_NCHW)
        if self.config.picture is not None:
            groups = groups + self.backgrounds_of(latents_NCHW).repeat(1, frames, 1, 1)
        return groups

    def encode(self, frames: Tensor, stream: Stream | None = None) -> tuple[Tensor, Stream]:
        """Frames [B,3,T,H,W] in [-1,1] to normalised latents [B,C,F,H/8,W/8] and the stream.

        T is 1 + 4n at the start of a clip, 4n afterwards.
        """
        B, C, T, H, W = frames.shape
        first = stream is None or not stream.encoder
        self._check_picture(H, W)
        frames = frames.to(self.dtype)
        if (T - first) % self.temporal or T == 0:
            raise UserError(
                f"frames: T is {T}; expected {'1 + ' if first else ''}a multiple of {self.temporal}"
            )
        if first:
            frames = torch.cat([frames[:, :, :1].expand(-1, -1, 3, -1, -1), frames], 2)
        groups = frames.unflatten(2, (-1, self.temporal)).permute(0, 2, 3, 1, 4, 5)
        latents = self.encode_groups(groups.reshape(-1, self.temporal * C, H, W))
        mean, std = self._statistics[:, :, None, None]
        latents = ((latents - mean) / std).unflatten(0, (B, -1)).transpose(1, 2)
        begun = (frames.new_ones(B, 1),)
        return latents, Stream(begun, () if stream is None else stream.decoder, B)

    def decode(
        self, latents: Tensor, stream: Stream | None = None, only: Only | None = None
    ) -> tuple[Tensor, Stream]:
        """Normalised latents [B,C,F,h,w] to frames [B,3,T,8h,8w] and the stream.

        The first latent of a clip gives one frame, every other four. ``only="last"`` decodes the
        newest frame alone, [B,3,1,8h,8w].
        """
        first = stream is None or not stream.decoder
        frames = self.decode_frames(latents, first, only)
        begun = (latents.new_ones(latents.shape[0], 1, dtype=self.dtype),)
        return frames, Stream(() if stream is None else stream.encoder, begun, latents.shape[0])

    def decode_frames(self, latents: Tensor, first: bool, only: Only | None = None) -> Tensor:
        """`decode` without its stream, of which it needs only whether a clip begins here."""
        B, _, _, h, w = latents.shape
        self._check_picture(h * self.spatial, w * self.spatial)
        latents = latents.to(self.dtype)
        kept = latents[:, :, -1:] if only == "last" else latents
        mean, std = self._statistics[:, None, :, None, None]
        raw = kept.transpose(1, 2).flatten(0, 1) * std + mean
        groups = self.decode_groups(raw.flatten(0, -4), only)
        if only == "last":
            return groups.unsqueeze(2)
        frames = groups.unflatten(1, (self.temporal, 3)).unflatten(0, (B, -1))
        frames = frames.flatten(1, 2).transpose(1, 2)
        return frames[:, :, self.temporal - 1 :] if first else frames

    def channels_last(self) -> LightVAE:
        """Put the weights into channels-last order (faster on CPUs and GPUs); returns the module.

        Convolutions then work in that order throughout, whatever the order of the input.
        """
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _check_picture(self, height: int, width: int) -> None:
        picture = self.config.picture
        if picture is not None and (height, width) != tuple(picture):
            raise UserError(
                f"frames are {height}x{width}; this autoencoder's background is "
                f"{picture[0]}x{picture[1]}"
            )
        if height % self.spatial or width % self.spatial:
            raise UserError(f"frames are {height}x{width}; sides must be multiples of 8")


def load_autoencoder(folder: PathLike) -> LightVAE:
    """A checkpoint folder of `worldloop train autoencoder`, or the one inside a world model's.

    Raises UserError naming the folder.
    """
    whole = read_json(Path(folder) / "config.json").get("kind") == "world_model"
    checkpoint = load_checkpoint(folder, kind="world_model" if whole else "light_vae")
    values = checkpoint.config["autoencoder"] if whole else checkpoint.config
    config = config_from_dict(LightVAEConfig, values, str(folder))
    part = "autoencoder" if whole else "model"
    if part not in checkpoint.parts:
        raise UserError(f"{folder}: has no 'model' weights; it is not a whole autoencoder")
    model = LightVAE(config)
    load_into(model, checkpoint.parts[part], str(folder))
    return model.eval()
