#!/usr/bin/env python3
"""Loads a quantized directory that rushlight wrote with the tools it is meant for, and compares logits.

    check-gptq.py DIR [--rushlight target/release/rushlight] [--ids 1,2,3] [--room 0.02]

GPTQ directories are loaded by GPTQModel where it is installed, else by transformers (with optimum and a GPTQ
backend); NF4 directories by transformers with bitsandbytes. Everything runs on the CPU and in f32. Without the Python
packages that it takes the check is skipped, and says so. Exit status: 0 agreed or skipped, 1 not.

What it has run with: torch 2.10.0, transformers 4.57.6, gptqmodel 5.6.12, bitsandbytes 0.50.2, optimum 2.3.0.
"""

import argparse
import json
import subprocess
import sys


def skip(why):
    print(f"skipped: {why}")
    sys.exit(0)


def load(directory, method):
    try:
        import torch
        import transformers
    except ImportError as error:
        skip(f"{error.name} is not installed")
    if method == "gptq":
        try:
            from gptqmodel import BACKEND, GPTQModel

            # It takes half precision only, and f16 holds the scales as they are stored.
            half = {"dtype": torch.float16, "torch_dtype": torch.float16}
            model = GPTQModel.load(directory, device="cpu", backend=BACKEND.TORCH, **half)
            return getattr(model, "model", model).float(), "GPTQModel"
        except ImportError:
            try:
                import optimum  # noqa: F401
            except ImportError:
                skip("neither gptqmodel nor optimum is installed")
    else:
        try:
            from bitsandbytes.nn import Linear4bit
        except ImportError:
            skip("bitsandbytes is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", dtype=torch.float32)
    if method != "gptq":
        import bitsandbytes

        # On the CPU it takes every row to begin a block of 64, which is so only where 64 divides the columns: the blocks
        # are taken off whole, and multiplied in f32.
        for name, layer in list(model.named_modules()):
            if isinstance(layer, Linear4bit):
                state, shape = layer.weight.quant_state, layer.weight.quant_state.shape
                state.shape = torch.Size([shape.numel() // state.blocksize, state.blocksize])
                weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state).float().reshape(shape)
                plain = torch.nn.Linear(shape[1], shape[0], bias=layer.bias is not None)
                plain.weight.data = weight
                if layer.bias is not None:
                    plain.bias.data = layer.bias.data.float()
                model.set_submodule(name, plain)
    return model, "transformers"


def ours(rushlight, directory, ids, step):
    command = [rushlight, "logits", directory, "--ids", ",".join(map(str, ids)), "--all", "--json"]
    out = subprocess.run(command + (["--step"] if step else []), capture_output=True, text=True, check=False)
    if out.returncode != 0:
        sys.exit(out.stderr.strip())
    return [position["logits"] for position in json.loads(out.stdout)["positions"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--rushlight", default="target/release/rushlight")
    parser.add_argument("--ids", default="1,5,9,22,17,3,40,8")
    parser.add_argument("--room", type=float, default=0.02, help="largest difference, in standard deviations")
    args = parser.parse_args()
    with open(f"{args.directory}/config.json", encoding="utf-8") as file:
        method = json.load(file).get("quantization_config", {}).get("quant_method")
    if method not in ("gptq", "bitsandbytes"):
        sys.exit(f"{args.directory}/config.json: quant_method is {method}, not gptq or bitsandbytes")
    model, tool = load(args.directory, method)
    import torch

    ids = [int(i) for i in args.ids.split(",")]
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([ids])).logits[0].float()
    agreed = True
    for step in (False, True):
        logits = torch.tensor(ours(args.rushlight, args.directory, ids, step))
        if logits.shape != theirs.shape:
            sys.exit(f"{tuple(logits.shape)} logits from rushlight, {tuple(theirs.shape)} from {tool}")
        off = (logits - theirs).abs().max().item() / theirs.std().item()
        top = (logits.argmax(-1) == theirs.argmax(-1)).float().mean().item()
        how = "token by token" if step else "at once"
        print(f"{tool}, {how}: furthest {off:.4f} standard deviations apart, {100 * top:.0f} % of top choices equal")
        agreed &= off <= args.room
    sys.exit(0 if agreed else 1)


if __name__ == "__main__":
    main()
