"""H.264 files: episodes for datasets (exact colour, seekable), clips for people to watch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from worldloop.errors import UserError
from worldloop.files import atomic_path


def encode_video(path: Path, episodes: Sequence[npt.NDArray[np.uint8]], fps: int, crf: int) -> None:
    """Write episodes [T,H,W,3] one after another to an H.264 file; each starts with a key frame.

    Colour is kept at full resolution (4:4:4): a cube of 11 pixels is 5 chroma samples otherwise.
    The same frames give the same bytes: x264's look-ahead, which varies from run to run, is off
    (a third larger at 0.4 dB more).
    """
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        height, width = episodes[0].shape[1:3]
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p"
        stream.time_base = Fraction(1, fps)
        exact = "threads=1:rc-lookahead=0:mbtree=0"
        options = {"crf": str(crf), "preset": "medium", "bf": "0", "x264-params": exact}
        stream.options = options
        stream.codec_context.gop_size = 100_000
        index = 0
        for frames in episodes:
            for t, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, fps)
                frame.pict_type = (
                    av.video.frame.PictureType.I if t == 0 else av.video.frame.PictureType.NONE
                )
                container.mux(stream.encode(frame))
                index += 1
        container.mux(stream.encode())


def decode_video(path: Path, start: int, count: int, fps: int) -> npt.NDArray[np.uint8]:
    """Frames ``start .. start+count-1`` of a video as uint8 [count,H,W,3].

    Raises ValueError naming the file when it is missing, corrupt or too short.
    """
    frames: list[npt.NDArray[np.uint8]] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            stream.codec_context.options = {"err_detect": "explode"}  # never patch over damage
            base = stream.time_base or Fraction(1, fps)
            container.seek(int(Fraction(start, fps) / base), stream=stream)
            for frame in container.decode(stream):
                index = round(float(frame.pts * base) * fps) if frame.pts is not None else -1
                if index < start:
                    continue
                if frame.is_corrupt:
                    raise ValueError(f"{path}: frame {index} is damaged; collect it again")
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == count:
                    break
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"{path}: cannot decode the video ({error}); collect it again") from error
    if len(frames) < count:
        raise ValueError(
            f"{path}: holds {len(frames)} frames from {start} on, expected {count}; "
            "the file is cut short, restore or collect it again"
        )
    return np.stack(frames)


def video_facts(path: Path) -> tuple[int, float]:
    """Frames and frames a second of a video file; raises ValueError naming the file."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = stream.average_rate
            count = stream.frames or sum(1 for _ in container.demux(stream)) - 1
            return int(count), float(rate or 0)
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"{path}: cannot read the video ({error})") from error


def write_video(path: Path, pictures: Iterable[npt.NDArray[np.uint8]], fps: float) -> None:
    """Write uint8 pictures [H,W,3] as H.264 yuv420p, which every browser plays; atomic.

    Odd sides lose their last line, as 4:2:0 colour needs even ones.
    """
    rate = Fraction(fps).limit_denominator(1000)
    with (
        atomic_path(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream: Any = None
        for picture in pictures:
            picture = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]
            if stream is None:
                stream = container.add_stream("libx264", rate=rate)
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": "19", "preset": "veryfast", "x264-params": "threads=1"}
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        if stream is None:
            raise UserError(f"{path}: no pictures to write")
        container.mux(stream.encode())
