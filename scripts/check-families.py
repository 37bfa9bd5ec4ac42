#!/usr/bin/env python3
"""Writes every reference checkpoint as a GGUF file of 32-bit floats, runs it in llama.cpp, and compares logits.

    check-families.py PEER [--rushlight target/release/rushlight] [--fixtures ../shared/fixtures/families]
                      [--room 3e-2] [--family NAME]... [--table]

PEER is llama.cpp as benches/peer builds it (rushlight-peer). Its cache holds 16-bit floats, so that its logits are off by a
few thousandths, more in deep random models; --room is how far they may be, relative to the largest. Ours come from the
same file. --table prints docs/families-in-llama-cpp.md. Without PEER the check is skipped, and says so. Exit status: 0 agreed or skipped, 1 not.
"""

import argparse
import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

# llama.cpp knows some models by their depth: the checkpoint's last layer is repeated up to it.
DEPTHS = {"baichuan-7b": 32, "baichuan2-7b": 32, "baichuan-13b": 40, "baichuan2-13b": 40, "cohere": 64, "deepseek_v2": 27}
# Numbers that GGUF files of the family do not say, since they follow from sizes, as the published models have them.
CHANGES = {
    "gemma2": lambda config: {"query_pre_attn_scalar": config["head_dim"]},
    "gemma3": lambda config: {"query_pre_attn_scalar": config["head_dim"], "sliding_window_pattern": 6},
}


PAGE = """\
# Families in llama.cpp

The reference checkpoints, written as GGUF files of 32-bit floats and run in llama.cpp (`benches/peer`): the largest difference
of its logits from ours on the same file, relative to the largest logit, over two texts. llama.cpp's cache holds 16-bit floats,
which is what most of it comes from. Written by `scripts/check-families.py rushlight-peer --table`.

Models that llama.cpp knows by their depth were given it by repeating their last layer: Baichuan 32 or 40 layers, Command R
64, DeepSeek-V2 27. Gemma 2 and 3 have the attention scale that llama.cpp concludes from their sizes.

| checkpoint | largest difference | remark |
| --- | --- | --- |"""


def run(*arguments):
    return subprocess.run([*map(str, arguments)], capture_output=True, text=True)


def logits(done):
    return [p["logits"] for p in json.loads(done.stdout)["positions"]]


def deepened(source, target, depth, layers):
    """Writes the tensors of `source`, whose layer `layers - 1` stands for all from there to `depth`."""
    with open(source, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    header.pop("__metadata__", None)
    named, new, size = {}, {}, 0
    for name, tensor in header.items():
        parts = name.split(".")
        at = parts.index("layers") + 1 if "layers" in parts else None
        last = at is not None and int(parts[at]) == layers - 1
        for layer in range(layers - 1, depth) if last else [None]:
            named[".".join(parts if layer is None else [*parts[:at], str(layer), *parts[at + 1:]])] = tensor
    with open(target, "wb") as file:
        for name, tensor in named.items():
            first, end = tensor["data_offsets"]
            new[name] = tensor | {"data_offsets": [size, size + end - first]}
            size += end - first
        text = json.dumps(new).encode()
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in named.values():
            file.write(data[slice(*tensor["data_offsets"])])


def published(source, folder):
    """The checkpoint as published ones are in what GGUF files of its family cannot say otherwise."""
    config = json.loads((source / "config.json").read_text())
    if source.name not in DEPTHS | CHANGES:
        return source
    layers = config["num_hidden_layers"]
    depth = DEPTHS.get(source.name, layers)
    config |= CHANGES.get(source.name, lambda _: {})(config) | {"num_hidden_layers": depth}
    copy = folder / source.name
    copy.mkdir()
    deepened(source / "model.safetensors", copy / "model.safetensors", depth, layers)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def compare(args, source, folder):
    """What came out in words, and the largest difference where there is one."""
    file = folder / "model.gguf"
    done = run(args.rushlight, "quantize", published(source, folder), "-o", file, "--type", "F32")
    if done.returncode:
        return done.stderr.strip().splitlines()[-1].split(": ")[-1], None
    lines = [line.removeprefix("note: ") for line in done.stderr.splitlines()]
    notes = [line for line in lines if "llama.cpp" in line or "cannot say" in line]
    longest = min([int(n) for n in re.findall(r"texts longer than (\d+) tokens", done.stderr)], default=1 << 30)
    worst = 0.0
    for case in json.loads((source / "golden.json").read_text())["cases"][:2]:
        # It takes the long factors for all texts, or the short ones, by the room in its cache, which is larger.
        if source.name == "phi3-longrope" and len(case["input_ids"]) <= 16:
            continue
        ids = ",".join(map(str, case["input_ids"][:longest]))
        theirs = run(args.peer, "logits", file, "--all", "--ids", ids)
        if theirs.returncode:
            if any("does not read" in note for note in notes):
                return "; ".join(notes), None
            # What we did not say is a mistake of ours.
            reason = [line for line in theirs.stderr.splitlines() if "error" in line.lower()]
            return (reason or ["it does not load"])[0].split("error loading model: ")[-1], float("inf")
        ours = run(args.rushlight, "logits", file, "--all", "--ids", ids, "--json")
        if ours.returncode:
            return ours.stderr, float("inf")
        for a, b in zip(logits(ours), logits(theirs)):
            mean = (sum(a) - sum(b)) / len(a)
            most = max(1.0, max(map(abs, a)))
            worst = max([worst, *(abs(x - y - mean) / most for x, y in zip(a, b))])
    if source.name == "phi3-longrope":
        notes.append("llama.cpp takes the long factors for short texts too, unless its cache is short")
    return "; ".join(notes), worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", nargs="?")
    parser.add_argument("--rushlight", default="target/release/rushlight")
    parser.add_argument("--fixtures", type=Path, default=Path("../shared/fixtures/families"))
    parser.add_argument("--room", type=float, default=3e-2)
    parser.add_argument("--family", action="append")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.peer or not Path(args.peer).exists() or not args.fixtures.is_dir():
        print("skipped: it needs rushlight-peer (benches/peer) and the reference checkpoints")
        return 0
    failed = []
    if args.table:
        print(PAGE)
    for source in sorted(args.fixtures.iterdir()):
        if not (source / "golden.json").exists() or args.family and source.name not in args.family:
            continue
        with tempfile.TemporaryDirectory() as folder:
            remark, worst = compare(args, source, Path(folder))
        if worst is not None and worst > args.room:
            failed.append(source.name)
        number = "none" if worst is None else f"{worst:.0e}"
        print(f"| {source.name} | {number} | {remark} |" if args.table else f"{source.name}: {number}  {remark}", flush=True)
    if failed:
        print(f"different: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
