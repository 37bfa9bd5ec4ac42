//! Mistral 7B and its descendants (Zephyr among them): llama with a sliding window. Their GGUF files say `llama`.

use super::{Config, Family, PLAIN, llama};
use crate::Result;
use crate::spec::ModelSpec;

pub(super) static FAMILY: Family = Family {
    name: "mistral",
    model_types: &["mistral"],
    architectures: &["MistralForCausalLM"],
    from_config,
    gguf: Some(llama::GGUF),
    ..PLAIN
};

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = config.decoder("mistral")?;
    // Absent (not null), it is what the reference implementation takes.
    let window = if config.has("sliding_window") { config.usize_opt("sliding_window")? } else { Some(4096) };
    let windows = config.windows(spec.layers.len(), window, |_| true)?;
    for (layer, window) in spec.layers.iter_mut().zip(windows) {
        layer.window = window;
    }
    Ok(spec)
}
