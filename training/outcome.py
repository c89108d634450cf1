"""`worldloop train outcome`: fit the classifier that judges imagined final frames.

It is trained on real frames alone, so that it cannot learn to like what the world model draws.
Frames of every moment are used with the simulator's label of that moment. They are shifted,
softened and disturbed in training, because imagined frames are a little soft and must not be
judged by their sharpness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from worldloop.cli import parse_config
from worldloop.config import config_to_dict, positive
from worldloop.errors import UserError
from worldloop.metrics import Alignment, outcome_alignment
from worldloop.outcome import OutcomeClassifier, OutcomeNet
from worldloop.track import Progress
from worldloop.training.data import EpisodeArrays, load_arrays


@dataclass(frozen=True)
class OutcomeTraining:
    """Train the outcome classifier on the real frames of a dataset (a few minutes on one core)."""

    data: Path
    out: Path
    steps: int = 1200
    batch: int = 64
    lr: float = 2e-3
    width: int = 16
    settled_share: float = 0.6
    """Share of training frames from the last steps of an episode, which are what is judged."""
    held_out: int = 64
    """Last episodes of the dataset, never trained on; the accuracy is measured on them."""
    limit: int | None = None
    """Use only the first episodes of the dataset."""
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        positive(self, "steps", "batch", "held_out", "threads", "width")
        if not 0 <= self.settled_share <= 1:
            raise UserError(f"settled_share is {self.settled_share}; expected 0 .. 1")


SETTLED = 8  # last frames of an episode, over which `worldloop collect` keeps the outcome constant


def label_at(data: EpisodeArrays, episode: int, time: int) -> float:
    """Whether the state in frame ``time`` is a success; frame t shows the state after action t."""
    return float(data.reward[episode, time - 1] > 0.5) if time else 0.0


def batch_at(
    data: EpisodeArrays, trained: int, config: OutcomeTraining, step: int
) -> tuple[Tensor, Tensor]:
    """Pictures [N,3,H,W] in [0,1], disturbed, and labels [N] of one step."""
    rng = np.random.default_rng([config.seed, step])
    T = data.frames.shape[1] - 1
    pictures, labels = [], []
    for _ in range(config.batch):
        episode = int(rng.integers(trained))
        settled = rng.random() < config.settled_share
        time = int(rng.integers(T - SETTLED + 1, T + 1) if settled else rng.integers(T + 1))
        pictures.append(data.frames[episode, time])
        labels.append(label_at(data, episode, time))
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return disturb(batch, rng), torch.tensor(labels)


def disturb(pictures_N3HW: Tensor, rng: np.random.Generator) -> Tensor:
    """Shift, soften, brighten and add noise, each picture by its own amounts."""
    N, _, H, W = pictures_N3HW.shape
    most = max(1, H // 20)
    padded = F.pad(pictures_N3HW, (most,) * 4, mode="replicate")
    corners = rng.integers(2 * most + 1, size=(N, 2))
    out = torch.stack([x[:, r : r + H, c : c + W] for x, (r, c) in zip(padded, corners)])
    scales = torch.from_numpy(rng.choice([1, 2, 3], size=N, p=[0.4, 0.4, 0.2]))
    for scale in (2, 3):  # soft as an autoencoder's picture: through a smaller one and back
        rows = scales == scale
        if rows.any():
            small = F.interpolate(out[rows], scale_factor=1 / scale, mode="area")
            soft = F.interpolate(small, size=(H, W), mode="bilinear", align_corners=False)
            share = torch.from_numpy(rng.uniform(0.4, 1, (int(rows.sum()), 1, 1, 1))).float()
            out[rows] = share * soft + (1 - share) * out[rows]
    gain = torch.from_numpy(rng.uniform(0.92, 1.08, (N, 3, 1, 1))).float()
    noise = torch.from_numpy(rng.standard_normal(out.shape, np.float32))
    level = torch.from_numpy(rng.uniform(0, 0.03, (N, 1, 1, 1))).float()
    return (out * gain + level * noise).clamp(0, 1)


def accuracy_on(
    classifier: OutcomeClassifier, frames: npt.NDArray[np.uint8], success: npt.NDArray[np.bool_]
) -> Alignment:
    """Agreement with the true outcomes of final frames [N,H,W,3]."""
    return outcome_alignment(success, classifier.success(frames))


def train(config: OutcomeTraining) -> OutcomeClassifier:
    """Train, measure on held-out final frames, save; return the classifier."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    data = load_arrays(config.data, config.limit)
    trained = len(data) - config.held_out
    if trained < 1:
        raise UserError(f"held_out is {config.held_out}; {config.data} holds {len(data)} episodes")
    ends = data.reward[:trained, -1] > 0.5
    if ends.all() or not ends.any():
        raise UserError(
            f"{config.data}: all {trained} episodes to train on end alike; a classifier needs "
            "both outcomes (collect without --expert)"
        )
    net = OutcomeNet(config.width)
    opt = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, config.lr, config.steps, pct_start=0.1)
    with Progress(config.steps, "train outcome", unit="step") as progress:
        for step in range(config.steps):
            pictures, labels = batch_at(data, trained, config, step)
            loss = F.binary_cross_entropy_with_logits(net(pictures), labels)
            opt.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            opt.step()
            rate.step()
            progress.update(1, loss=float(loss.detach()))
    net.half().float()  # the weights as they are saved
    final = np.ascontiguousarray(data.frames[trained:, -1])
    record: dict[str, Any] = {"training": config_to_dict(config), "episodes": trained}
    size = data.frames.shape[2]
    classifier = OutcomeClassifier(net, size, data.env_id, record)
    truth = data.reward[trained:, -1] > 0.5
    right = accuracy_on(classifier, final, truth)
    soft = F.interpolate(torch.from_numpy(final).permute(0, 3, 1, 2).float(), scale_factor=0.5)
    soft = F.interpolate(soft, size=(size, size), mode="bilinear").permute(0, 2, 3, 1)
    right_soft = accuracy_on(classifier, soft.round().byte().numpy(), truth)
    record |= {
        "held_out_accuracy": right.rate,
        "held_out_interval": list(right.interval),
        "held_out_confusion": right.to_dict(),
        "held_out_accuracy_at_half_resolution": right_soft.rate,
    }
    classifier.save(config.out)
    return classifier


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(OutcomeTraining, argv, "worldloop train outcome")
    record = train(config).record
    low, high = record["held_out_interval"]
    print(
        f"{config.out}: right on {record['held_out_accuracy']:.1%} of {config.held_out} held-out "
        f"final frames (95 % interval {low:.1%} .. {high:.1%}), "
        f"{record['held_out_accuracy_at_half_resolution']:.1%} at half the resolution"
    )
    return 0
