//! Directories of quantized weights that we write: other tools' own bytes, and read back as they were meant.

mod foreign;

use foreign::{Dir, Gptq, Random};
use rushlight_models::checkpoint::export::{
    GptqGrid, GptqLayer, GptqVersion, GptqWriter, Nf4Options, Original, write_nf4,
};
use rushlight_models::checkpoint::{Checkpoint, Kind, safetensors};
use rushlight_models::model::Weight;
use rushlight_quant::formats::{Format, f16_to_f32};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Every tensor of a file: type, shape, bytes.
fn tensors(path: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let file = safetensors::open(path).unwrap();
    let known = file.tensors.into_iter().map(|t| (t.info.name, t.info.format.name().to_owned(), t.info.shape, t.data));
    let raw = file.raw.into_iter().map(|t| (t.name, t.dtype, t.shape, t.data));
    known.chain(raw).map(|(name, dtype, shape, data)| (name, (dtype, shape, data.to_vec()))).collect()
}

/// A directory of float weights: two layers, a norm, a head, a tokenizer.
fn source(random: &mut Random, rows: usize, cols: usize) -> (Dir, Checkpoint) {
    let mut dir = Dir::new();
    for name in ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"] {
        let weights = (0..rows * cols).flat_map(|_| random.number().to_le_bytes()).collect();
        dir.add(&format!("{name}.weight"), "F32", &[rows, cols], weights);
    }
    dir.add("model.norm.weight", "BF16", &[3], vec![1, 2, 3, 4, 5, 6]);
    dir.add("lm_head.weight", "F16", &[4, 2], (0..16).collect());
    dir.add("model.position_ids", "I64", &[2], vec![7; 16]);
    let path = dir.write(&Value::Null);
    std::fs::write(path.join("tokenizer.json"), "{\"a\": 1}").unwrap();
    std::fs::write(path.join("quantize_config.txt"), "not this one").unwrap();
    std::fs::write(path.join("modeling.py"), "evil").unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    (dir, checkpoint)
}

const LAYERS: [&str; 2] = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"];

fn names() -> Vec<String> {
    LAYERS.map(String::from).to_vec()
}

fn grid_of(layer: &Gptq) -> GptqGrid {
    GptqGrid {
        bits: layer.bits,
        group: usize::try_from(layer.group).ok(),
        symmetric: layer.sym,
        act_order: layer.act,
        version: if layer.v2 { GptqVersion::V2 } else { GptqVersion::V1 },
    }
}

fn view(layer: &Gptq) -> GptqLayer<'_> {
    GptqLayer { codes: &layer.codes, scales: &layer.scales, zeros: &layer.zeros, g_idx: &layer.g_idx }
}

#[test]
fn gptq_directories_are_read_back() {
    let mut random = Random(1);
    for (bits, v2, group, sym, act) in [
        (4, false, 32, true, true),
        (4, true, 32, false, false),
        (4, false, -1, false, false),
        (8, false, 64, true, true),
        (8, true, 32, false, true),
        (3, false, 32, false, true),
        (2, true, 32, false, false),
        // The last group is shorter.
        (4, false, 96, true, false),
        (3, true, 96, false, true),
    ] {
        let (rows, cols) = (64, 128);
        let (_dir, source) = source(&mut random, rows, cols);
        let layers: Vec<Gptq> =
            LAYERS.iter().map(|_| Gptq::random(&mut random, bits, v2, group, sym, act, "F16", rows, cols)).collect();
        let out = tempfile::tempdir().unwrap();
        let target = out.path().join("quantized");
        let original = Original::of(&source).unwrap();
        let mut writer = GptqWriter::create(&original, &target, &names(), grid_of(&layers[0])).unwrap();
        for (name, layer) in LAYERS.iter().zip(&layers) {
            writer.layer(name, &view(layer)).unwrap();
        }
        assert!(!target.exists());
        writer.finish().unwrap();
        let written = tensors(&target.join("model.safetensors"));
        for (name, layer) in LAYERS.iter().zip(&layers) {
            let [qweight, qzeros, scales] = layer.packed();
            assert_eq!(written[&format!("{name}.qweight")].2, qweight);
            assert_eq!(written[&format!("{name}.qzeros")].2, qzeros);
            assert_eq!(written[&format!("{name}.scales")].2, scales);
        }
        let old = tensors(&source.path().join("model.safetensors"));
        for name in ["model.norm.weight", "lm_head.weight", "model.position_ids"] {
            assert_eq!(written[name], old[name]);
        }
        assert_eq!(written.len(), 8 + 3);
        let again = Checkpoint::open(&target).unwrap();
        let Kind::HuggingFace { config, .. } = again.kind() else { panic!() };
        assert_eq!(
            config["quantization_config"],
            serde_json::from_slice::<Value>(&std::fs::read(target.join("quantize_config.json")).unwrap()).unwrap()
        );
        assert_eq!(config["model_type"], "llama");
        for (name, layer) in LAYERS.iter().zip(&layers) {
            let tensor = again.tensor(&format!("{name}.weight")).unwrap();
            let mut stored = vec![0.0; rows * cols];
            tensor.info.format.decode(&tensor.data, &mut stored);
            let order = again.column_order(&format!("{name}.weight"));
            let whole = layer.g_idx.iter().max() != Some(&1) || !act;
            assert_eq!(order.is_some(), act && tensor.info.format != Format::F32, "{bits} bits");
            assert!(tensor.info.format != Format::F32 || !whole);
            for (i, want) in layer.weights().into_iter().enumerate() {
                let c = order.as_ref().map_or(i % cols, |o| o.iter().position(|&o| o as usize == i % cols).unwrap());
                assert_eq!(stored[i / cols * cols + c], want, "{bits} bits: {i}");
            }
        }
        let mut files: Vec<_> = std::fs::read_dir(&target).unwrap().map(|e| e.unwrap().file_name()).collect();
        files.sort();
        let want =
            ["config.json", "model.safetensors", "quantize_config.json", "quantize_config.txt", "tokenizer.json"];
        assert_eq!(files, want);
    }
}

fn shared(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("RUSHLIGHT_SHARED").map(PathBuf::from);
    let root = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"));
    let path = root.join("fixtures/gptq_ckpt_tiny").join(name);
    if !path.exists() {
        println!("skipped: no reference data at {}", path.display());
        return None;
    }
    Some(path)
}

/// The float directory that a quantized one stands for, and the names of its layers.
fn dequantized(fixture: &Path) -> (Dir, Checkpoint, Vec<String>) {
    let mut dir = Dir::new();
    let mut layers = Vec::new();
    for (name, (dtype, shape, data)) in tensors(&fixture.join("expected.safetensors")) {
        if let Some(name) = name.strip_prefix("dequant.") {
            dir.add(name, &dtype, &shape, data);
            layers.push(name.strip_suffix(".weight").unwrap().to_owned());
        }
    }
    let checkpoint = Checkpoint::open(&dir.write(&Value::Null)).unwrap();
    (dir, checkpoint, layers)
}

/// What GPTQModel has packed, unpacked and packed again, is the same.
#[test]
fn gptqmodels_own_bytes() {
    for (name, bits, group, act_order, version) in [
        ("gptq_b4_g32_sym", 4, 32, false, GptqVersion::V1),
        ("gptq_b4_g32_sym_act", 4, 32, true, GptqVersion::V1),
        ("gptq_b8_g32_sym", 8, 32, false, GptqVersion::V1),
        ("gptq_b8_g64_sym_act", 8, 64, true, GptqVersion::V1),
        ("gptq_v2_b4_g32_asym", 4, 32, false, GptqVersion::V2),
    ] {
        let Some(fixture) = shared(name) else { return };
        let theirs = tensors(&fixture.join("model.safetensors"));
        let (_dir, source, layers) = dequantized(&fixture);
        let out = tempfile::tempdir().unwrap();
        let target = out.path().join("again");
        let grid = GptqGrid { bits, group: Some(group), symmetric: name.ends_with("sym"), act_order, version };
        let original = Original::of(&source).unwrap();
        let mut writer = GptqWriter::create(&original, &target, &layers, grid).unwrap();
        for layer in &layers {
            let part = |end: &str| &theirs[&format!("{layer}.{end}")];
            let words = |end: &str| -> Vec<u32> {
                part(end).2.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
            };
            let (qweight, qzeros, g_idx) = (words("qweight"), words("qzeros"), words("g_idx"));
            let (rows, cols, groups) = (part("scales").1[1], g_idx.len(), part("scales").1[0]);
            let (each, bits, mask) = (32 / bits as usize, bits as usize, (1u32 << bits) - 1);
            let code = |i: usize| qweight[i % cols / each * rows + i / cols] >> (i % cols % each * bits) & mask;
            let codes: Vec<u8> = (0..rows * cols).map(|i| code(i) as u8).collect();
            let lowest = u16::from(version == GptqVersion::V1);
            let zero = |o: usize, g: usize| qzeros[g * rows / each + o / each] >> (o % each * bits) & mask;
            let zeros: Vec<u16> = (0..rows * groups).map(|i| zero(i / groups, i % groups) as u16 + lowest).collect();
            let scale = |o: usize, g: usize| part("scales").2.as_chunks::<2>().0[g * rows + o];
            let scales: Vec<f32> =
                (0..rows * groups).map(|i| f16_to_f32(u16::from_le_bytes(scale(i / groups, i % groups)))).collect();
            writer.layer(layer, &GptqLayer { codes: &codes, scales: &scales, zeros: &zeros, g_idx: &g_idx }).unwrap();
        }
        writer.finish().unwrap();
        let ours = tensors(&target.join("model.safetensors"));
        assert_eq!(ours.len(), 4 * layers.len());
        for (tensor, ours) in ours {
            assert_eq!(ours, theirs[&tensor], "{name} {tensor}");
        }
    }
}

/// What bitsandbytes has encoded, decoded and encoded again, is the same.
#[test]
fn bitsandbytes_own_codes() {
    for (name, double) in [("bnb_nf4", false), ("bnb_nf4_dq", true)] {
        let Some(fixture) = shared(name) else { return };
        let theirs = tensors(&fixture.join("model.safetensors"));
        let (_dir, source, layers) = dequantized(&fixture);
        let out = tempfile::tempdir().unwrap();
        let target = out.path().join("again");
        let mut told = Vec::new();
        let original = Original::of(&source).unwrap();
        write_nf4(&original, &target, &layers, Nf4Options { double }, &mut |layer| told.push(layer.to_owned()))
            .unwrap();
        assert_eq!(told, layers);
        let ours = tensors(&target.join("model.safetensors"));
        let parts = if double { 6 } else { 4 };
        assert_eq!(ours.len(), parts * layers.len());
        for (tensor, (dtype, shape, data)) in &ours {
            let (their_dtype, their_shape, their_data) = &theirs[tensor];
            assert_eq!(dtype, their_dtype, "{tensor}");
            if tensor.contains("quant_state") {
                let (ours, theirs): (Value, Value) =
                    (serde_json::from_slice(data).unwrap(), serde_json::from_slice(their_data).unwrap());
                let offset = |state: &Value| state["nested_offset"].as_f64().unwrap_or(0.0);
                assert!((offset(&ours) - offset(&theirs)).abs() < 1e-3);
                for (key, value) in theirs.as_object().unwrap() {
                    assert!(key == "nested_offset" || &ours[key] == value, "{tensor} {key}");
                }
                continue;
            }
            assert_eq!(shape, their_shape, "{tensor}");
            // Magnitudes that are quantized themselves are not those that were quantized before.
            if !double || !tensor.contains("absmax") {
                assert!(data == their_data, "{name} {tensor}");
            }
        }
        let again = Checkpoint::open(&target).unwrap();
        for layer in &layers {
            let tensor = again.tensor(&format!("{layer}.weight")).unwrap();
            assert_eq!(tensor.info.format, Format::NF4);
            let (mut got, mut want) = (vec![0.0; tensor.info.elements().unwrap()], vec![0.0; 1]);
            tensor.info.format.decode(&tensor.data, &mut got);
            want.resize(got.len(), 0.0);
            let floats = source.tensor(&format!("{layer}.weight")).unwrap();
            Format::F32.decode(&floats.data, &mut want);
            let weight = Weight::new(Format::F32, floats.info.shape[0], floats.info.shape[1], floats.data).unwrap();
            assert!(!double || weight.in_nf4().unwrap().data()[..] == tensor.data[..], "{layer} in memory");
            for (got, want) in got.iter().zip(&want) {
                let room = if double { 0.02 * want.abs() } else { 0.0 };
                assert!((got - want).abs() <= room, "{layer}: {got} is not {want}");
            }
        }
    }
}

/// Sizes that are no multiples of anything, and layers that are left as they are.
#[test]
fn nf4_of_odd_sizes() {
    let mut random = Random(5);
    for double in [true, false] {
        let (_dir, source) = source(&mut random, 7, 31);
        let out = tempfile::tempdir().unwrap();
        let target = out.path().join("nf4");
        let original = Original::of(&source).unwrap();
        write_nf4(&original, &target, &names()[..1], Nf4Options { double }, &mut |_| ()).unwrap();
        let again = Checkpoint::open(&target).unwrap();
        let Kind::HuggingFace { config, .. } = again.kind() else { panic!() };
        let quantization = &config["quantization_config"];
        assert_eq!(quantization["llm_int8_skip_modules"], json!([LAYERS[1], "lm_head"]));
        let [mut old, mut new] = [vec![0.0; 217], vec![0.0; 217]];
        for (checkpoint, out) in [(&source, &mut old), (&again, &mut new)] {
            let tensor = checkpoint.tensor(&format!("{}.weight", LAYERS[0])).unwrap();
            assert_eq!(tensor.info.format, Format::F32);
            Format::F32.decode(&tensor.data, out);
        }
        // Half the widest step of the table, and what double quantization loses.
        assert!(old.iter().zip(&new).all(|(a, b)| (a - b).abs() < 0.17), "{old:?} {new:?}");
        assert!(old != new);
        let untouched = format!("{}.weight", LAYERS[1]);
        assert_eq!(source.tensor(&untouched).unwrap().data[..], again.tensor(&untouched).unwrap().data[..]);
        // Numbers lie where their type may lie.
        let bytes = std::fs::read(target.join("model.safetensors")).unwrap();
        let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        for (name, entry) in header.as_object().unwrap() {
            let size = match entry["dtype"].as_str() {
                Some("F32") => 4,
                Some("F16" | "BF16") => 2,
                Some("I64") => 8,
                _ => 1,
            };
            let begin = entry["data_offsets"][0].as_u64().unwrap_or(0);
            assert!(begin.is_multiple_of(size) && (8 + length).is_multiple_of(8), "{name} at {begin}");
        }
    }
}

#[test]
fn what_is_refused_leaves_nothing() {
    let mut random = Random(6);
    let (_dir, source) = source(&mut random, 64, 128);
    let layer = Gptq::random(&mut random, 4, false, 32, true, true, "F16", 64, 128);
    let grid = grid_of(&layer);
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("quantized");
    let original = Original::of(&source).unwrap();
    let create = |layers: &[String], grid| GptqWriter::create(&original, &target, layers, grid);
    let says = |result: Result<(), rushlight_models::Error>, parts: &[&str]| {
        let error = result.expect_err("it must be refused").to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0, "{error}");
    };
    let none = |result: Result<GptqWriter<'_>, _>| result.map(|_| ());
    says(none(create(&["nowhere".into()], grid)), &["'nowhere.weight'"]);
    says(none(create(&["model.norm".into()], grid)), &["'model.norm.weight'", "not a matrix"]);
    says(none(create(&["lm_head".into()], grid)), &["'lm_head'", "[4, 2]", "cannot hold"]);
    says(none(create(&names(), GptqGrid { bits: 5, ..grid })), &["5 bits"]);
    says(none(create(&names(), GptqGrid { group: Some(0), ..grid })), &["groups of Some(0)"]);
    let write = |change: &dyn Fn(&mut Gptq)| {
        let mut layer = Gptq {
            codes: layer.codes.clone(),
            ..Gptq::random(&mut Random(7), 4, false, 32, true, true, "F16", 64, 128)
        };
        change(&mut layer);
        create(&names(), grid).unwrap().layer(LAYERS[0], &view(&layer))
    };
    write(&|_| ()).unwrap();
    says(write(&|l| l.codes[5] = 16), &[LAYERS[0], "code 16 of 4 bits"]);
    says(write(&|l| l.zeros[5] = 0), &["zero point 0", "V1"]);
    says(write(&|l| l.zeros[5] = 17), &["zero point 17"]);
    says(write(&|l| l.g_idx[5] = 4), &["group 4 of 4"]);
    says(write(&|l| l.scales[5] = 70000.0), &["scale 70000"]);
    says(write(&|l| l.scales[5] = f32::NAN), &["scale NaN"]);
    says(write(&|l| l.codes.truncate(8191)), &["8191 codes"]);
    let other_first = || create(&names(), grid).unwrap().layer(LAYERS[1], &view(&layer));
    says(other_first(), &["was due"]);
    let too_soon = create(&names(), grid).unwrap().finish();
    says(too_soon, &["was written", "was due"]);
    let mut bad = Dir::new();
    bad.floats("model.norm.weight", &[1.0]);
    bad.add("l.weight", "F32", &[1, 2], [1.0f32, f32::INFINITY].iter().flat_map(|x| x.to_le_bytes()).collect());
    let bad = Checkpoint::open(&bad.write(&Value::Null)).unwrap();
    let bad = Original::of(&bad).unwrap();
    says(write_nf4(&bad, &target, &["l".into()], Nf4Options { double: true }, &mut |_| ()), &["'l.weight'", "NaN"]);
    // What is there already is left alone.
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("mine"), "x").unwrap();
    let error = create(&names(), grid).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("not empty"), "{error}");
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 1);
}
