//! GPT-J: both branches side by side behind one norm, pairs of rotated values side by side.

use super::{Config, Family, Fields, GPT_FIELDS, IGNORED_MASKS, PLAIN, Role};
use crate::Result;
use crate::spec::{Biases, Branches, ModelSpec};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "gptj",
    model_types: &["gptj"],
    architectures: &["GPTJForCausalLM"],
    from_config,
    names: &[
        (Role::Embedding, "transformer.wte"),
        (Role::FinalNorm, "transformer.ln_f"),
        (Role::Head, "lm_head"),
        (Role::AttentionNorm, "transformer.h.{}.ln_1"),
        (Role::Q, "transformer.h.{}.attn.q_proj"),
        (Role::K, "transformer.h.{}.attn.k_proj"),
        (Role::V, "transformer.h.{}.attn.v_proj"),
        (Role::O, "transformer.h.{}.attn.out_proj"),
        (Role::Up, "transformer.h.{}.mlp.fc_in"),
        (Role::Down, "transformer.h.{}.mlp.fc_out"),
    ],
    base: &[],
    ignored: IGNORED_MASKS,
    ..PLAIN
};

const GPTJ: Fields = Fields { tied: false, layout: RopeLayout::Interleaved, ..GPT_FIELDS };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = config.decoder_of("gptj", &GPTJ)?;
    spec.bias = Biases { up: true, down: true, head: true, ..Biases::default() };
    spec.branches = Branches::ParallelShared;
    spec.ropes[0].dim = config.usize("rotary_dim")?;
    Ok(spec)
}
