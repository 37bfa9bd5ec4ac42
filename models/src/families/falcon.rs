//! Falcon: one key head (7B), key heads with norms of their own for each branch (40B), or ALiBi (RW).

use super::{ALL, Config, Defaults, FIELDS, Family, Fields, Gguf, Keys, LAYER_NORM, PLAIN, Role};
use crate::Result;
use crate::packing::Packing;
use crate::spec::{Alibi, Biases, Branches, ModelSpec};
use rushlight_quant::ops::{Activation, RopeLayout};

pub(super) static FAMILY: Family = Family {
    name: "falcon",
    model_types: &["falcon", "RefinedWeb", "RefinedWebModel"],
    architectures: &["FalconForCausalLM", "RWForCausalLM"],
    from_config,
    names: &[
        (Role::Embedding, "transformer.word_embeddings"),
        (Role::FinalNorm, "transformer.ln_f"),
        (Role::Head, "lm_head"),
        (Role::AttentionNorm, "transformer.h.{}.input_layernorm"),
        (Role::AttentionNorm, "transformer.h.{}.ln_attn"),
        (Role::Qkv, "transformer.h.{}.self_attention.query_key_value"),
        (Role::O, "transformer.h.{}.self_attention.dense"),
        (Role::MlpNorm, "transformer.h.{}.post_attention_layernorm"),
        (Role::MlpNorm, "transformer.h.{}.ln_mlp"),
        (Role::Up, "transformer.h.{}.mlp.dense_h_to_4h"),
        (Role::Down, "transformer.h.{}.mlp.dense_4h_to_h"),
    ],
    base: &[],
    gguf: Some(GGUF),
    qkv: Packing::Grouped,
    ..PLAIN
};

/// `attn_norm` is the norm of both branches, or the MLP's where attention has one of its own, or attention's where the MLP has.
const GGUF: Gguf = Gguf {
    architecture: "falcon",
    from_keys,
    names: &[
        (Role::AttentionNorm, "blk.{}.attn_norm_2"),
        (Role::AttentionNorm, "blk.{}.attn_norm"),
        (Role::MlpNorm, "blk.{}.ffn_norm"),
        (Role::MlpNorm, "blk.{}.attn_norm"),
        (Role::Qkv, "blk.{}.attn_qkv"),
    ],
    reordered: false,
};

const FALCON: Fields = Fields {
    heads: "num_attention_heads|n_head",
    kv_heads: "",
    head_dim: "",
    layers: "num_hidden_layers|n_layer",
    activation: "activation",
    width: "ffn_hidden_size",
    eps: "layer_norm_epsilon",
    tied: true,
    norm: LAYER_NORM,
    gated: false,
    or: Defaults { context: Some(2048), activation: Some(Activation::Gelu), widths: Some(4), ..ALL },
    ..FIELDS
};

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = config.decoder_of("falcon", &FALCON)?;
    let new = config.bool_or("new_decoder_architecture", false)?;
    if new {
        spec.kv_heads = config.usize_opt("num_kv_heads|n_head_kv")?.unwrap_or(spec.heads);
    } else if config.bool_or("multi_query", true)? {
        spec.kv_heads = 1;
    }
    let norms = config.usize_opt("num_ln_in_parallel_attn")?.unwrap_or(if new { 2 } else { 1 });
    spec.branches = match config.bool_or("parallel_attn", true)? || new {
        true if new && norms == 2 => Branches::Parallel,
        true => Branches::ParallelShared,
        false => Branches::Sequential,
    };
    let bias = config.bool_or("bias", false)?;
    spec.bias = Biases { qkv: bias, output: bias, up: bias, down: bias, head: false };
    if config.bool_or("alibi", false)? {
        use_distances(&mut spec);
    }
    Ok(spec)
}

fn use_distances(spec: &mut ModelSpec) {
    let mut alibi = Alibi { rounded: Some(spec.attention_scale), ..Alibi::new(spec.heads) };
    alibi.slopes.iter_mut().for_each(|slope| *slope = half::bf16::from_f32(*slope).to_f32());
    spec.alibi = Some(alibi);
    spec.layers.iter_mut().for_each(|layer| layer.rope = None);
    spec.ropes.clear();
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("falcon", RopeLayout::Half)?;
    keys.ungated(&mut spec);
    spec.layers.iter_mut().filter_map(|layer| layer.mlp.as_mut()).for_each(|mlp| mlp.activation = Activation::Gelu);
    spec.branches = match keys.has_tensor("blk.0.attn_norm_2.weight") {
        true => Branches::Parallel,
        false if keys.has(Role::MlpNorm) => Branches::Sequential,
        false => Branches::ParallelShared,
    };
    spec.bias = keys.biases();
    if keys.f32_opt("attention.max_alibi_bias")?.is_some_and(|bias| bias > 0.0) {
        use_distances(&mut spec);
    }
    Ok(spec)
}
