"""The tasks of the simulators: what is told to the policy, what is tracked, where we look from.

Cameras are ours: with the default ones a 4 cm cube is 4-6 pixels wide at 128x128, too few to
judge an outcome from. docs/data.md says which tasks are left out and why.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CameraPreset:
    """A fixed third-person camera; metres in the world frame.

    The robot's base is at x = -0.615 in ManiSkill; LIBERO has table tops at z = 0.9, floors at 0.
    """

    name: str
    eye: tuple[float, float, float]
    target: tuple[float, float, float]
    fov: float  # vertical field of view, radians


@dataclass(frozen=True)
class TaskPreset:
    """One task: its environment, what is told to the policy, which actors are tracked."""

    env_id: str
    instruction: str
    camera: CameraPreset
    # Names on the environment, of actors or of poses; the first one is moved.
    objects: tuple[str, ...]
    goal: str | None = None  # the actor that the moved object must come to
    goal_at: tuple[float, float, float] | None = None  # or a fixed point
    goal_radius: float = 0.1  # metres on the table within which the simulator says success
    # The kind of pixels the first object consists of, for the detector in worldloop.objects; ""
    # where its colour is no help: a shape without one place, or a target of the same colour.
    object_color: str = "blue"
    # Point of each object that is followed in the picture, in the object's own frame (metres).
    tracked_point: tuple[float, float, float] = (0.0, 0.0, 0.0)
    simulator: str = "maniskill"  # or "libero"
    # The square |x|, |y| (metres) around the origin that the first object is spawned in, or None
    # where that is wider than any belief: a belief outside would betray a perturbation.
    spawn_half_width: float | None = 0.1
    # Farthest start (|x|, |y| in metres) that the camera shows well; None where it shows all.
    in_view: tuple[float, float] | None = None
    # Farthest start (x in metres) from which the task can be done: beyond it the low hand comes to
    # where it has no inverse kinematics before the object is where it should be.
    solvable_x: float | None = None
    # Farthest waypoint (x in metres) that is planned: beyond it a low, downward gripper of
    # ManiSkill's has no inverse kinematics. None where the arm has no such limit.
    reach_x: float | None = 0.145
    # Each episode in a scene of its own: what contacts leave behind in a used one shows in the
    # next episode where something is gripped, and a replay would not be the same to the last digit.
    fresh_scene: bool = False
    blocked: bool = False  # failing hands press on something: a stopped arm is no fault
    horizon: int = 72  # actions of an episode, a multiple of 24
    robot: str = "panda"
    options: dict[str, Any] = field(default_factory=dict)  # further ones of the environment


# From the side and above: pushes run across the picture and the hand never hides the object.
SIDE = CameraPreset("side_close", (0.06, 0.50, 0.62), (0.06, 0.02, 0.02), 0.60)
PULL = CameraPreset("side_pull", (-0.11, 0.74, 0.92), (-0.11, 0.0, 0.02), 0.40)
# From farther away with a longer lens: both cubes keep their size all over the table. Flatter, so
# that a cube behind the other does not look like one on top of it.
STACK = CameraPreset("side_stack", (0.0, 0.76, 0.46), (0.0, 0.0, 0.05), 0.44)
LIFT = CameraPreset("side_lift", (-0.05, 0.74, 0.46), (-0.05, 0.02, 0.12), 0.59)
POKE = CameraPreset("above_poke", (0.18, 0.45, 1.00), (0.18, 0.0, 0.0), 0.42)
# From the front: the fingers close from the sides and leave what they hold to be seen.
PICK = CameraPreset("front_pick", (0.85, 0.0, 0.50), (0.0, 0.0, 0.15), 0.46)
PLACE = CameraPreset("side_place", (0.0, 0.62, 0.62), (0.0, 0.0, 0.02), 0.36)
TOOL = CameraPreset("side_tool", (-0.02, 0.55, 1.15), (-0.02, -0.13, 0.0), 0.46)
PYRAMID = CameraPreset("side_pyramid", (0.0, 0.76, 0.52), (0.0, -0.01, 0.03), 0.38)
DRAW = CameraPreset("above_draw", (-0.09, 0.55, 0.85), (-0.09, 0.0, 0.02), 0.46)
INSERT = CameraPreset("front_insert", (0.95, 0.02, 0.75), (0.0, 0.05, 0.05), 0.56)

_PRESETS = (
    TaskPreset(
        "PushCube-v1", "push the blue cube onto the target", SIDE, ("obj",), "goal_region",
        solvable_x=0.04,
    ),
    TaskPreset(
        "PullCube-v1", "pull the blue cube onto the target", PULL, ("obj",), "goal_region"
    ),
    TaskPreset(
        "StackCube-v1", "stack the red cube on the green cube", STACK, ("cubeA", "cubeB"),
        object_color="red", spawn_half_width=None, in_view=(0.13, 0.13),
    ),
    TaskPreset(
        "LiftPegUpright-v1", "stand the peg upright", LIFT, ("peg",),
        tracked_point=(0.06, 0.0, 0.0),  # the peg is half blue, half red
    ),
    TaskPreset(
        "PokeCube-v1", "push the red cube onto the target with the blue peg", POKE,
        ("cube", "peg"), "goal_region", goal_radius=0.05, object_color="",
        spawn_half_width=None, solvable_x=0.22,
    ),
    TaskPreset(
        "PickCube-v1", "hold the red cube at the green ball", PICK, ("cube", "goal_site"),
        "goal_site", goal_radius=0.025, object_color="red",
        fresh_scene=True,
    ),
    TaskPreset(
        "PlaceSphere-v1", "put the blue ball into the bin", PLACE, ("obj", "bin"),
        "bin", goal_radius=0.014, spawn_half_width=None,
    ),
    TaskPreset(
        "PullCubeTool-v1", "pull the blue cube near with the red tool", TOOL,
        ("cube", "l_shape_tool"), goal_at=(-0.615, 0.0, 0.0), goal_radius=0.6,
        spawn_half_width=None, solvable_x=0.21, horizon=96,
        fresh_scene=True,
    ),
    TaskPreset(
        "StackPyramid-v1", "put the red cube beside the green one and the blue cube on both",
        PYRAMID, ("cubeC", "cubeA", "cubeB"), spawn_half_width=None, in_view=(0.11, 0.14),
        horizon=120,
        fresh_scene=True,
    ),
    TaskPreset(
        "DrawTriangle-v1", "draw along the outline of the triangle", DRAW, ("goal_tri",),
        object_color="", spawn_half_width=None, horizon=96, robot="panda_stick",
    ),
    TaskPreset(
        "PegInsertionSide-v1", "push the orange end of the peg into the hole of the box", INSERT,
        ("peg", "box_hole_pose", "peg_head_pose"), object_color="", spawn_half_width=None,
        in_view=(0.2, 0.36), horizon=120, robot="panda_wristcam", blocked=True,
        fresh_scene=True,
    ),
)  # fmt: skip


def _libero(
    suite: str, number: int, name: str, camera: CameraPreset, objects: tuple[str, ...],
    horizon: int = 144, **differs: Any,
) -> TaskPreset:  # fmt: skip
    """A task of LIBERO by its suite and its number there; the suite's files are called ``name``."""
    return TaskPreset(
        f"{suite}-{number}", name.replace("_", " "), camera, objects, object_color="",
        simulator="libero", spawn_half_width=None, reach_x=None, blocked=True,
        horizon=horizon, options={"suite": suite, "name": name}, **differs,
    )  # fmt: skip


# From the front, as LIBERO's own view, but nearer: the hand comes from behind what it moves.
BASKET = CameraPreset("front_basket", (0.72, 0.05, 0.70), (-0.03, 0.05, 0.06), 0.74)
TABLE = CameraPreset("front_table", (0.70, 0.06, 1.55), (-0.02, 0.06, 0.94), 0.50)
PLATE = CameraPreset("front_plate", (0.70, 0.13, 1.55), (-0.02, 0.13, 0.94), 0.50)

_LIBERO = (
    _libero(
        "libero_object", 0, "pick_up_the_alphabet_soup_and_place_it_in_the_basket", BASKET,
        ("alphabet_soup_1", "basket_1"), horizon=168,
    ),
    _libero(
        "libero_object", 5, "pick_up_the_tomato_sauce_and_place_it_in_the_basket", BASKET,
        ("tomato_sauce_1", "basket_1"), horizon=168,
    ),
    _libero(
        "libero_goal", 6, "put_the_cream_cheese_in_the_bowl", TABLE,
        ("cream_cheese_1", "akita_black_bowl_1"), horizon=120, goal="akita_black_bowl_1",
        goal_radius=0.03,
    ),
    _libero(
        "libero_goal", 8, "put_the_bowl_on_the_plate", TABLE,
        ("akita_black_bowl_1", "plate_1"), goal="plate_1", goal_radius=0.03,
    ),
    _libero(
        "libero_spatial", 0,
        "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate",
        PLATE, ("akita_black_bowl_1", "plate_1"), goal="plate_1", goal_radius=0.03,
    ),
    _libero(
        "libero_spatial", 2,
        "pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate",
        PLATE, ("akita_black_bowl_1", "plate_1"), goal="plate_1", goal_radius=0.03,
    ),
)  # fmt: skip
TASKS: dict[str, TaskPreset] = {preset.env_id: preset for preset in (*_PRESETS, *_LIBERO)}


def task_preset(env_id: str) -> TaskPreset:
    """The preset of a task; raises ValueError naming the known ones."""
    if env_id not in TASKS:
        raise ValueError(f"unknown env {env_id!r}; known: {', '.join(TASKS)}")
    return TASKS[env_id]
