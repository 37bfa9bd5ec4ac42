//! Llama 1, 2 and 3, and what keeps its layout: Yi, SmolLM, TinyLlama, and in GGUF also Mistral.

use super::{Config, Family, Gguf, Keys, PLAIN};
use crate::Result;
use crate::spec::{Biases, Experts, ModelSpec};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "llama",
    model_types: &["llama"],
    architectures: &["LlamaForCausalLM", "LLaMAForCausalLM"],
    from_config,
    gguf: Some(GGUF),
    ..PLAIN
};

pub(super) const GGUF: Gguf = Gguf { architecture: "llama", from_keys, names: &[], reordered: true };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let attention = config.bool_or("attention_bias", false)?;
    let mlp = config.bool_or("mlp_bias", false)?;
    let bias = Biases { qkv: attention, output: attention, up: mlp, down: mlp, head: false };
    Ok(ModelSpec { bias, ..config.decoder("llama")? })
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("llama", RopeLayout::Interleaved)?;
    spec.bias = keys.biases();
    keys.slide(&mut spec, None, |_| true)?;
    if keys.usize_opt("expert_count")?.is_some_and(|n| n > 0) {
        keys.mix(&mut spec, |_, experts| Experts { renormalise: true, ..experts }, None)?;
    }
    Ok(spec)
}
