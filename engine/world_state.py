"""Where B imagined episodes stand: passed into `WorldModel.step` and handed back by it.

Shape letters: B rows (episodes), C latent channels, H W pixels, h w latent sides, A action dim,
T actions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldloop.checkpoint import load_checkpoint, save_checkpoint
from worldloop.engine.kv_cache import KVRing
from worldloop.engine.vae import Stream
from worldloop.errors import UserError
from worldloop.files import PathLike
from worldloop.types import Actions

if TYPE_CHECKING:
    from worldloop.engine.world_model import WorldModel

KIND = "world_state"


@dataclass(frozen=True)
class WorldState:
    """Rows are episodes.

    ``cursor`` is the number of latent frames so far and ``chunk`` the number of chunks: host
    integers, so that no step waits for the device. ``ring`` is None for a model that can only be
    sampled by the reference procedure.
    """

    ring: KVRing | None
    decoder: Stream
    still: Tensor  # [B,2,3,H,W] fp32 start frames, recorded and decoded (`engine.still`)
    last_latent: Tensor  # [B,C,1,h,w] fp32
    seeds: tuple[int, ...]  # noise seed of each row
    poses: npt.NDArray[np.float32]  # [B,A] pose after the last action
    past_actions: Actions  # [B,<=lag,A] the commands that the next pose depends on, too
    high: npt.NDArray[np.int64]  # [B] consecutive frames above the reward threshold at the end
    done: npt.NDArray[np.bool_]  # [B] a success was held
    threshold: npt.NDArray[np.float32]  # [B] a reward above it, for so many frames, is a success
    held_frames: npt.NDArray[np.int64]  # [B]
    cursor: int = 1
    chunk: int = 0

    @property
    def rows(self) -> int:
        return len(self.seeds)

    def fork(self, n: int, seeds: Sequence[int] | None = None) -> WorldState:
        """Each row n times (row b becomes b*n .. b*n+n-1), as n fresh starts with these seeds.

        Without ``seeds`` the copies share their row's world noise. Raises UserError.
        """
        if n < 1:
            raise UserError(f"fork: n is {n}; expected at least 1")
        rows = [row for row in range(self.rows) for _ in range(n)]
        if seeds is not None and len(seeds) != len(rows):
            raise UserError(f"fork: seeds has {len(seeds)} entries for {len(rows)} rows")
        forked = self.select(rows)
        if seeds is None:
            return forked
        return dataclasses.replace(forked, seeds=tuple(int(seed) for seed in seeds))

    def select(self, rows: Sequence[int]) -> WorldState:
        """The given rows, in that order (repeats allowed); everything is copied."""
        rows = list(rows)
        if not rows or not all(0 <= row < self.rows for row in rows):
            raise UserError(f"select: rows {rows}; expected some of 0..{self.rows - 1}")
        index = torch.tensor(rows, device=self.last_latent.device)
        return dataclasses.replace(
            self,
            ring=None if self.ring is None else self.ring.select(rows),
            decoder=self.decoder.select(rows),
            still=self.still.index_select(0, index),
            last_latent=self.last_latent.index_select(0, index),
            seeds=tuple(self.seeds[row] for row in rows),
            poses=self.poses[rows],
            past_actions=self.past_actions[rows],
            high=self.high[rows],
            done=self.done[rows],
            threshold=self.threshold[rows],
            held_frames=self.held_frames[rows],
        )

    @staticmethod
    def join(states: Sequence[WorldState]) -> WorldState:
        """The rows of several states that are equally far, in that order; everything is copied.

        Raises UserError where they are not, or come from different world models.
        """
        first = states[0]
        places = [(state.cursor, state.chunk, state.past_actions.shape[1:]) for state in states]
        if len(set(places)) > 1 or len({state.ring is None for state in states}) > 1:
            raise UserError(
                f"join: states are at chunks {[state.chunk for state in states]} and latent "
                f"frames {[state.cursor for state in states]}; join equals only"
            )
        rings = [state.ring for state in states if state.ring is not None]
        return dataclasses.replace(
            first,
            ring=KVRing.join(rings) if rings else None,
            decoder=Stream.cat([state.decoder for state in states]),
            still=torch.cat([state.still for state in states]),
            last_latent=torch.cat([state.last_latent for state in states]),
            seeds=tuple(seed for state in states for seed in state.seeds),
            poses=np.concatenate([state.poses for state in states]),
            past_actions=np.concatenate([state.past_actions for state in states]),
            high=np.concatenate([state.high for state in states]),
            done=np.concatenate([state.done for state in states]),
            threshold=np.concatenate([state.threshold for state in states]),
            held_frames=np.concatenate([state.held_frames for state in states]),
        )

    def judge(
        self, reward_BT: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Success [B,T]: rewards above a row's threshold for as long as its rule asks; and for how
        many frames [B] they have been so at the end.
        """
        high = self.high
        above = reward_BT > self.threshold[:, None]
        success = np.zeros_like(above)
        for t in range(reward_BT.shape[1]):
            high = np.where(above[:, t], high + 1, 0)
            success[:, t] = high >= self.held_frames
        return success, high

    # ------------------------------------------------------------ on disk

    def save(self, folder: PathLike) -> Path:
        """Write the state as one folder (safetensors and JSON); old or new, never a mixture."""
        tensors = {"last_latent": self.last_latent, "still": self.still}
        for name in ("poses", "past_actions", "high", "done", "threshold", "held_frames"):
            tensors[name] = torch.from_numpy(np.ascontiguousarray(getattr(self, name)))
        tensors |= {f"decoder.{i}": slot for i, slot in enumerate(self.decoder.decoder)}
        ring = self.ring
        if ring is not None:
            for i, (k, v) in enumerate(ring.history()):
                tensors |= {f"ring.{i}.k": k, f"ring.{i}.v": v}
        facts = {
            "seeds": list(self.seeds),
            "cursor": self.cursor,
            "chunk": self.chunk,
            "decoder_slots": len(self.decoder.decoder),
            "ring": None
            if ring is None
            else {
                "sink": ring.sink,
                "window": ring.window,
                "tokens_per_frame": ring.tokens_per_frame,
                "frames": ring.frames,
            },
        }
        return save_checkpoint(folder, {"state": tensors}, facts, kind=KIND)

    @classmethod
    def load(cls, folder: PathLike, world: WorldModel) -> WorldState:
        """Read a state that `save` wrote, onto the device of the world model that continues it.

        The world model must be the one that made it: sizes are compared, weights are not.
        Raises UserError naming the folder.
        """
        checkpoint = load_checkpoint(folder, kind=KIND)
        facts, tensors = checkpoint.config, checkpoint.parts.get("state", {})
        config, device = world.config, world.device
        try:
            last = tensors["last_latent"].to(device)
            seeds, cursor = tuple(int(seed) for seed in facts["seeds"]), int(facts["cursor"])
            shape = (len(seeds), config.dit.latent_channels, 1, *config.reward.grid)
            if tuple(last.shape) != shape:
                raise UserError(
                    f"{folder}: last_latent has shape {list(last.shape)}, the world model's is "
                    f"{list(shape)}; load it with the world model that made it"
                )
            ring = None
            if facts["ring"] is not None:
                pairs = [
                    (tensors[f"ring.{i}.k"], tensors[f"ring.{i}.v"])
                    for i in range(sum(name.endswith(".k") for name in tensors))
                ]
                ring = KVRing.restore(
                    config.dit, pairs, **facts["ring"], dtype=pairs[0][0].dtype, device=device
                )
                if (ring.sink, ring.window) != (config.sink, config.window):
                    raise UserError(
                        f"{folder}: sink {ring.sink} and window {ring.window}, the world model "
                        f"has {config.sink} and {config.window}"
                    )
            slots = tuple(tensors[f"decoder.{i}"].to(device) for i in range(facts["decoder_slots"]))
            return cls(
                ring=ring,
                decoder=Stream((), slots, len(seeds)),
                still=tensors["still"].to(device),
                last_latent=last,
                seeds=seeds,
                poses=tensors["poses"].numpy(),
                past_actions=tensors["past_actions"].numpy(),
                high=tensors["high"].numpy(),
                done=tensors["done"].numpy(),
                threshold=tensors["threshold"].numpy(),
                held_frames=tensors["held_frames"].numpy(),
                cursor=cursor,
                chunk=int(facts["chunk"]),
            )
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{folder}: not a whole world state ({error}); save it again"
            ) from error
        except UserError as error:
            text = str(error)
            raise UserError(text if str(folder) in text else f"{folder}: {text}") from error
