#!/usr/bin/env bash
# Builds the development vector server (devstack/vector-server) unless this machine already has a build of exactly
# these sources, and prints the binary's path as the last line of stdout. Progress goes to stderr.
#
# The binary is kept outside the checkout, so that a second clone does not build again:
#   ${FLOTILLA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/flotilla}/vectors/<hash of sources, lock file, rustc>/flotilla-vectors
# Old builds may be deleted at any time. Safe to run twice at once: the second run waits for the first.
set -euo pipefail

case "${1:-}" in
  '') ;;
  -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; exit 0 ;;
  *) echo "build-vectors.sh takes no arguments (--help explains)" >&2; exit 2 ;;
esac

say() { echo "build-vectors: $*" >&2; }
cache=${FLOTILLA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/flotilla}/vectors
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
source_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/../devstack/vector-server" && pwd)
cd "$source_dir"

command -v cargo >/dev/null && command -v rustc >/dev/null || {
  say "cargo and rustc are needed; install them from https://rustup.rs"
  exit 1
}
if command -v sha256sum >/dev/null; then sha() { sha256sum; }; else sha() { shasum -a 256; }; fi

# Run here, so that the checkout's rust-toolchain.toml decides which compiler answers.
key_of_sources() {
  {
    rustc --version --verbose
    find src .cargo Cargo.toml Cargo.lock -type f -print | LC_ALL=C sort | while read -r file; do
      echo "$file"
      cat "$file"
    done
  } | sha | cut -c1-24
}
key=$(key_of_sources)

binary=$cache/$key/flotilla-vectors
found() {
  [ -x "$binary" ] || return 1
  echo "$binary"
}
found && exit 0

# Without flock (macOS) two runs build one after the other all the same: cargo locks the target folder.
if command -v flock >/dev/null; then
  exec 9>"$cache/$key.lock"
  if ! flock --nonblock 9; then
    say "another run is building; waiting for it"
    flock 9
  fi
  found && exit 0
fi

target=$source_dir/target
say "building the vector server once, about 10 minutes on two cores (kept in $cache)"
# A wrapper or target folder from the environment would override what .cargo/config.toml says here. Cargo gets no
# lock descriptor, so that a compiler cache it leaves running can't hold the lock.
env -u RUSTC_WRAPPER -u CARGO_BUILD_RUSTC_WRAPPER -u CARGO_BUILD_TARGET CARGO_TARGET_DIR="$target" \
  cargo build --release --locked >&2 9>&-

if [ "$(key_of_sources)" != "$key" ]; then
  say "the sources changed during the build; run it again"
  exit 1
fi

mkdir -p "$cache/$key"
fresh=$(mktemp "$cache/$key/.fresh.XXXXXX")
trap 'rm -f "$fresh"' EXIT
cp "$target/release/flotilla-vectors" "$fresh"
chmod 755 "$fresh"
mv -f "$fresh" "$binary"
say "built $binary"
found
