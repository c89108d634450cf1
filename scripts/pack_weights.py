"""Put a trained world model into the package: `scripts/pack_weights.py WORLD NAME [AUTOENCODER]`.

WORLD: checkpoint folder of `worldloop train world-model`. AUTOENCODER: output folder of `worldloop
train autoencoder` whose decoder has been tuned since (--freeze-encoder). Weights are stored as
float16.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from worldloop.engine.light_vae import load_autoencoder
from worldloop.engine.world_model import WorldModel

source, name, *tuned_run = sys.argv[1:]
world = WorldModel.from_pretrained(Path(source))
if tuned_run:
    tuned = load_autoencoder(Path(tuned_run[0]) / "model")
    kept, own = tuned.state_dict(), world.autoencoder.state_dict()
    for key in own:
        if not key.startswith("decoder.") and not torch.equal(kept[key], own[key]):
            sys.exit(f"{tuned_run[0]}: {key} differs; the world was trained on another encoder")
    world.autoencoder = tuned
    world.config = replace(world.config, autoencoder=tuned.config)
folder = Path(__file__).parent.parent / "worldloop" / "weights" / name
world.save(folder, torch.float16)
size = sum(f.stat().st_size for f in folder.iterdir())
print(f"{folder}: {size / 1e6:.1f} MB")
