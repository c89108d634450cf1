"""Back ends: the same networks, run faster. `Backend(module, example) -> callable`.

    world = wrap_world(WorldModel.from_pretrained("tiny"), "compiled")

    eager             the modules as they are
    compiled          torch.compile with static shapes
    cudagraph         the eager launches recorded in CUDA graphs
    compiled-graph    torch.compile, recorded
    tensorrt          exported to ONNX, built by TensorRT, kept on disk

docs/backends.md says which is the default where, and how well each agrees with eager.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from worldloop.engine import attention as attention_module
from worldloop.engine.backends.base import BUCKETS, Backend, Call, Calls
from worldloop.engine.backends.networks import (
    BackedDiT,
    BackedLightDecoder,
    BackedLightVAE,
    BackedWanVAE,
)
from worldloop.engine.dit_layers import Attention
from worldloop.engine.light_decoder import LightDecoder, Redecoded
from worldloop.engine.light_vae import LightVAE
from worldloop.engine.vae import WanVAE
from worldloop.registry import Table, resolve

if TYPE_CHECKING:
    from worldloop.engine.world_model import WorldModel

__all__ = ["BACKENDS", "BUCKETS", "Backend", "Call", "make_backend", "set_attention", "wrap_world"]

# Every engine holds the weights anew: up to seven of them a bucket (2b: 3.9 GB each in bf16).
TENSORRT_BUCKETS = (1, 8, 32)

Network = TypeVar("Network", bound=nn.Module)

BACKENDS = Table(
    "backend",
    {
        "eager": "worldloop.engine.backends.eager:build",
        "compiled": "worldloop.engine.backends.compiled:build",
        "cudagraph": "worldloop.engine.backends.cudagraph:build",
        "compiled-graph": "worldloop.engine.backends.cudagraph:build_compiled",
        "tensorrt": "worldloop.engine.backends.tensorrt:build",
    },
)


def make_backend(name: str, module: nn.Module, example: Sequence[Tensor]) -> Call:
    """One pure module through a back end: a name of BACKENDS, or an own "pkg.mod:build"."""
    build: Backend = resolve(BACKENDS, name)
    return build(module, example)


def wrap_world(
    world: WorldModel,
    backend: str = "eager",
    *,
    attention: str | None = None,
    decoder: LightDecoder | None = None,
    decoder_backend: str | None = None,
    channels_last: bool = False,
    buckets: Sequence[int] | None = None,
) -> WorldModel:
    """A world model with the same weights whose passes and decoding go through a back end.

    backend, decoder_backend (None: the same one): names of BACKENDS, or "pkg.mod:build".
    attention: None keeps what is set; "auto" measures once on this machine; or a name of
    `attention.NAMES`. It is set on the shared network, so it holds for ``world`` as well.
    decoder: a distilled decoder that makes the frames, on the world's device and of its dtype.
    channels_last: put the (shared) autoencoder's weights into channels-last order.
    buckets: rows are padded up to the next of these; more than the largest go in pieces. None:
    `BUCKETS`, for tensorrt `TENSORRT_BUCKETS`.
    Compiled, captured and built calls are made at the first pass of each shape. Raises UserError
    where a back end or an implementation of attention cannot run.
    """
    dit_build: Backend = resolve(BACKENDS, backend)
    vae_build: Backend = resolve(BACKENDS, decoder_backend or backend)
    config = world.config
    height, width = config.reward.grid
    tokens = (height // config.dit.patch) * (width // config.dit.patch)
    if attention is not None:
        set_attention(
            world.dit, attention, queries=config.block * tokens,
            keys=(config.sink + config.window + config.block) * tokens,
        )  # fmt: skip
    wrapped = copy.copy(world)
    wrapped._modules = dict(world._modules)  # copy.copy shares this table
    room = (config.sink + config.window) * tokens
    wrapped.dit = BackedDiT(_plain(world.dit), _calls(dit_build, backend, buckets, room))
    calls = _calls(vae_build, decoder_backend or backend, buckets)
    autoencoder: nn.Module = _plain(world.autoencoder)
    if isinstance(autoencoder, Redecoded):
        decoder = decoder or _plain(autoencoder.decoder)
        autoencoder = autoencoder.teacher
    assert isinstance(autoencoder, LightVAE | WanVAE)
    if channels_last:
        autoencoder.channels_last()
    if decoder is not None:
        if channels_last:
            decoder.channels_last()
        redecoded = Redecoded(autoencoder, BackedLightDecoder(_plain(decoder), calls))
        wrapped.autoencoder = redecoded  # type: ignore[assignment]
    elif isinstance(autoencoder, LightVAE):
        wrapped.autoencoder = BackedLightVAE(autoencoder, calls)
    else:
        wrapped.autoencoder = BackedWanVAE(autoencoder, calls)
    return wrapped


def _calls(
    build: Backend, name: str, buckets: Sequence[int] | None, room: int | None = None
) -> Calls:
    if buckets is None:
        buckets = TENSORRT_BUCKETS if name == "tensorrt" else BUCKETS
    graphs = name in ("cudagraph", "compiled-graph")
    return Calls(build, None if name == "eager" else buckets, room if graphs else None)


def _plain(network: Network) -> Network:
    """The network that a wrapped one was made from; any other one itself."""
    if isinstance(network, BackedDiT | BackedLightVAE | BackedWanVAE | BackedLightDecoder):
        return network._plain[0]
    return network


def set_attention(
    module: nn.Module, implementation: str, *, rows: int = 1, queries: int, keys: int
) -> str:
    """Choose the attention of a DiT; returns the implementation's name.

    "auto" measures those that run here at rows x queries x keys (once on a machine, see
    `attention.fastest`). Raises UserError for one that cannot run on the module's device.
    """
    layers = [m for m in module.modules() if isinstance(m, Attention)]
    weight = layers[0].q_norm.weight  # of the compute dtype, also where the products are in fp8
    attention_module.require(implementation, weight.device, weight.dtype)
    if implementation == "auto":
        head_dim = layers[0].q_norm.normalized_shape[-1]
        implementation = attention_module.fastest(
            rows, layers[0].heads, queries, keys, head_dim, weight.device, weight.dtype
        )
    for layer in layers:
        layer.implementation = implementation
    return implementation
