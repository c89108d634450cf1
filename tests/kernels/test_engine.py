"""The engine with its operators as kernels against the engine with their references.

Without a GPU the kernels run interpreted: `as_kernels` sends every operator to its launcher.
"""

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from worldloop.engine.dit import PRESETS, DiT, DiTConfig
from worldloop.engine.policy.vision import normalise_frames
from worldloop.engine.sampler import reference_sample, streaming_sample
from worldloop.engine.vae import PRESETS as WAN_PRESETS
from worldloop.engine.vae import WanVAE
from worldloop.kernels.cases import OPS, load_op
from worldloop.kernels.op import reference_only

USERS = ("engine.dit", "engine.dit_layers")  # decide for themselves, beside the operators


@pytest.fixture
def as_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, int]]:
    """After the call every operator is its launcher; the result counts their calls."""

    def switch() -> dict[str, int]:
        calls: dict[str, int] = {}
        for name, path in OPS.items():
            if name == "attention":  # chosen by name, not by device
                continue
            module = importlib.import_module(path.split(":")[0])
            launch = load_op(name).launch

            def counted(*args, launch=launch, name=name, **options):
                calls[name] = calls.get(name, 0) + 1
                return launch(*args, **options)

            monkeypatch.setattr(module, f"_{name}", counted)
            if hasattr(module, "uses_triton"):
                monkeypatch.setattr(module, "uses_triton", lambda *tensors, **options: True)
        for user in USERS:
            module = importlib.import_module(f"worldloop.{user}")
            monkeypatch.setattr(module, "uses_triton", lambda *tensors, **options: True)
        return calls

    return switch


def randomised(module: torch.nn.Module, scale: float = 1.0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = p[0].numel() if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) * scale / fan_in**0.5)
            if p.dim() == 1 or "gamma" in str(p.shape):
                p.add_(1)
    return module.eval().requires_grad_(False)


def small_dit(context: int = 0) -> DiT:
    config = DiTConfig(
        width=48, depth=2, heads=2, adaln_rank=8, context_dim=context, latent_channels=4,
        condition_channel=False, padding_channel=False, action_dim=7, action_layout="per_frame",
    )  # fmt: skip
    return randomised(DiT(config))


def passes(dit: DiT, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A first pass and one that sees it, with text where the network reads some."""
    config = getattr(dit, "_orig_mod", dit).config
    generator = torch.Generator().manual_seed(2)
    B, side = 2, 4

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    text = {"context": normal(B, 3, config.context_dim)} if config.context_dim else {}
    x = [normal(B, config.latent_channels, n, side, side) for n in (1, 2)]
    with torch.inference_mode():
        first = dit(x[0], torch.zeros(B, device=device), observed_frames=1, **text)
        out = dit(
            x[1], torch.tensor([[0.2, 0.8]] * B, device=device), normal(B, 8, 7),
            first_frame=1, history=first.kv, **text,
        )  # fmt: skip
    return [out.sample, *(t for pair in (*first.kv, *out.kv) for t in pair)]


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert float((a.float() - b.float()).norm() / b.float().norm()) <= tolerance


@pytest.mark.parametrize("context", [0, 16])
def test_dit(as_kernels, context: int) -> None:
    dit = small_dit(context)
    wanted = passes(dit)
    calls = as_kernels()
    found = passes(dit)
    branches = 3 if context else 2
    assert calls == {
        "adaln_lora": 2, "modulated_norm": 2 * 3, "gated_norm": 2 * 2 * (branches - 1),
        "qk_rope": 2 * 2,
    }  # fmt: skip
    assert_close(found, wanted, 1e-5)


def test_returned_keys_do_not_hold_their_history(as_kernels) -> None:
    dit = small_dit()
    as_kernels()
    for t in passes(dit)[1:]:
        assert t.untyped_storage().nbytes() == t.nbytes


def test_vae(as_kernels) -> None:
    vae = randomised(WanVAE(WAN_PRESETS["tiny"]), 0.9).channels_last()
    generator = torch.Generator().manual_seed(3)
    frames = torch.rand(2, 3, 9, 16, 16, generator=generator) * 2 - 1
    frames = frames.contiguous(memory_format=torch.channels_last_3d)

    def run() -> list[Tensor]:
        with torch.inference_mode():
            latents, stream = vae.encode(frames)
            whole, after = vae.decode(latents, stream)
            _, half = vae.decode(latents[:, :, :2], stream)
            last, _ = vae.decode(latents[:, :, 2:], half, only="last")
        return [latents, whole, last, *after.decoder]

    wanted = run()
    calls = as_kernels()
    found = run()
    assert calls["vae_norm"] > 50
    assert_close(found, wanted, 1e-5)
    assert_close([found[2]], [wanted[1][:, :, -1:]], 1e-5)


def test_samplers(as_kernels) -> None:
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(2, 3, 2, 4, 4, generator=generator)

    def denoise(x_t: Tensor, t_BF: Tensor) -> Tensor:
        return torch.tanh(x_t) * (1 - 0.1 * t_BF[:, None, :, None, None])

    def run() -> list[Tensor]:
        return [
            streaming_sample(denoise, noise), streaming_sample(denoise, noise, update="euler"),
            reference_sample(denoise, noise, reference_steps=6),
        ]  # fmt: skip

    wanted = run()
    calls = as_kernels()
    assert_close(run(), wanted, 1e-6)
    assert calls == {"solver_step": 3 + 3 + 6}


def test_normalised_pictures(as_kernels) -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 2, 6, 6, 3), np.uint8))
    wanted = normalise_frames(frames)
    assert as_kernels() == {}
    assert_close([normalise_frames(frames)], [wanted], 1e-6)


@pytest.mark.slow
def test_fused_pass_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes the operators whole, the one that writes its inputs included."""
    dit = small_dit()
    wanted = passes(dit)
    for module in ("kernels.gated_norm", "kernels.adaln_lora", *USERS):
        module = importlib.import_module(f"worldloop.{module}")
        monkeypatch.setattr(module, "uses_triton", lambda first, *rest, **options: probe(first))
    found = passes(torch.compile(dit, fullgraph=True, backend="aot_eager", dynamic=False))
    assert_close(found, wanted, 1e-5)


def probe(first: Tensor) -> bool:
    """What `uses_triton` asks torch on CUDA, answered yes on the CPU (where the operator is the
    reference behind its custom operator)."""
    if torch.compiler.is_exporting() or torch.is_autocast_enabled("cuda"):
        return False
    return not torch.is_grad_enabled() or not first.requires_grad


# On a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("context", [0, 16])
def test_dit_on_cuda(monkeypatch, context: int, dtype: torch.dtype, tolerance: float) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    dit = small_dit(context).to("cuda")
    with reference_only():
        wanted = passes(dit)
    found = passes(dit.to(dtype))
    assert_close([t.float() for t in found], wanted, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_vae_on_cuda(monkeypatch, dtype: torch.dtype, tolerance: float) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    vae = randomised(WanVAE(WAN_PRESETS["tiny"]), 0.9).to("cuda").channels_last()
    latents = torch.randn(2, 4, 3, 4, 4, device="cuda")
    with torch.inference_mode():
        with reference_only():
            wanted, _ = vae.decode(latents)
        found, _ = vae.to(dtype).decode(latents)
    assert_close([found.float()], [wanted], tolerance)


def two_blocks_of_2b() -> tuple[DiT, dict[str, object], Tensor]:
    """Two blocks as wide as the 2b preset in bf16, with a history; inputs on the GPU."""
    import dataclasses

    config = dataclasses.replace(PRESETS["2b"](), depth=2, action_layout="per_frame")
    with torch.device("cuda"):
        dit = DiT(config).to(torch.bfloat16).eval().requires_grad_(False)
        for p in dit.parameters():
            if p.dim() > 1:
                p.normal_(std=p[0].numel() ** -0.5)
        history = [
            tuple(torch.randn(2, 512, 16, 128, dtype=torch.bfloat16) for _ in range(2))
            for _ in range(2)
        ]
        given = {"actions_BTA": torch.randn(2, 8, 7), "first_frame": torch.arange(3, 5)}
        x = torch.randn(2, 16, 2, 32, 32)
    return dit, {**given, "history": history, "return_kv": False}, x


@pytest.mark.gpu
def test_fused_pass_can_be_captured() -> None:
    """A CUDA graph of the pass: no host copy, no synchronisation; replays with new inputs."""
    dit, given, x = two_blocks_of_2b()
    t = torch.full((2, 2), 0.5, device="cuda")
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                dit(x, t, **given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = dit(x, t, **given).sample
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        found = out.clone()
        assert_close([found], [dit(x, t, **given).sample], 1e-3)


@pytest.mark.gpu
@pytest.mark.slow
def test_fused_pass_compiles_whole() -> None:
    dit, given, x = two_blocks_of_2b()
    t = torch.full((2, 2), 0.5, device="cuda")
    with torch.inference_mode():
        wanted = dit(x, t, **given).sample
        found = torch.compile(dit, fullgraph=True)(x, t, **given).sample
    assert_close([found], [wanted], 2e-2)
