"""What has not changed since an episode began keeps the pixels that were recorded then.

An autoencoder loses detail: edges of a target, the grain of a table. All of that is in the start
frame, which is recorded, not imagined. So a frame is compared with the start frame where both come
from the same decoder, and as far as they agree, the recorded start frame is shown. What moves, and
what it uncovers, is left as the decoder made it; a camera that moves leaves nothing still.

Shape letters: B rows (episodes), T frames, H W pixels. Pixels are in [-1,1].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

AROUND = 3  # pixels a side over which a change is averaged: noise of single pixels is none


def still_of(recorded_B3HW: Tensor, decoded_B3HW: Tensor) -> Tensor:
    """[B,2,3,H,W] fp32, what `keep_still` needs of start frames: as recorded, and as the
    autoencoder gives them back."""
    return torch.stack([recorded_B3HW.float(), decoded_B3HW.float()], 1)


def keep_still(pixels_B3THW: Tensor, still_B23HW: Tensor, tolerance: float) -> Tensor:
    """Decoded frames with the recorded start frame wherever they show the same, fp32.

    tolerance: a change c (of the channel that changes most) leaves exp(-(c / tolerance)^2) of the
    recorded pixel.
    """
    recorded, decoded = (still_B23HW[:, i, :, None] for i in (0, 1))
    pixels = pixels_B3THW.float()
    change_BTHW = (pixels - decoded).abs_().amax(1)
    change_BTHW = F.avg_pool2d(change_BTHW, AROUND, 1, AROUND // 2, count_include_pad=False)
    share_BTHW = change_BTHW.div_(tolerance).square_().neg_().exp_()
    return torch.lerp(pixels, recorded, share_BTHW[:, None])
