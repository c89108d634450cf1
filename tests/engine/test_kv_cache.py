"""The ring against a sliding window kept as a plain list, and its copies against fresh rings."""

import math

import pytest
import torch
from torch import Tensor

from worldloop.engine.dit import DiT, DiTConfig
from worldloop.engine.kv_cache import KVRing
from worldloop.errors import UserError

CONFIG = DiTConfig(width=48, depth=2, heads=2, adaln_rank=8, context_dim=0)
S = 4  # tokens per frame of 4x4 latents


@pytest.fixture
def dit() -> DiT:
    model = DiT(CONFIG).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
    return model


def latents(rows: int, frames: int, seed: int) -> Tensor:
    return torch.randn(rows, 16, frames, 4, 4, generator=torch.Generator().manual_seed(seed))


def marked_frames(rows: int, first: int, frames: int):
    """Keys and values that say which row and frame they belong to."""
    frame = torch.arange(first, first + frames).repeat_interleave(S).float()
    row = torch.arange(rows).float()[:, None]
    k = (1000 * row + frame)[:, :, None, None].expand(rows, frames * S, 2, 24)
    return [(k + 0.25, k + 0.75)] * CONFIG.depth


def frames_held(ring: KVRing, row: int = 0) -> list[int]:
    k, v = ring.history()[-1]
    assert torch.equal(k + 0.5, v)
    return [int(x) for x in k[row, ::S, 0, 0] % 1000]


@torch.no_grad()
@pytest.mark.parametrize(
    ("sink", "window", "blocks"),
    [
        (1, 3, (1, 2, 2, 3, 1, 2)),  # wraps in the middle of a block
        (1, 6, (1, 6, 6, 6)),  # a block as large as the window
        (0, 4, (3, 3, 3)),
        (2, 2, (1, 2, 2, 1, 1)),  # the sink itself is filled across two blocks
    ],
)
def test_ring_equals_a_sliding_window(dit, sink, window, blocks):
    ring = KVRing.empty(CONFIG, 2, S, sink=sink, window=window)
    naive: list[list[tuple[Tensor, Tensor]]] = []  # per frame, per block of the network
    first = 0
    for i, frames in enumerate(blocks):
        kept = naive[:sink] + naive[sink:][-window:]
        expected_history = None
        if kept:
            expected_history = [
                (torch.cat([f[b][0] for f in kept], 1), torch.cat([f[b][1] for f in kept], 1))
                for b in range(CONFIG.depth)
            ]
        x, t = latents(2, frames, seed=i), torch.full((2, frames), 0.3)
        expected = dit(x, t, first_frame=first, history=expected_history)
        out = dit(x, t, first_frame=first, history=ring.history())
        torch.testing.assert_close(out.sample, expected.sample, rtol=1e-5, atol=1e-5)

        ring = ring.append(out.kv)
        for f in range(frames):
            part = slice(f * S, (f + 1) * S)
            naive.append([(k[:, part], v[:, part]) for k, v in expected.kv])
        first += frames
    assert ring.frames == first


def test_slots_are_overwritten_in_place_and_never_moved():
    ring = KVRing.empty(CONFIG, 1, S, sink=1, window=3)
    storage = ring.storage.keys[0].data_ptr()
    held = []
    for first, frames in ((0, 1), (1, 2), (3, 2), (5, 3), (8, 1)):
        ring = ring.append(marked_frames(1, first, frames))
        held.append(frames_held(ring))
    assert held == [[0], [0, 1, 2], [0, 4, 2, 3], [0, 7, 5, 6], [0, 7, 8, 6]]
    assert ring.storage.keys[0].data_ptr() == storage


def test_sink_and_window_may_be_filled_by_one_block():
    ring = KVRing.empty(CONFIG, 1, S, sink=1, window=6).append(marked_frames(1, 0, 7))
    assert frames_held(ring) == [0, 1, 2, 3, 4, 5, 6]
    ring = ring.append(marked_frames(1, 7, 6))
    assert frames_held(ring) == [0, 7, 8, 9, 10, 11, 12]


def test_copied_rows_equal_fresh_rings(dit):
    x, t = latents(2, 2, seed=9), torch.zeros(2, 2)
    with torch.no_grad():
        ring = KVRing.empty(CONFIG, 2, S, window=4).append(dit(x, t).kv)
        forked = ring.select([0, 0, 0, 1, 1, 1])
        repeated = x.repeat_interleave(3, dim=0)
        fresh = KVRing.empty(CONFIG, 6, S, window=4).append(dit(repeated, torch.zeros(6, 2)).kv)
    assert forked.rows == 6 and forked.frames == 2
    for (fk, fv), (k, v) in zip(forked.history(), fresh.history(), strict=True):
        torch.testing.assert_close(fk, k)
        torch.testing.assert_close(fv, v)
    before = ring.history()[0][0].clone()
    forked.append(marked_frames(6, 2, 2))
    assert torch.equal(ring.history()[0][0], before)  # the original is untouched
    ring.append(marked_frames(2, 2, 1))  # and still usable


def test_select_and_join_keep_rows_apart():
    ring = KVRing.empty(CONFIG, 3, S, window=2)
    for first in range(4):
        ring = ring.append(marked_frames(3, first, 1))
    picked = ring.select([2, 0, 2])
    assert [int(x) // 1000 for x in picked.history()[0][0][:, 0, 0, 0]] == [2, 0, 2]
    assert frames_held(picked, row=1) == frames_held(ring, row=0) == [0, 3, 2]
    joined = KVRing.join([picked, ring])
    assert joined.rows == 6 and joined.frames == 4
    assert torch.equal(joined.history()[1][1][3:], ring.history()[1][1])
    with pytest.raises(UserError, match="frames seen"):
        KVRing.join([picked, ring.append(marked_frames(3, 4, 1))])


def test_a_ring_made_in_inference_mode_can_be_used_outside(dit):
    with torch.inference_mode():
        ring = KVRing.empty(CONFIG, 1, S, window=2)
        ring = ring.append(dit(latents(1, 1, 0), torch.zeros(1, 1)).kv).select([0, 0])
    x, t = latents(2, 1, 1), torch.zeros(2, 1)
    out = dit(x, t, first_frame=1, history=ring.history())
    out.sample.sum().backward()
    assert not ring.append(out.kv).history()[0][0].requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ring: ring.append(marked_frames(2, 0, 5)), "5 latent frames into a window of 4"),
        (lambda ring: ring.append(marked_frames(2, 0, 1)[:1]), "kv has 1 blocks; expected 2"),
        (lambda ring: ring.append(marked_frames(3, 0, 1)), r"kv\[0\] has shape \[3"),
        (lambda ring: ring.append([(torch.zeros(2, 5, 2, 24),) * 2] * 2), "no whole latent frames"),
        (lambda ring: ring.select([2]), "expected some of 0..1"),
        (lambda ring: ring.select([]), "expected some of 0..1"),
        (lambda ring: (ring.append(marked_frames(2, 0, 1)), ring.history()), "use the ring that"),
        (lambda ring: KVRing.empty(CONFIG, 1, S, window=0), "window 0"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(UserError, match=message):
        call(KVRing.empty(CONFIG, 2, S, sink=0, window=4))
