#!/usr/bin/env bash
# Runs the benchmarks on private servers and prints one JSON object for each; `flotilla bench audit`, whose size is asked for,
# is run by hand. Progress goes to stderr. Machines differ and are shared: compare only within one run.
set -euo pipefail
cd "$(dirname "$0")/.."
flotilla=${FLOTILLA_BIN:-${CARGO_TARGET_DIR:-target}/dist/flotilla}
FLOTILLA_VECTORS_BIN=$(scripts/build-vectors.sh)
export FLOTILLA_VECTORS_BIN
for bench in queue saga enqueue ingest embed; do
  echo "==> flotilla bench $bench" >&2
  "$flotilla" bench "$bench" --json
done
