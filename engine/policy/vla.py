"""A vision-language-action policy: frames and instructions to chunks of actions, as 256-bin tokens.

`TokenPolicy` is everything but the network's forward pass: sampling, log-probabilities and the
way from bins to the environment's units. What gives it logits is a subclass: `VLAPolicy` here (the
network in this process), and the served policies, which ask a vLLM server. So all of them sample
alike: an episode's tokens depend on (seed, episode, chunk) and the logits alone.

    folder/config.json, model-*.safetensors, dataset_statistics.json    the published layout
    folder/policy.json                                                  `PolicyConfig`

Shape letters: B rows, V views, H W pixels, T actions of a chunk, A action dim, N = T*A tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldloop.checkpoint import resolve_pretrained
from worldloop.config import config_from_dict, config_to_dict, read_json
from worldloop.engine.formats.openvla import load_openvla, read_statistics, save_openvla
from worldloop.engine.policy.action_tokens import BINS, Statistics, from_tokens, to_tokens
from worldloop.engine.policy.base import Observation, PolicyAction
from worldloop.engine.policy.images import prepare_frames, prepare_tensor
from worldloop.engine.policy.openvla_oft import (
    OpenVLAConfig,
    OpenVLAOFT,
    encode_bytes,
    pad_prompts,
    prompt_ids,
)
from worldloop.engine.policy.vision import normalise_frames
from worldloop.engine.precision import device_of
from worldloop.engine.sampler import derive_seed
from worldloop.errors import UserError
from worldloop.files import PathLike, atomic_write_bytes, atomic_write_text
from worldloop.kernels.action_logprobs import action_logprobs
from worldloop.types import Actions, ActionSpec, Frames

POLICY = "policy.json"
TOKENIZER = "tokenizer.json"
TEMPERATURE = 1.6  # of rollouts, after SimpleVLA-RL; validation is greedy (0)


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy's numbers mean, beside the network; stored as policy.json."""

    action_spec: ActionSpec
    suite: str
    """Key of dataset_statistics.json."""
    rotate: bool = False
    """Turn frames by 180 degrees (LIBERO's raw camera)."""
    jpeg: bool = False
    """JPEG round trip of frames, as the published policies saw them in training."""
    crop: bool = False
    """Central 90 % of the area, as published policies evaluate."""
    binary_gripper: bool = False
    """The network's gripper is 0 (closed) or 1 (open), as published; else it is an action in
    [-1, 1] like the others."""
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How the weights were made: data, steps, commit."""

    @classmethod
    def load(cls, folder: Path) -> PolicyConfig:
        """Read policy.json; errors name the file."""
        return config_from_dict(cls, read_json(folder / POLICY), str(folder / POLICY))


class TokenPolicy(ABC):
    """A `Policy` (`engine/policy/base.py`) over logits that a subclass provides.

    temperature: of sampling; 0 is greedy. ``coherence``: how alike the draws of one action
    dimension are from step to step, see `uniform_draws`. ``version`` counts weight updates, so that
    a rollout can say which weights acted.
    """

    reads_frames = True

    def __init__(
        self,
        config: PolicyConfig,
        network: OpenVLAConfig,
        statistics: Statistics,
        temperature: float = TEMPERATURE,
        coherence: float = 0.0,
    ) -> None:
        spec = config.action_spec
        if (network.action_dim, network.chunk) != (spec.dim, spec.chunk):
            raise UserError(
                f"the policy's network has action_dim {network.action_dim} and chunk "
                f"{network.chunk}, its ActionSpec {spec.dim} and {spec.chunk}; they must agree"
            )
        if statistics.dim != spec.dim:
            raise UserError(
                f"statistics have {statistics.dim} dimensions, actions {spec.dim}; "
                "these are the statistics of another robot"
            )
        if not 0 <= temperature <= 100:
            raise UserError(f"temperature is {temperature}; expected 0 (greedy) .. 100")
        if not 0 <= coherence < 1:
            raise UserError(f"coherence is {coherence}; expected at least 0 and below 1")
        self.config, self.network_config, self.statistics = config, network, statistics
        self.temperature, self.coherence = temperature, coherence
        self.version = 0

    @property
    def action_spec(self) -> ActionSpec:
        return self.config.action_spec

    @abstractmethod
    def logits(self, frames_BVHW3: npt.NDArray[np.uint8], instructions: Sequence[str]) -> Tensor:
        """Float32 logits [B,N,256] on the CPU or the network's device."""

    @torch.no_grad()  # inference mode would cast every weight anew at each pass under autocast
    def act(self, observation: Observation, seed: int) -> PolicyAction:
        """Actions, tokens and log-probabilities [B,T,A] for the latest frame of each row."""
        frames = _latest(observation.frames)
        # Members of a group begin alike: their first chunk is one forward pass and many draws.
        first, which = distinct(frames, observation.instructions)
        logits = self.logits(frames[first], [observation.instructions[i] for i in first])[which]
        seeds = [derive_seed(seed, episode) for episode in observation.episodes]
        spec = self.action_spec
        uniform = uniform_draws(seeds, spec.chunk, spec.dim, self.coherence)
        tokens, logprobs = sample_tokens(logits, uniform, self.temperature)
        shape = (len(frames), spec.chunk, spec.dim)
        chosen = tokens.cpu().numpy().reshape(shape)
        return PolicyAction(
            self.to_actions(chosen), chosen, logprobs.float().cpu().numpy().reshape(shape)
        )

    def to_actions(self, tokens_BTA: npt.NDArray[np.int64]) -> Actions:
        """Tokens to actions in environment units, within the ActionSpec's bounds."""
        spec = self.action_spec
        actions = self.statistics.unnormalise(from_tokens(tokens_BTA))
        if self.config.binary_gripper:
            opened = np.sign(2 * actions[..., -1] - 1)
            actions[..., -1] = opened if spec.gripper == "open_positive" else -opened
        return np.clip(actions, spec.low, spec.high).astype(np.float32)

    def to_tokens(self, actions_BTA: Actions) -> npt.NDArray[np.int64]:
        """The inverse, for training: environment actions to tokens [B,T,A]."""
        actions = np.array(actions_BTA, np.float32)
        if self.config.binary_gripper:
            sign = 1 if self.action_spec.gripper == "open_positive" else -1
            actions[..., -1] = (sign * actions[..., -1] > 0).astype(np.float32)
        return to_tokens(self.statistics.normalise(actions))


class VLAPolicy(TokenPolicy):
    """OpenVLA-OFT in this process: acts, and recomputes log-probabilities with gradients."""

    def __init__(
        self,
        network: OpenVLAOFT,
        config: PolicyConfig,
        statistics: Statistics,
        *,
        temperature: float = TEMPERATURE,
        coherence: float = 0.0,
        tokenizer: Path | None = None,
    ) -> None:
        """tokenizer: the checkpoint's tokenizer.json, kept with what is saved; None: bytes."""
        super().__init__(config, network.config, statistics, temperature, coherence)
        self.network, self.tokenizer = network, tokenizer
        encode = encoder(tokenizer)
        self._prompt = lru_cache(maxsize=4096)(
            lambda text: prompt_ids(text, network.config, encode)
        )

    # ------------------------------------------------------------ forward

    def pictures(self, frames_BVHW3: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """Camera frames to the towers' pictures, uint8 [B,V,S,S,3] (`images.prepare_frames`).

        They are resampled where they are, or on the network's GPU: a host takes milliseconds a
        frame. Only a JPEG round trip needs the host.
        """
        config, size = self.config, self.network_config.image_size
        if isinstance(frames_BVHW3, Tensor):
            if config.jpeg:
                raise UserError(
                    "this policy wants frames behind a JPEG round trip, which is made on the host; "
                    "give a numpy array, or set jpeg to false in policy.json"
                )
            views = frames_BVHW3.shape[:2]
            flat = frames_BVHW3.flatten(0, 1)
            pictures = prepare_tensor(flat, size, rotate=config.rotate, crop=config.crop)
            return pictures.unflatten(0, views)
        frames = np.ascontiguousarray(frames_BVHW3)
        if frames.ndim != 5 or frames.dtype != np.uint8:
            raise UserError(
                f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [B, V, H, W, 3]"
            )
        if self.network.device.type == "cuda" and not config.jpeg:
            return self.pictures(torch.from_numpy(frames).to(self.network.device))
        B, V = frames.shape[:2]
        prepared = prepare_frames(
            frames.reshape(B * V, *frames.shape[2:]),
            size,
            rotate=config.rotate,
            jpeg=config.jpeg,
            crop=config.crop,
        )
        return torch.from_numpy(prepared).reshape(B, V, size, size, 3)

    def prompts(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Token ids [B,P] and mask [B,P] (None where no row is padded), on the device."""
        ids, mask = pad_prompts([self._prompt(t) for t in instructions], self.network_config)
        device = self.network.device
        return ids.to(device), None if mask is None else mask.to(device)

    def forward(
        self,
        pictures_BVSS3: Tensor,
        instructions: Sequence[str],
        *,
        checkpoint_blocks: bool = False,
    ) -> Tensor:
        """Pictures of `pictures` to float32 logits [B,N,256]; differentiable."""
        pixels = normalise_frames(pictures_BVSS3.to(self.network.device), self.network.dtype)
        ids, mask = self.prompts(instructions)
        logits: Tensor = self.network(pixels, ids, mask, checkpoint_blocks=checkpoint_blocks)
        return logits

    @torch.no_grad()
    def logits(self, frames_BVHW3: npt.NDArray[np.uint8], instructions: Sequence[str]) -> Tensor:
        """Float32 logits [B,N,256] for camera frames."""
        return self.forward(self.pictures(frames_BVHW3), instructions)

    def logprobs(
        self,
        frames_BVHW3: npt.NDArray[np.uint8],
        instructions: Sequence[str],
        tokens_BTA: npt.NDArray[np.int64],
        *,
        checkpoint_blocks: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [B,T,A] of tokens at the policy's temperature, in nats.

        Differentiable; both over the 256 action bins only (SimpleVLA-RL). Rows that see the same
        share one forward and one backward pass (`distinct`): no token is an input of the network.
        """
        first, which = distinct(frames_BVHW3, instructions)
        logits = self.forward(
            self.pictures(frames_BVHW3[first]),
            [instructions[i] for i in first],
            checkpoint_blocks=checkpoint_blocks,
        )[which]
        tokens = torch.from_numpy(tokens_BTA).to(logits.device)
        logprobs, entropy = token_logprobs(logits, tokens.flatten(1), self.temperature)
        return logprobs.view(tokens.shape), entropy.view(tokens.shape)

    # ------------------------------------------------------------ checkpoints

    def save(self, folder: PathLike, dtype: torch.dtype | None = None) -> Path:
        """Write network, statistics and policy.json. ``dtype`` stores the weights so."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        s = self.statistics
        entry = {"q01": list(s.low), "q99": list(s.high), "mask": list(s.mask)}
        statistics = {self.config.suite: {"action": entry}}
        text = json.dumps(config_to_dict(self.config), indent=2) + "\n"
        atomic_write_text(target / POLICY, text)
        if self.tokenizer is not None:
            atomic_write_bytes(target / TOKENIZER, self.tokenizer.read_bytes())
        save_openvla(self.network, target, statistics=statistics, dtype=dtype)
        return target

    @classmethod
    def from_pretrained(
        cls,
        name: PathLike,
        *,
        temperature: float = TEMPERATURE,
        coherence: float = 0.0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> VLAPolicy:
        """A folder that `save` wrote, a shipped name (``policy/pushcube``) or a hub id; strict."""
        device = device_of(device)
        folder = resolve_pretrained(name)
        if not (folder / POLICY).is_file():
            raise UserError(
                f"{folder}: has no {POLICY}, which says what its actions mean; for a published "
                "OpenVLA-OFT checkpoint use VLAPolicy.from_openvla"
            )
        return cls.from_openvla(
            folder, PolicyConfig.load(folder), temperature=temperature, coherence=coherence,
            device=device, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_openvla(
        cls,
        folder: PathLike,
        config: PolicyConfig,
        *,
        temperature: float = TEMPERATURE,
        coherence: float = 0.0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        adapter: PathLike | None = None,
    ) -> VLAPolicy:
        """A published checkpoint, which does not say what its actions mean: ``config`` does.

        adapter: LoRA folder to merge. Raises UserError naming the file and what is wrong.
        """
        folder, spec = Path(folder), config.action_spec
        network = load_openvla(
            folder,
            action_dim=spec.dim,
            chunk=spec.chunk,
            dtype=dtype,
            device=device,
            adapter=None if adapter is None else Path(adapter),
        )
        statistics = read_statistics(folder, config.suite, action_dim=spec.dim)
        tokenizer = tokenizer_of(folder, network.config)
        return cls(
            network, config, statistics, temperature=temperature, coherence=coherence,
            tokenizer=tokenizer,
        )  # fmt: skip


def distinct(
    frames_BVHW3: npt.NDArray[np.uint8], instructions: Sequence[str]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows that see something new, and for every row which of those it is like: [D] and [B].

    Alike means the same bytes and words; ``frames[first][which]`` are the frames again.
    """
    seen: dict[tuple[bytes, str], int] = {}
    rows = zip(frames_BVHW3, instructions, strict=True)
    kinds = [seen.setdefault((f.tobytes(), text), len(seen)) for f, text in rows]
    which = np.array(kinds, np.int64)
    return np.unique(which, return_index=True)[1], which


# ---------------------------------------------------------------- tokens


def uniform_draws(
    seeds: Sequence[int], steps: int, dim: int, coherence: float = 0.0
) -> npt.NDArray[np.float64]:
    """Numbers in (0,1) that tokens are drawn at, [B,steps*dim]; row i's depend on seeds[i] alone.

    coherence: correlation rho in [0,1) of a dimension's draws at neighbouring steps (a Gaussian
    copula, z[t] = rho z[t-1] + sqrt(1 - rho^2) e). Each token keeps its own distribution, so its
    log-probability and ratio stay what they are; but a chunk deviates in one direction instead of
    trembling, and what it did is what its reward speaks of. The policy gradient becomes that
    of the chunk smoothed over time, as with coloured action noise (Eberhard et al. 2023).
    """
    if not 0 <= coherence < 1:
        raise UserError(f"coherence is {coherence}; expected at least 0 and below 1")
    generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
    if coherence == 0:
        return np.stack([generator.random(steps * dim) for generator in generators])
    noise = np.stack([generator.standard_normal((steps, dim)) for generator in generators])
    for t in range(1, steps):
        noise[:, t] = coherence * noise[:, t - 1] + math.sqrt(1 - coherence**2) * noise[:, t]
    normal = torch.from_numpy(noise.reshape(len(seeds), -1))
    return torch.special.ndtr(normal).numpy()


def sample_tokens(
    logits_BNK: Tensor, uniform_BN: npt.NDArray[np.float64], temperature: float
) -> tuple[Tensor, Tensor]:
    """Tokens [B,N] and their log-probabilities [B,N] at ``temperature`` (0: the likeliest, at 1).

    Each token is drawn by inverting its distribution at its uniform number.
    """
    logp = torch.log_softmax(logits_BNK.float() / (temperature or 1.0), -1)
    if temperature == 0:
        tokens = logp.argmax(-1)
    else:
        below = logp.double().exp().cumsum(-1)
        # Scaled to the sum, which rounding leaves a little beside one.
        level = torch.from_numpy(uniform_BN).to(logp.device)[..., None] * below[..., -1:]
        tokens = (below <= level).sum(-1).clamp_max(BINS - 1)
    return tokens, logp.gather(-1, tokens[..., None])[..., 0]


def token_logprobs(
    logits_BNK: Tensor, tokens_BN: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B,N] of tokens and entropies [B,N], in nats; differentiable.

    The logits are float32 whatever autocast is on, under which no kernel of ours would run.
    """
    with torch.autocast(logits_BNK.device.type, enabled=False):
        return action_logprobs(logits_BNK, tokens_BN, temperature or 1.0)


def tokenizer_of(folder: Path, config: OpenVLAConfig) -> Path | None:
    """A checkpoint's tokenizer.json; None where its text is bytes.

    Raises UserError where it is missing: ids of bytes mean other words in a published vocabulary.
    """
    path = folder / TOKENIZER
    if path.is_file():
        return path
    if config.text_vocab == OpenVLAConfig.text_vocab:
        raise UserError(
            f"{folder}: has no {TOKENIZER}, which a vocabulary of {config.text_vocab} needs; copy "
            "that of the published checkpoint"
        )
    return None


def encoder(tokenizer_file: Path | None) -> Callable[[str], Sequence[int]]:
    """Text to ids with BOS, by a tokenizer.json or as bytes."""
    if tokenizer_file is None:
        return encode_bytes
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    return lambda text: tokenizer.encode(text).ids


def _latest(frames: Frames) -> npt.NDArray[np.uint8]:
    if frames.ndim != 6 or frames.dtype != np.uint8:
        raise UserError(
            f"frames is {frames.dtype} {list(frames.shape)}; expected uint8 [B, T, V, H, W, 3]"
        )
    return frames[:, -1]
