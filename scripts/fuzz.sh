#!/bin/sh
# Runs the fuzz targets: scripts/fuzz.sh [RUNS] [TARGET]...   (by default a million executions of each)
# Needs a nightly toolchain and cargo-fuzz (cargo install cargo-fuzz --locked). See docs/fuzzing.md.
set -eu
cd "$(dirname "$0")/.."
runs=${1:-1000000}
[ $# -gt 0 ] && shift
cargo test -q -p rushlight-models --lib --test hostile -- --ignored write_fuzz_seeds
[ $# -gt 0 ] || set -- gguf safetensors config tokenizer template imatrix
for target in "$@"; do
    cargo +nightly fuzz run "$target" -- -runs="$runs" -max_len=65536 -timeout=10 -rss_limit_mb=1024 \
        -malloc_limit_mb=64 -print_final_stats=1
done
