#!/usr/bin/env python3
"""Trains small adapters with rushlight, loads them with PEFT, and compares logits.

    check-adapter.py BASE [--rushlight target/release/rushlight] [--steps 10] [--room 1e-3]

BASE is a Hugging Face directory of a small llama-like model in floats. Each kind (LoRA, rsLoRA, DoRA) is trained on
token ids for a few steps, so that no tokenizer is needed. Everything runs on the CPU and in f32. Without torch,
transformers and peft the check is skipped, and says so. Exit status: 0 agreed or skipped, 1 not.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("base")
parser.add_argument("--rushlight", default="target/release/rushlight")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--room", type=float, default=1e-3)
args = parser.parse_args()
try:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
except ImportError as error:
    print(f"skipped: {error.name} is not installed")
    sys.exit(0)

vocabulary = json.loads((Path(args.base) / "config.json").read_text())["vocab_size"]
draw = random.Random(1)
ids = [1] + [draw.randrange(3, min(vocabulary, 2000)) for _ in range(24)]


def rushlight(*arguments):
    done = subprocess.run([args.rushlight, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return done.stdout


failed = False
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    data = folder / "tokens.jsonl"
    row = lambda: [1] + [draw.randrange(3, min(vocabulary, 2000)) for _ in range(20)]
    rows = [row() for _ in range(8)]
    data.write_text("".join(json.dumps({"input_ids": r, "labels": r}) + "\n" for r in rows))
    for kind in ["lora", "rslora", "dora"]:
        out = folder / kind
        extra = [] if kind == "lora" else [f"--{kind}"]
        rushlight("train", args.base, "--data", data, "-o", out, "--template", "none", "--max-steps", args.steps,
                  "--batch-size", 4, "--lr", 5e-3, "--schedule", "constant", *extra)
        said = json.loads(rushlight("logits", args.base, "--adapter", out / "adapter", "--all", "--json",
                                    "--ids", ",".join(map(str, ids))))
        ours = torch.tensor([p["logits"] for p in said["positions"]])
        base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
        with torch.no_grad():
            plain = base(torch.tensor([ids])).logits[0]
            model = PeftModel.from_pretrained(base, str(out / "adapter"))
            theirs = model.eval()(torch.tensor([ids])).logits[0]
        centred = lambda x: x - x.mean(-1, keepdim=True)
        off = (centred(ours) - centred(theirs)).abs().max().item()
        change = (centred(theirs) - centred(plain)).abs().max().item()
        good = off < args.room and change > 10 * args.room
        failed |= not good
        print(f"{kind}: logits differ by {off:.1e} at most; the adapter moves them by {change:.2f}{'' if good else '  FAILED'}")
sys.exit(failed)
