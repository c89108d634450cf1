"""Distilling a decoder: targets, learning, resuming. The teacher is the shipped autoencoder."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import worldloop
from worldloop.engine.light_decoder import PRESETS, LightDecoder
from worldloop.engine.vae import PRESETS as WAN_PRESETS
from worldloop.engine.vae import WanVAE
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.training import decoder as distil
from worldloop.training.decoder import DecoderConfig, distillation_loss, targets_of

EPISODES = Path(worldloop.__file__).parent / "data" / "demo-pushcube"


@pytest.fixture
def dataset(tmp_path):
    """The shipped episodes, in a folder where the frame cache may be written."""
    folder = tmp_path / "episodes"
    folder.mkdir()
    for part in ("meta", "data", "videos"):
        (folder / part).symlink_to(EPISODES / part)
    return folder


def config_of(dataset, out, **changes) -> DecoderConfig:
    plain = DecoderConfig(
        data=dataset, out=out, preset="test", steps=4, batch=1, latents=2, held_out=1, limit=3,
        save_every=2, precision="fp32", device="cpu",
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@torch.no_grad()
def test_targets_are_the_teachers_frames_of_the_noisy_latents():
    torch.manual_seed(0)
    teacher = WorldModel.from_pretrained("tiny").autoencoder
    clips = torch.rand(2, 3, 5, 128, 128) * 2 - 1
    clean, frames = targets_of(teacher, clips, 0.0)
    torch.testing.assert_close(clean, teacher.encode(clips)[0])
    torch.testing.assert_close(frames, teacher.decode(clean)[0].clamp(-1, 1))
    noisy, frames = targets_of(teacher, clips, 0.5)
    torch.testing.assert_close(frames, teacher.decode(noisy)[0].clamp(-1, 1))
    sigma = (noisy - clean).flatten(1).std(1)
    assert float(sigma.max()) <= 0.52 and float(sigma.min()) > 0


@pytest.mark.parametrize("kind", ["light", "wan"])
def test_a_student_learns_its_teacher(kind):
    """A causal teacher as well, of which the student sees one latent frame back."""
    torch.manual_seed(0)
    if kind == "light":
        teacher = WorldModel.from_pretrained("tiny").autoencoder
        latents = torch.randn(2, 16, 3, 16, 16)
    else:
        teacher = WanVAE(WAN_PRESETS["tiny"]).eval()
        latents = torch.randn(2, 4, 3, 4, 4)
    with torch.no_grad():
        target = teacher.decode(latents)[0].clamp(-1, 1)
    sizes = dataclasses.replace(
        PRESETS["test"](), latent_channels=latents.shape[1], context=int(kind == "wan")
    )
    student = LightDecoder(sizes)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    errors = []
    for _ in range(40):
        loss, mse = distillation_loss(student, latents, target, 4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(mse.detach()))
    assert errors[-1] < 0.75 * errors[0]
    assert errors[-1] < float(target.var())  # better than the best single colour


def test_a_resumed_run_ends_as_an_unkilled_one(dataset, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    distil.train(config_of(dataset, whole))
    distil.train(config_of(dataset, resumed, steps=2))
    distil.train(config_of(dataset, resumed))
    a, b = (LightDecoder.load(folder / "model") for folder in (whole, resumed))
    assert a.config.picture == (128, 128) and a.config.latent_channels == 16
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        # Only the learning rate of step 2 differs: it falls towards the end of a run.
        assert float((x - y).abs().max()) < 5e-3, name
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[1]["held_out_psnr"] > 10


def test_bad_settings_raise(dataset, tmp_path):
    with pytest.raises(UserError, match="preset is 'huge'"):
        config_of(dataset, tmp_path, preset="huge")
    with pytest.raises(UserError, match="held_out is 3"):
        distil.train(config_of(dataset, tmp_path / "a", held_out=3))
    with pytest.raises(UserError, match="latents is 40: longer"):
        distil.train(config_of(dataset, tmp_path / "b", latents=40))
