//! Qwen3: qwen2 without biases, queries and keys normed head by head.

use super::{Config, Family, Gguf, Keys, PLAIN};
use crate::Result;
use crate::spec::{Biases, ModelSpec, QkNorm};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "qwen3",
    model_types: &["qwen3"],
    architectures: &["Qwen3ForCausalLM"],
    from_config,
    gguf: Some(Gguf { architecture: "qwen3", from_keys, names: &[], reordered: false }),
    ..PLAIN
};

pub(super) fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let bias = config.bool_or("attention_bias", false)?;
    let bias = Biases { qkv: bias, output: bias, ..Biases::default() };
    let mut spec = ModelSpec { qk_norm: QkNorm::Head, bias, ..config.decoder("qwen3")? };
    if config.bool_or("use_sliding_window", false)? {
        let full = config.usize_opt("max_window_layers")?.unwrap_or(28);
        config.slide(&mut spec, Some(4096), |layer| layer >= full)?;
    }
    Ok(spec)
}

pub(super) fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let decoder = keys.decoder("qwen3", RopeLayout::Half)?;
    let mut spec = ModelSpec { qk_norm: QkNorm::Head, bias: keys.biases(), ..decoder };
    keys.slide(&mut spec, None, |_| false)?;
    Ok(spec)
}
