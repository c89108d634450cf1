"""`worldloop bench policy`: milliseconds an observation, beside the matrix-product ceiling.

On a GPU preset `7b` in bf16 at batch 32, elsewhere `tiny` in fp32 at batch 16; random weights of
the real shapes (speed does not need trained ones). Acting is timed on rows that all differ and in
groups of 8 that begin alike, as GRPO's do. Correctness comes first: a batch must give the logits
that its rows give alone, or no speed is printed. FLOPs are counted from the shapes: two for
each weight and token of a matrix product, four for each pair of tokens and channel in attention.

Shape letters: B rows, S tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from worldloop.bench import timing
from worldloop.cli import parse_config
from worldloop.config import positive
from worldloop.engine.policy.action_tokens import Statistics
from worldloop.engine.policy.base import Observation
from worldloop.engine.policy.openvla_oft import PRESETS, OpenVLAConfig, OpenVLAOFT, tiny_config
from worldloop.engine.policy.vision import ViTConfig
from worldloop.engine.policy.vla import PolicyConfig, VLAPolicy, token_logprobs
from worldloop.errors import UserError
from worldloop.types import ActionSpec

MEMBERS = 8  # of a group
INSTRUCTION = "push the blue cube onto the target"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative L2 of batched against alone


@dataclass(frozen=True)
class PolicyBench:
    """Time the policy's forward pass; write bench JSON into a folder."""

    out: Path = Path("runs/bench")
    preset: str | None = None
    """tiny or 7b; without it 7b on a GPU, else tiny."""
    batch: int | None = None
    repeats: int = 20
    threads: int = 2
    device: str | None = None

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise UserError(f"preset is {self.preset!r}; known: {', '.join(PRESETS)}")
        positive(self, "batch", "repeats", "threads")


def vit_flops(config: ViTConfig) -> int:
    """Of the blocks that are used (all but the last) for one picture."""
    prefix = 0 if config.registers is None else 1 + config.registers
    S, D = config.patches + prefix, config.width
    block = 2 * S * (4 * D * D + 2 * D * config.mlp_width) + 4 * S * S * D
    return (config.depth - 1) * block + 2 * config.patches * 3 * config.patch**2 * D


def policy_flops(config: OpenVLAConfig, prompt: int) -> int:
    """Of one observation with one picture and a prompt of that many tokens."""
    llama, vision = config.llama, config.dino.width + config.siglip.width
    N, D = config.dino.patches, llama.width
    S = N + prompt + config.action_tokens + 1
    projector = 2 * N * (4 * vision * vision + 4 * vision * D + D * D)
    layer = 2 * S * (4 * D * D + 3 * D * llama.mlp_width) + 4 * S * S * D
    head = 2 * config.action_tokens * D * 256
    towers = vit_flops(config.dino) + vit_flops(config.siglip)
    return towers + projector + llama.depth * layer + head


def make_policy(
    name: str, device: torch.device, dtype: torch.dtype, spec: ActionSpec | None = None
) -> VLAPolicy:
    """Random weights of the real shapes, made on the device; 24 actions, a chunk, or a spec's.

    7b sees its pictures as the published checkpoint does: behind a JPEG round trip, cropped.
    """
    spec, published = spec or ActionSpec(chunk=24), name == "7b"
    config = tiny_config(spec.dim, spec.chunk)
    if published:
        config = OpenVLAConfig(action_dim=spec.dim, chunk=spec.chunk)
    with torch.device("meta"):
        network = OpenVLAOFT(config)
    network = network.to(dtype).to_empty(device=device)
    network.init_weights(0)
    statistics = Statistics((-1.0,) * 7, (1.0,) * 7, (True,) * 6 + (False,))
    how = PolicyConfig(spec, "bench", jpeg=published, crop=published)
    return VLAPolicy(network.eval(), how, statistics)


def observation(policy: VLAPolicy, frames_BVHW3: npt.NDArray[np.uint8]) -> Observation:
    """What so many episodes show before their first chunk."""
    B = len(frames_BVHW3)
    poses = np.zeros((B, policy.action_spec.dim), np.float32)
    return Observation(frames_BVHW3[:, None], poses, (INSTRUCTION,) * B, tuple(range(B)), 0)


@torch.inference_mode()
def bench(config: PolicyBench) -> dict[str, Any]:
    """Measure; the document that is written."""
    torch.set_num_threads(config.threads)
    device = timing.device_of(config.device)
    preset = config.preset or ("7b" if device.type == "cuda" else "tiny")
    batch = config.batch or (32 if preset == "7b" else 16)
    dtype = timing.dtype_of(None, device)
    policy = make_policy(preset, device, dtype)
    side = 256 if preset == "7b" else 128  # of the world model's frames
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (batch, 1, side, side, 3), np.uint8)
    texts = [INSTRUCTION] * batch

    together = policy.logits(frames, texts)
    alone = torch.cat([policy.logits(frames[i : i + 1], texts[:1]) for i in range(2)])
    error = float((together[:2] - alone).norm() / alone.norm())
    grouped = np.repeat(frames[: -(-batch // MEMBERS)], MEMBERS, 0)[:batch]
    apart, alike = observation(policy, frames), observation(policy, grouped)
    acted = policy.act(alike, 0)
    assert acted.tokens is not None and acted.logprobs is not None
    tokens = torch.from_numpy(acted.tokens).to(together.device).flatten(1)
    expected = token_logprobs(policy.logits(grouped, texts), tokens, policy.temperature)[0].cpu()
    got = torch.from_numpy(acted.logprobs).flatten(1)
    error = max(error, float((got - expected).norm() / expected.norm()))
    if not error <= TOLERANCE[dtype]:
        raise UserError(f"batched rows differ from single ones by {error:.2e}; no speed for that")

    pictures = policy.pictures(frames)
    ceilings = timing.Ceilings(dtype, device).measure()
    repeats = config.repeats
    runs = {
        "network": lambda: policy.forward(pictures, texts),
        "whole": lambda: policy.logits(frames, texts),
        "acting": lambda: policy.act(apart, 0),
        "acting in groups": lambda: policy.act(alike, 0),
    }
    for run in runs.values():
        run()
    found = timing.interleaved(runs, repeats, device)
    times, whole = found["network"], found["whole"]
    memory = timing.peak_memory(lambda: policy.logits(frames, texts), device)
    prompt = policy.prompts([INSTRUCTION])[0].shape[1]
    flops = policy_flops(policy.network_config, prompt)
    ceiling = ceilings.measure().gemm
    values = {
        "preset": preset,
        "batch": batch,
        "dtype": timing.dtype_name(dtype),
        "frames": [side, side],
        "actions": policy.action_spec.chunk,
        "parity_relative_l2": error,
        "ms_per_observation": 1000 * times.p50 / batch,
        "ms_per_observation_p95": 1000 * times.p95 / batch,
        "ms_per_observation_with_image_chain": 1000 * whole.p50 / batch,
        "ms_per_episode_acting": 1000 * found["acting"].p50 / batch,
        "ms_per_episode_acting_in_groups": 1000 * found["acting in groups"].p50 / batch,
        "gflop_per_observation": flops / 1e9,
        "tflops": flops * batch / times.p50 / 1e12,
        "gemm_ceiling_tflops": ceiling / 1e12,
        "share_of_gemm_ceiling": flops * batch / times.p50 / ceiling,
        "peak_memory_gib": memory.get("peak_gib"),
    }
    return timing.document("policy", config, device, config.threads, values)


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(PolicyBench, argv, "worldloop bench policy")
    found = bench(config)
    path = timing.write(config.out, f"policy-{found['preset']}", found)
    print(
        f"policy {found['preset']}, batch {found['batch']}, {found['dtype']}: "
        f"{found['ms_per_observation']:.2f} ms an observation, {found['tflops']:.3g} TFLOP/s = "
        f"{found['share_of_gemm_ceiling']:.0%} of the matrix-product ceiling "
        f"({found['gemm_ceiling_tflops']:.3g}); {path}"
    )
    return 0
