"""From a camera's uint8 frame to the towers' uint8 picture, as OpenVLA-OFT evaluates.

Rotate by 180 degrees (LIBERO only), JPEG there and back, Lanczos to the tower's size, the central
90 % of the area stretched back to that size. The steps reproduce TensorFlow's arithmetic, since
the published policies were trained behind it: antialiased Lanczos of radius 3 with half-pixel
centres; `crop_and_resize`, bilinear on a corner-aligned grid; float to uint8 by trunc(x * 255.5).
Facts: openvla/openvla-oft at 213c5ff.

Shape letters: B frames, H W pixels, S side of the result.
"""

import io
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldloop.errors import UserError
from worldloop.kernels.frames import resample, taps_of

Pictures = npt.NDArray[np.uint8]  # [B,H,W,3]
_Floats = npt.NDArray[np.float64]

CROP_AREA = 0.9
JPEG_QUALITY = 95  # TensorFlow's default, with halved chroma


def prepare_frames(
    frames_BHW3: npt.NDArray[Any],
    size: int,
    *,
    rotate: bool = False,
    jpeg: bool = True,
    crop: bool = True,
) -> Pictures:
    """The whole chain: uint8 [B,H,W,3] to uint8 [B,size,size,3].

    rotate: for LIBERO's raw camera, which is upside down; frames rotated already stay as they are.
    jpeg, crop: leave a step out, for policies that were trained without it.
    Raises UserError for other dtypes or shapes.
    """
    frames = np.asarray(frames_BHW3)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise UserError(
            f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [B, H, W, 3]"
        )
    if rotate:
        frames = frames[:, ::-1, ::-1]
    if jpeg:
        frames = np.stack([jpeg_round_trip(frame) for frame in frames])
    if frames.shape[1:3] != (size, size):
        frames = resize_lanczos(frames, size)
    return crop_centre(frames, size) if crop else np.ascontiguousarray(frames)


def prepare_tensor(
    frames_BHW3: Tensor, size: int, *, rotate: bool = False, crop: bool = True
) -> Tensor:
    """`prepare_frames` without the JPEG step for frames on a device, which they never leave.

    uint8 [B,H,W,3] to [B,size,size,3] there, the same pixels. Raises UserError as it does.
    """
    frames = frames_BHW3
    good = frames.dtype == torch.uint8 and frames.dim() == 4 and frames.shape[-1] == 3
    if not good or not frames.numel():
        raise UserError(
            f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [B, H, W, 3]"
        )
    if rotate:
        frames = frames.flip(1, 2)
    if frames.shape[1:3] != (size, size):
        H, W = frames.shape[1:3]
        rows, columns = (_taps(False, n, size, frames.device) for n in (H, W))
        frames = resample(frames, rows, columns, crop=False)
    if crop:
        taps = _taps(True, size, size, frames.device)
        frames = resample(frames, taps, taps, crop=True)
    return frames.contiguous()


@lru_cache(maxsize=16)
def _taps(crop: bool, source: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    matrix = _crop_matrix(source, size, CROP_AREA) if crop else _lanczos_matrix(source, size)
    with torch.inference_mode(False):
        first, weights = taps_of(torch.from_numpy(matrix))
        return first.to(device), weights.to(device)


def jpeg_round_trip(frame_HW3: Pictures) -> Pictures:
    """Encode and decode one picture."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame_HW3)).save(
        buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0"
    )
    return np.array(Image.open(buffer).convert("RGB"))


def resize_lanczos(frames_BHW3: Pictures, size: int) -> Pictures:
    """Antialiased Lanczos (radius 3) to [B,size,size,3], rounded to the nearest and clipped."""
    _, H, W, _ = frames_BHW3.shape
    out = _apply(_lanczos_matrix(H, size), _lanczos_matrix(W, size), frames_BHW3)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def crop_centre(frames_BHW3: Pictures, size: int, area: float = CROP_AREA) -> Pictures:
    """The central `area` of each picture (a square root of it per side), bilinear to `size`."""
    _, H, W, _ = frames_BHW3.shape
    out = _apply(_crop_matrix(H, size, area), _crop_matrix(W, size, area), frames_BHW3 / 255.0)
    return np.trunc(np.clip(out, 0, 1) * 255.5).astype(np.uint8)


def _apply(rows_SH: _Floats, columns_SW: _Floats, frames_BHW3: npt.NDArray[Any]) -> _Floats:
    """A separable linear resize.

    By torch, which keeps to the threads it was told: numpy's would take every core, and wait for
    those that another process has (266 ms instead of 8 for 16 frames, beside one busy process).
    """
    B, H, W, C = frames_BHW3.shape
    rows, columns = torch.from_numpy(rows_SH), torch.from_numpy(columns_SW)
    x = torch.from_numpy(np.ascontiguousarray(frames_BHW3, np.float64))
    half = (rows @ x.reshape(B, H, W * C)).reshape(B, -1, W, C)
    return (columns @ half).numpy()  # [S,W] @ [B,S,W,C]


@lru_cache(maxsize=16)
def _lanczos_matrix(source: int, size: int) -> _Floats:
    scale = source / size
    centres = (np.arange(size) + 0.5) * scale
    # Downscaling widens the kernel, which is what antialiasing means here.
    x = (np.arange(source)[None] + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    return np.asarray(weights / weights.sum(1, keepdims=True))


@lru_cache(maxsize=16)
def _crop_matrix(source: int, size: int, area: float) -> _Floats:
    side = np.sqrt(area)
    start = (1 - side) / 2
    at = (start + side * np.linspace(0, 1, size)) * (source - 1)
    low = np.clip(np.floor(at).astype(int), 0, max(source - 2, 0))
    matrix = np.zeros((size, source))
    rows = np.arange(size)
    matrix[rows, low] = 1 - (at - low)
    matrix[rows, np.minimum(low + 1, source - 1)] += at - low
    return matrix
