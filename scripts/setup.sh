#!/usr/bin/env bash
# Installs what Flotilla needs on this machine and says what it does. Safe to run again: what is there stays as it is.
#
#   scripts/setup.sh                 everything for development: demo, test and lint
#   scripts/setup.sh --for demo      what it takes to build and run: Postgres 15, Redis 7.0 or newer, a C compiler,
#                                    Python, curl, cargo
#   scripts/setup.sh --for test      the same, and cargo-nextest
#   scripts/setup.sh --for lint      a C compiler, cargo with clippy and rustfmt
#   scripts/setup.sh --check         changes nothing; exits 1 if something is missing
#
# Works as root or through sudo, and only asks for either when something is missing. On systems without apt it prints
# what to install. Postgres and Redis are installed as programs only: no cluster is created, no service is started or
# enabled, and services that run already are left alone.
#
# cargo-deny takes long to build, so `lint` installs it only with FLOTILLA_INSTALL_DENY=1 or in CI (CI=true).
#
# Exit codes: 0 all there, 1 something is missing or failed, 2 wrong usage.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
purpose=all
check_only=no

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
say() { printf '==> %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

while [ $# -gt 0 ]; do
    case $1 in
        --for) purpose=${2:-}; shift; [ $# -gt 0 ] && shift ;;
        --for=*) purpose=${1#--for=}; shift ;;
        --check) check_only=yes; shift ;;
        -h|--help) usage; exit 0 ;;
        *) printf 'setup: unknown argument %s\n\n' "$1" >&2; usage >&2; exit 2 ;;
    esac
done
case $purpose in
    demo|test|lint|all) ;;
    *) printf 'setup: --for %s: allowed are demo, test, lint, all\n' "$purpose" >&2; exit 2 ;;
esac

# What a purpose needs. Names are those of `present`, `packages` and `why` below.
case $purpose in
    lint) system_parts=(compiler certificates) ;;
    *) system_parts=(postgres redis compiler python curl certificates) ;;
esac

present() {
    case $1 in
        postgres) has initdb || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || compgen -G '/usr/pgsql-*/bin/initdb' >/dev/null ;;
        redis) has redis-server ;;
        compiler) has cc && has make ;;
        # `python3 -m pip` and not `pip`: that is how the model is fetched.
        python) has python3 && python3 -m pip --version >/dev/null 2>&1 ;;
        curl) has curl ;;
        # Only Linux keeps them in files.
        certificates) [ "$(uname -s)" != Linux ] || [ -e /etc/ssl/certs/ca-certificates.crt ] || [ -e /etc/pki/tls/certs/ca-bundle.crt ] || [ -e /etc/ssl/cert.pem ] ;;
    esac
}

why() {
    case $1 in
        postgres) echo 'Postgres server' ;;
        redis) echo 'Redis server' ;;
        compiler) echo 'C compiler' ;;
        python) echo 'Python 3 with pip' ;;
        curl) echo 'curl' ;;
        certificates) echo 'CA certificates' ;;
    esac
}

# packages MANAGER PART
packages() {
    case $1:$2 in
        apt:postgres) echo postgresql ;;
        apt:redis) echo redis-server ;;
        apt:compiler) echo build-essential ;;
        apt:python) echo python3 python3-pip ;;
        dnf:postgres) echo postgresql-server ;;
        dnf:compiler) echo gcc gcc-c++ make ;;
        dnf:python) echo python3 python3-pip ;;
        pacman:postgres) echo postgresql ;;
        pacman:compiler) echo base-devel ;;
        pacman:python) echo python python-pip ;;
        brew:postgres) echo postgresql@16 ;;
        brew:compiler) ;;
        brew:python) echo python ;;
        brew:certificates) ;;
        *:redis) echo redis ;;
        *:curl) echo curl ;;
        *:certificates) echo ca-certificates ;;
    esac
}

missing=()
for part in "${system_parts[@]}"; do
    if present "$part"; then
        say "$(why "$part"): there"
    else
        say "$(why "$part"): MISSING"
        missing+=("$part")
    fi
done

names_for() { # MANAGER
    local part
    for part in "${missing[@]}"; do packages "$1" "$part"; done | tr '\n' ' ' | sed 's/ $//'
}

# Where packages come from is the machine's business and not for logs that people pass on.
plain() {
    sed -u -E \
        -e 's#(https?|ftp|mirror|sparse\+https?)://[^ ]*#(package source)#g' \
        -e "s/resolve '[^']*'/resolve the package source/g" \
        -e 's/(connect|connection) to [^ ]+/\1 to the package source/g' \
        -e 's/\([0-9a-f.:]*[.:][0-9a-f.:]*\)//g' \
        -e 's/Updating .* index/Updating the crate index/' \
        -e 's/\(registry `[^`]*`\)//g'
}

by_hand() {
    echo
    echo "Install by hand, then run this script again:"
    if has dnf; then echo "  sudo dnf install $(names_for dnf)"
    elif has pacman; then echo "  sudo pacman -S --needed $(names_for pacman)"
    elif has brew; then
        echo "  brew install $(names_for brew)"
        case " ${missing[*]} " in *' compiler '*) echo "  xcode-select --install" ;; esac
    elif has apt-get; then echo "  apt-get install $(names_for apt)    (as root)"
    else
        echo "  Debian, Ubuntu:  apt-get install $(names_for apt)"
        echo "  Fedora, RHEL:    dnf install $(names_for dnf)"
        echo "  Arch:            pacman -S --needed $(names_for pacman)"
        echo "  macOS:           brew install $(names_for brew)"
    fi
}

# --- installing with apt, without clusters and services -------------------------------------------------------------

policy=/usr/sbin/policy-rc.d
policy_saved=/usr/sbin/policy-rc.d.before-flotilla
policy_absent=/usr/sbin/policy-rc.d.absent-before-flotilla
clusters=/etc/postgresql-common/createcluster.conf
clusters_line='create_main_cluster = false # flotilla setup, temporary'

# Puts back what was changed; also what an earlier run that was killed left behind.
restore() {
    if [ -e "$policy_saved" ]; then
        "${as_root[@]}" mv -f "$policy_saved" "$policy"
    elif [ -e "$policy_absent" ]; then
        "${as_root[@]}" rm -f "$policy" "$policy_absent"
    fi
    if [ -e "$clusters" ] && grep -qxF "$clusters_line" "$clusters"; then
        "${as_root[@]}" sed -i "/^create_main_cluster = false # flotilla setup, temporary\$/d" "$clusters"
    fi
}

forbid_services() {
    # Remembered first: killed in between, the next run still puts the right thing back.
    if [ -e "$policy" ]; then
        "${as_root[@]}" cp -a "$policy" "$policy_saved"
    else
        "${as_root[@]}" touch "$policy_absent"
    fi
    # 101: the action is forbidden (the policy-rc.d interface of invoke-rc.d).
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod 755 "$policy"
}

apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 \
        apt-get -q -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold -o DPkg::Lock::Timeout=300 "$@" 2>&1 | plain
}

install_with_apt() {
    local names unit
    read -r -a names <<<"$(names_for apt)"
    trap restore EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    restore
    say "refreshing the package lists"
    # Lists of one broken source must not stop the others; what is really missing shows in the next step.
    apt update || say "some package lists could not be refreshed, going on with those there are"
    forbid_services
    case " ${missing[*]} " in
        *' postgres '*)
            say "installing postgresql-common first, to tell it not to create a cluster"
            apt install -y --no-install-recommends postgresql-common || fail "apt could not install postgresql-common"
            # The last of several lines counts.
            printf '%s\n' "$clusters_line" | "${as_root[@]}" tee -a "$clusters" >/dev/null
            ;;
    esac
    say "installing ${names[*]}"
    apt install -y --no-install-recommends "${names[@]}" || fail "apt could not install: ${names[*]}"
    # Not started now; without this they would start with the next boot and take the standard ports.
    if has systemctl; then
        for unit in postgresql redis-server; do
            case "$unit ${missing[*]}" in
                postgresql*postgres*|redis-server*redis*)
                    say "not enabling the service $unit"
                    "${as_root[@]}" systemctl disable --quiet "$unit" 2>/dev/null || say "  (no such service here)"
                    ;;
            esac
        done
    fi
    restore
    trap - EXIT INT TERM HUP
}

if [ ${#missing[@]} -gt 0 ]; then
    if [ "$check_only" = yes ]; then by_hand; exit 1; fi
    as_root=()
    if [ "$(id -u)" != 0 ]; then as_root=(sudo); fi
    if ! has apt-get || { [ "$(id -u)" != 0 ] && ! has sudo; }; then by_hand; exit 1; fi
    install_with_apt
    for part in "${missing[@]}"; do
        present "$part" || fail "$(why "$part") is still missing after the installation"
    done
fi

# --- what is there may be too old ------------------------------------------------------------------------------------

# The server that devstack takes: the newest of those that lie in a folder each, or else the one in PATH.
postgres_program() {
    local found
    found=$({ compgen -G '/usr/lib/postgresql/*/bin/postgres'; compgen -G '/usr/pgsql-*/bin/postgres'
              compgen -G '/opt/homebrew/opt/postgresql@*/bin/postgres'; } | sort -V | tail -n1)
    echo "${found:-postgres}"
}

# at_least PART OLDEST VERSION
at_least() {
    [ "$(printf '%s\n%s\n' "$2" "$3" | sort -V | head -n1)" = "$2" ] && return
    fail "$(why "$1") is ${3:-of an unknown version}, but $2 or newer is needed: Debian 12, Ubuntu 24.04 and what came after have it; elsewhere take it from apt.postgresql.org or packages.redis.io"
}

for part in "${system_parts[@]}"; do
    case $part in
        postgres) at_least postgres 15 "$("$(postgres_program)" --version | grep -oE '[0-9]+(\.[0-9]+)?' | head -n1)" ;;
        redis) at_least redis 7.0 "$(redis-server --version | sed -n 's/.* v=\([0-9.]*\).*/\1/p')" ;;
    esac
done

# --- Rust ------------------------------------------------------------------------------------------------------------

has cargo || fail "cargo is missing: install Rust with rustup (its site is rustup.rs), open a new shell, run this script again"
wanted=$(sed -n 's/^channel *= *"\(.*\)"/\1/p' "$root/rust-toolchain.toml")
# With rustup, the first call in the repository fetches the toolchain that rust-toolchain.toml names.
if ! version=$(cd "$root" && cargo --version 2>/dev/null | cut -d' ' -f2) || [ -z "$version" ]; then
    [ "$check_only" = no ] || fail "the Rust toolchain $wanted is missing: rustup toolchain install $wanted"
    has rustup || fail "cargo does not run here and rustup is missing: install Rust $wanted or newer"
    say "installing Rust $wanted"
    rustup toolchain install "$wanted" --profile minimal --component clippy --component rustfmt 2>&1 | plain
    version=$(cd "$root" && cargo --version | cut -d' ' -f2)
fi
oldest=$(printf '%s\n%s\n' "${wanted%.*}" "$version" | sort -V | head -n1)
[ "$oldest" = "${wanted%.*}" ] || fail "cargo is $version, but $wanted or newer is needed: rustup toolchain install $wanted"
say "cargo $version: there"

if [ "$purpose" = lint ] || [ "$purpose" = all ]; then
    for part in clippy fmt; do
        if (cd "$root" && cargo "$part" --version >/dev/null 2>&1); then
            say "cargo $part: there"
            continue
        fi
        [ "$check_only" = no ] || fail "cargo $part is missing: rustup component add clippy rustfmt"
        has rustup || fail "cargo $part is missing: install clippy and rustfmt from where cargo came from"
        say "installing clippy and rustfmt"
        (cd "$root" && rustup component add clippy rustfmt) 2>&1 | plain
    done
fi

# cargo_tool NAME MINUTES
cargo_tool() {
    if has "$1"; then say "$1: there"; return; fi
    [ "$check_only" = no ] || fail "$1 is missing: cargo install $1 --locked"
    say "building $1 (about $2 minutes on two cores)"
    cargo install "$1" --locked 2>&1 | plain || fail "cargo install $1 --locked failed"
    # cargo puts it into its own bin directory, which may not be in PATH here.
    has "$1" || [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/$1" ] || fail "$1 was built but can't be found: add ${CARGO_HOME:-$HOME/.cargo}/bin to PATH"
}

if [ "$purpose" = test ] || [ "$purpose" = all ]; then cargo_tool cargo-nextest 6; fi

if [ "$purpose" = lint ] || [ "$purpose" = all ]; then
    if has cargo-deny; then
        say "cargo-deny: there"
    elif [ "${FLOTILLA_INSTALL_DENY:-}" = 1 ] || { [ "$purpose" = lint ] && [ "${CI:-}" = true ]; }; then
        cargo_tool cargo-deny 8
    else
        say "cargo-deny: not there, licences and bans are not checked (FLOTILLA_INSTALL_DENY=1 installs it)"
    fi
fi

say "ready for: $purpose"
