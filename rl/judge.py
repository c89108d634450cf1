"""A vision-language model as judge of imagined episodes (paper section 4.4, table 4).

The paper shows Qwen3-VL the frames that the world model made and asks whether the task succeeded.
Any server that speaks the OpenAI protocol will do; `vllm serve Qwen/Qwen3-VL-8B-Instruct` is one,
on this machine by default. A key for servers elsewhere is read from WORLDLOOP_JUDGE_KEY.

Shape letters: N episodes, T frames, H W pixels.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from worldloop.config import positive
from worldloop.errors import UserError
from worldloop.track import Progress

KEY = "WORLDLOOP_JUDGE_KEY"
MOST = 1 << 20  # bytes of an answer that are read
QUESTION = (
    "These pictures are frames of one episode of a robot arm, in order; the last one is its end. "
    "The task was: {instruction}. Look at the last picture above all. Has the task been done? "
    "Answer with one word, yes or no."
)


@dataclass(frozen=True)
class JudgeConfig:
    """Where the judge is and how it is asked."""

    url: str = "http://127.0.0.1:8000/v1"
    """Address of an OpenAI-compatible server, with its /v1."""
    model: str = "Qwen/Qwen3-VL-8B-Instruct"
    frames: int = 8
    """Pictures shown of an episode, evenly spaced, the last one always."""
    scale: int = 2
    """Pictures are enlarged so many times."""
    workers: int = 4
    """Questions asked at once."""
    seconds: float = 120.0
    """Longest wait for an answer."""

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"judge url is {self.url!r}; expected http(s)://HOST:PORT/v1")
        positive(self, "frames", "scale", "workers", where="judge ")
        if self.seconds <= 0:
            raise UserError(f"judge seconds is {self.seconds}; must be positive")


def picture_url(frame_HW3: npt.NDArray[np.uint8], scale: int) -> str:
    """A frame as a data address: PNG, enlarged."""
    H, W = frame_HW3.shape[:2]
    buffer = io.BytesIO()
    image = Image.fromarray(frame_HW3).resize((W * scale, H * scale), Image.Resampling.LANCZOS)
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def question(
    frames_THW3: npt.NDArray[np.uint8], instruction: str, config: JudgeConfig
) -> dict[str, Any]:
    """The body of one chat completion request."""
    count = min(config.frames, len(frames_THW3))
    times = np.linspace(len(frames_THW3) - 1, 0, count).round().astype(int)[::-1]
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": picture_url(frames_THW3[t], config.scale)}}
        for t in times
    ]
    parts.append({"type": "text", "text": QUESTION.format(instruction=instruction)})
    return {
        "model": config.model,
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": 16,
    }


def verdict(text: str) -> bool | None:
    """yes or no as the first such word of an answer; None where there is neither.

    What a thinking model writes before its answer does not count.
    """
    words = re.findall(r"[a-z]+", text.rpartition("</think>")[2].lower())
    return next((word == "yes" for word in words if word in ("yes", "no")), None)


def ask(body: dict[str, Any], config: JudgeConfig) -> str:
    """The text that the server answers with; raises UserError naming its address."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        f"{config.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=config.seconds) as response:
            document = json.loads(response.read(MOST))
        text = document["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        told = " ".join(error.read(2000).decode(errors="replace").split())[:200]
        raise UserError(f"{config.url}: the judge answers {error.code}: {told}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{config.url}: no judge answers ({reason}); start one, for example "
            f"`vllm serve {config.model}`, or give another address"
        ) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{config.url}: its answer is no chat completion ({type(error).__name__}: {error})"
        ) from error
    return text if isinstance(text, str) else ""


def judge(
    frames_NTHW3: npt.NDArray[np.uint8],
    instructions: Sequence[str],
    config: JudgeConfig | None = None,
) -> list[bool | None]:
    """Whether each episode's task was done by the judge's word; None where it said neither."""
    config = config or JudgeConfig()
    if len(frames_NTHW3) != len(instructions):
        raise UserError(f"{len(frames_NTHW3)} episodes, {len(instructions)} instructions")

    def one(i: int) -> bool | None:
        return verdict(ask(question(frames_NTHW3[i], instructions[i], config), config))

    with ThreadPoolExecutor(config.workers) as pool:
        waiting = [pool.submit(one, i) for i in range(len(instructions))]
        found = []
        with Progress(len(waiting), "judge", unit="episode") as progress:
            try:
                for answer in waiting:
                    found.append(answer.result())
                    progress.update()
            except UserError:
                for answer in waiting:
                    answer.cancel()
                raise
    return found
