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
    config.slide(&mut spec, Some(4096), |_| true)?;
    Ok(spec)
}
