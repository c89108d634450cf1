"""Settings of `worldloop grpo`, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from worldloop.config import positive
from worldloop.engine.policy.vla import TEMPERATURE
from worldloop.engine.precision import PRECISIONS
from worldloop.engine.rollout import rows_alike
from worldloop.errors import UserError
from worldloop.rl.alarm import AlarmConfig
from worldloop.rl.learner import LearnerConfig


@dataclass(frozen=True)
class GRPOConfig:
    """GRPO inside a world model; run it again to resume. Defaults are SimpleVLA-RL's."""

    out: Path
    policy: str = "policy/pushcube"
    """Shipped name, checkpoint folder or hub id of the policy to improve."""
    actor: str = "inprocess"
    """Where rollouts sample: "inprocess" (the learner's own weights), "vllm" (an engine in this
    process), or the address of `worldloop serve policy`. Weights are sent after every step."""
    actor_memory: float = 0.3
    """Share of the GPU's memory for actor vllm, beside world model and learner."""
    world: str = "tiny"
    """Shipped preset, checkpoint folder or hub id of the world model."""
    starts: Path | None = None
    """Dataset whose first frames episodes start from; without it the shipped episodes."""
    steps: int = 100
    """Iterations of rollout and update."""
    groups: int = 64
    """Mixed groups wanted a step."""
    group_size: int = 8
    branching: tuple[int, ...] = ()
    """Into how many an episode parts at its first chunk, its second and so on, with group_size as
    their product: 4 4 for 16. Without it all part at the first (`engine.rollout`)."""
    horizon: int = 72
    """Actions an episode; a multiple of the world model's chunk."""
    temperature: float = TEMPERATURE
    coherence: float = 0.0
    """Correlation of an action dimension's draws from step to step (`vla.uniform_draws`)."""
    world_steps: int = 4
    """Denoising steps of the world model."""
    share_noise: bool = False
    """Whether a group's members share the world's noise (then only their actions differ)."""
    accuracy_low: float = 0.1
    accuracy_high: float = 0.9
    """Mean success of a group that is trained on."""
    likely_mixed: bool = False
    """Draw starts by the chance that their group is mixed, from what was imagined of them
    (`starts.StartChooser`), instead of uniformly."""
    rounds: int = 8
    """Most refill rounds a step; what is there by then is trained on."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    """Replays imagined episodes in truth every few steps, and stops a run that fools itself."""
    seed: int = 0
    max_batch: int = 64
    """Most episodes imagined at once."""
    overlap: bool = False
    """The policy acts for one half of them while the world model imagines the other half."""
    evaluate_every: int = 10
    """Steps between greedy rollouts from the held-out starts (and a sample video); 0: never."""
    evaluate_starts: int = 32
    """Last start frames of the dataset, never trained on."""
    keep_every: int = 10
    """Steps between policies that are kept (out/policies/STEP)."""
    wandb: str | None = None
    """Project at Weights & Biases that the metrics go to as well."""
    threads: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    """Of world model and policy: fp32, bf16, or auto: bf16 where the machine is fast in it (the
    learner's weights stay fp32)."""
    backend: str = "eager"
    """How the world model is run (`engine.backends`): eager, compiled, cudagraph, tensorrt ..."""

    def __post_init__(self) -> None:
        positive(self, "steps", "groups", "rounds", "max_batch", "threads", "keep_every")
        if self.group_size < 2:
            raise UserError(f"group_size is {self.group_size}; a group needs at least 2 episodes")
        if self.branching:
            rows_alike(self.branching, self.group_size, len(self.branching))
        if not 0 <= self.accuracy_low <= self.accuracy_high <= 1:
            raise UserError("accuracy_low and accuracy_high: expected 0 <= low <= high <= 1")
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}; sampling needs more than 0")
        if not 0 <= self.coherence < 1:
            raise UserError(f"coherence is {self.coherence}; expected at least 0 and below 1")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision is {self.precision!r}; expected auto, bf16 or fp32")


TINY = GRPOConfig(
    out=Path("runs/grpo-tiny"),
    groups=8,
    horizon=48,
    # So coherent, a chunk's outcome speaks of a few draws, not of 168: with independent draws
    # at 0.7 a step's gradient is noisier (docs/policy.md). At 1.6 a policy of 48 demonstrations
    # succeeds in 5 % instead of 36 %.
    temperature=0.35,
    coherence=0.95,
    world_steps=1,
    steps=20,
    precision="auto",
    learner=LearnerConfig(
        lr=2e-4, warmup=10, cooldown=0.4, mini_batch=32, epochs=2, old_logprobs="rollout"
    ),
)

PRESETS: dict[str, tuple[str, GRPOConfig]] = {
    "simplevla": ("SimpleVLA-RL's settings for LIBERO", GRPOConfig(out=Path("runs/grpo"))),
    "tiny": ("the shipped tiny models on two CPU cores", TINY),
}
