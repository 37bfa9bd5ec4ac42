#!/usr/bin/env python3
"""Speed and memory of a LoRA step beside PyTorch with PEFT, both in turns on this machine.

    bench-train-peer.py MODEL [--shape smollm2|1.1b|1.5b] [--batch 4] [--tokens 256] [--steps 4] [--rounds 3]
                        [--threads 2] [--configurations "bf16 f32 bf16-checkpoint"] [--rushlight target/release/rushlight]

MODEL is the file that Rushlight trains on (Q4_K_M, say); PyTorch gets a model of the same shape with random weights,
whose speed is the same. Both train rank 8 on all seven projections with AdamW on the same random tokens. A round runs
every program in turn; of each run the best step counts, for PyTorch its fastest configuration, and for memory the peak
of the process. Needs Python with torch, transformers and peft; without them it says so and ends.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LLAMA = dict(model_type="llama", rms_norm_eps=1e-5, max_position_embeddings=2048)
SHAPES = {
    "smollm2": LLAMA | dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                            num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "1.1b": LLAMA | dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
                         num_key_value_heads=4, vocab_size=32000, tie_word_embeddings=False),
    "1.5b": LLAMA | dict(model_type="qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                         num_attention_heads=12, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("--shape", choices=SHAPES, default="smollm2")
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--tokens", type=int, default=256)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--configurations", default="bf16 f32 bf16-checkpoint")
parser.add_argument("--rushlight", default="target/release/rushlight")
parser.add_argument("--torch", help=argparse.SUPPRESS)  # the part of this program that is timed
args = parser.parse_args()


def peak(who):
    return resource.getrusage(who).ru_maxrss * 1024


def torch_run(configuration):
    """A process of its own: prints the seconds of its steps and its peak memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    shape = dict(SHAPES[args.shape])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    dtype = torch.float32 if configuration.startswith("f32") else torch.bfloat16
    # A default type keeps the model from being made in f32 first.
    torch.set_default_dtype(dtype)
    model = AutoModelForCausalLM.from_config(config)
    if configuration.endswith("checkpoint"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"),
                           autocast_adapter_dtype=False)
    model.config.use_cache = False
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, config.vocab_size, (args.batch, args.tokens))
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "peak": peak(resource.RUSAGE_SELF)}))


if args.torch:
    torch_run(args.torch)
    sys.exit(0)

try:
    import peft
    import torch
    import transformers
except ImportError as error:
    print(f"skipped: {error.name} is not installed")
    sys.exit(0)


def run(command):
    """What `command` printed, and its peak memory: a process between measures this one child alone."""
    between = ("import json,resource,subprocess,sys; done=subprocess.run(sys.argv[1:],capture_output=True,text=True); "
               "print(json.dumps([done.returncode,done.stdout,done.stderr,"
               "resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*1024]))")
    done = subprocess.run([sys.executable, "-c", between, *map(str, command)], capture_output=True, text=True)
    code, out, err, most = json.loads(done.stdout)
    if code != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{err}")
    return out, most


def rushlight(folder, number):
    out = folder / f"run{number}"
    _, most = run([args.rushlight, "train", args.model, "--data", folder / "tokens.jsonl", "-o", out, "--template", "none",
                   "--max-steps", args.steps, "--batch-size", args.batch, "--max-seq-len", args.tokens, "--lora-r", 8,
                   "--threads", args.threads, "--lr", 1e-4, "--quiet"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    assert all(line["tokens"] == args.batch * args.tokens for line in steps), "the steps are not of one size"
    return min(line["seconds"] for line in steps), most


def pytorch(configuration):
    out, _ = run([sys.executable, __file__, *sys.argv[1:], "--torch", configuration])
    said = json.loads(out.splitlines()[-1])
    return min(said["seconds"]), said["peak"]


tokens = args.batch * args.tokens
rows = {}
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    draw = random.Random(1)
    with open(folder / "tokens.jsonl", "w") as data:
        for _ in range(args.batch * args.steps):
            ids = [draw.randrange(3, SHAPES[args.shape]["vocab_size"]) for _ in range(args.tokens)]
            data.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    for number in range(args.rounds):
        rows.setdefault("rushlight", []).append(rushlight(folder, number))
        for configuration in args.configurations.split():
            rows.setdefault(f"PyTorch {configuration}", []).append(pytorch(configuration))

print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}; "
      f"{args.batch} x {args.tokens} tokens, {args.threads} threads, {args.rounds} rounds\n")
print("| program | tokens/s | peak, MB |\n| --- | --- | --- |")
for name, runs in rows.items():
    speed, most = (statistics.median(column) for column in zip(*[(tokens / s, m) for s, m in runs]))
    print(f"| {name} | {speed:.0f} | {most / 1e6:.0f} |")
ours, theirs = rows.pop("rushlight"), list(rows.values())
ratios = [min(runs[i][0] for runs in theirs) / o[0] for i, o in enumerate(ours)]
fastest = min(theirs, key=lambda runs: statistics.median(s for s, _ in runs))
memory = statistics.median(m for _, m in fastest) / statistics.median(m for _, m in ours)
print(f"\nspeed against PyTorch's fastest: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
      f"its memory: {memory:.1f} times ours")
