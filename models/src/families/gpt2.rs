//! GPT-2: learned positions, matrices stored as `[inputs, outputs]`.

use super::{Config, Family, GPT_FIELDS, Gguf, IGNORED_MASKS, Keys, Names, PLAIN, Role};
use crate::Result;
use crate::spec::{Biases, ModelSpec};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "gpt2",
    model_types: &["gpt2"],
    architectures: &["GPT2LMHeadModel"],
    from_config: |config| by_depth(config, from_config(config, "gpt2")?),
    names: NAMES,
    base: &[],
    gguf: Some(Gguf { architecture: "gpt2", from_keys, names: &[(Role::Qkv, "blk.{}.attn_qkv")], reordered: false }),
    ignored: IGNORED_MASKS,
    transposed: &[Role::Qkv, Role::O, Role::Up, Role::Down],
    ..PLAIN
};

pub(super) const NAMES: Names = &[
    (Role::Embedding, "transformer.wte"),
    (Role::Positions, "transformer.wpe"),
    (Role::FinalNorm, "transformer.ln_f"),
    (Role::Head, "lm_head"),
    (Role::AttentionNorm, "transformer.h.{}.ln_1"),
    (Role::Qkv, "transformer.h.{}.attn.c_attn"),
    (Role::O, "transformer.h.{}.attn.c_proj"),
    (Role::MlpNorm, "transformer.h.{}.ln_2"),
    (Role::Up, "transformer.h.{}.mlp.c_fc"),
    (Role::Down, "transformer.h.{}.mlp.c_proj"),
];

const BIAS: Biases = Biases { qkv: true, output: true, up: true, down: true, head: false };

pub(super) fn from_config(config: &Config<'_>, family: &'static str) -> Result<ModelSpec> {
    config.only("add_cross_attention", false)?;
    let mut spec = learned(ModelSpec { bias: BIAS, ..config.decoder_of(family, &GPT_FIELDS)? });
    if !config.bool_or("scale_attn_weights", true)? {
        spec.attention_scale = 1.0;
    }
    Ok(spec)
}

/// Some models make attention's scores smaller from layer to layer.
fn by_depth(config: &Config<'_>, mut spec: ModelSpec) -> Result<ModelSpec> {
    if config.bool_or("scale_attn_by_inverse_layer_idx", false)? {
        spec.layers.iter_mut().enumerate().for_each(|(i, layer)| layer.attention_scale = 1.0 / (i + 1) as f32);
    }
    Ok(spec)
}

fn learned(mut spec: ModelSpec) -> ModelSpec {
    spec.learned_positions = Some(spec.context_length);
    spec.layers.iter_mut().for_each(|layer| layer.rope = None);
    spec.ropes.clear();
    spec
}

pub(super) fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("gpt2", RopeLayout::Half)?;
    keys.ungated(&mut spec);
    Ok(learned(ModelSpec { bias: BIAS, ..spec }))
}
