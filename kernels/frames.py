"""Frames between the decoder and the policy's towers, on the device all the way.

    to_uint8    decoder output in [-1,1] to uint8 pixels, channels last
    resample    a separable resize of uint8 pixels by given taps: Lanczos, or the centre crop
    normalise   uint8 pictures to the towers' input, several means and deviations side by side

The numbers are those of the host's chain (engine/policy/images.py, fp64), to the last pixel: sums
are in fp64 and rounding is to the nearest even, as numpy's.

Shape letters: B frames or rows, T frames of a clip, H W pixels, S side of the result, K taps.
"""

import torch
from torch import Tensor

from worldloop.kernels.op import Case, Op, define, require, tl, triton, uses_triton

BLOCK = 1024


# Decoder to pixels ------------------------------------------------------------------------------


def reference_to_uint8(pixels_B3THW: Tensor, rounded: bool) -> Tensor:
    scaled = (pixels_B3THW.float() + 1) * 127.5
    if rounded:
        scaled = scaled.round_()
    return scaled.clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


@triton.jit
def _to_uint8_kernel(
    x_ptr, out_ptr, size, frame, frames, x_b, x_c, x_t, x_p,
    ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    c, pixel = i % 3, i // 3
    p, t, b = pixel % frame, pixel // frame % frames, pixel // frame // frames
    x = tl.load(x_ptr + b * x_b + c * x_c + t * x_t + p * x_p, mask=inside, other=0.0)
    y = (x.to(tl.float32) + 1.0) * 127.5
    if ROUNDED:  # adding 1.5 * 2^23 leaves no room for a fraction: to the nearest, ties to even
        y = (y + 12582912.0) - 12582912.0
    y = tl.minimum(tl.maximum(y, 0.0), 255.0)
    tl.store(out_ptr + i, y.to(tl.uint8), mask=inside)


def launch_to_uint8(pixels_B3THW: Tensor, rounded: bool) -> Tensor:
    B, C, T, H, W = pixels_B3THW.shape
    require(C == 3, "to_uint8", f"pixels have {C} channels; expected 3")
    x = pixels_B3THW
    if W == 1 or x.stride(3) != W * x.stride(4):  # a single column may have any stride
        x = x.contiguous(memory_format=torch.contiguous_format).view(B, C, T, H, W)
    out = torch.empty((B, T, H, W, 3), dtype=torch.uint8, device=x.device)
    _to_uint8_kernel[(triton.cdiv(out.numel(), BLOCK),)](
        x, out, out.numel(), H * W, T, x.stride(0), x.stride(1), x.stride(2), x.stride(4),
        ROUNDED=rounded, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _fake_uint8(pixels_B3THW: Tensor, rounded: bool) -> Tensor:
    B, _, T, H, W = pixels_B3THW.shape
    return torch.empty((B, T, H, W, 3), dtype=torch.uint8, device=pixels_B3THW.device)


_to_uint8 = define("to_uint8", launch_to_uint8, reference_to_uint8, _fake_uint8)


def to_uint8(pixels_B3THW: Tensor, rounded: bool = True) -> Tensor:
    """Floating pixels in [-1,1] to uint8 [B,T,H,W,3], to the nearest or (False) cut off."""
    if uses_triton(pixels_B3THW):
        out: Tensor = _to_uint8(pixels_B3THW, rounded)
        return out
    return reference_to_uint8(pixels_B3THW, rounded)


# Resize -----------------------------------------------------------------------------------------


def taps_of(matrix_SH: Tensor) -> tuple[Tensor, Tensor]:
    """A banded resize matrix [S,H] as first indices [S] int32 and weights [S,K] fp64."""
    S, H = matrix_SH.shape
    used = matrix_SH != 0
    first = used.int().argmax(1)
    last = H - 1 - used.flip(1).int().argmax(1)
    K = int((last - first).max()) + 1
    first = first.clamp(max=H - K)
    columns = first[:, None] + torch.arange(K, device=matrix_SH.device)
    return first.int(), matrix_SH.double().gather(1, columns).contiguous()


def _matrix(first_S: Tensor, weights_SK: Tensor, size: int) -> Tensor:
    S, K = weights_SK.shape
    columns = first_S.long()[:, None] + torch.arange(K, device=first_S.device)
    return weights_SK.new_zeros(S, size).scatter_(1, columns, weights_SK)


def reference_resample(
    frames_BHW3: Tensor,
    row_first_S: Tensor,
    row_weights_SK: Tensor,
    column_first_S: Tensor,
    column_weights_SK: Tensor,
    crop: bool,
) -> Tensor:
    B, H, W, _ = frames_BHW3.shape
    rows = _matrix(row_first_S, row_weights_SK, H)
    columns = _matrix(column_first_S, column_weights_SK, W)
    x = frames_BHW3.double()
    half = (rows @ (x / 255.0 if crop else x).flatten(2)).unflatten(2, (W, 3))
    out = columns @ half
    if crop:
        return (out.clamp(0, 1) * 255.5).trunc().to(torch.uint8)
    return out.round().clamp(0, 255).to(torch.uint8)


@triton.jit
def _resample_kernel(
    x_ptr, row_first_ptr, row_weights_ptr, column_first_ptr, column_weights_ptr, out_ptr,
    height, width, out_height, out_width, row_taps, column_taps,
    CROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK values (pixel and colour) of one row of the result: program (part, row, frame)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    inside = i < out_width * 3
    x, c = i // 3, i % 3
    row = tl.load(row_first_ptr + y)
    column = tl.load(column_first_ptr + x, mask=inside, other=0)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for l in range(column_taps):
        w = tl.load(column_weights_ptr + x * column_taps + l, mask=inside, other=0.0)
        half = tl.zeros((BLOCK,), dtype=tl.float64)
        for k in range(row_taps):
            at = ((b * height + row + k) * width + column + l) * 3 + c
            value = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float64)
            if CROP:
                value = value / 255.0
            half += tl.load(row_weights_ptr + y * row_taps + k) * value
        total += w * half
    if CROP:
        total = tl.minimum(tl.maximum(total, 0.0), 1.0) * 255.5
    else:  # adding 1.5 * 2^52 leaves no room for a fraction: to the nearest, ties to even
        total = (total + 6755399441055744.0) - 6755399441055744.0
        total = tl.minimum(tl.maximum(total, 0.0), 255.0)
    # Through int32: a float's own conversion to 8 bits is not everywhere the truncation.
    value = total.to(tl.int32).to(tl.uint8)
    tl.store(out_ptr + (b * out_height + y) * out_width * 3 + i, value, mask=inside)


def launch_resample(
    frames_BHW3: Tensor,
    row_first_S: Tensor,
    row_weights_SK: Tensor,
    column_first_S: Tensor,
    column_weights_SK: Tensor,
    crop: bool,
) -> Tensor:
    B, H, W, C = frames_BHW3.shape
    good = frames_BHW3.dtype == torch.uint8 and C == 3 and frames_BHW3.is_contiguous()
    require(good, "resample", "frames must be contiguous uint8 [B,H,W,3]")
    for name, first, weights in (
        ("row", row_first_S, row_weights_SK),
        ("column", column_first_S, column_weights_SK),
    ):
        good = first.dtype == torch.int32 and weights.dtype == torch.float64
        good &= first.is_contiguous() and weights.is_contiguous() and len(first) == len(weights)
        require(good, "resample", f"{name} taps must be int32 [S] and fp64 [S,K], as taps_of makes")
    rows, columns = len(row_first_S), len(column_first_S)
    out = torch.empty((B, rows, columns, 3), dtype=torch.uint8, device=frames_BHW3.device)
    block = 128
    _resample_kernel[(triton.cdiv(columns * 3, block), rows, B)](
        frames_BHW3, row_first_S, row_weights_SK, column_first_S, column_weights_SK, out,
        H, W, rows, columns, row_weights_SK.shape[1], column_weights_SK.shape[1],
        CROP=crop, BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _fake_resample(
    frames_BHW3: Tensor, row_first_S: Tensor, row_weights_SK: Tensor, column_first_S: Tensor,
    column_weights_SK: Tensor, crop: bool,
) -> Tensor:  # fmt: skip
    B, rows, columns = frames_BHW3.shape[0], row_first_S.shape[0], column_first_S.shape[0]
    return frames_BHW3.new_empty(B, rows, columns, 3)


_resample = define("resample", launch_resample, reference_resample, _fake_resample)

Taps = tuple[Tensor, Tensor]


def resample(frames_BHW3: Tensor, rows: Taps, columns: Taps, *, crop: bool) -> Tensor:
    """A separable linear resize of uint8 [B,H,W,3]; rows and columns as `taps_of` makes them.

    crop False: rounded to the nearest. True: of x / 255, clipped to [0,1], then trunc(255.5 x),
    which is TensorFlow's float-to-uint8 conversion.
    """
    if uses_triton(frames_BHW3):
        out: Tensor = _resample(frames_BHW3.contiguous(), *rows, *columns, crop)
        return out
    return reference_resample(frames_BHW3, *rows, *columns, crop)


# Normalise --------------------------------------------------------------------------------------


def reference_normalise(
    pictures_BHW3: Tensor, mean_C: Tensor, std_C: Tensor, dtype: torch.dtype
) -> Tensor:
    x = pictures_BHW3.movedim(-1, 1).float() / 255
    x = x.repeat(1, mean_C.shape[0] // 3, 1, 1)
    return ((x - mean_C[:, None, None]) / std_C[:, None, None]).to(dtype)


@triton.jit
def _normalise_kernel(
    x_ptr, mean_ptr, std_ptr, out_ptr, size, picture, channels, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    p, c, b = i % picture, i // picture % channels, i // picture // channels
    x = tl.load(x_ptr + (b * picture + p) * 3 + c % 3, mask=inside, other=0).to(tl.float32)
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0)
    std = tl.load(std_ptr + c, mask=inside, other=1.0)
    y = (x / 255.0 - mean) / std
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=inside)


def launch_normalise(
    pictures_BHW3: Tensor, mean_C: Tensor, std_C: Tensor, dtype: torch.dtype
) -> Tensor:
    B, H, W, _ = pictures_BHW3.shape
    C = mean_C.shape[0]
    good = pictures_BHW3.dtype == torch.uint8 and pictures_BHW3.is_contiguous()
    require(good and pictures_BHW3.shape[3] == 3, "normalise", "expected dense uint8 [B,H,W,3]")
    good = mean_C.shape == std_C.shape and C % 3 == 0 and mean_C.dtype == torch.float32
    require(good, "normalise", "mean, std must be fp32 [3n]")
    out = torch.empty((B, C, H, W), dtype=dtype, device=pictures_BHW3.device)
    _normalise_kernel[(triton.cdiv(out.numel(), BLOCK),)](
        pictures_BHW3, mean_C, std_C, out, out.numel(), H * W, C, BLOCK=BLOCK
    )
    return out


def _fake_normalise(
    pictures_BHW3: Tensor, mean_C: Tensor, std_C: Tensor, dtype: torch.dtype
) -> Tensor:
    B, H, W, _ = pictures_BHW3.shape
    return torch.empty((B, mean_C.shape[0], H, W), dtype=dtype, device=pictures_BHW3.device)


_normalise = define("normalise", launch_normalise, reference_normalise, _fake_normalise)


def normalise(pictures_BHW3: Tensor, mean_C: Tensor, std_C: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B,H,W,3] to (x / 255 - mean) / std, [B,C,H,W]; C = 3n, one n after the other."""
    if uses_triton(pictures_BHW3):
        out: Tensor = _normalise(pictures_BHW3.contiguous(), mean_C, std_C, dtype)
        return out
    return reference_normalise(pictures_BHW3, mean_C, std_C, dtype)


# Cases ------------------------------------------------------------------------------------------


def _pixels_case(
    name: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, rounded: bool,
    large: bool = False,
) -> Case:  # fmt: skip
    def make(device: torch.device) -> dict[str, object]:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(shape, generator=generator, device=device) * 0.6
        return {"pixels_B3THW": x.to(dtype), "rounded": rounded}

    n = torch.Size(shape).numel()
    return Case(name, make, 0.0, n * (dtype.itemsize + 1), 4 * n, large)


def _resize_matrix(source: int, size: int, crop: bool) -> Tensor:
    """Like the policy's: a triangle for the crop, a wide window for Lanczos; fp64, on the host."""
    if crop:
        at = (0.026 + 0.948 * torch.linspace(0, 1, size, dtype=torch.float64)) * (source - 1)
        radius = 1.0
    else:
        at = (torch.arange(size, dtype=torch.float64) + 0.5) * source / size - 0.5
        radius = 3 * max(1.0, source / size)
    x = (torch.arange(source, dtype=torch.float64) - at[:, None]) / radius
    weights = torch.where(x.abs() < 1, 1 - x.abs() if crop else torch.sinc(3 * x) * x.sinc(), 0.0)
    return weights / weights.sum(1, keepdim=True)


def _resample_case(
    name: str, B: int, source: tuple[int, int], size: int, crop: bool, large: bool = False
) -> Case:
    H, W = source

    def make(device: torch.device) -> dict[str, object]:
        generator = torch.Generator(device).manual_seed(0)
        frames = torch.randint(256, (B, H, W, 3), generator=generator, device=device)
        rows, columns = (taps_of(_resize_matrix(n, size, crop)) for n in source)
        return {
            "frames_BHW3": frames.to(torch.uint8),
            "row_first_S": rows[0].to(device), "row_weights_SK": rows[1].to(device),
            "column_first_S": columns[0].to(device), "column_weights_SK": columns[1].to(device),
            "crop": crop,
        }  # fmt: skip

    taps = 4 if crop else int((6 * max(1.0, H / size)) * (6 * max(1.0, W / size)))
    return Case(name, make, 0.0, 3 * B * (H * W + size * size), 2 * 3 * B * size**2 * taps, large)


def _normalise_case(
    name: str, B: int, side: int, dtype: torch.dtype, tolerance: float, large: bool = False
) -> Case:
    def make(device: torch.device) -> dict[str, object]:
        generator = torch.Generator(device).manual_seed(0)
        pictures = torch.randint(256, (B, side, side, 3), generator=generator, device=device)
        mean = torch.tensor([0.484375, 0.455078125, 0.40625, 0.5, 0.5, 0.5], device=device)
        std = torch.tensor([0.228515625, 0.2236328125, 0.224609375, 0.5, 0.5, 0.5], device=device)
        return {
            "pictures_BHW3": pictures.to(torch.uint8), "mean_C": mean, "std_C": std, "dtype": dtype
        }  # fmt: skip

    n = B * side * side
    return Case(name, make, tolerance, n * (3 + 6 * dtype.itemsize), 3 * 6 * n, large)


TO_UINT8 = Op(
    "to_uint8", reference_to_uint8, launch_to_uint8, _to_uint8,
    (
        _pixels_case("small fp32", (2, 3, 2, 5, 6), torch.float32, True),
        _pixels_case("small bf16", (2, 3, 3, 8, 8), torch.bfloat16, True),
        _pixels_case("cut off fp32", (1, 3, 2, 7, 4), torch.float32, False),
        _pixels_case("2b bf16", (8, 3, 24, 256, 256), torch.bfloat16, True, large=True),
    ),
)  # fmt: skip
RESAMPLE = Op(
    "resample", reference_resample, launch_resample, _resample,
    (
        _resample_case("small down", 2, (20, 24), 14, False),
        _resample_case("small up", 1, (9, 11), 16, False),
        _resample_case("small crop", 2, (14, 14), 14, True),
        _resample_case("7b resize", 32, (256, 256), 224, False, large=True),
        _resample_case("7b resize 480x640", 32, (480, 640), 224, False, large=True),
        _resample_case("7b crop", 32, (224, 224), 224, True, large=True),
    ),
)  # fmt: skip
NORMALISE = Op(
    "normalise", reference_normalise, launch_normalise, _normalise,
    (
        _normalise_case("small fp32", 2, 6, torch.float32, 1e-6),
        _normalise_case("small bf16", 1, 8, torch.bfloat16, 8e-3),
        _normalise_case("7b bf16", 32, 224, torch.bfloat16, 8e-3, large=True),
    ),
)  # fmt: skip
