//! Helium: llama with pairs of rotated values side by side.

use super::{ALL, Config, Defaults, FIELDS, Family, Fields, Gguf, PLAIN, llama};
use crate::Result;
use crate::spec::{Biases, ModelSpec};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "helium",
    model_types: &["helium"],
    architectures: &["HeliumForCausalLM"],
    from_config,
    gguf: Some(Gguf { reordered: false, ..llama::GGUF }),
    ..PLAIN
};

const HELIUM: Fields =
    Fields { layout: RopeLayout::Interleaved, or: Defaults { rope_theta: 100_000.0, ..ALL }, ..FIELDS };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let (attention, mlp) = (config.bool_or("attention_bias", false)?, config.bool_or("mlp_bias", false)?);
    let bias = Biases { qkv: attention, output: false, up: mlp, down: mlp, head: false };
    Ok(ModelSpec { bias, ..config.decoder_of("helium", &HELIUM)? })
}
