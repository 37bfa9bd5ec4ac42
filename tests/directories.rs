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
        ("int3", vec!["--group-size", "32", "--asym", "--calib", &text], "gptq", 0.04),
        ("int4", vec!["--group-size", "32", "--act-order", "--calib", &text], "gptq", 0.01),
        ("int4", vec!["--group-size", "20", "--asym", "--method", "rtn"], "gptq", 0.02),
        ("int8", vec!["--method", "rtn", "--sym"], "gptq", 1e-4),
        ("int2", vec!["--group-size", "32", "--asym", "--method", "rtn"], "gptq", 2.0),
    ] {
        let out = path(&format!("{kind}{}", extra.concat().replace('/', "")));
        let args = [&["quantize", &source, "-o", &out, "--type", kind, "--json"], &extra[..]].concat();
        assert_eq!(json(&args)["layers"], 14, "{kind}");
        let config: Value = serde_json::from_slice(&std::fs::read(format!("{out}/config.json")).unwrap()).unwrap();
        let said = &config["quantization_config"];
        assert_eq!(said["quant_method"], method);
        if method == "gptq" {
            let given = |option: &str| extra.contains(&option);
            assert_eq!((&said["sym"], &said["desc_act"]), (&json!(!given("--asym")), &json!(given("--act-order"))));
        }
        assert!(Path::new(&out).join("tokenizer.model").exists());
        let figures =
            json(&["perplexity", &out, "-f", &text, "--ctx", "128", "--against", &source, "--fine", "--json"]);
        let kl = figures["kl"].as_f64().unwrap();
        assert!(kl > 0.0 && kl < most, "{kind}: {figures}");
        let again = Checkpoint::open(Path::new(&out)).unwrap();
        let ordered = again.tensors().iter().filter(|t| again.column_order(&t.name).is_some()).count();
        assert_eq!(ordered > 0, extra.contains(&"--act-order"), "{kind} {extra:?}");
    }
    // What cannot be is said at once, and leaves nothing.
    let before = std::fs::read_dir(place.path()).unwrap().count();
    for (args, status, what) in [
        (vec!["--type", "int4", "--group-size", "0"], 2, "--group-size 0"),
        (vec!["--type", "int4", "--method", "rtn", "--act-order"], 2, "--act-order"),
        (vec!["--type", "int4", "--sym", "--asym"], 2, "--asym"),
        (vec!["--type", "int5"], 2, "int5"),
        (vec!["--type", "nf4", "--asym"], 2, "not for nf4"),
        (vec!["--type", "q4_0", "--act-order"], 2, "--act-order is for"),
        (vec!["--type", "nf4", "--imatrix", "x"], 2, "for GGUF files"),
    ] {
        let out = path("none");
        let (code, _, err) = rushlight(&[&["quantize", &source, "-o", &out], &args[..]].concat());
        assert_eq!(code, status, "{args:?}: {err}");
        assert!(err.contains(what), "{args:?}: {err}");
    }
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), before);
}

/// A GGUF file becomes a directory with the words and the predictions that it had.
#[test]
fn gguf_files_become_directories() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_str().unwrap().to_string();
    let source = path("model");
    if model(Path::new(&source)).is_none() {
        return;
    }
    let template = json!({"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}", "eos_token": "</s>",
        "bos_token": "<s>", "unk_token": "<unk>"});
    std::fs::write(format!("{source}/tokenizer_config.json"), template.to_string()).unwrap();
    let gguf = path("model.gguf");
    json(&["quantize", &source, "-o", &gguf, "--type", "F32", "--json"]);
    let text = path("text.txt");
    std::fs::write(&text, "Once upon a time, there was a red bird in a big tree. It saw Tom. ".repeat(180)).unwrap();
    for (kind, extra) in
        [("nf4", vec![]), ("int4", vec!["--method", "rtn", "--group-size", "32"]), ("int8", vec!["--calib", &text])]
    {
        let (from_directory, from_gguf) = (path(&format!("{kind}-d")), path(&format!("{kind}-g")));
        for (source, out) in [(&source, &from_directory), (&gguf, &from_gguf)] {
            let args = [&["quantize", source, "-o", out, "--type", kind, "--json"], &extra[..]].concat();
            assert_eq!(json(&args)["layers"], 14, "{kind}");
        }
        let config: Value =
            serde_json::from_slice(&std::fs::read(format!("{from_gguf}/config.json")).unwrap()).unwrap();
        assert_eq!((&config["model_type"], &config["torch_dtype"]), (&json!("llama"), &json!("float32")), "{kind}");
        let ids = |model: &str| json(&["tokenize", model, "-f", &text, "--json"])["ids"].clone();
        assert_eq!(ids(&from_gguf), ids(&gguf), "{kind}");
        let chat = path("chat.json");
        std::fs::write(&chat, json!({"messages": [{"role": "user", "content": "Hello"}]}).to_string()).unwrap();
        assert_eq!(json(&["tokenize", &from_gguf, "--chat", &chat, "--json"])["text"], "Hello", "{kind}");
        let figures =
            json(&["perplexity", &from_gguf, "-f", &text, "--ctx", "128", "--against", &from_directory, "--json"]);
        // GPTQ sums up in another order where rows stand in another: a code may differ here and there.
        assert!(figures["kl"].as_f64().unwrap() < 1e-4, "{kind}: {figures}");
    }
}
