"""`worldloop evaluate world-model`: every table and figure that the paper has of a world model.

Video quality (table 1), outcome alignment (table 2), ablation arms and a vision-language judge
(tables 4 and 5), action following (figure 6), drift over hundreds of frames, the number of
denoising steps, and reward calibration. Held-out real episodes with outcomes balanced; intervals
are Wilson's at 95 %. Everything lands in one JSON document, one page and its pictures.

Shape letters: N episodes, T frames.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from worldloop.calibration import crossfit_alignment, fit_reward, held_score, precision_recall
from worldloop.checkpoint import load_checkpoint
from worldloop.cli import parse_config
from worldloop.config import positive
from worldloop.engine.world_config import Calibration, write_world_config
from worldloop.engine.world_model import Steps, WorldModel
from worldloop.errors import UserError
from worldloop.files import atomic_write_text
from worldloop.hub import WEIGHTS, resolve_pretrained
from worldloop.metrics import Comparison, compare_rollout, fvd, lpips, outcome_alignment
from worldloop.outcome import OutcomeClassifier
from worldloop.rl.held_out import (
    HeldOut,
    actions_only,
    find_classifier,
    imagine,
    load_held_out,
)
from worldloop.rl.judge import JudgeConfig, judge
from worldloop.rl.made_up import long_episodes, novel_episodes
from worldloop.rl.pictures import Pair, pairs_of
from worldloop.rl.report import plain
from worldloop.rl.starts import shipped_episodes
from worldloop.rl.world_page import write_figures, write_page
from worldloop.rl.world_tables import (
    Measured,
    add,
    alignments,
    mean_of,
    on_recorded,
    pictures,
    pooled,
    pose_errors,
    rate,
    thinned,
)
from worldloop.track import git_commit

REFERENCE = 35  # steps of the reference procedure
DRIFT = (48, 200, 400)  # frames; the paper's model breaks at 200
LEFT_OUT = {"reason": "left out"}
TRANSFER = ("transfer", "scratch")  # arms that are measured on the unseen task


@dataclass(frozen=True)
class EvaluateWorldConfig:
    """Measure a world model on held-out real episodes; write tables and figures."""

    world: str = "tiny"
    """Shipped preset, checkpoint folder or hub id."""
    episodes: tuple[Path, ...] = ()
    """Held-out datasets, one a task; without any the shipped one."""
    classifiers: tuple[Path, ...] = ()
    """Outcome classifiers of tasks (`worldloop train outcome`) beside the shipped ones."""
    out: Path = Path("runs/world-model")
    """Folder of world-model.json, world-model.md and world-model-*.png."""
    count: int | None = None
    """Episodes a task, half of either outcome; without it as many as can be balanced."""
    frames: int = 48
    """Frames that the picture measures of table 1 look at; outcomes are those of the end."""
    steps: Literal[1, 2, 4] = 4
    by_steps: tuple[int, ...] = (35, 4, 2, 1)
    """Numbers of denoising steps to compare; 35 is the reference procedure."""
    steps_count: int = 20
    """Episodes a task in that comparison; 0 leaves it out."""
    arms: tuple[str, ...] = ()
    """Ablations as NAME=CHECKPOINT, a name once for each seed (no-near-success, no-reward-head)."""
    transfer: Path | None = None
    """Held-out episodes of an unseen task; its arms are named transfer=... and scratch=..."""
    judge: bool = False
    """Ask a vision-language model about the imagined episodes, too."""
    judge_at: JudgeConfig = field(default_factory=JudgeConfig)
    novel: int = 8
    """Made-up action sequences a task, in the simulator; 0 leaves them out."""
    long: int = 4
    """Long episodes a task, in the simulator; 0 leaves them out."""
    long_frames: int = 400
    simulated: Path = Path("runs/evaluate-world-model")
    """Where simulated episodes are kept for the next time."""
    fvd: Path | None = None
    """TorchScript file of FVD's I3D backbone."""
    calibrate: bool = False
    """Write the fitted thresholds into the checkpoint's configuration."""
    batch: int = 32
    """Episodes imagined at once."""
    seed: int = 0
    threads: int = 2

    def __post_init__(self) -> None:
        positive(self, "frames", "batch", "threads", "long_frames")
        for name in ("novel", "long", "steps_count"):
            if getattr(self, name) < 0 or getattr(self, name) == 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 0, or 2 and more")
        if self.count is not None and self.count < 2:
            raise UserError(f"count is {self.count}; must be at least 2, one of either outcome")
        unknown = [n for n in self.by_steps if n not in (REFERENCE, 4, 2, 1)]
        if unknown:
            raise UserError(f"by_steps has {unknown[0]}; known: {REFERENCE}, 4, 2, 1")
        for arm in self.arms:
            if not all(arm.partition("=")):
                raise UserError(f"arms: {arm!r}; expected NAME=CHECKPOINT")
        own = (Path(self.world) / "config.json").is_file()
        if self.calibrate and not (own and WEIGHTS not in Path(self.world).resolve().parents):
            raise UserError(
                f"calibrate: writes into the world model's folder, and {self.world!r} is a shipped "
                "or downloaded one; copy it and give the copy with --world"
            )
        named = [arm for arm in self.arms if arm.partition("=")[0] in TRANSFER]
        if named and self.transfer is None:
            raise UserError(f"arms: {named[0]!r} needs the unseen task's episodes: --transfer")


class Evaluation:
    """One world model and the held-out episodes of its tasks."""

    def __init__(self, config: EvaluateWorldConfig, say: Callable[[str], None] = print) -> None:
        self.config, self.say = config, say
        torch.set_num_threads(config.threads)
        for arm in config.arms:  # now, not after hours of measuring
            load_checkpoint(resolve_pretrained(arm.partition("=")[2]), kind="world_model")
        self.world = WorldModel.from_pretrained(config.world)
        folders = config.episodes or (shipped_episodes(),)
        self.tasks: dict[str, HeldOut] = {}
        for folder in folders:
            found = load_held_out(folder, None, self.world).balanced(config.count)
            if found.env_id in self.tasks:
                raise UserError(f"{folder}: a second dataset of {found.env_id}; merge them")
            self.tasks[found.env_id] = found
        self.transfer: HeldOut | None = None
        if config.transfer is not None:
            whole = load_held_out(config.transfer, None, self.world)
            self.transfer = whole.balanced(config.count)

    def classifier(self, held_out: HeldOut) -> tuple[OutcomeClassifier | None, str]:
        """Of a task's pictures, or None and the reason."""
        size = held_out.episodes[0].frames.shape[1]
        return find_classifier(held_out.env_id, size, among=self.config.classifiers)

    # ------------------------------------------------------------ one rollout

    def measure(
        self, held_out: HeldOut, steps: Steps | None = None, world: WorldModel | None = None
    ) -> Measured:
        """Imagine the episodes from their first frames and recorded actions."""
        config, world = self.config, world or self.world
        rollout, seconds = imagine(
            world, held_out, held_out.actions, steps or config.steps, config.seed,
            f"{held_out.env_id}, {steps or config.steps} steps", config.batch,
        )  # fmt: skip
        classifier, _ = self.classifier(held_out)
        held = world.config.success_rule(held_out.episodes[0].instruction)[1]
        compared = compare_rollout(
            held_out.episodes, rollout, classifier, held_out.object_color, held_frames=held
        )
        return Measured(held_out, rollout, compared, seconds)

    # ------------------------------------------------------------ the tables

    def task(self, measured: Measured) -> dict[str, Any]:
        """Tables 1 and 2 of one task."""
        held_out, compared, T = measured.held_out, measured.comparison, self.config.frames
        real, imagined = measured.real[:, 1 : T + 1], measured.frames[:, 1 : T + 1]
        perceptual, no_lpips = lpips(real, imagined)
        video, no_fvd = fvd(real, imagined, self.config.fvd)
        _, no_classifier = self.classifier(held_out)
        guess = actions_only(held_out, self.config.seed)
        return {
            "n": len(held_out.episodes),
            "successes": int(compared.true_success.sum()),
            "instruction": held_out.episodes[0].instruction,
            "frames": min(T, compared.psnr.shape[1]),
            **pictures(compared, T),
            "psnr_whole_episode": float(compared.psnr.mean()),
            **pose_errors(self.world, held_out, T),
            "lpips": perceptual,
            "lpips_reason": no_lpips or None,
            "fvd": video,
            "fvd_reason": no_fvd or None,
            **alignments(compared.visual, compared.reward),
            **self.recorded(self.world, held_out, compared),
            "visual_alignment_reason": no_classifier or None,
            **guess,
            "frames_per_second": compared.psnr.size / measured.seconds,
        }

    def recorded(
        self, world: WorldModel, held_out: HeldOut, compared: Comparison
    ) -> dict[str, Any]:
        """The reward head on the frames that were recorded, beside those that were imagined."""
        aligned = on_recorded(world, held_out, compared.psnr.shape[1])
        return rate("reward_alignment_recorded", aligned)

    def steps_table(self) -> dict[str, Any]:
        """The same episodes in different numbers of denoising steps."""
        config, rows = self.config, {}
        for steps in config.by_steps:
            found = [
                self.measure(
                    held_out.balanced(config.steps_count),
                    "reference" if steps == REFERENCE else steps,
                )
                for held_out in self.tasks.values()
            ]
            frames = sum(m.comparison.psnr.size for m in found)
            rows[str(steps)] = {
                **pooled(found, config.frames),
                "frames_per_second": frames / sum(m.seconds for m in found),
            }
        return rows

    def ablations(self) -> dict[str, Any]:
        """Tables 4 and 5: each arm's checkpoints (seeds) on every task, together and by itself."""
        rows: dict[str, Any] = {}
        for name, folder in (arm.split("=", 1) for arm in self.config.arms):
            if name in TRANSFER:
                continue
            world = WorldModel.from_pretrained(folder)
            found = [self.measure(held_out, world=world) for held_out in self.tasks.values()]
            rows.setdefault(name, []).append((folder, found))
        return {name: self._arm(runs) for name, runs in rows.items()}

    def transfer_table(self) -> dict[str, Any] | None:
        """The unseen task: fine-tuned from the pretrained model, and trained from scratch."""
        if self.transfer is None:
            return None
        rows: dict[str, Any] = {}
        recorded: dict[str, Any] = {}  # of a start's last checkpoint
        for name, folder in (arm.split("=", 1) for arm in self.config.arms):
            if name in TRANSFER:
                world = WorldModel.from_pretrained(folder)
                found = [self.measure(self.transfer, world=world)]
                rows.setdefault(name, []).append((folder, found))
                recorded[name] = self.recorded(world, self.transfer, found[0].comparison)
        made = {name: {**self._arm(runs), **recorded[name]} for name, runs in rows.items()}
        return {"task": self.transfer.env_id, "n": len(self.transfer.episodes), **made}

    def _arm(self, runs: Sequence[tuple[str, list[Measured]]]) -> dict[str, Any]:
        T = self.config.frames
        every = [measured for _, found in runs for measured in found]
        tasks = {
            m.held_out.env_id: alignments(m.comparison.visual, m.comparison.reward)
            for _, found in runs[:1]
            for m in found
        }
        return {
            **pooled(every, T, repeats=len(runs)),
            "seeds": [{"checkpoint": str(where), **pooled(found, T)} for where, found in runs],
            "tasks_of_first_seed": tasks,
        }

    def judged(self, found: Sequence[Measured]) -> dict[str, Any]:
        """Table 4's judge on the very frames that the reward head's verdicts belong to."""
        rows, parts = {}, []
        for measured in found:
            texts = [episode.instruction for episode in measured.held_out.episodes]
            said = judge(measured.frames, texts, self.config.judge_at)
            # An answer that says neither is a judge that has not seen the success.
            found_success = np.array([answer is True for answer in said])
            aligned = outcome_alignment(measured.comparison.true_success, found_success)
            parts.append(aligned)
            rows[measured.held_out.env_id] = {
                **rate("reward_alignment", aligned), "unclear": said.count(None),
                "n": len(said),
            }  # fmt: skip
        return {
            "model": self.config.judge_at.model,
            **rate("reward_alignment", add(parts)),
            "tasks": rows,
        }

    # ------------------------------------------------------------ simulated episodes

    def following(self, shown: list[Pair]) -> dict[str, Any]:
        """Figure 6: action sequences that nobody recorded; four of each task go to ``shown``."""
        rows = {}
        for env_id, held_out in self.tasks.items():
            folder = self.config.simulated
            dataset = novel_episodes(held_out, self.config.novel, folder, self.config.seed)
            novel = load_held_out(dataset.root, None, self.world)
            measured = self.measure(novel)
            threshold, _ = self.world.config.success_rule(held_out.episodes[0].instruction)
            noted = [replace(e, instruction=str(e.info["made_up"])) for e in novel.episodes]
            shown += pairs_of(noted, measured.rollout, measured.comparison, threshold)[:4]
            kinds = [str(episode.info["made_up"]) for episode in novel.episodes]
            compared = measured.comparison
            rows[env_id] = {
                "n": len(kinds),
                **pictures(compared, compared.psnr.shape[1]),
                **alignments(compared.visual, compared.reward),
                "by_kind": {
                    kind: float(compared.psnr[[k == kind for k in kinds]].mean())
                    for kind in dict.fromkeys(kinds)
                },
            }
        return rows

    def drift(self) -> dict[str, Any]:
        """Long episodes: PSNR (dB) of the 24 frames that end at each mark, and the whole curve."""
        curves, static, near = [], [], []
        for held_out in self.tasks.values():
            config = self.config
            dataset = long_episodes(held_out, config.long, config.long_frames, config.simulated)
            compared = self.measure(load_held_out(dataset.root, None, self.world)).comparison
            curves.append(compared.psnr)
            static.append(compared.psnr_static)
            counted = np.where(compared.track.counted, compared.track.within, np.nan)
            near.append(counted.astype(np.float64))
        psnr, still, within = (np.concatenate(x) for x in (curves, static, near))
        marks = {}
        for mark in DRIFT:
            if mark <= psnr.shape[1]:
                last = slice(mark - 24, mark)
                seen = within[:, last]
                marks[str(mark)] = {
                    "psnr": float(psnr[:, last].mean()),
                    "psnr_static": float(still[:, last].mean()),
                    "object_within_4px": float(np.nanmean(seen)) if np.isfinite(seen).any()
                    else None,
                }  # fmt: skip
        return {
            **marks,
            "episodes": len(psnr),
            "curve": psnr.mean(0).round(3).tolist(),
            "curve_static": still.mean(0).round(3).tolist(),
        }

    # ------------------------------------------------------------ rewards

    def calibration(self, found: Sequence[Measured]) -> dict[str, Any]:
        """A threshold and a number of frames by task and for all, each with its curve."""
        rewards = {m.held_out.env_id: m.rollout.reward for m in found}
        truths = {m.held_out.env_id: m.comparison.true_success for m in found}
        shortest = min(r.shape[1] for r in rewards.values())
        rewards["all"] = np.concatenate([r[:, -shortest:] for r in rewards.values()])
        truths["all"] = np.concatenate(list(truths.values()))
        rows = {}
        for name, reward in rewards.items():
            fit = fit_reward(reward, truths[name])
            crossed = crossfit_alignment(reward, truths[name], self.config.seed)
            rows[name] = {
                "threshold": fit.threshold,
                "held_frames": fit.held_frames,
                "episodes": len(reward),
                "fitted_on_same": fit.balanced_accuracy,
                **(rate("cross_fitted", crossed) if crossed is not None else {}),
                "precision_recall": precision_recall(
                    held_score(reward, fit.held_frames), truths[name]
                ),
            }
        return {
            "in_checkpoint": {
                "threshold": self.world.config.reward_threshold,
                "held_frames": self.world.config.held_frames,
            },
            **rows,
        }

    def write_calibration(self, rows: dict[str, Any]) -> Path:
        """Put the fits into the checkpoint's configuration; its weights stay as they are."""
        changed = replace(
            self.world.config, reward_threshold=rows["all"]["threshold"],
            held_frames=rows["all"]["held_frames"],
        )  # fmt: skip
        for env_id, held_out in self.tasks.items():
            row = rows[env_id]
            fitted = Calibration(
                row["threshold"], row["held_frames"], row["episodes"],
                row.get("cross_fitted", row["fitted_on_same"]),
                tuple(thinned(row["precision_recall"], 40)),
            )  # fmt: skip
            changed = changed.with_rule(env_id, held_out.episodes[0].instruction, fitted)
        return write_world_config(Path(self.config.world), changed)

    # ------------------------------------------------------------ everything

    def run(self, command: str) -> dict[str, Any]:
        """Measure everything that is asked for; the document of world-model.json."""
        since, config = time.perf_counter(), self.config
        found = [self.measure(held_out) for held_out in self.tasks.values()]
        tasks = {m.held_out.env_id: self.task(m) for m in found}
        document: dict[str, Any] = {
            "tasks": tasks,
            "mean": {**mean_of(list(tasks.values())), **pooled(found, config.frames)},
            "by_steps": self.steps_table() if config.steps_count else {},
            "drift": self._measured(self.drift) if config.long else LEFT_OUT,
            "ablations": self.ablations(),
            "transfer": self.transfer_table(),
            "judge": self._measured(lambda: self.judged(found)) if config.judge else None,
            "calibration": self.calibration(found),
        }
        shown: list[Pair] = []
        following = self._measured(lambda: self.following(shown)) if config.novel else LEFT_OUT
        document["action_following"] = following
        document |= {
            "world": config.world,
            "steps": config.steps,
            "command": command,
            "commit": git_commit(),
            "seconds": time.perf_counter() - since,
        }
        if config.calibrate:
            self.say(f"{self.write_calibration(document['calibration'])}: thresholds written")
        document = plain(document)
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        atomic_write_text(config.out / "world-model.json", text)
        figures = write_figures(document, shown, config.out)
        write_page(document, figures, config.out / "world-model.md")
        return document

    def _measured(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What needs a simulator or a judge; where there is none, the reason for no figures."""
        try:
            return measure()
        except UserError as error:
            self.say(f"not measured: {error}")
            return {"reason": str(error)}


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(EvaluateWorldConfig, argv, "worldloop evaluate world-model")
    command = "worldloop evaluate world-model " + shlex.join(argv)
    Evaluation(config).run(command.strip())
    print((config.out / "world-model.md").read_text(encoding="utf-8"))
    print(f"{config.out / 'world-model.json'} holds the figures.")
    return 0
