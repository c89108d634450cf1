"""The demo and the rollout verb on a small random world: files, figures, refusals."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from worldloop.cli import main
from worldloop.engine.dit_config import DiTConfig
from worldloop.engine.light_vae import PRESETS as LIGHT_PRESETS
from worldloop.engine.reward import RewardConfig
from worldloop.engine.rollout import ReplayPolicy, RolloutEngine
from worldloop.engine.world_model import WorldModel, WorldModelConfig
from worldloop.episodes import DatasetMeta, EpisodeDataset, EpisodeWriter
from worldloop.errors import UserError
from worldloop.metrics import locate_object, object_within, psnr
from worldloop.outcome import OutcomeClassifier, OutcomeNet
from worldloop.rl.demo import (
    PRESETS,
    DemoConfig,
    demo,
    derangement,
    find_classifier,
)
from worldloop.rl.envs.tasks import TASKS
from worldloop.rl.held_out import load_held_out
from worldloop.rl.report import grpo_line, print_table, replaced_folder, shown, targets
from worldloop.rl.starts import shipped_episodes
from worldloop.rollout_io import load_rollout, save_rollout
from worldloop.types import ActionSpec, ControllerFit, Episode

SIZE, T, CHUNK, N = 32, 16, 8, 24
SPEC = ActionSpec(chunk=CHUNK, controller=ControllerFit((0.01,), (0.02,), 0.0, 0.0))
KEYS = """episodes, frames, psnr, psnr_static, ssim, mse, lpips, reward_alignment,
actions_only_alignment, visual_alignment, object_within_4px, psnr_with_shuffled_actions,
frames_per_second, seconds_per_chunk, speedup_vs_reference, peak_memory_mb, commit"""


def episode(seed: int) -> Episode:
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (T, 7)).astype(np.float32)
    frames = np.full((T + 1, SIZE, SIZE, 3), (190, 105, 60), np.uint8)
    for t in range(T + 1):
        frames[t, 12:18, 4 + t : 10 + t] = (45, 80, 150)
    reward = np.zeros(T, np.float32)
    reward[T // 2 :] = seed % 2
    return Episode(
        frames, actions, np.zeros((T + 1, 7), np.float32), reward, "push the cube",
        "PushCube-v1", seed, bool(seed % 2),
    )  # fmt: skip


def dataset(folder: Path, spec: ActionSpec = SPEC, count: int = N) -> Path:
    meta = DatasetMeta(spec, "PushCube-v1", {"name": "test"}, T, SIZE)
    EpisodeWriter(folder, meta).add([episode(seed) for seed in range(count)])
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Folders of a random world model, a dataset and a random outcome classifier."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    autoencoder = LIGHT_PRESETS["test"]()
    dit = DiTConfig(
        width=48, depth=2, heads=2, adaln_rank=8, context_dim=0, condition_channel=False,
        padding_channel=False, action_dim=7, action_layout="per_frame",
        latent_channels=autoencoder.latent_channels, learned_positions=(2, 2), prediction="sample",
    )  # fmt: skip
    reward = RewardConfig(autoencoder.latent_channels, grid=(4, 4))
    world = WorldModel(WorldModelConfig(dit, reward, autoencoder, SPEC, window=6))
    with torch.no_grad():
        for p in world.parameters():
            p.add_(0.05 * torch.randn_like(p))
    world.save(root / "world")
    OutcomeClassifier(OutcomeNet(4), SIZE, "PushCube-v1", {}).save(root / "outcome")
    return root / "world", dataset(root / "set"), root / "outcome"


@pytest.fixture(scope="module")
def report(
    parts: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """A whole demo, run once."""
    world, episodes, classifier = parts
    out = tmp_path_factory.mktemp("runs") / "demo"
    config = DemoConfig(
        world=str(world), episodes=episodes, classifier=classifier, out=out, threads=1,
        reference_batch=2, repeats=1, grpo_steps=0,
    )  # fmt: skip
    return out, demo(config)


# ---------------------------------------------------------------- the demo


def test_summary_has_every_figure(report: tuple[Path, dict]) -> None:
    out, values = report
    text = (out / "summary.json").read_text()
    assert "NaN" not in text and "Infinity" not in text  # JSON has neither
    summary = json.loads(text)
    for key in KEYS.replace("\n", " ").split(", "):
        assert key.strip() in summary, key
        if key.strip() != "lpips":
            assert summary[key.strip()] is not None, key
    assert summary["lpips"] is not None or summary["lpips_reason"]
    assert summary["episodes"] == N and summary["frames"] == N * T
    assert len(summary["psnr_by_chunk"]) == T // CHUNK
    assert summary["speedup_vs_reference"] > 1
    low, high = summary["reward_alignment_interval"]
    assert low <= summary["reward_alignment"] <= high
    assert sum(summary["reward_confusion"].values()) == N
    assert summary["peak_memory_mb"] > 50
    met = {row["name"]: row["met"] for row in summary["targets"]}
    assert met["psnr"] is False and met["episodes"] is False  # a random world, few episodes


def test_report_opens_from_disk(report: tuple[Path, dict]) -> None:
    out, _ = report
    page = (out / "report.html").read_text()
    links = re.findall(r'(?:src|href|poster)="([^"]+)"', page)
    assert links and all((out / link).is_file() for link in links)
    assert grpo_line(report[1]) == "" and "learns in imagination" not in page
    assert not re.search(r"https?://|file://", page)
    assert page.count("episode-000.mp4") >= 1 and "MISSED" not in page and "missed" in page
    wrong = page.split("Where reward and truth disagree")[1].split("Worst, median")[0]
    disagreements = sum(
        report[1]["reward_confusion"][k] for k in ("false_success", "false_failure")
    )
    assert wrong.count("<video") == disagreements  # all of them, none left out


def test_videos_play_in_a_browser(report: tuple[Path, dict]) -> None:
    out, _ = report
    videos = sorted(out.glob("episode-*.mp4"))
    assert len(videos) == N
    with av.open(str(videos[0])) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.frames == T + 1 and stream.average_rate == 20
        assert stream.width % 2 == 0 and stream.width >= 3 * 2 * SIZE
    assert b"moov" in videos[0].read_bytes()[:4096]  # in front: playing starts at once


def test_contact_sheets_show_every_episode(report: tuple[Path, dict]) -> None:
    sheets = sorted(report[0].glob("sheet-*.png"))
    assert len(sheets) == N // 6
    with Image.open(sheets[0]) as sheet:
        assert sheet.height >= 6 * 2 * SIZE


def test_nothing_is_left_beside_the_report(report: tuple[Path, dict]) -> None:
    out, _ = report
    assert [path.name for path in out.parent.iterdir()] == ["demo"]
    assert not [path for path in out.rglob("*") if ".tmp" in path.name]


def test_table(report: tuple[Path, dict], capsys: pytest.CaptureFixture[str]) -> None:
    print_table(report[1])
    text = capsys.readouterr().out
    for words in ("PSNR of imagined frames", "Reward alignment", "MISSED", "met", "LPIPS"):
        assert words in text


def test_exchanged_actions_are_a_derangement() -> None:
    for count in (2, 3, 17):
        order = derangement(count, 0)
        assert sorted(order) == list(range(count))
        assert (order != np.arange(count)).all()


def test_targets_of_good_bad_and_missing_figures() -> None:
    figures = {
        "psnr": 25.0, "psnr_static": 20.0, "ssim": 0.9, "object_within_4px": float("nan"),
        "reward_alignment": 0.9, "actions_only_alignment": 0.85, "visual_alignment": None,
        "psnr_with_shuffled_actions": 21.0, "speedup_vs_reference": 6.0, "seconds_per_chunk": 0.4,
        "peak_memory_mb": 900.0, "seconds": 100.0, "episodes": 48,
    }  # fmt: skip
    met = {row["name"]: row["met"] for row in targets(figures)}
    assert met["psnr"] and met["psnr_over_static"] and met["shuffled_cost"]
    assert met["reward_over_actions_only"] is False
    assert met["visual_alignment"] is None and met["object_within_4px"] is None
    assert shown(0.8125, "%") == "81.2 %" and shown(None, "dB") == "not measured"


# ---------------------------------------------------------------- refusals


def test_a_folder_of_something_else_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no earlier report"), replaced_folder(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").exists()


def test_an_error_keeps_the_earlier_report(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with replaced_folder(out) as folder:
        (folder / "summary.json").write_text("1")
    with pytest.raises(RuntimeError), replaced_folder(out) as folder:
        (folder / "summary.json").write_text("2")
        raise RuntimeError
    assert (out / "summary.json").read_text() == "1"
    with replaced_folder(out) as folder:
        (folder / "summary.json").write_text("3")
    assert (out / "summary.json").read_text() == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    dead = 2**22 + 1  # above the largest process number
    for name in (f".demo.{dead}.tmp", f".demo.{dead}.old", ".demo.notes"):
        (tmp_path / name).mkdir()
    (tmp_path / f".demo.{dead}.old/summary.json").write_text("1")
    with replaced_folder(tmp_path / "demo") as folder:
        assert (tmp_path / "demo/summary.json").read_text() == "1"  # back in its place
        (folder / "summary.json").write_text("2")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".demo.notes", "demo"]


def test_bad_input_is_one_line(
    parts: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world, episodes, _ = parts
    foreign = dataset(tmp_path / "foreign", dataclasses.replace(SPEC, control_hz=10.0), 2)
    one = dataset(tmp_path / "one", count=1)
    out = ["--out", str(tmp_path / "out")]
    for arguments, words in (
        (["--world", "nonesuch", "--episodes", str(episodes)], "nonesuch"),
        (["--world", str(world), "--episodes", str(tmp_path / "none")], "info.json"),
        (["--world", str(world), "--episodes", str(foreign)], "control_hz"),
        (["--world", str(world), "--episodes", str(one)], "at least 2"),
    ):
        assert main(["demo", *arguments, *out]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1, error
        assert not (tmp_path / "out").exists()


def test_bad_options_name_the_field(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--count", "1"], "count is 1"),
        (["--repeats", "0"], "repeats is 0"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["demo", *arguments])
        assert caught.value.code == 2 and words in capsys.readouterr().err


def test_smoke_preset_is_there() -> None:
    assert PRESETS["smoke"][1].count == 4


# ---------------------------------------------------------------- worldloop rollout


def test_rollout_verb_and_files(
    parts: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world, episodes, _ = parts
    arguments = ["--world", str(world), "--episodes", str(episodes), "--count", "3"]
    arguments += ["--group-size", "2", "--threads", "1", "--out", str(tmp_path / "a")]
    assert main(["rollout", *arguments]) == 0
    said = capsys.readouterr().out
    assert "6 episodes of 16 frames" in said and "outcomes agree in" in said
    agreement = json.loads((tmp_path / "a/agreement.json").read_text())
    # Real rewards are up in the second half of episodes of odd seeds: only number 1 succeeds.
    assert agreement["true_success"] + agreement["false_failure"] == 2
    assert agreement["false_success"] + agreement["true_failure"] == 4
    rollout = load_rollout(tmp_path / "a")
    assert rollout.frames is not None and rollout.frames.shape == (6, T + 1, 1, SIZE, SIZE, 3)
    assert rollout.group_id.tolist() == [0, 0, 1, 1, 2, 2]
    assert (tmp_path / "a/rollout.mp4").stat().st_size > 0
    save_rollout(rollout, tmp_path / "b")
    again = load_rollout(tmp_path / "b")
    for field in dataclasses.fields(rollout):
        mine, theirs = getattr(rollout, field.name), getattr(again, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)
        else:
            assert mine == theirs


def test_rollout_without_frames(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    world, episodes, _ = parts
    arguments = ["--world", str(world), "--episodes", str(episodes), "--count", "2"]
    arguments += ["--decode", "none", "--threads", "1", "--out", str(tmp_path)]
    assert main(["rollout", *arguments]) == 0
    assert load_rollout(tmp_path).frames is None
    assert not (tmp_path / "rollout.mp4").exists()


def test_damaged_rollout_files(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    world, episodes, _ = parts
    arguments = ["--world", str(world), "--episodes", str(episodes), "--count", "2"]
    assert main(["rollout", *arguments, "--threads", "1", "--out", str(tmp_path)]) == 0
    path = tmp_path / "rollout.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        load_rollout(tmp_path)
    (tmp_path / "rollout.json").write_text('{"format": 9}')
    with pytest.raises(UserError, match="format 9"):
        load_rollout(tmp_path)


# ---------------------------------------------------------------- what is shipped


def test_detector_and_classifier_on_shipped_real_episodes() -> None:
    folder = shipped_episodes()
    found = EpisodeDataset(folder)
    classifier, reason = find_classifier(found.meta.env_id, found.meta.image_size)
    assert classifier is not None, reason
    episodes = [found.read(i) for i in range(len(found))]
    final = np.stack([one.frames[-1] for one in episodes])
    assert (classifier.success(final) == found.success).mean() >= 0.97
    frames = np.stack([one.frames for one in episodes[:12]])
    truth = np.stack([one.object_pixels[:, 0] for one in episodes[:12]])
    color = TASKS[found.meta.env_id].object_color
    distance = np.linalg.norm(locate_object(frames, color) - truth, axis=-1)
    seen = np.isfinite(distance)
    assert seen.mean() > 0.95 and (distance[seen] <= 4).mean() > 0.95


def test_shipped_world_imagines_what_happened() -> None:
    """The bounds that `worldloop demo` is held to, on its episodes: a third of them may lie three
    points of the cube's track below all."""
    world = WorldModel.from_pretrained("tiny")
    held_out = load_held_out(shipped_episodes(), None, world)
    engine = RolloutEngine(world, ReplayPolicy(held_out.actions, world.action_spec), steps=1)
    rollout = engine.rollout(held_out.starts, horizon=72, decode="all")
    assert rollout.frames is not None
    real = np.stack([one.frames for one in held_out.episodes])
    imagined = rollout.frames[:, 1:, 0]
    static = np.repeat(real[:, :1], 72, 1)
    quality = psnr(real[:, 1:], imagined).mean()
    assert quality >= max(24.0, psnr(real[:, 1:], static).mean() + 3)
    true = np.array([one.success for one in held_out.episodes])
    assert (rollout.success == true).mean() >= 0.8
    track = object_within(real[:, 1:], imagined, 4.0, held_out.object_color)
    assert track.share >= 0.75
