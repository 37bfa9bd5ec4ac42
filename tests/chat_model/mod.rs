//! A tiny model that can chat: the random llama of the fixtures with a tokenizer of single bytes and the ChatML
//! template. It says nothing sensible, but it takes and makes every text.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The fixture it is made of.
pub fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families/llama")
}

/// Writes the model into `dir`.
pub fn write(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::copy(llama().join("model.safetensors"), dir.join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(llama().join("config.json")).unwrap()).unwrap();
    (config["bos_token_id"], config["eos_token_id"]) = (json!(256), json!(257));
    save(dir, "config.json", &config);
    save(dir, "generation_config.json", &json!({"eos_token_id": 257, "temperature": 0.9, "top_k": 5}));

    // GPT-2's way to spell bytes as printable characters: each byte that is not printable is a letter from U+0100 on.
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut vocab = serde_json::Map::new();
    let mut other = 256;
    for b in 0..256 {
        let code = if printable(b) {
            b
        } else {
            other += 1;
            other - 1
        };
        vocab.insert(char::from_u32(code).unwrap().to_string(), json!(b));
    }
    let mark = |id: u32, text: &str| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    save(
        dir,
        "tokenizer.json",
        &json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [mark(256, "<|im_start|>"), mark(257, "<|im_end|>")],
            "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
        }),
    );
    save(
        dir,
        "tokenizer_config.json",
        &json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
            "add_bos_token": false,
            "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        }),
    );
}

fn save(dir: &Path, name: &str, value: &Value) {
    std::fs::write(dir.join(name), value.to_string()).unwrap();
}
