"""The networks of a world model with their passes through a back end.

Each is a subclass that shares the parameters and submodules of the network it is made from (state
dict, dtype and devices are the same tensors) and replaces one method. With gradients enabled the
original method runs: back ends are for inference.

Shape letters: B rows (episodes), C channels, F latent frames, H W latent height and width, N tokens
of this call, M history tokens, h heads, K head dimension, T action poses or pixel frames, A pose
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worldloop.engine.backends.base import Calls
from worldloop.engine.dit import KV, DiT, DiTOutput
from worldloop.engine.light_decoder import LightDecoder
from worldloop.engine.light_vae import LightVAE
from worldloop.engine.vae import Only, Stream, WanVAE


class DiTPass(nn.Module):
    """`DiT.forward` as a pure function of positional tensors.

    In: the tensors called `names` (of DiT.forward's arguments), then keys and values of the history
    block by block, last the absolute frame indices [F]. Out: the sample, then with `return_kv` keys
    and values block by block.
    """

    def __init__(self, dit: DiT, names: Sequence[str], history: bool, **options: Any) -> None:
        super().__init__()
        self.dit = dit
        self.names = tuple(names)
        self.history = history
        self.options = options

    def extra_repr(self) -> str:
        return f"{self.names}, history={self.history}, {self.options}"

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(zip(self.names, tensors, strict=False))
        past = tensors[len(self.names) : -1]
        if self.history:
            given["history"] = list(zip(past[::2], past[1::2], strict=True))
        out = DiT.forward(self.dit, **given, first_frame=tensors[-1], **self.options)
        return (out.sample, *(t for pair in out.kv for t in pair))


class _Backed(nn.Module):
    """A network in another's place: with its tensors and facts, and a back end's calls."""

    def __init__(self, plain: Any, calls: Calls) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(plain.__dict__)
        self.calls = calls
        self._plain = (plain,)  # in a tuple, so as not to be a submodule


class BackedDiT(_Backed, DiT):
    """A DiT whose passes go through a back end; `DiT.forward`'s arguments and results."""

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
        """See `DiT.forward`."""
        if torch.is_grad_enabled():
            return super().forward(
                x_BCFHW, timesteps_BF, actions_BTA, condition_mask_B1FHW=condition_mask_B1FHW,
                padding_mask=padding_mask, context=context, skip_null_context=skip_null_context,
                first_frame=first_frame, observed_frames=observed_frames, history=history,
                return_kv=return_kv, checkpoint_blocks=checkpoint_blocks,
            )  # fmt: skip
        # Here, where an error is still one line and not a compiler's.
        self._check(x_BCFHW, timesteps_BF, condition_mask_B1FHW, history, context)
        (B, frames), device = (x_BCFHW.shape[0], x_BCFHW.shape[2]), x_BCFHW.device
        if actions_BTA is not None:
            self._poses(actions_BTA, B, frames, observed_frames)
        named = {
            "x_BCFHW": x_BCFHW,
            "timesteps_BF": timesteps_BF,
            "actions_BTA": actions_BTA,
            "condition_mask_B1FHW": condition_mask_B1FHW,
            "padding_mask": padding_mask,
            "context": context,
        }
        present = {name: tensor for name, tensor in named.items() if tensor is not None}
        for name in ("padding_mask", "context"):  # these may have one row for all
            if name in present:
                present[name] = present[name].expand(B, *present[name].shape[1:])
        options = {
            "observed_frames": observed_frames,
            "return_kv": return_kv,
            "skip_null_context": skip_null_context,
        }
        past = [] if history is None else [t for pair in history for t in pair]
        out = self.calls(
            (tuple(present), history is not None, *options.values()),
            lambda: DiTPass(self._plain[0], list(present), history is not None, **options),
            [*present.values(), *past],
            [_positions(first_frame, frames, device)],
            lasting=len(past),
        )
        kv = list(zip(out[1::2], out[2::2], strict=True))
        return DiTOutput(out[0], kv)


def _positions(first_frame: int | Tensor, frames: int, device: torch.device) -> Tensor:
    if isinstance(first_frame, Tensor):
        return first_frame
    # Filled on the device: a tensor made of host numbers would be copied over.
    return torch.arange(first_frame, first_frame + frames, device=device)


class LightDecode(nn.Module):
    """`LightVAE.decode` as a pure function: latents [B,C,F,H,W] to frames [B,3,T,8H,8W]."""

    def __init__(self, vae: LightVAE, first: bool, only: Only | None) -> None:
        super().__init__()
        self.vae, self.first, self.only = vae, first, only

    def extra_repr(self) -> str:
        return f"first={self.first}, only={self.only}"

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return (self.vae.decode_frames(latents, self.first, self.only),)


class BackedLightVAE(_Backed, LightVAE):
    """A light autoencoder whose `decode` goes through a back end."""

    def decode(
        self, latents: Tensor, stream: Stream | None = None, only: Only | None = None
    ) -> tuple[Tensor, Stream]:
        """See `LightVAE.decode`."""
        if torch.is_grad_enabled():
            return super().decode(latents, stream, only)
        (B, _, _, h, w), scale = latents.shape, self.spatial
        self._check_picture(h * scale, w * scale)
        first = stream is None or not stream.decoder
        vae = self._plain[0]
        (frames,) = self.calls((first, only), lambda: LightDecode(vae, first, only), [latents])
        begun = (latents.new_ones(B, 1, dtype=self.dtype),)
        return frames, Stream(() if stream is None else stream.encoder, begun, B)


class LightDecoderPass(nn.Module):
    """`LightDecoder.decode_frames` as a pure function of latents [B,C,F,H,W] and the one before."""

    def __init__(self, decoder: LightDecoder, only: Only | None) -> None:
        super().__init__()
        self.decoder, self.only = decoder, only

    def extra_repr(self) -> str:
        return f"only={self.only}"

    def forward(self, latents: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
        first = before[0] if before else None
        return (LightDecoder.decode_frames(self.decoder, latents, first, self.only),)


class BackedLightDecoder(_Backed, LightDecoder):
    """A light decoder whose frames come through a back end."""

    def decode_frames(
        self, latents: Tensor, before: Tensor | None, only: Only | None = None
    ) -> Tensor:
        """See `LightDecoder.decode_frames`."""
        if torch.is_grad_enabled():
            return super().decode_frames(latents, before, only)
        self._check_picture(8 * latents.shape[3], 8 * latents.shape[4])
        decoder, tensors = self._plain[0], [latents, *([] if before is None else [before])]
        (frames,) = self.calls(only, lambda: LightDecoderPass(decoder, only), tensors)
        return frames


class WanDecode(nn.Module):
    """`WanVAE.decode` as a pure function.

    In: latents [B,C,F,H,W] and the stream's decoder slots (none at the start of a clip). Out:
    frames [B,3,T,8H,8W] and the new slots.
    """

    def __init__(self, vae: WanVAE, only: Only | None) -> None:
        super().__init__()
        self.vae, self.only = vae, only

    def extra_repr(self) -> str:
        return f"only={self.only}"

    def forward(self, latents: Tensor, *slots: Tensor) -> tuple[Tensor, ...]:
        frames, stream = WanVAE.decode(self.vae, latents, Stream((), slots), self.only)
        return (frames, *stream.decoder)


class BackedWanVAE(_Backed, WanVAE):
    """A Wan autoencoder whose `decode` goes through a back end."""

    def decode(
        self, latents: Tensor, stream: Stream | None = None, only: Only | None = None
    ) -> tuple[Tensor, Stream]:
        """See `WanVAE.decode`."""
        if torch.is_grad_enabled():
            return super().decode(latents, stream, only)
        stream = stream or self.new_stream()
        self._checked("latents", latents, self.latent_channels, stream.decoder, stream)
        vae = self._plain[0]
        frames, *slots = self.calls(only, lambda: WanDecode(vae, only), [latents, *stream.decoder])
        return frames, Stream(stream.encoder, tuple(slots), latents.shape[0])
