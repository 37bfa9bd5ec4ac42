//! InternLM (the first): llama with biases around attention.

use super::{Config, Family, PLAIN, llama};
use crate::Result;
use crate::spec::{Biases, ModelSpec, RopeScaling};

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
    let mut spec = ModelSpec { bias, ..config.decoder("internlm")? };
    // Later revisions of its code have an object of their own for rotary positions.
    if let Some(rotary) = config.object("rotary") {
        let (rope, original_context) = (&mut spec.ropes[0], spec.context_length);
        rope.theta = rotary.f32_opt("base")?.unwrap_or(rope.theta);
        rope.scaling = match rotary.str("type") {
            Some("dynamic") => {
                let factor = rotary.f32_opt("scaling_factor")?.unwrap_or(1.0);
                RopeScaling::Dynamic { factor, original_context }
            }
            Some("origin") => RopeScaling::None,
            other => return Err(config.error(format!("rotary positions of the type {other:?} are not supported"))),
        };
    }
    Ok(spec)
}
