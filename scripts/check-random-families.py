#!/usr/bin/env python3
"""Makes small random models of every family with transformers, in many shapes and with many options, and compares logits.

    check-random-families.py [--rushlight target/release/rushlight] [--count 12] [--seed 1] [--family NAME]... [--gguf]
                             [--keep DIR] [-v]

Each model is a Hugging Face directory of 32-bit floats whose config.json is what transformers read, so that both sides go
by the same fields. A model may be refused, with a reason; what is taken must give the same logits, as a prompt and token by
token, within 1e-3 of the largest. With --gguf each is converted too and its file compared alike. Without torch and
transformers the check is skipped, and says so. Exit status: 0 agreed or skipped, 1 not.
"""

import argparse
import collections
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
ROOM = 1e-3


def shape(draw, own_head=False, grouped=True):
    """The fields that llama's configuration has and most families kept."""
    heads = draw.choice([1, 2, 3, 4, 6])
    head = draw.choice([8, 16, 24, 32])
    kv = draw.choice([n for n in range(1, heads + 1) if heads % n == 0]) if grouped else heads
    fields = {
        "hidden_size": heads * head,
        "intermediate_size": draw.choice([40, 96, 130]),
        "num_hidden_layers": draw.choice([1, 2, 3, 5]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": draw.choice([1e-5, 1e-6, 1e-3]),
        "rope_theta": draw.choice([10000.0, 500000, 1e6]),
        "vocab_size": draw.choice([97, 128, 300]),
        "tie_word_embeddings": draw.random() < 0.4,
    }
    if own_head:
        fields["head_dim"] = head
        if draw.random() < 0.5:
            fields["hidden_size"] = draw.choice([48, 64, 100])
    return fields


def head_dim(fields):
    return fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]


def stretch(draw, fields, kinds="linear dynamic yarn llama3", names="rope_type type"):
    """Gives a half of the models a scaling of rotary positions."""
    kind = draw.choice(kinds.split() + ["none"] * len(kinds.split()))
    name = draw.choice(names.split())
    if kind == "none":
        if draw.random() < 0.5:
            fields["rope_scaling"] = None
        return fields
    scaling = {name: kind, "factor": draw.choice([2.0, 4.0, 8.0])}
    if kind == "dynamic":
        fields["max_position_embeddings"] = draw.choice([16, 24])
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 32
        extra = {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.3, "truncate": False}
        scaling |= {k: v for k, v in extra.items() if draw.random() < 0.3}
        if draw.random() < 0.2:
            scaling |= {"mscale": 1.0, "mscale_all_dim": 0.7}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        pairs = int(head_dim(fields) * fields.get("partial_rotary_factor", 1.0)) // 2
        del scaling["factor"]
        scaling |= {side: [round(draw.uniform(1, 4), 3) for _ in range(pairs)] for side in ["short_factor", "long_factor"]}
        fields["original_max_position_embeddings"] = 24
        scaling["type"] = scaling.pop(name)
    fields["rope_scaling"] = scaling
    return fields


def maybe(draw, fields, **options):
    """Sets some of `options`, each to one of its values; what is left out is what the family takes by default."""
    for name, values in options.items():
        if draw.random() < 0.6:
            fields[name] = draw.choice(values)
    return fields


BOTH = [True, False]


def llama(draw):
    return maybe(draw, stretch(draw, shape(draw, draw.random() < 0.5)), attention_bias=BOTH, mlp_bias=BOTH)


def mistral(draw):
    fields = stretch(draw, shape(draw, True))
    return fields | {"sliding_window": draw.choice([None, 5, 9])}


def mixtral(draw):
    fields = maybe(draw, stretch(draw, shape(draw, True)), sliding_window=[None, 7])
    count = draw.choice([1, 3, 8])
    return fields | {"num_local_experts": count, "num_experts_per_tok": draw.randint(1, count)}


def windows(draw, fields, types=True):
    maybe(draw, fields, use_sliding_window=BOTH, sliding_window=[5, 9], max_window_layers=[0, 1, 2])
    if types and fields.get("use_sliding_window") and draw.random() < 0.4:
        kinds = ["full_attention", "sliding_attention"]
        fields["layer_types"] = [draw.choice(kinds) for _ in range(fields["num_hidden_layers"])]
    return fields


def qwen2(draw):
    return windows(draw, stretch(draw, shape(draw)))


def mixture(draw, fields):
    count = draw.choice([2, 5, 8])
    fields |= {"num_experts": count, "num_experts_per_tok": draw.randint(1, min(count, 4))}
    fields |= {"moe_intermediate_size": draw.choice([24, 48])}
    return maybe(draw, fields, decoder_sparse_step=[1, 2], norm_topk_prob=BOTH, mlp_only_layers=[[], [0], [1]])


def qwen2_moe(draw):
    fields = mixture(draw, windows(draw, stretch(draw, shape(draw)), False))
    fields["shared_expert_intermediate_size"] = draw.choice([24, 56])
    return maybe(draw, fields, qkv_bias=BOTH)


def qwen3(draw):
    return maybe(draw, windows(draw, stretch(draw, shape(draw, True))), attention_bias=BOTH)


def qwen3_moe(draw):
    return maybe(draw, mixture(draw, windows(draw, stretch(draw, shape(draw, True)), False)), attention_bias=BOTH)


def gemma(draw):
    fields = shape(draw, True) | {"hidden_act": "gelu_pytorch_tanh"}
    del fields["tie_word_embeddings"]
    return fields


def gemma2(draw):
    fields = gemma(draw) | {"hidden_activation": draw.choice(["gelu_pytorch_tanh", "gelu"])}
    del fields["hidden_act"]
    maybe(draw, fields, attn_logit_softcapping=[None, 4.0], final_logit_softcapping=[None, 3.0], sliding_window=[5, 9])
    return maybe(draw, fields, query_pre_attn_scalar=[8, 40], tie_word_embeddings=BOTH)


def gemma3(draw):
    fields = stretch(draw, gemma2(draw), "linear linear", "rope_type")
    fields.pop("attn_logit_softcapping", None)
    fields["num_hidden_layers"] = draw.choice([2, 7])
    if draw.random() < 0.3:
        kinds = ["full_attention", "sliding_attention"]
        fields["layer_types"] = [draw.choice(kinds) for _ in range(fields["num_hidden_layers"])]
    else:
        maybe(draw, fields, sliding_window_pattern=[2, 3])
    if draw.random() < 0.3:
        del fields["rope_theta"]
    return maybe(draw, fields, rope_local_base_freq=[10000.0, 5000.0])


def phi(draw):
    fields = maybe(draw, shape(draw), partial_rotary_factor=[0.25, 0.5, 1.0], qk_layernorm=BOTH)
    stretch(draw, fields, "linear")
    fields |= {"layer_norm_eps": fields.pop("rms_norm_eps"), "hidden_act": draw.choice(["gelu_new", "gelu"])}
    return fields | {"tie_word_embeddings": False}


def phi3(draw):
    fields = maybe(draw, shape(draw), partial_rotary_factor=[0.5, 0.75], sliding_window=[None, 9])
    return stretch(draw, fields, "longrope")


def glm(draw):
    return maybe(draw, shape(draw, True), partial_rotary_factor=[0.25, 0.5, 1.0], attention_bias=BOTH)


def latent(draw):
    fields = shape(draw, grouped=False)
    fields |= {"q_lora_rank": draw.choice([None, 20, 32]), "kv_lora_rank": draw.choice([16, 24])}
    fields |= {"qk_nope_head_dim": draw.choice([8, 16]), "qk_rope_head_dim": draw.choice([4, 8])}
    fields |= {"v_head_dim": draw.choice([8, 20]), "num_experts_per_tok": draw.randint(1, 4)}
    fields |= {"n_routed_experts": 8, "moe_intermediate_size": 24, "first_k_dense_replace": draw.choice([0, 1])}
    fields |= {"n_shared_experts": draw.choice([1, 2]), "routed_scaling_factor": draw.choice([1.0, 2.5])}
    return maybe(draw, fields, attention_bias=BOTH)


def deepseek_v2(draw):
    # Transformers has no part of DeepSeek's scale of attention for stretched positions in its version of V2.
    fields = stretch(draw, latent(draw), "linear")
    if draw.random() < 0.5:
        fields |= {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": draw.choice([2, 3])}
    return maybe(draw, fields, mlp_bias=BOTH)


def deepseek_v3(draw):
    fields = latent(draw) | {"n_group": draw.choice([1, 2, 4]), "norm_topk_prob": draw.choice(BOTH)}
    fields["topk_group"] = draw.randint((fields["num_experts_per_tok"] * fields["n_group"] + 7) // 8, fields["n_group"])
    stretch(draw, fields, "yarn")
    return maybe(draw, fields, rope_interleave=BOTH)


def gpt_oss(draw):
    fields = shape(draw, True) | {"num_local_experts": draw.choice([2, 4]), "num_experts_per_tok": draw.choice([1, 2])}
    fields |= {"sliding_window": draw.choice([5, 9]), "rope_scaling": None}
    if draw.random() < 0.5:
        stretch(draw, fields, "yarn")
    if draw.random() < 0.3:
        kinds = ["full_attention", "sliding_attention"]
        fields["layer_types"] = [draw.choice(kinds) for _ in range(fields["num_hidden_layers"])]
    return fields


def old(draw):
    plain = shape(draw)
    names = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    fields = {new: plain[name] for name, new in names.items()}
    fields |= {"n_positions": 128, "vocab_size": plain["vocab_size"], "n_inner": draw.choice([None, 72])}
    fields |= {"layer_norm_epsilon": plain["rms_norm_eps"]}
    return fields | {"activation_function": draw.choice(["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])}


def gpt2(draw):
    return maybe(draw, old(draw), scale_attn_by_inverse_layer_idx=BOTH, scale_attn_weights=BOTH, tie_word_embeddings=BOTH)


def gpt_bigcode(draw):
    return maybe(draw, old(draw), multi_query=BOTH, scale_attn_weights=BOTH)


def gptj(draw):
    fields = old(draw)
    fields["rotary_dim"] = draw.choice([4, fields["n_embd"] // fields["n_head"]])
    return fields


def gpt_neox(draw):
    fields = shape(draw, grouped=False)
    del fields["num_key_value_heads"], fields["rope_theta"]
    fields |= {"layer_norm_eps": fields.pop("rms_norm_eps"), "hidden_act": draw.choice(["gelu", "gelu_fast", "gelu_new"])}
    maybe(draw, fields, rotary_pct=[0.25, 0.5, 1.0], rotary_emb_base=[10000, 50000], use_parallel_residual=BOTH)
    return stretch(draw, maybe(draw, fields, attention_bias=BOTH), "linear dynamic")


def starcoder2(draw):
    fields = stretch(draw, shape(draw))
    fields |= {"norm_epsilon": fields.pop("rms_norm_eps"), "hidden_act": draw.choice(["gelu_pytorch_tanh", "gelu"])}
    return maybe(draw, fields, use_bias=BOTH, sliding_window=[None, 7])


def falcon(draw):
    fields = stretch(draw, shape(draw), "linear")
    kv = fields.pop("num_key_value_heads")
    for name in ["rms_norm_eps", "hidden_act", "intermediate_size"]:
        fields.pop(name)
    fields["layer_norm_epsilon"] = 1e-5
    maybe(draw, fields, bias=BOTH, ffn_hidden_size=[70, 120], activation=["gelu", "relu"], parallel_attn=BOTH)
    if draw.random() < 0.3:
        fields["alibi"] = True
    if draw.random() < 0.5:
        fields |= {"new_decoder_architecture": True, "num_kv_heads": kv, "parallel_attn": True}
        return maybe(draw, fields, num_ln_in_parallel_attn=[1, 2, None])
    return maybe(draw, fields, multi_query=BOTH)


def bloom(draw):
    plain = shape(draw)
    fields = {"n_layer": plain["num_hidden_layers"], "n_head": plain["num_attention_heads"]}
    fields |= {name: plain[name] for name in ["hidden_size", "vocab_size"]} | {"layer_norm_epsilon": 1e-5}
    return maybe(draw, fields, apply_residual_connection_post_layernorm=BOTH)


def olmo(draw):
    fields = stretch(draw, shape(draw), "linear dynamic", "type")
    maybe(draw, fields, attention_bias=BOTH, clip_qkv=[None, 0.7])
    del fields["rms_norm_eps"]
    return fields


def olmo2(draw):
    return maybe(draw, stretch(draw, shape(draw), "linear dynamic", "type"), attention_bias=BOTH)


def smollm3(draw):
    fields = stretch(draw, shape(draw))
    if draw.random() < 0.4:
        fields["no_rope_layers"] = [draw.choice([0, 1]) for _ in range(fields["num_hidden_layers"])]
    windows(draw, fields)
    return maybe(draw, fields, no_rope_layer_interval=[2, 3], attention_bias=BOTH, mlp_bias=BOTH)


def granite(draw):
    fields = stretch(draw, shape(draw), names="rope_type")
    fields |= {"attention_multiplier": draw.choice([0.1, 0.3]), "embedding_multiplier": draw.choice([1.0, 6.0])}
    fields |= {"logits_scaling": draw.choice([1.0, 3.0]), "residual_multiplier": draw.choice([1.0, 0.4])}
    return maybe(draw, fields, attention_bias=BOTH, mlp_bias=BOTH)


def cohere(draw):
    fields = shape(draw)
    fields |= {"layer_norm_eps": fields.pop("rms_norm_eps")}
    return maybe(draw, fields, use_qk_norm=BOTH, logit_scale=[0.0625, 0.5], attention_bias=BOTH)


def stablelm(draw):
    fields = shape(draw)
    fields |= {"layer_norm_eps": fields.pop("rms_norm_eps")}
    options = {"use_qkv_bias": BOTH, "partial_rotary_factor": [0.25, 0.5], "qk_layernorm": BOTH}
    return maybe(draw, fields, use_parallel_residual=BOTH, **options)


def ernie4_5(draw):
    fields = stretch(draw, shape(draw, True))
    if draw.random() < 0.3:
        del fields["rope_theta"]
    return maybe(draw, fields, use_bias=BOTH)


def helium(draw):
    fields = maybe(draw, shape(draw), attention_bias=BOTH, mlp_bias=BOTH)
    if draw.random() < 0.3:
        del fields["rope_theta"]
    return fields | {"head_dim": head_dim(fields)}


FAMILIES = [llama, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe, gemma, gemma2, gemma3, phi, phi3, glm,
            deepseek_v2, deepseek_v3, gpt_oss, gpt2, gpt_bigcode, gptj, gpt_neox, starcoder2, falcon, bloom, olmo, olmo2,
            smollm3, granite, cohere, stablelm, ernie4_5, helium]


def generators():
    each = {make.__name__: make for make in FAMILIES}
    each["gemma3_text"] = each.pop("gemma3")
    each["glm4"] = glm
    return each


def renamed(fields):
    """The same as transformers 5 writes it: what rotary positions need is in rope_parameters."""
    new = dict(fields)
    parameters = dict(new.pop("rope_scaling", None) or {})
    if "type" in parameters:
        parameters["rope_type"] = parameters.pop("type")
    parameters.setdefault("rope_type", "default")
    for name, there in [("rope_theta",) * 2, ("rotary_emb_base", "rope_theta"), ("partial_rotary_factor",) * 2,
                        ("rotary_pct", "partial_rotary_factor")]:
        if name in new:
            parameters[there] = new.pop(name)
    if new["model_type"] == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": new.pop("rope_local_base_freq", 10000.0)}
        parameters.setdefault("rope_theta", 1e6)
        parameters = {"full_attention": parameters, "sliding_attention": local}
    new["rope_parameters"] = parameters
    return new


def write_model(fields, folder, seed):
    """Writes a random model with this configuration and returns it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, StableLmPreTrainedModel

    # It fails on norms without a bias; torch's own values do as well.
    StableLmPreTrainedModel._init_weights = lambda self, module: None
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields, indent=1))
    config = AutoConfig.from_pretrained(folder)
    config.attn_implementation = "eager"
    torch.manual_seed(seed)
    # Plain attention adds Falcon's ALiBi twice.
    attention = "sdpa" if fields.get("alibi") else "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 or name.endswith(("layernorm.weight", "norm.weight", "bias")) and p.dim() < 3:
                # What is 1 or 0 by default, so that a wrong default shows.
                base = torch.zeros_like(p) if "sinks" in name or not torch.isfinite(p).all() else p
                p.copy_(base + 0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (0.7 if "embed" in name or "wte" in name else p.shape[-1] ** -0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # Where a score is below 0, its place is taken by an expert of another group there, which is a slip.
                buffer.copy_(0.1 * torch.rand_like(buffer))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields, indent=1))
    return model


def rushlight(program, *arguments):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr}")
    return done


def differences(program, path, ids, want, step):
    """The largest difference of logits, relative to the largest logit; or why the model is refused."""
    import torch

    arguments = ["logits", path, "--all", "--json", "--ids", ",".join(map(str, ids))] + ["--step"] * step
    done = rushlight(program, *arguments)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    got = torch.tensor([p["logits"] for p in json.loads(done.stdout)["positions"]], dtype=torch.float64)
    want = want.double() - want.double().mean(-1, keepdim=True)
    got = got - got.mean(-1, keepdim=True)
    return float((got - want).abs().max() / max(1.0, want.abs().max()))


def check(args, name, make, seed, folder):
    """Compares one model; returns what came out: a list of (where, number or reason)."""
    import torch

    draw = random.Random(f"{name} {seed}")
    fields = {"model_type": name, "pad_token_id": None} | make(draw)
    try:
        model = write_model(fields, folder, seed)
        texts = [[draw.randrange(fields["vocab_size"]) for _ in range(length)] for length in [5, 37]]
        with torch.no_grad():
            wants = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in texts]
    except Exception as error:
        return fields, [("reference", f"{type(error).__name__}: {error}")]
    if draw.random() < 0.25:
        fields = renamed(fields)
        (folder / "config.json").write_text(json.dumps(fields, indent=1))
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    growing = scaling.get("rope_type", scaling.get("type")) in ("dynamic", "longrope")
    results = []
    places = [("directory", folder)]
    if args.gguf:
        file = folder / "model.gguf"
        done = rushlight(args.rushlight, "quantize", folder, "-o", file, "--type", "F32")
        if done.returncode:
            results.append(("gguf", done.stderr.strip().splitlines()[-1]))
        elif "cannot say" in done.stderr:
            notes = [line for line in done.stderr.splitlines() if "cannot say" in line]
            results.append(("gguf", notes[0]))
        else:
            places.append(("gguf", file))
    for ids, want in zip(texts, wants):
        length = len(ids)
        if not torch.isfinite(want).all():
            return fields, [("reference", "not finite")]
        for place, path in places:
            results.append((f"{place}, {length} tokens", differences(args.rushlight, path, ids, want, False)))
            if length == 37 and not growing:
                results.append((f"{place}, one by one", differences(args.rushlight, path, ids, want, True)))
    return fields, results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rushlight", default="target/release/rushlight")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--family", action="append")
    parser.add_argument("--gguf", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"skipped: {error.name} is not installed")
        return 0
    torch.set_num_threads(1)
    failed = 0
    for name, make in generators().items():
        if args.family and name not in args.family:
            continue
        worst, agreed, refused, bad = 0.0, 0, collections.Counter(), []
        for seed in range(args.seed, args.seed + args.count):
            with tempfile.TemporaryDirectory(dir=args.keep) as folder:
                fields, results = check(args, name, make, seed, Path(folder) / "model")
            numbers = [r for _, r in results if isinstance(r, float)]
            for place, result in results:
                if isinstance(result, str):
                    refused[(place.split(",")[0], re.sub(r"\S*/tmp\S*: ", "", result)[:150])] += 1
                elif not result <= ROOM:
                    bad.append((seed, place, result, fields))
            agreed += bool(numbers)
            worst = max([worst, *numbers])
        failed += bool(bad)
        print(f"{name}: {agreed} of {args.count} models taken, off by {worst:.1e} at most{'  DIFFERENT' if bad else ''}")
        for (place, reason), n in refused.items():
            print(f"    {place}: refused {n} times: {reason}")
        for seed, place, result, fields in bad if args.verbose else bad[:3]:
            print(f"    seed {seed}, {place}: off by {result:.2e}: {json.dumps(fields)}")
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
