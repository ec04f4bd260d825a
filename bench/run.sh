#!/usr/bin/env bash
# Compares the balancer with the kernel's forwarding, nftables, HAProxy and nginx on this machine, in network namespaces.
# Usage: bench/run.sh [--quick] [--json] [--only CONTESTANT] [--write] ...     bench/run.sh --help tells all
# Standard output has the results alone; what is installed and built goes to standard error.
set -euo pipefail
cd "$(dirname "$0")/.."

# The balancers to compare with and what measures.
packages=()
need() { command -v "$1" >/dev/null 2>&1 || packages+=("$2"); }
need haproxy haproxy
need nginx nginx-light
need iperf3 iperf3
need wrk wrk
need nft nftables
# nginx's module stream is no program.
if ! ls /usr/lib/nginx/modules/ngx_stream_module.so >/dev/null 2>&1 && command -v apt-get >/dev/null 2>&1; then
  packages+=(libnginx-mod-stream)
fi
if [ "${#packages[@]}" -gt 0 ]; then
  echo "installing ${packages[*]}" >&2
  sudo=
  [ "$(id -u)" = 0 ] || sudo=sudo
  # Without the packages the bench says which contestants it leaves out.
  if ! { $sudo apt-get update -qq &&
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >&2; then
    echo "not all packages could be installed" >&2
  fi
fi

cargo build --release --locked --workspace --bin shunt --bin shunt-bench --quiet >&2
exec target/release/shunt-bench "$@"
