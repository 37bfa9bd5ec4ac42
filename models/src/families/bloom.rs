//! BLOOM: normed embeddings, ALiBi.

use super::{ALL, Config, Defaults, FIELDS, Family, Fields, Gguf, Keys, LAYER_NORM, PLAIN, Role};
use crate::Result;
use crate::packing::Packing;
use crate::spec::{Alibi, Biases, ModelSpec, Placement};
use rushlight_quant::ops::{Activation, RopeLayout};

pub(super) static FAMILY: Family = Family {
    name: "bloom",
    model_types: &["bloom"],
    architectures: &["BloomForCausalLM"],
    from_config,
    names: &[
        (Role::Embedding, "transformer.word_embeddings"),
        (Role::EmbeddingNorm, "transformer.word_embeddings_layernorm"),
        (Role::FinalNorm, "transformer.ln_f"),
        (Role::Head, "lm_head"),
        (Role::AttentionNorm, "transformer.h.{}.input_layernorm"),
        (Role::Qkv, "transformer.h.{}.self_attention.query_key_value"),
        (Role::O, "transformer.h.{}.self_attention.dense"),
        (Role::MlpNorm, "transformer.h.{}.post_attention_layernorm"),
        (Role::Up, "transformer.h.{}.mlp.dense_h_to_4h"),
        (Role::Down, "transformer.h.{}.mlp.dense_4h_to_h"),
    ],
    base: &[],
    gguf: Some(Gguf { architecture: "bloom", from_keys, names: &[(Role::Qkv, "blk.{}.attn_qkv")], reordered: false }),
    qkv: Packing::Grouped,
    ..PLAIN
};

const BLOOM: Fields = Fields {
    hidden: "hidden_size|n_embed",
    heads: "n_head|num_attention_heads",
    kv_heads: "",
    head_dim: "",
    layers: "n_layer|num_hidden_layers",
    context: "seq_length",
    activation: "",
    width: "",
    eps: "layer_norm_epsilon",
    tied: true,
    norm: LAYER_NORM,
    gated: false,
    or: Defaults { context: Some(2048), activation: Some(Activation::GeluTanh), widths: Some(4), ..ALL },
    ..FIELDS
};

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = with_distances(config.decoder_of("bloom", &BLOOM)?);
    if config.bool_or("apply_residual_connection_post_layernorm", false)? {
        spec.placement = Placement::Stream;
    }
    Ok(spec)
}

fn with_distances(mut spec: ModelSpec) -> ModelSpec {
    spec.embedding_norm = true;
    spec.bias = Biases { qkv: true, output: true, up: true, down: true, head: false };
    spec.alibi = Some(Alibi::new(spec.heads));
    spec.layers.iter_mut().for_each(|layer| layer.rope = None);
    spec.ropes.clear();
    spec
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("bloom", RopeLayout::Half)?;
    keys.ungated(&mut spec);
    Ok(with_distances(spec))
}
