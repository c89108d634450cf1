"""Whatever fits a dataset: autoencoder, world model, distillation, policies."""

if not __name__.startswith("worldloop."):
    raise ImportError("import this package as `worldloop.training` (`make setup` installs it)")
