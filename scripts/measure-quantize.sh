#!/usr/bin/env bash
# Perplexity of a GGUF file quantized by Rushlight and by llama.cpp, type by type, with and without an importance matrix:
# both files scored by llama.cpp (once where all tensors are the same), and ours by Rushlight too. Prints a table in
# Markdown; what is measured is kept in DIR, so that the same command goes on after a stop. Build the peer first:
# scripts/bench-peers.sh does.
#
# usage: scripts/measure-quantize.sh MODEL.gguf TEXT DIR [--types "Q4_K_M Q6_K"] [--imatrix FILE.dat] [--chunks 40]
#            [--threads 1]
# MODEL is in F16 or F32. `rushlight imatrix MODEL -o FILE.dat` makes an importance matrix that both read.
# Environment: RUSHLIGHT=path and PEER=path take these binaries as they are.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

types='Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_0 Q4_1 Q4_K_S Q4_K_M IQ4_NL IQ4_XS Q5_0 Q5_1 Q5_K_S Q5_K_M Q6_K Q8_0'
imatrix='' chunks=40 threads=1 files=()
while [ $# -gt 0 ]; do
    case "$1" in
    --types | --imatrix | --chunks | --threads)
        [ $# -gt 1 ] || usage
        case "$1" in
        --types) types=$2 ;;
        --imatrix) imatrix=$2 ;;
        --chunks) chunks=$2 ;;
        --threads) threads=$2 ;;
        esac
        shift 2
        ;;
    -*) usage ;;
    *)
        files+=("$1")
        shift
        ;;
    esac
done
[ "${#files[@]}" = 3 ] || usage
rushlight=${RUSHLIGHT:-$root/target/release/rushlight}
peer=${PEER:-$root/benches/peer/target/release/rushlight-peer}
for binary in "$rushlight" "$peer"; do
    if [ ! -x "$binary" ]; then
        echo "error: $binary is not built: run cargo build --release and scripts/bench-peers.sh first" >&2
        exit 1
    fi
done
mkdir -p -- "${files[2]}"

exec python3 - "$rushlight" "$peer" "$types" "$imatrix" "$chunks" "$threads" "${files[@]}" <<'END'
import json, os, struct, subprocess, sys

rushlight, peer, types, imatrix, chunks, threads, model, text, folder = sys.argv[1:]
log = os.path.join(folder, "measured.jsonl")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(command)}\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def perplexity(program, file):
    return run(program, "perplexity", file, "-f", text, "--chunks", chunks, "--threads", threads, "--json")["perplexity"]


def tensors(file):
    """What a GGUF file holds beside its metadata: a description of the tensors, and their bytes."""
    data = open(file, "rb").read()
    at = 8

    def take(form):
        nonlocal at
        at += struct.calcsize("<" + form)
        return struct.unpack_from("<" + form, data, at - struct.calcsize("<" + form))[0]

    def text():
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at]

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            kind, count = take("I"), take("Q")
            return [value(kind) for _ in range(count)]
        return take("BbHhIif?--Qqd"[kind])

    count, keys = take("Q"), take("Q")
    metadata = {text(): value(take("I")) for _ in range(keys)}
    infos = sorted((text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(count))
    unit = metadata.get(b"general.alignment", 32)
    return infos, data[(at + unit - 1) // unit * unit :]


def measure(kind, use):
    """Perplexities of our file and of theirs in llama.cpp, and of ours in Rushlight; and both sizes."""
    ours, theirs = (os.path.join(folder, f"{kind}{'-i' if use else ''}-{whose}.gguf") for whose in ("ours", "theirs"))
    more = ["--imatrix", imatrix] if use else []
    run(rushlight, "quantize", model, "-o", ours, "--type", kind, "--threads", threads, "--json", "--quiet", *more)
    run(peer, "quantize", model, theirs, "--type", kind, "--threads", threads, *more)
    same = tensors(ours) == tensors(theirs)
    scored = perplexity(peer, ours)
    row = {
        "type": kind,
        "imatrix": use,
        "ours": scored,
        "theirs": scored if same else perplexity(peer, theirs),
        "rushlight": perplexity(rushlight, ours),
        "bytes": os.path.getsize(ours),
        "their_bytes": os.path.getsize(theirs),
        "same": same,
    }
    os.remove(ours)
    os.remove(theirs)
    return row


rows = {}
if os.path.exists(log):
    for line in open(log):
        row = json.loads(line)
        if row["chunks"] == chunks:
            rows[row["type"], row["imatrix"]] = row
wanted = [(kind, use) for kind in types.split() for use in ([False, True] if imatrix else [False])]
if ("original", False) not in rows:
    row = {"type": "original", "imatrix": False, "theirs": perplexity(peer, model), "rushlight": perplexity(rushlight, model)}
    rows["original", False] = row | {"chunks": chunks}
    with open(log, "a") as out:
        out.write(json.dumps(rows["original", False]) + "\n")
for kind, use in wanted:
    if (kind, use) not in rows:
        rows[kind, use] = measure(kind, use) | {"chunks": chunks}
        with open(log, "a") as out:
            out.write(json.dumps(rows[kind, use]) + "\n")
        print(json.dumps(rows[kind, use]), file=sys.stderr)

original = rows["original", False]
print(f"{chunks} chunks; the original: {original['theirs']:.4f} in llama.cpp, {original['rushlight']:.4f} in Rushlight.\n")
print("| type | importance | same bytes | theirs in llama.cpp | ours in llama.cpp | difference | ours in Rushlight | difference |")
print("|---|---|---|---|---|---|---|---|")
for key in wanted:
    row = rows[key]
    ours, theirs, own = row["ours"], row["theirs"], row["rushlight"]
    importance = "imatrix" if row["imatrix"] else "-"
    print(
        f"| {row['type']} | {importance} | {'yes' if row['same'] else 'no'} | {theirs:.4f} | {ours:.4f} | {100 * (ours / theirs - 1):+.2f} % | {own:.4f} "
        f"| {100 * (own / ours - 1):+.2f} % |"
    )
END
