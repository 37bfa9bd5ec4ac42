//! Gemma 1 to 3 (text): norms that store their weight less 1, scaled embeddings, GELU gates; from the second on also
//! norms behind the branches and windows in turn.

use super::{ALL, Config, Defaults, FIELDS, Family, Fields, Gguf, Keys, PLAIN, Role};
use crate::Result;
use crate::spec::{Biases, ModelSpec, Placement, QkNorm, Rope, RopeScaling};
use rushlight_quant::ops::{Activation, RopeLayout};

pub(super) static FAMILY: Family = Family {
    name: "gemma",
    model_types: &["gemma"],
    architectures: &["GemmaForCausalLM"],
    from_config,
    gguf: Some(Gguf { architecture: "gemma", from_keys, names: &[], reordered: false }),
    ..PLAIN
};

pub(super) static GEMMA2: Family = Family {
    name: "gemma2",
    model_types: &["gemma2"],
    architectures: &["Gemma2ForCausalLM"],
    from_config: second_from_config,
    names: FOUR_NORMS,
    gguf: Some(Gguf { architecture: "gemma2", from_keys: second_from_keys, names: &[], reordered: false }),
    ..PLAIN
};

pub(super) static GEMMA3: Family = Family {
    name: "gemma3",
    model_types: &["gemma3_text"],
    architectures: &["Gemma3ForCausalLM"],
    from_config: third_from_config,
    names: FOUR_NORMS,
    gguf: Some(Gguf { architecture: "gemma3", from_keys: third_from_keys, names: &[], reordered: false }),
    ..PLAIN
};

const FOUR_NORMS: super::Names = &[
    (Role::AttentionPostNorm, "model.layers.{}.post_attention_layernorm"),
    (Role::MlpNorm, "model.layers.{}.pre_feedforward_layernorm"),
    (Role::MlpPostNorm, "model.layers.{}.post_feedforward_layernorm"),
];

const GEMMA: Fields = Fields {
    activation: "hidden_activation",
    tied: true,
    or: Defaults { activation: Some(Activation::GeluTanh), ..ALL },
    ..FIELDS
};
const GEMMA_3: Fields = Fields { local_rope: true, or: Defaults { rope_theta: 1e6, ..GEMMA.or }, ..GEMMA };

fn common(mut spec: ModelSpec) -> ModelSpec {
    spec.embedding_scale = (spec.hidden_size as f32).sqrt();
    spec
}

fn with_offset(config: &Config<'_>, fields: &Fields) -> Result<ModelSpec> {
    let bias = config.bool_or("attention_bias", false)?;
    let mut spec = common(config.decoder_of("gemma", fields)?);
    spec.bias = Biases { qkv: bias, output: bias, ..Biases::default() };
    spec.norm.weight_offset = 1.0;
    Ok(spec)
}

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = with_offset(config, &Fields { activation: "hidden_activation|hidden_act", ..GEMMA })?;
    // The oldest configurations say gelu; the models were trained with the tanh approximation.
    for mlp in spec.layers.iter_mut().filter_map(|l| l.mlp.as_mut()).filter(|m| m.activation == Activation::Gelu) {
        mlp.activation = Activation::GeluTanh;
    }
    Ok(spec)
}

fn with_four_norms(config: &Config<'_>, family: &'static str, fields: &Fields) -> Result<ModelSpec> {
    let mut spec = ModelSpec { family, placement: Placement::Both, ..with_offset(config, fields)? };
    spec.attention_scale = config.f32_opt("query_pre_attn_scalar")?.unwrap_or(256.0).powf(-0.5);
    spec.logit_softcap = config.f32_opt("final_logit_softcapping")?;
    Ok(spec)
}

fn second_from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = with_four_norms(config, "gemma2", &GEMMA)?;
    // What is left out is capped; null is not. The third generation has the field for attention too, but does not go by it.
    spec.attention_softcap = config.f32_opt("attn_logit_softcapping")?;
    spec.attention_softcap = spec.attention_softcap.or((!config.has("attn_logit_softcapping")).then_some(50.0));
    spec.logit_softcap = spec.logit_softcap.or((!config.has("final_logit_softcapping")).then_some(30.0));
    config.slide(&mut spec, Some(4096), |layer| layer % 2 == 0)?;
    Ok(spec)
}

fn third_from_config(config: &Config<'_>) -> Result<ModelSpec> {
    config.only("use_bidirectional_attention", false)?;
    let mut spec = ModelSpec { qk_norm: QkNorm::Head, ..with_four_norms(config, "gemma3", &GEMMA_3)? };
    let pattern = config.usize_opt("sliding_window_pattern|_sliding_window_pattern")?.unwrap_or(6).max(1);
    config.slide(&mut spec, Some(4096), |layer| (layer + 1) % pattern != 0)?;
    let local = config.local_theta()?.unwrap_or(10000.0);
    turn_windows(&mut spec, local);
    Ok(spec)
}

/// Layers with a window turn by the base `local`, unscaled.
fn turn_windows(spec: &mut ModelSpec, local: f32) {
    spec.ropes.push(Rope { theta: local, scaling: RopeScaling::None, ..spec.ropes[0].clone() });
    spec.layers.iter_mut().filter(|layer| layer.window.is_some()).for_each(|layer| layer.rope = Some(1));
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = common(keys.decoder("gemma", RopeLayout::Half)?);
    spec.layers.iter_mut().filter_map(|layer| layer.mlp.as_mut()).for_each(|mlp| mlp.activation = Activation::GeluTanh);
    spec.bias = keys.biases();
    Ok(spec)
}

/// Only the largest of each generation divide by another number than the width of a head.
fn scale(spec: &ModelSpec, largest: usize) -> f32 {
    let by = if spec.layers.len() == largest { spec.hidden_size / spec.heads } else { spec.head_dim };
    (by as f32).powf(-0.5)
}

fn second_from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = ModelSpec { family: "gemma2", placement: Placement::Both, ..from_keys(keys)? };
    spec.attention_scale = keys.f32_opt("attention.scale")?.unwrap_or(scale(&spec, 46));
    // 0 is none.
    let cap = |name: &str, usual: f32| Ok(Some(keys.f32_opt(name)?.unwrap_or(usual)).filter(|&cap| cap != 0.0));
    spec.attention_softcap = cap("attn_logit_softcapping", 50.0)?;
    spec.logit_softcap = cap("final_logit_softcapping", 30.0)?;
    keys.slide(&mut spec, Some(4096), |layer| layer % 2 == 0)?;
    Ok(spec)
}

fn third_from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let (placement, qk_norm) = (Placement::Both, QkNorm::Head);
    let mut spec = ModelSpec { family: "gemma3", placement, qk_norm, ..from_keys(keys)? };
    spec.attention_scale = keys.f32_opt("attention.scale")?.unwrap_or(scale(&spec, 62));
    spec.logit_softcap = keys.f32_opt("final_logit_softcapping")?.filter(|&cap| cap != 0.0);
    keys.slide(&mut spec, None, |layer| (layer + 1) % 6 != 0)?;
    turn_windows(&mut spec, keys.f32_opt("rope.freq_base_swa")?.unwrap_or(10000.0));
    Ok(spec)
}
