#!/usr/bin/env bash
# Everything that must hold before a change lands: format, lints, build, tests, documentation, a short fuzz run.
# Usage: ./ci.sh [--full]     --full: longer runs of the tests and of the fuzzer
set -euo pipefail
cd "$(dirname "$0")"

full=no
case "${1:-}" in
  "") ;;
  --full) full=yes ;;
  *) echo "usage: ./ci.sh [--full]" >&2; exit 2 ;;
esac
[ "$full" = no ] || export SHUNT_TEST_FULL=1

step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

# The peers that the tests talk to; the programs themselves need none of them.
packages=()
need() { command -v "$1" >/dev/null 2>&1 || packages+=("$2"); }
need nft nftables
need iperf3 iperf3
need nginx nginx-light
need curl curl
need ip iproute2
need setpriv util-linux
need sysctl procps
need dnsmasq dnsmasq-base
need dig bind9-dnsutils
need ping iputils-ping
need tshark tshark
need scapy python3-scapy
need haproxy haproxy
need wrk wrk
need valgrind valgrind
if [ "${#packages[@]}" -gt 0 ]; then
  step "installing ${packages[*]}"
  sudo=
  [ "$(id -u)" = 0 ] || sudo=sudo
  $sudo apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi
if ! command -v cargo-nextest >/dev/null 2>&1; then
  step "installing cargo-nextest"
  cargo install --locked --quiet cargo-nextest
fi

step "format"
cargo fmt --all -- --check
step "lints"
cargo clippy --workspace --all-targets --all-features --release --locked -- -D warnings
step "build"
cargo build --workspace --all-targets --release --locked
step "tests"
cargo nextest run --workspace --release --locked --no-fail-fast
step "tests without the kernel offload"
# Those whose subject is the offload say themselves what is on.
with_traffic='binary(e2e_smoke) + binary(e2e_programs) + binary(e2e_churn) + binary(e2e_forward) + binary(e2e_kills) +
  binary(e2e_hostile) + binary(e2e_packets) + binary(e2e_moves)'
[ "$full" = no ] || with_traffic='binary(/^e2e_/) - binary(e2e_offload) - binary(e2e_swap)'
SHUNT_TEST_OFFLOAD=off cargo nextest run --workspace --release --locked --no-fail-fast -E "$with_traffic"
cargo test --doc --workspace --release --locked --quiet
step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items --release --locked --quiet
step "demo"
./target/release/shunt demo --json --connections 2000 | tail -n 1
step "fuzz"
if [ "$full" = yes ]; then fuzz/run.sh 300; else fuzz/run.sh 10; fi
step "done"
