"""What a round of the closed loop does: plain values, hashed into its ledger."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from worldloop.config import config_to_dict, positive
from worldloop.errors import UserError
from worldloop.ledger import text_sha256
from worldloop.rl.alarm import AlarmConfig
from worldloop.rl.grpo_config import TINY, GRPOConfig
from worldloop.rl.true_env import TrueEnv

# Fields that change how fast a round is, not what comes of it.
OPERATION = ("processes", "limit_s")


@dataclass(frozen=True)
class FineTune:
    """Options of `worldloop train world-model` in every round; their names are its own."""

    steps: int = 320
    batch: int = 4
    """Episodes a step and process."""
    lr: float = 2e-4
    """Small: at 8e-4 a few hundred episodes made the world model worse (docs/loop.md)."""
    lr_vectors: float = 1e-4
    reward_weight: float = 1.0
    held_out: int = 32
    """Last episodes of SANS, which are the policy's newest; never trained on."""
    save_every: int = 20
    keep: Literal["last", "best"] = "best"
    """What goes into RL: the last weights, or those with the least error on the held-out ones, the
    pretrained model's among them."""
    arm_steps: int = 3000
    """Steps of fitting the arm anew; the pretrained one stays where it ends nearer on held-out
    episodes. 0: keep that."""
    object_head_steps: int = 0
    """With ``arm_steps``: the arm sees where the object is; a thousand episodes are enough."""
    pose_head_steps: int = 0
    threads: int = 1
    processes: int = 1
    """Data-parallel processes of this machine."""
    device: str = "auto"
    precision: str = "auto"


@dataclass(frozen=True)
class RoundConfig:
    """What every round of a loop does."""

    true: TrueEnv = field(default_factory=lambda: TrueEnv("PushCube-v1"))
    recorded: bool = False
    """No simulator: episodes and outcomes are handed in between the stages (docs/loop.md)."""
    policy: str = "policy/pushcube"
    """The fine-tuned base policy: checkpoint folder or shipped name."""
    world: str = "tiny"
    """The pretrained world model, which every round fine-tunes anew."""
    data: tuple[Path, ...] = ()
    """SANS datasets that are there already (scripted or recorded)."""
    start: Literal["base", "last"] = "base"
    """GRPO begins from the base policy, as in the paper, or from the last accepted one."""
    episodes: int = 128
    """Collected a round."""
    first_seed: int = 500_000
    """Simulator seed of the first of them; later rounds go on from there."""
    starts: int = 0
    """Fresh start states of a simulator a round, looked at but not played, that RL begins from in
    place of those of SANS."""
    evaluations: int = 200
    """Start states of every evaluation."""
    evaluation_seed: int = 6_000_000
    """Simulator seed of the first of them; from 6000000 on no shipped weights have seen any."""
    seed: int = 0
    fine_tune: FineTune = field(default_factory=FineTune)
    grpo: GRPOConfig = replace(
        TINY, out=Path("grpo"), groups=12, evaluate_every=0, keep_every=5,
        alarm=AlarmConfig(every=5, episodes=32),
    )  # fmt: skip
    """Of GRPO; its out, policy, world, starts, seed and where its alarm looks are the loop's. The
    policy collects as it samples in RL (temperature, coherence)."""
    processes: int = 1
    """Simulators side by side."""
    limit_s: float = 300.0
    """Seconds an episode may take before its simulator is started anew."""

    def __post_init__(self) -> None:
        positive(self, "episodes", "evaluations", "processes")
        if self.starts < 0:
            raise UserError(f"starts is {self.starts}; must be at least 0")
        if self.starts and (self.recorded or not self.true.simulated):
            raise UserError("starts: fresh start states need a task of a simulator; leave them 0")
        if self.limit_s <= 0:
            raise UserError(f"limit_s is {self.limit_s}; expected more than 0 seconds")
        collected = range(self.first_seed, self.first_start + 100 * self.starts)
        evaluated = range(self.evaluation_seed, self.evaluation_seed + self.evaluations)
        if max(collected.start, evaluated.start) < min(collected.stop, evaluated.stop):
            raise UserError(
                "first_seed: collection would come to the seeds of the evaluation; choose them "
                "farther apart"
            )

    @property
    def first_start(self) -> int:
        """Simulator seed of the first fresh start state: behind those of 100 rounds of episodes."""
        return self.first_seed + 100 * self.episodes

    @property
    def sha256(self) -> str:
        """Of everything that decides what comes of a round."""
        values = config_to_dict(self)
        return text_sha256({k: v for k, v in values.items() if k not in OPERATION})


PRESETS: dict[str, tuple[str, RoundConfig]] = {
    "tiny": (
        "the shipped tiny models on PushCube, less than an hour a round on one CPU core",
        RoundConfig(
            true=TrueEnv("PushCube-v1", horizon=48),
            start="last", episodes=300, starts=600, evaluations=600,
            fine_tune=FineTune(
                steps=700, lr=6e-4, lr_vectors=3e-4, save_every=50, object_head_steps=1000
            ),
            grpo=replace(
                RoundConfig.grpo, steps=64, likely_mixed=True, keep_every=16,
                alarm=AlarmConfig(every=16, episodes=32),
            ),
        ),
    ),
    "smoke": (
        "the same in a few minutes, to see every stage once",
        RoundConfig(
            episodes=8, evaluations=8,
            fine_tune=FineTune(steps=4, batch=2, held_out=2, save_every=2, arm_steps=0),
            grpo=replace(
                RoundConfig.grpo, steps=2, groups=2, rounds=2, accuracy_low=0.0, accuracy_high=1.0,
                keep_every=1, alarm=AlarmConfig(every=2, episodes=4),
            ),
        ),
    ),
}  # fmt: skip
