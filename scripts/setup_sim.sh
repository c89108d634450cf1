#!/usr/bin/env bash
# The ManiSkill simulator, rendering on the CPU through Mesa's software Vulkan (lavapipe).
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}

title=setup-sim
. scripts/common.sh
version_of() { dpkg-query -W -f '${Version}' "$1" 2>/dev/null || true; }
# The renderer needs descriptor indexing; lavapipe of Mesa 22.3 (Debian 12) lacks it.
mesa_is_new() { dpkg --compare-versions "$(version_of mesa-vulkan-drivers)" ge 23; }
lavapipe_icd() {
  find /usr/share/vulkan/icd.d /etc/vulkan/icd.d /usr/local/share/vulkan/icd.d \
    -name 'lvp_icd*.json' 2>/dev/null | sort | head -n 1 || true
}
as_root() {
  if [ "$(id -u)" = 0 ]; then env DEBIAN_FRONTEND=noninteractive "$@"; return; fi
  command -v sudo >/dev/null || die "needs root for: $*; run that as root, then again"
  sudo env DEBIAN_FRONTEND=noninteractive "$@"
}

# Debian 12's own Mesa is too old; its backports have a newer one, on the mirror already in use.
add_debian_backports() {
  apt-cache policy mesa-vulkan-drivers | grep -q bookworm-backports && return
  local mirror
  mirror=$(apt-get indextargets --format '$(REPO_URI)' \
    'Created-By: Packages' 'Codename: bookworm' 'Component: main' | head -n 1)
  [ -n "$mirror" ] || die "found no Debian mirror in the apt sources; add bookworm-backports by hand"
  say "adding bookworm-backports"
  local key=""
  [ -f /usr/share/keyrings/debian-archive-keyring.gpg ] &&
    key="[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
  echo "deb ${key}${mirror} bookworm-backports main" |
    as_root tee /etc/apt/sources.list.d/bookworm-backports.list >/dev/null
  as_root apt-get -qq update
}

install_vulkan() {
  command -v apt-get >/dev/null || die "no apt-get here: install a Vulkan loader and Mesa's \
lavapipe driver (23.1 or newer) with the system's own tools, then run again"
  # shellcheck disable=SC1091
  . /etc/os-release
  say "installing the Vulkan loader and Mesa's software driver"
  as_root apt-get -qq update
  if [ "${ID:-}" = debian ] && [ "${VERSION_CODENAME:-}" = bookworm ]; then
    add_debian_backports
    as_root apt-get -qq -y install libvulkan1 >/dev/null
    as_root apt-get -qq -y install -t bookworm-backports mesa-vulkan-drivers >/dev/null
  else
    as_root apt-get -qq -y install libvulkan1 mesa-vulkan-drivers >/dev/null
  fi
  mesa_is_new || die "mesa-vulkan-drivers $(version_of mesa-vulkan-drivers) is too old, 23 or \
newer is needed; update the system (on Ubuntu 22.04: jammy-updates has it)"
}

# Open the renderer once and take a 32x32 picture: the only proof that counts.
renders() {
  "$VENV/bin/python" - <<'PY' >"$VENV/.sim-check.log" 2>&1
import sapien
from sapien.render import RenderSystem

scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), RenderSystem(sapien.Device("cpu"))])
camera = scene.add_camera("camera", 32, 32, 1.0, 0.01, 10)
scene.update_render()
camera.take_picture()
assert camera.get_picture("Color").shape == (32, 32, 4)
PY
}

if [ -z "$(version_of libvulkan1)" ] || ! mesa_is_new; then
  install_vulkan
fi
icd=$(lavapipe_icd)
[ -n "$icd" ] || die "Mesa is installed but its lavapipe driver file (lvp_icd*.json) is not in \
/usr/share/vulkan/icd.d; reinstall mesa-vulkan-drivers"

if ! "$VENV/bin/python" -c 'import importlib.util as u, sys
sys.exit(u.find_spec("mani_skill") is None or u.find_spec("sapien") is None)'; then
  say "installing ManiSkill (about 150 MB)"
  "$VENV/bin/python" -m pip --disable-pip-version-check install -q -c constraints.txt \
    --no-build-isolation -e '.[sim]'
fi

stamp="$VENV/.worldloop-sim"
want="$(cat "$0" | sha256sum) $(version_of mesa-vulkan-drivers) ${VK_ICD_FILENAMES:-}"
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  say "trying the renderer"
  if renders; then
    echo "$want" > "$stamp"
  elif VK_ICD_FILENAMES=$icd renders; then
    say "the renderer works once this is set (put it in your shell's profile):"
    say "  export VK_ICD_FILENAMES=$icd"
    exit 0
  else
    tail -n 3 "$VENV/.sim-check.log" >&2
    die "the renderer does not start with $icd; the lines above are its last words"
  fi
fi
say "ready.  Where another driver is picked, set VK_ICD_FILENAMES=$icd"
