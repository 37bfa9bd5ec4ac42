//! The forward pass against the reference's logits, and what the engine promises about its cache.

mod golden;

use golden::{check_golden, distance, fixture, json, options, shared};
use rushlight::engine::kv::KvFormat;
use rushlight::engine::{Engine, Options};
use rushlight_models::checkpoint::gguf::Writer;
use rushlight_models::checkpoint::{Checkpoint, Metadata, TensorInfo, Value};
use rushlight_models::families::{FAMILIES, Naming, Role};
use rushlight_models::rope::reorder;
use rushlight_quant::formats::Format;
use rushlight_quant::ops::RopeLayout;
use serde_json::Value as Json;
use std::path::{Path, PathBuf};

fn check_family(dir: &Path) {
    let name = dir.display().to_string();
    let mut engine = Engine::open(dir, &options(&[])).unwrap();
    check_golden(&mut engine, &dir.join("golden.json"), &name);
    let Ok(adapters) = std::fs::read_dir(dir.join("adapters")) else { return };
    let mut count = 0;
    for adapter in adapters.map(|entry| entry.unwrap().path()) {
        engine.set_adapters(&[(adapter.clone(), 1.0)]).unwrap();
        check_golden(&mut engine, &adapter.join("golden.json"), &adapter.display().to_string());
        count += 1;
    }
    assert!(count > 0, "{name} has an empty folder of adapters");
    engine.set_adapters(&[]).unwrap();
    check_golden(&mut engine, &dir.join("golden.json"), &format!("{name} without adapters again"));
}

#[test]
fn llama_and_its_adapters() {
    check_family(&fixture("llama"));
}

#[test]
fn qwen2_and_its_adapters() {
    check_family(&fixture("qwen2"));
}

#[test]
fn mistral_with_its_window() {
    check_family(&fixture("mistral"));
}

/// A GGUF file made from a directory, as llama.cpp's conversion makes it: the first `layers` layers, `extra` metadata,
/// `factors` as rope_freqs.
fn to_gguf(dir: &Path, path: &Path, layers: usize, extra: &[(&str, Value)], factors: Option<&[f32]>) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let config = json(&dir.join("config.json"));
    let model_type = config["model_type"].as_str().unwrap();
    let family = FAMILIES.iter().find(|f| f.model_types.contains(&model_type)).unwrap();
    let gguf = family.gguf.unwrap();
    let mut metadata = Metadata::default();
    let arch = gguf.architecture;
    metadata.0.insert("general.architecture".into(), Value::String(arch.into()));
    let head_dim = config["hidden_size"].as_u64().unwrap() / config["num_attention_heads"].as_u64().unwrap();
    let head_dim = config["head_dim"].as_u64().unwrap_or(head_dim);
    for (key, value) in [
        ("block_count", layers as u64),
        ("embedding_length", config["hidden_size"].as_u64().unwrap()),
        ("feed_forward_length", config["intermediate_size"].as_u64().unwrap()),
        ("attention.head_count", config["num_attention_heads"].as_u64().unwrap()),
        ("attention.head_count_kv", config["num_key_value_heads"].as_u64().unwrap()),
        ("attention.key_length", head_dim),
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("context_length", config["max_position_embeddings"].as_u64().unwrap()),
    ] {
        metadata.0.insert(format!("{arch}.{key}"), Value::Unsigned(value));
    }
    for (key, name) in [("attention.layer_norm_rms_epsilon", "rms_norm_eps"), ("rope.freq_base", "rope_theta")] {
        metadata.0.insert(format!("{arch}.{key}"), Value::Float(config[name].as_f64().unwrap()));
    }
    for (key, value) in extra {
        metadata.0.insert(format!("{arch}.{key}"), value.clone());
    }
    let mut tensors: Vec<(TensorInfo, Vec<u8>)> = Vec::new();
    for info in checkpoint.tensors() {
        let (stem, end) = info.name.rsplit_once('.').unwrap();
        let Some((role, layer)) = family.role(Naming::HuggingFace, stem) else { panic!("{}", info.name) };
        if layer >= layers {
            continue;
        }
        let name = format!("{}.{end}", family.name(Naming::Gguf, role, layer).unwrap());
        let mut data = checkpoint.tensor(&info.name).unwrap().data.to_vec();
        if gguf.reordered && matches!(role, Role::Q | Role::K) {
            let row = data.len() / info.shape[0];
            let hd = head_dim as usize;
            let order = reorder(info.shape[0], hd, hd, RopeLayout::Half, RopeLayout::Interleaved);
            data = order.iter().flat_map(|&r| data[r * row..][..row].to_vec()).collect();
        }
        tensors.push((TensorInfo { name, ..info.clone() }, data));
    }
    if let Some(factors) = factors {
        let info = TensorInfo { name: "rope_freqs.weight".into(), format: Format::F32, shape: vec![factors.len()] };
        tensors.push((info, factors.iter().flat_map(|f| f.to_le_bytes()).collect()));
    }
    let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
    let mut writer = Writer::create(path, &metadata, &infos).unwrap();
    for (info, data) in &tensors {
        writer.write(&info.name, data).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn the_same_model_as_gguf_gives_the_same_logits() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama", "qwen2", "mistral"] {
        let (source, path) = (fixture(name), dir.path().join(format!("{name}.gguf")));
        let window = [("attention.sliding_window", Value::Unsigned(8))];
        to_gguf(&source, &path, 2, if name == "mistral" { &window } else { &[] }, None);
        let mut engine = Engine::open(&path, &options(&[])).unwrap();
        check_golden(&mut engine, &source.join("golden.json"), name);
        let Ok(adapters) = std::fs::read_dir(source.join("adapters")) else { continue };
        for adapter in adapters.map(|entry| entry.unwrap().path()) {
            engine.set_adapters(&[(adapter.clone(), 1.0)]).unwrap();
            check_golden(&mut engine, &adapter.join("golden.json"), &adapter.display().to_string());
        }
    }
}

#[test]
fn yarn_and_stored_factors_in_gguf() {
    let dir = tempfile::tempdir().unwrap();
    if let Some(source) = shared("fixtures/families/llama-yarn") {
        let path = dir.path().join("yarn.gguf");
        let extra = [
            ("rope.scaling.type", Value::String("yarn".into())),
            ("rope.scaling.factor", Value::Float(4.0)),
            ("rope.scaling.original_context_length", Value::Unsigned(16)),
        ];
        to_gguf(&source, &path, 2, &extra, None);
        check_golden(&mut Engine::open(&path, &options(&[])).unwrap(), &source.join("golden.json"), "yarn");
    }
    if let Some(source) = shared("fixtures/families/llama-linear-rope") {
        let path = dir.path().join("linear.gguf");
        let extra = [("rope.scaling.type", Value::String("linear".into())), ("rope.scaling.factor", Value::Float(4.0))];
        to_gguf(&source, &path, 2, &extra, None);
        check_golden(&mut Engine::open(&path, &options(&[])).unwrap(), &source.join("golden.json"), "linear");
    }
    if let Some(source) = shared("fixtures/families/llama-rope3") {
        let path = dir.path().join("rope3.gguf");
        to_gguf(&source, &path, 2, &[], Some(&llama3_factors(32, 500000.0, 8.0, 1.0, 4.0, 16.0)));
        check_golden(&mut Engine::open(&path, &options(&[])).unwrap(), &source.join("golden.json"), "rope3");
    }
}

/// What each frequency is divided by under llama3's scaling, by its own formula in wavelengths.
fn llama3_factors(dim: usize, base: f64, factor: f64, low: f64, high: f64, original: f64) -> Vec<f32> {
    let each = (0..dim / 2).map(|i| {
        let wavelength = std::f64::consts::TAU * base.powf(2.0 * i as f64 / dim as f64);
        if wavelength < original / high {
            return 1.0;
        } else if wavelength > original / low {
            return factor as f32;
        }
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
    });
    each.collect()
}

/// A PEFT adapter in llama.cpp's form: GGUF names, and q and k rows in the order of GGUF.
fn adapter_to_gguf(source: &Path, path: &Path, architecture: &str, alpha: f64) {
    let llama = FAMILIES.iter().find(|f| f.name == "llama").unwrap();
    let mut metadata = Metadata::default();
    for (key, value) in [("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", architecture)]
    {
        metadata.0.insert(key.into(), Value::String(value.into()));
    }
    metadata.0.insert("adapter.lora.alpha".into(), Value::Float(alpha));
    let file = rushlight_models::checkpoint::safetensors::open(&source.join("adapter_model.safetensors")).unwrap();
    let tensors = file.tensors.into_iter().map(|tensor| {
        let name = tensor.info.name.strip_prefix("base_model.model.").unwrap();
        let (module, part) = name.strip_suffix(".weight").unwrap().rsplit_once('.').unwrap();
        let (role, layer) = llama.role(Naming::HuggingFace, module).unwrap();
        let name = format!("{}.weight.{}", llama.name(Naming::Gguf, role, layer).unwrap(), part.to_lowercase());
        let mut data = tensor.data.to_vec();
        if part == "lora_B" && matches!(role, Role::Q | Role::K) {
            let (rows, row) = (tensor.info.shape[0], data.len() / tensor.info.shape[0]);
            let order = reorder(rows, 16, 16, RopeLayout::Half, RopeLayout::Interleaved);
            data = order.iter().flat_map(|&r| data[r * row..][..row].to_vec()).collect();
        }
        (TensorInfo { name, ..tensor.info }, data)
    });
    let tensors: Vec<_> = tensors.collect();
    let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
    let mut writer = Writer::create(path, &metadata, &infos).unwrap();
    tensors.iter().for_each(|(info, data)| writer.write(&info.name, data).unwrap());
    writer.finish().unwrap();
}

#[test]
fn gguf_adapters_fit_bases_of_either_form() {
    let dir = tempfile::tempdir().unwrap();
    let (source, base, adapter) = (fixture("llama"), dir.path().join("base.gguf"), dir.path().join("adapter.gguf"));
    to_gguf(&source, &base, 2, &[], None);
    let peft = source.join("adapters/lora-qv");
    adapter_to_gguf(&peft, &adapter, "llama", 16.0);
    for base in [&base, &source] {
        let mut engine = Engine::open(base, &options(&[&adapter])).unwrap();
        check_golden(&mut engine, &peft.join("golden.json"), &base.display().to_string());
    }
    adapter_to_gguf(&peft, &adapter, "qwen2", 16.0);
    let error = Engine::open(&base, &options(&[&adapter])).err().unwrap().to_string();
    assert!(error.contains("another base"), "{error}");
    let error = Engine::open(&source, &options(&[&base])).err().unwrap().to_string();
    assert!(error.contains("not a LoRA adapter"), "{error}");
}

#[test]
fn several_adapters_add_up_and_scale() {
    let dir = fixture("llama");
    let prompt: Vec<u32> = (3..20).collect();
    let mut engine = Engine::open(&dir, &options(&[])).unwrap();
    let mut logits = |adapters: &[(&str, f32)]| {
        let adapters: Vec<_> = adapters.iter().map(|(name, s)| (dir.join("adapters").join(name), *s)).collect();
        engine.set_adapters(&adapters).unwrap();
        assert_eq!(engine.len(0), 0);
        engine.prompt(0, &prompt, &mut |_| true).unwrap().to_vec()
    };
    let base = logits(&[]);
    for name in ["lora-qv", "dora"] {
        let whole = logits(&[(name, 1.0)]);
        assert!(distance(&whole, &base) > 0.1);
        assert!(distance(&logits(&[(name, 0.0)]), &base) < 1e-5);
        assert!(distance(&logits(&[(name, 0.5), (name, 0.5)]), &whole) < 1e-4, "{name}");
    }
    let both = logits(&[("lora-qv", 1.0), ("lora-rslora-all", 1.0)]);
    let other_way = logits(&[("lora-rslora-all", 1.0), ("lora-qv", 1.0)]);
    assert!(distance(&both, &other_way) < 1e-4);
    assert!(distance(&both, &base) > 0.1);
}

#[test]
fn adapters_for_another_base_are_refused_and_change_nothing() {
    let dir = fixture("llama");
    let mut engine = Engine::open(&dir, &options(&[])).unwrap();
    let mut refused = |adapter: PathBuf, why: &str| {
        let error = engine.set_adapters(&[(adapter, 1.0)]).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    let temporary = tempfile::tempdir().unwrap();
    // A copy of an adapter with one word of its configuration changed.
    let changed = |name: &str, adapter: &str, from: &str, to: &str| {
        let (source, target) = (dir.join("adapters").join(adapter), temporary.path().join(name));
        std::fs::create_dir(&target).unwrap();
        std::fs::copy(source.join("adapter_model.safetensors"), target.join("adapter_model.safetensors")).unwrap();
        let config = std::fs::read_to_string(source.join("adapter_config.json")).unwrap();
        assert!(config.contains(from), "{config}");
        std::fs::write(target.join("adapter_config.json"), config.replace(from, to)).unwrap();
        target
    };
    refused(changed("type", "lora-qv", "\"LORA\"", "\"IA3\""), "IA3");
    refused(changed("rank", "lora-qv", "\"r\": 4", "\"r\": 8"), "the rank 8");
    refused(changed("bias", "lora-qv", "\"bias\": \"none\"", "\"bias\": \"all\""), "bias");
    refused(changed("pissa", "lora-qv", "\"init_lora_weights\": true", "\"init_lora_weights\": \"pissa\""), "pissa");
    refused(
        changed("prefix", "prefix-tuning", "\"num_virtual_tokens\": 5", "\"num_virtual_tokens\": 6"),
        "another base",
    );
    refused(temporary.path().join("nowhere"), "nowhere");

    // The adapter of a model with other sizes.
    if let Some(other) = shared("models/adapters") {
        for adapter in std::fs::read_dir(other).unwrap().map(|entry| entry.unwrap().path()) {
            if adapter.join("adapter_config.json").exists() {
                refused(adapter, "another base");
            }
        }
    }
    check_golden(&mut engine, &dir.join("golden.json"), "after the refusals");
}

#[test]
fn a_sequence_does_not_feel_its_company_or_the_threads() {
    let dir = fixture("llama");
    let prompts: [Vec<u32>; 3] = [(3..20).collect(), (100..105).collect(), (7..60).rev().collect()];
    let alone: Vec<Vec<f32>> = (prompts.iter())
        .map(|prompt| {
            let mut engine = Engine::open(&dir, &Options { threads: Some(1), ..Options::default() }).unwrap();
            engine.prompt(0, prompt, &mut |_| true).unwrap();
            engine.step(&[(0, 5)]).unwrap();
            engine.step(&[(0, 6)]).unwrap().to_vec()
        })
        .collect();
    let mut engine = Engine::open(&dir, &options(&[])).unwrap();
    for (slot, prompt) in prompts.iter().enumerate() {
        engine.prompt(slot, prompt, &mut |_| true).unwrap();
    }
    engine.step(&[(2, 5), (0, 5)]).unwrap();
    engine.step(&[(1, 5)]).unwrap();
    let together = engine.step(&[(0, 6), (1, 6), (2, 6)]).unwrap();
    for (slot, alone) in alone.iter().enumerate() {
        assert_eq!(&together[slot * 320..][..320], &alone[..], "slot {slot}");
    }
}

#[test]
fn a_cut_prompt_and_a_shortened_one_are_the_same_prompt() {
    let dir = fixture("mistral");
    let prompt: Vec<u32> = (0..200).map(|i| (i * 7 + 3) % 320).collect();
    let mut engine = Engine::open(&dir, &options(&[])).unwrap();
    let whole = engine.prompt(0, &prompt, &mut |_| true).unwrap().to_vec();
    assert_eq!(engine.len(0), 200);
    engine.prompt(1, &prompt[..77], &mut |_| true).unwrap();
    assert_eq!(engine.prompt(1, &prompt[77..], &mut |_| true).unwrap(), &whole[..]);
    engine.truncate(0, 150);
    assert_eq!(engine.len(0), 150);
    assert_eq!(engine.prompt(0, &prompt[150..], &mut |_| true).unwrap(), &whole[..]);
}

/// In a model of one layer keys and values depend on their own token alone, so a cache from which a range was dropped
/// must be that of the sequence without it.
#[test]
fn forgotten_positions_leave_the_rest_as_if_they_had_never_been() {
    let dir = tempfile::tempdir().unwrap();
    let yarn = [
        ("rope.scaling.type", Value::String("yarn".into())),
        ("rope.scaling.factor", Value::Float(4.0)),
        ("rope.scaling.original_context_length", Value::Unsigned(16)),
    ];
    let factors = llama3_factors(16, 10000.0, 8.0, 1.0, 4.0, 16.0);
    type Kind<'a> = (&'a str, &'a str, &'a [(&'a str, Value)], Option<&'a [f32]>);
    let kinds: [Kind<'_>; 4] = [
        ("plain", "llama", &[], None),
        ("yarn", "llama", &yarn, None),
        ("factors", "llama", &[], Some(&factors)),
        ("half", "qwen2", &[], None),
    ];
    for (name, source, extra, factors) in kinds {
        let path = dir.path().join(format!("{name}.gguf"));
        to_gguf(&fixture(source), &path, 1, extra, factors);
        let adapter = fixture("llama").join("adapters/prefix-tuning");
        assert!(Engine::open(&path, &options(&[&adapter])).is_err(), "a prefix for two layers on a model of one");
        let mut engine = Engine::open(&path, &options(&[])).unwrap();
        let ids: Vec<u32> = (0..90).map(|i| (i * 11 + 5) % 320).collect();
        let kept: Vec<u32> = ids[..10].iter().chain(&ids[43..]).copied().collect();
        engine.prompt(0, &ids, &mut |_| true).unwrap();
        engine.forget(0, 10..43).unwrap();
        assert_eq!(engine.len(0), kept.len());
        engine.prompt(1, &kept, &mut |_| true).unwrap();
        let got = engine.step(&[(0, 9)]).unwrap().to_vec();
        let want = engine.step(&[(1, 9)]).unwrap();
        assert!(distance(&got, want) < 1e-4, "{name}: off by {}", distance(&got, want));
        // Without the turn back it would be far off: the test would notice.
        engine.prompt(2, &ids, &mut |_| true).unwrap();
        assert!(distance(engine.step(&[(2, 9)]).unwrap(), &got) > 1e-2, "{name}");
        assert!(engine.forget(0, 50..59).is_err());
        assert!(engine.forget(0, 5..5).is_ok());
    }
}

#[test]
fn keys_and_values_may_be_kept_in_fewer_bits() {
    let dir = fixture("llama");
    let ids: Vec<u32> = (0..90).map(|i| (i * 11 + 5) % 320).collect();
    let mut exact = Engine::open(&dir, &options(&[])).unwrap();
    let want = exact.prompt(0, &ids, &mut |_| true).unwrap().to_vec();
    let next = exact.step(&[(0, 9)]).unwrap().to_vec();
    exact.forget(0, 10..43).unwrap();
    let moved = exact.step(&[(0, 9)]).unwrap().to_vec();
    for (kv, room, bytes) in [(KvFormat::F16, 2e-3, 2.0), (KvFormat::Q8, 1e-1, 1.25)] {
        let mut engine = Engine::open(&dir, &Options { kv: Some(kv), ..options(&[]) }).unwrap();
        // Heads are 16 wide here: the 4 bytes of a scale fall on 16 codes.
        assert_eq!(engine.memory().kv_per_token as f64, 2.0 * 2.0 * 2.0 * 16.0 * bytes);
        let off = distance(engine.prompt(0, &ids, &mut |_| true).unwrap(), &want);
        assert!(off < room && off > 0.0, "{kv:?}: off by {off}");
        assert!(distance(engine.step(&[(0, 9)]).unwrap(), &next) < room);
        engine.forget(0, 10..43).unwrap();
        assert!(distance(engine.step(&[(0, 9)]).unwrap(), &moved) < room, "{kv:?} after forgetting");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let dir = fixture("llama");
    let open = |context| Engine::open(&dir, &Options { context: Some(context), ..options(&[]) });
    let mut engine = open(16).unwrap();
    assert_eq!((engine.context(), engine.vocab_size(), engine.is_empty(0)), (16, 320, true));
    let mut say = |ids: &[u32]| match engine.prompt(0, ids, &mut |_| true) {
        Ok(_) => String::new(),
        Err(e) => e.to_string(),
    };
    assert!(say(&[1; 17]).contains("17") && say(&[1; 17]).contains("16"));
    assert!(say(&[]).contains("empty"));
    assert!(say(&[320]).contains("320"));
    assert_eq!(say(&[1; 10]), "");
    assert!(say(&[1; 7]).contains("10"));
    assert_eq!(say(&[1; 6]), "");
    assert!(engine.step(&[(0, 1)]).unwrap_err().to_string().contains("full"));
    assert!(engine.step(&[(1, 1), (1, 2)]).unwrap_err().to_string().contains("two tokens"));
    assert!(engine.step(&[(3, 1)]).unwrap_err().to_string().contains("slot 3"));
    assert!(engine.step(&[]).is_err());
    assert!(open(0).is_err());
    assert!(open(usize::MAX / 4).err().unwrap().to_string().contains("context"));
    assert!(open(usize::MAX).is_err());
    let memory = open(1000).unwrap().memory();
    assert_eq!(memory.kv_per_token, 2 * 2 * 2 * 16 * 4);
    assert_eq!(memory.kv, 3 * 1000 * memory.kv_per_token);
}

#[test]
fn a_prompt_stops_when_it_is_told_to() {
    let dir = fixture("llama");
    let mut engine = Engine::open(&dir, &Options { context: Some(2000), ..options(&[]) }).unwrap();
    let prompt: Vec<u32> = (0..1500).map(|i| i % 320).collect();
    let mut told = Vec::new();
    let logits = engine.prompt(0, &prompt, &mut |done| {
        told.push(done);
        done < 1000
    });
    let logits = logits.unwrap().to_vec();
    assert_eq!((told, engine.len(0)), (vec![512, 1024], 1024));
    assert_eq!(engine.prompt(1, &prompt[..1024], &mut |_| true).unwrap(), &logits[..]);
}

#[test]
fn a_weight_that_is_not_a_number_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture("llama");
    std::fs::copy(source.join("config.json"), dir.path().join("config.json")).unwrap();
    let mut bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: Json = serde_json::from_slice(&bytes[8..header]).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let at = header + tensors[name]["data_offsets"][0].as_u64().unwrap() as usize + 400;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let mut engine = Engine::open(dir.path(), &options(&[])).unwrap();
    let error = engine.prompt(0, &[1, 2, 3], &mut |_| true).unwrap_err().to_string();
    assert!(error.contains(name), "{error}");
}
