//! InternLM2 and 2.5: llama with queries, keys and values packed group by group.

use super::{Config, Family, Gguf, Keys, PLAIN, Role};
use crate::Result;
use crate::packing::Packing;
use crate::spec::{Biases, ModelSpec};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "internlm2",
    model_types: &["internlm2"],
    architectures: &["InternLM2ForCausalLM"],
    from_config,
    names: &[
        (Role::Embedding, "model.tok_embeddings"),
        (Role::FinalNorm, "model.norm"),
        (Role::Head, "output"),
        (Role::AttentionNorm, "model.layers.{}.attention_norm"),
        (Role::Qkv, "model.layers.{}.attention.wqkv"),
        (Role::O, "model.layers.{}.attention.wo"),
        (Role::MlpNorm, "model.layers.{}.ffn_norm"),
        (Role::Gate, "model.layers.{}.feed_forward.w1"),
        (Role::Up, "model.layers.{}.feed_forward.w3"),
        (Role::Down, "model.layers.{}.feed_forward.w2"),
    ],
    base: &[],
    gguf: Some(Gguf { architecture: "internlm2", from_keys, names: &[], reordered: true }),
    qkv: Packing::Grouped,
    ..PLAIN
};

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let bias = config.bool_or("bias", false)?;
    let bias = Biases { qkv: bias, output: bias, ..Biases::default() };
    Ok(ModelSpec { bias, ..config.decoder("internlm2")? })
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let bias = Biases { qkv: keys.has_bias(Role::Q), output: keys.has_bias(Role::O), ..Biases::default() };
    Ok(ModelSpec { bias, ..keys.decoder("internlm2", RopeLayout::Interleaved)? })
}
