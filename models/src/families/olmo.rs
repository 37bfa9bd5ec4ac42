//! OLMo: llama with norms that have no parameters; OLMo 2: with norms behind the branches, and of queries and keys.

use super::{ALL, Config, Defaults, FIELDS, Family, Fields, Gguf, Keys, PLAIN, Role};
use crate::Result;
use crate::spec::{Biases, ModelSpec, NormKind, Placement, QkNorm};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "olmo",
    model_types: &["olmo"],
    architectures: &["OlmoForCausalLM"],
    from_config,
    gguf: Some(Gguf { architecture: "olmo", from_keys, names: &[], reordered: true }),
    ..PLAIN
};

pub(super) static OLMO2: Family = Family {
    name: "olmo2",
    model_types: &["olmo2"],
    architectures: &["Olmo2ForCausalLM"],
    from_config: second_from_config,
    names: &[
        (Role::AttentionPostNorm, "model.layers.{}.post_attention_layernorm"),
        (Role::MlpPostNorm, "model.layers.{}.post_feedforward_layernorm"),
    ],
    gguf: Some(Gguf { architecture: "olmo2", from_keys: second_from_keys, names: &[], reordered: false }),
    ..PLAIN
};

const BARE: NormKind = NormKind::Layer { weight: false, bias: false };
const OLMO: Fields = Fields { eps: "", norm: BARE, or: Defaults { eps: Some(1e-5), ..ALL }, ..FIELDS };

fn bias(config: &Config<'_>) -> Result<Biases> {
    let bias = config.bool_or("attention_bias", false)?;
    Ok(Biases { qkv: bias, output: bias, ..Biases::default() })
}

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let clip_qkv = config.f32_opt("clip_qkv")?;
    Ok(ModelSpec { clip_qkv, bias: bias(config)?, ..config.decoder_of("olmo", &OLMO)? })
}

fn second_from_config(config: &Config<'_>) -> Result<ModelSpec> {
    Ok(behind(ModelSpec { bias: bias(config)?, ..config.decoder("olmo2")? }))
}

fn behind(spec: ModelSpec) -> ModelSpec {
    ModelSpec { placement: Placement::After, qk_norm: QkNorm::Projection, ..spec }
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("olmo", RopeLayout::Interleaved)?;
    spec.norm.kind = BARE;
    spec.bias = keys.biases();
    spec.clip_qkv = keys.f32_opt("attention.clamp_kqv")?.filter(|&limit| limit > 0.0);
    Ok(spec)
}

fn second_from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    Ok(behind(ModelSpec { bias: keys.biases(), ..keys.decoder("olmo2", RopeLayout::Half)? }))
}
