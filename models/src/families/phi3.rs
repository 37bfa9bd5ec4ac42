//! Phi-3, 3.5 and 4: llama with its projections packed, and LongRoPE.

use super::{Config, Family, Gguf, Keys, PLAIN, Role};
use crate::Result;
use crate::spec::ModelSpec;
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "phi3",
    model_types: &["phi3"],
    architectures: &["Phi3ForCausalLM"],
    from_config,
    names: &[(Role::Qkv, "model.layers.{}.self_attn.qkv_proj"), (Role::GateUp, "model.layers.{}.mlp.gate_up_proj")],
    gguf: Some(Gguf {
        architecture: "phi3",
        from_keys,
        names: &[(Role::Qkv, "blk.{}.attn_qkv"), (Role::GateUp, "blk.{}.ffn_up")],
        reordered: false,
    }),
    ..PLAIN
};

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    config.only("attention_bias", false)?;
    let mut spec = config.decoder("phi3")?;
    config.slide(&mut spec, None, |_| true)?;
    Ok(spec)
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("phi3", RopeLayout::Half)?;
    keys.slide(&mut spec, None, |_| true)?;
    Ok(spec)
}
