//! gpt-oss as it is published, its experts in MXFP4 under a layout of their own: the weights that they are in floats, the
//! same codes in GGUF, and a base to train on.

mod golden;
mod lesson;

use golden::{distance, ids, json, options, shared};
use lesson::{Adam, isa};
use rushlight::engine::{Engine, Options};
use rushlight::train::batch::Example;
use rushlight::train::tape::{Learner, LoraConfig, Method};
use rushlight_models::checkpoint::{Checkpoint, safetensors};
use rushlight_models::model::Model;
use rushlight_quant::formats::Format;
use rushlight_quant::{Cpu, Isa};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const LEVELS: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The code of each of 32 weights, the power of two that they are divided by, and what they become.
fn encode(weights: &[f32]) -> ([u8; 32], u8, [f32; 32]) {
    let most = weights.iter().fold(0f32, |most, w| most.max(w.abs()));
    let power = most.log2().floor() as i32 - 2;
    let (mut codes, mut decoded) = ([0; 32], [0.0; 32]);
    for (i, w) in weights.iter().enumerate() {
        let far = |code: &usize| (w.abs() / 2f32.powi(power) - LEVELS[*code]).abs();
        let code = (0..8).min_by(|a, b| far(a).total_cmp(&far(b))).unwrap();
        codes[i] = code as u8 | u8::from(*w < 0.0) << 3;
        decoded[i] = w.signum() * LEVELS[code] * 2f32.powi(power);
    }
    (codes, (power + 127) as u8, decoded)
}

/// What the experts of a tensor are in MXFP4.
struct Packed {
    /// `[experts, rows, cols]`
    shape: [usize; 3],
    codes: Vec<u8>,
    scales: Vec<u8>,
}

type Tensors = BTreeMap<String, (&'static str, Vec<usize>, Vec<u8>)>;

fn write(dir: &Path, tensors: &Tensors, config: &Value) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in tensors {
        let begin = data.len();
        data.extend(bytes);
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]}));
    }
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    std::fs::create_dir(dir).unwrap();
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// The reference checkpoint with its experts quantized: as it would be published, and the same weights in floats.
fn published(source: &Path, room: &Path) -> (PathBuf, PathBuf, BTreeMap<String, Packed>) {
    let (mut stored, mut floats, mut experts) = (Tensors::new(), Tensors::new(), BTreeMap::new());
    for tensor in safetensors::open(&source.join("model.safetensors")).unwrap().tensors {
        let (name, shape) = (tensor.info.name, tensor.info.shape);
        if !name.ends_with(".experts.gate_up_proj") && !name.ends_with(".experts.down_proj") {
            stored.insert(name.clone(), ("F32", shape.clone(), tensor.data.to_vec()));
            floats.insert(name, ("F32", shape, tensor.data.to_vec()));
            continue;
        }
        // Floats are stored as [experts, inputs, outputs].
        let &[count, cols, rows] = &shape[..] else { panic!("{name} is {shape:?}") };
        let values: Vec<f32> = tensor.data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let mut packed = Packed { shape: [count, rows, cols], codes: Vec::new(), scales: Vec::new() };
        let mut decoded = vec![0f32; values.len()];
        for row in 0..count * rows {
            let at = |col: usize| (row / rows * cols + col) * rows + row % rows;
            let weights: Vec<f32> = (0..cols).map(|col| values[at(col)]).collect();
            for (group, weights) in weights.chunks(32).enumerate() {
                let (codes, scale, back) = encode(weights);
                packed.codes.extend(codes);
                packed.scales.push(scale);
                back.iter().enumerate().for_each(|(i, w)| decoded[at(32 * group + i)] = *w);
            }
        }
        let blocks = packed.codes.chunks(2).map(|two| two[0] | two[1] << 4).collect();
        stored.insert(format!("{name}_blocks"), ("U8", vec![count, rows, cols / 32, 16], blocks));
        stored.insert(format!("{name}_scales"), ("U8", vec![count, rows, cols / 32], packed.scales.clone()));
        floats.insert(name.clone(), ("F32", shape, decoded.iter().flat_map(|w| w.to_le_bytes()).collect()));
        experts.insert(name, packed);
    }
    let mut config = json(&source.join("config.json"));
    let [dir, plain] = ["published", "floats"].map(|name| room.join(name));
    write(&plain, &floats, &config);
    config["swiglu_limit"] = json!(7.0);
    config["quantization_config"] =
        json!({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]});
    write(&dir, &stored, &config);
    (dir, plain, experts)
}

fn rushlight(isa: Isa, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rushlight"));
    let out = command.env("RUSHLIGHT_ISA", isa.name()).args(args).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    out
}

/// The logits of all of `ids` by the program itself.
fn logits(model: &Path, isa: Isa, ids: &[u32], more: &[&str]) -> Vec<f32> {
    let ids = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let args = [&["logits", model.to_str().unwrap(), "--ids", &ids, "--all", "--json"], more].concat();
    let out: Value = serde_json::from_slice(&rushlight(isa, &args).stdout).unwrap();
    let rows = out["positions"].as_array().unwrap().iter();
    rows.flat_map(|row| row["logits"].as_array().unwrap()).map(|x| x.as_f64().unwrap() as f32).collect()
}

#[test]
fn runs_converts_and_learns() {
    let Some(source) = shared("fixtures/families/gpt_oss") else { return };
    let room = tempfile::tempdir().unwrap();
    let (dir, floats, experts) = published(&source, room.path());
    let ids = ids(&json(&source.join("golden.json"))["cases"][0]["input_ids"]);
    let vocabulary = json(&source.join("config.json"))["vocab_size"].as_u64().unwrap() as usize;
    let furthest = |got: &[f32], want: &[f32]| {
        assert_eq!(got.len(), ids.len() * vocabulary);
        let rows = got.chunks(vocabulary).zip(want.chunks(vocabulary));
        rows.map(|(got, want)| distance(got, want)).fold(0f32, f32::max)
    };

    // As they lie.
    let want = logits(&floats, isa(), &ids, &[]);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        // Activations meet the experts in 16 bits and in 8, and keys and values wait in 16.
        for (how, most) in [(&[][..], 0.03), (&["--step"], 0.1)] {
            let off = furthest(&logits(&dir, isa, &ids, how), &want);
            assert!(off < most, "{} {how:?}: off by {off}", isa.name());
        }
    }

    // In GGUF, code by code: an expert's even rows are its gate, its odd ones up.
    let file = room.path().join("model.gguf");
    let args = ["quantize", dir.to_str().unwrap(), "-o", file.to_str().unwrap(), "--quiet"];
    rushlight(isa(), &[&args[..], &["--keep", "attn|embd|output=F32"]].concat());
    let gguf = Checkpoint::open(&file).unwrap();
    for (name, packed) in &experts {
        let [count, rows, cols] = packed.shape;
        let layer = name.split('.').nth(2).unwrap();
        let parts: &[(&str, usize, usize)] = match name.ends_with("gate_up_proj") {
            true => &[("gate", 0, 2), ("up", 1, 2)],
            false => &[("down", 0, 1)],
        };
        for &(part, first, step) in parts {
            let tensor = gguf.tensor(&format!("blk.{layer}.ffn_{part}_exps.weight")).unwrap();
            assert_eq!((tensor.info.format, &tensor.info.shape[..]), (Format::MXFP4, &[count, rows / step, cols][..]));
            let mut blocks = tensor.data.chunks(17);
            for row in (0..count * rows).filter(|row| row % step == first) {
                for group in row * cols / 32..(row + 1) * cols / 32 {
                    let (block, codes) = (blocks.next().unwrap(), &packed.codes[32 * group..][..32]);
                    assert_eq!(block[0], packed.scales[group]);
                    let halves = codes[..16].iter().zip(&codes[16..]);
                    assert_eq!(block[1..], halves.map(|(low, high)| low | high << 4).collect::<Vec<u8>>());
                }
            }
            assert!(blocks.next().is_none());
        }
    }
    assert_eq!(logits(&file, isa(), &ids, &[]), logits(&dir, isa(), &ids, &[]));
    // Rows too short for blocks of 256 stay what they are, too.
    let file = room.path().join("mix.gguf");
    let args = ["quantize", dir.to_str().unwrap(), "-o", file.to_str().unwrap(), "--type", "Q4_K_M", "--quiet"];
    rushlight(isa(), &args);
    let kept = Checkpoint::open(&file).unwrap();
    let down = "blk.0.ffn_down_exps.weight";
    assert_eq!(kept.tensor(down).unwrap().data[..], gguf.tensor(down).unwrap().data[..]);

    // A base to train on.
    let targets = ids[1..].iter().map(|&id| Some(id)).chain([None]).collect();
    let batch = [Example { ids: ids.clone(), targets }];
    let method = Method::Lora(LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() });
    let base = |dir: &Path| Checkpoint::open(dir).unwrap();
    let mut learner = Learner::new(Model::load(&base(&dir)).unwrap(), Cpu::new(1, isa()), &method, 1).unwrap();
    let before = learner.loss(&batch).unwrap().mean();
    let mut adam = Adam::new(1e-2, 0.0, 1.0);
    for step in 0..3 {
        let mut gradients = learner.params().gradients();
        let loss = learner.backward(&batch, step, &mut gradients).unwrap();
        adam.step(learner.params_mut(), &gradients, 1.0 / loss.tokens as f64);
    }
    let after = learner.loss(&batch).unwrap().mean();
    assert!(after < before - 0.05, "the loss went from {before} to {after}");
    // The adapter changes what it was trained on.
    let trained = learner.model_with_adapter().unwrap();
    let one = Options { threads: Some(1), slots: 1, context: Some(ids.len()), ..options(&[]) };
    let mut engine = Engine::from_model(base(&dir), trained, &one).unwrap();
    let mut got = Vec::new();
    engine.prompt_all(0, &ids, &mut |_, logits| got.extend_from_slice(logits)).unwrap();
    assert!(furthest(&got, &want) > 0.01);
}
