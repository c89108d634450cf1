"""Benchmarks: timing, rooflines and committed results."""

if not __name__.startswith("worldloop."):
    raise ImportError("import this package as `worldloop.bench` (pip install -e . maps the folder bench/)")
