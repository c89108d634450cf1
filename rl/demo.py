"""`worldloop demo`: imagine held-out real episodes and measure how true the imagination is.

From the first frame and the recorded actions alone, every episode in one batch; then the same
with the actions of other episodes, to see that the world follows actions rather than habit.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from worldloop.cli import parse_config
from worldloop.config import config_to_dict, positive
from worldloop.engine.policy.vla import VLAPolicy
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.files import atomic_write_text
from worldloop.metrics import (
    Comparison,
    compare_rollout,
    lpips,
    mse,
    psnr_of_mse,
    wilson_interval,
)
from worldloop.rl.grpo import GRPO
from worldloop.rl.grpo_config import TINY
from worldloop.rl.held_out import (
    HeldOut,
    actions_only,
    find_classifier,
    imagine,
    load_held_out,
)
from worldloop.rl.pictures import Pair, pairs_of, write_pair, write_sheets
from worldloop.rl.report import (
    plain,
    print_grpo,
    print_table,
    replaced_folder,
    targets,
    write_report,
)
from worldloop.rl.starts import shipped_episodes
from worldloop.track import Progress, git_commit


@dataclass(frozen=True)
class DemoConfig:
    """Imagine held-out real episodes with a world model; write a report and print the figures."""

    world: str = "tiny"
    """Shipped preset, checkpoint folder or hub id."""
    episodes: Path | None = None
    """Dataset folder; without it the held-out episodes that are shipped."""
    classifier: Path | None = None
    """Outcome classifier; without it the shipped one of the task."""
    out: Path = Path("runs/demo")
    count: int | None = None
    """Use only the first episodes."""
    steps: Literal[1, 2, 4] = 1
    """Denoising steps of the streaming sampler; `tiny` is best in one (docs/training.md)."""
    seed: int = 0
    threads: int = 2
    reference_batch: int = 4
    """Episodes in the comparison with the 35-step reference procedure."""
    repeats: int = 3
    """Timed repeats of each arm of that comparison."""
    policy: str = "policy/pushcube"
    """Policy that learns in imagination."""
    grpo_steps: int = 4
    """GRPO steps inside the world model; 0 leaves that part out."""
    videos: bool = True
    check: bool = False
    """Exit with 1 when a target is missed."""

    def __post_init__(self) -> None:
        if self.grpo_steps < 0:
            raise UserError(f"grpo_steps is {self.grpo_steps}; must be at least 0")
        positive(self, "threads", "reference_batch", "repeats")
        if self.count is not None and self.count < 2:
            raise UserError(f"count is {self.count}; must be at least 2 (actions are exchanged)")


# ---------------------------------------------------------------- measuring


def derangement(count: int, seed: int) -> npt.NDArray[np.int64]:
    """A permutation [count] that leaves nothing in its place: one cycle through all, by seed."""
    order = np.random.default_rng(seed).permutation(count)
    out = np.empty(count, np.int64)
    out[order] = np.roll(order, 1)
    return out


def shuffled_psnr(
    world: WorldModel, held_out: HeldOut, config: DemoConfig
) -> tuple[float, npt.NDArray[np.int64]]:
    """PSNR in dB when every episode gets another one's actions, its own start kept."""
    other = derangement(len(held_out.episodes), config.seed)
    rollout, _ = imagine(
        world, held_out, held_out.actions[other], config.steps, config.seed, "other actions"
    )
    assert rollout.frames is not None
    real = np.stack([episode.frames for episode in held_out.episodes])
    error = mse(real[:, 1:], rollout.frames[:, 1:, 0])
    return float(psnr_of_mse(np.maximum(error, 1e-10)).mean()), other


def interleaved(arms: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """Seconds [arm][repeat]; one warm-up each, then the arms in turn, so that a busy moment of
    the machine strikes all of them."""
    for arm in arms:
        arm()
    times: list[list[float]] = [[] for _ in arms]
    for _ in range(repeats):
        for seconds, arm in zip(times, arms):
            seconds.append(arm())
    return times


def measure_speed(world: WorldModel, held_out: HeldOut, config: DemoConfig) -> dict[str, Any]:
    """Seconds of one chunk at batch 1, and the speed-up over the reference procedure.

    Both arms encode the first frame, imagine one chunk with the same weights and decode it.
    """
    chunk = world.action_spec.chunk
    one = held_out.first(1, chunk)
    few = held_out.first(config.reference_batch, chunk)

    def run(part: HeldOut, steps: int | Literal["reference"]) -> Callable[[], float]:
        return lambda: imagine(world, part, part.actions, steps, config.seed)[1]

    (single,) = interleaved([run(one, config.steps)], max(5, config.repeats))
    stream, reference = interleaved([run(few, config.steps), run(few, "reference")], config.repeats)
    return {
        "seconds_per_chunk": statistics.median(single),
        "speedup_vs_reference": statistics.median(reference) / statistics.median(stream),
        "speedup_details": {
            "what": f"first frame encoded, one chunk of {chunk} frames imagined and decoded, "
            "same weights, arms interleaved, medians",
            "episodes": len(few.episodes),
            "streaming_steps": config.steps,
            "reference_steps": 35,
            "streaming_seconds": stream,
            "reference_seconds": reference,
            "one_episode_seconds": single,
        },
    }


def improve(
    world: WorldModel, held_out: HeldOut, config: DemoConfig, folder: Path
) -> dict[str, Any] | None:
    """A few GRPO steps of the shipped policy: imagined success before and after, as sampled.

    Before and after are measured on the same starts with the same seeds; the steps learn from
    those starts too, so this shows learning, not generalisation (docs/policy.md has the true
    success). None when ``grpo_steps`` is 0.
    """
    if config.grpo_steps == 0:
        return None
    since = time.perf_counter()
    settings = replace(
        TINY, out=folder, policy=config.policy, groups=4, steps=config.grpo_steps,
        evaluate_every=0, seed=config.seed, learner=replace(TINY.learner, warmup=0, cooldown=0.0),
    )  # fmt: skip
    policy = VLAPolicy.from_pretrained(
        config.policy, temperature=settings.temperature, coherence=settings.coherence
    )
    grpo = GRPO(settings, world, policy, held_out.starts)
    before = grpo.imagine(held_out.starts, 1, config.seed).success
    rows = []
    with Progress(config.grpo_steps, "grpo", unit="step") as progress, TemporaryDirectory() as work:
        for step in range(config.grpo_steps):
            rows.append(grpo.step(step, Path(work) / str(step)))
            progress.update(success=rows[-1]["imagined_success"])
    after = grpo.imagine(held_out.starts, 1, config.seed).success
    return {
        "policy": config.policy,
        "before": float(before.mean()),
        "after": float(after.mean()),
        "before_ci95": list(wilson_interval(int(before.sum()), len(before))),
        "after_ci95": list(wilson_interval(int(after.sum()), len(after))),
        "episodes": len(before),
        "horizon": settings.horizon,
        "steps": rows,
        "seconds": time.perf_counter() - since,
    }


def peak_memory_mb() -> float:
    """Largest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---------------------------------------------------------------- the demo


def measure(
    world: WorldModel, held_out: HeldOut, config: DemoConfig, say: Callable[[str], None]
) -> tuple[dict[str, Any], Comparison, list[Pair]]:
    """Every figure of summary.json, and what the pictures are made from."""
    classifier, no_classifier = find_classifier(
        held_out.env_id, held_out.episodes[0].frames.shape[1], config.classifier
    )
    say(f"{len(held_out.episodes)} episodes of {held_out.env_id} from {held_out.folder}")
    warm = held_out.first(2, world.action_spec.chunk)
    imagine(world, warm, warm.actions, config.steps, config.seed)
    rollout, seconds = imagine(
        world, held_out, held_out.actions, config.steps, config.seed, "imagine"
    )
    threshold, held = world.config.success_rule(held_out.episodes[0].instruction)
    comparison = compare_rollout(
        held_out.episodes, rollout, classifier, held_out.object_color, held_frames=held
    )
    assert rollout.frames is not None
    real = np.stack([episode.frames for episode in held_out.episodes])
    perceptual, no_lpips = lpips(real[:, 1:], rollout.frames[:, 1:, 0])
    shuffled, other = shuffled_psnr(world, held_out, config)
    say("timing, also of the 35-step reference procedure")
    speed = measure_speed(world, held_out, config)
    values = {
        **comparison.summary(world.action_spec.chunk),
        "lpips": perceptual,
        "lpips_reason": no_lpips or None,
        "visual_alignment_reason": no_classifier or None,
        "classifier": None if classifier is None else classifier.record,
        **actions_only(held_out, config.seed),
        "psnr_with_shuffled_actions": shuffled,
        "shuffled_with": other.tolist(),
        "frames_per_second": comparison.psnr.size / seconds,
        "rollout_seconds": seconds,
        "rollout_timings": rollout.timings,
        **speed,
        "reward_threshold": threshold,
        "env_id": held_out.env_id,
        "threads": torch.get_num_threads(),
        "config": config_to_dict(config),
        "commit": git_commit(),
        "peak_memory_mb": peak_memory_mb(),
    }
    pairs = pairs_of(held_out.episodes, rollout, comparison, threshold)
    return values, comparison, pairs


def demo(config: DemoConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run everything, write ``config.out`` in one step, return the summary."""
    since = time.perf_counter()
    torch.set_num_threads(config.threads)
    world = WorldModel.from_pretrained(config.world)
    held_out = load_held_out(config.episodes or shipped_episodes(), config.count, world)
    with replaced_folder(config.out) as folder:
        values, comparison, pairs = measure(world, held_out, config, say)
        say("GRPO inside the world model")
        values["grpo"] = improve(world, held_out, config, folder)
        sheets = write_sheets(pairs, folder)
        if config.videos:
            with (
                ThreadPoolExecutor(config.threads) as pool,
                Progress(len(pairs), "videos", unit="video") as progress,
            ):
                for _ in _drawn(pool, pairs, folder, held_out.fps):
                    progress.update()
        values["seconds"] = time.perf_counter() - since
        values["peak_memory_mb"] = peak_memory_mb()
        values["targets"] = targets(values)
        write_report(folder, values, comparison, pairs, sheets, config.videos)
        text = json.dumps(plain(values), indent=2, allow_nan=False) + "\n"
        atomic_write_text(folder / "summary.json", text)
    return values


def _drawn(
    pool: ThreadPoolExecutor, pairs: Sequence[Pair], folder: Path, fps: float
) -> Iterator[Path]:
    return pool.map(lambda pair: write_pair(pair, folder, fps, scale=2), pairs)


PRESETS = {
    "full": ("every shipped episode, videos and timings", DemoConfig()),
    "smoke": (
        "four episodes, no videos: seconds",
        DemoConfig(
            count=4,
            videos=False,
            repeats=1,
            reference_batch=1,
            grpo_steps=0,
            out=Path("runs/smoke"),
        ),
    ),
}


def main(argv: list[str]) -> int:
    """Run from the command line; without a preset's name it is `full`."""
    given = argv[0].partition("=")[0] if argv else ""
    if given not in (*PRESETS, "-h", "--help", "--config"):
        argv = ["full", *argv]
    config = parse_config(PRESETS, argv, "worldloop demo")
    values = demo(config)
    print_table(values)
    print_grpo(values)
    print(
        f"{config.out / 'report.html'} shows it; {config.out / 'summary.json'} holds the figures."
    )
    missed = [row["name"] for row in values["targets"] if row["met"] is False]
    return 1 if config.check and missed else 0
