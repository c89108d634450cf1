"""Benchmarks: timing, rooflines and committed results."""

if not __name__.startswith("worldloop."):
    raise ImportError("import this package as `worldloop.bench` (`make setup` installs it)")
