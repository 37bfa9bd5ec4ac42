//! SantaCoder and StarCoder: GPT-2 with a single key head.

use super::{Config, Family, Gguf, IGNORED_MASKS, Keys, PLAIN, Role, gpt2};
use crate::Result;
use crate::packing::Packing;
use crate::spec::ModelSpec;

pub(super) static FAMILY: Family = Family {
    name: "gpt_bigcode",
    model_types: &["gpt_bigcode"],
    architectures: &["GPTBigCodeForCausalLM"],
    from_config,
    names: gpt2::NAMES,
    base: &[],
    gguf: Some(Gguf {
        architecture: "starcoder",
        from_keys,
        names: &[(Role::Qkv, "blk.{}.attn_qkv")],
        reordered: false,
    }),
    ignored: IGNORED_MASKS,
    qkv: Packing::Grouped,
    ..PLAIN
};

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = gpt2::from_config(config, "gpt_bigcode")?;
    if config.bool_or("multi_query", true)? {
        spec.kv_heads = 1;
    }
    Ok(spec)
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    Ok(ModelSpec { family: "gpt_bigcode", ..gpt2::from_keys(keys)? })
}
