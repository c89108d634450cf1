"""The transformer's configuration and its presets."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from worldloop.errors import UserError


@dataclass(frozen=True)
class DiTConfig:
    """Everything that decides shapes and arithmetic; stored beside the weights."""

    width: int
    depth: int
    heads: int
    latent_channels: int = 16
    patch: int = 2
    mlp_ratio: int = 4
    adaln_rank: int = 256
    context_dim: int = 1024  # 0: built without cross-attention
    context_proj_dim: int = 0  # [P25]: text states of this width are projected to context_dim
    condition_channel: bool = True  # input channel: 1 where a latent frame is given
    padding_channel: bool = True  # input channel: 1 where pixels are padding
    rope_ratio_hwt: tuple[float, float, float] = (3.0, 3.0, 1.0)
    # Angle arithmetic. [P2] casts its RoPE buffers with the network, so its angles are rounded to
    # bf16; [P25] rounds only the exponents; diffusers rounds nothing.
    rope_dtype: Literal["float32", "bfloat16", "bfloat16_exponents"] = "float32"
    max_grid: int = 120  # tokens per side
    max_frames: int = 128  # latent frames per call
    timestep_scale: float = 1.0  # multiplies c_noise before the sinusoid
    action_dim: int = 0  # A; 0: no actions
    # chunk: all poses flattened into one vector for every frame. per_frame: `actions_per_frame`
    # poses for each latent frame, a zero embedding for observed ones.
    action_layout: Literal["chunk", "per_frame"] = "chunk"
    chunk_actions: int = 12
    actions_per_frame: int = 4
    learned_positions: tuple[int, int] | None = None  # token grid (h, w) of a learned table
    prediction: Literal["velocity", "sample"] = "velocity"  # read by the sampler and training

    def __post_init__(self) -> None:
        if self.width % self.heads or self.head_dim % 2 or self.head_dim < 12:
            raise UserError(
                f"DiTConfig: width {self.width} over {self.heads} heads must give an even head "
                "dimension of at least 12 (3-D RoPE)"
            )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"DiTConfig.{name} is {getattr(self, name)!r}; one of {allowed}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def input_channels(self) -> int:
        return self.latent_channels + self.condition_channel + self.padding_channel

    @property
    def action_features(self) -> int:
        """Input width of the action MLPs."""
        poses = self.chunk_actions if self.action_layout == "chunk" else self.actions_per_frame
        return poses * self.action_dim

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DiTConfig":
        """The config of a JSON object (lists become tuples); an unknown key raises, naming it."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"DiTConfig has no field {', '.join(unknown)}")
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**plain)

    def flops(
        self,
        frames: int,
        height: int,
        width: int,
        history_tokens: int = 0,
        *,
        context_tokens: int = 0,
        actions: bool = True,
    ) -> int:
        """Multiply-adds x 2 of one row's forward pass (matrix products only).

        frames, height, width: of the latents; one noise level per frame; context_tokens 0 when
        cross-attention is skipped.
        """
        D, r = self.width, self.adaln_rank
        N = frames * (height // self.patch) * (width // self.patch)
        subs = 3 if context_tokens else 2
        modulation = frames * subs * (D * r + r * 3 * D)
        block = N * (4 + 2 * self.mlp_ratio) * D * D + 2 * N * (N + history_tokens) * D + modulation
        if context_tokens:
            L = context_tokens
            block += 2 * N * D * D + 2 * L * self.context_dim * D + 2 * N * L * D
        edges = N * D * self.patch**2 * (self.input_channels + self.latent_channels)
        conditioning = frames * (4 * D * D + D * r + r * 2 * D)
        if actions and self.action_dim:
            rows, hidden = 1 if self.action_layout == "chunk" else frames, self.mlp_ratio * D
            conditioning += rows * hidden * (2 * self.action_features + 4 * D)
        return 2 * (self.depth * block + edges + conditioning)


_CHOICES = {
    "rope_dtype": ("float32", "bfloat16", "bfloat16_exponents"),
    "action_layout": ("chunk", "per_frame"),
    "prediction": ("velocity", "sample"),
}


def tiny() -> DiTConfig:
    """For CPUs: ships trained. One fixed camera, so positions are learned; no text."""
    return DiTConfig(
        width=256,
        depth=6,
        heads=4,
        adaln_rank=64,
        context_dim=0,
        condition_channel=False,
        padding_channel=False,
        rope_ratio_hwt=(1.0, 1.0, 1.0),
        timestep_scale=1000.0,
        action_dim=7,
        action_layout="per_frame",
        learned_positions=(8, 8),
        prediction="sample",
    )


def cosmos_2b() -> DiTConfig:
    """Cosmos-Predict2-2B-Sample-Action-Conditioned as published: 12 actions of 7, one vector."""
    return DiTConfig(width=2048, depth=28, heads=16, action_dim=7, rope_dtype="bfloat16")


def cosmos_14b() -> DiTConfig:
    """Cosmos-Predict2-14B-Video2World as published: no actions (`dataclasses.replace` adds)."""
    ratio = (2.0, 2.0, 0.8333333333333334)
    return DiTConfig(width=5120, depth=36, heads=40, rope_ratio_hwt=ratio, rope_dtype="bfloat16")


PRESETS: dict[str, Callable[[], DiTConfig]] = {
    "tiny": tiny,
    "2b": cosmos_2b,
    "14b": cosmos_14b,
}
