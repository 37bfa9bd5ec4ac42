//! GLM-4 in the layout of transformers: half of each head rotated, pairs side by side, gate and up packed. The versions of
//! 2025 norm the branches' outputs too.

use super::{Config, FIELDS, Family, Fields, Gguf, Keys, PLAIN, Role, chatglm2};
use crate::Result;
use crate::spec::{Biases, ModelSpec, Placement};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "glm",
    model_types: &["glm"],
    architectures: &["GlmForCausalLM"],
    from_config,
    names: &[(Role::GateUp, "model.layers.{}.mlp.gate_up_proj")],
    gguf: Some(Gguf { names: &[(Role::GateUp, "blk.{}.ffn_up")], ..chatglm2::GGUF }),
    ..PLAIN
};

pub(super) static GLM4: Family = Family {
    name: "glm4",
    model_types: &["glm4"],
    architectures: &["Glm4ForCausalLM"],
    from_config: |config| Ok(ModelSpec { family: "glm4", placement: Placement::Both, ..from_config(config)? }),
    names: &[
        (Role::GateUp, "model.layers.{}.mlp.gate_up_proj"),
        (Role::AttentionPostNorm, "model.layers.{}.post_self_attn_layernorm"),
        (Role::MlpPostNorm, "model.layers.{}.post_mlp_layernorm"),
    ],
    gguf: Some(Gguf { architecture: "glm4", from_keys, names: &[(Role::GateUp, "blk.{}.ffn_up")], reordered: false }),
    ..PLAIN
};

const GLM: Fields = Fields { layout: RopeLayout::Interleaved, rotated: 0.5, ..FIELDS };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let bias = Biases { qkv: config.bool_or("attention_bias", true)?, ..Biases::default() };
    Ok(ModelSpec { bias, ..config.decoder_of("glm", &GLM)? })
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let bias = Biases { qkv: keys.has_bias(Role::Q) || keys.has_bias(Role::Qkv), ..Biases::default() };
    Ok(ModelSpec { bias, placement: Placement::Both, ..keys.decoder("glm4", RopeLayout::Interleaved)? })
}
