//! Mixtral: mistral with experts. Its GGUF files say `llama`.

use super::{ALL, Config, Defaults, FIELDS, Family, Fields, PLAIN, Role, llama};
use crate::Result;
use crate::spec::{Experts, ModelSpec};

pub(super) static FAMILY: Family = Family {
    name: "mixtral",
    model_types: &["mixtral"],
    architectures: &["MixtralForCausalLM"],
    from_config,
    names: &[
        (Role::Router, "model.layers.{}.block_sparse_moe.gate"),
        (Role::ExpertGate(0), "model.layers.{}.block_sparse_moe.experts.{}.w1"),
        (Role::ExpertUp(0), "model.layers.{}.block_sparse_moe.experts.{}.w3"),
        (Role::ExpertDown(0), "model.layers.{}.block_sparse_moe.experts.{}.w2"),
    ],
    gguf: Some(llama::GGUF),
    ..PLAIN
};

const MIXTRAL: Fields = Fields { or: Defaults { rope_theta: 1e6, ..ALL }, ..FIELDS };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = config.decoder_of("mixtral", &MIXTRAL)?;
    config.slide(&mut spec, None, |_| true)?;
    let (count, used) = (config.usize("num_local_experts")?, config.usize("num_experts_per_tok")?);
    for layer in &mut spec.layers {
        layer.experts = layer.mlp.take().map(|mlp| Experts { renormalise: true, ..Experts::new(count, used, mlp) });
    }
    Ok(spec)
}
