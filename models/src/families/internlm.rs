//! InternLM (the first): llama with biases around attention.

use super::{Config, Family, PLAIN, llama};
use crate::Result;
use crate::spec::{Biases, ModelSpec};

pub(super) static FAMILY: Family = Family {
    name: "internlm",
    model_types: &["internlm"],
    architectures: &["InternLMForCausalLM"],
    from_config,
    gguf: Some(llama::GGUF),
    ..PLAIN
};

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let bias = config.bool_or("bias", true)?;
    let bias = Biases { qkv: bias, output: bias, ..Biases::default() };
    Ok(ModelSpec { bias, ..config.decoder("internlm")? })
}
