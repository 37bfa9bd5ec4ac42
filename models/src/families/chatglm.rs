//! ChatGLM-6B: a context seen whole, two-dimensional positions, and a residual stream that goes through the norms.

use super::{ALL, Config, Defaults, FIELDS, Family, Fields, LAYER_NORM, PLAIN, Role};
use crate::Result;
use crate::packing::Packing;
use crate::spec::{Biases, Context, ModelSpec, Placement, PrefixSpec};
use rushlight_quant::ops::{Activation, RopeLayout};

pub(super) static FAMILY: Family = Family {
    name: "chatglm",
    model_types: &["chatglm"],
    architectures: &["ChatGLMModel", "ChatGLMForConditionalGeneration"],
    is: |config| config.has("position_encoding_2d") || config.has("inner_hidden_size"),
    from_config,
    names: &[
        (Role::Embedding, "transformer.word_embeddings"),
        (Role::FinalNorm, "transformer.final_layernorm"),
        (Role::Head, "lm_head"),
        (Role::AttentionNorm, "transformer.layers.{}.input_layernorm"),
        (Role::Qkv, "transformer.layers.{}.attention.query_key_value"),
        (Role::O, "transformer.layers.{}.attention.dense"),
        (Role::MlpNorm, "transformer.layers.{}.post_attention_layernorm"),
        (Role::Up, "transformer.layers.{}.mlp.dense_h_to_4h"),
        (Role::Down, "transformer.layers.{}.mlp.dense_4h_to_h"),
        (Role::Prefix, "transformer.prefix_encoder.embedding"),
        (Role::PrefixIn, "transformer.prefix_encoder.trans.0"),
        (Role::PrefixOut, "transformer.prefix_encoder.trans.2"),
    ],
    base: &[],
    qkv: Packing::Grouped,
    ..PLAIN
};

const GLM: Fields = Fields {
    layers: "num_layers",
    context: "max_sequence_length",
    activation: "",
    width: "inner_hidden_size",
    eps: "layernorm_epsilon",
    norm: LAYER_NORM,
    layout: RopeLayout::TwoHalves,
    gated: false,
    or: Defaults { activation: Some(Activation::GeluTanh), ..ALL },
    ..FIELDS
};

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    config.only("position_encoding_2d", true)?;
    let mut spec = config.decoder_of("chatglm", &GLM)?;
    spec.bias = Biases { qkv: true, output: true, up: true, down: true, head: false };
    spec.placement = Placement::Stream;
    spec.stream_scale = (2.0 * spec.layers.len() as f32).sqrt();
    let masks = [config.token("gmask_token_id")?, config.token("mask_token_id")?];
    spec.context = Context::Before { start: config.token("bos_token_id")?, masks };
    spec.prefix = prefix(config)?;
    Ok(spec)
}

/// The prefix that p-tuning (v2) puts into a checkpoint.
pub(super) fn prefix(config: &Config<'_>) -> Result<Option<PrefixSpec>> {
    let projected = config.bool_or("prefix_projection", false)?;
    Ok(config.usize_opt("pre_seq_len")?.map(|len| PrefixSpec { len, projected }))
}
