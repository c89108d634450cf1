"""Operators: one file each with reference, Triton kernel, public op and CASES."""

if not __name__.startswith("worldloop."):
    raise ImportError("import this package as `worldloop.kernels` (`make setup` installs it)")
