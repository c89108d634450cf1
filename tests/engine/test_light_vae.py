"""The light autoencoder's decode: laziness, batches, layout."""

import pytest
import torch

from worldloop.engine.light_vae import LightVAE, LightVAEConfig


@pytest.fixture
def vae(small):
    vae = LightVAE(LightVAEConfig(widths=(8, 12, 16), blocks=(1, 1, 1), picture=(32, 32))).eval()
    small.randomise(vae, 3, 0.6)
    return vae


def latents_of(rows, frames):
    return torch.randn(rows, 16, frames, 4, 4, generator=torch.Generator().manual_seed(2))


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_last_frame_alone_is_the_last_frame(vae):
    latents = latents_of(2, 3)
    whole, stream = vae.decode(latents)
    last, after = vae.decode(latents, only="last")
    same(last, whole[:, :, -1:])
    assert torch.equal(stream.decoder[0], after.decoder[0])
    same(vae.decode(latents, stream, only="last")[0], vae.decode(latents, stream)[0][:, :, -1:])


@torch.no_grad()
def test_the_last_frame_costs_one_latent_frame_and_a_quarter_of_the_last_convolution(vae):
    """Counted products: nothing else is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(frames, only):
        with FlopCounterMode(display=False) as counter:
            vae.decode_frames(latents_of(1, frames), False, only)
        return counter.get_total_flops()

    conv = vae.decoder[-2]
    head = 2 * conv.weight.numel() * 16 * 16
    assert flops(6, None) == 6 * flops(1, None)
    assert flops(6, "last") == flops(1, None) - head * 3 // 4


@torch.no_grad()
def test_rows_and_pieces_decode_as_one_batch(vae):
    latents = latents_of(3, 4)
    whole, _ = vae.decode(latents)
    rows = torch.cat([vae.decode(latents[i : i + 1])[0] for i in range(3)])
    same(rows, whole)
    first, stream = vae.decode(latents[:, :, :2])
    rest, _ = vae.decode(latents[:, :, 2:], stream)
    same(torch.cat([first, rest], 2), whole)


@torch.no_grad()
def test_channels_last_and_bfloat16(vae):
    latents = latents_of(2, 2)
    want = vae.decode(latents)[0]
    vae.channels_last()
    assert vae.decoder[0].weight.is_contiguous(memory_format=torch.channels_last)
    for only in (None, "last"):
        got = vae.decode(latents, only=only)[0]
        same(got, want if only is None else want[:, :, -1:])
    vae.bfloat16()
    frames = vae.decode(latents)[0]
    assert frames.dtype == torch.bfloat16
    assert float((frames.float() - want).norm() / want.norm()) < 0.03
