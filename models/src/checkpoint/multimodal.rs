//! The language model inside a model of text and images: its part of config.json and its tensors, under the names that
//! they have where it stands alone.

use super::huggingface::Contents;
use serde_json::{Map, Value, json};

/// What the rest is called: how images become embeddings.
const OTHERS: [&str; 4] =
    ["vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."];

/// Where the language model's tensors are, and what the beginning of their names stands for. Files of transformers before
/// 4.52 have the first.
const TEXT: [(&str, &str); 2] = [("language_model.", ""), ("model.language_model.", "model.")];

/// Puts the language model's configuration in the place of the whole; whether there was one in it.
///
/// Fields of the whole that say something of the text (its tokens, how its weights are quantized, whether the head is the
/// embedding) are kept where `text_config` does not say.
pub(super) fn unwrap(config: &mut Value) -> bool {
    const SHARED: [&str; 6] =
        ["quantization_config", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype"];
    let Some(Value::Object(text)) = config.get("text_config") else { return false };
    // Its text attends to what follows it too, which a model of text alone doesn't say.
    if config.get("model_type").and_then(Value::as_str) == Some("paligemma") {
        return false;
    }
    let mut text = text.clone();
    for key in SHARED {
        if let (None, Some(value)) = (text.get(key), config.get(key)) {
            text.insert(key.into(), value.clone());
        }
    }
    left_out(&mut text);
    *config = Value::Object(text);
    true
}

/// Leaves the language model's tensors alone, as they are called where it stands alone.
pub(super) fn keep_text((tensors, raw): &mut Contents) {
    let of_text = |name: &mut String| {
        if let Some((whole, alone)) = TEXT.iter().find(|(whole, _)| name.starts_with(whole)) {
            name.replace_range(..whole.len(), alone);
        }
        !OTHERS.iter().any(|other| name.starts_with(other))
    };
    tensors.retain_mut(|tensor| of_text(&mut tensor.info.name));
    raw.retain_mut(|tensor| of_text(&mut tensor.name));
}

/// Published configurations of Gemma 3 do not say what `Gemma3TextConfig` takes by default.
fn left_out(text: &mut Map<String, Value>) {
    if text.get("model_type").and_then(Value::as_str) != Some("gemma3_text") {
        return;
    }
    let defaults = json!({
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
    });
    for (key, value) in defaults.as_object().into_iter().flatten() {
        text.entry(key).or_insert_with(|| value.clone());
    }
}
