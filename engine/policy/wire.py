"""What travels between a policy server and its clients, and how both check it.

A body is a safetensors file: eight bytes of length, a JSON header that names every tensor with its
dtype, shape and place, then the numbers. Its string metadata hold one key, ``worldloop``, with a
JSON object of plain fields. Every size is known and checked before a number is read; nothing in it
can be run.

    POST /logits    frames uint8 [B,V,H,W,3]; fields: instructions, a list of B strings
    answer          logits float32 [B,N,256]; fields: version
    POST /weights   the network's tensors under their published names; fields: version (optional);
                    or JSON {"folder": checkpoint under the server's --weights-root, "version": 3}
    errors          JSON {"error": one line, "field": the offending one} with a 4xx or 5xx status
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from worldloop.config import positive
from worldloop.engine.formats.openvla import read_shards
from worldloop.errors import UserError

KEY = "worldloop"
MEDIA_TYPE = "application/vnd.safetensors"
MAX_HEADER = 2**20


class RequestError(UserError):
    """A request that cannot be answered; `field` is what to mend, `status` what HTTP calls it."""

    def __init__(self, field: str, message: str, status: int = 422) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message, self.status = field, message, status


@dataclass(frozen=True)
class Limits:
    """The largest request that a server answers."""

    max_rows: int = 256
    """Rows of one request."""
    max_views: int = 1
    """Frames of one row."""
    max_side: int = 1024
    """Pixels of a frame's side."""
    max_instruction: int = 256
    """Characters of an instruction."""
    max_body_mb: int = 64
    """Bytes of a request for logits, in MiB."""
    max_weights_mb: int = 1024
    """Bytes of a weight update that comes as a body, in MiB."""
    max_waiting: int = 1024
    """Rows that may wait for their turn; more are sent away with 503."""

    def __post_init__(self) -> None:
        positive(self, *vars(self))


# ---------------------------------------------------------------- bodies


def pack(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> bytes:
    """Tensors and plain JSON fields as one body."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, {KEY: json.dumps(dict(fields))})


def unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `pack`. Raises RequestError for bytes that are nothing of the kind."""
    try:
        (length,) = struct.unpack("<Q", body[:8])
        if length > MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(body[8 : 8 + length])
        fields = json.loads(header.get("__metadata__", {}).get(KEY, "{}"))
        if not isinstance(fields, dict):
            raise ValueError(f"metadata {KEY!r} is not a JSON object")
        return safetensors.torch.load(body), fields
    except (struct.error, ValueError, AttributeError, TypeError, SafetensorError) as error:
        raise RequestError("body", f"not a safetensors file ({error})", 400) from error


# ---------------------------------------------------------------- checks


def check_request(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any], limits: Limits
) -> tuple[npt.NDArray[np.uint8], tuple[str, ...]]:
    """Frames [B,V,H,W,3] and B instructions of a request, or RequestError naming the field."""
    for what, found, known in (
        ("tensor", tensors, "frames"),
        ("field", fields, "instructions"),
    ):
        if known not in found:
            raise RequestError(known, f"missing {what}")
        strays = sorted(set(found) - {known})
        if strays:
            raise RequestError(strays[0], f"unknown {what}; expected {known!r} alone")
    frames, instructions = tensors["frames"], fields["instructions"]
    if frames.dtype != torch.uint8 or frames.dim() != 5 or frames.shape[-1] != 3:
        raise RequestError(
            "frames", f"{frames.dtype} {list(frames.shape)}; expected uint8 [B, V, H, W, 3]"
        )
    if not isinstance(instructions, list):
        raise RequestError("instructions", "expected a list of strings")
    B, V, H, W, _ = frames.shape
    for what, size, most in (
        ("rows", B, limits.max_rows),
        ("views", V, limits.max_views),
        ("pixels of height", H, limits.max_side),
        ("pixels of width", W, limits.max_side),
    ):
        if not 1 <= size <= most:
            raise RequestError("frames", f"{size} {what}; this server takes 1..{most}")
    check_instructions(instructions, B, limits.max_instruction)
    return frames.numpy(), tuple(instructions)


def check_instructions(instructions: Sequence[Any], rows: int, longest: int) -> None:
    """B non-empty strings of at most `longest` characters, or RequestError."""
    if len(instructions) != rows:
        raise RequestError("instructions", f"{len(instructions)} for {rows} rows of frames")
    for i, text in enumerate(instructions):
        if not isinstance(text, str) or not text.strip():
            raise RequestError(f"instructions[{i}]", f"{text!r}; expected what the robot is to do")
        if len(text) > longest:
            raise RequestError(f"instructions[{i}]", f"{len(text)} characters; at most {longest}")


def next_version(given: Any, present: int) -> int:
    """The version of a weight update: the next one, or a given later one."""
    if given is None:
        return present + 1
    if type(given) is not int:
        raise RequestError("version", f"{given!r}; expected a whole number")
    if given <= present:
        raise RequestError("version", f"{given} is not after the present {present}", 409)
    return given


def read_weights(weights: Mapping[str, Tensor] | Path) -> dict[str, Tensor]:
    """Tensors of an update, from a checkpoint folder where that is given; all finite numbers."""
    tensors = read_shards(weights) if isinstance(weights, Path) else dict(weights)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not torch.isfinite(tensor).all():
            raise RequestError(name, "holds NaN or infinity; the present weights stay")
    return tensors
