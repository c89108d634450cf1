"""Back ends: one conformance test over all, each against eager; padding, static inputs, export."""

import dataclasses
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from worldloop.engine.backends import BACKENDS, make_backend, set_attention, wrap_world
from worldloop.engine.backends import tensorrt as tensorrt_backend
from worldloop.engine.backends.base import Calls, Unchanged
from worldloop.engine.backends.cudagraph import Results, StaticInputs
from worldloop.engine.backends.networks import DiTPass, LightDecode, WanDecode
from worldloop.engine.backends.tensorrt import engine_key, export_onnx
from worldloop.errors import UserError

ROWS, T = 3, 8


def cases(small, kind="light", device="cpu"):
    """The modules that a world model runs, with example tensors: name -> (module, tensors)."""
    world = small.world_of(kind).to(device)
    C = world.config.dit.latent_channels
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    frames = torch.arange(1, 3, device=device)
    past = [normal(ROWS, 12, 2, 24) for _ in range(4)]
    inputs = [normal(ROWS, C, 2, 4, 4), torch.rand(ROWS, 2).to(device), normal(ROWS, T, 7)]
    names = ("x_BCFHW", "timesteps_BF", "actions_BTA")
    first = DiTPass(world.dit, names[:2], False, observed_frames=1, return_kv=True)
    out = {
        "dit-start": (first, [inputs[0][:, :, :1], inputs[1][:, :1], frames[:1] * 0]),
        "dit-step": (DiTPass(world.dit, names, True, return_kv=False), [*inputs, *past, frames]),
        "dit-commit": (DiTPass(world.dit, names, True, return_kv=True), [*inputs, *past, frames]),
    }
    vae, latents = world.autoencoder, normal(ROWS, C, 2, 4, 4)
    if kind == "light":
        for only in (None, "last"):
            out[f"light-{only}"] = (LightDecode(vae, False, only), [latents])
        return out
    with torch.no_grad():
        slots = vae.decode(latents[:, :, :1])[1].decoder
    out["wan-first"] = (WanDecode(vae, None), [latents[:, :, :1]])
    for only in (None, "last"):
        out[f"wan-{only}"] = (WanDecode(vae, only), [latents, *slots])
    return out


def others(tensors, seed=9):
    """Other values of the same shapes and dtypes (frame indices stay)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        t + 0.1 * torch.randn(t.shape, generator=generator).to(t)
        if t.is_floating_point()
        else t + 2
        for t in tensors
    ]


def conform(backend, module, example, tolerance):
    """Every contract of a back end, on one module."""
    with torch.inference_mode():
        call = make_backend(backend, module, example)
        results = []
        for tensors in (example, others(example), example):
            before = [t.clone() for t in tensors]
            got, want = call(*tensors), module(*tensors)
            assert isinstance(got, tuple) and len(got) == len(want)
            for g, w in zip(got, want, strict=True):
                assert g.shape == w.shape and g.dtype == w.dtype and g.device == w.device
                assert float((g - w).norm()) <= tolerance * float(w.norm())
            for t, b in zip(tensors, before, strict=True):
                assert torch.equal(t, b)  # inputs are not written
            results.append((got, [g.clone() for g in got]))
        for got, copies in results:  # nor are earlier results
            assert all(map(torch.equal, got, copies))
        if backend != "eager":
            with pytest.raises(UserError, match=r"tensor 0 is .* the example was"):
                call(*(torch.cat([t, t]) for t in example))


ON_CPU = [pytest.param("eager"), pytest.param("compiled", marks=pytest.mark.slow)]
ON_GPU = ["eager", "compiled", "cudagraph", "compiled-graph", "tensorrt"]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", ["dit-start", "dit-step", "light-last"])
def test_conforms_on_a_cpu(small, backend, name):
    torch._dynamo.reset()
    conform(backend, *cases(small)[name], 1e-5)


@pytest.mark.slow
def test_a_compiled_wan_decoder_conforms(small):
    conform("compiled", *cases(small, "wan")["wan-last"], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("kind", ["light", "wan"])
def test_conforms_on_a_gpu(small, monkeypatch, tmp_path, backend, kind):
    monkeypatch.setenv("WORLDLOOP_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name, (module, example) in cases(small, kind, "cuda").items():
        if backend == "tensorrt" and not has_tensorrt():
            with pytest.raises(UserError, match=r"worldloop\[tensorrt\]"):
                make_backend(backend, module, example)
            return
        # TensorRT takes TF32 for fp32 products unless told otherwise.
        conform(backend, module, example, 2e-2 if backend == "tensorrt" else 1e-4)
        if backend == "tensorrt":
            made = sorted((tmp_path / "tensorrt").iterdir())
            conform(backend, module, example, 2e-2)  # from the disk
            assert sorted((tmp_path / "tensorrt").iterdir()) == made, name


def has_tensorrt() -> bool:
    try:
        tensorrt_backend._library()
    except UserError:
        return False
    return True


# A world model through a back end ---------------------------------------------------------------


@pytest.fixture
def doubling():
    """A back end that records its calls: (module, shapes)."""
    seen = []

    def build(module, example):
        def call(*tensors):
            seen.append((type(module).__name__, [t.shape[0] for t in tensors]))
            return module(*tensors)

        return call

    return build, seen


@pytest.mark.parametrize("kind", ["light", "wan"])
@pytest.mark.parametrize("decode", ["all", "policy"])
@pytest.mark.parametrize("steps", [2, "reference"])
def test_a_wrapped_world_imagines_the_same(small, monkeypatch, doubling, kind, decode, steps):
    build, seen = doubling
    monkeypatch.setattr("worldloop.engine.backends.resolve", lambda table, name: build)
    world = small.world_of(kind)
    arguments = (small.frames_of(5), small.poses_of(5), small.actions_of(5, 24), list(range(5)))
    options = {"steps": steps, "decode": decode}
    want, latents, _ = small.generate(world, *arguments, **options)
    want_latents = list(latents)  # its hook hears the wrapped world as well
    wrapped = wrap_world(world, "recording", buckets=(2, 4))
    got, latents, _ = small.generate(wrapped, *arguments, **options)
    for a, b in zip(got, want, strict=True):
        small.assert_same_chunk(a, b, levels=1)
    for a, b in zip(latents, want_latents, strict=True):
        assert small.relative(a, b) < 1e-5
    # Five rows go as 4 and as 1, which is padded to 2.
    assert {rows[0] for _, rows in seen} == {4, 2}
    assert {name for name, _ in seen} == {
        "DiTPass",
        "LightDecode" if kind == "light" else "WanDecode",
    }


def test_wrapping_shares_weights_and_leaves_the_original_alone(small):
    world = small.world_of()
    wrapped = wrap_world(wrap_world(world, "eager"), "eager")
    assert wrapped.dit._plain[0] is world.dit and type(world.dit).__name__ == "DiT"
    names = [name for name, _ in world.named_parameters()]
    assert [name for name, _ in wrapped.named_parameters()] == names
    assert all(a is b for a, b in zip(wrapped.parameters(), world.parameters(), strict=True))
    x, t = torch.zeros(1, 16, 1, 4, 4), torch.zeros(1)
    wrapped.dit(x, t, observed_frames=1).sample.sum().backward()  # gradients: as without
    assert world.dit.final_layer.linear.weight.grad is not None


def test_bad_inputs_raise_before_anything_is_built(small):
    def build(module, example):
        raise AssertionError("built")

    wrapped = wrap_world(small.world_of(), "eager")
    wrapped.dit.calls = Calls(build, (1, 2))
    x, t = torch.zeros(1, 16, 1, 4, 6), torch.zeros(1)
    with torch.inference_mode(), pytest.raises(UserError, match="learned positions"):
        wrapped.dit(x, t)
    with torch.inference_mode(), pytest.raises(UserError, match="actions_BTA has 3 poses"):
        wrapped.dit(torch.zeros(1, 16, 1, 4, 4), t, torch.zeros(1, 3, 7))


def test_an_unknown_back_end_lists_the_known_ones(small):
    with pytest.raises(UserError, match="unknown backend 'fast'; known: compiled"):
        wrap_world(small.world_of(), "fast")
    with pytest.raises(UserError, match="buckets is"):
        wrap_world(small.world_of(), "compiled", buckets=(4, 2))


@pytest.mark.parametrize("backend", ["cudagraph", "compiled-graph"])
def test_graphs_say_that_they_need_a_gpu(small, backend):
    module, example = cases(small)["light-last"]
    with pytest.raises(UserError, match="needs a CUDA device"):
        make_backend(backend, module, example)


def test_every_back_end_is_in_the_tests():
    assert set(ON_GPU) == set(BACKENDS)


# Rows and buckets -------------------------------------------------------------------------------


class Scale(nn.Module):
    def forward(self, x, history, factor):
        return x * factor + history.sum(1, keepdim=True), history


def test_rows_are_padded_and_split():
    built = []

    def build(module, example):
        built.append(example[0].shape[0])
        return module

    calls = Calls(build, (2, 4))
    for rows in (1, 2, 3, 4, 6, 9):
        x, history = torch.randn(rows, 2), torch.randn(rows, 5)
        got = calls("k", Scale, [x, history], [torch.tensor(3.0)], lasting=1)
        want = Scale()(x, history, torch.tensor(3.0))
        assert all(map(torch.equal, got, want))
    assert built == [2, 4]


def test_a_padded_history_follows_its_original():
    """It is padded once for all passes of a chunk, and again after it has been written."""
    pads = []

    def build(module, example):
        def call(*tensors):
            pads.append(tensors[1])
            return module(*tensors)

        return call

    calls = Calls(build, (4,))
    x, history, factor = torch.zeros(3, 1), torch.randn(3, 5), torch.tensor(0.0)
    with torch.inference_mode():
        view = history[:, :4]  # as KVRing.history gives it
        first = calls("k", Scale, [x, view], [factor], lasting=1)[0]
        calls("k", Scale, [x, view], [factor], lasting=1)
        assert pads[0] is pads[1]
        history[:, 0] += 1  # as KVRing.append does, through the storage
        third = calls("k", Scale, [x, view], [factor], lasting=1)[0]
        torch.testing.assert_close(third, first + 1)
        other = (history * 2)[:, :4]
        fourth = calls("k", Scale, [x, other], [factor], lasting=1)[0]
        torch.testing.assert_close(fourth, 2 * third)


def test_graphs_find_every_history_in_the_same_place():
    """Histories of all lengths and buckets are one buffer; a larger bucket voids what reads it."""
    built = []

    def build(module, example, fixed):
        history = example[fixed[0]]
        built.append((tuple(history.shape), history))

        def call(*tensors):  # as a graph: it reads where it was recorded
            return module(*[t if i not in fixed else history for i, t in enumerate(tensors)])

        return call

    calls, factor = Calls(build, (2, 4), room=6), torch.tensor(1.0)

    def run(rows, length, seed=0):
        torch.manual_seed(seed)
        x, history = torch.randn(rows, 1), torch.randn(rows, 6)[:, :length]
        with torch.inference_mode():
            for _ in range(2):
                got = calls("k", Scale, [x, history], [factor], lasting=1)
        for a, b in zip(got, Scale()(x, history, factor), strict=True):
            torch.testing.assert_close(a, b)
        return got

    run(2, 2)
    run(1, 6, seed=1)
    run(2, 2, seed=2)
    assert [shape for shape, _ in built] == [(2, 2), (2, 6)]
    first, whole = (history for _, history in built)
    assert first.data_ptr() == whole.data_ptr() and whole.stride() == first.stride() == (6, 1)
    run(3, 4)  # more rows than the buffer has: another one, and the graphs are made anew
    run(2, 2)
    assert [shape for shape, _ in built[2:]] == [(4, 4), (2, 2)]
    assert built[2][1].data_ptr() == built[3][1].data_ptr() != first.data_ptr()
    run(4, 6)
    run(3, 4)
    assert len(built) == 5


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_padding_keeps_channels_last(rows):
    calls = Calls(lambda module, example: module, (8,))
    x = torch.randn(rows, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    seen = []
    calls("k", lambda: lambda t: (seen.append(t) or t,), [x])
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and len(seen[0]) == 8


def test_results_of_one_shape_share_their_place():
    made = [torch.randn(2, 3), torch.randn(4)]
    first = Results.shared(made)
    assert Results.shared([t + 1 for t in made]) is first
    assert Results.shared(made[:1]) is not first
    assert Results.shared([made[0].t().contiguous().t(), made[1]]) is not first, "other strides"
    assert first.tensors[0].data_ptr() != made[0].data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudagraph", "compiled-graph"])
def test_graphs_are_recorded_again_after_all_earlier_ones_are_gone(small, backend):
    """The pool of a device outlives its graphs (torch asserts where a dead one is named)."""
    want = None
    for _ in range(2):
        world = wrap_world(small.world_of().cuda(), backend, buckets=(2,))
        arguments = (small.frames_of(2), small.poses_of(2), small.actions_of(2, 16), [0, 1])
        got = list(small.generate(world, *arguments)[1])
        want = want or got
        for a, b in zip(got, want, strict=True):
            assert small.relative(a, b) < 1e-4
        del world
        gc.collect()
        torch.cuda.empty_cache()


def test_unchanged_tells_writes_new_objects_and_inference_tensors():
    unchanged, tensor = Unchanged(), torch.zeros(3)
    assert not unchanged([tensor]) and unchanged([tensor])
    tensor[1:].add_(1)
    assert not unchanged([tensor]) and unchanged([tensor])
    twin = tensor.view(-1)
    assert not unchanged([twin])
    del twin
    gc.collect()
    assert not unchanged([tensor.view(-1)])
    with torch.inference_mode():
        loose = torch.zeros(3)
    assert not unchanged([loose]) and not unchanged([loose])


def test_static_inputs_copy_only_what_has_changed():
    x, history = torch.zeros(2), torch.ones(4)
    inputs = StaticInputs([x, history])
    assert inputs.load([x, history]) == 2 and inputs.load([x, history]) == 0
    assert inputs.load([x + 1, history]) == 1
    history.mul_(3)
    assert inputs.load([x, history]) == 2
    assert inputs.tensors[0].tolist() == [0, 0] and inputs.tensors[1].tolist() == [3] * 4
    there = StaticInputs([x, history], fixed=[1])
    assert there.tensors[1] is history and there.tensors[0] is not x
    assert there.load([x, history]) == 1
    with pytest.raises(UserError, match="tensor 1 is"):
        inputs.load([x, history[:2]])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["light", "wan"])
def test_a_graphed_world_imagines_the_same_without_waiting(small, monkeypatch, kind):
    """Rows leave and join, history grows and wraps: all as in eager; no pass waits for the GPU."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    world = small.world_of(kind).cuda()
    wrapped = wrap_world(world, "cudagraph", buckets=(2, 4))
    for rows, seed in ((3, 0), (4, 1), (1, 2), (3, 3)):
        arguments = (small.frames_of(rows, seed), small.poses_of(rows, seed),
                     small.actions_of(rows, 40, seed), list(range(rows)))  # fmt: skip
        want, latents, _ = small.generate(world, *arguments, steps=4)
        want_latents = list(latents)  # its hook hears the wrapped world as well
        got, latents, _ = small.generate(wrapped, *arguments, steps=4)
        for a, b in zip(latents, want_latents, strict=True):
            assert small.relative(a, b) < 1e-4
        for a, b in zip(got, want, strict=True):
            small.assert_same_chunk(a, b, levels=1, reward=1e-3)
    x, t = torch.randn(2, world.config.dit.latent_channels, 2, 4, 4).cuda(), torch.ones(2, 2).cuda()
    poses = torch.randn(2, T, 7).cuda()
    with torch.inference_mode():
        wrapped.dit(x, t, poses, first_frame=1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            wrapped.dit(x, t, poses, first_frame=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Attention --------------------------------------------------------------------------------------


def test_the_attention_option_reaches_every_layer(small, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLDLOOP_CACHE", str(tmp_path))
    world = small.world_of()
    arguments = (small.frames_of(2), small.poses_of(2), small.actions_of(2, 16), [0, 1])
    want = list(small.generate(world, *arguments)[1])
    for name in ("products", "sdpa", "auto"):
        wrapped = wrap_world(world, "eager", attention=name)
        chosen = {block.self_attn.implementation for block in wrapped.dit.blocks}
        assert chosen in ([{name}] if name != "auto" else [{"products"}, {"sdpa"}])
        for a, b in zip(small.generate(wrapped, *arguments)[1], want, strict=True):
            assert small.relative(a, b) < 1e-5
    with pytest.raises(UserError, match="attention 'flash' needs a CUDA device"):
        set_attention(world.dit, "flash", queries=8, keys=8)


# ONNX and TensorRT ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [("light", "dit-start"), ("light", "dit-step"), ("light", "dit-commit"),
     ("light", "light-None"), ("light", "light-last"),
     ("wan", "wan-first"), ("wan", "wan-None"), ("wan", "wan-last")],
)  # fmt: skip
def test_the_exported_graph_gives_the_same(small, tmp_path, kind, name):
    """What TensorRT would build, run by onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    # The weights, whatever ran before. Of three seeds two put onnxruntime on AVX2 1.1e-5 and 1.2e-5
    # from fp64 in dit-start (torch: 3e-7): its arithmetic, and too near the bound to test a graph.
    torch.manual_seed(1)
    module, example = cases(small, kind)[name]
    path = export_onnx(module, example, tmp_path / "module.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    for tensors in (example, others(example)):
        feeds = {f"in_{i}": t.numpy() for i, t in enumerate(tensors) if f"in_{i}" in names}
        got = session.run([f"out_{i}" for i in range(len(session.get_outputs()))], feeds)
        with torch.no_grad():
            want = module(*tensors)
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            assert g.shape == tuple(w.shape)
            assert np.linalg.norm(g - w.numpy()) <= 1e-5 * float(w.norm())


def test_a_missing_tensorrt_is_one_clear_error(small):
    if has_tensorrt():
        with pytest.raises(UserError, match="needs a CUDA device"):
            make_backend("tensorrt", *cases(small)["light-last"])
        return
    with pytest.raises(UserError, match=r"cannot load TensorRT .*worldloop\[tensorrt\]"):
        make_backend("tensorrt", *cases(small)["light-last"])


def test_a_missing_exporter_is_one_clear_error(small, monkeypatch, tmp_path):
    monkeypatch.setattr(tensorrt_backend, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs onnx: pip install"):
        export_onnx(*cases(small)["light-last"], tmp_path / "x.onnx")


def test_what_cannot_be_exported_says_so(tmp_path: Path):
    class Odd(nn.Module):
        def forward(self, x):
            return (torch.linalg.eigh(x)[0],)

    with pytest.raises(UserError, match="Odd cannot be exported to ONNX"):
        export_onnx(Odd(), [torch.eye(3)], tmp_path / "x.onnx")


def test_the_engine_key_names_everything_it_depends_on(small):
    module, example = cases(small)["dit-step"]
    commit, _ = cases(small)["dit-commit"]
    key = engine_key(module, example, "10.8", "H200")
    assert key == engine_key(module, [t.clone() for t in example], "10.8", "H200")
    changed = {
        engine_key(module, example, "10.9", "H200"),
        engine_key(module, example, "10.8", "H100"),
        engine_key(commit, example, "10.8", "H200"),
        engine_key(module, [t[:2] for t in example], "10.8", "H200"),
        engine_key(module, [example[0].bfloat16(), *example[1:]], "10.8", "H200"),
    }
    vae, latents = cases(small)["light-last"]
    before = engine_key(vae, latents, "10.8", "H200")
    vae.vae._statistics += 1  # a buffer outside the state dict
    changed.add(engine_key(vae, latents, "10.8", "H200"))
    with torch.no_grad():
        module.dit.final_layer.linear.weight[0, 0] += 1e-3
    changed.add(engine_key(module, example, "10.8", "H200"))
    assert len(changed | {key, before}) == 9
    for name, value in (("rope_dtype", "bfloat16"), ("rope_ratio_hwt", (2.0, 1.0, 1.0)),
                        ("timestep_scale", 0.5)):  # fmt: skip
        other, _ = cases(small)["dit-step"]
        other.dit.config = dataclasses.replace(other.dit.config, **{name: value})
        assert engine_key(other, example, "10.8", "H200") not in changed | {key}, name
        changed.add(engine_key(other, example, "10.8", "H200"))
