//! Llama 1, 2 and 3, and what keeps its layout: Yi, SmolLM, TinyLlama, and in GGUF also Mistral.

use super::{Config, Family, GGUF_NAMES, Gguf, IGNORED, Keys, NAMES, Role};
use crate::Result;
use crate::spec::{Biases, ModelSpec};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "llama",
    model_types: &["llama"],
    architectures: &["LlamaForCausalLM", "LLaMAForCausalLM"],
    from_config,
    names: NAMES,
    gguf: Some(GGUF),
    ignored: IGNORED,
};

pub(super) const GGUF: Gguf = Gguf { architecture: "llama", from_keys, names: GGUF_NAMES, reordered: true };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let attention = config.bool_or("attention_bias", false)?;
    let mlp = config.bool_or("mlp_bias", false)?;
    let bias = Biases { qkv: attention, output: attention, up: mlp, down: mlp, head: false };
    Ok(ModelSpec { bias, ..config.decoder("llama")? })
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("llama", RopeLayout::Interleaved)?;
    spec.bias = Biases {
        qkv: keys.has_bias(Role::Q),
        output: keys.has_bias(Role::O),
        up: keys.has_bias(Role::Up),
        down: keys.has_bias(Role::Down),
        head: false,
    };
    let window = keys.window()?;
    spec.layers.iter_mut().for_each(|layer| layer.window = window);
    Ok(spec)
}
