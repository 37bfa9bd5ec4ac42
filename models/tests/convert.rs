//! What a GGUF file made of a checkpoint holds.

use rushlight_models::checkpoint::gguf::Writer;
use rushlight_models::checkpoint::{Checkpoint, Metadata, TensorInfo, Value};
use rushlight_models::convert::{Conversion, to_gguf, to_huggingface};
use rushlight_models::families::Role;
use rushlight_models::model::Model;
use rushlight_models::tokenizer::Tokenizer;
use rushlight_quant::formats::Format;
use serde_json::{Value as Json, json};
use std::path::{Path, PathBuf};

/// Writes what `conversion` says to `path`, every tensor as the checkpoint stores it.
fn write(conversion: &Conversion, checkpoint: &Checkpoint, path: &Path) {
    let infos: Vec<TensorInfo> = conversion.tensors.iter().map(|t| t.info()).collect();
    let mut writer = Writer::create(path, &conversion.metadata, &infos).unwrap();
    for tensor in &conversion.tensors {
        writer.write(&tensor.name, &tensor.data(checkpoint).unwrap()).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn a_gguf_file_stays_as_it_is_and_a_split_one_becomes_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut metadata = Metadata::default();
    let mut set = |key: &str, value: Value| drop(metadata.0.insert(key.into(), value));
    set("general.architecture", Value::String("llama".into()));
    set("general.name", Value::String("Split".into()));
    set("general.file_type", Value::Unsigned(7));
    set("split.count", Value::Unsigned(2));
    set("split.tensors.count", Value::Unsigned(3));
    let info = |name: &str, format, shape: &[usize]| TensorInfo { name: name.into(), format, shape: shape.to_vec() };
    let parts = [
        vec![info("token_embd.weight", Format::F16, &[3, 4]), info("blk.1.attn_q.bias", Format::F32, &[4])],
        vec![info("odd", Format::Q8_0, &[2, 32])],
    ];
    for (i, infos) in parts.iter().enumerate() {
        metadata.0.insert("split.no".into(), Value::Unsigned(i as u64));
        let path = dir.path().join(format!("m-0000{}-of-00002.gguf", i + 1));
        let mut writer = Writer::create(&path, &metadata, infos).unwrap();
        infos.iter().for_each(|t| writer.write(&t.name, &vec![i as u8 + 1; t.bytes().unwrap()]).unwrap());
        writer.finish().unwrap();
    }
    let source = Checkpoint::open(&dir.path().join("m-00001-of-00002.gguf")).unwrap();
    let conversion = to_gguf(&source).unwrap();
    let roles: Vec<_> = conversion.tensors.iter().map(|t| t.role).collect();
    assert_eq!(roles, [Some((Role::Embedding, 0)), Some((Role::Q, 1)), None]);
    let path = dir.path().join("whole.gguf");
    write(&conversion, &source, &path);
    let whole = Checkpoint::open(&path).unwrap();
    assert_eq!(whole.tensors(), parts.concat());
    for info in whole.tensors() {
        assert_eq!(whole.tensor(&info.name).unwrap().data[..], source.tensor(&info.name).unwrap().data[..]);
    }
    let keys: Vec<&str> = whole.metadata().unwrap().0.keys().map(String::as_str).collect();
    assert_eq!(keys, ["general.architecture", "general.name"]);
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/families").join(name)
}

/// The fixture `name` with some fields of its configuration changed, converted.
fn convert(name: &str, changes: Json) -> Result<Conversion, String> {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture(name);
    std::fs::copy(source.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let mut config: Json = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.path().join("generation_config.json"), r#"{"temperature": 0.5, "top_k": 20}"#).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).map_err(|e| e.to_string())?;
    to_gguf(&checkpoint).map_err(|e| e.to_string())
}

#[test]
fn a_directory_says_in_metadata_what_its_configuration_says() {
    let source = Checkpoint::open(&fixture("llama")).unwrap();
    let conversion = to_gguf(&source).unwrap();
    let said: Vec<String> = conversion
        .metadata
        .0
        .iter()
        .filter(|(k, _)| k.starts_with("llama."))
        .map(|(k, v)| format!("{k} {v:?}"))
        .collect();
    let expected = [
        "llama.attention.head_count Unsigned(4)",
        "llama.attention.head_count_kv Unsigned(2)",
        "llama.attention.layer_norm_rms_epsilon Float(9.999999747378752e-6)",
        "llama.block_count Unsigned(2)",
        "llama.context_length Unsigned(256)",
        "llama.embedding_length Unsigned(64)",
        "llama.feed_forward_length Unsigned(112)",
        "llama.rope.dimension_count Unsigned(16)",
        "llama.rope.freq_base Float(10000.0)",
        "llama.vocab_size Unsigned(320)",
    ];
    assert_eq!(said, expected);
    let text = |key: &str| conversion.metadata.str(key).unwrap().to_owned();
    assert_eq!((text("general.name").as_str(), text("general.size_label").as_str()), ("llama", "109K"));
    assert_eq!((text("general.type").as_str(), text("tokenizer.ggml.model").as_str()), ("model", "none"));
    assert!(conversion.notes.len() == 1 && conversion.notes[0].contains("no tokenizer"));
    let names: Vec<&str> = conversion.tensors.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(
        names[..4],
        ["token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight"]
    );
    assert_eq!(names[names.len() - 2..], ["output_norm.weight", "output.weight"]);
    // Rows of queries change places within a head: the second is what was the first of the head's second half.
    let q = &conversion.tensors[2];
    let (own, new) = (source.tensor("model.layers.0.self_attn.q_proj.weight").unwrap().data, q.data(&source).unwrap());
    let row = own.len() / 64;
    assert!(q.role == Some((Role::Q, 0)) && own.len() == new.len());
    assert_eq!((&new[row..2 * row], &new[2 * row..3 * row]), (&own[8 * row..9 * row], &own[row..2 * row]));
    // As a file it is read, and what asks for its tokenizer is told.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    write(&conversion, &source, &path);
    assert_eq!(Model::load(&Checkpoint::open(&path).unwrap()).unwrap().spec.layers.len(), 2);
    assert!(Tokenizer::open(&path).err().unwrap().to_string().contains("holds no tokenizer"));
}

#[test]
fn switches_are_carried_over_or_told_of() {
    let keys = |conversion: &Conversion, key: &str| conversion.metadata.get(key).map(|v| format!("{v:?}"));
    let plain = convert("llama", json!({})).unwrap();
    assert_eq!(keys(&plain, "general.sampling.temp").unwrap(), "Float(0.5)");
    assert_eq!(keys(&plain, "general.sampling.top_k").unwrap(), "Signed(20)");
    assert!(plain.tensors.iter().all(|t| t.name != "rope_freqs.weight"));
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16});
    let stretched = convert("llama", json!({"rope_scaling": llama3})).unwrap();
    let factors = stretched.tensors.iter().find(|t| t.name == "rope_freqs.weight").unwrap();
    let source = Checkpoint::open(&fixture("llama")).unwrap();
    let values = factors.data(&source).unwrap();
    let values: Vec<f32> = values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    // The first pair turns 16 / 2 pi = 2.546 times in 16 positions: (2.546 - 1) / 3 of it is kept.
    let keep = (16.0 / std::f64::consts::TAU - 1.0) / 3.0;
    assert!((f64::from(values[0]) - 1.0 / (keep + (1.0 - keep) / 8.0)).abs() < 1e-6, "{values:?}");
    assert!(values.len() == 8 && values[1..].iter().all(|f| (f - 8.0).abs() < 1e-5), "{values:?}");
    // With the numbers of Llama 3.1 they are known again.
    let rule = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    let llama31 = convert("llama", json!({"rope_scaling": rule, "rope_theta": 500000.0})).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    write(&llama31, &source, &path);
    let back = to_huggingface(&Checkpoint::open(&path).unwrap()).unwrap();
    assert_eq!(back.config["rope_scaling"], rule);
    assert!(back.tensors.iter().any(|t| t.name == "lm_head.weight"));
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0, "beta_fast": 16.0});
    let yarn = convert("llama", json!({"rope_scaling": yarn})).unwrap();
    for (key, value) in [
        ("type", "String(\"yarn\")"),
        ("factor", "Float(4.0)"),
        ("original_context_length", "Unsigned(256)"),
        ("yarn_beta_fast", "Float(16.0)"),
        ("yarn_beta_slow", "Float(1.0)"),
    ] {
        assert_eq!(keys(&yarn, &format!("llama.rope.scaling.{key}")).unwrap(), value);
    }
    assert!(yarn.notes.iter().any(|n| n.contains("beta_fast")), "{:?}", yarn.notes);
    let stretched = convert("qwen2", json!({"rope_scaling": rule})).unwrap();
    assert!(stretched.notes.iter().any(|n| n.contains("does not read this file")), "{:?}", stretched.notes);
    assert!(!llama31.notes.iter().any(|n| n.contains("llama.cpp")), "{:?}", llama31.notes);
    let granite = convert("llama", json!({"model_type": "granite", "attention_multiplier": 0.3})).unwrap();
    assert_eq!(keys(&granite, "granite.logit_scale").unwrap(), "Float(1.0)");
    let extra = yarn.metadata.f32("llama.rope.scaling.attn_factor").unwrap();
    assert!((extra * (0.1 * 4f32.ln() + 1.0) - 1.0).abs() < 1e-6);
    let wide =
        convert("qwen2", json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 1})).unwrap();
    assert!(wide.notes.iter().any(|n| n.contains("attention window")), "{:?}", wide.notes);
    assert_eq!(keys(&wide, "qwen2.attention.sliding_window").unwrap(), "Unsigned(9)");
    let pattern = wide.metadata.array("qwen2.attention.sliding_window_pattern").unwrap();
    assert_eq!(pattern.ints().collect::<Vec<_>>(), [0, 1]);
    let gelu = convert("llama", json!({"hidden_act": "gelu"})).unwrap();
    assert_eq!(keys(&gelu, "llama.hidden_activation").unwrap(), "String(\"gelu\")");
    assert!(gelu.notes.iter().any(|n| n.contains("llama.cpp reads this file otherwise")), "{:?}", gelu.notes);
    let mistral = convert("mistral", json!({})).unwrap();
    assert_eq!(keys(&mistral, "llama.attention.sliding_window").unwrap(), "Unsigned(8)");
    assert!(mistral.notes.iter().any(|n| n.contains("longer than 8 tokens")), "{:?}", mistral.notes);
    for (changes, why) in [
        (json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": false}}), "rotary positions"),
        (json!({"num_hidden_layers": 3}), "tensors are missing"),
    ] {
        let error = convert("llama", changes.clone()).err().unwrap_or_default();
        assert!(error.contains(why), "{changes}: {error}");
    }
}
