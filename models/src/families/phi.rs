//! Phi-1, 1.5 and 2: both branches side by side behind one norm, half of each head rotated.

use super::{Config, FIELDS, Family, Fields, Gguf, Keys, LAYER_NORM, PLAIN, Role};
use crate::Result;
use crate::spec::{Biases, Branches, ModelSpec, QkNorm};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "phi",
    model_types: &["phi"],
    architectures: &["PhiForCausalLM"],
    from_config,
    names: &[
        (Role::FinalNorm, "model.final_layernorm"),
        (Role::O, "model.layers.{}.self_attn.dense"),
        (Role::QNorm, "model.layers.{}.self_attn.q_layernorm"),
        (Role::KNorm, "model.layers.{}.self_attn.k_layernorm"),
        (Role::Up, "model.layers.{}.mlp.fc1"),
        (Role::Down, "model.layers.{}.mlp.fc2"),
    ],
    gguf: Some(Gguf { architecture: "phi2", from_keys, names: &[], reordered: false }),
    ..PLAIN
};

const PHI: Fields = Fields { eps: "layer_norm_eps", norm: LAYER_NORM, gated: false, rotated: 0.5, ..FIELDS };
const BIAS: Biases = Biases { qkv: true, output: true, up: true, down: true, head: true };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let qk_norm = if config.bool_or("qk_layernorm", false)? { QkNorm::Head } else { QkNorm::None };
    Ok(ModelSpec { bias: BIAS, branches: Branches::ParallelShared, qk_norm, ..config.decoder_of("phi", &PHI)? })
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("phi", RopeLayout::Half)?;
    keys.ungated(&mut spec);
    Ok(ModelSpec { bias: BIAS, branches: Branches::ParallelShared, ..spec })
}
