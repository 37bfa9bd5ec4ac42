//! Granite: llama with four multipliers.

use super::{Config, Family, Gguf, Keys, PLAIN};
use crate::Result;
use crate::spec::{Biases, ModelSpec};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "granite",
    model_types: &["granite"],
    architectures: &["GraniteForCausalLM"],
    from_config,
    gguf: Some(Gguf { architecture: "granite", from_keys, names: &[], reordered: true }),
    ..PLAIN
};

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let (attention, mlp) = (config.bool_or("attention_bias", false)?, config.bool_or("mlp_bias", false)?);
    let number = |name: &str| Ok(config.f32_opt(name)?.unwrap_or(1.0));
    Ok(ModelSpec {
        bias: Biases { qkv: attention, output: attention, up: mlp, down: mlp, head: false },
        embedding_scale: number("embedding_multiplier")?,
        attention_scale: number("attention_multiplier")?,
        residual_scale: number("residual_multiplier")?,
        logit_scale: 1.0 / number("logits_scaling")?,
        ..config.decoder("granite")?
    })
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let spec = keys.decoder("granite", RopeLayout::Interleaved)?;
    let number = |name: &str, or: f32| Ok(keys.f32_opt(name)?.filter(|&x| x != 0.0).unwrap_or(or));
    Ok(ModelSpec {
        bias: keys.biases(),
        embedding_scale: number("embedding_scale", 1.0)?,
        attention_scale: number("attention.scale", spec.attention_scale)?,
        residual_scale: number("residual_scale", 1.0)?,
        logit_scale: 1.0 / number("logit_scale", 1.0)?,
        ..spec
    })
}
