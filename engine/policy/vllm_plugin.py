"""OpenVLA-OFT inside vLLM 0.32: model, configuration and weight updates as an out-of-tree plugin.

vLLM finds `register` through the entry point group ``vllm.general_plugins``. A request carries an
instruction's token ids and one raw uint8 frame per view; its answer is [A,256] float32 logits:

    LLM.encode({"prompt_token_ids": ids, "multi_modal_data": {"image": frames_VHW3}}, ...)

(A request without an image never reaches our processor, so vLLM answers it, with numbers that mean
nothing; `VLLMPolicy` sends none.)

**The route.** A multimodal model in the pooling runner, since a request is one prefill whose answer
is a tensor, not text. What is vLLM's here: request scheduling and batching (continuous, rows packed
without padding), the processor that runs the image chain and lays out the tokens, the encoder stage
with its cache (a group that shares its start frame encodes it once), and the language model's
attention, `EncoderOnlyAttention`: bidirectional, variable length, no KV cache. What is ours: the
module itself. `engine/policy/openvla_oft.py` is built as it is, its Llama layers are handed vLLM's
attention in place of their own (`llama.attend`), and everything else, matrices, norms and rotary
embedding, runs the very code that the trainer runs, under the published parameter names. So weights
are updated by name, strictly, and the log-prob gap to the trainer is attention's rounding alone.
vLLM's own Llama layers would fuse q, k and v and bring tensor parallelism and quantisation; they
would also be a second definition of the model. Here one engine is one device: tensor and pipeline
parallel sizes other than 1 are refused. Eager mode only: a batch is one large compute-bound
prefill, where graphs have little to give.

The configuration is read by a parser of our own (config_format "worldloop"), because vLLM knows
model_type "openvla" as the causal, autoregressive model. Nothing from a checkpoint is ever run.
Tried on the CPU build; the GPU's attention back ends and Model Runner V2 are untried.

Shape letters: R requests, T tokens of all of them, V views, S side, A action tokens, D width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig
from vllm import LLM, ModelRegistry
from vllm.config import PoolerConfig, VllmConfig
from vllm.inputs import mm_input
from vllm.model_executor.layers.attention import EncoderOnlyAttention
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.interfaces_base import attn_type
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
)
from vllm.platforms import current_platform
from vllm.transformers_utils.config import register_config_parser
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from worldloop.checkpoint import load_into
from worldloop.config import config_from_dict, config_to_dict
from worldloop.engine.formats.openvla import VALUE_HEAD, read_config
from worldloop.engine.policy.images import prepare_frames
from worldloop.engine.policy.llama import LlamaConfig as TrunkConfig
from worldloop.engine.policy.llama import LlamaLayer
from worldloop.engine.policy.openvla_oft import BOS, STOP, OpenVLAConfig, OpenVLAOFT
from worldloop.engine.policy.vision import normalise_frames
from worldloop.engine.policy.vla import PolicyConfig
from worldloop.engine.policy.wire import read_weights
from worldloop.errors import UserError

ARCHITECTURE = "WorldloopOpenVLAOFT"
CONFIG_FORMAT = "worldloop"
TASK = "token_classify"  # 256 classes for each action token


def register() -> None:
    """The entry point: name the model and the configuration parser to vLLM; safe to repeat."""
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, WorldloopOpenVLAOFT)
        register_config_parser(CONFIG_FORMAT)(CheckpointParser)


# ---------------------------------------------------------------- configuration


class ServedConfig(PretrainedConfig):  # type: ignore[misc]
    """A checkpoint's config.json and policy.json as vLLM wants them."""

    model_type = "worldloop_openvla_oft"

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        pictures: dict[str, bool] | None = None,
        views: int = 1,
        **kwargs: Any,
    ) -> None:
        """network: an `OpenVLAConfig`; pictures: steps of the image chain; views: most a request
        may bring."""
        self.network = network or config_to_dict(OpenVLAConfig())
        self.pictures = pictures or {}
        self.views = views
        llama = self.openvla.llama
        self.text_config = LlamaConfig(
            hidden_size=llama.width,
            num_hidden_layers=llama.depth,
            num_attention_heads=llama.heads,
            intermediate_size=llama.mlp_width,
            vocab_size=llama.vocab_rows,
            max_position_embeddings=2**15,  # positions are computed, not looked up
        )
        self.is_causal = False
        super().__init__(**{"architectures": [ARCHITECTURE], **kwargs})

    @property
    def openvla(self) -> OpenVLAConfig:
        return config_from_dict(OpenVLAConfig, self.network, "network")

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        return self.text_config


class CheckpointParser(ConfigParserBase):  # type: ignore[misc]
    """Reads the folder that `VLAPolicy.save` writes; runs nothing from it."""

    def parse(
        self, model: str | Path, trust_remote_code: bool, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], PretrainedConfig]:
        folder = Path(model)
        policy, network = PolicyConfig.load(folder), config_to_dict(read_config(folder))
        network |= {"action_dim": policy.action_spec.dim, "chunk": policy.action_spec.chunk}
        pictures = {name: getattr(policy, name) for name in ("rotate", "jpeg", "crop")}
        config = ServedConfig(network=network, pictures=pictures, name_or_path=str(model))
        return config.to_dict(), config


# ---------------------------------------------------------------- requests


class FrameParser(MultiModalDataParser):  # type: ignore[misc]
    """One item a request: the frames of all views, uint8 [V,H,W,3]."""

    def _parse_image_data(self, data: Any) -> ProcessorBatchItems:
        frames = np.asarray(data)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise UserError(
                f"image is {frames.dtype} {list(frames.shape)}; expected uint8 [V, H, W, 3]"
            )
        return ProcessorBatchItems([frames], "image")


class ProcessingInfo(BaseProcessingInfo):  # type: ignore[misc]
    def get_data_parser(self) -> FrameParser:
        return FrameParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        config = self.get_hf_config()
        return {"image": config.views * config.openvla.dino.patches}


class DummyInputs(BaseDummyInputsBuilder):  # type: ignore[misc]
    """What vLLM measures memory with: a request of the most views."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> dict[str, Any]:
        config = self.info.get_hf_config()
        size = config.openvla.image_size
        return {"image": np.zeros((config.views, size, size, 3), np.uint8)}


class Processor(BaseMultiModalProcessor):  # type: ignore[misc]
    """Runs the image chain and lays out [BOS, patches, prompt, A placeholders, STOP]."""

    requires_tokenizer = False

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        hf_config = self.info.get_hf_config()
        config: OpenVLAConfig = hf_config.openvla
        prompt = list(inputs.prompt) or [BOS, config.space_id]  # vLLM's memory test has none
        if prompt[0] != BOS or len(prompt) < 2 or max(prompt) >= config.text_vocab:
            raise UserError(
                f"prompt_token_ids must be BOS ({BOS}) and text ids below {config.text_vocab}"
            )
        items = inputs.mm_data_items.get("image")
        if items is None or not 1 <= len(items[0]) <= hf_config.views:
            found = "none" if items is None else len(items[0])
            raise UserError(
                f"image has {found} views; this server takes 1..{hf_config.views}; set `views`"
            )
        pictures = torch.from_numpy(
            prepare_frames(items[0], config.image_size, **hf_config.pictures)
        )
        tokens = len(pictures) * config.dino.patches
        ids = [BOS, *[config.pad_id] * tokens, *prompt[1:], *[config.pad_id] * config.action_tokens]
        digest = hashlib.blake2b(pictures.numpy().tobytes(), digest_size=16).hexdigest()
        return mm_input(
            prompt_token_ids=[*ids, STOP],
            mm_kwargs=MultiModalKwargsItems.from_hf_inputs(
                {"pictures": pictures[None]}, self._get_mm_fields_config({}, {})
            ),
            mm_hashes={"image": [f"{len(pictures)}-{digest}"]},
            mm_placeholders={"image": [PlaceholderRange(offset=1, length=tokens)]},
        )

    def _get_mm_fields_config(self, hf_inputs: Any, kwargs: Any) -> Mapping[str, Any]:
        return {"pictures": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(self, *args: Any) -> Sequence[Any]:
        return []


# ---------------------------------------------------------------- the model


class PackedAttention:
    """vLLM's bidirectional attention in the place of `llama.attend`.

    The rows of a batch stand one after another on the token axis of one row; which token belongs to
    which request, vLLM keeps in its forward context. Not a module: it adds nothing to the network's
    parameters or their names.
    """

    def __init__(self, layer: EncoderOnlyAttention) -> None:
        self.layer = layer

    def __call__(self, q_1hTK: Tensor, k_1hTK: Tensor, v_1hTK: Tensor, keys: None) -> Tensor:
        _, h, T, K = q_1hTK.shape
        q, k, v = (x[0].transpose(0, 1).reshape(T, h * K) for x in (q_1hTK, k_1hTK, v_1hTK))
        out: Tensor = self.layer(q, k, v)
        return out.view(T, h, K).transpose(0, 1)[None]


class ActionPooler(Pooler):  # type: ignore[misc]
    """Hidden states [T,D] to one [A,256] of logits a request."""

    def __init__(self, network: OpenVLAOFT) -> None:
        super().__init__()
        self.action_logits = network.action_logits  # a method, so not registered twice
        self.action_tokens = network.config.action_tokens

    def get_supported_tasks(self) -> AbstractSet[str]:
        return {TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor]:
        last_R = pooling_metadata.get_pooling_cursor().last_token_indices_gpu
        # The last token is STOP, A placeholders before it; a token predicts the one behind it.
        offsets_A = torch.arange(-self.action_tokens - 1, -1, device=last_R.device)
        # Only the requests of vLLM's memory test can be shorter than A + 2.
        rows_RA = (last_R[:, None] + offsets_A).clamp_min(0)
        return list(self.action_logits(hidden_states[rows_RA]).unbind(0))


@attn_type("encoder_only")
@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class WorldloopOpenVLAOFT(nn.Module, SupportsMultiModal):  # type: ignore[misc]
    """`OpenVLAOFT` with vLLM's attention, as vLLM's runner calls a multimodal pooling model."""

    is_pooling_model = True

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        parallel = vllm_config.parallel_config
        if parallel.tensor_parallel_size != 1 or parallel.pipeline_parallel_size != 1:
            raise UserError("this policy runs on one device: tensor and pipeline parallel size 1")
        config = vllm_config.model_config.hf_config.openvla
        self.network = OpenVLAOFT(config).eval()
        self.attention = nn.ModuleList()
        llama: TrunkConfig = config.llama
        K = llama.width // llama.heads
        for i, layer in enumerate(self.network.language_model.model.layers):
            assert isinstance(layer, LlamaLayer)
            attention = EncoderOnlyAttention(
                llama.heads,
                K,
                K**-0.5,
                cache_config=vllm_config.cache_config,
                prefix=f"{prefix}.layers.{i}.attn",
            )
            self.attention.append(attention)
            layer.self_attn.attend = PackedAttention(attention)
        self.pooler = ActionPooler(self.network)

    def get_language_model(self) -> nn.Module:
        return self

    def embed_multimodal(self, **kwargs: Any) -> Sequence[Tensor]:
        """Pictures, uint8 [V,S,S,3] each, to patch features [V*patches,D] each."""
        features = []
        pictures = kwargs["pictures"]  # one tensor, or a list where views differ
        for pictures_RVSS3 in (
            [pictures] if isinstance(pictures, Tensor) else [p[None] for p in pictures]
        ):
            pixels = normalise_frames(pictures_RVSS3, self.network.dtype)
            features += self.network.projector(self.network.vision_backbone(pixels)).unbind(0)
        return features

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """[T] to [T,D]: placeholders are zero, patches stand where `is_multimodal` says."""
        config = self.network.config
        text_TD = self.network.language_model.model.embed_tokens(input_ids)
        text_TD = text_TD.masked_fill((input_ids == config.pad_id)[:, None], 0)
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            text_TD[is_multimodal] = torch.cat(list(multimodal_embeddings)).to(text_TD.dtype)
        return text_TD

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [T,D] after the final norm."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        trunk = self.network.language_model.model
        return trunk.run(inputs_embeds[None], positions[None], None)[0]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """All parameters under their published names, strictly; returns vLLM's names of them."""
        tensors = {key: value for key, value in weights if key not in VALUE_HEAD}
        load_into(self.network, tensors, "weights")
        return {f"network.{key}" for key in tensors}


# ---------------------------------------------------------------- the engine


class WorkerExtension:
    """Methods that vLLM's worker gains; called through `collective_rpc`."""

    def worldloop_update(self, weights: Mapping[str, Tensor] | str) -> None:
        """New weights, whole and strict: tensors by name, or a checkpoint folder."""
        tensors = read_weights(Path(weights) if isinstance(weights, str) else weights)
        self.model_runner.get_model().load_weights(tensors.items())  # type: ignore[attr-defined]


def require_kernels() -> None:
    """Raise UserError where vLLM's build for CPUs has none of its kernels for this one.

    vLLM itself only warns (no library for AVX2 in a wheel built for AVX-512, say) and fails later.
    """
    if not current_platform.is_cpu():
        return
    current_platform.import_kernels()
    if not any(name.startswith("_C::") for name in torch._C._dispatch_get_all_op_names()):
        raise UserError(
            f"vLLM {version('vllm')} has no kernels for this CPU (AVX-512 here: "
            f"{torch.cpu._is_avx512_supported()}); run the policy without vLLM, or on a GPU"
        )


class PolicyEngine:
    """One vLLM engine in this process, on this machine's GPU or else its CPU."""

    def __init__(
        self,
        folder: Path,
        config: OpenVLAConfig,
        *,
        dtype: torch.dtype,
        max_batch: int,
        max_prompt: int,
        views: int,
        options: Mapping[str, Any],
    ) -> None:
        """max_batch: rows in one forward pass; max_prompt: tokens of an instruction's prompt;
        options: further arguments of `vllm.LLM`, gpu_memory_utilization for instance."""
        require_kernels()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over as they are
        register()
        length = 2 + views * config.dino.patches + max_prompt + config.action_tokens
        arguments = {
            "runner": "pooling",
            "pooler_config": PoolerConfig(task=TASK),
            "config_format": CONFIG_FORMAT,
            "hf_overrides": {"views": views},
            "skip_tokenizer_init": True,
            "trust_remote_code": False,
            "load_format": "safetensors",
            "dtype": str(dtype).removeprefix("torch."),
            "enforce_eager": True,
            "max_model_len": length,
            "max_num_seqs": max_batch,
            "max_num_batched_tokens": max_batch * length,
            "enable_chunked_prefill": False,
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0,
            "worker_extension_cls": f"{__name__}.{WorkerExtension.__name__}",
            **options,
        }
        self.llm = LLM(str(folder), **arguments)

    def logits(self, frames_BVHW3: np.ndarray, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Float32 [B,A,256] on the CPU."""
        requests = [
            {"prompt_token_ids": list(prompt), "multi_modal_data": {"image": frames}}
            for prompt, frames in zip(prompts, frames_BVHW3)
        ]
        answers = self.llm.encode(requests, pooling_task=TASK, use_tqdm=False)
        return torch.stack([answer.outputs.data for answer in answers]).float()

    def update(self, weights: Mapping[str, Tensor] | Path) -> None:
        """New weights for every later request. Raises UserError; the old ones then stay."""
        given = str(weights.resolve()) if isinstance(weights, Path) else dict(weights)
        self.llm.collective_rpc("worldloop_update", args=(given,))
        self.llm.llm_engine.reset_encoder_cache()  # features of the old towers

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
