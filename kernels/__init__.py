"""Operators: one file each with reference, Triton kernel, public op and CASES."""

if not __name__.startswith("worldloop."):
    # transformers probes for a package called `kernels`; from the repository's root it finds this
    # folder, and an ImportError would end its own import. Version 0 and no path say: not that one.
    __version__ = "0"
    __path__ = []
