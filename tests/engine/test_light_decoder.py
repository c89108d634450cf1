"""The light decoder: laziness, streaming, checkpoints, and a world model that decodes with it."""

import dataclasses

import pytest
import torch

from worldloop.engine.backends import wrap_world
from worldloop.engine.light_decoder import (
    PRESETS,
    LightDecoder,
    LightDecoderConfig,
    Redecoded,
)
from worldloop.errors import UserError


def decoder_of(small, channels=16, context=0, picture=None, seed=4):
    sizes = dataclasses.replace(
        PRESETS["test"](), latent_channels=channels, context=context, picture=picture
    )
    decoder = LightDecoder(sizes).eval()
    small.randomise(decoder, seed, 0.5)
    return decoder


def latents_of(rows, frames, channels=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, channels, frames, 4, 4, generator=generator)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("context", [0, 1])
@torch.no_grad()
def test_streaming_and_the_last_frame_equal_one_decode(small, context):
    decoder, latents = decoder_of(small, context=context), latents_of(2, 5)
    whole, _ = decoder.decode(latents)
    assert whole.shape == (2, 3, 17, 32, 32) and whole.abs().max() <= 1
    assert float(whole.std()) > 0.05
    first, stream = decoder.decode(latents[:, :, :1])
    assert first.shape[2] == 1
    middle, stream = decoder.decode(latents[:, :, 1:3], stream)
    last, after = decoder.decode(latents[:, :, 3:], stream, only="last")
    rest, _ = decoder.decode(latents[:, :, 3:], stream)
    same(torch.cat([first, middle, rest], 2), whole)
    same(last, whole[:, :, -1:])
    assert after.batch == 2 and torch.equal(after.decoder[0], latents[:, :, -1:])
    # Rows are apart from each other, and streams select like any other.
    alone, _ = decoder.decode(latents[1:, :, 3:], stream.select([1]))
    same(alone, rest[1:])


@torch.no_grad()
def test_context_sees_the_latent_before_and_no_other(small):
    decoder, latents = decoder_of(small, context=1), latents_of(1, 4)
    plain, _ = decoder.decode(latents)
    moved = latents.clone()
    moved[:, :, 1] += 1
    changed = (decoder.decode(moved)[0] - plain).abs().amax((0, 1, 3, 4)) > 1e-4
    assert changed.tolist() == [False] + [True] * 8 + [False] * 4


@torch.no_grad()
def test_the_background_is_added(small):
    plain = decoder_of(small)
    with_picture = decoder_of(small, picture=(32, 32))
    with_picture.load_state_dict({**plain.state_dict(), "background": torch.full((3, 32, 32), 0.1)})
    latents = 0.1 * latents_of(1, 2)
    a, b = plain.decode(latents)[0], with_picture.decode(latents)[0]
    inside = (a.abs() < 0.8) & (b.abs() < 1)
    same(b[inside], (a + 0.1)[inside])
    same(with_picture.decode(latents, only="last")[0], b[:, :, -1:])
    with pytest.raises(UserError, match="this decoder's background is 32x32"):
        with_picture.decode(torch.zeros(1, 16, 1, 4, 8))


@torch.no_grad()
def test_a_checkpoint_comes_back(small, tmp_path):
    decoder = decoder_of(small, context=1, picture=(32, 32)).channels_last()
    decoder.save(tmp_path / "model")
    again = LightDecoder.load(tmp_path / "model")
    assert again.config == decoder.config and not again.training
    same(again.decode(latents_of(1, 2))[0], decoder.decode(latents_of(1, 2))[0])


def test_bad_configurations_raise(small):
    with pytest.raises(UserError, match="context is 2"):
        LightDecoderConfig(context=2)
    with pytest.raises(UserError, match="latent_channels is 4, the autoencoder's is 16"):
        Redecoded(small.world_of().autoencoder, decoder_of(small, channels=4))


@pytest.mark.parametrize("kind", ["light", "wan"])
def test_a_world_model_decodes_with_it(small, kind):
    """Rewards and latents are untouched, frames are the light decoder's, lazily as well."""
    world = small.world_of(kind, still_tolerance=0.0)
    decoder = decoder_of(small, world.autoencoder.latent_channels, context=int(kind == "wan"))
    arguments = (small.frames_of(3), small.poses_of(3), small.actions_of(3, 16), [0, 1, 2])
    want, latents, _ = small.generate(world, *arguments)
    want_latents = list(latents)
    wrapped = wrap_world(world, "eager", decoder=decoder, channels_last=True)
    wrapped = wrap_world(wrapped, "eager")  # wrapping again keeps the decoder
    got, latents, state = small.generate(wrapped, *arguments)
    for a, b in zip(latents, want_latents, strict=True):
        assert small.relative(a, b) < 1e-5
    with torch.no_grad():
        first, stream = world.autoencoder.encode(
            torch.from_numpy(arguments[0][:, 0]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        )
        clip = torch.cat([first.float(), *want_latents], 2)
        frames = ((decoder.decode(clip)[0] + 1) * 127.5).round().permute(0, 2, 3, 4, 1)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert abs(a.reward - b.reward).max() < 1e-5
        expected = frames[:, 1 + 8 * k : 9 + 8 * k].numpy()
        assert abs(a.frames[:, :, 0].astype(int) - expected).max() <= 1
    lazy, _, _ = small.generate(wrapped, *arguments, decode="policy")
    for a, b in zip(lazy, got, strict=True):
        assert abs(a.frames[:, -1].astype(int) - b.frames[:, -1].astype(int)).max() <= 1
    assert state.fork(2).rows == 6
