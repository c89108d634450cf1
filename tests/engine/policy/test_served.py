"""The policy server and its HTTP client, with the network in the server's process (no vLLM)."""

import dataclasses
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
import torch

from worldloop import cli
from worldloop.engine.policy.action_tokens import Statistics
from worldloop.engine.policy.base import Observation
from worldloop.engine.policy.openvla_oft import OpenVLAOFT, tiny_config
from worldloop.engine.policy.served import HTTPPolicy, LocalPolicy, PolicyServerError
from worldloop.engine.policy.server import Batcher, ServePolicyConfig, Server
from worldloop.engine.policy.vla import PolicyConfig
from worldloop.engine.policy.wire import Limits, RequestError, pack
from worldloop.errors import UserError
from worldloop.types import ActionSpec

CHUNK, DIM = 4, 7
U8 = torch.uint8
WORDS = ("push the cube", "lift the peg upright and hold it there", "stack", "pull the cube back")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.delenv("WORLDLOOP_TOKEN", raising=False)


def policy_of(seed: int = 0) -> LocalPolicy:
    config = tiny_config(DIM, CHUNK)
    config = dataclasses.replace(config, llama=dataclasses.replace(config.llama, depth=2))
    network = OpenVLAOFT(config)
    network.init_weights(seed)
    statistics = Statistics((-0.5,) * DIM, (0.5,) * DIM, (True,) * DIM)
    spec = ActionSpec(dim=DIM, chunk=CHUNK)
    return LocalPolicy(network.eval(), PolicyConfig(spec, "test", crop=True), statistics)


def frames_of(rows: int, seed: int = 0, views: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, views, 80, 80, 3), np.uint8)


def words_of(rows: int) -> list[str]:
    return [f"{WORDS[i % len(WORDS)]} {i}" for i in range(rows)]


@contextmanager
def serving(policy, **options):
    """A server in a thread of this process."""
    server = Server(policy, ServePolicyConfig("test", port=0, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def shared():
    torch.set_num_threads(1)
    limits = Limits(max_rows=64, max_side=128, max_instruction=64, max_body_mb=2, max_weights_mb=64)
    with serving(policy_of(), limits=limits) as server:
        yield server


@pytest.fixture
def client(shared) -> HTTPPolicy:
    return HTTPPolicy(shared.url, retries=0)


def post(url: str, path: str, body: bytes, **headers: str) -> tuple[int, dict]:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("POST", path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def request_of(rows: int = 2, **changes) -> bytes:
    tensors = {"frames": torch.from_numpy(frames_of(rows))}
    fields = {"instructions": words_of(rows)}
    for key, value in changes.items():
        target = tensors if isinstance(value, torch.Tensor) else fields
        if value is None:
            tensors.pop(key, None)
            fields.pop(key, None)
        else:
            target[key] = value
    return pack(tensors, fields)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("rows", [1, 3, 64, 100])
def test_logits_are_those_of_the_policy(shared, client, rows):
    """64 is a full batch of mixed prompt lengths; 100 is more than one request takes."""
    frames, words = frames_of(rows), words_of(rows)
    served = client.logits(frames, words)
    torch.testing.assert_close(served, shared.policy.logits(frames, words), rtol=0, atol=1e-4)


def test_acts_as_the_policy_itself(shared, client):
    assert client.action_spec == shared.policy.action_spec
    frames, words = frames_of(3)[:, None], words_of(3)
    seen = Observation(frames, np.zeros((3, DIM), np.float32), tuple(words), (0, 5, 2), 1)
    ours, theirs = client.act(seen, 7), shared.policy.act(seen, 7)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.actions, theirs.actions)


def test_requests_that_wait_together_are_answered_together(shared, client):
    calls = []
    plain = shared.policy.logits

    def counted(frames, words):
        calls.append(len(frames))
        return plain(frames, words)

    shared.policy.logits = counted
    try:
        with ThreadPoolExecutor(16) as pool:
            jobs = [(frames_of(2, seed=i), [f"push {i}", f"pull it {i}"]) for i in range(16)]
            answers = list(pool.map(lambda job: client.logits(*job), jobs))
    finally:
        del shared.policy.logits
    assert sum(calls) == 32 and len(calls) < 16
    for job, answer in zip(jobs, answers):
        torch.testing.assert_close(answer, plain(*job), rtol=0, atol=1e-4)


def test_a_full_queue_sends_requests_away():
    class Slow:
        version = 0

        def logits(self, frames, words):
            time.sleep(0.2)
            return torch.zeros(len(frames), 1, 256)

    batcher = Batcher(Slow(), max_batch=2, max_waiting=4)
    first = [batcher.logits(frames_of(2), ("a", "b")) for _ in range(2)]
    with pytest.raises(RequestError, match="busy") as refused:
        batcher.logits(frames_of(2), ("a", "b"))
    assert refused.value.status == 503
    assert [future.result()[0].shape[0] for future in first] == [2, 2]
    batcher.stop()
    assert batcher.waiting == 0


def test_one_failure_fails_one_request():
    class Picky:
        version = 0

        def logits(self, frames, words):
            if "bad" in words:
                raise UserError("bad")
            return torch.zeros(len(frames), 1, 256)

    batcher = Batcher(Picky(), max_batch=8, max_waiting=64)
    with pytest.raises(UserError, match="bad"):
        batcher.logits(frames_of(1), ("bad",)).result(10)
    assert batcher.logits(frames_of(1), ("good",)).result(10)[0].shape == (1, 1, 256)
    batcher.stop()


# ---------------------------------------------------------------- malformed requests


@pytest.mark.parametrize(
    ("body", "status", "field", "message"),
    [
        (b"", 400, "body", "safetensors"),
        (b"\x80\x04K\x01.", 400, "body", "safetensors"),  # a pickle
        (struct.pack("<Q", 2**60) + b"{}", 400, "body", "header"),
        (request_of()[:-1], 400, "body", "safetensors"),
        (request_of(frames=None), 422, "frames", "missing"),
        (request_of(frames=torch.zeros(2, 1, 80, 80, 3)), 422, "frames", "uint8"),
        (request_of(frames=torch.zeros(2, 80, 80, 3, dtype=U8)), 422, "frames", "V, H, W"),
        (request_of(frames=torch.zeros(2, 2, 8, 8, 3, dtype=U8)), 422, "frames", "views"),
        (request_of(frames=torch.zeros(2, 1, 8, 129, 3, dtype=U8)), 422, "frames", "width"),
        (request_of(frames=torch.zeros(0, 1, 8, 8, 3, dtype=U8)), 422, "frames", "rows"),
        (request_of(65), 422, "frames", "1..64"),
        (request_of(256), 413, "body", "MiB"),
        (request_of(depth=torch.zeros(1)), 422, "depth", "unknown"),
        (request_of(temperature=1), 422, "temperature", "unknown"),
        (request_of(instructions=None), 422, "instructions", "missing"),
        (request_of(instructions="push"), 422, "instructions", "list"),
        (request_of(instructions=["push"]), 422, "instructions", "2 rows"),
        (request_of(instructions=["push", " "]), 422, "instructions[1]", "what the robot"),
        (request_of(instructions=["push", 5]), 422, "instructions[1]", "what the robot"),
        (request_of(instructions=["push", "p" * 65]), 422, "instructions[1]", "at most 64"),
    ],
)  # fmt: skip
def test_malformed_requests_name_the_field(shared, body, status, field, message):
    assert post(shared.url, "/logits", body)[0] == status
    answer = post(shared.url, "/logits", body)[1]
    assert answer["field"] == field and message in answer["error"] and "\n" not in answer["error"]


def test_client_refuses_what_the_server_would(client):
    with pytest.raises(RequestError, match="uint8"):
        client.logits(frames_of(2).astype(np.float32), words_of(2))
    with pytest.raises(RequestError, match="2 rows"):
        client.logits(frames_of(2), words_of(3))
    with pytest.raises(RequestError, match="at most 64"):
        client.logits(frames_of(1), ["p" * 65])
    with pytest.raises(UserError, match="http://host:port"):
        HTTPPolicy("127.0.0.1:80")


# ---------------------------------------------------------------- token


def test_token(monkeypatch):
    with serving(policy_of(), token="secret") as server:
        for token in (None, "secre", "secret2"):
            with pytest.raises(RequestError, match="token") as refused:
                HTTPPolicy(server.url, token=token)
            assert refused.value.status == 401
        for path, body in (("/logits", request_of()), ("/weights", b"{}")):
            assert post(server.url, path, body)[0] == 401
        assert HTTPPolicy(server.url, token="secret").version == 0
        monkeypatch.setenv("WORLDLOOP_TOKEN", "secret")
        assert HTTPPolicy(server.url).version == 0


def test_other_hosts_need_a_token():
    for host in ("0.0.0.0", "::", "10.0.0.1", "somewhere"):
        with pytest.raises(UserError, match="--token"):
            ServePolicyConfig("test", host=host)
        assert ServePolicyConfig("test", host=host, token="secret").secret == "secret"
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert ServePolicyConfig("test", host=host).secret is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 65536}, "port"),
        ({"threads": 0}, "threads"),
        ({"max_batch": 0}, "max_batch"),
        ({"weights_root": Path("nowhere")}, "weights_root"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        ServePolicyConfig("test", **options)
    with pytest.raises(UserError, match="max_rows"):
        Limits(max_rows=0)


def test_taken_port(shared):
    port = int(shared.url.rsplit(":", 1)[1])
    with pytest.raises(UserError, match="cannot listen"):
        Server(shared.policy, ServePolicyConfig("test", port=port))


# ---------------------------------------------------------------- weights


def test_weights_change_the_answers_and_the_version(tmp_path):
    new, frames, words = policy_of(seed=1), frames_of(2), words_of(2)
    old = policy_of()
    new.save(tmp_path / "new")
    with serving(policy_of(), weights_root=tmp_path) as server:
        client = HTTPPolicy(server.url)
        before = client.logits(frames, words)
        assert client.update_weights(new.network.state_dict()) == client.version == 1
        after = client.logits(frames, words)
        torch.testing.assert_close(after, new.logits(frames, words), rtol=0, atol=1e-4)
        assert client.version == 1 and (after - before).abs().max() > 0.1

        assert client.update_weights(old.network.state_dict(), version=5) == 5
        torch.testing.assert_close(client.logits(frames, words), before, rtol=0, atol=1e-4)
        assert client.update_weights(tmp_path / "new") == 6  # a folder, by its path
        torch.testing.assert_close(client.logits(frames, words), after, rtol=0, atol=1e-4)
        with pytest.raises(RequestError, match="version"):
            client.update_weights(old.network.state_dict(), version=6)


def test_bad_weights_leave_the_old_ones(tmp_path):
    good = {name: tensor.clone() for name, tensor in policy_of().network.state_dict().items()}
    name = "language_model.lm_head.weight"
    missing = {key: value for key, value in good.items() if key != name}
    damaged = good[name].clone()
    damaged[3, 3] = float("nan")
    with serving(policy_of(), limits=Limits(max_weights_mb=14)) as server:
        client = HTTPPolicy(server.url)
        before = client.logits(frames_of(1), words_of(1))
        for weights, message in (
            (missing, "1 missing"),
            ({**good, "extra": torch.zeros(1)}, "1 unexpected"),
            ({**good, name: good[name][:-1]}, "another shape"),
            ({**good, name: damaged}, "NaN"),
        ):
            with pytest.raises(UserError, match=message):
                client.update_weights(weights)
        with pytest.raises(UserError, match="MiB"):
            client.update_weights({"x": torch.zeros(2**22)})
        policy_of(1).save(tmp_path / "new")
        with pytest.raises(RequestError, match="--weights-root"):
            client.update_weights(tmp_path / "new")
        assert client.version == 0
        assert torch.equal(client.logits(frames_of(1), words_of(1)), before)


def test_weights_come_from_under_the_root_alone(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    policy_of(1).save(outside)
    (root / "link").symlink_to(outside)
    with serving(policy_of(), weights_root=root) as server:
        for folder, status in (
            ("../outside", 403), (str(outside), 403), ("link", 403), ("none", 422), (7, 422),
        ):  # fmt: skip
            body = json.dumps({"folder": folder}).encode()
            found, answer = post(server.url, "/weights", body, content_type="application/json")
            assert (found, answer["field"]) == (status, "folder")
        kind = "application/json"
        assert post(server.url, "/weights", b"[1]", content_type=kind)[0] == 400
        assert post(server.url, "/weights", b"{", content_type=kind)[0] == 400
        body = pack(policy_of(1).network.state_dict(), {"version": "new"})
        assert post(server.url, "/weights", body)[1]["field"] == "version"
        assert HTTPPolicy(server.url).version == 0


# ---------------------------------------------------------------- a server that goes and comes back


def start(folder: Path, port: int = 0) -> tuple[subprocess.Popen, str]:
    """`worldloop serve policy` as its own process, once it answers."""
    command = ["serve", "policy", "--policy", folder, "--backend", "inprocess", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "worldloop.cli", *map(str, command), "--port", str(port)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("http://"), line
    return process, line.split()[0]


@pytest.mark.slow
def test_server_dies_and_comes_back(tmp_path):
    policy_of().save(tmp_path / "policy")
    frames, words = frames_of(2), words_of(2)
    process, url = start(tmp_path / "policy")
    client = HTTPPolicy(url, retries=2, backoff_s=0.05)
    patient = HTTPPolicy(url, retries=12, backoff_s=0.25)
    try:
        before = client.logits(frames, words)
        process.kill()
        process.wait()
        with pytest.raises(PolicyServerError, match="3 attempts") as gone:
            client.logits(frames, words)
        assert url in str(gone.value) and "worldloop serve policy" in str(gone.value)
        assert isinstance(gone.value, ConnectionError) and "\n" not in str(gone.value)

        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(patient.logits, frames, words)
            time.sleep(0.5)
            assert not waiting.done()
            process, again = start(tmp_path / "policy", int(url.rsplit(":", 1)[1]))
            assert again == url
            torch.testing.assert_close(waiting.result(60), before, rtol=0, atol=1e-4)

        # A learner's weights are gone with the server: its own are no answer to it.
        assert patient.update_weights(policy_of(seed=1).network.state_dict()) == 1
        patient.logits(frames, words)
        process.kill()
        process.wait()
        process, _ = start(tmp_path / "policy", int(url.rsplit(":", 1)[1]))
        with pytest.raises(PolicyServerError, match="version 0, but was sent version 1"):
            patient.logits(frames, words)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0  # a clean stop
    with pytest.raises(PolicyServerError):
        HTTPPolicy(url, retries=0)


def test_connection_cut_in_mid_answer_is_retried(shared):
    """A proxy that drops the first connections after the request has been read."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = int(shared.url.rsplit(":", 1)[1])
    cuts = 3

    def pump(source, sink):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def proxy():
        nonlocal cuts
        while True:
            try:
                inner, _ = listener.accept()
            except OSError:
                return
            if cuts:
                cuts -= 1
                inner.recv(1000)
                inner.close()
                continue
            outer = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=pump, args=(inner, outer), daemon=True).start()
            threading.Thread(target=pump, args=(outer, inner), daemon=True).start()

    threading.Thread(target=proxy, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = HTTPPolicy(url, retries=4, backoff_s=0.01)
    assert client.logits(frames_of(1), words_of(1)).shape == (1, CHUNK * DIM, 256)
    cuts = 3
    client.logits(frames_of(1), words_of(1))
    listener.close()


def test_verb_names_what_is_wrong(capsys, tmp_path):
    assert cli.main(["serve", "policy", "--policy", str(tmp_path / "none")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        cli.main(["serve", "policy", "--policy", "x", "--host", "0.0.0.0"])
    assert exit.value.code == 2 and "--token" in capsys.readouterr().err
