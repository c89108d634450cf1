"""Who can tell the outcome of an episode: a classifier of pictures, and one that sees no picture.

`OutcomeNet` looks at one frame and says whether the task is done in it; trained on real frames
only (`training/outcome.py`), it judges imagined ones: the paper's visual alignment (section 4.2).

`actions_only_accuracy` is the control: the label must not be readable from the actions, or a world
model could "know" the outcome without imagining anything. It is an honest attempt to read it:
linear and nonlinear models over paths, speeds and timing, hyperparameters chosen inside the
training folds, the best model's held-out accuracy reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from worldloop.checkpoint import load_checkpoint, load_into, save_checkpoint
from worldloop.config import read_json
from worldloop.errors import UserError
from worldloop.files import atomic_write_text
from worldloop.types import Actions

Array = npt.NDArray[np.float64]
_KIND = "outcome-classifier"


# ---------------------------------------------------------------- pictures


class OutcomeNet(nn.Module):
    """A small CNN from one RGB frame [N,3,H,W] in [0,1] to the logit of success [N].

    The outcome is a matter of where things lie to each other (a cube within a disc). Features see
    73 pixels around each place and are pooled by maximum: one place that looks right is enough.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = w = width
        self.features = nn.Sequential(
            nn.Conv2d(3, w, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(2 * w, 2 * w, 3, padding=1), nn.ReLU(),
            nn.Conv2d(2 * w, 4 * w, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(4 * w, 4 * w, 3, padding=1), nn.ReLU(),
            nn.Conv2d(4 * w, 4 * w, 3, padding=2, dilation=2), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(8 * w, 1)

    def forward(self, pictures_N3HW: Tensor) -> Tensor:
        x = self.features(pictures_N3HW - 0.5)
        pooled = torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)
        logits: Tensor = self.head(pooled)
        return logits[:, 0]


class OutcomeClassifier:
    """A trained `OutcomeNet` with the picture size and the task that it knows."""

    def __init__(self, net: OutcomeNet, image_size: int, env_id: str, record: dict[str, Any]):
        self.net, self.image_size, self.env_id, self.record = net.eval(), image_size, env_id, record

    @torch.no_grad()
    def probability(self, frames_NHW3: npt.NDArray[np.uint8], batch: int = 64) -> Array:
        """Probability of success [N] in [0,1] for uint8 frames [N,H,W,3].

        Raises UserError when the frames are not of the size the classifier was trained on.
        """
        expected = (self.image_size, self.image_size, 3)
        if frames_NHW3.dtype != np.uint8 or frames_NHW3.shape[1:] != expected:
            raise UserError(
                f"frames: {frames_NHW3.dtype} {list(frames_NHW3.shape)}; the outcome classifier "
                f"takes uint8 [N, {', '.join(map(str, expected))}]"
            )
        parts = []
        for i in range(0, len(frames_NHW3), batch):
            picture = torch.from_numpy(np.ascontiguousarray(frames_NHW3[i : i + batch]))
            parts.append(torch.sigmoid(self.net(picture.permute(0, 3, 1, 2).float() / 255)))
        return torch.cat(parts).double().numpy() if parts else np.zeros(0)

    def success(self, frames_NHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Whether each uint8 frame [N,H,W,3] shows a success, as bool [N]."""
        return self.probability(frames_NHW3) > 0.5

    def save(self, folder: Path | str) -> Path:
        """Write weights and what they are for; atomic."""
        config = {
            "width": self.net.width,
            "image_size": self.image_size,
            "env_id": self.env_id,
            "record": self.record,
        }
        state = {k: v.half() for k, v in self.net.state_dict().items()}
        return save_checkpoint(folder, state, config, kind=_KIND)

    @classmethod
    def load(cls, folder: Path | str) -> OutcomeClassifier:
        """Read a folder written by `save`; raises UserError naming the file that is wrong."""
        checkpoint = load_checkpoint(folder, kind=_KIND)
        try:
            values = {k: checkpoint.config[k] for k in ("width", "image_size", "env_id", "record")}
        except KeyError as error:
            raise UserError(f"{folder}/config.json: {error} is missing; restore it") from error
        net = OutcomeNet(values["width"])
        load_into(net, checkpoint.parts["model"], str(folder))
        return cls(net, values["image_size"], values["env_id"], values["record"])


# ---------------------------------------------------------------- actions only


def action_features(actions_NTA: Actions) -> dict[str, Array]:
    """Views of action sequences [N,T,A] that an outcome might be read from, each [N,D].

    ``flat``: every action. ``path``: every fourth point of the commanded path with every fourth
    action. ``summary``: extent, length, speeds by quarter, when motion starts, peaks and ends.
    """
    actions = np.asarray(actions_NTA, np.float64)
    N, T, _ = actions.shape
    path = actions[..., :3].cumsum(1)
    speed = np.linalg.norm(actions[..., :3], axis=-1)
    moving = speed > 0.25 * np.maximum(speed.max(1, keepdims=True), 1e-9)
    first = moving.argmax(1)
    last = T - 1 - moving[:, ::-1].argmax(1)
    quarters = np.stack([part.mean(1) for part in np.array_split(speed, 4, axis=1)], 1)
    turns = np.abs(np.diff(actions, axis=1)).mean(1)
    summary = np.concatenate(
        [
            path[:, -1], path.min(1), path.max(1), path.argmin(1), path.argmax(1),
            quarters, speed.max(1, keepdims=True), speed.std(1)[:, None],
            speed.argmax(1)[:, None], first[:, None], last[:, None], moving.sum(1)[:, None],
            turns, actions.mean(1), actions.std(1),
        ],
        axis=1,
    )  # fmt: skip
    coarse = np.concatenate([path[:, 3::4].reshape(N, -1), actions[:, ::4].reshape(N, -1)], 1)
    return {
        "flat": actions.reshape(N, -1),
        "path": np.concatenate([coarse, summary], 1),
        "summary": summary,
    }


def _standardise(train: Array, test: Array) -> tuple[Array, Array]:
    mean, std = train.mean(0), train.std(0)
    std = np.where(std > 1e-9, std, np.inf)  # constant columns become zeros
    return (train - mean) / std, (test - mean) / std


def _distances(a: Array, b: Array) -> Array:
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0)


def _kernel_ridge(kernels: list[tuple[Array, Array]], y: Array) -> Array:
    """Scores of the test rows; kernel and ridge chosen by leave-one-out on the training rows.

    ``kernels`` holds candidates (train x train, test x train). With K = U s U', the leave-one-out
    residual of ridge r is alpha / diag((K + r)^-1), so each candidate costs one decomposition.
    """
    best, scores = -1.0, np.zeros(len(kernels[0][1]))
    for K, K_test in kernels:
        s, U = np.linalg.eigh(K)
        scale = float(np.trace(K)) / len(K)
        for ridge in scale * np.logspace(-3, 2, 11):
            shrink = 1 / (np.maximum(s, 0) + ridge)
            alpha = U @ (shrink * (U.T @ y))
            left_out = y - alpha / ((U**2) @ shrink)
            right = float((np.sign(left_out) == y).mean())
            if right > best:
                best, scores = right, K_test @ alpha
    return scores


def _linear(train: Array, y: Array, test: Array) -> Array:
    return _kernel_ridge([(train @ train.T, test @ train.T)], y)


def _gaussian(train: Array, y: Array, test: Array) -> Array:
    near, far = _distances(train, train), _distances(test, train)
    typical = float(np.median(near))
    widths = [typical * factor for factor in (0.1, 0.3, 1.0, 3.0)]
    return _kernel_ridge([(np.exp(-near / w), np.exp(-far / w)) for w in widths], y)


def _neighbours(train: Array, y: Array, test: Array) -> Array:
    near, far = _distances(train, train), _distances(test, train)
    np.fill_diagonal(near, np.inf)
    order, order_test = near.argsort(1), far.argsort(1)
    counts = [k for k in (1, 3, 5, 9, 15, 31) if k < len(train)]
    right = [float((np.sign(y[order[:, :k]].sum(1)) == y).mean()) for k in counts]
    return y[order_test[:, : counts[int(np.argmax(right))]]].sum(1)


_MODELS: dict[str, tuple[str, Callable[[Array, Array, Array], Array]]] = {
    "ridge on every action": ("flat", _linear),
    "ridge on path and timing": ("path", _linear),
    "ridge on summary": ("summary", _linear),
    "Gaussian kernel on path and timing": ("path", _gaussian),
    "Gaussian kernel on summary": ("summary", _gaussian),
    "nearest neighbours on summary": ("summary", _neighbours),
}


def _folds(y: Array, folds: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.bool_]]:
    """Masks of the test rows of each fold, the outcomes spread evenly."""
    fold_of = np.empty(len(y), np.int64)
    for outcome in (-1.0, 1.0):
        rows = rng.permutation(np.flatnonzero(y == outcome))
        fold_of[rows] = (np.arange(len(rows)) + rng.integers(folds)) % folds
    return (fold_of == fold for fold in range(folds))


def actions_only_accuracy(
    actions_NTA: Actions,
    success_N: npt.NDArray[np.bool_],
    seed: int = 0,
    folds: int = 5,
    most: int = 2000,
) -> dict[str, Any]:
    """Cross-validated accuracy of guessing the outcome from the actions alone.

    Returns ``accuracy`` (of the best model), ``model`` (its name), ``models`` (accuracy by name),
    ``majority`` (always guessing the commoner outcome), ``episodes`` and ``folds``. At most
    ``most`` episodes, drawn with ``seed``, are used. Taking the best of several models leans
    upwards by a point or two: it overstates rather than hides a leak.
    Raises UserError when there are fewer than ``2 * folds`` episodes of either outcome.
    """
    actions, success = np.asarray(actions_NTA), np.asarray(success_N, bool)
    if actions.ndim != 3 or success.shape != actions.shape[:1]:
        raise UserError(
            f"actions {list(actions.shape)} and success {list(success.shape)}; "
            "expected [N, T, A] and [N]"
        )
    rng = np.random.default_rng(seed)
    if len(actions) > most:
        rows = rng.permutation(len(actions))[:most]
        actions, success = actions[rows], success[rows]
    fewest = int(min(success.sum(), (~success).sum()))
    if fewest < 2 * folds:
        raise UserError(
            f"actions-only accuracy: {fewest} episodes of the rarer outcome; "
            f"{folds} folds need at least {2 * folds}"
        )
    y = np.where(success, 1.0, -1.0)
    views = action_features(actions.astype(np.float32))
    right = {name: 0 for name in _MODELS}
    for test in _folds(y, folds, rng):
        for name, (view, model) in _MODELS.items():
            train_x, test_x = _standardise(views[view][~test], views[view][test])
            scores = model(train_x, y[~test], test_x)
            right[name] += int(((scores > 0) == success[test]).sum())
    models = {name: count / len(y) for name, count in right.items()}
    best = max(models, key=lambda name: models[name])
    return {
        "accuracy": models[best],
        "model": best,
        "models": models,
        "majority": float(max(success.mean(), 1 - success.mean())),
        "episodes": len(y),
        "folds": folds,
    }


ACTIONS_ONLY = "meta/actions_only.json"  # in a dataset's folder


def save_actions_only(dataset: Path | str, result: dict[str, Any]) -> None:
    """Keep the result of `actions_only_accuracy` with the dataset it was measured on."""
    atomic_write_text(Path(dataset) / ACTIONS_ONLY, json.dumps(result, indent=2) + "\n")


def load_actions_only(dataset: Path | str) -> dict[str, Any] | None:
    """The result kept with a dataset, or None where none was measured."""
    path = Path(dataset) / ACTIONS_ONLY
    return read_json(path) if path.exists() else None
