"""`worldloop serve policy`: a policy over HTTP.

Requests that arrive while the network is busy are answered together in the next pass; weight
updates wait in the same queue, so every answer comes whole from one version and says which. What
travels is described in `wire.py`:

    GET  /health     {"status", "version", "waiting"}; needs no token
    GET  /policy     what is served: action spec, statistics, network, limits, version
    POST /logits     frames and instructions to logits
    POST /weights    new weights, from the body or from a folder under --weights-root

Loopback is the default; another address needs a token, which then every request but /health shows
as ``Authorization: Bearer TOKEN``. Whoever can post to /weights decides what the policy does.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import os
import queue
import signal
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from torch import Tensor

from worldloop.cli import parse_config
from worldloop.config import config_to_dict, positive
from worldloop.engine.policy.served import LocalPolicy, VLLMPolicy
from worldloop.engine.policy.wire import (
    MEDIA_TYPE,
    Limits,
    RequestError,
    check_request,
    pack,
    unpack,
)
from worldloop.errors import UserError

Served = LocalPolicy | VLLMPolicy


@dataclass(frozen=True)
class ServePolicyConfig:
    """Serve a policy over HTTP."""

    policy: str
    """Shipped policy, checkpoint folder or hub id."""
    backend: Literal["auto", "vllm", "inprocess"] = "auto"
    """vllm batches in vLLM's engine, inprocess in this module; auto: vllm where it is installed."""
    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs a token."""
    port: int = 8600
    """0 takes a free one; the first line of output names it."""
    token: str | None = None
    """Secret that requests must show; WORLDLOOP_TOKEN keeps it out of the process list."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    """Of the inprocess backend; vLLM takes the GPU where there is one."""
    max_batch: int = 64
    """Rows in one forward pass."""
    threads: int = 2
    """CPU threads of the inprocess backend; vLLM reads OMP_NUM_THREADS."""
    gpu_memory: float = 0.9
    """Share of the GPU's memory that vLLM may take."""
    weights_root: Path | None = None
    """Folder under which /weights may read checkpoints; None: only from the body."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        positive(self, "max_batch", "threads")
        if not 0 <= self.port < 65536:
            raise UserError(f"port is {self.port}; expected 0..65535")
        if self.weights_root is not None and not self.weights_root.is_dir():
            raise UserError(f"weights_root: {self.weights_root}: no such folder")
        if not is_loopback(self.host) and not self.secret:
            raise UserError(
                f"host {self.host} can be reached from other machines: give --token (or "
                "WORLDLOOP_TOKEN), or serve on 127.0.0.1"
            )

    @property
    def secret(self) -> str | None:
        return self.token or os.environ.get("WORLDLOOP_TOKEN")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ---------------------------------------------------------------- one thread owns the network


@dataclass
class _Job:
    rows: int = 0
    frames: npt.NDArray[np.uint8] | None = None
    instructions: tuple[str, ...] = ()
    weights: Mapping[str, Tensor] | Path | None = None
    version: Any = None
    future: Future[tuple[Tensor | None, int]] = field(default_factory=Future)


class Batcher:
    """Runs the network in a thread of its own: what waits together is answered together."""

    def __init__(self, policy: Served, max_batch: int, max_waiting: int) -> None:
        self.policy, self.max_batch, self.max_waiting = policy, max_batch, max_waiting
        self.waiting = 0  # rows; read and written under the lock
        self._lock = threading.Lock()
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._held: _Job | None = None  # taken from the queue, but of another kind
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)
        self._thread.start()

    def logits(
        self, frames: npt.NDArray[np.uint8], instructions: tuple[str, ...]
    ) -> Future[tuple[Tensor | None, int]]:
        """(logits [B,N,256], version). Raises RequestError 503 where too much waits."""
        return self._put(_Job(len(frames), frames, instructions))

    def update(
        self, weights: Mapping[str, Tensor] | Path, version: Any
    ) -> Future[tuple[Tensor | None, int]]:
        """(None, new version)."""
        return self._put(_Job(weights=weights, version=version))

    def stop(self) -> None:
        """Answer what waits, then end the thread."""
        self._jobs.put(None)
        self._thread.join(timeout=30)

    def _put(self, job: _Job) -> Future[tuple[Tensor | None, int]]:
        with self._lock:
            if self.waiting and self.waiting + job.rows > self.max_waiting:
                raise RequestError("server", f"busy: {self.waiting} rows wait; ask again", 503)
            self.waiting += job.rows
        self._jobs.put(job)
        return job.future

    def _run(self) -> None:
        while True:
            job = self._held or self._jobs.get()
            self._held = None
            if job is None:
                return
            batch = [job] if job.weights is not None else self._more(job)
            wanted = [one for one in batch if one.future.set_running_or_notify_cancel()]
            try:
                if job.weights is not None and wanted:
                    version = self.policy.update_weights(job.weights, job.version)
                    job.future.set_result((None, version))
                elif wanted:
                    self._answer(wanted)
            except BaseException as error:  # the thread outlives any one request
                for one in wanted:
                    if not one.future.done():
                        one.future.set_exception(error)
            with self._lock:
                self.waiting -= sum(one.rows for one in batch)

    def _more(self, first: _Job) -> list[_Job]:
        """`first` and what waits behind it with frames of the same shape, while it fits."""
        assert first.frames is not None
        batch, rows = [first], first.rows
        while rows < self.max_batch:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)  # for the loop to see
                break
            same = job.frames is not None and job.frames.shape[1:] == first.frames.shape[1:]
            if not same or rows + job.rows > self.max_batch:
                self._held = job
                break
            batch.append(job)
            rows += job.rows
        return batch

    def _answer(self, batch: list[_Job]) -> None:
        frames = np.concatenate([job.frames for job in batch if job.frames is not None])
        instructions = [text for job in batch for text in job.instructions]
        parts = [
            self.policy.logits(frames[i : i + self.max_batch], instructions[i : i + self.max_batch])
            for i in range(0, len(frames), self.max_batch)
        ]
        logits = torch.cat(parts).float().cpu()
        for job, rows in zip(batch, logits.split([job.rows for job in batch])):
            job.future.set_result((rows, self.policy.version))


# ---------------------------------------------------------------- HTTP


def make_app(policy: Served, batcher: Batcher, config: ServePolicyConfig) -> FastAPI:
    """The four routes."""
    limits, secret = config.limits, config.secret
    app = FastAPI(title="worldloop policy", docs_url=None, redoc_url=None)

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        content = {"error": " ".join(error.message.split()), "field": error.field}
        return JSONResponse(content, error.status)

    @app.exception_handler(UserError)
    async def refuse_plain(request: Request, error: UserError) -> Response:
        return JSONResponse({"error": " ".join(str(error).split()), "field": "request"}, 422)

    def authorise(request: Request) -> None:
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        if secret and not hmac.compare_digest(shown.encode(), secret.encode()):
            raise RequestError("authorization", "wrong or missing token", 401)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": policy.version, "waiting": batcher.waiting}

    @app.get("/policy")
    async def facts(request: Request) -> dict[str, Any]:
        authorise(request)
        return {
            "policy": config_to_dict(policy.config),
            "network": config_to_dict(policy.network_config),
            "statistics": config_to_dict(policy.statistics),
            "limits": config_to_dict(limits),
            "version": policy.version,
            "backend": "vllm" if isinstance(policy, VLLMPolicy) else "inprocess",
        }

    @app.post("/logits")
    async def logits(request: Request) -> Response:
        authorise(request)
        body = await read_body(request, limits.max_body_mb * 2**20)
        frames, instructions = check_request(*unpack(body), limits)
        policy.check_prompts(instructions)
        answer, version = await asyncio.wrap_future(batcher.logits(frames, instructions))
        assert answer is not None
        return Response(pack({"logits": answer}, {"version": version}), media_type=MEDIA_TYPE)

    @app.post("/weights")
    async def weights(request: Request) -> dict[str, int]:
        authorise(request)
        source: Mapping[str, Tensor] | Path
        as_json = request.headers.get("content-type", "").startswith("application/json")
        body = await read_body(request, 2**20 if as_json else limits.max_weights_mb * 2**20)
        if as_json:
            fields = read_object(body)
            source = allowed_folder(fields.pop("folder", None), config.weights_root)
        else:
            source, fields = unpack(body)
        version = fields.pop("version", None)
        if fields:
            raise RequestError(next(iter(fields)), "unknown field")
        try:
            _, now = await asyncio.wrap_future(batcher.update(source, version))
        except RequestError:
            raise
        except UserError as error:
            raise RequestError("weights", str(error)) from error
        return {"version": now}

    return app


async def read_body(request: Request, most: int) -> bytes:
    """The body, never more than `most` bytes of it in memory."""
    chunks: list[bytes] = []
    declared = request.headers.get("content-length", "0")
    size = int(declared) if declared.isdigit() else 0
    too_large = RequestError("body", f"more than {most // 2**20} MiB", 413)
    if size > most:
        raise too_large
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON object, or RequestError."""
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise RequestError("body", f"not valid JSON ({error})", 400) from error
    if not isinstance(fields, dict):
        raise RequestError("body", "expected a JSON object", 400)
    return fields


def allowed_folder(name: Any, root: Path | None) -> Path:
    """The folder that a request names, links resolved, under `root`; or RequestError."""
    if not isinstance(name, str):
        raise RequestError("folder", f"{name!r}; expected the path of a checkpoint folder")
    if root is None:
        raise RequestError("folder", "this server was started without --weights-root", 403)
    folder = (root / name).resolve()
    if not folder.is_relative_to(root.resolve()):
        raise RequestError("folder", "outside the server's --weights-root", 403)
    if not (folder / "config.json").is_file():
        raise RequestError("folder", f"{name}: no checkpoint there")
    return folder


# ---------------------------------------------------------------- the verb


def load_policy(config: ServePolicyConfig) -> Served:
    """The policy behind the backend that was asked for."""
    vllm = find_spec("vllm") is not None
    dtype: torch.dtype = getattr(torch, config.dtype)
    if config.backend == "vllm" and not vllm:
        raise UserError("backend vllm: vLLM is not installed here; use --backend inprocess")
    if config.backend == "vllm" or (config.backend == "auto" and vllm):
        return VLLMPolicy(
            config.policy,
            dtype=dtype,
            max_batch=config.max_batch,
            views=config.limits.max_views,
            gpu_memory_utilization=config.gpu_memory,
        )
    torch.set_num_threads(config.threads)
    policy = LocalPolicy.from_pretrained(config.policy, device=config.device, dtype=dtype)
    assert isinstance(policy, LocalPolicy)
    return policy


class Server:
    """A bound address, the network's thread and uvicorn; `run` blocks until a signal or `stop`."""

    def __init__(self, policy: Served, config: ServePolicyConfig) -> None:
        """Binds the address. Raises UserError where it is taken."""
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            self.socket = socket.create_server((config.host, config.port), family=family)
        except OSError as error:
            raise UserError(
                f"{config.host}:{config.port}: cannot listen there ({error.strerror}); "
                "choose another --port"
            ) from error
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.url = f"http://{host}:{self.socket.getsockname()[1]}"
        self.policy = policy
        self.batcher = Batcher(policy, config.max_batch, config.limits.max_waiting)
        app = make_app(policy, self.batcher, config)
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))

    def run(self) -> None:
        """Serve; returns once every answer under way is out."""
        try:
            self._uvicorn.run(sockets=[self.socket])
        finally:
            self.batcher.stop()
            self.policy.close()

    def stop(self) -> None:
        """Ask `run` to return."""
        self._uvicorn.should_exit = True


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(ServePolicyConfig, argv, "worldloop serve policy")
    server = Server(load_policy(config), config)
    kind = "vllm" if isinstance(server.policy, VLLMPolicy) else "inprocess"
    print(f"{server.url} serves {config.policy} ({kind}); stop with Ctrl-C", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both stop it cleanly
    try:
        server.run()
    except KeyboardInterrupt:
        print("stopped", flush=True)
    return 0
