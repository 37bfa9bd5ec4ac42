//! ChatGLM2, ChatGLM3 and GLM-4 in the layout of their own code: llama with packed projections, half of each head rotated.

use super::{ALL, Config, Defaults, FIELDS, Family, Fields, Gguf, Keys, PLAIN, Role, chatglm};
use crate::Result;
use crate::spec::{Biases, ModelSpec, RopeScaling};
use rushlight_quant::ops::{Activation, RopeLayout};

pub(super) static FAMILY: Family = Family {
    name: "chatglm2",
    model_types: &["chatglm"],
    architectures: &["ChatGLMModel", "ChatGLMForConditionalGeneration"],
    is: |config| config.has("padded_vocab_size"),
    from_config,
    names: &[
        (Role::Embedding, "transformer.embedding.word_embeddings"),
        (Role::FinalNorm, "transformer.encoder.final_layernorm"),
        (Role::Head, "transformer.output_layer"),
        (Role::AttentionNorm, "transformer.encoder.layers.{}.input_layernorm"),
        (Role::Qkv, "transformer.encoder.layers.{}.self_attention.query_key_value"),
        (Role::O, "transformer.encoder.layers.{}.self_attention.dense"),
        (Role::MlpNorm, "transformer.encoder.layers.{}.post_attention_layernorm"),
        (Role::GateUp, "transformer.encoder.layers.{}.mlp.dense_h_to_4h"),
        (Role::Down, "transformer.encoder.layers.{}.mlp.dense_4h_to_h"),
        (Role::Prefix, "transformer.prefix_encoder.embedding"),
        (Role::PrefixIn, "transformer.prefix_encoder.trans.0"),
        (Role::PrefixOut, "transformer.prefix_encoder.trans.2"),
    ],
    base: &[],
    gguf: Some(GGUF),
    ..PLAIN
};

pub(super) const GGUF: Gguf = Gguf {
    architecture: "chatglm",
    from_keys,
    names: &[(Role::Qkv, "blk.{}.attn_qkv"), (Role::GateUp, "blk.{}.ffn_up")],
    reordered: false,
};

const GLM: Fields = Fields {
    kv_heads: "",
    head_dim: "kv_channels",
    layers: "num_layers",
    context: "seq_length",
    vocab: "padded_vocab_size",
    activation: "",
    width: "ffn_hidden_size",
    eps: "layernorm_epsilon",
    layout: RopeLayout::Interleaved,
    rotated: 0.5,
    or: Defaults { activation: Some(Activation::Silu), ..ALL },
    ..FIELDS
};

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    config.only("rmsnorm", true)?;
    config.only("post_layer_norm", true)?;
    config.only("apply_residual_connection_post_layernorm", false)?;
    let mut spec = config.decoder_of("chatglm2", &GLM)?;
    // Without it queries, keys and values are packed head by head; no published model is.
    if !config.bool_or("multi_query_attention", false)? {
        return Err(config.error("multi_query_attention = false is not supported"));
    }
    spec.kv_heads = config.usize("multi_query_group_num")?;
    let all = config.bool_or("add_bias_linear", false)?;
    let qkv = all || config.bool_or("add_qkv_bias", false)?;
    spec.bias = Biases { qkv, output: all, up: all, down: all, head: false };
    let factor = config.f32_opt("rope_ratio")?.unwrap_or(1.0);
    match interpolates(config) {
        true if factor != 1.0 => spec.ropes[0].scaling = RopeScaling::Linear { factor },
        _ => spec.ropes[0].theta *= factor,
    }
    spec.prefix = chatglm::prefix(config)?;
    Ok(spec)
}

/// Whether `rope_ratio` divides positions, as in ChatGLM2's long version, instead of multiplying the base, as in all later
/// models. Configurations do not say; the code, where it was downloaded too, does (it is read, not run), or else the name.
fn interpolates(config: &Config<'_>) -> bool {
    match std::fs::read_to_string(config.folder().join("modeling_chatglm.py")) {
        Ok(code) => code.contains("/ self.rope_ratio") && !code.contains("* self.rope_ratio"),
        Err(_) => {
            let name = config.folder().file_name().map(|name| name.to_string_lossy().to_lowercase());
            name.is_some_and(|name| name.contains("chatglm2"))
        }
    }
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    Ok(ModelSpec { bias: keys.biases(), ..keys.decoder("chatglm2", RopeLayout::Interleaved)? })
}
