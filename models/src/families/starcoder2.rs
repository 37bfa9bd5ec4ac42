//! StarCoder2: layer norms, biases everywhere, an MLP without a gate, a sliding window.

use super::{Config, FIELDS, Family, Fields, Gguf, Keys, LAYER_NORM, PLAIN, Role};
use crate::Result;
use crate::spec::{Biases, ModelSpec};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "starcoder2",
    model_types: &["starcoder2"],
    architectures: &["Starcoder2ForCausalLM"],
    from_config,
    names: &[(Role::Up, "model.layers.{}.mlp.c_fc"), (Role::Down, "model.layers.{}.mlp.c_proj")],
    gguf: Some(Gguf { architecture: "starcoder2", from_keys, names: &[], reordered: false }),
    ..PLAIN
};

const STARCODER: Fields = Fields { eps: "norm_epsilon", tied: true, norm: LAYER_NORM, gated: false, ..FIELDS };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = config.decoder_of("starcoder2", &STARCODER)?;
    let bias = config.bool_or("use_bias", true)?;
    spec.bias = Biases { qkv: bias, output: bias, up: bias, down: bias, head: false };
    config.slide(&mut spec, None, |_| true)?;
    Ok(spec)
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("starcoder2", RopeLayout::Half)?;
    keys.ungated(&mut spec);
    keys.slide(&mut spec, None, |_| true)?;
    spec.bias = keys.biases();
    Ok(spec)
}
