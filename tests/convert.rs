//! Directories turned into GGUF files: the same model, the same tokens.

mod golden;

use golden::{Steps, best, check, check_golden, distance, ids, json, options, shared};
use rushlight::engine::{Engine, Options};
use rushlight_models::checkpoint::gguf::Writer;
use rushlight_models::checkpoint::{Checkpoint, TensorInfo, Value};
use rushlight_models::convert::{Conversion, Directory, to_gguf, to_huggingface};
use rushlight_models::tokenizer::{ChatTemplate, Specials, Tokenizer};
use rushlight_quant::formats::Format;
use serde_json::{Value as Json, json};
use std::path::{Path, PathBuf};

/// Writes the GGUF file of the directory `source` to `path`, every matrix in f32.
fn convert(source: &Path, path: &Path) -> Conversion {
    let checkpoint = Checkpoint::open(source).unwrap();
    let conversion = to_gguf(&checkpoint).unwrap();
    let infos = conversion.tensors.iter().map(|t| TensorInfo { format: Format::F32, ..t.info() });
    let mut writer = Writer::create(path, &conversion.metadata, &infos.collect::<Vec<_>>()).unwrap();
    for tensor in &conversion.tensors {
        let data = tensor.data(&checkpoint).unwrap();
        let mut values = vec![0.0f32; tensor.info().elements().unwrap()];
        tensor.format.decode(&data, &mut values);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.write(&tensor.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    conversion
}

#[test]
fn every_family_gives_the_same_logits_as_gguf() {
    let out = tempfile::tempdir().unwrap();
    let names = "llama llama-rope3 llama-rope3-v5config llama-tied-bias llama-linear-rope llama-yarn \
                 llama-sharded-bf16 llama-sharded-f16 llama-torchbin yi mistral mixtral qwen2 qwen2-tied qwen2_moe qwen3 \
                 qwen3_moe gemma gemma2 gemma3 phi phi3 glm glm4 chatglm2-6b chatglm3-6b chatglm3-6b-32k baichuan-7b baichuan-13b \
                 baichuan2-7b baichuan2-13b internlm-7b internlm2 deepseek_v2 deepseek_v3 gpt_oss gpt2 gpt_bigcode \
                 gpt_bigcode-mha gpt_neox starcoder2 falcon-7b-style falcon-40b-style bloom olmo olmo2 smollm3 granite \
                 cohere stablelm ernie4_5 helium";
    let mut failed = Vec::new();
    for name in names.split_whitespace() {
        let Some(dir) = shared(&format!("fixtures/families/{name}")) else { return };
        let path = out.path().join(format!("{name}.gguf"));
        let one = || {
            convert(&dir, &path);
            let mut engine = Engine::open(&path, &options(&[])).unwrap();
            check(&mut engine, &dir.join("golden.json"), Steps::All);
            // An adapter made for the directory fits its file too.
            let adapters = std::fs::read_dir(dir.join("adapters"));
            for adapter in adapters.into_iter().flatten().map(|entry| entry.unwrap().path()) {
                engine.set_adapters(&[(adapter.clone(), 1.0)]).unwrap();
                check(&mut engine, &adapter.join("golden.json"), Steps::All);
            }
        };
        if std::panic::catch_unwind(one).is_err() {
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
    let Some(dir) = shared("fixtures/families/phi3-longrope") else { return };
    let path = out.path().join("longrope.gguf");
    convert(&dir, &path);
    let long = Options { context: Some(64), ..options(&[]) };
    check(&mut Engine::open(&path, &long).unwrap(), &dir.join("golden.json"), Steps::Last);
}

/// Compares the file of the directory `dir` with itself on the first or second text of the checkpoint's own.
fn same_as_gguf(dir: &Path, golden: &Path, case: usize, label: &str) {
    let ids = ids(&json(golden)["cases"][case]["input_ids"]);
    let file = dir.with_extension("gguf");
    convert(dir, &file);
    let logits = |path: &Path| {
        let mut all = Vec::new();
        let mut engine = Engine::open(path, &options(&[])).unwrap();
        engine.prompt_all(0, &ids, &mut |_, logits| all.push(logits.to_vec())).unwrap();
        all
    };
    for (position, (got, want)) in logits(&file).iter().zip(&logits(dir)).enumerate() {
        assert!(distance(got, want) < 3e-4, "{label} position {position}");
    }
}

/// A copy of the checkpoint `name` with some fields of its configuration changed.
fn changed(name: &str, changes: &Json, copy: &Path) -> Option<PathBuf> {
    let dir = shared(&format!("fixtures/families/{name}"))?;
    let mut config = json(&dir.join("config.json"));
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::create_dir(copy).unwrap();
    std::fs::copy(dir.join("model.safetensors"), copy.join("model.safetensors")).unwrap();
    std::fs::write(copy.join("config.json"), config.to_string()).unwrap();
    Some(dir.join("golden.json"))
}

/// Files say nothing of rotary bases that grow with a text and of logn attention, which short texts do not need.
#[test]
fn what_files_leave_out_changes_nothing_where_it_does_not_matter() {
    let out = tempfile::tempdir().unwrap();
    for name in ["qwen-7b", "internlm2-bias-dynntk"] {
        let copy = out.path().join(name);
        let Some(golden) = changed(name, &json!({}), &copy) else { return };
        same_as_gguf(&copy, &golden, 0, name);
    }
}

/// Adds vectors to a file of safetensors.
fn add(file: &Path, vectors: impl Iterator<Item = (String, Vec<f32>)>) {
    let old = std::fs::read(file).unwrap();
    let (length, rest) = old.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let (mut header, mut data): (Json, _) = (serde_json::from_slice(header).unwrap(), data.to_vec());
    for (name, values) in vectors {
        let start = data.len();
        data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        header[name] = json!({"dtype": "F32", "shape": [values.len()], "data_offsets": [start, data.len()]});
    }
    let header = header.to_string();
    std::fs::write(file, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()).unwrap();
}

/// The norms of StableLM's heads lie in directories one by one, without a bias, and in files together.
#[test]
fn norms_of_single_heads() {
    let out = tempfile::tempdir().unwrap();
    let (with, without) = (out.path().join("with"), out.path().join("without"));
    let Some(golden) = changed("stablelm", &json!({"qk_layernorm": true}), &with) else { return };
    changed("stablelm", &json!({}), &without).unwrap();
    let config = json(&with.join("config.json"));
    let count = |name: &str| config[name].as_u64().unwrap() as usize;
    let (layers, width) = (count("num_hidden_layers"), count("hidden_size") / count("num_attention_heads"));
    let kinds = [("q", count("num_attention_heads")), ("k", count("num_key_value_heads"))];
    let all =
        (0..layers).flat_map(|l| kinds.into_iter().flat_map(move |(k, heads)| (0..heads).map(move |h| (l, k, h))));
    let vectors = all.map(|(layer, kind, head)| {
        let name = format!("model.layers.{layer}.self_attn.{kind}_layernorm.norms.{head}.weight");
        (name, (0..width).map(|i| 0.5 + ((7 * i + 3 * head + layer) % 11) as f32 / 10.0).collect())
    });
    add(&with.join("model.safetensors"), vectors);
    same_as_gguf(&with, &golden, 1, "stablelm");
    let last = [&with, &without]
        .map(|dir| Engine::open(dir, &options(&[])).unwrap().prompt(0, &[5, 7, 11], &mut |_| true).unwrap().to_vec());
    assert!(distance(&last[0], &last[1]) > 0.1);
    // A head that lacks its norm is named.
    std::fs::copy(without.join("model.safetensors"), with.join("model.safetensors")).unwrap();
    let error = Engine::open(&with, &options(&[])).err().unwrap().to_string();
    assert!(error.contains("q_layernorm.norms.1"), "{error}");
}

#[test]
fn what_is_unusual_for_an_architecture_is_said() {
    let out = tempfile::tempdir().unwrap();
    let sliding = json!({"use_sliding_window": true, "sliding_window": 5, "max_window_layers": 1});
    for (i, (name, changes)) in [
        ("falcon-rw-alibi", json!({})),
        ("qwen2", sliding.clone()),
        ("qwen3", sliding.clone()),
        ("qwen3_moe", json!({"norm_topk_prob": false})),
        ("qwen2_moe", json!({"norm_topk_prob": true})),
        ("gemma2", json!({"layer_types": ["full_attention", "sliding_attention"], "hidden_activation": "gelu"})),
        ("gemma2", json!({"attn_logit_softcapping": null, "final_logit_softcapping": null})),
        ("gemma3", json!({"layer_types": ["full_attention", "sliding_attention", "full_attention"]})),
        ("gpt_oss", json!({"layer_types": ["full_attention", "sliding_attention"]})),
        ("gpt_neox", json!({"hidden_act": "gelu_fast"})),
        ("gpt_bigcode", json!({"activation_function": "gelu"})),
        ("gpt2", json!({"activation_function": "relu"})),
        ("mixtral", json!({"hidden_act": "gelu"})),
        ("phi", json!({"tie_word_embeddings": true})),
    ]
    .into_iter()
    .enumerate()
    {
        let copy = out.path().join(i.to_string());
        let Some(golden) = changed(name, &changes, &copy) else { return };
        same_as_gguf(&copy, &golden, 1, &format!("{name} {changes}"));
    }
}

/// Writes the GGUF file `source` as llama.cpp's converter does today: what makes keys and values of latent vectors is in two
/// parts, the keys' transposed, and lengths are those of attention on the latent vectors themselves.
fn split_latent(source: &Path, out: &Path) {
    let checkpoint = Checkpoint::open(source).unwrap();
    let mut metadata = checkpoint.metadata().unwrap().clone();
    let get = |key: &str| metadata.u64(&format!("deepseek2.{key}")).unwrap() as usize;
    let (heads, latent, rotated) =
        (get("attention.head_count"), get("attention.kv_lora_rank"), get("rope.dimension_count"));
    let (key, value) = (get("attention.key_length"), get("attention.value_length"));
    for (name, n) in [
        ("head_count_kv", 1),
        ("key_length", latent + rotated),
        ("value_length", latent),
        ("key_length_mla", key),
        ("value_length_mla", value),
    ] {
        metadata.0.insert(format!("deepseek2.attention.{name}"), Value::Unsigned(n as u64));
    }
    let plain = key - rotated;
    let mut tensors: Vec<(TensorInfo, Vec<u8>)> = Vec::new();
    for info in checkpoint.tensors() {
        let data = checkpoint.tensor(&info.name).unwrap().data;
        if !info.name.contains("attn_kv_b") {
            tensors.push((info.clone(), data.to_vec()));
            continue;
        }
        let at = |row: usize, col: usize| data[4 * (row * latent + col)..][..4].to_vec();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for first in (0..heads).map(|h| h * (plain + value)) {
            (0..latent).for_each(|c| (0..plain).for_each(|r| keys.extend(at(first + r, c))));
            (plain..plain + value).for_each(|r| (0..latent).for_each(|c| values.extend(at(first + r, c))));
        }
        for (part, shape, data) in [("k", [heads, latent, plain], keys), ("v", [heads, value, latent], values)] {
            let name = info.name.replace("attn_kv_b", &format!("attn_{part}_b"));
            tensors.push((TensorInfo { name, shape: shape.into(), ..info.clone() }, data));
        }
    }
    let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
    let mut writer = Writer::create(out, &metadata, &infos).unwrap();
    tensors.iter().for_each(|(info, data)| writer.write(&info.name, data).unwrap());
    writer.finish().unwrap();
}

#[test]
fn latent_matrices_in_two_parts() {
    let out = tempfile::tempdir().unwrap();
    for name in ["deepseek_v2", "deepseek_v3"] {
        let Some(dir) = shared(&format!("fixtures/families/{name}")) else { return };
        let (file, parts) = (out.path().join(format!("{name}.gguf")), out.path().join(format!("{name}-parts.gguf")));
        convert(&dir, &file);
        split_latent(&file, &parts);
        check(&mut Engine::open(&parts, &options(&[])).unwrap(), &dir.join("golden.json"), Steps::All);
    }
}

#[test]
fn what_gguf_cannot_say_is_refused_or_told() {
    for (name, why) in
        [("chatglm-6b", "no form in GGUF"), ("chatglm2-6b-ptuning", "no place for Prefix"), ("gptj", "no form in GGUF")]
    {
        let Some(dir) = shared(&format!("fixtures/families/{name}")) else { return };
        let error = to_gguf(&Checkpoint::open(&dir).unwrap()).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(why), "{name}: {error}");
    }
    for (name, notes) in [
        ("qwen-7b", &["logn", "text grows"][..]),
        ("internlm2-bias-dynntk", &["text grows", "llama.cpp does not read"]),
        ("baichuan-13b", &["40"]),
        ("cohere", &["64 layers"]),
        ("deepseek_v2", &["26 or 27"]),
        ("qwen3_moe", &["experts"]),
        ("ernie4_5", &["no biases"]),
        ("falcon-rw-alibi", &["no biases"]),
        ("gemma2", &["scale of attention"]),
    ] {
        let Some(dir) = shared(&format!("fixtures/families/{name}")) else { return };
        let conversion = to_gguf(&Checkpoint::open(&dir).unwrap()).unwrap();
        assert!(notes.iter().all(|n| conversion.notes.iter().any(|note| note.contains(n))), "{:?}", conversion.notes);
    }
}

/// Writes the GGUF file `source` as a directory.
fn convert_back(source: &Path, dir: &Path) {
    let checkpoint = Checkpoint::open(source).unwrap();
    let Directory { config, tensors } = to_huggingface(&checkpoint).unwrap();
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for tensor in &tensors {
        assert_eq!(tensor.format, Format::F32);
        let start = data.len();
        data.extend_from_slice(&tensor.data(&checkpoint).unwrap());
        let about = serde_json::json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, data.len()]});
        header.insert(tensor.name.clone(), about);
    }
    let header = serde_json::Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
}

#[test]
fn every_family_comes_back_from_gguf() {
    let out = tempfile::tempdir().unwrap();
    let names = "llama llama-rope3 llama-tied-bias llama-linear-rope llama-yarn yi mistral qwen2 qwen2-tied";
    for name in names.split_whitespace() {
        let Some(dir) = shared(&format!("fixtures/families/{name}")) else { return };
        let (file, back) = (out.path().join(format!("{name}.gguf")), out.path().join(name));
        convert(&dir, &file);
        if name == "llama-rope3" {
            // Its original context is not one that a model in use has, so the factors are nobody's rule.
            let error = to_huggingface(&Checkpoint::open(&file).unwrap()).err().unwrap().to_string();
            assert!(error.contains("not Llama 3's"), "{error}");
            continue;
        }
        convert_back(&file, &back);
        check_golden(&mut Engine::open(&back, &options(&[])).unwrap(), &dir.join("golden.json"), name);
        let (own, config) = (json(&dir.join("config.json")), json(&back.join("config.json")));
        assert_eq!((&own["model_type"], &own["architectures"]), (&config["model_type"], &config["architectures"]));
    }
    let Some(dir) = shared("fixtures/families/llama") else { return };
    let error = to_huggingface(&Checkpoint::open(&dir).unwrap()).err().unwrap().to_string();
    assert!(error.contains("needs no conversion"), "{error}");
}

#[test]
fn a_real_model_keeps_its_words() {
    let Some(dir) = shared("models/stories260K-hf") else { return };
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("stories.gguf");
    assert_eq!(convert(&dir, &path).notes, Vec::<String>::new());
    let reference = json(&dir.join("greedy_reference.json"));
    let mut engine = Engine::open(&path, &options(&[])).unwrap();
    let mut last = engine.prompt(0, &ids(&reference["prompt_ids"]), &mut |_| true).unwrap().to_vec();
    let told = (0..60).map(|_| {
        let id = best(&last);
        last = engine.step(&[(0, id)]).unwrap().to_vec();
        id
    });
    assert_eq!(told.collect::<Vec<_>>(), ids(&reference["greedy_ids"])[1..61]);
}

#[test]
fn a_real_tokenizer_and_its_template_stay_the_same() {
    let Some(dir) = shared("models/stories15M-hf") else { return };
    let conversion = to_gguf(&Checkpoint::open(&dir).unwrap()).unwrap();
    let (own, file) = (Tokenizer::open(&dir).unwrap(), Path::new("stories.gguf"));
    let back = Tokenizer::from_gguf(&conversion.metadata, file).unwrap();
    let text = "Once upon a time, there was a little girl named Lily.\n  She had 3 dogs & a caf\u{e9} \u{1f680}! \u{4f60}\u{597d}";
    let tokens = own.encode(text, Specials::AsText).unwrap();
    assert_eq!(tokens, back.encode(text, Specials::AsText).unwrap());
    assert!(tokens.len() > 20 && own.add_bos() && back.add_bos());
    let source = json(&dir.join("tokenizer_config.json"))["chat_template"].as_str().unwrap().to_owned();
    assert_eq!(conversion.metadata.str("tokenizer.chat_template"), Some(source.as_str()));
    assert!(ChatTemplate::from_gguf(&conversion.metadata, file).unwrap().is_some());
}
