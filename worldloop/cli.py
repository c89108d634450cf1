"""The command line: `worldloop VERB [options]`.

A verb is a name and a lazy "module:function"; nothing heavy is imported before the
verb is known.  Each function takes the remaining arguments and returns an exit code.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import TypeVar, cast

from worldloop import __version__
from worldloop.config import config_from_dict, read_json
from worldloop.errors import UserError
from worldloop.registry import load

T = TypeVar("T")

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's mallopt

VERBS: dict[str, tuple[str, str]] = {
    "collect": ("worldloop.rl.collect:main", "collect episodes in a simulator"),
    "data": ("worldloop.training.dataset_card:main", "show, check and measure datasets"),
    "train autoencoder": ("worldloop.training.autoencoder:main", "fit the frame autoencoder"),
    "train decoder": ("worldloop.training.decoder:main", "distil a small, fast decoder"),
    "train world-model": ("worldloop.training.world_model:main", "fit the world model"),
    "distill": ("worldloop.training.distill:main", "make a world model of few steps"),
    "train towers": ("worldloop.training.towers:main", "pretrain the tiny policy's eyes"),
    "train policy": ("worldloop.training.policy_sft:main", "fine-tune the policy on successes"),
    "train outcome": ("worldloop.training.outcome:main", "fit the judge of final frames"),
    "train curves": ("worldloop.training.curves:main", "draw a run's metrics as a picture"),
    "grpo": ("worldloop.rl.grpo:main", "improve a policy inside a world model"),
    "grpo-report": ("worldloop.rl.grpo_report:main", "true success before and after GRPO"),
    "loop": ("worldloop.rl.loop:main", "world model and policy improve each other, in rounds"),
    "loop status": ("worldloop.rl.loop:status_main", "show the rounds of a loop"),
    "loop report": ("worldloop.rl.loop_results:main", "true success by round, of several loops"),
    "rollout": ("worldloop.rl.imagine:main", "imagine episodes with a world model"),
    "evaluate policy": ("worldloop.rl.evaluate:main", "measure how often a policy succeeds"),
    "evaluate world-model": (
        "worldloop.rl.evaluate_world:main",
        "measure a world model: every table and figure of the paper",
    ),
    "bench rollout": ("worldloop.bench.rollout:main", "published procedure against the engine"),
    "bench kernels": ("worldloop.bench.kernels:main", "time the kernels beside their ceilings"),
    "bench vae": ("worldloop.bench.vae:main", "time the autoencoder's encode and decode"),
    "bench agreement": ("worldloop.bench.agreement:main", "measure what inexact savings cost"),
    "bench policy": ("worldloop.bench.policy:main", "time the policy's forward pass"),
    "bench train": ("worldloop.bench.train:main", "time the world model's training step"),
    "bench compare": ("worldloop.bench.compare:main", "fail where new results are slower"),
    "bench report": ("worldloop.bench.report:main", "write the speed and cost pages from results"),
    "demo": ("worldloop.rl.demo:main", "imagine held-out real episodes and write a report"),
    "serve policy": ("worldloop.engine.policy.server:main", "serve a policy over HTTP"),
    "version": ("worldloop.cli:version", "print the versions that matter"),
}

# What to install when a verb needs a library of an extra.
EXTRAS = {
    "mani_skill": "sim", "sapien": "sim", "libero": "libero", "robosuite": "libero",
    "fastapi": "serve", "uvicorn": "serve",
    "triton": "gpu", "huggingface_hub": "hub", "tokenizers": "hub",
    "diffusers": "dev", "transformers": "dev",
}  # fmt: skip


def usage() -> str:
    """The help text: every verb with one line."""
    width = max(map(len, VERBS)) + 2
    lines = [f"  {verb:<{width}}{line}" for verb, (_, line) in VERBS.items()]
    return "\n".join(
        [
            "usage: worldloop VERB [options]",
            "",
            "Reinforcement learning of robot policies inside a video world model.",
            "",
            "verbs:",
            *lines,
            "",
            "`worldloop VERB --help` shows the options of one verb; `--config FILE` takes all of",
            "them from a config.json, as a run's folder keeps it.",
            "WORLDLOOP_TRACEBACK=1 shows where an error comes from.",
        ]
    )


def find_verb(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The verb at the front of `argv` (the longest that fits) and what follows it."""
    for length in (2, 1):
        verb = " ".join(argv[:length])
        if len(argv) >= length and verb in VERBS:
            return verb, list(argv[length:])
    words = " ".join(argv[:1])
    members = [verb for verb in VERBS if verb.startswith(words + " ")]
    if members:
        raise UserError(f"`{words}` needs one more word: {', '.join(members)}")
    raise UserError(f"unknown verb {words!r}; verbs: {', '.join(VERBS)}")


def parse_config(
    presets: type[T] | Mapping[str, tuple[str, T]], argv: Sequence[str], prog: str
) -> T:
    """Parse `argv` with tyro into a config dataclass, or into one of its named presets.

    A preset table is {name: (description, config)}; the name is then the first argument. In place
    of all options, `--config FILE` takes a config.json, as a run's folder keeps it.
    """
    import tyro

    words = [part for word in argv for part in word.split("=", 1)] if len(argv) < 3 else []
    if len(words) == 2 and words[0] == "--config":
        some = next(iter(presets.values()))[1] if isinstance(presets, Mapping) else None
        kind = cast(type[T], presets) if some is None else type(some)
        return config_from_dict(kind, read_json(words[1]), words[1])
    if isinstance(presets, Mapping):
        table = {name: (text, config) for name, (text, config) in presets.items()}
        return tyro.extras.overridable_config_cli(table, prog=prog, args=list(argv))
    return tyro.cli(presets, prog=prog, args=list(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; bad input gives one line on stderr and exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        args[0] = "version"
    try:
        keep_freed_memory()
        verb, rest = find_verb(args)
        function = cast(Callable[[list[str]], int], load(VERBS[verb][0]))
        return function(rest)
    except KeyboardInterrupt:
        print("worldloop: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, e.g. `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 141
    except (ValueError, OSError, ModuleNotFoundError) as error:
        message = _one_line(error)
        if message is None or os.environ.get("WORLDLOOP_TRACEBACK") == "1":
            raise
        print(f"worldloop: error: {message}", file=sys.stderr)
        return 2


def keep_freed_memory() -> None:
    """Let glibc keep up to 128 MiB of what is freed, in place of handing it back to the kernel.

    Otherwise each layer's activations fault their pages in anew: to imagine 16 episodes with `tiny`
    took 0.76 million page faults and 18.9 s of one core instead of 0.18 million and 17.6 s (an EPYC
    with AVX2). Blocks above 32 MiB, glibc's limit, still go back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 128 << 20)
        mallopt(M_TOP_PAD, 16 << 20)


def _one_line(error: Exception) -> str | None:
    """What a user should read, or None where only a traceback helps."""
    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            return None
        extra = EXTRAS[library]
        return f"this needs {library}, which is not installed; pip install 'worldloop[{extra}]'"
    message = str(error)
    if isinstance(error, UserError):
        return " ".join(message.split())
    return message if message and "\n" not in message else None


def version(argv: Sequence[str]) -> int:
    """Print the versions of worldloop, Python and the libraries that matter."""
    if argv:
        raise UserError(f"version: unexpected argument {argv[0]!r}")
    print(f"worldloop {__version__}")
    print(f"python {sys.version.split()[0]}")
    for name in ("torch", "triton", "numpy", "safetensors", "av", "mani_skill"):
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} not installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
