"""Policies whose network runs elsewhere: in a vLLM engine of this process, or behind HTTP.

Both are a `Policy` that samples as `VLAPolicy` does, since only `logits` is theirs:

    policy = VLLMPolicy("runs/sft/policy")              # this process, GPU or CPU
    policy = HTTPPolicy("http://127.0.0.1:8600")        # `worldloop serve policy`
    policy.update_weights(learner.network.state_dict()) # no restart; policy.version grows

Shape letters: B rows, V views, H W pixels, N action tokens of a chunk.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldloop.checkpoint import load_into, resolve_pretrained
from worldloop.config import config_from_dict
from worldloop.engine.formats.openvla import read_config, read_statistics
from worldloop.engine.policy.action_tokens import BINS, Statistics
from worldloop.engine.policy.openvla_oft import OpenVLAConfig, prompt_ids
from worldloop.engine.policy.vla import (
    TEMPERATURE,
    PolicyConfig,
    TokenPolicy,
    VLAPolicy,
    encoder,
    tokenizer_of,
)
from worldloop.engine.policy.wire import (
    MEDIA_TYPE,
    Limits,
    RequestError,
    check_instructions,
    next_version,
    pack,
    read_weights,
    unpack,
)
from worldloop.errors import UserError
from worldloop.files import PathLike

Weights = Mapping[str, Tensor] | PathLike
"""The network's state dict, or a checkpoint folder."""

RETRIED = (502, 503, 504)  # a proxy without its server, or a server with a full queue


class PolicyServerError(UserError, ConnectionError):
    """The policy server is gone, and stayed gone for all retries."""


class LocalPolicy(VLAPolicy):
    """`VLAPolicy` with the checks and the weight updates of a served policy."""

    def check_prompts(self, instructions: Sequence[str]) -> None:
        """Raise UserError for an instruction that cannot be answered."""
        for text in instructions:  # not `prompts`: a copy to the device would wait for its work
            self._prompt(text)

    def update_weights(self, weights: Weights, version: int | None = None) -> int:
        """New weights, whole and strict; returns the new version. UserError leaves the old ones."""
        version = next_version(version, self.version)
        tensors = read_weights(_source(weights))
        load_into(self.network, tensors, "weights")
        self.version = version
        return version

    def close(self) -> None:
        """Nothing to stop."""


class VLLMPolicy(TokenPolicy):
    """A policy in a vLLM engine of this process; `close` when done."""

    def __init__(
        self,
        name: PathLike,
        *,
        temperature: float = TEMPERATURE,
        coherence: float = 0.0,
        dtype: torch.dtype = torch.float32,
        max_batch: int = 64,
        max_prompt: int = 320,
        views: int = 1,
        **options: Any,
    ) -> None:
        """name: what `VLAPolicy.from_pretrained` takes.

        max_batch: rows in one forward pass; any number may be asked for.
        max_prompt: most tokens of a prompt; views: most frames of a row.
        options: further arguments of `vllm.LLM`, for instance gpu_memory_utilization=0.4 beside a
            learner. vLLM is silent but for errors; VLLM_LOGGING_LEVEL=INFO lets it speak.
        vLLM seeds this process's global random generators and, on a CPU, lets nobody change
        torch's number of threads from here on.
        Raises UserError for a checkpoint that does not fit, ModuleNotFoundError without vLLM.
        """
        folder = resolve_pretrained(name)
        config = PolicyConfig.load(folder)
        spec = config.action_spec
        network = read_config(folder)
        super().__init__(
            config,
            network,
            read_statistics(folder, config.suite, action_dim=spec.dim),
            temperature,
            coherence,
        )
        encode = encoder(tokenizer_of(folder, network))
        self._prompt = lru_cache(maxsize=4096)(lambda text: prompt_ids(text, network, encode))
        self.max_prompt, self.views = max_prompt, views
        for key, value in (
            ("VLLM_LOGGING_LEVEL", "ERROR"),  # read when vLLM is imported, as are the others
            ("VLLM_NO_USAGE_STATS", "1"),
            ("VLLM_CPU_KVCACHE_SPACE", "1"),  # GiB; there is no KV cache, the default takes 15
            ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ):
            os.environ.setdefault(key, value)
        from worldloop.engine.policy.vllm_plugin import PolicyEngine

        self.engine = PolicyEngine(
            folder,
            network,
            dtype=dtype,
            max_batch=max_batch,
            max_prompt=max_prompt,
            views=views,
            options=options,
        )

    def check_prompts(self, instructions: Sequence[str]) -> None:
        """Raise UserError for an instruction that cannot be answered."""
        for i, text in enumerate(instructions):
            tokens = len(self._prompt(text))
            if tokens > self.max_prompt:
                raise RequestError(
                    f"instructions[{i}]", f"a prompt of {tokens} tokens; at most {self.max_prompt}"
                )

    def logits(self, frames_BVHW3: npt.NDArray[np.uint8], instructions: Sequence[str]) -> Tensor:
        """Float32 logits [B,N,256] on the CPU."""
        frames = np.asarray(frames_BVHW3)
        _check_frames(frames)
        if not 1 <= frames.shape[1] <= self.views:
            raise RequestError("frames", f"{frames.shape[1]} views; this engine takes {self.views}")
        check_instructions(instructions, len(frames), 2**20)
        self.check_prompts(instructions)
        return self.engine.logits(frames, [self._prompt(text) for text in instructions])

    def update_weights(self, weights: Weights, version: int | None = None) -> int:
        """New weights, whole and strict; returns the new version. UserError leaves the old ones."""
        version = next_version(version, self.version)
        self.engine.update(_source(weights))
        self.version = version
        return version

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class HTTPPolicy(TokenPolicy):
    """A policy behind `worldloop serve policy`. `version` is that of the latest answer.

    Once weights were sent, only answers of those weights are taken: a server that was started
    anew, or that another learner sends to, is a PolicyServerError.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        temperature: float = TEMPERATURE,
        coherence: float = 0.0,
        timeout_s: float = 120.0,
        retries: int = 6,
        backoff_s: float = 0.25,
    ) -> None:
        """Ask the server what it serves.

        token: what the server was started with; WORLDLOOP_TOKEN by default.
        timeout_s: of one answer. retries: after a lost connection or a 503, the first after
            ``backoff_s`` seconds, each after twice as long as the one before, at most 5 s.
        Raises PolicyServerError where nobody answers.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url!r}: expected http://host:port of a policy server")
        if retries < 0 or backoff_s < 0 or timeout_s <= 0:
            raise UserError("retries and backoff_s must not be negative, timeout_s positive")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._parts, self._token = parts, token or os.environ.get("WORLDLOOP_TOKEN")
        self.timeout_s, self.retries, self.backoff_s = timeout_s, retries, backoff_s
        facts = self._json("GET", "/policy")
        self.limits = config_from_dict(Limits, facts["limits"], f"{url}: limits")
        super().__init__(
            config_from_dict(PolicyConfig, facts["policy"], f"{url}: policy"),
            config_from_dict(OpenVLAConfig, facts["network"], f"{url}: network"),
            config_from_dict(Statistics, facts["statistics"], f"{url}: statistics"),
            temperature,
            coherence,
        )
        self.version = int(facts["version"])
        self._sent: int | None = None

    def logits(self, frames_BVHW3: npt.NDArray[np.uint8], instructions: Sequence[str]) -> Tensor:
        """Float32 logits [B,N,256]; more rows than one request takes go in several."""
        frames = np.asarray(frames_BVHW3)
        _check_frames(frames)
        check_instructions(instructions, len(frames), self.limits.max_instruction)
        room = self.limits.max_body_mb * 2**20 - 2**19  # the header, with its instructions, aside
        most = max(1, min(self.limits.max_rows, room // frames[0].nbytes))
        parts = []
        for start in range(0, len(frames), most):
            rows = slice(start, start + most)
            body = pack(
                {"frames": torch.from_numpy(np.ascontiguousarray(frames[rows]))},
                {"instructions": list(instructions[rows])},
            )
            tensors, fields = unpack(self._ask("POST", "/logits", body, MEDIA_TYPE))
            parts.append(self._checked(tensors, fields, len(frames[rows])))
        return torch.cat(parts)

    def _checked(self, tensors: dict[str, Tensor], fields: dict[str, Any], rows: int) -> Tensor:
        expected = (rows, self.network_config.action_tokens, BINS)
        logits = tensors.get("logits")
        if logits is None or tuple(logits.shape) != expected or logits.dtype != torch.float32:
            raise UserError(
                f"{self.url}: answered with something other than float32 logits {list(expected)}; "
                "it serves another policy now: connect anew"
            )
        self.version = int(fields["version"])
        if self._sent is not None and self.version != self._sent:
            raise PolicyServerError(
                f"{self.url}: answers with version {self.version}, but was sent version "
                f"{self._sent}: it was started anew, or has another learner; run again to go on"
            )
        return logits

    def update_weights(self, weights: Weights, version: int | None = None) -> int:
        """Send a state dict, or name a folder that the server can read; returns the new version."""
        present = int(self._json("GET", "/health")["version"])
        version = next_version(version, present)
        source = _source(weights)
        if isinstance(source, Mapping):
            body, kind = pack(source, {"version": version}), MEDIA_TYPE
            if len(body) > self.limits.max_weights_mb * 2**20:
                raise UserError(
                    f"weights have {len(body) / 2**20:.0f} MiB, {self.url} takes "
                    f"{self.limits.max_weights_mb}: raise its --limits.max-weights-mb, or save a "
                    "checkpoint and give its folder"
                )
        else:
            body = json.dumps({"folder": str(source.resolve()), "version": version}).encode()
            kind = "application/json"
        try:
            self._ask("POST", "/weights", body, kind)
        except RequestError as error:
            # A retry after a lost answer: the first attempt had arrived.
            if error.status != 409 or self._json("GET", "/health")["version"] != version:
                raise
        self.version = self._sent = version
        return version

    def close(self) -> None:
        """Nothing is kept open."""

    # ------------------------------------------------------------ one exchange

    def _json(self, method: str, path: str) -> dict[str, Any]:
        return dict(json.loads(self._ask(method, path)))

    def _ask(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        """The body of a 200. RequestError for other answers, PolicyServerError for none."""
        headers = {"Content-Type": kind} if kind else {}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(5.0, self.backoff_s * 2 ** (attempt - 1)))
            try:
                status, answer = self._once(method, path, body, headers)
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return answer
            field, reason = _error_of(answer, status)
            if status not in RETRIED:
                raise RequestError(field, f"{reason} ({self.url}{path})", status)
        raise PolicyServerError(
            f"{self.url}: no answer after {self.retries + 1} attempts ({reason}); "
            "start `worldloop serve policy` again, or check the address"
        )

    def _once(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, bytes]:
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        host = self._parts.hostname or ""
        connection = kinds[self._parts.scheme](host, self._parts.port, timeout=self.timeout_s)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def _error_of(answer: bytes, status: int) -> tuple[str, str]:
    """(field, message) of an error's JSON body."""
    try:
        document = json.loads(answer)
        return str(document["field"]), str(document["error"])
    except (ValueError, KeyError, TypeError):
        return "server", f"HTTP status {status}"


def _source(weights: Weights) -> Mapping[str, Tensor] | Any:
    """A state dict as it is; a name as its folder."""
    return weights if isinstance(weights, Mapping) else resolve_pretrained(weights)


def _check_frames(frames: npt.NDArray[Any]) -> None:
    if frames.ndim != 5 or frames.dtype != np.uint8 or frames.shape[-1] != 3 or not frames.size:
        raise RequestError(
            "frames", f"{frames.dtype} {list(frames.shape)}; expected uint8 [B, V, H, W, 3]"
        )
