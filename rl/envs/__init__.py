"""Environments behind one interface: simulators, the world model, robots."""

if not __name__.startswith("worldloop."):
    raise ImportError("import this package as `worldloop.rl.envs` (`make setup` installs it)")
