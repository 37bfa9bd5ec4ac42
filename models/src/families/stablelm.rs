//! StableLM: llama with layer norms, a part of each head rotated; the 12B model norms queries and keys, each head by itself.

use super::{Config, FIELDS, Family, Fields, Gguf, Keys, LAYER_NORM, PLAIN, Role};
use crate::Result;
use crate::spec::{Biases, Branches, ModelSpec, QkNorm};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "stablelm",
    model_types: &["stablelm"],
    architectures: &["StableLmForCausalLM"],
    from_config,
    names: &[
        (Role::QNorm, "model.layers.{}.self_attn.q_layernorm.norms.{}"),
        (Role::KNorm, "model.layers.{}.self_attn.k_layernorm.norms.{}"),
    ],
    gguf: Some(Gguf { architecture: "stablelm", from_keys, names: &[], reordered: false }),
    ..PLAIN
};

const STABLELM: Fields = Fields { eps: "layer_norm_eps", norm: LAYER_NORM, rotated: 0.25, ..FIELDS };

fn side_by_side(parallel: bool) -> Branches {
    if parallel { Branches::ParallelShared } else { Branches::Sequential }
}

fn normed(heads: bool) -> QkNorm {
    if heads { QkNorm::Heads } else { QkNorm::None }
}

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let bias = Biases { qkv: config.bool_or("use_qkv_bias", false)?, ..Biases::default() };
    let branches = side_by_side(config.bool_or("use_parallel_residual", false)?);
    let qk_norm = normed(config.bool_or("qk_layernorm", false)?);
    Ok(ModelSpec { bias, branches, qk_norm, ..config.decoder_of("stablelm", &STABLELM)? })
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let bias = Biases { qkv: keys.has_bias(Role::Q), ..Biases::default() };
    let branches = side_by_side(!keys.has(Role::MlpNorm));
    let qk_norm = normed(keys.has(Role::QNorm));
    Ok(ModelSpec { bias, branches, qk_norm, ..keys.decoder("stablelm", RopeLayout::Half)? })
}
