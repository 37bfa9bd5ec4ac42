//! ERNIE 4.5 (dense): llama with pairs of rotated values side by side.

use super::{ALL, Config, Defaults, FIELDS, Family, Fields, Gguf, Keys, PLAIN};
use crate::Result;
use crate::spec::{Biases, ModelSpec};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "ernie4_5",
    model_types: &["ernie4_5"],
    architectures: &["Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"],
    from_config,
    gguf: Some(Gguf { architecture: "ernie4_5", from_keys, names: &[], reordered: false }),
    ..PLAIN
};

const ERNIE: Fields =
    Fields { tied: true, layout: RopeLayout::Interleaved, or: Defaults { rope_theta: 500_000.0, ..ALL }, ..FIELDS };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let bias = config.bool_or("use_bias", false)?;
    let bias = Biases { qkv: bias, output: bias, up: bias, down: bias, head: false };
    Ok(ModelSpec { bias, ..config.decoder_of("ernie4_5", &ERNIE)? })
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    Ok(ModelSpec { bias: keys.biases(), ..keys.decoder("ernie4_5", RopeLayout::Interleaved)? })
}
