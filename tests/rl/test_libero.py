"""LIBERO behind the simulators' interface: six scripted tasks of three suites, on the real thing.

The scene assets are those of the user, or the ones for tests that lie beside the checkout
(../shared/libero); they are unpacked into a cache folder, never into the repository.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from worldloop.engine.policy.base import ReplayPolicy
from worldloop.engine.policy.scripted import SCRIPTS, perturbation, scripted_policy
from worldloop.engine.policy.scripts.common import Waypoint, WaypointPolicy
from worldloop.engine.policy.scripts.libero import LIBERO
from worldloop.episodes import EpisodeDataset
from worldloop.errors import UserError
from worldloop.rl.collect import CollectConfig, Collector, policy_episode
from worldloop.rl.envs.libero import LiberoEnv
from worldloop.rl.envs.simulators import SimulatorVectorEnv, make_simulator
from worldloop.rl.envs.tasks import TASKS, task_preset
from worldloop.types import ActionSpec

Array = npt.NDArray[np.float32]
NAMES = [name for name, task in TASKS.items() if task.simulator == "libero"]
SHARED = Path(__file__).parents[3] / "shared/libero/libero_assets.tar.xz"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "worldloop"


def unpacked_assets() -> Path | None:
    """The assets beside the checkout, unpacked; where a visual file is missing, its stand-in."""
    if not SHARED.exists():
        return None
    stat = SHARED.stat()
    home = CACHE / f"libero-test-assets-{stat.st_size}-{int(stat.st_mtime)}"
    if not home.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            with tarfile.open(SHARED) as archive:
                archive.extractall(name, filter="data")
            root = next(Path(name).rglob("assets")).parent
            for source in (root / "standins").rglob("*"):
                target = root / "assets" / source.relative_to(root / "standins")
                if source.is_file() and not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, target)
            (root / "assets").rename(home)
    return home


@pytest.fixture(scope="session")
def libero() -> Iterator[Callable[[str], LiberoEnv]]:
    """Makes environments, one of each task; skips where package or assets are truly absent."""
    if find_spec("libero") is None or find_spec("robosuite") is None:
        pytest.skip("LIBERO is not installed (make setup-libero)")
    patch = pytest.MonkeyPatch()
    own = os.environ.get("WORLDLOOP_LIBERO_ASSETS") or Path.home() / ".cache/libero/assets"
    if not (Path(own) / "scenes").is_dir():
        found = unpacked_assets()
        if found is None:
            pytest.skip(f"LIBERO's assets are neither in {own} nor in {SHARED}")
        patch.setenv("WORLDLOOP_LIBERO_ASSETS", str(found))
    made: dict[str, LiberoEnv] = {}

    def make(name: str) -> LiberoEnv:
        if name not in made:
            while made:  # half a gigabyte each
                made.popitem()[1].close()
            made[name] = LiberoEnv(name)
        return made[name]

    yield make
    for env in made.values():
        env.close()
    patch.undo()


def play(
    env: LiberoEnv, seed: int, offset_O2: npt.ArrayLike
) -> tuple[list[Array], list[bool], Array]:
    """A scripted episode at state speed: actions, success flags, last poses of the objects."""
    rng = np.random.default_rng([seed, 5])
    env.reset(1000 + seed)
    policy = scripted_policy(
        env.task.env_id, rng, env.objects(), env.tcp()[:3], np.asarray(offset_O2, float),
        env.task.horizon,
    )  # fmt: skip
    actions, flags = [], []
    for _ in range(env.task.horizon):
        state = env.state().astype(np.float64)
        actions.append(policy.act(state[:3], state[3:6]))
        flags.append(env.step(actions[-1]))
    return actions, flags, env.objects()


# ------------------------------------------------------------- without the simulator


def test_two_tasks_a_suite_in_whole_chunks() -> None:
    suites = [name.rpartition("-")[0] for name in NAMES]
    assert {suite: suites.count(suite) for suite in suites} == {
        "libero_object": 2, "libero_goal": 2, "libero_spatial": 2,
    }  # fmt: skip
    for name in NAMES:
        assert task_preset(name).horizon % 24 == 0
        assert task_preset(name).instruction.split()[0] in ("pick", "put")


@pytest.mark.parametrize("name", NAMES)
def test_perturbations_are_graded_and_move_only_the_belief(name: str) -> None:
    rng = np.random.default_rng(5)
    hits = [perturbation(name, rng, True) for _ in range(200)]
    misses = [perturbation(name, rng, False) for _ in range(400)]
    assert {each.grade for each in hits} == {"aimed"} and max(h.size for h in hits) < 0.006
    assert {each.grade for each in misses} == {"near", "clear"}
    assert {each.kind for each in misses} == {"place", "grasp"}
    assert 0.35 < np.mean([each.grade == "near" for each in misses]) < 0.65
    objects = np.array([[-0.1, -0.2, 0.9, 1, 0, 0, 0], [0.0, 0.2, 0.9, 1, 0, 0, 0]])
    offset, tool = misses[0].offset, np.array([-0.15, 0, 1.1])
    moved = objects.copy()
    moved[:, :2] += offset
    one = scripted_policy(name, np.random.default_rng(4), objects, tool, offset, 144)
    other = scripted_policy(name, np.random.default_rng(4), moved, tool, 0 * offset, 144)
    for a, b in zip(one.waypoints, other.waypoints, strict=True):
        np.testing.assert_array_equal(a.position, b.position)


def test_what_the_hand_lands_on_does_not_show_in_its_commands_but_a_drift_is_corrected() -> None:
    """Blind for the height: a hand that is stopped goes on as if it were not."""
    point = Waypoint(np.array([0.0, 0.0, 0.9]), 0.8, 1.0, blind="height", timeout=30)
    free, stopped, drifting = (WaypointPolicy([point], np.zeros((1, 6)), LIBERO) for _ in range(3))
    start = np.array([0.0, 0.0, 1.0])
    for step in range(12):
        position = start - [0, 0, 0.0131 * min(step, 7)]
        a = free.act(position, np.zeros(3))
        b = stopped.act(np.maximum(position, [0, 0, 0.96]), np.zeros(3))
        c = drifting.act(position + [0.01, 0, 0], np.zeros(3))
        np.testing.assert_array_equal(a, b)
        assert a[0] == 0 and c[0] < -0.07


def test_unknown_task_is_named() -> None:
    with pytest.raises(UserError, match="env: unknown env 'libero_object-99'; known: .*libero_obj"):
        CollectConfig("libero_object-99", Path("x"))
    with pytest.raises(ValueError, match="unknown env 'libero_10-0'"):
        make_simulator("libero_10-0")
    assert set(NAMES) <= set(SCRIPTS)


def test_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worldloop.rl.envs.libero.find_spec", lambda name: None)
    with pytest.raises(UserError, match="LIBERO is not installed.*make setup-libero") as error:
        LiberoEnv("libero_object-0")
    assert "\n" not in str(error.value)


def test_missing_assets_say_where_they_come_from(
    libero: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLDLOOP_LIBERO_ASSETS", str(tmp_path))
    with pytest.raises(UserError, match="scene assets are not in .*hub.*WORLDLOOP_LIBERO_ASSETS"):
        LiberoEnv("libero_object-0")


# ------------------------------------------------------------- with the simulator


class TestConventions:
    NAME = "libero_spatial-0"

    def test_a_reset_depends_on_its_seed_alone(self, libero: Callable[[str], LiberoEnv]) -> None:
        env = libero(self.NAME)
        drawn = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
        env.reset(700)
        first, picture, state = env.objects(), env.render(), env.state()
        env.reset(3)  # one of the benchmark's own
        own = env.objects()
        for _ in range(5):
            env.step(np.array([1, 1, -1, 0, 0, 1, -1], np.float32))
        env.reset(700)
        np.testing.assert_array_equal(env.objects(), first)
        np.testing.assert_array_equal(env.state(), state)
        np.testing.assert_array_equal(env.render(), picture)
        env.reset(701)
        assert 0.001 < np.abs(env.objects()[:, :2] - first[:, :2]).max() < 0.2
        assert np.abs(own[:, :2] - first[:, :2]).max() > 0.001
        np.testing.assert_array_equal(np.random.get_state()[1], drawn)  # type: ignore[index]

    def test_commands_mean_what_they_do_elsewhere(self, libero: Callable[[str], LiberoEnv]) -> None:
        """+1 opens; the arm moves by what `LIBERO` tells the scripts; rotations come out as told"""
        env = libero(self.NAME)
        env.reset(700)
        before = env.state()
        assert np.abs(before[3:6]).max() < 0.1 and before[6] > 0.8  # down, open
        still = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
        for part, each in ((slice(0, 3), LIBERO.moved_m), (slice(3, 6), LIBERO.moved_rad)):
            env.reset(700)
            command = still.copy()
            command[part] = [0.3, 0, -0.3] if part.start else [0.5, -0.5, 0.5]
            for action in [command] * 8 + [still] * 12:
                env.step(action)
            told = 8 * each * command[part]
            moved = (env.state() - before)[part]
            np.testing.assert_allclose(moved, told, atol=0.15 * np.abs(told).max())
        assert env.state()[6] < -0.8

    def test_objects_are_where_their_pixels_say(self, libero: Callable[[str], LiberoEnv]) -> None:
        """Seen by taking the bowl away: what changes in the picture is around its pixel."""
        env = libero(self.NAME)
        env.reset(700)
        with_bowl, pixel = env.render(), env.object_pixels(env.objects())[0]
        state = env.snapshot()
        joint = env._env.get_object("akita_black_bowl_1").joints[-1]
        env._sim.data.set_joint_qpos(joint, [0.0, 0.0, 3.0, 1, 0, 0, 0])
        without = env.render_snapshot(env.snapshot())
        rows, columns = np.nonzero(np.abs(with_bowl.astype(int) - without).max(-1) > 40)
        assert len(rows) > 150
        # Its origin is the middle of its foot: below the middle of what is seen.
        assert abs(columns.mean() - pixel[0]) < 4 and 0 < pixel[1] - rows.mean() < 14
        np.testing.assert_array_equal(env.render_snapshot(state), with_bowl)

    def test_the_vector_env_plays_chunks_from_seeds(
        self, libero: Callable[[str], LiberoEnv]
    ) -> None:
        """What `worldloop evaluate policy` and the loop's truth go through."""
        env = libero(self.NAME)
        rows = SimulatorVectorEnv(
            self.NAME, 1, horizon=24, action_spec=ActionSpec(chunk=4), simulator=lambda *_: env
        )
        obs, infos = rows.reset(options={"starts": [7]})
        assert obs["frame"].shape == (1, 128, 128, 3)
        assert infos["instruction"][0] == TASKS[self.NAME].instruction
        obs, reward, terminated, truncated, infos = rows.step(np.zeros((1, 4, 7), np.float32))
        assert not terminated[0] and not truncated[0] and infos["played"][0] == 4
        env.reset(7)
        for _ in range(4):
            env.step(np.zeros(7, np.float32))
        np.testing.assert_array_equal(obs["frame"][0], env.render())


@pytest.mark.parametrize("name", NAMES)
def test_the_script_succeeds_when_aimed_and_fails_when_clearly_off(
    libero: Callable[[str], LiberoEnv], name: str
) -> None:
    env, rng = libero(name), np.random.default_rng(8)
    actions, flags, last = play(env, 0, perturbation(name, rng, True).offset)
    assert all(flags[-8:]) and not any(flags[:40])
    # The same actions lead to the same end.
    env.reset(1000)
    assert [env.step(action) for action in actions] == flags
    np.testing.assert_array_equal(env.objects(), last)
    clear = next(p for p in iter(lambda: perturbation(name, rng, False), None)
                 if p.grade == "clear" and p.kind == "place")  # fmt: skip
    _, flags, _ = play(env, 1, clear.offset)
    assert not any(flags[-8:])


def test_collected_episodes_are_read_as_they_were_made(
    libero: Callable[[str], LiberoEnv], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same collector and format as elsewhere; replayed actions give the very same frames."""
    name = "libero_goal-6"
    libero(name)  # sets where the assets are
    config = CollectConfig(name, tmp_path / "data", episodes=1, seed=1)
    collector = Collector(config)
    try:
        made = collector.episode(1)
        assert made is not None
        collector.add([made])
        read = next(EpisodeDataset(config.out).stream())
        meta = EpisodeDataset(config.out).meta
        assert meta.env_id == name and meta.camera["name"] == TASKS[name].camera.name
        ActionSpec().require_same(meta.action_spec, "ours", "the dataset")
        assert read.frames.shape == (config.horizon + 1, 128, 128, 3)
        assert np.abs(read.frames.astype(int) - made.frames).mean() < 4  # H.264
        for field in ("actions", "states", "reward", "objects", "object_pixels"):
            np.testing.assert_allclose(getattr(read, field), getattr(made, field), atol=1e-6)
        assert len(set(read.reward[-8:])) == 1 and bool(read.reward[-1]) == read.success
        assert read.object_pixels is not None
        assert read.object_pixels.min() > 0 and read.object_pixels.max() < 128
        again = policy_episode(
            collector.env, ReplayPolicy(made.actions[None]), 0, config.horizon, {},
            made.info["sim_seed"],
        )  # fmt: skip
        np.testing.assert_array_equal(again.frames, made.frames)
        np.testing.assert_array_equal(again.reward, made.reward)
    finally:
        collector.close()


def test_nothing_is_asked_on_standard_input(libero: Callable[[str], LiberoEnv]) -> None:
    libero("libero_goal-6")
    assert "libero.libero" in sys.modules
    config = Path(os.environ["LIBERO_CONFIG_PATH"]) / "config.yaml"
    assert "bddl_files" in config.read_text()
