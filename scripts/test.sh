#!/usr/bin/env bash
# Everything that must pass: formatting, lints, all tests, the kernels on every instruction set this machine has, and
# the AArch64 kernels under emulation. Installs what it needs where it can.
#
# usage: scripts/test.sh [--native]      (--native leaves the AArch64 part out)
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

native_only=
case "${1-}" in
"") ;;
--native) native_only=yes ;;
*)
    sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac

[ -x "$HOME/.cargo/bin/cargo" ] && export PATH="$PATH:$HOME/.cargo/bin"
command -v cargo >/dev/null || {
    echo "error: Rust is missing: install it from https://rustup.rs and start this script again" >&2
    exit 1
}
export CARGO_TERM_COLOR="${CARGO_TERM_COLOR:-auto}"
# A machine that builds once gains nothing from incremental files.
[ -z "${CI-}" ] || export CARGO_INCREMENTAL=0

begun=$SECONDS
done_parts=()
skipped=()

part() {
    step=$1
    step_begun=$SECONDS
    printf '\n== %s\n' "$step"
}
passed() {
    done_parts+=("$step $((SECONDS - step_begun)) s")
}
skip() {
    echo "SKIPPED: $step: $1"
    skipped+=("$step ($1)")
}
trap 'status=$?; [ $status = 0 ] || printf "\nFAILED in: %s (after %s s)\n" "${step:-set-up}" "$((SECONDS - begun))" >&2' EXIT

for component in rustfmt clippy; do
    if ! cargo "${component/rustfmt/fmt}" --version >/dev/null 2>&1; then
        rustup component add "$component" || {
            echo "error: $component is missing and rustup could not add it" >&2
            exit 1
        }
    fi
done

part "formatting"
cargo fmt --all --check
# The crates outside the workspace, which the ordinary build leaves alone.
for manifest in benches/peer/Cargo.toml fuzz/Cargo.toml; do
    [ ! -f "$manifest" ] || cargo fmt --manifest-path "$manifest" --check
done
passed

part "lints"
cargo clippy --workspace --all-targets --locked -- -D warnings
passed

# nextest runs the test binaries side by side; plain cargo test does the same work, slower.
if cargo nextest --version >/dev/null 2>&1; then
    run_tests() { cargo nextest run --locked "$@"; }
else
    run_tests() { cargo test --locked --lib --bins --tests "$@"; }
fi

part "tests"
run_tests --workspace
cargo test --workspace --locked --doc
passed

# The kernels' own tests compare every table with the scalar one. Whole models ran above on the best instruction set
# only: their numbers must hold on the plainer ones too.
plainer_instruction_sets() {
    echo scalar
    local flags
    flags=" $(grep -m 1 '^flags' /proc/cpuinfo 2>/dev/null || true) "
    case "$flags" in *" avx512_vnni "*) echo avx2 ;; esac
    case "$flags" in *" amx_bf16 "*) echo avx512 ;; esac
}
for isa in $(plainer_instruction_sets); do
    part "families on $isa"
    RUSHLIGHT_ISA=$isa run_tests --workspace --test families --test convert --test families_table --test prequantized
    passed
done

part "AArch64 kernels"
if [ -n "$native_only" ]; then
    skip "--native"
elif [ "$(uname -m)" = aarch64 ]; then
    skip "this machine is one: they have just run"
else
    status=0
    environment=$(scripts/cross-setup.sh) || status=$?
    case $status in
    0)
        (
            # shellcheck source=/dev/null
            . "$environment"
            # Debian's compiler, the fallback, comes without clippy.
            if [ -z "${RUSTC-}" ]; then
                cargo clippy -q -p rushlight-quant --all-targets --locked \
                    --target aarch64-unknown-linux-gnu --target-dir target/cross -- -D warnings
            fi
        )
        # Emulated processors: everything (dot products, i8mm); dot products alone; neither.
        for processor in max neoverse-n1 cortex-a53; do
            echo "-- $processor"
            (
                export QEMU_CPU_MODEL=$processor
                # shellcheck source=/dev/null
                . "$environment"
                # What chooses numbers uses the same kernels on all of them: once is enough for it.
                case $processor in
                max) tests=(--tests) ;;
                *) tests=(--test kernels -- --skip quantize::) ;;
                esac
                cargo test -q -p rushlight-quant --locked --target aarch64-unknown-linux-gnu \
                    --target-dir target/cross --lib "${tests[@]}"
            )
        done
        passed
        ;;
    3) skip "what it needs cannot be installed here" ;;
    *) exit "$status" ;;
    esac
fi

trap - EXIT
printf '\nPASSED in %s s:' "$((SECONDS - begun))"
printf ' %s;' "${done_parts[@]}"
if [ ${#skipped[@]} -gt 0 ]; then
    printf ' skipped:'
    printf ' %s;' "${skipped[@]}"
fi
echo
