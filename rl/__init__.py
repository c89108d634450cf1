"""Whatever acts: collection, rollouts in imagination, GRPO, evaluation."""

if not __name__.startswith("worldloop."):
    raise ImportError("import this package as `worldloop.rl` (`make setup` installs it)")
