#!/bin/sh
# fuzz/run.sh SECONDS [TARGET...]: runs each target for so long, says how often and how far; exit 1 if one breaks.
# What is found to be interesting is kept in fuzz/found/TARGET (not committed) and used by the next run.
# FUZZ_SANITIZER=none runs five times as fast without AddressSanitizer: for long runs, there is little unsafe code to watch.
set -eu
cd "$(dirname "$0")"

usage() { echo "usage: fuzz/run.sh SECONDS [TARGET...]" >&2; exit 2; }
[ $# -ge 1 ] || usage
case $1 in '' | *[!0-9]* | 0) usage ;; esac
seconds=$1
shift

# libFuzzer's instrumentation needs unstable flags of the compiler, not another compiler.
export RUSTC_BOOTSTRAP=1
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
command -v cargo-fuzz > /dev/null || env -u RUSTC_BOOTSTRAP cargo install cargo-fuzz --locked

[ $# -gt 0 ] || set -- $(cargo fuzz list --fuzz-dir .)
sanitizer=${FUZZ_SANITIZER:-address}
cargo fuzz build --fuzz-dir . --sanitizer "$sanitizer"
broken=0
printf '%-10s %12s %10s %8s %8s\n' target executions per-second edges features
for target in "$@"; do
    log=found/$target.log
    mkdir -p "found/$target" "corpus/$target" "artifacts/$target"
    result=0
    cargo fuzz run --fuzz-dir . --sanitizer "$sanitizer" "$target" "found/$target" "corpus/$target" -- \
        -max_total_time="$seconds" -max_len=1024 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 \
        -verbosity=1 > "$log" 2>&1 || result=$?
    stat() { sed -n "s/^stat::$1: *//p" "$log" | tail -n 1; }
    last() { sed -n "s/.* $1: \([0-9]*\).*/\1/p" "$log" | tail -n 1; }
    printf '%-10s %12s %10s %8s %8s\n' "$target" "$(stat number_of_executed_units)" \
        "$(stat average_exec_per_sec)" "$(last cov)" "$(last ft)"
    if [ "$result" -ne 0 ]; then
        broken=1
        input=$(sed -n "s|.*Test unit written to .*/artifacts/|artifacts/|p" "$log" | tail -n 1)
        if [ -n "$input" ]; then
            grep -m 1 -A 3 "panicked at" "$log" >&2 || true
            echo "$target breaks on fuzz/$input; again with:" >&2
            echo "  RUSTC_BOOTSTRAP=1 cargo fuzz run --fuzz-dir fuzz $target fuzz/$input" >&2
        else
            tail -n 20 "$log" >&2
            echo "$target did not run (exit $result), see fuzz/$log" >&2
        fi
    fi
done
exit $broken
