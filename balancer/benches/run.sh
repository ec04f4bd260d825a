#!/usr/bin/env bash
# What a packet takes: nanoseconds (median, and how far they are apart), then instructions.
# Usage: balancer/benches/run.sh [NAME]     NAME: only cases with this in their name are timed
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo bench --quiet --locked --workspace --bench decision -- --noplot --output-format bencher "$@" | grep '^test '
cargo test --quiet --release --locked --workspace --test instructions -- --nocapture
