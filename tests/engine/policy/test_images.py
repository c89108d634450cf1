"""The policy's image chain against its definition written out in loops, and against Pillow."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import get_sampling

from worldloop.engine.policy.images import (
    crop_centre,
    jpeg_round_trip,
    prepare_frames,
    prepare_tensor,
    resize_lanczos,
)
from worldloop.errors import UserError

SIDE = math.sqrt(0.9)


def noise(rows: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width, 3), np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """One picture [1,H,W,3] of slow waves, none of which reaches black or white."""
    y, x = np.mgrid[0:height, 0:width] / 16.0
    waves = [np.sin(x + y), np.cos(2 * x - y), np.sin(x) * np.cos(y)]
    return (128 + 100 * np.stack(waves, -1)).astype(np.uint8)[None]


# ---------------------------------------------------------------- in loops, from the definitions


def lanczos3(x: float) -> float:
    if x == 0:
        return 1.0
    if abs(x) >= 3:
        return 0.0
    return 3 * math.sin(math.pi * x) * math.sin(math.pi * x / 3) / (math.pi * x) ** 2


def naive_lanczos(picture: np.ndarray, size: int) -> np.ndarray:
    """Every output pixel a weighted mean over all input pixels, before rounding."""
    H, W, _ = picture.shape
    out = np.zeros((size, size, 3))
    step_y, step_x = H / size, W / size
    for i in range(size):
        for j in range(size):
            total = 0.0
            for y in range(H):
                for x in range(W):
                    weight = lanczos3((y + 0.5 - (i + 0.5) * step_y) / max(step_y, 1)) * lanczos3(
                        (x + 0.5 - (j + 0.5) * step_x) / max(step_x, 1)
                    )
                    total += weight
                    out[i, j] += weight * picture[y, x]
            out[i, j] /= total
    return out


def naive_crop(picture: np.ndarray, size: int) -> np.ndarray:
    """tf.image.crop_and_resize on the central box, then the cast to uint8."""
    H, W, _ = picture.shape
    first = (1 - SIDE) / 2
    last = first + SIDE
    out = np.zeros((size, size, 3), np.uint8)
    for i in range(size):
        y = first * (H - 1) + i * (last - first) * (H - 1) / (size - 1)
        for j in range(size):
            x = first * (W - 1) + j * (last - first) * (W - 1) / (size - 1)
            top, left = math.floor(y), math.floor(x)
            bottom, right = math.ceil(y), math.ceil(x)
            for c in range(3):
                a, b = picture[top, left, c] / 255, picture[top, right, c] / 255
                d, e = picture[bottom, left, c] / 255, picture[bottom, right, c] / 255
                upper, lower = a + (b - a) * (x - left), d + (e - d) * (x - left)
                value = upper + (lower - upper) * (y - top)
                out[i, j, c] = int(min(max(value, 0), 1) * 255.5)
    return out


def rounded(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def assert_levels(got: np.ndarray, expected: np.ndarray, share: float = 0.001) -> None:
    """Equal but for single levels at a `share` of the values, where a sum lies on a boundary."""
    assert got.dtype == expected.dtype == np.uint8 and got.shape == expected.shape
    difference = np.abs(got.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= share


# ---------------------------------------------------------------- Lanczos


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(16, 16, 14), (16, 13, 7), (9, 21, 8), (6, 5, 11), (8, 8, 8)],
    ids=["as_published", "half", "wide", "up", "same"],
)
def test_lanczos_is_the_sum_written_out(height, width, size):
    frames = noise(2, height, width)
    got = resize_lanczos(frames, size)
    for row in range(2):
        assert_levels(got[row], rounded(naive_lanczos(frames[row], size)))


@pytest.mark.parametrize("size", [224, 100, 320])
def test_lanczos_against_pillow_in_floats(size):
    frames = noise(1, 256, 240)
    theirs = [
        Image.fromarray(frames[0, ..., c].astype(np.float32)).resize((size, size), Image.LANCZOS)
        for c in range(3)
    ]
    assert_levels(resize_lanczos(frames, size)[0], rounded(np.stack(theirs, -1)))


def test_lanczos_against_pillow_in_bytes():
    """Pillow rounds and clips between its two passes; without saturation that is one level
    here and there (at 21 % of these values)."""
    frames = smooth(256, 256)
    theirs = np.asarray(Image.fromarray(frames[0]).resize((224, 224), Image.LANCZOS))
    assert_levels(resize_lanczos(frames, 224)[0], theirs, share=0.25)


def test_a_flat_picture_stays_flat():
    for level in (0, 1, 127, 254, 255):
        flat = np.full((1, 37, 41, 3), level, np.uint8)
        assert (resize_lanczos(flat, 29) == level).all()
        assert (crop_centre(flat, 29) == level).all()


# ---------------------------------------------------------------- the crop


@pytest.mark.parametrize(("height", "width", "size"), [(28, 28, 28), (17, 30, 12), (8, 9, 20)])
def test_crop_is_the_interpolation_written_out(height, width, size):
    frames = noise(2, height, width, seed=1)
    got = crop_centre(frames, size)
    for row in range(2):
        assert_levels(got[row], naive_crop(frames[row], size))


def test_crop_takes_nine_tenths_of_the_area_from_the_middle():
    """A ramp of one level a pixel: the values are the positions that were read."""
    ramp = np.broadcast_to(np.arange(201, dtype=np.uint8)[:, None, None], (201, 201, 3))
    rows = crop_centre(ramp[None], 101)[0, :, 0, 0]
    columns = crop_centre(ramp.swapaxes(0, 1)[None], 101)[0, 0, :, 0]
    np.testing.assert_array_equal(rows, columns)
    first, last = 200 * (1 - SIDE) / 2, 200 * (1 + SIDE) / 2
    # The cast is trunc(x * 255.5 / 255) of the level x.
    expected = [int((first + (last - first) * i / 100) * 255.5 / 255) for i in (0, 50, 100)]
    np.testing.assert_array_equal(rows[[0, 50, 100]], expected)


def test_the_whole_area_is_no_crop():
    frames = noise(1, 24, 24)
    np.testing.assert_array_equal(crop_centre(frames, 24, area=1.0), frames)


# ---------------------------------------------------------------- JPEG


def test_jpeg_is_of_quality_95_with_halved_chroma(monkeypatch):
    files = []
    save = Image.Image.save

    def spy(self, target, *args, **options):
        save(self, target, *args, **options)
        files.append(target)

    monkeypatch.setattr(Image.Image, "save", spy)
    decoded = jpeg_round_trip(smooth(64, 48)[0])
    file = Image.open(files[0])
    assert file.format == "JPEG" and get_sampling(file) == 2  # 4:2:0
    # Annex K's luminance steps for the lowest frequencies, scaled as libjpeg does for quality 95.
    assert file.quantization[0][0] == (16 * 10 + 50) // 100
    assert max(file.quantization[0]) == (121 * 10 + 50) // 100
    np.testing.assert_array_equal(decoded, np.asarray(file))


def test_jpeg_keeps_shape_and_costs_little():
    frame = smooth(50, 70)[0]
    out = jpeg_round_trip(frame)
    assert out.shape == frame.shape and out.dtype == np.uint8
    error = out.astype(float) - frame
    assert 0 < np.sqrt((error**2).mean()) < 3
    np.testing.assert_array_equal(out, jpeg_round_trip(frame))


def test_jpeg_loses_fine_colour_but_not_fine_light():
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = (200, 60, 60)
    stripes[:, 1::2] = (60, 131, 60)  # about as light as the other stripe
    colour = jpeg_round_trip(stripes)
    assert np.ptp(stripes[..., 0]) == 140 and np.ptp(colour[8:24, 8:24, 0].astype(int)) < 20
    grey = np.repeat(np.where(np.arange(32) % 2, 200, 60).astype(np.uint8)[None, :, None], 32, 0)
    light = jpeg_round_trip(np.repeat(grey, 3, 2))
    assert np.ptp(light[8:24, 8:24, 0].astype(int)) > 120


# ---------------------------------------------------------------- the chain


def test_the_chain_in_its_order():
    frames = noise(2, 32, 32, seed=2)
    before = frames.copy()
    got = prepare_frames(frames, 28, rotate=True)
    np.testing.assert_array_equal(frames, before)
    assert got.flags.c_contiguous and got.shape == (2, 28, 28, 3)
    for row in range(2):
        upright = np.rot90(frames[row], 2)
        small = rounded(naive_lanczos(jpeg_round_trip(upright), 28))
        # One level more or less before the crop may be one more after it.
        assert_levels(got[row], naive_crop(small, 28), share=0.005)


def test_steps_can_be_left_out():
    frames = noise(2, 24, 24, seed=3)
    off = {"jpeg": False, "crop": False}
    np.testing.assert_array_equal(prepare_frames(frames, 24, **off), frames)
    turned = prepare_frames(frames, 24, rotate=True, **off)
    np.testing.assert_array_equal(turned, np.rot90(frames, 2, (1, 2)))
    assert turned.flags.c_contiguous
    jpeg = prepare_frames(frames, 24, crop=False)
    np.testing.assert_array_equal(jpeg[1], jpeg_round_trip(frames[1]))
    cropped = prepare_frames(frames, 24, jpeg=False)
    np.testing.assert_array_equal(cropped, crop_centre(frames, 24))
    np.testing.assert_array_equal(prepare_frames(frames, 24), crop_centre(jpeg, 24))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, 64), (48, 64, 28), (20, 24, 32)])
@pytest.mark.parametrize(("rotate", "crop"), [(False, True), (True, True), (True, False)])
def test_frames_on_a_device_become_the_same_pixels(device, height, width, size, rotate, crop):
    frames = noise(3, height, width, seed=5)
    here = prepare_frames(frames, size, rotate=rotate, jpeg=False, crop=crop)
    there = prepare_tensor(torch.from_numpy(frames).to(device), size, rotate=rotate, crop=crop)
    assert there.device.type == device and there.is_contiguous()
    np.testing.assert_array_equal(there.cpu().numpy(), here)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_published_sizes_become_the_same_pixels(device):
    """Every level of every pixel, from the world model's size to the 7b policy's."""
    frames = np.concatenate([noise(2, 256, 256, seed=6), smooth(256, 256)])
    here = prepare_frames(frames, 224, jpeg=False)
    there = prepare_tensor(torch.from_numpy(frames).to(device), 224)
    np.testing.assert_array_equal(there.cpu().numpy(), here)


@pytest.mark.parametrize("shape", [(2, 8, 8), (0, 8, 8, 3), (1, 3, 8, 8)])
def test_tensors_that_are_no_frames_are_refused(shape):
    with pytest.raises(UserError, match="expected uint8"):
        prepare_tensor(torch.zeros(shape, dtype=torch.uint8), 8)


def test_rows_do_not_mix():
    frames = noise(3, 40, 40, seed=4)
    together = prepare_frames(frames, 32)
    for row in range(3):
        np.testing.assert_array_equal(prepare_frames(frames[row : row + 1], 32)[0], together[row])


def test_oblong_frames_become_square():
    assert prepare_frames(noise(1, 30, 50), 16).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), r"frames are float32 \[1, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), r"uint8 \[8, 8, 3\]; expected uint8 \[B, H, W, 3\]"),
        (np.zeros((1, 8, 8, 4), np.uint8), r"\[1, 8, 8, 4\]"),
        (np.zeros((1, 3, 8, 8), np.uint8), r"\[1, 3, 8, 8\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"\[0, 8, 8, 3\]"),
    ],
)
def test_what_is_no_frame_is_refused(frames, message):
    with pytest.raises(UserError, match=message):
        prepare_frames(frames, 8)
