//! What llama.cpp makes of GGUF files that say all there is to say, where that is not what they say. Found by running
//! such files there, as `scripts/check-families.py` runs the reference checkpoints.

use super::keys::ACTIVATION;
use super::metadata::activations;
use crate::spec::{Biases, Branches, ModelSpec, QkNorm, RopeScaling, Routing};
use rushlight_quant::ops::Activation;

/// Whether it goes so with a model in a file of an architecture.
type When = fn(&ModelSpec, &str) -> bool;

/// Why it does not read a file.
const UNREAD: &[(When, &str)] = &[
    (
        |s, a| a == "baichuan" && s.layers.len() != if s.alibi.is_some() { 40 } else { 32 },
        "knows Baichuan's models by their depth, 32 layers (7B) or 40 (13B)",
    ),
    (
        |s, a| a == "command-r" && s.qk_norm != QkNorm::None && s.layers.len() < 64,
        "looks for norms of queries and keys in models of 64 layers or more",
    ),
    (
        |s, a| {
            let direct = s.latent.as_ref().is_some_and(|l| l.query.is_none());
            a == "deepseek2" && direct && !matches!(s.layers.len(), 26 | 27)
        },
        "takes queries to have a latent vector unless there are 26 or 27 layers",
    ),
    (
        |s, a| a == "deepseek2" && s.layers.iter().any(|l| l.experts.is_some() && l.mlp.is_none()),
        "looks for experts that all tokens share",
    ),
    (
        |s, a| matches!(a, "qwen2moe" | "qwen3moe") && s.layers.iter().any(|l| l.experts.is_none()),
        "takes all layers to have experts",
    ),
    (
        |s, a| {
            let known = matches!(
                a,
                "ernie4_5"
                    | "internlm2"
                    | "qwen3"
                    | "qwen3moe"
                    | "olmo"
                    | "olmo2"
                    | "smollm3"
                    | "command-r"
                    | "gemma"
                    | "gemma2"
                    | "gemma3"
                    | "falcon"
            );
            known && s.bias != Biases::default()
        },
        "knows no biases in this architecture",
    ),
    (|s, a| matches!(a, "gptneox" | "starcoder2") && !s.bias.qkv, "looks for biases in this architecture"),
    (
        |s, a| matches!(a, "phi2" | "gptneox" | "olmo2" | "stablelm" | "qwen2moe") && s.tied_head,
        "looks for a head of its own",
    ),
    (
        |s, a| matches!(a, "gemma" | "gemma2" | "gemma3" | "command-r") && !s.tied_head,
        "knows no head beside the embedding in this architecture",
    ),
    (
        |s, a| matches!(a, "llama" | "falcon") && s.ropes.iter().any(|rope| rope.dim != s.head_dim),
        "rotates whole heads in this architecture",
    ),
    (
        |s, a| matches!(a, "qwen2" | "chatglm") && s.query_width() != s.hidden_size,
        "takes all heads together to be as wide as the model",
    ),
    (
        |s, a| {
            let stretched = |s: &RopeScaling| matches!(s, RopeScaling::Llama3 { .. } | RopeScaling::Stored);
            !matches!(a, "llama" | "granite") && s.ropes.iter().any(|rope| stretched(&rope.scaling))
        },
        "knows rotary positions stretched as Llama 3's in few architectures",
    ),
];

/// In what it reads one otherwise.
const OTHERWISE: &[(When, &str)] = &[
    (
        |s, a| a == "gemma2" && (s.attention_softcap.is_none() || s.logit_softcap.is_none()),
        "takes scores and logits to be capped",
    ),
    (
        |s, a| a == "falcon" && (s.branches == Branches::Sequential || s.alibi.is_some()),
        "knows Falcon only with rotary positions and both branches side by side",
    ),
    (
        |s, a| {
            let mut experts = s.layers.iter().filter_map(|l| l.experts.as_ref());
            let best = |e: &crate::spec::Experts| e.groups.is_some_and(|g| g.count > 1);
            a == "deepseek2" && experts.any(|e| e.routing != Routing::Sigmoid && best(e))
        },
        "chooses groups of experts by their two best, not by the best",
    ),
    (
        |s, a| {
            let factor = |scaling: &RopeScaling| match scaling {
                RopeScaling::Yarn { attention_factor, .. } => (attention_factor - 1.0).abs() > 1e-4,
                _ => false,
            };
            a == "deepseek2" && s.ropes.iter().any(|rope| factor(&rope.scaling))
        },
        "takes stretched positions not to change cosine and sine",
    ),
    (
        |s, _| {
            let bounds = |scaling: &RopeScaling| match scaling {
                RopeScaling::Yarn { beta_fast, beta_slow, .. } => (*beta_fast, *beta_slow) != (32.0, 1.0),
                _ => false,
            };
            s.ropes.iter().any(|rope| bounds(&rope.scaling))
        },
        "takes the bounds of YaRN (beta_fast, beta_slow) to be 32 and 1",
    ),
];

/// Keys that it looks for in some architectures alone, what they say, and those.
const IMPLIED: &[(&str, &str, &[&str])] = &[
    ("attention.scale", "scale of attention", &["granite"]),
    ("attention.sliding_window_pattern", "attention windows", &["gemma3"]),
    ("expert_weights_norm", "weights of experts", &["deepseek2"]),
    (ACTIVATION, "activation", &[]),
];

/// A sentence for each thing about the model `spec` in a file of `architecture` that `has` such keys; `usual` is what a
/// file without optional keys would say.
pub(super) fn notes(
    spec: &ModelSpec,
    usual: &ModelSpec,
    architecture: &str,
    has: impl Fn(&str) -> bool,
) -> Vec<String> {
    // It has one GELU for both kinds.
    let gelu = |s: &ModelSpec| activations(s).all(|a| matches!(a, Activation::Gelu | Activation::GeluTanh));
    let same = |name: &str| name == ACTIVATION && gelu(spec) && gelu(usual);
    let implied = IMPLIED.iter().filter(|(name, _, known)| has(name) && !known.contains(&architecture) && !same(name));
    let applying = |cases: &'static [(When, &str)]| cases.iter().filter(|(when, _)| when(spec, architecture));
    let unread: Vec<_> =
        applying(UNREAD).map(|(_, why)| format!("llama.cpp does not read this file: it {why}")).collect();
    if !unread.is_empty() {
        return unread;
    }
    implied
        .map(|(_, what, _)| format!("takes the {what} that is usual for the architecture"))
        .chain(applying(OTHERWISE).map(|(_, why)| why.to_string()))
        .map(|why| format!("llama.cpp reads this file otherwise: it {why}"))
        .collect()
}
