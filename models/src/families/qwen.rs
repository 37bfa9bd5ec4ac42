//! The first Qwen: packed queries, keys and values, logn attention and a rotary base that grows with the prompt.

use super::{ALL, Config, Defaults, FIELDS, Family, Fields, Gguf, Keys, PLAIN, Role};
use crate::Result;
use crate::spec::{Biases, ModelSpec, RopeScaling};
use rushlight_quant::ops::{Activation, RopeLayout};

pub(super) static FAMILY: Family = Family {
    name: "qwen",
    model_types: &["qwen"],
    architectures: &["QWenLMHeadModel"],
    from_config,
    names: &[
        (Role::Embedding, "transformer.wte"),
        (Role::FinalNorm, "transformer.ln_f"),
        (Role::Head, "lm_head"),
        (Role::AttentionNorm, "transformer.h.{}.ln_1"),
        (Role::Qkv, "transformer.h.{}.attn.c_attn"),
        (Role::O, "transformer.h.{}.attn.c_proj"),
        (Role::MlpNorm, "transformer.h.{}.ln_2"),
        (Role::Gate, "transformer.h.{}.mlp.w2"),
        (Role::Up, "transformer.h.{}.mlp.w1"),
        (Role::Down, "transformer.h.{}.mlp.c_proj"),
    ],
    base: &[],
    gguf: Some(Gguf { architecture: "qwen", from_keys, names: &[(Role::Qkv, "blk.{}.attn_qkv")], reordered: false }),
    ..PLAIN
};

const QWEN: Fields = Fields {
    head_dim: "kv_channels",
    eps: "layer_norm_epsilon",
    rope_theta: "rotary_emb_base",
    activation: "",
    or: Defaults { activation: Some(Activation::Silu), ..ALL },
    ..FIELDS
};

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = config.decoder_of("qwen", &QWEN)?;
    config.only("no_bias", true)?;
    config.only("scale_attn_weights", true)?;
    spec.bias = Biases { qkv: true, ..Biases::default() };
    for mlp in spec.layers.iter_mut().filter_map(|layer| layer.mlp.as_mut()) {
        mlp.width /= 2;
    }
    let trained = config.usize("seq_length")?;
    if config.bool_or("use_dynamic_ntk", true)? {
        spec.ropes[0].scaling = RopeScaling::DynamicSteps { original_context: trained };
    }
    if config.bool_or("use_logn_attn", true)? {
        spec.logn = Some(trained);
    }
    Ok(spec)
}

/// Files have neither logn attention nor a growing base, which only sequences beyond the trained length need; and they
/// count both halves of the MLP.
fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("qwen", RopeLayout::Half)?;
    spec.bias = Biases { qkv: true, ..Biases::default() };
    for mlp in spec.layers.iter_mut().filter_map(|layer| layer.mlp.as_mut()) {
        mlp.width /= 2;
    }
    Ok(spec)
}
