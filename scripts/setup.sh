#!/usr/bin/env bash
# Create the environment and install worldloop into it; a ready one is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}

title=setup
. scripts/common.sh

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Ready?  The stamp holds what the environment was made from, and where.
want=$( { cat setup.py constraints.txt scripts/common.sh scripts/setup.sh CMakeLists.txt kernels/csrc/*; \
  pwd; command -v cmake cc || true; } | sha256sum | cut -d' ' -f1)
if [ -x "$VENV/bin/worldloop" ] && [ "$(cat "$VENV/.worldloop" 2>/dev/null)" = "$want" ]; then
  exit 0
fi

if [ ! -x "$VENV/bin/python" ]; then
  python=""
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if new_enough "$candidate"; then python=$candidate; break; fi
  done
  if [ -z "$python" ]; then
    [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not Python 3.11 or newer"
    command -v python3 >/dev/null && die "needs Python 3.11 or newer, found $(python3 -V); \
install one and name it: make setup PYTHON=python3.12"
    apt_install python3 python3-venv
    python=python3
    new_enough "$python" || die "needs Python 3.11 or newer, this system has $(python3 -V)"
  fi
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    apt_install "$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')"
  fi
  say "creating $VENV with $("$python" -V)"
  "$python" -m venv "$VENV" || { rm -rf "$VENV"; die "cannot create $VENV"; }
fi
new_enough "$VENV/bin/python" || die "$VENV has $("$VENV/bin/python" -V), needs 3.11 or newer; \
remove it and run again"

rm -f "$VENV/.worldloop"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
say "installing the build tools and torch (the first time takes a few minutes)"
pip install -q -c constraints.txt setuptools wheel
pip install -q -c constraints.txt "$(grep '^torch==' constraints.txt)"
say "installing worldloop and what it needs"
pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
if command -v cmake >/dev/null && command -v cc >/dev/null; then
  say "building kernels/csrc"
  rm -f kernels/_native.so  # an older one would be loaded where the new one cannot be built
  cmake -S . -B build -DWORLDLOOP_PYTHON="$(cd "$VENV" && pwd)/bin/python" >/dev/null \
    && cmake --build build >/dev/null || say "kernels/csrc is left out: see above"
else
  say "kernels/csrc is left out: needs cmake and a C compiler; slower on CPUs with AVX-512, no less complete"
fi
echo "$want" > "$VENV/.worldloop"
say "ready: $VENV/bin/worldloop"
