#!/usr/bin/env bash
# Rushlight and llama.cpp on the same file, measured in turns: tokens per second of each and the ratio of the two, for
# a prompt and for generation (of BATCH sequences), each after DEPTH tokens. llama.cpp runs with flash attention on and off, and its better
# median counts. Builds what is missing; the peer needs cmake, libclang and g++ (see benches/peer).
#
# usage: scripts/bench-peers.sh MODEL [--threads "1 2"] [--repeats 5] [--depth "0 512"] [--batch "1 8"] [-p 512] [-n 128] [--json FILE]
# Environment: RUSHLIGHT=path and PEER=path take these binaries as they are.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/store.sh
. "$root/scripts/store.sh"

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-1}"
}
usage() {
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

model='' threads='1 2' repeats=5 depth=0 batch=1 prompt=512 generate=128 json=''
while [ $# -gt 0 ]; do
    case "$1" in
    --threads | --repeats | --depth | --batch | -p | -n | --json)
        [ $# -gt 1 ] || usage
        case "$1" in
        --threads) threads=$2 ;;
        --repeats) repeats=$2 ;;
        --depth) depth=$2 ;;
        --batch) batch=$2 ;;
        -p) prompt=$2 ;;
        -n) generate=$2 ;;
        --json) json=$2 ;;
        esac
        shift 2
        ;;
    -*) usage ;;
    *)
        [ -z "$model" ] || usage
        model=$1
        shift
        ;;
    esac
done
[ -n "$model" ] || usage
if [ ! -e "$model" ] && [ -e "$(store_models)/$model.gguf" ]; then
    model=$(store_models)/$model.gguf # llama.cpp does not know the store
fi
[ -f "$model" ] || fail "$model: no such GGUF file, and no model of that name in the local store"
command -v python3 >/dev/null || fail "python3 is missing: install it and start this script again"

[ -x "$HOME/.cargo/bin/cargo" ] && PATH="$PATH:$HOME/.cargo/bin"
need_cargo() {
    command -v cargo >/dev/null || fail "Rust is missing: install it from https://rustup.rs and start this script again"
}

if [ -z "${RUSHLIGHT-}" ]; then
    need_cargo
    (cd -- "$root" && cargo build --release --locked --bin rushlight --target-dir "$root/target") >&2
    RUSHLIGHT=$root/target/release/rushlight
fi

libclang() {
    [ -n "${LIBCLANG_PATH-}" ] || compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null ||
        compgen -G '/usr/lib*/libclang*.so*' >/dev/null || compgen -G '/usr/lib/*/libclang*.so*' >/dev/null
}
if [ -z "${PEER-}" ]; then
    PEER=$root/benches/peer/target/release/rushlight-peer
    if [ ! -x "$PEER" ] ||
        [ -n "$(find "$root/benches/peer" -path '*/target' -prune -o -type f -newer "$PEER" -print -quit)" ]; then
        need_cargo
        if ! command -v cmake >/dev/null || ! command -v g++ >/dev/null || ! libclang; then
            if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
                echo "Installing cmake, g++ and libclang ..." >&2
                { apt-get -qq update || true; } >&2
                DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
                    cmake g++ clang libclang-dev >&2 || fail "apt-get could not install cmake, g++ and libclang-dev"
            else
                fail "the peer's build needs cmake, g++ and libclang (Debian, Ubuntu: apt-get install cmake g++ clang libclang-dev)"
            fi
        fi
        echo "Building llama.cpp (about five minutes on two cores) ..." >&2
        # From its folder: .cargo/config.toml there holds the flags that make it fair. gcc, since clang 14 leaves AMX out.
        (
            cd -- "$root/benches/peer"
            unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CXXFLAGS CARGO_TARGET_DIR
            CC=gcc CXX=g++ cargo build --release --locked --target-dir target
        ) >&2 || fail "the peer could not be built: the reason is above"
    fi
fi

exec python3 - "$RUSHLIGHT" "$PEER" "$model" "$threads" "$repeats" "$depth" "$prompt" "$generate" "$json" "$batch" <<'END'
import json, os, statistics, subprocess, sys

rushlight, peer, model = sys.argv[1:4]
try:
    threads, depths, batches = ([int(n) for n in text.split()] for text in (sys.argv[4], sys.argv[6], sys.argv[10]))
    repeats, prompt, generate = int(sys.argv[5]), int(sys.argv[7]), int(sys.argv[8])
except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def run(command):
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        sys.exit(f"error: {' '.join(command)}: exit {result.returncode}: {last}")
    try:
        return json.loads(result.stdout)
    except ValueError:
        sys.exit(f"error: {' '.join(command)}: its output is not JSON: {result.stdout[:200]!r}")


system = run([peer, "info"])["system"]
print(f"llama.cpp: {system}")
try:
    with open("/proc/cpuinfo") as cpuinfo:
        if " amx_int8" in cpuinfo.read() and "AMX_INT8 = 1" not in system:
            print("WARNING: this machine has AMX and this build of llama.cpp does not use it: not a fair peer")
except OSError:
    pass


def measure(side, count, depth, batch):
    """Tokens per second of the prompt (with the first batch alone) and of generation."""
    ours = [rushlight, "bench", model, "-p", str(prompt if batch == batches[0] else 0), "-n", str(generate), "-r", "1",
            "--threads", str(count), "--depth", str(depth), "--batch", str(batch), "--json"]
    if side == "rushlight":
        rates = run(ours)["runs"][0]["rates"]
        return {rate["work"]: rate["tokens_per_second"] for rate in rates}
    answer = run([peer] + ours[1:] + ["--flash-attn", side])
    return {work: answer[work]["tokens_per_second"] for work in ["prompt", "generation"]}


SIDES = ["rushlight", "off", "on"]
results = []
print(f"{os.path.basename(model)}: prompt {prompt} tokens, generation {generate} tokens, medians of {repeats} rounds")
print(f"{'threads':>7} {'depth':>6} {'batch':>5} {'work':<11} {'rushlight t/s':>13} {'llama.cpp t/s':>13} {'flash':>5} {'ratio':>6} {'range':>13}")
for count, depth, batch in ((c, d, b) for c in threads for d in depths for b in batches):
    rounds = {side: [] for side in SIDES}
    for turn in range(repeats):
        # Back and forth, so that a machine that slows down or speeds up favours nobody.
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
            rounds[side].append(measure(side, count, depth, batch))
            print(f"\rround {turn + 1}/{repeats}: {side:<9}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 30 + "\r", end="", file=sys.stderr, flush=True)
    for work in ["prompt", "generation"]:
        if work not in rounds["rushlight"][0]:
            continue
        rates = {side: [r[work] for r in rounds[side]] for side in SIDES}
        best = max(["off", "on"], key=lambda side: statistics.median(rates[side]))
        ratios = [a / b for a, b in zip(rates["rushlight"], rates[best])]
        row = {
            "threads": count, "work": work, "depth": depth, "batch": batch if work == "generation" else 1,
            "rushlight": statistics.median(rates["rushlight"]), "llama_cpp": statistics.median(rates[best]),
            "flash_attention": best, "ratio": statistics.median(ratios), "rounds": rates,
        }
        results.append(row)
        print(f"{count:>7} {depth:>6} {row['batch']:>5} {work:<11} {row['rushlight']:>13.1f} {row['llama_cpp']:>13.1f} "
              f"{best:>5} {row['ratio']:>6.2f} {min(ratios):>6.2f}-{max(ratios):<6.2f}", flush=True)
if sys.argv[9]:
    with open(sys.argv[9], "w") as out:
        json.dump({"model": model, "prompt": prompt, "generate": generate, "results": results}, out, indent=1)
END
