//! StableLM: llama with layer norms, a part of each head rotated.

use super::{Config, FIELDS, Family, Fields, Gguf, Keys, LAYER_NORM, PLAIN, Role};
use crate::Result;
use crate::spec::{Biases, Branches, ModelSpec};
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

fn side_by_side(parallel: bool) -> Branches {
    if parallel { Branches::ParallelShared } else { Branches::Sequential }
}

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    config.only("qk_layernorm", false)?;
    let bias = Biases { qkv: config.bool_or("use_qkv_bias", false)?, ..Biases::default() };
    let branches = side_by_side(config.bool_or("use_parallel_residual", false)?);
    Ok(ModelSpec { bias, branches, ..config.decoder_of("stablelm", &STABLELM)? })
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    if keys.has(Role::QNorm) {
        return Err(keys.error("StableLM with normed queries is not supported"));
    }
    let bias = Biases { qkv: keys.has_bias(Role::Q), ..Biases::default() };
    let branches = side_by_side(!keys.has(Role::MlpNorm));
    Ok(ModelSpec { bias, branches, ..keys.decoder("stablelm", RopeLayout::Half)? })
}
