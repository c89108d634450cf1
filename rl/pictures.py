"""Pictures of imagined episodes beside the real ones: videos and contact sheets.

Shape letters: T frames after the start, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from worldloop.files import atomic_path
from worldloop.metrics import Comparison, psnr
from worldloop.types import Episode, Rollout
from worldloop.video import write_video

Picture = npt.NDArray[np.uint8]

INK, FAINT, PAPER, LINE = (31, 35, 40), (112, 118, 126), (255, 255, 255), (218, 221, 226)
REAL, IMAGINED, ALARM = (37, 99, 155), (196, 98, 16), (176, 32, 48)
GAIN = 2  # of the difference picture


@dataclass(frozen=True)
class Pair:
    """One real episode and its imagination."""

    number: int
    real: Picture  # [T+1,H,W,3]
    imagined: Picture  # [T+1,H,W,3]
    true_reward: npt.NDArray[np.float32]  # [T]
    reward: npt.NDArray[np.float32]  # [T] imagined
    threshold: float
    success: bool  # true outcome
    reward_success: bool
    visual_success: bool | None
    psnr: float  # dB
    within: float  # share of frames with the object within 4 pixels; nan where never seen
    instruction: str

    @property
    def agrees(self) -> bool:
        """Whether the imagined reward tells the true outcome."""
        return self.success == self.reward_success

    @property
    def name(self) -> str:
        return f"episode-{self.number:03d}"


def pairs_of(
    episodes: Sequence[Episode], rollout: Rollout, comparison: Comparison, threshold: float
) -> list[Pair]:
    """What the pictures and the report show of each episode."""
    assert rollout.frames is not None
    pairs = []
    for i, episode in enumerate(episodes):
        seen = comparison.track.counted[i]
        visual = comparison.visual_success
        pairs.append(
            Pair(
                number=i,
                real=episode.frames,
                imagined=rollout.frames[i, :, 0],
                true_reward=episode.reward,
                reward=rollout.reward[i],
                threshold=threshold,
                success=bool(comparison.true_success[i]),
                reward_success=bool(comparison.reward_success[i]),
                visual_success=None if visual is None else bool(visual[i]),
                psnr=float(comparison.psnr[i].mean()),
                within=float(comparison.track.within[i, seen].mean()) if seen.any() else np.nan,
                instruction=episode.instruction,
            )
        )
    return pairs


def plain_pair(
    number: int, episode: Episode, rollout: Rollout, row: int, success: bool,
    threshold: float = float("nan"), instruction: str | None = None,
) -> Pair:  # fmt: skip
    """One episode beside a row of a rollout, which may be shorter, without a `Comparison`."""
    assert rollout.frames is not None
    T = rollout.reward.shape[1]
    real, frames = episode.frames[: T + 1], rollout.frames[row, :, 0]
    return Pair(
        number=number,
        real=real,
        imagined=frames,
        true_reward=episode.reward[:T],
        reward=rollout.reward[row],
        threshold=threshold,
        success=success,
        reward_success=bool(rollout.success[row]),
        visual_success=None,
        psnr=float(np.minimum(psnr(real[1:], frames[1:]), 99).mean()),
        within=float("nan"),
        instruction=episode.instruction if instruction is None else instruction,
    )


def outcome(success: bool) -> str:
    """A word for an outcome."""
    return "success" if success else "failure"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _enlarge(picture: Picture, scale: int) -> Picture:
    """Every pixel as a square: what the model drew, not what an interpolation made of it."""
    return picture.repeat(scale, 0).repeat(scale, 1)


def side_by_side(pair: Pair, scale: int = 3) -> Iterator[Picture]:
    """Video pictures: real | imagined | difference, the reward trace with a cursor under them."""
    T, (H, W) = len(pair.reward), pair.real.shape[1:3]
    gap, top, strip = 12, 62, 128
    width, height = 3 * W * scale + 4 * gap, top + H * scale + strip + gap
    width, height = width + width % 2, height + height % 2
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 8), f"{pair.name}: {pair.instruction}", INK, _font(17))
    verdict = f"true {outcome(pair.success)}, imagined {outcome(pair.reward_success)}"
    draw.text((width - gap, 8), verdict, INK if pair.agrees else ALARM, _font(17), anchor="ra")
    lefts = [gap + i * (W * scale + gap) for i in range(3)]
    for left, (text, color) in zip(
        lefts, (("real", REAL), ("imagined", IMAGINED), (f"difference, {GAIN}x", FAINT))
    ):
        draw.text((left, 36), text, color, _font(17))
    box = (gap + 34, top + H * scale + 26, width - gap - 8, height - gap - 10)
    _trace(draw, pair, box)
    still = np.asarray(canvas)
    for t in range(T + 1):
        picture = still.copy()
        real, imagined = pair.real[t], pair.imagined[t]
        difference = np.abs(real.astype(np.int16) - imagined) * GAIN
        panels = (real, imagined, np.minimum(difference, 255).astype(np.uint8))
        for left, panel in zip(lefts, panels):
            picture[top : top + H * scale, left : left + W * scale] = _enlarge(panel, scale)
        x = round(box[0] + (box[2] - box[0]) * t / T)
        picture[box[1] : box[3], x - 1 : x + 1] = INK
        yield picture


def _trace(draw: ImageDraw.ImageDraw, pair: Pair, box: tuple[int, int, int, int]) -> None:
    """The imagined reward over time, the threshold dashed, the truly solved time shaded."""
    left, top, right, bottom = box
    T = len(pair.reward)

    def x(t: float) -> float:
        return left + (right - left) * t / T

    def y(value: float) -> float:
        return bottom - (bottom - top) * min(max(float(value), 0.0), 1.0)

    for t in np.flatnonzero(pair.true_reward > 0.5):
        draw.rectangle((x(t), top, x(t + 1), bottom), (219, 233, 245))
    draw.rectangle(box, outline=LINE)
    for dash in range(left, right, 12):
        draw.line((dash, y(pair.threshold), min(dash + 6, right), y(pair.threshold)), FAINT)
    points = [(x(t + 1), y(value)) for t, value in enumerate(pair.reward)]
    draw.line(points, IMAGINED, 2)
    for value, text in ((0.0, "0"), (pair.threshold, f"{pair.threshold:.2g}")):
        draw.text((left - 6, y(value)), text, FAINT, _font(13), anchor="rm")
    draw.text((left, top - 17), "imagined reward", IMAGINED, _font(13))
    draw.text((left + 120, top - 17), "solved in truth", REAL, _font(13))


def write_pair(pair: Pair, folder: Path, fps: float, scale: int = 3) -> Path:
    """Write the side-by-side video of a pair and a still of its middle; return its path."""
    path = folder / f"{pair.name}.mp4"
    middle = len(pair.reward) // 2

    def with_still() -> Iterator[Picture]:
        for t, picture in enumerate(side_by_side(pair, scale)):
            if t == middle:
                with atomic_path(path.with_suffix(".jpg")) as temporary:
                    Image.fromarray(picture).save(temporary, format="JPEG", quality=85)
            yield picture

    write_video(path, with_still(), fps)
    return path


def contact_sheet(pairs: Sequence[Pair], every: int = 8, told: bool = False) -> Image.Image:
    """Each pair as two rows, real above imagined, every ``every``-th frame, with its outcomes.

    told: its instruction stands in place of its number.
    """
    H, W = pairs[0].real.shape[1:3]
    times = range(0, max(len(pair.real) for pair in pairs), every)
    label, head, gap, between = 190, 30, 2, 14
    width = label + len(times) * (W + gap)
    row = 2 * (H + gap) + between
    sheet = Image.new("RGB", (width, head + row * len(pairs)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, t in enumerate(times):
        draw.text((label + column * (W + gap) + 2, 8), f"frame {t}", FAINT, _font(13))
    for i, pair in enumerate(pairs):
        y = head + i * row
        lines = [
            (pair.instruction if told else pair.name, INK),
            (f"true: {outcome(pair.success)}", REAL),
            (f"reward: {outcome(pair.reward_success)}", INK if pair.agrees else ALARM),
        ]  # fmt: skip
        if pair.visual_success is not None:
            right = pair.visual_success == pair.success
            lines.append((f"picture: {outcome(pair.visual_success)}", INK if right else ALARM))
        lines.append((f"{pair.psnr:.1f} dB", INK))
        for n, (text, color) in enumerate(lines):
            draw.text((8, y + 2 + 19 * n), text, color, _font(15))
        for name, color, clip, top in (
            ("real", REAL, pair.real, y), ("imagined", IMAGINED, pair.imagined, y + H + gap),
        ):  # fmt: skip
            draw.text((label - 8, top + H - 4), name, color, _font(13), anchor="rs")
            for column, t in enumerate(range(0, len(clip), every)):
                sheet.paste(Image.fromarray(clip[t]), (label + column * (W + gap), top))
    return sheet


def write_sheets(pairs: Sequence[Pair], folder: Path, each: int = 6) -> list[Path]:
    """Write contact sheets of ``each`` pairs; returns their paths."""
    paths = []
    for i in range(0, len(pairs), each):
        path = folder / f"sheet-{i // each:02d}.png"
        with atomic_path(path) as temporary:
            contact_sheet(pairs[i : i + each]).save(temporary, format="PNG", compress_level=6)
        paths.append(path)
    return paths
