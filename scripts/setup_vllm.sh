#!/usr/bin/env bash
# An environment of its own for vLLM, whose pins are many; a ready one is left alone.
# With a GPU vLLM comes from the package index; without one from a wheel built for CPUs, which is
# VLLM_WHEEL=path or ../shared/wheels/vllm-*.whl.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV_VLLM:-.venv-vllm}
RELEASE=vllm==0.32.0

title=setup-vllm
. scripts/common.sh

wheel=${VLLM_WHEEL:-}
if [ -z "$wheel" ] && ! nvidia-smi -L >/dev/null 2>&1; then
  wheel=$(compgen -G '../shared/wheels/vllm-*.whl' | sort | tail -n 1 || true)
  [ -n "$wheel" ] || die "no GPU here and no ../shared/wheels/vllm-*.whl: give a wheel built for \
CPUs, VLLM_WHEEL=path"
fi
[ -z "$wheel" ] || [ -f "$wheel" ] || die "VLLM_WHEEL: $wheel: no such file"
# vLLM's kernels for x86 CPUs come in one library for AVX-512 and one for AVX2; a wheel may lack the second.
if [ -n "$wheel" ] && [ "$(uname -m)" = x86_64 ] && ! grep -qw avx512f /proc/cpuinfo 2>/dev/null &&
  ! grep -q _C_AVX2 "$wheel"; then
  die "$wheel has kernels for CPUs with AVX-512 alone, and this CPU has none: use a GPU, another CPU, \
or a wheel with vllm/_C_AVX2"
fi

want=$( { cat setup.py constraints.txt scripts/common.sh scripts/setup_vllm.sh; echo "${wheel:-$RELEASE}"; pwd; } |
  sha256sum | cut -d' ' -f1)
if [ -x "$VENV/bin/pytest" ] && [ "$(cat "$VENV/.worldloop" 2>/dev/null)" = "$want" ]; then
  exit 0
fi

# The interpreter that the wheel was built for, or any that worldloop takes.
fits() {
  local tag=""
  case "$wheel" in *-cp3*-cp3*) tag=${wheel##*-cp3}; tag=${tag%%-*} ;; esac
  "$1" -c "import sys; v = sys.version_info; sys.exit(v < (3, 11) or '$tag' not in ('', str(v[1])))" \
    2>/dev/null
}
if ! { [ -x "$VENV/bin/python" ] && fits "$VENV/bin/python"; }; then
  python=""
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
    if fits "$candidate"; then python=$candidate; break; fi
  done
  [ -n "$python" ] || die "found no Python that fits ${wheel:-Python 3.11 or newer}; \
name one: PYTHON=python3.11"
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    apt_install "$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')"
  fi
  say "creating $VENV with $("$python" -V)"
  rm -rf "$VENV"
  "$python" -m venv "$VENV" || { rm -rf "$VENV"; die "cannot create $VENV"; }
fi
numa() { "$VENV/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; }
if [ -n "$wheel" ] && ! numa; then
  apt_install libnuma1
  numa || die "libnuma.so.1 cannot be loaded; install Debian's libnuma1 or its like"
fi

rm -f "$VENV/.worldloop"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
pin() { grep "^$1==" constraints.txt; }
if [ -n "$wheel" ]; then
  say "installing torch and $(basename "$wheel") (2.6 GB, a minute or more)"
  pip install -q "$(pin torch)"  # alone: beside vLLM, pip would weigh every other build of it
  pip install -q "$(pin torch)" "$(pin triton)" "$wheel"
else
  say "installing $RELEASE (several GB)"
  pip install -q "$RELEASE"
fi
say "installing worldloop"
# vLLM wants an older setuptools and its own web libraries; the other pins hold here as well.
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
grep -vE '^(setuptools|fastapi|uvicorn|torch|triton)==' constraints.txt > "$pins"
pip install -q 'setuptools>=77' wheel "$(pin pytest)" "$(pin pytest-timeout)"
pip install -q -c "$pins" --no-build-isolation -e .
"$VENV/bin/python" -c 'import vllm' >/dev/null || die "vLLM is installed but does not import"
echo "$want" > "$VENV/.worldloop"
say "ready: $VENV"
