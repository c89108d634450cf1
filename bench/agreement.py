"""`worldloop bench agreement`: what each inexact saving costs, in what reinforcement learning uses.

Recorded episodes are imagined by the plain world model and by the cheaper one, from the same
starts, actions and noise (`engine/agreement.py`), and the figures compared with the gate.

    --compare precision   bf16 and fp8 against fp32 (fp8 emulated where there are no fp8 units)
    --compare groups      fp8 in one group of layers at a time: which are sensitive
    --compare decoder     a distilled decoder against the autoencoder's own
    --compare backend     a back end against eager

Speeds are of one pass and one decode, the arms in turn. The emulated fp8 has no speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from worldloop.bench import timing
from worldloop.cli import parse_config
from worldloop.config import positive
from worldloop.engine.agreement import Gate, Imagined, agreement, imagine
from worldloop.engine.backends import BACKENDS, wrap_world
from worldloop.engine.fp8 import LAYERS, has_fp8_units, quantize_fp8, quantized_share
from worldloop.engine.light_decoder import LightDecoder
from worldloop.engine.policy.vla import VLAPolicy
from worldloop.engine.world_model import WorldModel
from worldloop.errors import UserError
from worldloop.rl.held_out import HeldOut, load_held_out
from worldloop.rl.starts import shipped_episodes
from worldloop.track import Progress

# Groups of the DiT's Linears without bias, for the measurement that LAYERS comes from.
GROUPS: dict[str, tuple[str, ...]] = {
    "attention q, k, v": tuple(f"blocks.*.self_attn.{n}_proj" for n in "qkv"),
    "attention output": ("blocks.*.self_attn.output_proj",),
    "mlp in": ("blocks.*.mlp.layer1",),
    "mlp out": ("blocks.*.mlp.layer2",),
    "modulation": ("blocks.*.adaln_modulation_*.?", "final_layer.adaln_modulation.?"),
    "noise embedder": ("t_embedder.1.linear_?",),
    "latent embedder": ("x_embedder.proj.1",),
    "output": ("final_layer.linear",),
}


@dataclass(frozen=True)
class AgreementBench:
    """Measure the agreement of a saving with the plain world model; write bench JSON."""

    compare: Literal["precision", "groups", "decoder", "backend"] = "precision"
    out: Path = Path("runs/bench")
    world: str = "tiny"
    """Shipped preset, checkpoint folder or hub id."""
    policy: str = "policy/pushcube"
    """Asked, greedily, what it would do on the last frame of each chunk."""
    episodes: Path | None = None
    """Dataset whose starts and actions are imagined again; without it the shipped one."""
    count: int = 32
    """Episodes, spread evenly over the dataset (successes may lie before failures in it)."""
    steps: Literal[1, 2, 4] = 4
    """Denoising steps."""
    decoder: Path | None = None
    """Checkpoint folder of `worldloop train decoder` (its ``model``), for --compare decoder."""
    backend: str = "compiled"
    """For --compare backend."""
    batch: int = 16
    """Episodes at once; speeds are of a pass with half as many rows."""
    repeats: int = 9
    seed: int = 0
    threads: int = 2
    device: str | None = None

    def __post_init__(self) -> None:
        positive(self, "count", "batch", "repeats", "threads")
        if self.compare == "decoder" and self.decoder is None:
            raise UserError("--compare decoder needs --decoder: a folder of `train decoder`")
        if self.backend not in BACKENDS:
            raise UserError(f"backend is {self.backend!r}; known: {', '.join(BACKENDS)}")


@dataclass
class Arm:
    """One way to run the world model."""

    world: WorldModel
    around: contextlib.AbstractContextManager[Any]


class Bench:
    """Episodes, policy and arms of one run."""

    def __init__(self, config: AgreementBench) -> None:
        self.config = config
        self.device = timing.device_of(config.device)
        self.policy = VLAPolicy.from_pretrained(config.policy, temperature=0.0, device=self.device)
        world = self.load()
        folder = config.episodes or shipped_episodes()
        self.real = spread(load_held_out(folder, None, world), config.count)
        self.threshold = world.config.reward_threshold

    def load(self, dtype: torch.dtype = torch.float32) -> WorldModel:
        world = WorldModel.from_pretrained(self.config.world, device=self.device, dtype=dtype)
        world.autoencoder.channels_last()
        return world

    def arm(self, world: WorldModel, autocast: bool = False) -> Arm:
        if not autocast:
            return Arm(world, contextlib.nullcontext())
        return Arm(world, torch.autocast(self.device.type, torch.bfloat16))

    def imagine(self, name: str, arm: Arm) -> Imagined:
        config, count = self.config, self.real.actions.shape[0] * self.real.actions.shape[1]
        with Progress(count, name, unit="frame") as progress, arm.around:
            return imagine(
                arm.world, self.real.starts, self.real.actions, self.policy, steps=config.steps,
                seed=config.seed, max_batch=config.batch, progress=progress.update,
            )  # fmt: skip

    def compare(
        self, arms: Mapping[str, Arm], pairs: Mapping[str, tuple[str, str]]
    ) -> dict[str, dict[str, Any]]:
        """Agreement of each pair (reference, candidate), with what misses the gate."""
        made = {name: self.imagine(name, arm) for name, arm in arms.items()}
        found = {}
        for title, (reference, candidate) in pairs.items():
            figures = agreement(made[reference], made[candidate], self.threshold)
            found[title] = {**figures, "gate_failures": Gate().failures(figures)}
        return found

    def speeds(self, arms: Mapping[str, Arm]) -> dict[str, dict[str, Any]]:
        """Seconds of a denoising pass on full history, of decoding a chunk and its last frame."""
        rows = max(1, self.config.batch // 2)
        works: dict[str, Callable[[], Any]] = {}
        for name, arm in arms.items():
            with arm.around:  # the history, too, as this arm makes it
                made = passes(arm.world, rows, self.real)
            for part, run in made.items():
                works[f"{name}: {part}"] = self._inside(arm, run)
        for run in works.values():
            run()
        times = timing.interleaved(works, self.config.repeats, self.device)
        return {"rows": rows, **{name: t.to_dict() for name, t in times.items()}}  # type: ignore[dict-item]

    @staticmethod
    def _inside(arm: Arm, run: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> Any:
            with torch.inference_mode(), arm.around:
                return run()

        return inside


def spread(real: HeldOut, count: int) -> HeldOut:
    """`count` of the episodes at even distances, or all where there are fewer."""
    total = len(real.episodes)
    chosen = [real.episodes[i * total // count] for i in range(min(count, total))]
    return dataclasses.replace(real, episodes=chosen if count < total else real.episodes)


def passes(world: WorldModel, rows: int, real: HeldOut) -> dict[str, Callable[[], Any]]:
    """The parts of a step whose cost is compared, on `rows` episodes with full history."""
    config, T = world.config, world.action_spec.chunk
    starts = real.starts.select([i % len(real.episodes) for i in range(rows)])
    actions = real.actions[[i % len(real.episodes) for i in range(rows)]]
    state = world.start(starts.frames, starts.poses, list(range(rows)))
    while state.ring is not None and state.ring.filled < config.sink + config.window:
        k = state.chunk % (actions.shape[1] // T)
        _, state = world.step(
            state, actions[:, k * T : (k + 1) * T], steps=1, decode="policy"
        )  # fmt: skip
    assert state.ring is not None
    history, decoder, cursor = state.ring.history(), state.decoder, state.cursor
    C, (h, w) = config.dit.latent_channels, config.reward.grid
    generator = torch.Generator(world.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=world.device)

    latents, poses = normal(rows, C, config.block, h, w), normal(rows, T, config.dit.action_dim)
    t = torch.ones(rows, config.block, device=world.device)

    def dit_pass() -> Any:
        return world.dit(
            latents, t, poses, first_frame=cursor, history=history, return_kv=False
        ).sample  # fmt: skip

    return {
        "pass": dit_pass,
        "decode": lambda: world.autoencoder.decode(latents, decoder)[0],
        "decode last": lambda: world.autoencoder.decode(latents, decoder, only="last")[0],
    }


# ---------------------------------------------------------------- comparisons


def compare_precision(bench: Bench) -> dict[str, Any]:
    """bf16 (weights cast), bf16 (autocast), fp8 over either, against what each starts from."""
    bf16 = torch.bfloat16
    fp8_bf16, fp8_fp32 = bench.load(bf16), bench.load()
    quantize_fp8(fp8_bf16.dit), quantize_fp8(fp8_fp32.dit)
    arms = {
        "fp32": bench.arm(bench.load()),
        "bf16": bench.arm(bench.load(bf16)),
        "bf16 autocast": bench.arm(bench.load(), autocast=True),
        "fp8 over bf16": bench.arm(fp8_bf16),
        "fp8 over fp32": bench.arm(fp8_fp32),
    }
    pairs = {
        "bf16 against fp32": ("fp32", "bf16"),
        "bf16 autocast against fp32": ("fp32", "bf16 autocast"),
        "fp8 against bf16": ("bf16", "fp8 over bf16"),
        "fp8 against fp32": ("fp32", "fp8 over bf16"),
        "fp8 over fp32 against fp32": ("fp32", "fp8 over fp32"),
    }
    native = has_fp8_units(bench.device)
    timed = [n for n in arms if "fp8" not in n] + (["fp8 over bf16"] if native else [])
    return {
        "fp8": "torch._scaled_mm" if native else "emulated",
        "fp8_layers": list(LAYERS),
        "fp8_share_of_weights": quantized_share(fp8_bf16.dit),
        "agreement": bench.compare(arms, pairs),
        "speed": bench.speeds({name: arms[name] for name in timed}),
    }


def compare_groups(bench: Bench) -> dict[str, Any]:
    """fp8 in one group of layers at a time, over fp32."""
    arms = {"fp32": bench.arm(bench.load())}
    shares: dict[str, float | str] = {}
    for group, layers in GROUPS.items():
        world = bench.load()
        try:
            quantize_fp8(world.dit, layers)
        except UserError as error:  # e.g. features that are no multiple of 16: then it must stay
            shares[group] = str(error)
            continue
        shares[group] = quantized_share(world.dit)
        arms[group] = bench.arm(world)
    pairs = {group: ("fp32", group) for group in arms if group != "fp32"}
    return {"share_of_weights": shares, "agreement": bench.compare(arms, pairs)}


def compare_decoder(bench: Bench) -> dict[str, Any]:
    """The distilled decoder against the autoencoder's own, in fp32 and in bf16."""
    assert bench.config.decoder is not None
    arms = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        world = bench.load(dtype)
        decoder = LightDecoder.load(bench.config.decoder).to(bench.device, dtype)
        arms[f"full {name}"] = bench.arm(world)
        arms[f"light {name}"] = bench.arm(wrap_world(world, decoder=decoder, channels_last=True))
    pairs = {name: (f"full {name}", f"light {name}") for name in ("fp32", "bf16")}
    return {"agreement": bench.compare(arms, pairs), "speed": bench.speeds(arms)}


def compare_backend(bench: Bench) -> dict[str, Any]:
    """A back end against eager; the first imagination, which builds, is timed apart."""
    name = bench.config.backend
    arms = {"eager": bench.arm(bench.load()), name: bench.arm(wrap_world(bench.load(), name))}
    since = time.perf_counter()
    bench.imagine(f"{name}, built", arms[name])
    built = time.perf_counter() - since
    found = bench.compare(arms, {name: ("eager", name)})
    return {"seconds_with_building": built, "agreement": found, "speed": bench.speeds(arms)}


COMPARISONS = {
    "precision": ("fp8-quality", compare_precision),
    "groups": ("fp8-groups", compare_groups),
    "decoder": ("decoder", compare_decoder),
    "backend": ("backend", compare_backend),
}


def main(argv: list[str]) -> int:
    """Run from the command line."""
    config = parse_config(AgreementBench, argv, "worldloop bench agreement")
    torch.set_num_threads(config.threads)
    bench = Bench(config)
    name, run = COMPARISONS[config.compare]
    if config.compare == "backend":
        name = f"backend-{config.backend}"
    values = {**run(bench), "gate": asdict(Gate())}
    found = timing.document("agreement", config, bench.device, config.threads, values)
    path = timing.write(config.out, f"{name}-{Path(config.world).name}", found)
    for title, figures in values["agreement"].items():
        psnr = figures["psnr_db"]
        print(
            f"{title}: latents {figures['latent_relative_l2']:.2%} apart, frames "
            f"{'identical' if psnr is None else f'{psnr:.1f} dB'}, rewards flipped "
            f"{figures['reward_flip_rate']:.2%}, tokens equal {figures['token_agreement']:.1%}; "
            f"gate {'; '.join(figures['gate_failures']) or 'passed'}"
        )
    print(path)
    return 0
