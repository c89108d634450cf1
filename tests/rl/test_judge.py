"""The judge behind an OpenAI-compatible server: what is asked, what is understood, what fails."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from worldloop.errors import UserError
from worldloop.rl.judge import KEY, JudgeConfig, judge, question, verdict


class StandIn(BaseHTTPRequestHandler):
    """Speaks the protocol; says yes where the last picture is bright. Kept: every request."""

    requests: list[tuple[dict, dict]] = []
    reply: str | bytes | None = None
    status = 200

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append((dict(self.headers), body))
        assert self.path == "/v1/chat/completions"
        parts = body["messages"][0]["content"]
        kind, _, data = parts[-2]["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64" and parts[-1]["type"] == "text"
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        text = "Yes." if picture.mean() > 128 else "No, the cube has missed."
        if isinstance(self.reply, bytes):
            document = self.reply
        else:
            answer = text if self.reply is None else self.reply
            message = {"role": "assistant", "content": answer}
            document = json.dumps({
                "id": "x", "object": "chat.completion", "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            }).encode()  # fmt: skip
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(document)))
        self.end_headers()
        self.wfile.write(document)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    StandIn.requests, StandIn.reply, StandIn.status = [], None, 200
    running = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}/v1"
    running.shutdown()
    running.server_close()
    thread.join()


def episodes() -> np.ndarray:
    """Six episodes of 20 frames; the last frame of 1, 2 and 5 is bright."""
    frames = np.full((6, 20, 16, 16, 3), 40, np.uint8)
    frames[[1, 2, 5], -1] = 220
    frames[[0, 3], :-1] = 220  # bright before, dark at the end
    return frames


def test_episodes_are_judged_by_their_end(server, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    config = JudgeConfig(url=server, frames=5, scale=2)
    found = judge(episodes(), [f"task {i}" for i in range(6)], config)
    assert found == [False, True, True, False, False, True]
    assert len(StandIn.requests) == 6
    headers, body = StandIn.requests[0]
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "Qwen/Qwen3-VL-8B-Instruct" and body["temperature"] == 0
    parts = body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url"] * 5 + ["text"]
    asked = {b["messages"][0]["content"][-1]["text"] for _, b in StandIn.requests}
    assert all(any(f"task {i}." in text for text in asked) for i in range(6))


def test_pictures_are_spread_over_the_episode_and_enlarged():
    frames = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
    frames = frames.repeat(3, 3) * 10
    for count, times in ((5, [0, 5, 10, 14, 19]), (1, [19]), (40, list(range(20)))):
        body = question(frames, "x", JudgeConfig(frames=count, scale=3))
        shown = [p["image_url"]["url"] for p in body["messages"][0]["content"][:-1]]
        pictures = [Image.open(io.BytesIO(base64.b64decode(u.partition(",")[2]))) for u in shown]
        assert all(p.size == (24, 24) for p in pictures)
        assert [int(np.asarray(p).mean()) // 10 for p in pictures] == times


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes", True), ("no.", False), ("**Yes**, it is", True), ("Answer: No", False), ("", None),
     ("maybe", None), ("<think>yes? no...</think> yes", True), ("nobody knows", None)],
)  # fmt: skip
def test_verdicts(text, expected):
    assert verdict(text) is expected


def test_faults_are_named(server):
    frames, config = episodes()[:2], JudgeConfig(url=server)
    for reply, status, message in (
        (b'{"error": {"message": "model not found"}}', 404, "answers 404: .*model not found"),
        (b"no json", 200, "no chat completion"),
        (b'{"choices": []}', 200, "no chat completion"),
    ):
        StandIn.reply, StandIn.status = reply, status
        with pytest.raises(UserError, match=message):
            judge(frames, ["a", "b"], config)
    StandIn.reply, StandIn.status = "I cannot tell", 200
    assert judge(frames, ["a", "b"], config) == [None, None]
    with pytest.raises(UserError, match=r"no judge answers .*vllm serve Qwen/Qwen3-VL"):
        judge(frames, ["a", "b"], JudgeConfig(url="http://127.0.0.1:9/v1"))
    with pytest.raises(UserError, match="judge url is 'localhost:8000'"):
        JudgeConfig(url="localhost:8000")
    with pytest.raises(UserError, match="2 episodes, 1 instructions"):
        judge(frames, ["a"], config)
