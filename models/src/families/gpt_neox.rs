//! GPT-NeoX and Pythia: a quarter of each head rotated, branches side by side behind norms of their own.

use super::{Config, FIELDS, Family, Fields, Gguf, IGNORED_MASKS, Keys, LAYER_NORM, PLAIN, Role};
use crate::Result;
use crate::packing::Packing;
use crate::spec::{Biases, Branches, ModelSpec};
use rushlight_quant::ops::{Activation, RopeLayout};

pub(super) static FAMILY: Family = Family {
    name: "gpt_neox",
    model_types: &["gpt_neox"],
    architectures: &["GPTNeoXForCausalLM"],
    from_config,
    names: &[
        (Role::Embedding, "gpt_neox.embed_in"),
        (Role::FinalNorm, "gpt_neox.final_layer_norm"),
        (Role::Head, "embed_out"),
        (Role::AttentionNorm, "gpt_neox.layers.{}.input_layernorm"),
        (Role::Qkv, "gpt_neox.layers.{}.attention.query_key_value"),
        (Role::O, "gpt_neox.layers.{}.attention.dense"),
        (Role::MlpNorm, "gpt_neox.layers.{}.post_attention_layernorm"),
        (Role::Up, "gpt_neox.layers.{}.mlp.dense_h_to_4h"),
        (Role::Down, "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    ],
    base: &[],
    gguf: Some(Gguf { architecture: "gptneox", from_keys, names: &[(Role::Qkv, "blk.{}.attn_qkv")], reordered: false }),
    ignored: IGNORED_MASKS,
    qkv: Packing::Grouped,
    ..PLAIN
};

const NEOX: Fields = Fields {
    kv_heads: "",
    head_dim: "",
    eps: "layer_norm_eps",
    rope_theta: "rope_theta|rotary_emb_base",
    norm: LAYER_NORM,
    rotated: 0.25,
    gated: false,
    ..FIELDS
};

fn side_by_side(parallel: bool) -> Branches {
    if parallel { Branches::Parallel } else { Branches::Sequential }
}

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = config.decoder_of("gpt_neox", &NEOX)?;
    let attention = config.bool_or("attention_bias", true)?;
    spec.bias = Biases { qkv: attention, output: attention, up: true, down: true, head: false };
    spec.branches = side_by_side(config.bool_or("use_parallel_residual", true)?);
    Ok(spec)
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("gpt_neox", RopeLayout::Half)?;
    keys.ungated(&mut spec);
    spec.layers.iter_mut().filter_map(|layer| layer.mlp.as_mut()).for_each(|mlp| mlp.activation = Activation::Gelu);
    spec.bias = keys.biases();
    spec.branches = side_by_side(keys.bool_opt("use_parallel_residual")?.unwrap_or(true));
    Ok(spec)
}
