//! The inverse of [`Config`]: a config.json that says what a [`ModelSpec`] says. As with GGUF's metadata, what was
//! written is read back, so that what no field can say is found here.

use super::metadata::{as_read, difference};
use super::{Config, FAMILIES, Family};
use crate::spec::{ModelSpec, Rope, RopeScaling};
use crate::{Error, Result};
use rushlight_quant::ops::Activation;
use serde_json::{Value, json};
use std::path::Path;

/// The family and the config.json of the model `spec`, whose GGUF files say `architecture`, with what a reader makes of
/// them; `path` is for messages only.
///
/// # Errors
/// When no family of that architecture can say something of `spec`.
pub fn configure(spec: &ModelSpec, architecture: &str, path: &Path) -> Result<(&'static Family, Value, ModelSpec)> {
    let mut why = None;
    let families = FAMILIES.iter().copied().filter(|f| f.gguf.is_some_and(|g| g.architecture == architecture));
    for family in families {
        let fields = fields(spec, family);
        let read = (family.from_config)(&Config::new(&fields, path))?;
        match difference(&as_read(spec, &read), &read) {
            None => return Ok((family, fields, read)),
            Some(what) => why = why.or(Some(what)),
        }
    }
    let what = why.unwrap_or("family");
    Err(Error::file(path, format!("config.json has no field that says this {architecture} model's {what}")))
}

fn fields(spec: &ModelSpec, family: &Family) -> Value {
    let mlp = spec.layers.first().and_then(|l| l.mlp.as_ref());
    let mut fields = json!({
        "architectures": &family.architectures[..family.architectures.len().min(1)],
        "model_type": family.model_types.first(),
        "hidden_size": spec.hidden_size,
        "intermediate_size": mlp.map(|m| m.width),
        "num_hidden_layers": spec.layers.len(),
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "rms_norm_eps": number(spec.norm.eps),
        "hidden_act": mlp.map(|m| match m.activation {
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
            Activation::Relu => "relu",
            _ => "silu",
        }),
        "attention_bias": spec.bias.qkv,
        "mlp_bias": spec.bias.up,
        "sliding_window": spec.layers.iter().find_map(|l| l.window),
        "tie_word_embeddings": spec.tied_head,
    });
    if let Some(rope) = spec.ropes.first() {
        fields["rope_theta"] = number(rope.theta);
        fields["rope_scaling"] = scaling(rope);
    }
    fields
}

fn scaling(rope: &Rope) -> Value {
    match &rope.scaling {
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": number(*factor)}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3",
            "factor": number(*factor),
            "low_freq_factor": number(*low_freq_factor),
            "high_freq_factor": number(*high_freq_factor),
            "original_max_position_embeddings": original_context,
        }),
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, attention_factor, truncate } => json!({
            "rope_type": "yarn",
            "factor": number(*factor),
            "beta_fast": number(*beta_fast),
            "beta_slow": number(*beta_slow),
            "original_max_position_embeddings": original_context,
            "attention_factor": number(*attention_factor),
            "truncate": truncate,
        }),
        _ => Value::Null,
    }
}

/// The number as its shortest decimal, which reads back as the same f32.
fn number(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}
