"""History keys and values in a ring of latent-frame slots, one row per episode.

Storage is allocated once and written in place; nothing is ever rolled. The first `sink` frames
keep their slots for good, every later frame takes the slot of the oldest frame of the window.
Slot order is not time order, which attention does not mind: keys carry their position (RoPE) and
there is no mask. All rows of a ring have seen equally many frames, so the cursor is one host int
and no operation waits for the device.

Shape letters: B rows (episodes), S tokens per latent frame, N tokens of an append, M = slots * S,
h heads, K head dimension.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worldloop.engine.dit_config import DiTConfig
from worldloop.engine.dit_layers import KV
from worldloop.errors import UserError


class _Storage:
    """The tensors of a ring, shared by its successive handles, and how much was written."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], frames: int) -> None:
        self.keys = keys  # one [B,M,h,K] per block
        self.values = values
        self.frames = frames


@dataclass(frozen=True)
class KVRing:
    """A handle on the ring after `frames` latent frames.

    `append` writes into the shared storage and returns the next handle; the handle it was called
    on is spent, and using it raises. `select` and `join` copy.
    """

    sink: int
    window: int
    tokens_per_frame: int
    frames: int  # latent frames appended so far
    storage: _Storage

    @classmethod
    def empty(
        cls,
        config: DiTConfig,
        rows: int,
        tokens_per_frame: int,
        *,
        sink: int = 1,
        window: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "KVRing":
        """An empty ring for `rows` episodes: 2 * depth * [rows, (sink+window)*S, h, K] elements."""
        if rows < 1 or tokens_per_frame < 1 or sink < 0 or window < 1:
            raise UserError(
                f"KVRing: rows {rows}, tokens_per_frame {tokens_per_frame}, window {window} must "
                f"be at least 1 and sink {sink} at least 0"
            )
        shape = (rows, (sink + window) * tokens_per_frame, config.heads, config.head_dim)
        # Ordinary tensors even when called in inference mode, so that both modes may write them.
        with torch.inference_mode(False):
            keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.depth)]
            values = [torch.zeros_like(key) for key in keys]
        return cls(sink, window, tokens_per_frame, 0, _Storage(keys, values, 0))

    @classmethod
    def restore(
        cls,
        config: DiTConfig,
        history: Sequence[KV],
        *,
        sink: int,
        window: int,
        tokens_per_frame: int,
        frames: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "KVRing":
        """The ring that had this `history()` after `frames` latent frames (slot order is kept).

        Raises UserError where the tensors are not those of such a ring.
        """
        if not history:
            raise UserError("KVRing.restore: history is empty")
        ring = cls.empty(
            config, history[0][0].shape[0], tokens_per_frame, sink=sink, window=window,
            dtype=dtype, device=device,
        )  # fmt: skip
        filled = min(frames, sink + window)
        if filled and ring._frames_of(history) != filled:
            raise UserError(
                f"KVRing.restore: history holds {ring._frames_of(history)} latent frames; "
                f"expected {filled}"
            )
        tokens = filled * tokens_per_frame
        with torch.inference_mode(False), torch.no_grad():
            stores = zip(ring.storage.keys, ring.storage.values, history, strict=True)
            for keys, values, (k, v) in stores:
                keys[:, :tokens].copy_(k)
                values[:, :tokens].copy_(v)
        ring.storage.frames = frames
        return dataclasses.replace(ring, frames=frames)

    @property
    def rows(self) -> int:
        return self.storage.keys[0].shape[0]

    @property
    def filled(self) -> int:
        """Slots that hold a frame."""
        return min(self.frames, self.sink + self.window)

    def history(self) -> list[KV]:
        """One (k, v) per block, views [B, filled * S, h, K] of the storage (empty at first)."""
        self._require_current()
        tokens = self.filled * self.tokens_per_frame
        pairs = zip(self.storage.keys, self.storage.values, strict=True)
        return [(k[:, :tokens], v[:, :tokens]) for k, v in pairs]

    def append(self, kv: Sequence[KV]) -> "KVRing":
        """Store whole latent frames: one (k, v) per block, each [B, frames * S, h, K].

        Detached from autograd. Raises UserError for a shape that does not fit, or when the frames
        that fall into the window are more than the window.
        """
        self._require_current()
        frames = self._frames_of(kv)
        runs = self._runs(frames)
        S = self.tokens_per_frame
        stores = zip(self.storage.keys, self.storage.values, kv, strict=True)
        with torch.no_grad():
            for keys, values, (k, v) in stores:
                for source, slot, count in runs:
                    taken = slice(source * S, (source + count) * S)
                    put = slice(slot * S, (slot + count) * S)
                    keys[:, put].copy_(k[:, taken])
                    values[:, put].copy_(v[:, taken])
        self.storage.frames += frames
        return dataclasses.replace(self, frames=self.frames + frames)

    def select(self, rows: Sequence[int]) -> "KVRing":
        """A new ring of the given rows, in that order (repeats allowed)."""
        if not rows or not all(0 <= row < self.rows for row in rows):
            raise UserError(f"select: rows {list(rows)}; expected some of 0..{self.rows - 1}")
        index = torch.tensor(list(rows), device=self.storage.keys[0].device)
        return self._copied(lambda tensor: tensor.index_select(0, index))

    @staticmethod
    def join(rings: "Sequence[KVRing]") -> "KVRing":
        """One ring of the rows of several that agree in geometry and in frames seen."""
        first = rings[0]
        for ring in rings:
            ring._require_current()
            if (ring._geometry(), ring.frames) != (first._geometry(), first.frames):
                raise UserError(
                    "join: rings differ in geometry or in frames seen "
                    f"({[ring.frames for ring in rings]}); join equals only"
                )
        with torch.inference_mode(False), torch.no_grad():
            keys = [torch.cat(k) for k in zip(*(r.storage.keys for r in rings), strict=True)]
            values = [torch.cat(v) for v in zip(*(r.storage.values for r in rings), strict=True)]
        return dataclasses.replace(first, storage=_Storage(keys, values, first.frames))

    def _copied(self, pick: Callable[[Tensor], Tensor]) -> "KVRing":
        self._require_current()
        with torch.inference_mode(False), torch.no_grad():
            keys = [pick(key) for key in self.storage.keys]
            values = [pick(value) for value in self.storage.values]
        return dataclasses.replace(self, storage=_Storage(keys, values, self.frames))

    def _geometry(self) -> tuple[object, ...]:
        like = self.storage.keys[0]
        shape = tuple(like.shape[1:])
        blocks = len(self.storage.keys)
        return (self.sink, self.window, self.tokens_per_frame, blocks, shape, like.dtype)

    def _require_current(self) -> None:
        if self.frames != self.storage.frames:
            raise UserError(
                f"KVRing: this handle is of frame {self.frames}, its storage already holds "
                f"{self.storage.frames}; use the ring that append returned, or select before"
            )

    def _frames_of(self, kv: Sequence[KV]) -> int:
        if len(kv) != len(self.storage.keys):
            raise UserError(f"append: kv has {len(kv)} blocks; expected {len(self.storage.keys)}")
        B, _, heads, head_dim = self.storage.keys[0].shape
        N = kv[0][0].shape[1]
        frames, rest = divmod(N, self.tokens_per_frame)
        if rest or not frames:
            raise UserError(
                f"append: {N} tokens are no whole latent frames of {self.tokens_per_frame} tokens"
            )
        expected = (B, N, heads, head_dim)
        for i, pair in enumerate(kv):
            for tensor in pair:
                if tuple(tensor.shape) != expected:
                    raise UserError(
                        f"append: kv[{i}] has shape {list(tensor.shape)}; expected {list(expected)}"
                    )
        return frames

    def _runs(self, frames: int) -> list[tuple[int, int, int]]:
        """Contiguous copies (first source frame, first slot, count), at most three."""
        into_sink = max(0, min(frames, self.sink - self.frames))
        into_window = frames - into_sink
        if into_window > self.window:
            raise UserError(
                f"append: {into_window} latent frames into a window of {self.window}; "
                "append smaller blocks or make the window larger"
            )
        start = (max(self.frames, self.sink) - self.sink) % self.window
        before_wrap = min(into_window, self.window - start)
        runs = [
            (0, self.frames, into_sink),
            (into_sink, self.sink + start, before_wrap),
            (into_sink + before_wrap, self.sink, into_window - before_wrap),
        ]
        return [run for run in runs if run[2]]
