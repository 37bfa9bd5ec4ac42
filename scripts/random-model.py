#!/usr/bin/env python3
"""Writes a GGUF model of a given shape with random weights (normal, deviation 0.02), for timing.

usage: scripts/random-model.py OUT.gguf [--shape 1.1b|1.5b|7b] [--layers N] [--hidden N] [--ffn N] [--heads N]
       [--kv-heads N] [--vocab N] [--experts N [--used N]] [--arch llama|qwen2] [--f32 | --q4] [--seed N]

Needs the Python packages numpy and gguf. Shapes: 1.1b is TinyLlama's, 1.5b Qwen2.5's, 7b Llama 2's. The model has no
tokenizer. Matrices are f16, with --f32 f32, with --q4 random blocks of Q4_K and (values, down and the head) Q6_K, written
without ever being numbers: a file of the size and mix of a Q4_K_M model in a minute.
"""

import argparse
import sys

try:
    import gguf
    import numpy as np
except ImportError as e:
    sys.exit(f"error: {e}: pip install numpy gguf")

SHAPES = {
    "1.1b": dict(arch="llama", layers=22, hidden=2048, ffn=5632, heads=32, kv_heads=4, vocab=32000),
    "1.5b": dict(arch="qwen2", layers=28, hidden=1536, ffn=8960, heads=12, kv_heads=2, vocab=151936),
    "7b": dict(arch="llama", layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32, vocab=32000),
}


def q4_k(rng, count):
    """Random blocks: value = d * scale * code - dmin * minimum, with scales and minimums of 6 bits."""
    blocks = rng.integers(0, 256, (count, 144), dtype=np.uint8)
    blocks[:, 0:2] = np.frombuffer(np.float16(1.2e-4).tobytes(), np.uint8)
    blocks[:, 2:4] = np.frombuffer(np.float16(9e-4).tobytes(), np.uint8)
    return blocks


def q6_k(rng, count):
    """Random blocks: value = d * scale * (code - 32), with scales of 8 bits and a sign."""
    blocks = rng.integers(0, 256, (count, 210), dtype=np.uint8)
    blocks[:, 208:210] = np.frombuffer(np.float16(1.5e-5).tobytes(), np.uint8)
    return blocks


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("out")
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    for name in SHAPES["1.1b"]:
        kind = str if name == "arch" else int
        parser.add_argument("--" + name.replace("_", "-"), type=kind)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--used", type=int, default=2, help="experts that a token goes through")
    parser.add_argument("--f32", action="store_true")
    parser.add_argument("--q4", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    shape = {name: getattr(args, name) or value for name, value in SHAPES[args.shape].items()}
    arch, hidden, ffn, vocab = shape["arch"], shape["hidden"], shape["ffn"], shape["vocab"]
    kv = hidden // shape["heads"] * shape["kv_heads"]

    # Tied embeddings where the real models of the family have them.
    tensors = [("token_embd.weight", (vocab, hidden)), ("output_norm.weight", (hidden,))]
    if arch == "llama":
        tensors.append(("output.weight", (vocab, hidden)))
    for i in range(shape["layers"]):
        layer = [("attn_norm", (hidden,)), ("ffn_norm", (hidden,))]
        layer += [("attn_q", (hidden, hidden)), ("attn_k", (kv, hidden)), ("attn_v", (kv, hidden))]
        layer += [("attn_output", (hidden, hidden))]
        up, down = (ffn, hidden), (hidden, ffn)
        if args.experts:
            layer.append(("ffn_gate_inp", (args.experts, hidden)))
            layer += [(name + "_exps", (args.experts, *dims)) for name, dims in
                      [("ffn_gate", up), ("ffn_up", up), ("ffn_down", down)]]
        else:
            layer += [("ffn_gate", up), ("ffn_up", up), ("ffn_down", down)]
        tensors += [(f"blk.{i}.{name}.weight", dims) for name, dims in layer]
        if arch == "qwen2":
            tensors += [(f"blk.{i}.{name}.bias", (n,)) for name, n in [("attn_q", hidden), ("attn_k", kv), ("attn_v", kv)]]

    writer = gguf.GGUFWriter(args.out, arch)
    writer.add_name(f"Random {args.shape}")
    writer.add_block_count(shape["layers"])
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // shape["heads"])
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    if args.experts:
        writer.add_expert_count(args.experts)
        writer.add_expert_used_count(args.used)
    wide = np.float32 if args.f32 else np.float16
    quants = gguf.GGMLQuantizationType
    writer.add_file_type(15 if args.q4 else 0 if args.f32 else 1)

    def packed(name, dims):
        """How a matrix is packed: None as numbers."""
        if not args.q4 or len(dims) == 1 or "gate_inp" in name:
            return None
        finer = name == "output.weight" or "attn_v" in name or "ffn_down" in name
        return quants.Q6_K if finer else quants.Q4_K

    for name, dims in tensors:
        kind = packed(name, dims)
        if kind:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            shape_of_bytes = (*dims[:-1], dims[-1] // block * size)
            writer.add_tensor_info(name, shape_of_bytes, np.dtype(np.uint8), int(np.prod(shape_of_bytes)), kind)
        else:
            number = np.dtype(np.float32 if len(dims) == 1 or "gate_inp" in name else wide)
            writer.add_tensor_info(name, dims, number, int(np.prod(dims)) * number.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(args.seed)
    for name, dims in tensors:
        kind = packed(name, dims)
        if kind:
            make = q4_k if kind == quants.Q4_K else q6_k
            writer.write_tensor_data(make(random, int(np.prod(dims)) // 256))
        elif len(dims) == 1:
            writer.write_tensor_data(np.full(dims, 0.0 if name.endswith("bias") else 1.0, dtype=np.float32))
        else:
            number = np.float32 if "gate_inp" in name else wide
            writer.write_tensor_data((random.standard_normal(dims, dtype=np.float32) * np.float32(0.02)).astype(number))
    writer.close()


if __name__ == "__main__":
    main()
