#!/usr/bin/env bash
# Makes a clone ready to work in: system tools, an etcd of its own, .venv with everything in requirements.lock.
#
#   * Runs again at any time: what is there is left alone (a stamp holds the hash of all inputs), and is then quick.
#   * Two at once wait for each other: one lock per clone, one per machine around apt.
#   * etcd and the balancers are unpacked into .deps/, never installed: their packages would start servers on the
#     standard ports.
#   * Every Python package is checked against a hash in requirements.lock; where it comes from is the machine's own
#     choice (pip's and uv's settings and variables), see docs/decisions/0002-lock-without-addresses.md.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
mkdir -p .deps
log="$root/.deps/setup.log"
venv="$root/.venv"
etcd="$root/.deps/etcd"
balancers="$root/.deps/balancers"
started=$SECONDS

say() { printf 'setup: %s\n' "$*"; }

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# Runs a command with its output in the log.
logged() {
    printf '\n$ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null
}

# The same, and the end of the log is shown when it fails.
quietly() {
    if ! logged "$@"; then
        tail -n 25 "$log" >&2
        fail "this failed: $*  (all output: $log)"
    fi
}

# ---- which Python, what is missing ------------------------------------------------------------------------------

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} /usr/bin/python3 python3.13 python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

qemu_program() {
    case $(uname -m) in
    aarch64 | arm64) echo qemu-system-aarch64 ;;
    *) echo qemu-system-x86_64 ;;
    esac
}

qemu_package() {
    case $(uname -m) in
    aarch64 | arm64) echo qemu-system-arm ;;
    *) echo qemu-system-x86 ;;
    esac
}

have() { command -v "$1" >/dev/null 2>&1; }

# Debian packages whose programs are not there, one a line.
missing_packages() {
    find_python >/dev/null || echo python3
    "$(find_python || echo false)" -c 'import venv, ensurepip' 2>/dev/null || echo python3-venv
    have "$(qemu_program)" || qemu_package
    have qemu-img || echo qemu-utils
    have nft || echo nftables
    have ip || echo iproute2
    have mke2fs || echo e2fsprogs
    have mkfs.xfs || echo xfsprogs
    have skopeo || echo skopeo
}

have_etcd() { { have etcd && have etcdctl; } || { [ -x "$etcd/usr/bin/etcd" ] && [ -x "$etcd/usr/bin/etcdctl" ]; }; }

have_balancers() {
    local program
    for program in haproxy nginx keepalived; do
        [ -x "$balancers/bin/$program" ] || return 1
    done
}

# ---- steps ------------------------------------------------------------------------------------------------------

# Called with the machine-wide lock held. Lists of a fresh machine are absent or stale: refresh them, once.
apt_update_once() {
    [ -n "${apt_updated:-}" ] && return
    say "refreshing the package lists"
    logged apt-get update -q -o Acquire::Retries=3 || say "not all lists could be refreshed; going on with what is there"
    apt_updated=1
}

install_packages() {
    local missing=$1
    have apt-get || fail "this is no Debian; please install what provides these Debian packages: $missing"
    [ "$(id -u)" = 0 ] || fail "not root; please run: apt-get install --no-install-recommends $missing"
    apt_update_once
    say "installing $missing"
    # shellcheck disable=SC2086  # a list of words
    quietly env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get install -q -y --no-install-recommends \
        -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 $missing
}

unpack_etcd() {
    have apt-get || fail "this is no Debian; please put etcd and etcdctl (3.4.22 or newer, 3.5.6 or newer) on the PATH"
    local work
    work=$(mktemp -d "$root/.deps/etcd.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    if [ "$(id -u)" = 0 ]; then apt_update_once; fi
    say "unpacking etcd into .deps/etcd"
    (cd "$work" && quietly apt-get download -q -o APT::Sandbox::User=root -o Acquire::Retries=3 etcd-server etcd-client)
    for package in "$work"/*.deb; do
        quietly dpkg -x "$package" "$work/tree"
    done
    rm -rf "$etcd"
    mv "$work/tree" "$etcd"
    rm -rf "$work"
    trap - EXIT
}

# haproxy, nginx and keepalived with the libraries that this machine does not have, each behind a script in bin/ that
# shows it those libraries. What is missing is what apt would install.
unpack_balancers() {
    have apt-get || fail "this is no Debian; please link haproxy, nginx and keepalived into .deps/balancers/bin"
    local work packages program
    work=$(mktemp -d "$root/.deps/balancers.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    if [ "$(id -u)" = 0 ]; then apt_update_once; fi
    say "unpacking haproxy, nginx and keepalived into .deps/balancers"
    packages=$(apt-get install -s --no-install-recommends --reinstall haproxy nginx keepalived 2>>"$log" |
        sed -n 's/^Inst \([^ ]*\) .*/\1/p')
    # shellcheck disable=SC2086  # a list of words
    (cd "$work" && quietly apt-get download -q -o APT::Sandbox::User=root -o Acquire::Retries=3 $packages)
    for package in "$work"/*.deb; do
        quietly dpkg -x "$package" "$work/tree"
    done
    mkdir "$work/tree/bin.covey"
    for program in haproxy nginx keepalived; do
        cat >"$work/tree/bin.covey/$program" <<'SCRIPT'
#!/bin/sh
tree=$(dirname "$(dirname "$(readlink -f "$0")")")
for folder in "$tree"/lib/*-linux-gnu* "$tree"/usr/lib/*-linux-gnu*; do
    libraries="${libraries:+$libraries:}$folder"
done
LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$tree/usr/sbin/$(basename "$0")" "$@"
SCRIPT
        chmod +x "$work/tree/bin.covey/$program"
    done
    rm -rf "$work/tree/bin"
    mv "$work/tree/bin.covey" "$work/tree/bin"
    for program in haproxy nginx keepalived; do
        quietly "$work/tree/bin/$program" -v
    done
    rm -rf "$balancers"
    mv "$work/tree" "$balancers"
    rm -rf "$work"
    trap - EXIT
}

system_part() {
    local missing
    missing=$(missing_packages | sort -u | tr '\n' ' ')
    missing=${missing% }
    [ -z "$missing" ] && have_etcd && have_balancers && return
    # apt's list lock knows no waiting, so two clones on one machine take turns here. Whoever cannot open the lock
    # file (not root, another user's file) goes on without it.
    if { exec 8>>"${TMPDIR:-/tmp}/covey-setup-apt.lock"; } 2>/dev/null; then
        flock 8
    fi
    [ -n "$missing" ] && install_packages "$missing"
    have_etcd || unpack_etcd
    have_balancers || unpack_balancers
    exec 8>&-
}

# What the machine says to pip holds for uv, unless uv is told something itself.
adopt_pip_settings() {
    local line name value
    while IFS= read -r line; do
        name=${line%%=*}
        name=${name##*.}
        value=${line#*=}
        value=${value#\'}
        value=${value%\'}
        case $name in
        index-url) export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$value}" ;;
        extra-index-url) export UV_INDEX="${UV_INDEX:-$value}" ;;
        find-links) export UV_FIND_LINKS="${UV_FIND_LINKS:-${value// /,}}" ;;
        no-index) [ "$value" = true ] || [ "$value" = 1 ] && export UV_NO_INDEX="${UV_NO_INDEX:-1}" ;;
        trusted-host) export UV_INSECURE_HOST="${UV_INSECURE_HOST:-$value}" ;;
        cert) export SSL_CERT_FILE="${SSL_CERT_FILE:-$value}" ;;
        esac
    done < <("$venv/bin/python" -m pip config list 2>/dev/null)
    # Several indexes are equal here: every file is pinned by its hash, so none can slip another file in.
    export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"
    export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-true}" UV_LINK_MODE="${UV_LINK_MODE:-copy}" UV_NO_PROGRESS=1
    export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-120}" PIP_DISABLE_PIP_VERSION_CHECK=1
}

make_venv() {
    local python=$1
    say "making .venv with $("$python" -V)"
    rm -rf "$venv"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        quietly "$python" -m venv "$venv"
    else # a Python without ensurepip: its pip can still fill another environment
        quietly "$python" -m venv --without-pip "$venv"
        quietly "$python" -m pip --python "$venv/bin/python" install -q pip
    fi
}

python_part() {
    local python stamp pins
    python=$(find_python) || fail "Python 3.11 or newer is needed; name it with PYTHON=/path/to/python3"
    stamp=$({ "$python" -V; echo "$venv"; cat requirements.lock pyproject.toml; } | sha256sum | cut -d ' ' -f 1)
    if [ "$(cat "$venv/.covey-stamp" 2>/dev/null)" = "$stamp" ] && "$venv/bin/covey" --version >/dev/null 2>&1; then
        return
    fi
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv "$python"
    rm -f "$venv/.covey-stamp"
    adopt_pip_settings

    say "installing what requirements.lock names"
    pins=$(mktemp "$root/.deps/pins.XXXXXX")
    sed -n '/^uv==/,/^[^ ].*==/{/^uv==/p;/^ /p}' requirements.lock >"$pins"
    quietly "$venv/bin/python" -m pip install -q --require-hashes -r "$pins"
    rm -f "$pins"
    if ! logged "$venv/bin/uv" pip install --python "$venv/bin/python" --require-hashes -r requirements.lock; then
        say "uv could not do it on this machine; pip tries"
        quietly "$venv/bin/python" -m pip install -q --require-hashes -r requirements.lock
    fi
    say "installing covey itself"
    quietly "$venv/bin/uv" pip install --python "$venv/bin/python" --no-deps --no-build-isolation --reinstall-package covey -e .
    "$venv/bin/covey" --version >>"$log" 2>&1 || fail "the installed covey does not start; see $log"
    echo "$stamp" >"$venv/.covey-stamp"
}

# ---- main -------------------------------------------------------------------------------------------------------

have flock || fail "flock is missing; please install util-linux"
exec 9>.deps/setup.lock
flock -n 9 || {
    say "another set-up of this clone is running; waiting for it"
    flock 9
}
printf '\n==== %s\n' "$(date -u +%FT%TZ)" >>"$log"
system_part
python_part
say "ready after $((SECONDS - started)) s: .venv/bin/covey is $("$venv/bin/covey" --version 2>/dev/null || echo there)"
