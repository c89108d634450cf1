"""Put a trained policy into the package: `scripts/pack_policy.py RUN NAME`.

RUN: output folder of `worldloop train policy`. Weights are stored as float16 under
worldloop/weights/policy/NAME.
"""

import sys
from pathlib import Path

import torch

from worldloop.engine.policy.vla import VLAPolicy

run, name = sys.argv[1:]
folder = Path(__file__).parent.parent / "worldloop" / "weights" / "policy" / name
VLAPolicy.from_pretrained(Path(run) / "model").save(folder, torch.float16)
size = sum(f.stat().st_size for f in folder.iterdir())
print(f"{folder}: {size / 1e6:.1f} MB")
