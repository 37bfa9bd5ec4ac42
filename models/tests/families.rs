//! Descriptions of models: what is read from them, and what is refused.

use rushlight_models::checkpoint::gguf::Writer;
use rushlight_models::checkpoint::{Checkpoint, Metadata, TensorInfo, Value};
use rushlight_models::families::{FAMILIES, Naming, Role};
use rushlight_models::model::Model;
use rushlight_models::rope::{Rotary, reorder};
use rushlight_models::spec::{Outline, Rope, RopeScaling};
use rushlight_quant::formats::Format;
use rushlight_quant::ops::RopeLayout;
use serde_json::{Value as Json, json};
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/families").join(name)
}

/// The fixture `name` with some fields of its configuration changed; `null` takes a field away.
fn load(name: &str, changes: Json) -> Result<Model, String> {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture(name);
    std::fs::copy(source.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let mut config: Json = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Json::Null => drop(config.as_object_mut().unwrap().remove(key)),
            value => config[key] = value.clone(),
        }
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    Model::load(&Checkpoint::open(dir.path()).map_err(|e| e.to_string())?).map_err(|e| e.to_string())
}

#[test]
fn the_switches_are_read() {
    let llama = load("llama", json!({})).unwrap().spec;
    assert_eq!((llama.family, llama.layers.len(), llama.heads, llama.kv_heads, llama.head_dim), ("llama", 2, 4, 2, 16));
    assert_eq!(llama.attention_scale, 0.25);
    assert!(
        llama.layers.iter().all(|l| l.window.is_none() && l.experts.is_none()) && !llama.bias.qkv && !llama.tied_head
    );
    let mistral = load("mistral", json!({})).unwrap().spec;
    assert!(mistral.layers.iter().all(|l| l.window == Some(8)));
    // Absent, the window is the reference implementation's.
    let mistral = load("mistral", json!({"sliding_window": null})).unwrap().spec;
    assert!(mistral.layers.iter().all(|l| l.window == Some(4096)));
    let qwen = load("qwen2", json!({})).unwrap().spec;
    assert!(qwen.bias.qkv && !qwen.bias.output && qwen.layers.iter().all(|l| l.window.is_none()));
    let sliding = json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 1});
    let qwen = load("qwen2", sliding).unwrap().spec;
    assert_eq!(qwen.layers.iter().map(|l| l.window).collect::<Vec<_>>(), [None, Some(9)]);
    let types = json!({"use_sliding_window": true, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]});
    let qwen = load("qwen2", types).unwrap().spec;
    assert_eq!(qwen.layers.iter().map(|l| l.window).collect::<Vec<_>>(), [Some(9), None]);
    // A head that is stored although the configuration ties it is not used.
    assert!(load("llama", json!({"tie_word_embeddings": true})).unwrap().spec.tied_head);
}

#[test]
fn what_a_configuration_must_not_say() {
    let linear = json!({"rope_type": "linear", "factor": 2.0});
    for (changes, why) in [
        (json!({"hidden_size": null}), "hidden_size is missing"),
        (json!({"num_hidden_layers": null}), "num_hidden_layers is missing"),
        (json!({"rms_norm_eps": null}), "rms_norm_eps is missing"),
        (json!({"hidden_act": null}), "hidden_act is missing"),
        (json!({"hidden_act": "mish"}), "mish"),
        (json!({"hidden_size": -64}), "not a whole number"),
        (json!({"hidden_size": 64.5}), "not a whole number"),
        (json!({"hidden_size": "64"}), "not a whole number"),
        (json!({"attention_bias": "no"}), "not true or false"),
        (json!({"rope_theta": "big"}), "not a number"),
        (json!({"rope_theta": 0}), "rope_theta"),
        (json!({"num_attention_heads": 0}), "0"),
        (json!({"num_attention_heads": 0, "head_dim": null}), "num_attention_heads 0"),
        (json!({"num_attention_heads": 7, "head_dim": null}), "not a multiple"),
        (json!({"num_key_value_heads": 3}), "cannot share"),
        (json!({"num_key_value_heads": 0}), "key/value heads is 0"),
        (json!({"head_dim": 0}), "head size is 0"),
        (json!({"head_dim": 15}), "15"),
        (json!({"vocab_size": 0}), "vocabulary size"),
        (json!({"vocab_size": 1u64 << 60}), "vocabulary size"),
        (json!({"vocab_size": 321}), "model.embed_tokens.weight should be [321, 64] but is [320, 64]"),
        (json!({"intermediate_size": 1u64 << 63}), "MLP width"),
        (json!({"intermediate_size": 96}), "model.layers.1.mlp.down_proj.weight should be [64, 96] but is [64, 112]"),
        (json!({"num_hidden_layers": 0}), "layers is 0"),
        (json!({"num_hidden_layers": 4000}), "4000 layers"),
        (json!({"num_hidden_layers": 5000}), "not believed"),
        (json!({"num_hidden_layers": u64::MAX}), "not believed"),
        (json!({"rms_norm_eps": -1.0}), "epsilon"),
        (json!({"rms_norm_eps": 1e300}), "epsilon"),
        (json!({"rope_scaling": {"rope_type": "mystic", "factor": 2.0}}), "'mystic'"),
        (json!({"rope_scaling": {"rope_type": "longrope"}}), "short_factor"),
        (
            json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            "original_max_position_embeddings": 16}),
            "1 short factors for 8 pairs",
        ),
        (
            json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}, "original_max_position_embeddings": 16}),
            "long_factor is missing",
        ),
        (json!({"rope_scaling": {"rope_type": "dynamic"}}), "factor is missing"),
        (json!({"rope_scaling": {"factor": 2.0}}), "none named"),
        (json!({"rope_scaling": {"rope_type": 3}}), "not a string"),
        (json!({"rope_scaling": {"rope_type": "linear"}}), "factor is missing"),
        (json!({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}), "factor is 0"),
        (json!({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}), "low_freq_factor is missing"),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}}),
            "not above",
        ),
        (json!({"rope_scaling": linear, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}), "contradict"),
        (json!({"partial_rotary_factor": 2.0}), "32 rotated values"),
        (json!({"partial_rotary_factor": 0.1}), "1 rotated values"),
        (
            json!({"model_type": "phantom"}),
            "'phantom' is not supported; the supported ones are llama, mistral, mixtral, qwen, qwen2",
        ),
        (json!({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}), "quantized by GPTQ"),
        (json!({"model_type": null, "architectures": ["Phantom"]}), "'Phantom'"),
        (json!({"model_type": null, "architectures": null}), "none named"),
        (json!({"attention_bias": true}), "model.layers.1.self_attn.o_proj.bias"),
    ] {
        match load("llama", changes.clone()) {
            Ok(_) => panic!("{changes} was taken"),
            Err(error) => assert!(error.contains(why), "{changes}: {error}"),
        }
    }
    assert!(load("llama", json!({"model_type": null})).is_ok(), "the architecture alone is enough");
    let types = |t: Json| json!({"use_sliding_window": true, "layer_types": t});
    assert!(load("qwen2", types(json!(["full_attention"]))).unwrap_err().contains("1 entries for 2"));
    assert!(load("qwen2", types(json!(["full_attention", "chunked_attention"]))).unwrap_err().contains("chunked"));
}

#[test]
fn every_missing_and_every_extra_tensor_is_named() {
    let error = load("llama", json!({"num_hidden_layers": 3})).unwrap_err();
    for part in "input_layernorm mlp.down_proj mlp.gate_proj mlp.up_proj self_attn.k_proj self_attn.q_proj".split(' ') {
        assert!(error.contains(&format!("model.layers.2.{part}.weight")), "{error}");
    }
    let error = load("llama", json!({"num_hidden_layers": 1})).unwrap_err();
    assert!(
        error.contains("9 tensors have no place") && error.contains("model.layers.1.mlp.up_proj.weight"),
        "{error}"
    );
    assert!(
        load("qwen2", json!({"model_type": "llama"})).unwrap_err().contains("model.layers.0.self_attn.k_proj.bias")
    );
}

/// Whatever number or type stands in a field, the answer is a model or an error.
#[test]
fn no_value_of_any_field_brings_it_down() {
    let config: Json = serde_json::from_slice(&std::fs::read(fixture("llama").join("config.json")).unwrap()).unwrap();
    let odd = [
        json!(0),
        json!(1),
        json!(-1),
        json!(2),
        json!(3),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e308),
        json!(0.5),
        json!(""),
        json!("x"),
        json!([]),
        json!([1]),
        json!({}),
        json!(true),
        json!({"rope_type": "yarn", "factor": 1e-30}),
        json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": u64::MAX, "beta_fast": 1e30}),
    ];
    let mut taken = 0;
    for key in config.as_object().unwrap().keys().chain(["rope_scaling".into(), "layer_types".into()].iter()) {
        for value in &odd {
            taken += usize::from(load("llama", json!({key: value})).is_ok());
        }
    }
    assert!(taken > 0);
}

/// The metadata and tensors of a llama of one layer in GGUF.
fn gguf() -> (Metadata, Vec<(TensorInfo, Vec<u8>)>) {
    let mut metadata = Metadata::default();
    metadata.0.insert("general.architecture".into(), Value::String("llama".into()));
    for (key, n) in [
        ("block_count", 1),
        ("embedding_length", 8),
        ("feed_forward_length", 12),
        ("attention.head_count", 2),
        ("context_length", 32),
    ] {
        metadata.0.insert(format!("llama.{key}"), Value::Unsigned(n));
    }
    metadata.0.insert("llama.attention.layer_norm_rms_epsilon".into(), Value::Float(1e-5));
    let shapes: [(&str, &[usize]); 11] = [
        ("token_embd.weight", &[20, 8]),
        ("output_norm.weight", &[8]),
        ("blk.0.attn_norm.weight", &[8]),
        ("blk.0.attn_q.weight", &[8, 8]),
        ("blk.0.attn_k.weight", &[8, 8]),
        ("blk.0.attn_v.weight", &[8, 8]),
        ("blk.0.attn_output.weight", &[8, 8]),
        ("blk.0.ffn_norm.weight", &[8]),
        ("blk.0.ffn_gate.weight", &[12, 8]),
        ("blk.0.ffn_up.weight", &[12, 8]),
        ("blk.0.ffn_down.weight", &[8, 12]),
    ];
    let tensors = shapes.iter().map(|(name, shape)| {
        let info = TensorInfo { name: (*name).into(), format: Format::F32, shape: shape.to_vec() };
        let zeros = vec![0; info.bytes().unwrap()];
        (info, zeros)
    });
    (metadata, tensors.collect())
}

fn load_gguf(metadata: &Metadata, tensors: &[(TensorInfo, Vec<u8>)]) -> Result<Model, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
    let mut writer = Writer::create(&path, metadata, &infos).unwrap();
    tensors.iter().for_each(|(info, data)| writer.write(&info.name, data).unwrap());
    writer.finish().unwrap();
    Model::load(&Checkpoint::open(&path).map_err(|e| e.to_string())?).map_err(|e| e.to_string())
}

#[test]
fn what_metadata_must_not_say() {
    let (metadata, tensors) = gguf();
    let spec = load_gguf(&metadata, &tensors).unwrap().spec;
    assert!(spec.tied_head && spec.kv_heads == 2 && spec.ropes[0].layout == RopeLayout::Interleaved);
    let string = |s: &str| Value::String(s.into());
    for (key, value, why) in [
        (
            "general.architecture",
            string("phantom"),
            "'phantom' is not supported; the supported ones are llama, qwen, qwen2, qwen2moe",
        ),
        ("general.architecture", string("qwen2"), "qwen2.embedding_length is missing"),
        ("llama.block_count", Value::Unsigned(2), "blk.1.ffn_down.weight"),
        ("llama.block_count", Value::Unsigned(0), "layers is 0"),
        ("llama.block_count", Value::Unsigned(100_000), "not believed"),
        ("llama.block_count", string("1"), "not a whole number"),
        ("llama.embedding_length", Value::Unsigned(16), "token_embd.weight should be [20, 16] but is [20, 8]"),
        ("llama.embedding_length", Value::Unsigned(u64::MAX), "embedding_length"),
        ("llama.attention.head_count", Value::Unsigned(0), "attention.head_count 0"),
        ("llama.attention.head_count", Value::Unsigned(3), "not a multiple"),
        ("llama.attention.head_count_kv", Value::Unsigned(0), "key/value heads is 0"),
        ("llama.attention.key_length", Value::Unsigned(2), "blk.0.attn_q.weight should be [4, 8] but is [8, 8]"),
        ("llama.rope.dimension_count", Value::Unsigned(5), "5 rotated values"),
        ("llama.rope.scaling.type", string("mystic"), "'mystic'"),
        ("llama.rope.scaling.type", string("linear"), "factor is missing"),
        ("llama.expert_count", Value::Unsigned(8), "expert_used_count is missing"),
        ("llama.vocab_size", Value::Unsigned(21), "token_embd.weight should be [21, 8]"),
        ("llama.attention.layer_norm_rms_epsilon", Value::Float(f64::NAN), "epsilon"),
    ] {
        let mut changed = metadata.clone();
        changed.0.insert(key.into(), value.clone());
        if key == "llama.attention.key_length" {
            changed.0.insert("llama.attention.value_length".into(), Value::Unsigned(4));
        }
        match load_gguf(&changed, &tensors) {
            Ok(_) => panic!("{key} = {value:?} was taken"),
            Err(error) => assert!(error.contains(why), "{key} = {value:?}: {error}"),
        }
    }
    for key in metadata.0.keys() {
        let mut without = metadata.clone();
        without.0.remove(key);
        assert!(load_gguf(&without, &tensors).unwrap_err().contains(key), "{key}");
    }
    let with = |name: &str, shape: &[usize], byte: u8| {
        let info = TensorInfo { name: name.into(), format: Format::F32, shape: shape.to_vec() };
        let data = vec![byte; info.bytes().unwrap()];
        load_gguf(&metadata, &[&tensors[..], &[(info, data)]].concat())
    };
    assert!(with("blk.0.mystery.weight", &[2], 0).unwrap_err().contains("blk.0.mystery.weight"));
    assert!(with("rope_freqs.weight", &[3], 1).unwrap_err().contains("[2] but is [3]"));
    assert!(with("rope_freqs.weight", &[2], 0).unwrap_err().contains("not positive"));
    assert_eq!(with("rope_freqs.weight", &[2], 60).unwrap().spec.ropes[0].scaling, RopeScaling::Stored);
    // A norm in blocks of codes has no place in a model.
    let mut blocks = tensors.clone();
    let norm = blocks.iter_mut().find(|(info, _)| info.name == "output_norm.weight").unwrap();
    norm.0 = TensorInfo { format: Format::Q8_0, shape: vec![32], ..norm.0.clone() };
    norm.1 = vec![0; 34];
    assert!(load_gguf(&metadata, &blocks).unwrap_err().contains("output_norm.weight"));
}

#[test]
fn names_and_roles_are_each_others_inverse() {
    for family in FAMILIES {
        for naming in [Naming::HuggingFace, Naming::Gguf] {
            for role in [Role::Embedding, Role::Head, Role::Q, Role::Qkv, Role::O, Role::Down, Role::ExpertDown(5)] {
                let layer = if matches!(role, Role::Embedding | Role::Head) { 0 } else { 17 };
                for name in family.names_of(naming, role, layer) {
                    let role = if family.stacked(naming, role) { role.of_expert(0) } else { role };
                    assert_eq!(family.role(naming, &name), Some((role, layer)), "{name}");
                }
            }
            if naming == Naming::HuggingFace || family.gguf.is_some() {
                assert!([Role::Q, Role::Qkv].iter().any(|&role| family.name(naming, role, 0).is_some()));
            }
            for odd in [
                "blk.+1.attn_q",
                "model.layers.-1.mlp.up_proj",
                "model.layers..mlp.up_proj",
                "blk.99999999999999999999.attn_q",
                "",
            ] {
                assert_eq!(family.role(naming, odd), None, "{odd}");
            }
        }
    }
}

#[test]
fn a_shifted_key_is_the_key_at_the_other_position() {
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_context: 16,
        attention_factor: 1.3,
        truncate: true,
    };
    let rope = Rope { theta: 10000.0, dim: 8, first: 0, layout: RopeLayout::Half, scaling: yarn };
    let rotary = Rotary::new(&rope, None);
    let outline = Outline::default();
    let at = |position| {
        let (mut cos, mut sin) = ([0.0; 4], [0.0; 4]);
        rotary.at(&outline).angles(position, &mut cos, &mut sin);
        (cos, sin)
    };
    let ((c1, s1), (c2, s2)) = (at(1000), at(958));
    let (mut cos, mut sin) = ([0.0; 4], [0.0; 4]);
    rotary.shift(-42, &outline, &mut cos, &mut sin);
    for i in 0..4 {
        assert!((c1[i] * cos[i] - s1[i] * sin[i] - c2[i]).abs() < 1e-5);
        assert!((s1[i] * cos[i] + c1[i] * sin[i] - s2[i]).abs() < 1e-5);
    }
}

#[test]
fn reordering_there_and_back_changes_nothing() {
    let there = reorder(24, 12, 8, RopeLayout::Half, RopeLayout::Interleaved);
    assert_eq!(there[..12], [0, 4, 1, 5, 2, 6, 3, 7, 8, 9, 10, 11]);
    let back = reorder(24, 12, 8, RopeLayout::Interleaved, RopeLayout::Half);
    assert!((0..24).all(|i| there[back[i]] == i));
}

#[test]
fn no_two_families_answer_to_one_name() {
    for (i, a) in FAMILIES.iter().enumerate() {
        for b in &FAMILIES[..i] {
            assert_ne!(a.name, b.name);
            let shared = a.model_types.iter().any(|t| b.model_types.contains(t));
            // Two generations of ChatGLM say the same and differ in their fields.
            assert!(!shared || (a.name, b.name) == ("chatglm2", "chatglm"), "{} and {}", a.name, b.name);
        }
    }
}

/// The fixture `name` as the language model of one of text and images, its tensors called `place` and what they are
/// called alone without `without` at the beginning.
fn wrapped(name: &str, dir: &Path, place: &str, without: &str) {
    let source = fixture(name);
    let file = std::fs::read(source.join("model.safetensors")).unwrap();
    let start = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Json = serde_json::from_slice(&file[8..start]).unwrap();
    let mut tensors = serde_json::Map::new();
    for (name, tensor) in header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__") {
        let alone = name.strip_prefix(without).map_or(name.clone(), |rest| format!("{place}{rest}"));
        tensors.insert(alone, tensor.clone());
    }
    let end = file.len() - start;
    for (i, other) in
        ["vision_tower.vision_model.embeddings.weight", "multi_modal_projector.norm.weight"].iter().enumerate()
    {
        let offsets = [end + 8 * i, end + 8 * (i + 1)];
        tensors.insert((*other).into(), json!({"dtype": "F32", "shape": [2], "data_offsets": offsets}));
    }
    let header = Json::from(tensors).to_string();
    let data = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &file[start..], &[0; 16]].concat();
    std::fs::write(dir.join("model.safetensors"), data).unwrap();
    let mut text: Json = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    let tied = text.as_object_mut().unwrap().remove("tie_word_embeddings");
    let config = json!({
        "model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "text_config": text,
        "vision_config": {"model_type": "pixtral"}, "tie_word_embeddings": tied, "image_token_index": 10,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn a_language_model_is_found_among_what_sees_images() {
    let alone = load("mistral", json!({})).unwrap();
    for (place, without) in [("language_model.", ""), ("model.language_model.", "model.")] {
        let dir = tempfile::tempdir().unwrap();
        wrapped("mistral", dir.path(), place, without);
        let model = Model::load(&Checkpoint::open(dir.path()).unwrap()).unwrap();
        assert_eq!(model.spec, alone.spec);
        let weights = |m: &Model| m.linears().map(|l| l.weight.data().to_vec()).collect::<Vec<_>>();
        assert!(weights(&model) == weights(&alone), "{place}");
    }
    // What is neither the language model's nor known to belong to the images is still too much.
    let dir = tempfile::tempdir().unwrap();
    wrapped("mistral", dir.path(), "speech.", "");
    let error = Model::load(&Checkpoint::open(dir.path()).unwrap()).unwrap_err().to_string();
    assert!(error.contains("model.embed_tokens.weight"), "{error}");
}

#[test]
fn gemma_3_may_leave_out_what_its_code_takes() {
    let dir = tempfile::tempdir().unwrap();
    // As published with the 4B model, but shallow.
    let text = json!({"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 6,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024});
    let config = json!({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
        "boi_token_index": 255_999, "eos_token_id": [1, 106], "vision_config": {"hidden_size": 1152}});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let empty = json!({}).to_string();
    let file = [&(empty.len() as u64).to_le_bytes()[..], empty.as_bytes()].concat();
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let (family, spec) = rushlight_models::families::recognise(&checkpoint).unwrap();
    assert_eq!(
        (family.name, spec.heads, spec.kv_heads, spec.head_dim, spec.vocab_size),
        ("gemma3", 8, 4, 256, 262_208)
    );
    assert_eq!((spec.context_length, spec.tied_head, spec.norm.eps), (131_072, true, 1e-6));
    assert_eq!(spec.ropes[0].scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!((spec.ropes[1].scaling.clone(), spec.ropes[1].theta), (RopeScaling::None, 10000.0));
    assert_eq!(
        spec.layers.iter().map(|l| l.window.is_some()).collect::<Vec<_>>(),
        [true, true, true, true, true, false]
    );
}
