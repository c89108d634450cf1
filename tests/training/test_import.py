"""Episodes from outside the simulator, made from simulated ones in the formats robots record."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import worldloop
from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.labels import read_labels
from worldloop.lerobot import DATA, EPISODES, VIDEO, VIDEO_KEY, place_of
from worldloop.metrics import psnr
from worldloop.training.data import fit_action_spec
from worldloop.training.dataset_card import main
from worldloop.types import ActionSpec
from worldloop.video import encode_video

SHIPPED = Path(worldloop.__file__).parent / "data/demo-pushcube"
COUNT = 4


@pytest.fixture(scope="module")
def simulated() -> EpisodeDataset:
    return EpisodeDataset(SHIPPED)


@pytest.fixture(scope="module")
def spec(simulated: EpisodeDataset) -> ActionSpec:
    """With the controller's fit, as `worldloop data stats` prints it."""
    episodes = [simulated.read(i, frames=False) for i in range(12)]
    return fit_action_spec(
        simulated.meta.action_spec,
        np.stack([e.actions for e in episodes]),
        np.stack([e.states for e in episodes]),
    )


@pytest.fixture
def spec_file(tmp_path: Path, spec: ActionSpec) -> Path:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec.to_dict()))
    return path


@pytest.fixture
def lerobot(tmp_path: Path) -> Path:
    """A LeRobotDataset v3 as others write it: nothing of ours in it, actions in other columns."""
    root = tmp_path / "lerobot"
    shutil.copytree(SHIPPED, root, ignore=shutil.ignore_patterns(".*"))
    (root / "meta/worldloop.json").unlink()
    info = json.loads((root / "meta/info.json").read_text())
    place = place_of(0)
    rows = pq.read_table(root / DATA.format(**place))
    rows = rows.drop_columns(
        ["observation.environment_state", "observation.object_pixels", "next.reward"]
    )
    for name in ("observation.environment_state", "observation.object_pixels", "next.reward"):
        del info["features"][name]
    # Joints before the pose, as many robots record them.
    states = np.asarray(rows["observation.state"].to_pylist(), np.float32)
    at = rows.schema.get_field_index("observation.state")
    joined = np.concatenate([np.zeros((len(states), 7), np.float32), states], 1)
    rows = rows.set_column(at, "observation.state", [list(joined)])
    index = pq.read_table(root / EPISODES.format(**place))
    index = index.drop_columns(["success", "seed", "env_id", "info"]).slice(0, COUNT)
    pq.write_table(rows, root / DATA.format(**place))
    pq.write_table(index, root / EPISODES.format(**place))
    for shard in range(1, info["worldloop_shards"]):
        for name in (DATA, EPISODES, VIDEO):
            (root / name.format(video_key=VIDEO_KEY, **place_of(shard))).unlink()
    del info["worldloop_shards"]
    info["total_episodes"] = COUNT
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def write_take(
    folder: Path, name: str, simulated: EpisodeDataset, number: int, length: int = 73,
    commands: bool = False,
) -> None:  # fmt: skip
    folder.mkdir(exist_ok=True)
    episode, names = simulated.read(number), simulated.meta.action_spec.names
    encode_video(folder / f"{name}.mp4", [episode.frames[:length]], 20, 12)
    with open(folder / f"{name}.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["frame", *names, *(f"action_{n}" for n in names if commands)])
        for t in range(length):
            action = list(episode.actions[min(t, 71)]) if commands else []
            writer.writerow([t, *episode.states[t], *action])


def run(source: Path, out: Path, spec: Path, *more: str) -> EpisodeDataset:
    argv = ["import", str(source), "--out", str(out), "--spec", str(spec), "--env", "robot-push"]
    assert main([*argv, *more]) == 0
    return EpisodeDataset(out)


def test_a_lerobot_dataset(lerobot, tmp_path, simulated, spec_file):
    columns = ["--state-columns", *map(str, range(7, 14))]
    dataset = run(lerobot, tmp_path / "out", spec_file, *columns)
    assert len(dataset) == COUNT and dataset.meta.env_id == "robot-push"
    for own, true in zip(dataset.stream(), simulated.stream()):
        np.testing.assert_array_equal(own.actions, true.actions)
        np.testing.assert_array_equal(own.states, true.states)
        np.testing.assert_array_equal(own.reward, true.reward)
        assert own.success == true.success and own.instruction == true.instruction
        assert psnr(true.frames, own.frames).min() > 35, "encoded once more, hardly changed"
        assert own.objects is None
    assert main(["validate", str(tmp_path / "out")]) == 0
    # What a human enters goes before what the dataset says.
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"0": False, "1": {"success": True, "frame": 30}}))
    other = run(
        lerobot, tmp_path / "labelled", spec_file, *columns, "--labels", str(labels),
        "--image-size", "64",
    )  # fmt: skip
    assert not other.read(0).success and other.read(1).success
    assert other.read(1).reward.sum() == 72 - 29 and other.read(0).frames.shape[1:] == (64, 64, 3)
    assert other.success[2:].tolist() == simulated.success[2:COUNT].tolist()


def test_episodes_that_end_with_their_success(lerobot, tmp_path, simulated, spec_file):
    """Only the last row says so, for which there is no later frame."""
    path = lerobot / DATA.format(**place_of(0))
    rows = pq.read_table(path)
    last = np.append(np.diff(rows["episode_index"].to_numpy()) > 0, True)
    at = rows.schema.get_field_index("next.success")
    pq.write_table(rows.set_column(at, "next.success", [last]), path)
    dataset = run(lerobot, tmp_path / "out", spec_file, "--state-columns", *map(str, range(7, 14)))
    assert dataset.success.all() and len(dataset) == COUNT
    assert [float(e.reward.sum()) for e in dataset.stream(frames=False)] == [1.0] * COUNT


def test_video_and_poses(tmp_path, simulated, spec, spec_file):
    takes = tmp_path / "takes"
    write_take(takes, "a", simulated, 0, commands=True)
    write_take(takes, "b", simulated, 40, length=50)
    labels = tmp_path / "labels.csv"
    labels.write_text("episode,success,frame\na,1,\nb,0,\n")
    options = ("--labels", str(labels), "--instruction", "push it")
    dataset = run(takes, tmp_path / "out", spec_file, *options)
    a, b = dataset.stream()
    np.testing.assert_allclose(a.actions, simulated.read(0).actions, atol=1e-6)
    assert a.success and a.reward.sum() == 8 and a.instruction == "push it"
    assert not b.success and b.info["recorded_actions"] == 49
    # Too short: it stands still at its end.
    assert (b.actions[49:, :6] == 0).all() and (b.actions[49:, 6] == b.actions[48, 6]).all()
    np.testing.assert_array_equal(b.states[49:], np.repeat(b.states[49:50], 24, 0))
    np.testing.assert_array_equal(b.frames[60], b.frames[72])
    # Commands told from the motion lead along the recorded path.
    recorded = simulated.read(40, frames=False).states[:50]
    poses = spec.to_absolute(b.actions[None, :49], recorded[None, 0])[0]
    assert np.abs(poses[:, :3] - recorded[1:, :3]).max() < 0.004
    assert np.abs(poses[:, :3] - recorded[:1, :3]).max() > 0.05, "it does move"


def test_an_imported_dataset_merges_with_another(tmp_path, simulated, spec_file):
    takes = tmp_path / "takes"
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"x": True}))
    write_take(takes, "x", simulated, 1, commands=True)
    options = ("--labels", str(labels), "--instruction", "push it")
    first = run(takes, tmp_path / "first", spec_file, *options)
    shutil.rmtree(takes)
    write_take(takes, "x", simulated, 2, commands=True)
    second = run(takes, tmp_path / "second", spec_file, *options, "--first-seed", "10")
    argv = ["merge", str(first.root), str(second.root), "--out", str(tmp_path / "both")]
    assert main(argv) == 0
    assert EpisodeDataset(tmp_path / "both").seeds == [0, 10]
    assert main(["validate", str(tmp_path / "both")]) == 0


def test_absolute_poses_are_their_own_commands(tmp_path, simulated):
    spec = ActionSpec(kind="absolute_pose", low=(-4.0,) * 7, high=(4.0,) * 7)
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec.to_dict()))
    write_take(tmp_path / "takes", "a", simulated, 0)
    (tmp_path / "labels.json").write_text('{"a": true}')
    dataset = run(
        tmp_path / "takes", tmp_path / "out", path, "--labels", str(tmp_path / "labels.json"),
        "--instruction", "push",
    )  # fmt: skip
    episode = dataset.read(0)
    np.testing.assert_allclose(episode.actions, episode.states[1:], atol=1e-6)


def test_bad_input_is_named_and_leaves_nothing(lerobot, tmp_path, simulated, spec_file):
    out = tmp_path / "out"

    def fails(match: str, source: Path, *more: str, spec: Path = spec_file) -> None:
        with pytest.raises(ValueError, match=match):
            run(source, out, spec, *more)
        assert not out.exists() and not list(tmp_path.glob(".out*"))

    columns = ["--state-columns", *map(str, range(7, 14))]
    fails("state has 14 numbers, the spec 7", lerobot)
    fails("no column 'pose'", lerobot, "--state", "pose")
    fails("no camera 'wrist'", lerobot, *columns, "--video", "wrist")
    fails("72 actions, horizon is 48; raise --horizon", lerobot, *columns, "--horizon", "48")
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps(ActionSpec(control_hz=10.0).to_dict()))
    fails("20 frames a second, the spec's control rate is 10", lerobot, *columns, spec=slow)
    labels = tmp_path / "labels.csv"
    labels.write_text("episode,success\n9,1\n")
    fails("names episode '9', which there is not", lerobot, *columns, "--labels", str(labels))
    takes = tmp_path / "takes"
    write_take(takes, "a", simulated, 0)
    fails("instruction", takes)
    fails("nothing says how it ended", takes, "--instruction", "x")
    text = (takes / "a.csv").read_text()
    (takes / "a.csv").write_text(text.replace("gripper", "grip", 1))
    fails("unknown column 'grip'", takes, "--instruction", "x")
    (takes / "a.csv").write_text("\n".join(text.splitlines()[:40]))
    fails("73 frames, a.csv has 39 rows", takes, "--instruction", "x")
    (takes / "a.csv").write_text(text)
    (takes / "a.mp4").write_bytes(b"no video")
    fails("a.mp4", takes, "--instruction", "x")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails("neither a LeRobotDataset", empty)
    tail = run(lerobot, out, spec_file, *columns, "--horizon", "48", "--longer", "tail")
    np.testing.assert_array_equal(tail.read(0).actions, simulated.read(0).actions[-48:])


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.csv", "name,success\nx,1\n", "columns are name, success"),
        ("a.csv", "episode,success\nx,maybe\n", "line 2: success is 'maybe'"),
        ("a.csv", "episode,success\nx,1\nx,0\n", "line 3: episode 'x' is empty or named twice"),
        ("a.csv", "episode,success,frame\nx,0,7\n", "a failure has no frame"),
        ("a.csv", "episode,success\n", "holds no outcomes"),
        ("a.json", "[1]", "expected an object"),
        ("a.json", '{"x": {"win": 1}}', "expected success and perhaps frame"),
        ("a.json", "{", "not valid JSON"),
    ],
)
def test_labels_are_checked(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=match):
        read_labels(tmp_path / name)


def test_pictures_are_cropped_to_the_middle(tmp_path):
    from worldloop.training.import_data import fitted

    wide = np.zeros((48, 80, 3), np.uint8)
    wide[:, 16:64] = 200
    assert (fitted(wide, 48) == 200).all()
    assert fitted(np.asarray(Image.new("RGB", (64, 48), (9, 9, 9))), 32).shape == (32, 32, 3)
