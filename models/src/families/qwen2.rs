//! Qwen 1.5, 2 and 2.5: llama with a bias on queries, keys and values.

use super::{Config, Family, Gguf, Keys, PLAIN};
use crate::Result;
use crate::spec::{Biases, ModelSpec};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "qwen2",
    model_types: &["qwen2"],
    architectures: &["Qwen2ForCausalLM"],
    from_config,
    gguf: Some(GGUF),
    ..PLAIN
};

const GGUF: Gguf = Gguf { architecture: "qwen2", from_keys, names: &[], reordered: false };
const BIAS: Biases = Biases { qkv: true, output: false, up: false, down: false, head: false };

pub(super) fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = ModelSpec { bias: BIAS, ..config.decoder("qwen2")? };
    if config.bool_or("use_sliding_window", false)? {
        // The first layers see everything. The defaults are the reference implementation's.
        let full = config.usize_opt("max_window_layers")?.unwrap_or(28);
        config.slide(&mut spec, Some(4096), |layer| layer >= full)?;
    }
    Ok(spec)
}

pub(super) fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = ModelSpec { bias: BIAS, ..keys.decoder("qwen2", RopeLayout::Half)? };
    keys.slide(&mut spec, None, |_| false)?;
    Ok(spec)
}
