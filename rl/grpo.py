"""`worldloop grpo`: improve a policy inside the world model (paper sections 3.3 and 4.3).

The algorithm, after SimpleVLA-RL. One step:

    1. draw start frames (`StartChooser`); imagine ``group_size`` episodes from each
       (`RolloutEngine`); success is the thresholded reward of the world model; an episode ends
       where it succeeds
    2. keep the groups that are neither all failure nor all success (mean in [0.1, 0.9]); imagine
       more starts until there are enough (refill: nothing is trained on masked groups)
    3. advantage = (success - group mean) / (group deviation + 1e-6), the same for all its tokens;
       with ``branching`` that of each decision among those at the same moment of the same episode
    4. token ratios clipped to [1 - 0.2, 1 + 0.28], mean within an episode, then over episodes;
       no KL term, no entropy term, no value function

Departures from SimpleVLA-RL: success is a number, not 5 times it (the factor cancels); the frames
of rollouts are kept as uint8; the surplus of a refill round is trained on instead of thrown away;
with ``likely_mixed`` the starts are not drawn uniformly.

Every random draw follows from (seed, step, round), finished refill rounds are on disk, and the
learner's state is saved at each step: a killed run goes on where it was.

Shape letters: B episodes, T actions, A action dim.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldloop.checkpoint import load_training_state, resolve_pretrained, save_training_state
from worldloop.cli import parse_config
from worldloop.config import config_to_dict
from worldloop.engine.backends import wrap_world
from worldloop.engine.policy.served import HTTPPolicy, VLLMPolicy
from worldloop.engine.policy.vla import TokenPolicy, VLAPolicy
from worldloop.engine.precision import autocast, device_of, takes_bf16
from worldloop.engine.rollout import RolloutEngine, rows_alike
from worldloop.engine.sampler import derive_seed
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.files import atomic_write_text, exclusive
from worldloop.ledger import checkpoint_sha256
from worldloop.rl.advantage import decision_advantages, decision_spreads, mixed_groups
from worldloop.rl.alarm import Alarm, last_trusted, stopped
from worldloop.rl.grpo_config import PRESETS, GRPOConfig
from worldloop.rl.learner import Experience, Learner
from worldloop.rl.starts import StartChooser, load_starts, starts_sha256
from worldloop.rollout_io import load_rollout, save_rollout
from worldloop.track import Run
from worldloop.types import Rollout, Starts


class Saturated(UserError):
    """The policy succeeds nearly always in imagination: it has nothing more to learn there."""


class GRPO:
    """The parts of one run, and `step`."""

    def __init__(
        self,
        config: GRPOConfig,
        world: WorldModel,
        policy: VLAPolicy,
        starts: Starts,
        actor: TokenPolicy | None = None,
    ) -> None:
        self.config = config
        self.actor = actor or policy
        self.engine = RolloutEngine(world, self.actor, steps=config.world_steps)
        self.precision = autocast(device_of(config.device), config.precision)
        self.learner = Learner(policy, config.learner, self.precision)
        count = len(starts.instructions)
        held = config.evaluate_starts if config.evaluate_every else 0
        if count <= held:
            raise UserError(
                f"{count} start frames, of which {held} are held out; give a larger dataset "
                "with --starts, or fewer with --evaluate-starts"
            )
        chunks = config.horizon // world.action_spec.chunk
        self.widths = rows_alike(
            config.branching or (config.group_size,), config.group_size, chunks
        )
        self.starts = starts.select(range(count - held))
        self.chooser = StartChooser(
            count - held, config.group_size, config.accuracy_low, config.accuracy_high,
            mixed=config.likely_mixed,
        )  # fmt: skip
        self.held_out = starts.select(range(count - held, count)) if held else None

    # ------------------------------------------------------------ rollouts

    def send_weights(self) -> None:
        """Give the learner's weights to a policy that acts elsewhere."""
        policy = self.learner.policy
        if isinstance(self.actor, VLLMPolicy | HTTPPolicy):
            self.actor.update_weights(policy.network.state_dict())

    def imagine(self, starts: Starts, group_size: int, seed: int, **options: Any) -> Rollout:
        """Episodes by the present policy; each ends at its success."""
        config = self.config
        with self.precision:
            rollout = self.engine.rollout(
                starts, horizon=config.horizon, group_size=group_size, seed=seed,
                max_batch=config.max_batch, stop_on_success=True, overlap=config.overlap,
                **options,
            )  # fmt: skip
        return replace(rollout, policy_version=self.learner.policy.version)

    def collect(self, step: int, folder: Path) -> Collected:
        """Refill rounds until there are enough mixed groups; each is kept in ``folder``."""
        config = self.config
        kept: list[Rollout] = []
        tried = successes = frames = 0
        chunk = self.engine.world.action_spec.chunk
        wanted, mixed = config.groups, 0
        seconds: dict[str, float] = {}
        for round_ in range(config.rounds):
            seed = derive_seed(config.seed, step, round_)
            path = folder / f"round-{round_:02d}"
            rows = self.chooser.draw(np.random.default_rng(seed), wanted)
            if (path / "rollout.json").is_file():
                rollout = load_rollout(path)
            else:
                rollout = self.imagine(
                    self.starts.select(rows.tolist()), config.group_size, seed,
                    share_noise=config.share_noise, branching=config.branching,
                )  # fmt: skip
                save_rollout(rollout, path, video=False)
            self.chooser.observe(rows, rollout.success.reshape(len(rows), config.group_size))
            for part, value in rollout.timings.items():
                seconds[part] = seconds.get(part, 0.0) + value
            good = mixed_groups(
                rollout.success, rollout.group_id, config.accuracy_low, config.accuracy_high
            )
            tried += len(np.unique(rollout.group_id))
            # A chunk is imagined whole, and once for all rows that share it.
            frames += round((rollout.valid[:, ::chunk] / self.widths).sum()) * chunk
            successes += int(rollout.success.sum())
            if len(good):
                kept.append(rollout.select(np.isin(rollout.group_id, good)))
                mixed += len(good)
            if mixed >= config.groups:
                break
            # As many more as the yield so far suggests, but never more than a first round.
            share = max(mixed / tried, 1 / config.groups)
            wanted = min(config.groups, int(np.ceil((config.groups - mixed) / share)))
        rate = successes / (tried * config.group_size)
        return Collected(kept, tried, mixed, rate, frames, seconds)

    def step(self, step: int, folder: Path) -> dict[str, Any]:
        """One iteration; metrics. Raises UserError when no group was mixed in any round."""
        begun = time.perf_counter()
        found = self.collect(step, folder)
        imagined = time.perf_counter()
        if not found.rollouts and step > 0 and found.success > 0.5:
            raise Saturated(f"step {step}: {found.success:.0%} imagined success, no mixed group")
        if not found.rollouts:
            what = "failed" if found.success < 0.5 else "succeeded"
            raise UserError(
                f"step {step}: all {found.groups_tried} groups of {self.config.rounds} rounds were "
                f"too uniform (imagined success {found.success:.0%}: nearly every episode {what}); "
                "give starts or a policy of middling difficulty, or widen accuracy_low/high"
            )
        likely = self.config.likely_mixed
        expected = {"expected_success": self.chooser.success()} if likely else {}
        self.chooser.fade()
        rollout = Rollout.concatenate(found.rollouts)
        advantages = decision_advantages(rollout.success, rollout.group_id, self.widths)
        size = self.config.group_size
        spreads = (
            decision_spreads(rollout.success, size, self.widths) if self.config.branching else {}
        )
        metrics = self.learner.update(
            Experience.of(rollout, advantages),
            derive_seed(self.config.seed, step, -1),
            done=min(1.0, step / self.config.steps),
        )
        learned = time.perf_counter()
        self.send_weights()
        return {
            "imagined_success": found.success,
            **expected,
            "group_yield": found.mixed / found.groups_tried,
            "groups": found.mixed,
            "rounds_groups": found.groups_tried,
            "episode_length": float(rollout.valid.sum(1).mean()),
            **spreads,
            **metrics,
            "frames": found.frames,
            "frames_per_second": found.frames / found.seconds["total"],
            "seconds_rollout": imagined - begun,
            "seconds_learn": learned - imagined,
            "seconds_sync": time.perf_counter() - learned,
            **{f"seconds_{part}": value for part, value in found.seconds.items()},
        }

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the step number."""
        counts = {starts_sha256(self.starts): torch.from_numpy(self.chooser.counts_N2)}
        return {**self.learner.state(), "start_counts": counts}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; what was counted of other starts is left. Raises where the
        network is another one."""
        self.learner.load_state(state)
        counts = state.get("start_counts", {}).get(starts_sha256(self.starts))
        if counts is not None:
            self.chooser.counts_N2 = counts.numpy().copy()

    def evaluate(self, video: Path | None = None) -> float:
        """Imagined success of the greedy policy from the held-out starts."""
        actor = self.actor
        assert self.held_out is not None
        sampling, actor.temperature = actor.temperature, 0.0
        try:
            seed = derive_seed(self.config.seed, -1)
            rollout = self.imagine(self.held_out, 1, seed)
            if video is not None:
                few = self.held_out.select(range(min(4, len(self.held_out.instructions))))
                save_rollout(self.imagine(few, 1, seed, decode="all"), video)
        finally:
            actor.temperature = sampling
        return float(rollout.success.mean())


@dataclass(frozen=True)
class Collected:
    """What the refill rounds of one step gave."""

    rollouts: Sequence[Rollout]  # mixed groups only
    groups_tried: int
    mixed: int
    success: float  # of all episodes imagined, the uniform groups too
    frames: int  # imagined
    seconds: dict[str, float]


# ---------------------------------------------------------------- the run


def train(config: GRPOConfig) -> Path:
    """Run all steps (those that are left); returns the folder of the last policy.

    Where the alarm stopped the run, that is the last policy at which it was silent. Raises
    UserError when another process runs in the same folder.
    """
    if config.actor == "vllm" and find_spec("vllm") is None:
        raise UserError("actor vllm: vLLM is not installed here; use --actor inprocess")
    with exclusive(config.out):
        return _train(config)


def _train(config: GRPOConfig) -> Path:
    torch.set_num_threads(config.threads)
    # On a GPU the weights themselves are of that precision: kernels and graphs want no autocast.
    device = device_of(config.device)
    half = device.type == "cuda" and takes_bf16(device, config.precision)
    dtype = torch.bfloat16 if half else torch.float32
    world = WorldModel.from_pretrained(config.world, device=device, dtype=dtype)
    if config.backend != "eager":
        world = wrap_world(world, config.backend, attention="auto")
    policy = VLAPolicy.from_pretrained(
        config.policy, temperature=config.temperature, coherence=config.coherence, device=device
    )
    actor = make_actor(config, dtype)
    grpo = GRPO(config, world, policy, load_starts(config.starts, world), actor)
    step = _resume(config, grpo)
    _forget_others(config, grpo, step)
    grpo.send_weights()
    alarm = make_alarm(config, grpo)
    run = Run(config.out, config, resume_step=step or None)
    if step == 0:
        keep(config, policy, 0)
        first = {}
        if grpo.held_out is not None:
            first["held_out_success"] = grpo.evaluate(config.out / "samples/000000")
        if alarm is not None:
            first |= alarm.check(0).row
        if first:
            run.log(0, first)
    with run.progress(config.steps, "grpo", unit="step", initial=step) as progress:
        while step < config.steps and stopped(config.out / "alarm", config.alarm, step) is None:
            rounds = config.out / "rollouts" / f"{step:06d}"
            try:
                metrics = grpo.step(step, rounds)
            except Saturated as reason:
                print(f"{reason}; the run ends here")
                keep(config, policy, step)
                break
            step += 1
            last = step == config.steps
            if config.evaluate_every and (step % config.evaluate_every == 0 or last):
                video = config.out / "samples" / f"{step:06d}"
                metrics["held_out_success"] = grpo.evaluate(video)
            watched = alarm is not None and alarm.due(step)
            if step % config.keep_every == 0 or last or watched:
                keep(config, policy, step)
            if alarm is not None and watched:
                metrics |= alarm.check(step).row
            run.log(step, metrics)
            save_training_state(config.out / "state", grpo.state(), {"step": step}, keep=1)
            # Only now: until the state is there, the step may have to be taken again.
            shutil.rmtree(rounds, ignore_errors=True)
            progress.update(
                1, success=metrics["imagined_success"], entropy=metrics["entropy"],
                clip=metrics["clip_fraction"],
            )  # fmt: skip
    run.close()
    alert = stopped(config.out / "alarm", config.alarm, step)
    if alert is not None:
        low, high = alert.ci95
        print(
            f"alarm at step {alert.step}: {alert.false_share:.0%} of the imagined successes are "
            f"none in truth (95 % interval {low:.0%} .. {high:.0%}); RL stopped, see {alert.folder}"
        )
        step = last_trusted(config.out / "alarm", config.alarm)
    done = {"steps": step, "alarm": None if alert is None else alert.step}
    atomic_write_text(config.out / "done.json", json.dumps(done) + "\n")
    return config.out / "policies" / f"{step:06d}"


def make_alarm(config: GRPOConfig, grpo: GRPO) -> Alarm | None:
    """The alarm of a run, where it is to look at all."""
    if not config.alarm.every:
        return None
    return Alarm(
        config.alarm, grpo.engine.world, grpo.actor, config.out / "alarm", starts=grpo.starts,
        dataset=config.starts, horizon=config.horizon, world_steps=config.world_steps,
        seed=config.seed, precision=grpo.precision, max_batch=config.max_batch,
    )  # fmt: skip


def make_actor(config: GRPOConfig, dtype: torch.dtype) -> TokenPolicy | None:
    """The policy that samples, where that is not the learner's own."""
    if config.actor == "inprocess":
        return None
    if config.actor == "vllm":
        return VLLMPolicy(
            config.policy, temperature=config.temperature, coherence=config.coherence,
            dtype=dtype, gpu_memory_utilization=config.actor_memory,
        )  # fmt: skip
    return HTTPPolicy(config.actor, temperature=config.temperature, coherence=config.coherence)


IMAGINED_BY = ("groups", "group_size", "branching", "horizon", "temperature", "coherence",
               "world_steps", "share_noise", "likely_mixed", "accuracy_low", "accuracy_high",
               "seed", "precision", "alarm")  # fmt: skip


def _forget_others(config: GRPOConfig, grpo: GRPO, step: int) -> None:
    """Drop refill rounds, and before step 1 the alarm's first check, that other settings, weights
    or starts left."""
    plain = config_to_dict(config)
    facts = {
        **{name: plain[name] for name in IMAGINED_BY},
        "policy": checkpoint_sha256(resolve_pretrained(config.policy)),
        "world": checkpoint_sha256(resolve_pretrained(config.world)),
        "starts": starts_sha256(grpo.starts),
    }
    made_by = json.dumps(facts, indent=2) + "\n"
    path = config.out / "imagined_by.json"
    if path.is_file() and path.read_text() != made_by:
        shutil.rmtree(config.out / "rollouts", ignore_errors=True)
        if step == 0:
            shutil.rmtree(config.out / "alarm", ignore_errors=True)
    atomic_write_text(path, made_by)


def _resume(config: GRPOConfig, grpo: GRPO) -> int:
    found = load_training_state(config.out / "state")
    if found is None:
        return 0
    state, meta = found
    grpo.load_state(state)
    return int(meta["step"])


def keep(config: GRPOConfig, policy: VLAPolicy, step: int) -> Path:
    """Write the policy of a step to out/policies."""
    return policy.save(config.out / "policies" / f"{step:06d}")


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(PRESETS, argv, "worldloop grpo")
    print(f"policy: {train(config)}")
    return 0
