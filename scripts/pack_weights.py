"""Put a trained world model into the package: `scripts/pack_weights.py RUN AUTOENCODER NAME`.

RUN: output folder of `worldloop train world-model`. AUTOENCODER: that of `worldloop train
autoencoder`, whose decoder may have been tuned since (--freeze-encoder). Weights are stored as
float16.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from worldloop.engine.world_model import WorldModel, load_autoencoder

run, autoencoder, name = sys.argv[1:]
world = WorldModel.from_pretrained(Path(run) / "model")
tuned = load_autoencoder(Path(autoencoder) / "model")
kept, own = tuned.state_dict(), world.autoencoder.state_dict()
for key in own:
    if not key.startswith("decoder.") and not torch.equal(kept[key], own[key]):
        sys.exit(f"{autoencoder}: {key} differs; the world model was trained on another encoder")
world.autoencoder = tuned
world.config = replace(world.config, autoencoder=tuned.config)
folder = Path(__file__).parent.parent / "worldloop" / "weights" / name
world.save(folder, torch.float16)
size = sum(f.stat().st_size for f in folder.iterdir())
print(f"{folder}: {size / 1e6:.1f} MB")
