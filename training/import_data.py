"""`worldloop data import`: recorded or teleoperated episodes of a robot become SANS episodes.

Two formats: LeRobotDataset v3 folders, and folders of `NAME.mp4` beside `NAME.csv` with a row a
frame (columns x, y, z, rx, ry, rz, gripper and, where commands were recorded, action_x ...).
Nothing about actions is guessed: the spec is named, the frame rate must be its control rate.
Outcomes come from the dataset's own next.success or next.reward, or from a file (`--labels`).

Shape letters: n frames of a recording, T actions of an episode, A action dim, H W pixels.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import tyro
from PIL import Image

from worldloop.config import positive, read_json
from worldloop.episodes import DatasetMeta, EpisodeWriter
from worldloop.errors import UserError
from worldloop.files import new_folder
from worldloop.labels import Label, read_labels
from worldloop.lerobot import EPISODES
from worldloop.track import Progress
from worldloop.types import ActionSpec, Episode
from worldloop.video import decode_video, video_facts

Float = npt.NDArray[np.float32]
Pictures = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImportConfig:
    """Make a dataset of recorded episodes."""

    source: tyro.conf.Positional[Path]
    """LeRobotDataset v3 folder, or folder of NAME.mp4 + NAME.csv."""
    out: Path
    spec: Path
    """What the actions mean: a JSON file of ActionSpec's fields, or a dataset or checkpoint folder
    with the same."""
    env: str
    """Name of the task."""
    labels: Path | None = None
    """Outcomes, CSV or JSON (episode, success, first frame of success); LeRobot episodes go by
    their index, videos by their name."""
    instruction: str = ""
    """Told to the policy; without it, the dataset's own."""
    horizon: int = 72
    """Actions of every episode: shorter recordings stand still at their end."""
    longer: Literal["error", "tail"] = "error"
    """Recordings longer than that: an error, or their last part is taken."""
    held: int = 8
    """Last frames that show a success, where the label names no frame."""
    image_size: int = 128
    video: str | None = None
    """LeRobot's key of the camera, where there are several."""
    state: str = "observation.state"
    """LeRobot's column of the end-effector pose."""
    state_columns: tuple[int, ...] | None = None
    """Which of its numbers are the pose, in the spec's order; all of them without it."""
    action: str = "action"
    action_columns: tuple[int, ...] | None = None
    camera: str = "recorded"
    """Name of the view; only datasets of one view can be merged."""
    first_seed: int = 0
    """Number of the first episode."""
    shard: int = 16
    crf: int = 16

    def __post_init__(self) -> None:
        positive(self, "horizon", "held", "shard")
        if self.image_size % 16 or self.image_size < 16:
            raise UserError(f"image_size is {self.image_size}; expected a multiple of 16")


@dataclass(frozen=True)
class Recording:
    """What a source says of an episode; pictures are decoded when they are needed."""

    name: str
    where: str
    frames: Callable[[], Pictures]  # [n,H,W,3]
    states: Float  # [n,A]
    actions: Float | None  # [n-1,A]; None where no commands were recorded
    success: npt.NDArray[np.bool_] | None  # [n-1] after each action
    instruction: str


# ---------------------------------------------------------------- sources


def read_spec(path: Path) -> ActionSpec:
    """The action spec of a JSON file, of a dataset, or of a world model or policy."""
    if (path / "meta/worldloop.json").is_file():
        return DatasetMeta.load(path / "meta/worldloop.json").action_spec
    if path.is_dir():
        values = read_json(path / "config.json").get("config", {})
        if "action_spec" not in values:
            raise UserError(f"{path}/config.json: names no action_spec")
        return ActionSpec.from_dict(values["action_spec"])
    return ActionSpec.from_dict(read_json(path))


def lerobot_recordings(config: ImportConfig, spec: ActionSpec) -> Iterator[Recording]:
    """Episodes of a LeRobotDataset v3."""
    root = config.source
    info = read_json(root / "meta/info.json")
    if info.get("codebase_version") != "v3.0":
        raise UserError(
            f"{root}/meta/info.json: codebase_version is {info.get('codebase_version')!r}; "
            "expected 'v3.0' (LeRobot converts older datasets)"
        )
    _require_rate(float(info["fps"]), spec, str(root))
    key = _video_key(info, config)
    known = info["features"]
    for column in (config.state, config.action):
        if column not in known:
            raise UserError(f"{root}: has no column {column!r}; there are {', '.join(known)}")
    outcome = next((c for c in ("next.success", "next.reward") if c in known), None)
    tables: dict[str, Any] = {}
    for entry in _lerobot_index(root):
        place = {name: entry[f"data/{name}"] for name in ("chunk_index", "file_index")}
        path = _within(root, info["data_path"].format(**place))
        if str(path) not in tables:
            tables = {str(path): pq.read_table(path)}
        table = tables[str(path)]
        number = entry["episode_index"]
        numbers = table["episode_index"].to_numpy()
        rows = table.filter(numbers == number)
        n, where = rows.num_rows, f"{root}: episode {number}"
        video = {name: entry[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
        clip = _within(root, info["video_path"].format(video_key=key, **video))
        first = round(entry[f"videos/{key}/from_timestamp"] * info["fps"])

        def frames(clip: Path = clip, first: int = first, n: int = n) -> Pictures:
            return decode_video(clip, first, n, int(info["fps"]))

        success = None
        if outcome is not None:
            flags = np.asarray(rows[outcome].to_pylist(), np.float32).reshape(n) > 0.5
            # The last row's flag belongs to no later frame: where an episode ends with its success,
            # that is the only one.
            success = flags[:-1].copy()
            success[-1] |= flags[-1]
        yield Recording(
            str(number), where, frames,
            _columns(rows[config.state].to_pylist(), config.state_columns, spec, where, "state"),
            _columns(rows[config.action].to_pylist(), config.action_columns, spec, where,
                     "action")[:-1],
            success, entry["tasks"][0] if entry.get("tasks") else "",
        )  # fmt: skip


def _lerobot_index(root: Path) -> Iterator[dict[str, Any]]:
    folder = EPISODES.split("/chunk")[0]
    paths = sorted((root / folder).glob("chunk-*/file-*.parquet"))
    if not paths:
        raise UserError(f"{root}/{folder}: no episodes are listed there")
    for path in paths:
        yield from pq.read_table(path).to_pylist()


def _video_key(info: dict[str, Any], config: ImportConfig) -> str:
    keys = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    if config.video is not None and config.video not in keys:
        raise UserError(f"video: no camera {config.video!r}; there are {', '.join(keys)}")
    if config.video is None and len(keys) != 1:
        raise UserError(f"video: choose one of the cameras {', '.join(keys) or '(none)'}")
    return config.video or keys[0]


def _columns(
    values: list[Any], chosen: tuple[int, ...] | None, spec: ActionSpec, where: str, name: str
) -> Float:
    array = np.asarray(values, np.float32).reshape(len(values), -1)
    if chosen is not None:
        if max(chosen) >= array.shape[1]:
            raise UserError(f"{name}_columns: {where} has {array.shape[1]} numbers")
        array = array[:, list(chosen)]
    if array.shape[1] != spec.dim:
        raise UserError(
            f"{where}: {name} has {array.shape[1]} numbers, the spec {spec.dim} "
            f"({', '.join(spec.names)}); choose with --{name}-columns"
        )
    return array


def csv_recordings(config: ImportConfig, spec: ActionSpec) -> Iterator[Recording]:
    """Videos with a CSV of poses beside each."""
    for path in sorted(config.source.glob("*.csv")):
        clip = path.with_suffix(".mp4")
        if not clip.is_file():
            raise UserError(f"{path}: no {clip.name} beside it")
        states, actions = _read_poses(path, spec)
        n = len(states)
        count, rate = video_facts(clip)
        _require_rate(rate, spec, str(clip))
        if count != n:
            raise UserError(f"{clip}: {count} frames, {path.name} has {n} rows; one a frame")

        def frames(clip: Path = clip, n: int = n) -> Pictures:
            return decode_video(clip, 0, n, int(spec.control_hz))

        yield Recording(path.stem, str(path), frames, states, actions, None, "")


def _read_poses(path: Path, spec: ActionSpec) -> tuple[Float, Float | None]:
    with open(path, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        columns, rows = list(reader.fieldnames or []), list(reader)
    commands = [f"action_{name}" for name in spec.names]
    unknown = [name for name in columns if name not in (*spec.names, *commands, "frame", "time")]
    missing = [name for name in spec.names if name not in columns]
    if unknown or missing or len(rows) < 2:
        said = f"unknown column {unknown[0]!r}" if unknown else f"no column {missing[0]!r}"
        said = said if unknown or missing else "fewer than two rows"
        raise UserError(
            f"{path}: {said}; expected {', '.join(spec.names)}, perhaps action_{spec.names[0]} "
            "..., frame and time, and a row a frame"
        )

    def numbers(names: tuple[str, ...] | list[str]) -> Float:
        try:
            return np.array([[float(row[name]) for name in names] for row in rows], np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {error}; every cell must be a number") from error

    have = [name for name in commands if name in columns]
    if have and len(have) != len(commands):
        raise UserError(f"{path}: has {have[0]} but not all of {', '.join(commands)}")
    return numbers(spec.names), numbers(commands)[:-1] if have else None


def _require_rate(rate: float, spec: ActionSpec, where: str) -> None:
    if abs(rate - spec.control_hz) > 0.01:
        raise UserError(
            f"{where}: {rate:g} frames a second, the spec's control rate is {spec.control_hz:g}; "
            "resample the recording, or name its own spec"
        )


# ---------------------------------------------------------------- episodes


def commands_of(spec: ActionSpec, states: Float, where: str) -> Float:
    """Actions [n-1,A] that lead through recorded poses [n,A].

    Absolute: the next pose. Delta: the commands whose filtered sum (`ActionSpec.controller`)
    comes closest to the recorded motion, in the least squares sense, clipped to the bounds.
    """
    if spec.kind == "absolute_pose":
        return states[1:].copy()
    if spec.controller is None:
        raise UserError(
            f"{where}: no commands were recorded and the spec has no controller to tell them from "
            "the motion; add action_ columns, or a controller fit"
        )
    out = states[1:].copy()
    for part, taps in (
        (slice(0, 3), spec.controller.position_taps), (slice(3, 6), spec.controller.rotation_taps),
    ):  # fmt: skip
        moved = np.diff(states[:, part].astype(np.float64), axis=0)
        T = len(moved)
        filtered = sum(tap * np.eye(T, k=-k) for k, tap in enumerate(taps))
        scale = float(np.abs(taps).sum())
        ridge = 0.03 * scale * np.eye(T)  # or the taps' inverse would swing from bound to bound
        system = np.concatenate([filtered, ridge])
        wanted = np.concatenate([moved, np.zeros_like(moved)])
        out[:, part] = np.linalg.lstsq(system, wanted, rcond=None)[0]
    out = np.clip(out, spec.low, spec.high).astype(np.float32)
    return out


def _within(root: Path, name: str) -> Path:
    """A file that a foreign dataset names; raises UserError where it lies outside it."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise UserError(f"{root}/meta/info.json: names {name!r}, which is outside the dataset")
    return path


def episode_of(
    recording: Recording, label: Label | None, config: ImportConfig, spec: ActionSpec, seed: int
) -> Episode:
    """A recording as an episode of ``config.horizon`` actions."""
    where, T = recording.where, config.horizon
    actions = recording.actions
    if actions is None:
        actions = commands_of(spec, recording.states, where)
    spec.check(actions[None], f"{where}: actions")
    n = len(recording.states)
    if n - 1 > T and config.longer == "error":
        raise UserError(
            f"{where}: {n - 1} actions, horizon is {T}; raise --horizon, or take the last part "
            "with --longer tail"
        )
    reward = reward_of(recording, label, config.held)
    frames = np.stack([fitted(picture, config.image_size) for picture in recording.frames()])
    states = recording.states
    if n - 1 > T:
        frames, states = frames[-T - 1 :], states[-T - 1 :]
        actions, reward = actions[-T:], reward[-T:]
    else:
        more = T - (n - 1)
        still = actions[-1:].copy()
        if spec.kind == "delta_pose":
            still[:, :6] = 0
        frames, states, reward = (
            np.concatenate([x, np.repeat(x[-1:], more, 0)]) for x in (frames, states, reward)
        )
        actions = np.concatenate([actions, np.repeat(still, more, 0)])
    return Episode(
        frames=frames,
        actions=actions,
        states=states,
        reward=reward,
        instruction=config.instruction or recording.instruction,
        env_id=config.env,
        seed=seed,
        success=bool(reward[-1] > 0.5),
        info={"source": recording.name, "recorded_actions": n - 1},
    )


def reward_of(recording: Recording, label: Label | None, held: int) -> Float:
    """1 for each action after which the success is there, [n-1]."""
    count = len(recording.states) - 1
    if label is None:
        if recording.success is None:
            raise UserError(
                f"{recording.where}: nothing says how it ended; add it to --labels "
                f"(episode {recording.name!r})"
            )
        return recording.success.astype(np.float32)
    reward = np.zeros(count, np.float32)
    if label.success:
        first = count + 1 - held if label.frame is None else label.frame
        if label.frame is not None and not 1 <= label.frame <= count:
            raise UserError(
                f"{recording.where}: its label names frame {label.frame}, it has frames 0 .. "
                f"{count}, and the first is before any action"
            )
        reward[max(0, first - 1) :] = 1
    return reward


def fitted(picture: Pictures, size: int) -> Pictures:
    """The middle square of a picture [H,W,3], scaled to ``size``."""
    H, W = picture.shape[:2]
    if (size, size) == (H, W):
        return picture
    side = min(H, W)
    top, left = (H - side) // 2, (W - side) // 2
    square = Image.fromarray(picture[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def import_data(config: ImportConfig) -> int:
    """Write the dataset; print what it holds. Raises UserError naming the episode and the fix."""
    spec = read_spec(config.spec)
    labels = read_labels(config.labels) if config.labels is not None else {}
    if (config.source / "meta/info.json").is_file():
        recordings = list(lerobot_recordings(config, spec))
    else:
        recordings = list(csv_recordings(config, spec))
    if not recordings:
        raise UserError(
            f"{config.source}: neither a LeRobotDataset (meta/info.json) nor NAME.mp4 with NAME.csv"
        )
    unknown = [name for name in labels if name not in {r.name for r in recordings}]
    if unknown:
        raise UserError(f"{config.labels}: names episode {unknown[0]!r}, which there is not")
    if not config.instruction and not all(r.instruction for r in recordings):
        raise UserError("instruction: the source names no task; say what the policy is told")
    meta = DatasetMeta(spec, config.env, {"name": config.camera}, config.horizon, config.image_size)
    shard: list[Episode] = []
    successes = 0
    with (
        new_folder(config.out) as folder,
        Progress(len(recordings), "import", unit="ep") as progress,
    ):
        writer = EpisodeWriter(folder, meta, config.crf)
        for i, recording in enumerate(recordings):
            seed = config.first_seed + i
            episode = episode_of(recording, labels.get(recording.name), config, spec, seed)
            successes += int(episode.success)
            shard.append(episode)
            if len(shard) == config.shard or i + 1 == len(recordings):
                writer.add(shard)
                shard = []
            progress.update()
    print(f"{config.out}: {len(recordings)} episodes of {config.env}, {successes} successes")
    return 0
