"""OpenVLA-OFT: a frame and an instruction to a chunk of action tokens in one bidirectional pass.

The language model reads [BOS, patches, (proprio), prompt, A placeholders, STOP]; the placeholders'
embeddings are zero, so their positions alone tell them apart. The 256 logits of action token i are
read one token earlier, from the last prompt token on. Parameter names are the published ones: 982
tensors in preset `7b`. Facts: openvla/openvla-oft at 213c5ff.

Shape letters: B rows, V images, N vision tokens, P prompt tokens, A action tokens (chunk times
action dimension), D width, S state numbers.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloop.engine.policy.action_tokens import BINS
from worldloop.engine.policy.llama import LlamaConfig, LlamaLM
from worldloop.engine.policy.vision import (
    DINOV2_L,
    DINOV2_TINY,
    SIGLIP_SO400M,
    SIGLIP_TINY,
    VisionBackbone,
    ViTConfig,
)
from worldloop.errors import UserError

BOS, STOP = 1, 2
BYTE_0 = 3  # id of byte 0: Llama's byte tokens, which are the whole tokenizer of `tiny`


@dataclass(frozen=True)
class OpenVLAConfig:
    """Everything that decides shapes and arithmetic; stored beside the weights."""

    dino: ViTConfig = DINOV2_L
    siglip: ViTConfig = SIGLIP_SO400M
    llama: LlamaConfig = LlamaConfig()
    text_vocab: int = 32000  # the tokenizer's size; its last 256 ids are the action bins
    space_id: int = 29871  # the lone space that ends every prompt
    action_dim: int = 7
    chunk: int = 8

    def __post_init__(self) -> None:
        if self.action_dim < 1 or self.chunk < 1:
            raise UserError("OpenVLAConfig: action_dim and chunk must be at least 1")
        if self.dino.patches != self.siglip.patches or (
            self.dino.image_size != self.siglip.image_size
        ):
            raise UserError("OpenVLAConfig: both towers need the same image_size and patches")
        if not BINS < self.text_vocab < self.llama.vocab_rows:
            raise UserError(
                f"OpenVLAConfig.text_vocab is {self.text_vocab}; expected more than {BINS} and "
                f"fewer than llama.vocab_rows ({self.llama.vocab_rows})"
            )

    @property
    def action_tokens(self) -> int:
        return self.action_dim * self.chunk

    @property
    def first_action_id(self) -> int:
        return self.text_vocab - BINS

    @property
    def pad_id(self) -> int:
        return self.text_vocab

    @property
    def image_size(self) -> int:
        return self.dino.image_size


def _tiny() -> OpenVLAConfig:
    llama = LlamaConfig(width=192, depth=6, heads=6, mlp_width=512, vocab_rows=576)
    return OpenVLAConfig(
        dino=DINOV2_TINY,
        siglip=SIGLIP_TINY,
        llama=llama,
        text_vocab=BYTE_0 + 256 + BINS,
        space_id=BYTE_0 + ord(" "),
    )


PRESETS: dict[str, Callable[[], OpenVLAConfig]] = {"7b": OpenVLAConfig, "tiny": _tiny}


class Projector(nn.Module):
    """Vision features to the language model's width; exact GELUs."""

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_width, 4 * vision_width)
        self.fc2 = nn.Linear(4 * vision_width, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class OpenVLAOFT(nn.Module):
    """The network. Construct under `torch.device("meta")` where weights are to be loaded."""

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_backbone = VisionBackbone(config.dino, config.siglip)
        self.projector = Projector(config.dino.width + config.siglip.width, config.llama.width)
        self.language_model = LlamaLM(config.llama)

    def init_weights(self, seed: int = 0) -> None:
        """From-scratch start: matrices with fan-in scaled normal noise, biases zero, norms one."""
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name.endswith("bias"):
                    p.zero_()
                elif p.dim() == 1:
                    p.fill_(1)
                else:
                    table = p.dim() == 3 or "embed_tokens" in name
                    std = 0.02 if table else 1 / math.sqrt(p[0].numel())
                    p.normal_(std=std, generator=generator)

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    def hidden(
        self,
        pixels_BCHW: Tensor,
        ids_BP: Tensor,
        mask_BP: Tensor | None = None,
        *,
        proprio_B1D: Tensor | None = None,
        stop: bool = True,
        checkpoint_blocks: bool = False,
    ) -> Tensor:
        """Hidden states that predict the action tokens, [B,A,D] in the network's dtype.

        pixels_BCHW: [B,6V,H,W] as `vision.normalise_frames` makes them; cast to the network's
            dtype.
        ids_BP, mask_BP: as `pad_prompts` makes them: BOS, padding, the rest. None: no padding.
        proprio_B1D: a token from `ProprioProjector`, placed after the patches.
        stop: False leaves STOP out, as RLinf's variant does: other logits, the same otherwise.
        Raises UserError for shapes that do not fit, naming the argument.
        """
        config, trunk = self.config, self.language_model.model
        A, D = config.action_tokens, config.llama.width
        B, P = self._check_prompts(ids_BP, mask_BP)
        if pixels_BCHW.shape[0] != B:
            raise UserError(f"pixels have {pixels_BCHW.shape[0]} rows, the prompts {B}")
        patches_BND = self.projector(self.vision_backbone(pixels_BCHW.to(self.dtype)))
        text_BPD = trunk.embed_tokens(ids_BP)
        parts = [text_BPD[:, :1], patches_BND]
        if proprio_B1D is not None:
            shape = tuple(proprio_B1D.shape)
            if shape != (B, 1, D):
                raise UserError(f"proprio_B1D has shape {list(shape)}; expected {[B, 1, D]}")
            parts.append(proprio_B1D.to(self.dtype))
        vision_tokens = sum(part.shape[1] for part in parts) - 1
        parts.append(text_BPD[:, 1:])
        parts.append(text_BPD.new_zeros(B, A, D))  # the placeholders, as published
        if stop:
            parts.append(trunk.embed_tokens(ids_BP.new_full((B, 1), STOP)))
        mask = None
        if mask_BP is not None:
            seen = mask_BP.new_ones(B, vision_tokens)
            tail = mask_BP.new_ones(B, A + stop)
            mask = torch.cat([mask_BP[:, :1], seen, mask_BP[:, 1:], tail], dim=1)
        out_BSD = trunk(torch.cat(parts, dim=1), mask, checkpoint_blocks=checkpoint_blocks)
        first = vision_tokens + P - 1  # the last prompt token predicts the first action token
        return out_BSD[:, first : first + A]

    def logits(
        self,
        pixels_BCHW: Tensor,
        ids_BP: Tensor,
        mask_BP: Tensor | None = None,
        *,
        proprio_B1D: Tensor | None = None,
        stop: bool = True,
        checkpoint_blocks: bool = False,
    ) -> Tensor:
        """Float32 logits [B,A,256] of the action bins; index i is vocabulary id
        `config.first_action_id + i`, its action `action_tokens.from_tokens(i)`. A runs over the
        chunk's steps, action dimension fastest. Arguments and errors: `hidden`."""
        hidden_BAD = self.hidden(
            pixels_BCHW,
            ids_BP,
            mask_BP,
            proprio_B1D=proprio_B1D,
            stop=stop,
            checkpoint_blocks=checkpoint_blocks,
        )
        return self.action_logits(hidden_BAD)

    forward = logits

    def action_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [...,D] to float32 logits [...,256] of the action bins."""
        first = self.config.first_action_id
        return F.linear(hidden, self.language_model.lm_head.weight[first : first + BINS]).float()

    def _check_prompts(self, ids_BP: Tensor, mask_BP: Tensor | None) -> tuple[int, int]:
        if ids_BP.dim() != 2 or ids_BP.shape[1] < 2 or ids_BP.dtype != torch.long:
            raise UserError(
                f"ids_BP is {ids_BP.dtype} {list(ids_BP.shape)}; expected int64 [B, P], P >= 2"
            )
        if mask_BP is not None and (mask_BP.shape != ids_BP.shape or mask_BP.dtype != torch.bool):
            raise UserError(
                f"mask_BP is {mask_BP.dtype} {list(mask_BP.shape)}; "
                f"expected bool {list(ids_BP.shape)}"
            )
        return ids_BP.shape[0], ids_BP.shape[1]


# ---------------------------------------------------------------- prompts


def prompt_text(instruction: str) -> str:
    """The published prompt, before its closing lone space. Raises UserError when empty."""
    if not instruction.strip():
        raise UserError("instruction is empty; say what the robot is to do")
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


def encode_bytes(text: str) -> list[int]:
    """The tokenizer of preset `tiny`: BOS and Llama's byte tokens."""
    return [BOS, *(BYTE_0 + byte for byte in text.encode("utf-8"))]


def prompt_ids(
    instruction: str,
    config: OpenVLAConfig,
    encode: Callable[[str], Sequence[int]] = encode_bytes,
) -> list[int]:
    """Token ids of one prompt: BOS first, the lone space last.

    encode: text to ids with BOS; for `7b` that of the checkpoint's own Llama tokenizer.
    """
    ids = list(encode(prompt_text(instruction)))
    if not ids or ids[0] != BOS:
        raise UserError(f"encode gave ids {ids[:3]}...; expected BOS ({BOS}) first")
    if max(ids) >= config.text_vocab:
        raise UserError(f"encode gave id {max(ids)}; this model's text has {config.text_vocab} ids")
    return ids if ids[-1] == config.space_id else [*ids, config.space_id]


def pad_prompts(
    prompts: Sequence[Sequence[int]], config: OpenVLAConfig, length: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """ids [B,P] int64 and mask [B,P] bool (None where nothing is padded).

    Padding stands between BOS and the rest, so that every row's actions start at one place.
    length: P, where it is to be fixed (for compiled graphs); None is the longest prompt's.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 2:
        raise UserError("prompts: expected at least one, each of BOS and more")
    P = max(lengths) if length is None else length
    if max(lengths) > P:
        raise UserError(f"a prompt has {max(lengths)} tokens; length allows {P}")
    rows = [[p[0], *[config.pad_id] * (P - len(p)), *p[1:]] for p in prompts]
    ids = torch.tensor(rows, dtype=torch.long)
    return ids, None if min(lengths) == P else ids != config.pad_id


def tiny_config(action_dim: int = 7, chunk: int = 8) -> OpenVLAConfig:
    """Preset `tiny` for another chunk; no weight's shape depends on it."""
    return dataclasses.replace(_tiny(), action_dim=action_dim, chunk=chunk)
