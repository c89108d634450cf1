#!/usr/bin/env bash
# Make .typing/worldloop mirror the installed package: worldloop/* plus engine/, kernels/ ...
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .typing/worldloop
cd .typing/worldloop
for path in ../../worldloop/*.py ../../worldloop/py.typed \
  ../../bench ../../engine ../../kernels ../../rl ../../training; do
  link=$(basename "$path")
  [ "$(readlink "$link" 2>/dev/null)" = "$path" ] || ln -sfn "$path" "$link"
done
for link in *; do [ -e "$link" ] || rm "$link"; done
