"""GRPO in the simulator itself, beside the same run in a world model: what imagination costs RL.

    python scripts/grpo_in_truth.py runs/loop/pull-n1/round-01/jobs/grpo.json runs/truth-pull

Takes the settings of a loop's round (or of `worldloop grpo`, whose alarm names the simulator and
whose starts know their seeds) and takes the same steps: the same start states, learner and
schedule, but every episode is played in the simulator. Run it again to resume.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldloop.checkpoint import load_training_state, save_training_state
from worldloop.config import config_from_dict, read_json
from worldloop.engine.policy.base import Observation
from worldloop.engine.policy.vla import VLAPolicy
from worldloop.engine.sampler import derive_seed
from worldloop.engine.world_model import WorldModel
from worldloop.episodes import EpisodeDataset
from worldloop.rl.envs.simulators import SimulatorVectorEnv
from worldloop.rl.grpo import GRPO, keep
from worldloop.rl.grpo_config import GRPOConfig
from worldloop.rl.starts import load_starts
from worldloop.track import Run
from worldloop.types import Rollout, Starts


class TrueGRPO(GRPO):
    """`GRPO` whose episodes are played one after the other in a simulator."""

    def __init__(self, config: GRPOConfig, policy: VLAPolicy) -> None:
        assert config.starts is not None
        world = WorldModel.from_pretrained(config.world)
        super().__init__(config, world, policy, load_starts(config.starts, world))
        true = config.alarm.true
        self.env = SimulatorVectorEnv(
            true.env, horizon=config.horizon, image_size=true.image_size,
            held_frames=true.held_frames,
        )  # fmt: skip
        seeds = EpisodeDataset(config.starts).sim_seeds
        self.seed_of = {
            frame.tobytes(): seed for frame, seed in zip(self.starts.frames, seeds, strict=True)
        }

    def imagine(self, starts: Starts, group_size: int, seed: int, **options: Any) -> Rollout:
        """Played, not imagined; ``options`` are a world model's (its noise, its branches)."""
        chunk, dim = self.env.action_spec.chunk, self.env.action_spec.dim
        B, T = len(starts.instructions) * group_size, self.config.horizon
        group_id = np.repeat(np.arange(len(starts.instructions)), group_size)
        frames = np.zeros((B, T // chunk, *starts.frames.shape[2:]), np.uint8)
        actions, logprobs = np.zeros((2, B, T, dim), np.float32)
        tokens = np.zeros((B, T, dim), np.int64)
        reward, success = np.zeros((B, T), np.float32), np.zeros(B, bool)
        valid = np.zeros((B, T), bool)
        begun = time.perf_counter()
        for row, group in enumerate(group_id):
            at = np.array([self.seed_of[starts.frames[group].tobytes()]])
            begin = {"reset_mask": np.ones(1, bool), "starts": at}
            seen, _ = self.env.reset(seed=[0], options=begin)
            for k in range(T // chunk):
                frame, text = seen["frame"][:, None, None], starts.instructions[group]
                frames[row, k] = frame[0, 0]
                with self.precision:
                    made = self.actor.act(
                        Observation(frame, seen["pose"], (text,), (row,), k),
                        derive_seed(seed, -1, k),
                    )
                seen, _, _, _, infos = self.env.step(made.actions)
                times = slice(k * chunk, (k + 1) * chunk)
                actions[row, times], tokens[row, times] = made.actions[0], made.tokens[0]
                logprobs[row, times], reward[row, times] = made.logprobs[0], infos["reward_frames"]
                valid[row, k * chunk : k * chunk + infos["played"][0]] = True
                success[row] = infos["success"][0]
                if success[row]:
                    break
        return Rollout(
            frames=frames, actions=actions, reward=reward, success=success, valid=valid,
            seeds=np.arange(B), group_id=group_id,
            instructions=tuple(starts.instructions[group] for group in group_id),
            start_pose=starts.poses[group_id], action_tokens=tokens, logprobs=logprobs,
            policy_version=self.learner.policy.version,
            timings={"total": time.perf_counter() - begun},
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, help="in place of the settings' own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = config_from_dict(GRPOConfig, read_json(args.settings), str(args.settings))
    config = replace(config, out=args.out, steps=args.steps or config.steps, evaluate_every=0)
    policy = VLAPolicy.from_pretrained(
        config.policy, temperature=config.temperature, coherence=config.coherence
    )
    grpo, step = TrueGRPO(config, policy), 0
    found = load_training_state(args.out / "state")
    if found is not None:
        grpo.load_state(found[0])
        step = int(found[1]["step"])
    run = Run(args.out, config, resume_step=step or None)
    with run.progress(config.steps, "grpo in truth", unit="step", initial=step) as progress:
        while step < config.steps:
            rounds = args.out / "rollouts" / f"{step:06d}"
            metrics = grpo.step(step, rounds)
            step += 1
            if step % config.keep_every == 0 or step == config.steps:
                keep(config, policy, step)
            run.log(step, metrics)
            save_training_state(args.out / "state", grpo.state(), {"step": step}, keep=1)
            shutil.rmtree(rounds, ignore_errors=True)
            progress.update(1, success=metrics["imagined_success"])
    run.close()
    print(f"policy: {args.out / 'policies' / f'{config.steps:06d}'}")


if __name__ == "__main__":
    main()
