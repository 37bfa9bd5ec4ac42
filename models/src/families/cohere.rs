//! Command R: both branches side by side behind one norm without bias, scaled logits.

use super::{Config, FIELDS, Family, Fields, Gguf, Keys, PLAIN, Role};
use crate::Result;
use crate::spec::{Biases, Branches, ModelSpec, NormKind, QkNorm};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "cohere",
    model_types: &["cohere"],
    architectures: &["CohereForCausalLM"],
    from_config,
    gguf: Some(Gguf { architecture: "command-r", from_keys, names: &[], reordered: false }),
    ..PLAIN
};

const NORM: NormKind = NormKind::Layer { weight: true, bias: false };
const COHERE: Fields =
    Fields { eps: "layer_norm_eps", tied: true, norm: NORM, layout: RopeLayout::Interleaved, ..FIELDS };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let bias = config.bool_or("attention_bias", false)?;
    Ok(ModelSpec {
        bias: Biases { qkv: bias, output: bias, ..Biases::default() },
        branches: Branches::ParallelShared,
        qk_norm: if config.bool_or("use_qk_norm", false)? { QkNorm::Heads } else { QkNorm::None },
        logit_scale: config.f32_opt("logit_scale")?.unwrap_or(0.0625),
        ..config.decoder_of("cohere", &COHERE)?
    })
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("cohere", RopeLayout::Interleaved)?;
    spec.norm.kind = NORM;
    Ok(ModelSpec {
        bias: keys.biases(),
        branches: Branches::ParallelShared,
        qk_norm: if keys.has(Role::QNorm) { QkNorm::Heads } else { QkNorm::None },
        logit_scale: keys.f32("logit_scale")?,
        ..spec
    })
}
