//! SmolLM3: llama whose every fourth layer has no positions.

use super::{ALL, Config, Defaults, FIELDS, Family, Fields, Gguf, Keys, PLAIN};
use crate::Result;
use crate::spec::{Biases, ModelSpec};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "smollm3",
    model_types: &["smollm3"],
    architectures: &["SmolLM3ForCausalLM"],
    from_config,
    gguf: Some(Gguf { architecture: "smollm3", from_keys, names: &[], reordered: true }),
    ..PLAIN
};

const SMOLLM: Fields = Fields { tied: true, or: Defaults { rope_theta: 2e6, ..ALL }, ..FIELDS };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = config.decoder_of("smollm3", &SMOLLM)?;
    let (attention, mlp) = (config.bool_or("attention_bias", false)?, config.bool_or("mlp_bias", false)?);
    spec.bias = Biases { qkv: attention, output: attention, up: mlp, down: mlp, head: false };
    let every = config.usize_opt("no_rope_layer_interval")?.unwrap_or(4);
    let turned = match config.get("no_rope_layers") {
        None => (0..spec.layers.len()).map(|i| f32::from(u8::from((i + 1) % every.max(1) != 0))).collect(),
        Some(_) => config.numbers("no_rope_layers")?,
    };
    if turned.len() != spec.layers.len() {
        let (n, layers) = (turned.len(), spec.layers.len());
        return Err(config.error(format!("no_rope_layers has {n} entries for {layers} layers")));
    }
    if config.bool_or("use_sliding_window", false)? {
        config.slide(&mut spec, None, |layer| turned[layer] == 0.0)?;
    }
    for (layer, turned) in spec.layers.iter_mut().zip(turned) {
        layer.rope = layer.rope.filter(|_| turned != 0.0);
    }
    Ok(spec)
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("smollm3", RopeLayout::Interleaved)?;
    spec.bias = keys.biases();
    spec.layers.iter_mut().skip(3).step_by(4).for_each(|layer| layer.rope = None);
    keys.slide(&mut spec, None, |_| false)?;
    Ok(spec)
}
