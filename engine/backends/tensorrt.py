"""TensorRT: the module exported to ONNX, built into an engine, the engine kept on disk.

The export (torch.onnx.export, dynamo=True, opset 20, static shapes) needs onnx and onnxscript and
works anywhere; building and running need a CUDA device and the `tensorrt` package (torch-tensorrt
brings it along). An engine belongs to its weights, its graph (the module's options and the code
that it is traced from), its shapes and dtypes, the TensorRT version and the GPU: all of them are in
the name of its file, so a stale one is never loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldloop.engine.attention import cache_folder
from worldloop.engine.backends.base import Call, facts_of, no_autocast, require_like
from worldloop.engine.fp8 import FP8Linear
from worldloop.errors import UserError
from worldloop.files import atomic_write_bytes

OPSET = 20
INSTALL = "pip install 'worldloop[tensorrt]' (or torch-tensorrt) on a machine with an NVIDIA GPU"


def export_onnx(module: nn.Module, example: Sequence[Tensor], path: Path) -> Path:
    """Write the module's graph at the example's shapes; inputs in_0 .., outputs out_0 ..

    Weights go into the file `path` + ".data" beside it where they are large. Raises UserError
    where the exporter is missing or does not take the module.
    """
    for library in ("onnx", "onnxscript"):
        if find_spec(library) is None:
            raise UserError(
                f"backend 'tensorrt' needs {library}: pip install 'worldloop[tensorrt]'"
            )
    if any(isinstance(layer, FP8Linear) for layer in module.modules()):
        raise UserError("backend 'tensorrt' does not take fp8 layers; use 'compiled', or bf16")
    # Ordinary tensors outside inference mode: the exporter traces with them.
    with torch.inference_mode(False), torch.no_grad():
        inputs = tuple(t.clone() for t in example)
        count = len(module(*inputs))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the exporter's own deprecations
                torch.onnx.export(
                    module, inputs, path, dynamo=True, opset_version=OPSET, verbose=False,
                    input_names=[f"in_{i}" for i in range(len(inputs))],
                    output_names=[f"out_{i}" for i in range(count)], external_data=True,
                )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"{type(module).__name__} cannot be exported to ONNX: {first}"
            ) from error
    return path


def engine_key(module: nn.Module, example: Sequence[Tensor], version: str, device_name: str) -> str:
    """64 hexadecimal digits of everything that an engine depends on."""
    digest = hashlib.sha256()
    digest.update(f"{version}\n{device_name}\n{OPSET}\n{torch.__version__}\n{module!r}\n".encode())
    for t in example:
        digest.update(f"{tuple(t.shape)} {t.dtype}\n".encode())
    for name, tensor in sorted(_tensors(module).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.cpu().numpy().tobytes())
    folder = Path(__file__).parents[1]
    for source in sorted([*folder.rglob("*.py"), *(folder.parent / "kernels").glob("*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, those outside the state dict as well (latent statistics)."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def build(module: nn.Module, example: Sequence[Tensor]) -> Call:
    """See `Backend`. Builds the engine (minutes) or loads it from `cache_folder()/tensorrt`.

    Raises UserError where TensorRT or a GPU is missing, saying what to install.
    """
    trt = _library()
    device = example[0].device
    if device.type != "cuda":
        raise UserError(
            f"backend 'tensorrt' needs a CUDA device, the tensors are on {device.type}; take "
            "'eager' or 'compiled'"
        )
    no_autocast("backend 'tensorrt'", device)
    key = engine_key(module, example, trt.__version__, torch.cuda.get_device_name(device))
    path = cache_folder() / "tensorrt" / f"{type(module).__name__}-{key[:32]}.engine"
    if not path.is_file():
        atomic_write_bytes(path, build_engine(trt, module, example))
    return _Engine(trt, path, example, len(_outputs(module, example)))


def _library() -> Any:
    try:
        return importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        # ImportError as well where the package is there but its libraries are not.
        raise UserError(f"backend 'tensorrt' cannot load TensorRT ({error}); {INSTALL}") from error


def _outputs(module: nn.Module, example: Sequence[Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        return list(module(*example))


def build_engine(trt: Any, module: nn.Module, example: Sequence[Tensor]) -> bytes:
    """The serialised engine; types are those of the export (strongly typed)."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # Where the flag is gone, networks are always strongly typed.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    with tempfile.TemporaryDirectory() as folder:
        onnx_path = export_onnx(module, example, Path(folder) / "module.onnx")
        if not parser.parse_from_file(str(onnx_path)):
            problems = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise UserError(f"TensorRT does not take the exported graph: {problems}")
        plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise UserError("TensorRT could not build an engine; its log above says why")
    return bytes(plan)


class _Engine:
    """A loaded engine as a call."""

    def __init__(self, trt: Any, path: Path, example: Sequence[Tensor], outputs: int) -> None:
        self.expected = [facts_of(t) for t in example]
        self.device = example[0].device
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        with torch.cuda.device(self.device):
            self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise UserError(f"{path}: TensorRT cannot load it; delete it to build it again")
        self.context = self.engine.create_execution_context()
        # On torch's default stream TensorRT would wait for the device in every call.
        self.stream = torch.cuda.Stream(self.device)
        names = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        # An input that the graph does not use may be gone from the engine.
        self.inputs = [(i, f"in_{i}") for i in range(len(example)) if f"in_{i}" in names]
        dtypes = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64,
        }
        self.outputs = []
        for i in range(outputs):
            name = f"out_{i}"
            shape = tuple(self.engine.get_tensor_shape(name))
            self.outputs.append((name, shape, dtypes[self.engine.get_tensor_dtype(name)]))

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        no_autocast("backend 'tensorrt'", self.device)
        require_like(self.expected, tensors)
        # Referenced until the launch is enqueued; the allocator then keeps order on this stream.
        inputs = {name: tensors[i].contiguous() for i, name in self.inputs}
        outputs = {
            name: torch.empty(shape, dtype=dtype, device=self.device)
            for name, shape, dtype in self.outputs
        }
        for name, tensor in {**inputs, **outputs}.items():
            self.context.set_tensor_address(name, tensor.data_ptr())
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError("TensorRT refused to run the engine; its log above says why")
        current.wait_stream(self.stream)  # whatever reuses this memory comes after
        return tuple(outputs[name] for name, _, _ in self.outputs)
