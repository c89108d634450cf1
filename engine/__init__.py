"""Inference: diffusion transformer, autoencoders, caches, samplers, rollouts, policies."""

if not __name__.startswith("worldloop."):
    raise ImportError("import this package as `worldloop.engine` (after `pip install -e .`)")
