//! StableLM: llama with layer norms, a part of each head rotated.

use super::{Config, FIELDS, Family, Fields, Gguf, Keys, LAYER_NORM, PLAIN, Role};
use crate::Result;
use crate::spec::{Biases, ModelSpec};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "stablelm",
    model_types: &["stablelm"],
    architectures: &["StableLmForCausalLM"],
    from_config,
    gguf: Some(Gguf { architecture: "stablelm", from_keys, names: &[], reordered: false }),
    ..PLAIN
};

const STABLELM: Fields = Fields { eps: "layer_norm_eps", norm: LAYER_NORM, rotated: 0.25, ..FIELDS };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    config.only("qk_layernorm", false)?;
    config.only("use_parallel_residual", false)?;
    let bias = Biases { qkv: config.bool_or("use_qkv_bias", false)?, ..Biases::default() };
    Ok(ModelSpec { bias, ..config.decoder_of("stablelm", &STABLELM)? })
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    if keys.has(Role::QNorm) || !keys.has(Role::MlpNorm) {
        return Err(keys.error("StableLM with normed queries or branches side by side is not supported"));
    }
    let bias = Biases { qkv: keys.has_bias(Role::Q), ..Biases::default() };
    Ok(ModelSpec { bias, ..keys.decoder("stablelm", RopeLayout::Half)? })
}
