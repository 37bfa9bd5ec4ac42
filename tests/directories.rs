//! `rushlight quantize` to Hugging Face directories: what it writes is read back and predicts as the original does.

use rushlight_models::checkpoint::Checkpoint;
use rushlight_models::checkpoint::safetensors::{Entry, Writer};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A small llama with random weights and the vocabulary of a real one; `None` where that is not at hand.
fn model(dir: &Path) -> Option<()> {
    let root = std::env::var_os("RUSHLIGHT_SHARED").map(PathBuf::from);
    let real = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"));
    let real = real.join("models/stories260K-hf");
    if !real.exists() {
        println!("skipped: no model at {}", real.display());
        return None;
    }
    std::fs::create_dir(dir).unwrap();
    for name in ["tokenizer.model", "tokenizer_config.json"] {
        std::fs::write(dir.join(name), std::fs::read(real.join(name)).unwrap()).unwrap();
    }
    let config = json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true});
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut shapes = vec![("model.embed_tokens".to_string(), vec![512, 64]), ("model.norm".into(), vec![64])];
    for i in 0..2 {
        let mut layer = |name: &str, shape: &[usize]| shapes.push((format!("model.layers.{i}.{name}"), shape.to_vec()));
        for (name, rows) in [("q", 64), ("k", 32), ("v", 32), ("o", 64)] {
            layer(&format!("self_attn.{name}_proj"), &[rows, 64]);
        }
        layer("mlp.gate_proj", &[96, 64]);
        layer("mlp.up_proj", &[96, 64]);
        layer("mlp.down_proj", &[64, 96]);
        layer("input_layernorm", &[64]);
        layer("post_attention_layernorm", &[64]);
    }
    let entry = |(name, shape): &(String, Vec<usize>)| Entry {
        name: format!("{name}.weight"),
        dtype: "F32".into(),
        shape: shape.clone(),
    };
    let entries: Vec<Entry> = shapes.iter().map(entry).collect();
    let mut writer = Writer::create(&dir.join("model.safetensors"), &entries).unwrap();
    let mut state = 1u64;
    for entry in &entries {
        let mut values = vec![1f32; entry.shape.iter().product()];
        if entry.shape.len() == 2 {
            for value in &mut values {
                // The sum of uniform numbers is near enough to a normal one.
                let sum: f32 = (0..4)
                    .map(|_| {
                        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
                    })
                    .sum();
                *value = 0.15 * sum;
            }
        }
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.write(&entry.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    Some(())
}

fn rushlight(args: &[&str]) -> (i32, Vec<u8>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rushlight"));
    let output = command.args(args).stdin(Stdio::null()).output().unwrap();
    (output.status.code().unwrap_or(-1), output.stdout, String::from_utf8(output.stderr).unwrap())
}

fn json(args: &[&str]) -> Value {
    let (status, out, err) = rushlight(args);
    assert_eq!(status, 0, "{args:?}: {err}");
    serde_json::from_slice(&out).unwrap()
}

#[test]
fn directories_of_codes_predict_as_the_original() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_str().unwrap().to_string();
    let source = path("model");
    if model(Path::new(&source)).is_none() {
        return;
    }
    let text = path("text.txt");
    let line = |i: usize| format!("Day {i}: Tom saw {} red birds and {} big dogs near the tree. ", i % 7, i % 5);
    std::fs::write(&text, (0..400).map(line).collect::<String>()).unwrap();
    for (kind, extra, method, most) in [
        ("int4", vec!["--group-size", "32", "--calib", &text], "gptq", 0.01),
        ("int8", vec!["--group-size", "-1", "--calib", &text], "gptq", 1e-4),
        ("nf4", vec![], "bitsandbytes", 0.02),
    ] {
        let out = path(kind);
        let args = [&["quantize", &source, "-o", &out, "--type", kind, "--json"], &extra[..]].concat();
        assert_eq!(json(&args)["layers"], 14, "{kind}");
        let config: Value = serde_json::from_slice(&std::fs::read(format!("{out}/config.json")).unwrap()).unwrap();
        assert_eq!(config["quantization_config"]["quant_method"], method);
        assert!(Path::new(&out).join("tokenizer.model").exists());
        let figures =
            json(&["perplexity", &out, "-f", &text, "--ctx", "128", "--against", &source, "--fine", "--json"]);
        let kl = figures["kl"].as_f64().unwrap();
        assert!(kl > 0.0 && kl < most, "{kind}: {figures}");
        assert!(Checkpoint::open(Path::new(&out)).is_ok());
    }
    // What cannot be is said at once, and leaves nothing.
    let before = std::fs::read_dir(place.path()).unwrap().count();
    for (args, status, what) in [
        (vec!["--type", "int4", "--group-size", "128"], 1, "groups 128"),
        (vec!["--type", "int4", "--group-size", "20"], 2, "multiple of 32"),
        (vec!["--type", "int4", "--method", "rtn"], 2, "made by GPTQ"),
        (vec!["--type", "nf4", "--imatrix", "x"], 2, "for GGUF files"),
    ] {
        let out = path("none");
        let (code, _, err) = rushlight(&[&["quantize", &source, "-o", &out], &args[..]].concat());
        assert_eq!(code, status, "{args:?}: {err}");
        assert!(err.contains(what), "{args:?}: {err}");
    }
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), before);
}
