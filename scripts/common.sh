# What the set-up scripts share; they are started in the repository's root.
# `title` is the name that stands before their messages.

say() { echo "$title: $*"; }
die() { echo "$title: error: $*" >&2; exit 1; }

apt_install() {
  command -v apt-get >/dev/null || die "$* missing and no apt-get here; install it by hand"
  local root=""
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || die "$* missing: run 'apt-get install $*' as root, then again"
    root="sudo"
  fi
  say "installing $*"
  $root env DEBIAN_FRONTEND=noninteractive apt-get -qq update
  $root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install "$@" >/dev/null
}
