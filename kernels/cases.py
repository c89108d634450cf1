"""The operators by name, loaded when asked for: one line an operator."""

from importlib import import_module

from worldloop.errors import UserError
from worldloop.kernels.op import Op

OPS: dict[str, str] = {
    "modulated_norm": "worldloop.kernels.gated_norm:MODULATED_NORM",
    "gated_norm": "worldloop.kernels.gated_norm:GATED_NORM",
    "qk_rope": "worldloop.kernels.qk_rope:QK_ROPE",
    "adaln_lora": "worldloop.kernels.adaln_lora:ADALN_LORA",
    "linear_gelu": "worldloop.kernels.linear_gelu:LINEAR_GELU",
    "attention": "worldloop.kernels.attention:ATTENTION",
    "vae_norm": "worldloop.kernels.vae_norm:VAE_NORM",
    "flow_x0": "worldloop.kernels.solver:FLOW_X0",
    "solver_step": "worldloop.kernels.solver:SOLVER_STEP",
    "action_logprobs": "worldloop.kernels.action_logprobs:ACTION_LOGPROBS",
    "action_logprobs_backward": "worldloop.kernels.action_logprobs:ACTION_LOGPROBS_BACKWARD",
    "to_uint8": "worldloop.kernels.frames:TO_UINT8",
    "resample": "worldloop.kernels.frames:RESAMPLE",
    "normalise": "worldloop.kernels.frames:NORMALISE",
}


def load_op(name: str) -> Op:
    """The operator of that name. Raises UserError naming the known ones."""
    if name not in OPS:
        raise UserError(f"no operator {name!r}; known: {', '.join(OPS)}")
    module, attribute = OPS[name].split(":")
    op: Op = getattr(import_module(module), attribute)
    return op
