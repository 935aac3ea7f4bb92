#!/usr/bin/env bash
# Checks docker-compose.yml, Dockerfile and deploy/ without starting anything, then plants faults to see that the
# checks find them. Its tools live in a cached folder of their own, outside the checkout:
#   ${FLOTILLA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/flotilla}/lint-venv
# The first run downloads about 60 MB from PyPI, and promtool from Debian's package `prometheus` where it is missing.
#
#   scripts/lint-deploy.sh             check, then self-test
#   scripts/lint-deploy.sh --quick     check only
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="${FLOTILLA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/flotilla}/lint-venv"
requirements="$root/scripts/deploy_checks/requirements.txt"

case "${1:-}" in
    "" | --quick) ;;
    *)
        echo "usage: $0 [--quick]" >&2
        exit 2
        ;;
esac

# Made anew when the pinned versions change. The mark is written last, so an interrupted installation is repeated.
if ! cmp -s "$requirements" "$venv/installed.txt"; then
    echo "installing the lint tools into $venv" >&2
    rm -rf "$venv"
    mkdir -p "$(dirname "$venv")"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$venv/installed.txt"
fi

# promtool is in no Python package: take the system's, or unpack Debian's without installing its server.
if ! command -v promtool >/dev/null && [ ! -x "$venv/bin/promtool" ]; then
    echo "unpacking promtool from Debian's package prometheus" >&2
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    chmod 755 "$scratch"
    fetch() { (cd "$scratch" && apt-get download -qq prometheus 2>"$scratch/log"); }
    if ! fetch; then
        # A new machine has no package lists yet.
        if [ "$(id -u)" -eq 0 ]; then apt-get update -qq; else sudo -n apt-get update -qq; fi
        fetch || {
            cat "$scratch/log" >&2
            echo "promtool is needed: install Prometheus, or put promtool on PATH" >&2
            exit 1
        }
    fi
    dpkg-deb -x "$scratch"/prometheus_*.deb "$scratch/unpacked"
    install -m 0755 "$scratch/unpacked/usr/bin/promtool" "$venv/bin/promtool"
fi

export PATH="$venv/bin:$PATH"
export PYTHONDONTWRITEBYTECODE=1
"$venv/bin/python" "$root/scripts/check_deploy.py"
if [ "${1:-}" != --quick ]; then
    "$venv/bin/python" "$root/scripts/check_deploy.py" --self-test
fi
