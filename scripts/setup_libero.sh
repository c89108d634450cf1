#!/usr/bin/env bash
# The LIBERO simulator: its package, a way to render without a display, its scene assets.
#   LIBERO_ASSETS=skip   do not fetch the assets (tests bring some of their own)
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}

title=setup-libero
. scripts/common.sh
python() { "$VENV/bin/python" "$@"; }
pip() { python -m pip --disable-pip-version-check install -q -c constraints.txt "$@"; }
# ldconfig lies outside many users' PATH; grep reads to the end, or pipefail would see a broken pipe.
has() { PATH=$PATH:/usr/sbin:/sbin ldconfig -p | grep "$1" >/dev/null; }

if ! { has libEGL.so.1 && has libGL.so.1 && has libEGL_mesa; }; then
  apt_install libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri
fi

# hf-libero also asks for what its own training code needs (torchvision of another torch, wandb,
# robomimic ...). What its tasks need is less, and changes nothing that is installed.
installed() {
  python -c 'import importlib.util as u, sys
sys.exit(any(u.find_spec(name) is None for name in sys.argv[1:]))' \
    libero robosuite bddl mujoco numba termcolor easydict future OpenGL scipy cv2 yaml
}
if ! installed; then
  say "installing LIBERO (about 300 MB)"
  pip mujoco numba termcolor easydict future PyOpenGL scipy PyYAML
  python -c 'import cv2' 2>/dev/null || pip opencv-python-headless
  pip --no-deps hf-libero robosuite bddl
fi

stamp="$VENV/.worldloop-libero"
want=$( { cat "$0"; python -c 'import mujoco; print(mujoco.__version__)'; } | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  say "trying the renderer"
  if ! MUJOCO_GL=${MUJOCO_GL:-egl} python - >"$VENV/.libero-check.log" 2>&1 <<'PY'
import mujoco

model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><geom size="1"/></worldbody></mujoco>')
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(mujoco.MjData(model))
    assert renderer.render().shape == (32, 32, 3)
PY
  then
    tail -n 3 "$VENV/.libero-check.log" >&2
    die "MuJoCo does not render; the lines above are its last words (MUJOCO_GL=osmesa is another way)"
  fi
  echo "$want" > "$stamp"
fi

# The assets carry licences of their own and are not part of worldloop. LIBERO's own way to fetch
# them passes an argument that huggingface_hub 1.0 dropped.
assets=${WORLDLOOP_LIBERO_ASSETS:-$HOME/.cache/libero/assets}
if [ ! -d "$assets/scenes" ] && [ "${LIBERO_ASSETS:-}" != skip ]; then
  say "fetching the scene assets from the hub into $assets"
  pip huggingface_hub
  python - "$assets" <<'PY' || die "the assets cannot be fetched; bring their folder from another \
machine and name it in WORLDLOOP_LIBERO_ASSETS"
import ast, sys
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import snapshot_download

# Read, not imported: an import would ask questions before its configuration is written.
source = Path(find_spec("libero").origin).parent / "libero/utils/download_utils.py"
names = {
    line.targets[0].id: line.value.value
    for line in ast.parse(source.read_text()).body
    if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
}
try:
    snapshot_download(names["HF_ASSETS_REPO_ID"], repo_type="dataset", local_dir=sys.argv[1])
except Exception as error:
    sys.exit(f"setup-libero: {type(error).__name__}: {str(error).splitlines()[0]}")
PY
fi
if [ -d "$assets/scenes" ]; then say "ready, with the assets in $assets"; else say "ready"; fi
