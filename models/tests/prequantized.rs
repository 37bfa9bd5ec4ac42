//! Directories that other tools have quantized: every weight as their own arithmetic gives it, and what is refused.

mod foreign;

use foreign::{Dir, Gptq, Random};
use rushlight_models::checkpoint::{Checkpoint, safetensors};
use rushlight_models::model::Weight;
use rushlight_quant::formats::{Format, f16_to_f32, f32_to_f16};
use serde_json::json;
use std::path::Path;

/// The weights of the tensor `name`, its columns in their own order, and its format.
fn weights(checkpoint: &Checkpoint, name: &str) -> (Format, Vec<f32>) {
    let tensor = checkpoint.tensor(name).unwrap();
    let &[rows, cols] = &tensor.info.shape[..] else { panic!("{name} is no matrix") };
    assert_eq!(tensor.info.bytes(), Some(tensor.data.len()));
    let mut weight = Weight::new(tensor.info.format, rows, cols, tensor.data).unwrap();
    if let Some(order) = checkpoint.column_order(name) {
        weight = weight.with_order(order).unwrap();
    }
    let mut out = vec![f32::NAN; rows * cols];
    for (r, out) in out.chunks_exact_mut(cols).enumerate() {
        weight.decode_row(r, out);
    }
    (tensor.info.format, out)
}

#[test]
fn reference_checkpoints() {
    let root = std::env::var_os("RUSHLIGHT_SHARED").map(std::path::PathBuf::from);
    let root = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"));
    let root = root.join("fixtures/gptq_ckpt_tiny");
    if !root.exists() {
        println!("skipped: no reference data at {}", root.display());
        return;
    }
    for (name, format, ordered) in [
        ("gptq_b4_g32_sym", Format::Q4_0, false),
        ("gptq_b4_g32_sym_act", Format::Q4_0, true),
        ("gptq_b8_g32_sym", Format::Q8_0, false),
        ("gptq_b8_g64_sym_act", Format::Q8_0, true),
        ("gptq_v2_b4_g32_asym", Format::Q4_Z, false),
        ("awq_gemm_b4_g32", Format::Q4_Z, false),
        ("bnb_nf4", Format::NF4, false),
        ("bnb_nf4_dq", Format::NF4, false),
    ] {
        let checkpoint = Checkpoint::open(&root.join(name)).unwrap();
        let expected = safetensors::open(&root.join(name).join("expected.safetensors")).unwrap();
        let mut seen = 0;
        for want in &expected.tensors {
            let Some(tensor) = want.info.name.strip_prefix("dequant.") else { continue };
            let (is, got) = weights(&checkpoint, tensor);
            let want = want.data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
            assert_eq!(want.len(), got.len());
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                let exact = format != Format::NF4;
                // AutoAWQ multiplied in f16.
                let got = if name.starts_with("awq") { f16_to_f32(f32_to_f16(*got)) } else { *got };
                let room = if exact { 0.0 } else { 1e-6 * want.abs() };
                assert!((got - want).abs() <= room, "{name} {tensor} {i}: {got} is not {want}");
            }
            assert_eq!(is, format, "{name} {tensor}");
            seen += 1;
        }
        assert_eq!(seen, 7, "{name}");
        let orders = checkpoint.tensors().iter().filter(|t| checkpoint.column_order(&t.name).is_some()).count();
        assert_eq!(orders > 0, ordered, "{name}");
        let raw: Vec<_> = checkpoint.raw_tensors().iter().map(|t| &t.name).collect();
        assert!(raw.is_empty(), "{name}: {raw:?}");
        assert!(checkpoint.notes().is_empty());
    }
}

#[test]
fn gptq_of_every_kind() {
    let mut random = Random(1);
    for (bits, v2, group, sym, act, g_idx, scales, rows, cols, want) in [
        (4, false, 32, true, false, true, "F16", 32, 96, Format::Q4_0),
        (4, true, 32, false, true, true, "F16", 64, 128, Format::Q4_Z),
        (4, false, 128, false, false, true, "F16", 96, 256, Format::Q4_Z),
        (4, false, -1, true, false, false, "F16", 32, 160, Format::Q4_0),
        (4, true, 64, true, false, false, "F16", 32, 160, Format::Q4_0),
        (2, false, 32, false, true, true, "F16", 32, 64, Format::Q4_0),
        (3, false, 32, false, true, true, "F16", 160, 96, Format::Q4_0),
        (3, true, 96, false, false, true, "F16", 32, 96, Format::Q4_0),
        (8, false, 32, true, true, true, "F16", 32, 96, Format::Q8_0),
        (8, true, 64, false, true, true, "F16", 32, 128, Format::Q8_Z),
        (4, false, 32, true, false, true, "F32", 32, 64, Format::Q8_F),
        (8, false, 32, true, true, true, "BF16", 32, 64, Format::Q8_F),
        (8, false, 32, false, true, true, "F32", 32, 64, Format::Q8_Z),
        // Neither groups nor rows of whole blocks.
        (4, false, 16, false, true, true, "F16", 32, 64, Format::F32),
        (4, true, 40, false, false, false, "F16", 32, 80, Format::F32),
        (8, false, -1, true, false, true, "F16", 32, 36, Format::F32),
    ] {
        let layer = Gptq::random(&mut random, bits, v2, group, sym, act, scales, rows, cols);
        let mut dir = Dir::new();
        layer.put(&mut dir, "model.layers.0.mlp.up_proj", g_idx);
        let checkpoint = Checkpoint::open(&dir.write(&layer.config())).unwrap();
        let label = format!("{bits} bits, v2 {v2}, group {group}, act {act}, {scales}, {rows} x {cols}");
        let (format, got) = weights(&checkpoint, "model.layers.0.mlp.up_proj.weight");
        assert_eq!(format, want, "{label}");
        assert_eq!(checkpoint.notes().len(), usize::from(format == Format::F32), "{label}");
        for (i, (got, want)) in got.iter().zip(layer.weights()).enumerate() {
            let room = if scales == "F16" { 0.0 } else { 1e-5 * want.abs() };
            assert!((got - want).abs() <= room, "{label}, weight {i}: {got} is not {want}");
        }
        assert_eq!(checkpoint.bytes(), (rows * want.row_bytes(cols).unwrap()) as u64);
    }
}

#[test]
fn the_order_of_columns_is_shared() {
    let mut random = Random(2);
    let layer = Gptq::random(&mut random, 4, false, 32, true, true, "F16", 32, 96);
    let other = Gptq::random(&mut random, 4, false, 32, true, true, "F16", 32, 96);
    let mut dir = Dir::new();
    layer.put(&mut dir, "a", true);
    layer.put(&mut dir, "b", true);
    other.put(&mut dir, "c", true);
    let checkpoint = Checkpoint::open(&dir.write(&layer.config())).unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|name| checkpoint.column_order(&format!("{name}.weight")).unwrap());
    assert!(std::sync::Arc::ptr_eq(&a, &b) && a != c);
}

#[test]
fn awq() {
    let mut random = Random(3);
    for (group, rows, cols, want) in [(32, 64, 96, Format::Q4_Z), (-1, 8, 64, Format::Q4_Z), (24, 16, 48, Format::F32)]
    {
        let groups = if group == -1 { 1 } else { cols / group as usize };
        let codes: Vec<u8> = (0..rows * cols).map(|_| random.below(16) as u8).collect();
        let zeros: Vec<u8> = (0..rows * groups).map(|_| random.below(16) as u8).collect();
        let scales: Vec<u16> = (0..groups * rows).map(|_| f32_to_f16(random.number() * 0.1)).collect();
        // Eight outputs in a word, in this order.
        let pack = |at: &dyn Fn(usize) -> u8| {
            let order = [0, 2, 4, 6, 1, 3, 5, 7];
            order.iter().enumerate().fold(0u32, |word, (k, &o)| word | u32::from(at(o)) << (4 * k)).to_le_bytes()
        };
        let (mut qweight, mut qzeros) = (Vec::new(), Vec::new());
        for i in 0..cols {
            (0..rows / 8).for_each(|w| qweight.extend(pack(&|o| codes[(w * 8 + o) * cols + i])));
        }
        for g in 0..groups {
            (0..rows / 8).for_each(|w| qzeros.extend(pack(&|o| zeros[(w * 8 + o) * groups + g])));
        }
        let mut dir = Dir::new();
        dir.add("l.qweight", "I32", &[cols, rows / 8], qweight);
        dir.add("l.qzeros", "I32", &[groups, rows / 8], qzeros);
        dir.add("l.scales", "F16", &[groups, rows], scales.iter().flat_map(|s| s.to_le_bytes()).collect());
        let config =
            json!({"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": true});
        let checkpoint = Checkpoint::open(&dir.write(&config)).unwrap();
        let (format, got) = weights(&checkpoint, "l.weight");
        assert_eq!(format, want);
        for o in 0..rows {
            for i in 0..cols {
                let g = i / (cols / groups);
                let want = f16_to_f32(scales[g * rows + o])
                    * (f32::from(codes[o * cols + i]) - f32::from(zeros[o * groups + g]));
                assert_eq!(got[o * cols + i], want, "group {group}: {o}, {i}");
            }
        }
    }
}

#[test]
fn tables_of_bitsandbytes() {
    let mut random = Random(4);
    for kind in ["nf4", "fp4"] {
        let map = if kind == "nf4" { foreign::NF4 } else { foreign::FP4 };
        // Blocks of whole rows, blocks over the ends of rows, and blocks that no run of 32 fits.
        for (block, rows, cols, nested) in
            [(64, 8, 64, false), (64, 7, 96, true), (128, 3, 160, true), (64, 5, 40, true)]
        {
            let total: usize = rows * cols;
            let codes: Vec<u8> = (0..total).map(|_| random.below(16) as u8).collect();
            let bytes: Vec<u8> = codes.chunks(2).map(|two| two[0] << 4 | two[1]).collect();
            let blocks = total.div_ceil(block);
            let mut state = json!({"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": [rows, cols]});
            let mut dir = Dir::new();
            let scales: Vec<f32> = if nested {
                let offset = 0.25f32;
                state["nested_blocksize"] = json!(4);
                state["nested_dtype"] = json!("float32");
                state["nested_offset"] = json!(offset);
                let steps: Vec<u8> = (0..blocks).map(|_| random.below(256) as u8).collect();
                let table: Vec<f32> = (0..256).map(|i| (i as f32 - 128.0) / 128.0).collect();
                let outer: Vec<f32> = (0..blocks.div_ceil(4)).map(|_| random.number() * 0.1).collect();
                dir.floats("l.weight.nested_quant_map", &table);
                dir.floats("l.weight.nested_absmax", &outer);
                dir.add("l.weight.absmax", "U8", &[blocks], steps.clone());
                (0..blocks).map(|b| table[usize::from(steps[b])] * outer[b / 4] + offset).collect()
            } else {
                let scales: Vec<f32> = (0..blocks).map(|_| random.number()).collect();
                dir.floats("l.weight.absmax", &scales);
                scales
            };
            dir.add("l.weight", "U8", &[total / 2, 1], bytes);
            dir.floats("l.weight.quant_map", &map);
            let state = state.to_string().into_bytes();
            dir.add(&format!("l.weight.quant_state.bitsandbytes__{kind}"), "U8", &[state.len()], state);
            dir.floats("norm.weight", &[1.0; 4]);
            let config = json!({"quant_method": "bitsandbytes", "load_in_4bit": true});
            let checkpoint = Checkpoint::open(&dir.write(&config)).unwrap();
            let (format, got) = weights(&checkpoint, "l.weight");
            let whole = if kind == "nf4" { Format::NF4 } else { Format::FP4 };
            assert_eq!(format, if cols % 32 == 0 { whole } else { Format::F32 });
            for i in 0..total {
                assert_eq!(got[i], map[usize::from(codes[i])] * scales[i / block], "{kind} {rows} x {cols}: {i}");
            }
            assert!(checkpoint.find("norm.weight").is_some());
        }
    }
}

#[test]
fn signed_bytes_of_bitsandbytes() {
    let mut random = Random(5);
    for cols in [64, 40] {
        let codes: Vec<u8> = (0..3 * cols).map(|_| random.below(256) as u8).collect();
        let scales = [0.5f32, 12.7, 0.003];
        let mut dir = Dir::new();
        dir.add("l.weight", "I8", &[3, cols], codes.clone());
        dir.floats("l.SCB", &scales);
        dir.add("l.weight_format", "U8", &[], vec![0]);
        // Older configurations name no method.
        let checkpoint = Checkpoint::open(&dir.write(&json!({"load_in_8bit": true}))).unwrap();
        let (format, got) = weights(&checkpoint, "l.weight");
        assert_eq!(format, if cols == 64 { Format::Q8_F } else { Format::F32 });
        for (i, got) in got.iter().enumerate() {
            let want = f64::from(codes[i] as i8) * f64::from(scales[i / cols]) / 127.0;
            assert!((f64::from(*got) - want).abs() <= 2e-7 * want.abs(), "{i}: {got} is not {want}");
        }
        assert!(checkpoint.raw_tensors().is_empty());
    }
}

#[test]
fn descriptions_in_files_of_their_own() {
    let layer = Gptq::random(&mut Random(6), 4, true, 32, false, false, "F16", 32, 64);
    for name in ["quantize_config.json", "quant_config.json"] {
        let mut dir = Dir::new();
        layer.put(&mut dir, "l", true);
        let path = dir.write(&serde_json::Value::Null);
        let mut config = layer.config();
        config.as_object_mut().unwrap().remove("quant_method");
        std::fs::write(path.join(name), config.to_string()).unwrap();
        let opened = Checkpoint::open(&path);
        match name {
            "quantize_config.json" => drop(weights(&opened.unwrap(), "l.weight")),
            // Read as AWQ, the shapes do not fit.
            _ => assert!(opened.unwrap_err().to_string().contains("qzeros")),
        }
    }
}

/// What opening `dir` says.
fn refused(dir: &Dir, config: &serde_json::Value) -> String {
    let error = Checkpoint::open(&dir.write(config)).expect_err("it must be refused").to_string();
    assert_eq!(error.lines().count(), 1);
    error
}

#[test]
fn what_a_configuration_must_not_say() {
    let layer = Gptq::random(&mut Random(7), 4, false, 32, true, false, "F16", 32, 64);
    let mut dir = Dir::new();
    layer.put(&mut dir, "l", true);
    for (change, parts) in [
        (json!({"quant_method": "fp8"}), &["'fp8'", "gptq, awq, bitsandbytes, mxfp4"][..]),
        (json!({"quant_method": 4}), &["quant_method is 4", "not a string"]),
        (json!({"quant_method": null}), &["quant_method is not given", "gptq, awq, bitsandbytes"]),
        (json!({"bits": 5}), &["5 bits"]),
        (json!({"bits": -4}), &["-4 bits"]),
        (json!({"bits": "4"}), &["bits is \"4\"", "not a whole number"]),
        (json!({"bits": null}), &["bits", "missing"]),
        (json!({"bits": 8}), &["'l'", "8 bits"]),
        (json!({"group_size": 0}), &["group_size is 0"]),
        (json!({"group_size": -2}), &["group_size is -2"]),
        (json!({"checkpoint_format": "marlin"}), &["'marlin'", "gptq and gptq_v2"]),
        (json!({"is_marlin_format": true}), &["Marlin"]),
        (json!({"pack_dtype": "int8"}), &["int8"]),
        (json!({"dynamic": 1}), &["dynamic"]),
        (json!({"quant_method": "awq", "version": "gemv"}), &["'gemv'", "gemm"]),
        (json!({"quant_method": "awq", "bits": 3}), &["3 bits"]),
        (json!({"quant_method": "bitsandbytes"}), &["bitsandbytes", "no tensor is"]),
    ] {
        let mut config = layer.config();
        for (key, value) in change.as_object().unwrap() {
            config[key] = value.clone();
        }
        let error = refused(&dir, &config);
        assert!(error.contains("config.json") || error.contains(dir.path()), "{error}");
        for part in parts {
            assert!(error.contains(part), "{change}: {error}");
        }
    }
    assert!(refused(&dir, &json!("gptq")).contains("not an object"));
}

#[test]
fn layers_that_do_not_fit_together() {
    let make = || {
        let mut dir = Dir::new();
        let layer = Gptq::random(&mut Random(8), 4, false, 32, true, false, "F16", 32, 64);
        layer.put(&mut dir, "l", true);
        (dir, layer.config())
    };
    for (name, dtype, shape, parts) in [
        ("l.qzeros", "", &[0usize][..], &["'l.qzeros'", "missing"][..]),
        ("l.scales", "", &[0], &["'l.scales'", "missing"]),
        ("l.qzeros", "I32", &[2, 5], &["'l'", "do not fit"]),
        ("l.qzeros", "I32", &[8], &["'l.qzeros'", "not a matrix"]),
        ("l.qzeros", "F32", &[2, 4], &["'l.qzeros'", "I32", "F32"]),
        ("l.qzeros", "I32", &[0, 4], &["empty"]),
        ("l.scales", "F16", &[4, 16], &["'l.scales'", "[2, 32]"]),
        ("l.scales", "I32", &[2, 16], &["'l.scales'", "F16 or BF16 or F32"]),
        ("l.qweight", "I32", &[256], &["'l.qweight'", "not a matrix"]),
        ("l.qweight", "I64", &[8, 32], &["'l.qweight'", "I64"]),
        ("l.g_idx", "I32", &[63], &["'l.g_idx'", "[64]"]),
        ("l.g_idx", "I64", &[64], &["'l.g_idx'", "I64"]),
    ] {
        let (mut dir, config) = make();
        dir.remove(name);
        if !dtype.is_empty() {
            let size = if dtype == "I64" {
                8
            } else if dtype == "F16" {
                2
            } else {
                4
            };
            dir.add(name, dtype, shape, vec![0; shape.iter().product::<usize>() * size]);
        }
        let error = refused(&dir, &config);
        for part in parts {
            assert!(error.contains(part), "{name} {shape:?}: {error}");
        }
    }
    for (index, group) in [(0, 2), (63, -1)] {
        let (mut dir, config) = make();
        dir.change("l.g_idx", 4 * index, &i32::to_le_bytes(group));
        let error = refused(&dir, &config);
        assert!(error.contains("'l.g_idx'") && error.contains(&format!("group {group} of 2")), "{error}");
    }
    let (mut dir, config) = make();
    dir.change("l.scales", 2 * 40, &f32_to_f16(f32::NAN).to_le_bytes());
    let error = refused(&dir, &config);
    assert!(error.contains("'l.scales'") && error.contains("group 1, output 8"), "{error}");
    let (mut dir, config) = make();
    dir.floats("l.weight", &[0.0; 2]);
    assert!(refused(&dir, &config).contains("'l.weight'"));
    let (mut dir, mut config) = make();
    dir.remove("l.g_idx");
    config["group_size"] = json!(16);
    assert!(refused(&dir, &config).contains("2 groups"));
}

#[test]
fn states_that_make_no_sense() {
    let make = |state: serde_json::Value| {
        let mut dir = Dir::new();
        dir.add("l.weight", "U8", &[64, 1], vec![0; 64]);
        dir.floats("l.weight.absmax", &[1.0, 2.0]);
        dir.floats("l.weight.quant_map", &foreign::NF4);
        let state = state.to_string().into_bytes();
        dir.add("l.weight.quant_state.bitsandbytes__nf4", "U8", &[state.len()], state);
        dir
    };
    let good = json!({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]});
    let config = json!({"quant_method": "bitsandbytes"});
    Checkpoint::open(&make(good.clone()).write(&config)).unwrap();
    for (field, value, part) in [
        ("quant_type", json!("fp4"), "quant_type"),
        ("quant_type", json!(null), "shape"),
        ("blocksize", json!(0), "blocksize"),
        ("blocksize", json!("64"), "blocksize"),
        ("blocksize", json!(32), "'l.weight.absmax'"),
        ("shape", json!([2]), "shape"),
        ("shape", json!([2, 0]), "shape"),
        ("shape", json!([2, 32]), "64 bytes"),
        ("shape", json!([u64::MAX, u64::MAX]), "shape"),
        ("nested_blocksize", json!(256), "'l.weight.absmax'"),
    ] {
        let mut state = good.clone();
        state[field] = value;
        let error = refused(&make(state), &config);
        assert!(error.contains(part), "{field}: {error}");
    }
    assert!(refused(&make(json!("{")), &config).contains("shape"));
    let mut dir = make(good.clone());
    dir.change("l.weight.quant_map", 4, &0.5f32.to_le_bytes());
    assert!(refused(&dir, &config).contains("not the table of NF4"));
    let mut dir = make(good);
    dir.remove("l.weight");
    assert!(refused(&dir, &config).contains("'l.weight' is missing"));
}

/// Whatever is damaged, opening and packing say so or go on; they do not panic.
#[test]
fn damage_is_survived() {
    let mut random = Random(9);
    let opened = std::cell::Cell::new(0);
    let try_it = |dir: &Dir, config: &serde_json::Value| {
        let Ok(checkpoint) = Checkpoint::open(&dir.write(config)) else { return };
        opened.set(opened.get() + 1);
        for info in checkpoint.tensors() {
            assert_eq!(Some(checkpoint.tensor(&info.name).unwrap().data.len()), info.bytes());
        }
    };
    for round in 0..150 {
        let (bits, scales) = ([2, 3, 4, 8][round % 4], ["F16", "BF16", "F32"][round % 3]);
        let layer = Gptq::random(&mut random, bits, round % 2 == 0, 32, false, true, scales, 32, 64);
        let mut dir = Dir::new();
        layer.put(&mut dir, "l", true);
        let mut config = layer.config();
        match random.below(4) {
            0 => config["bits"] = json!([2, 3, 4, 8][random.below(4) as usize]),
            1 => config["group_size"] = json!(random.below(70) as i64 - 1),
            2 => config["dynamic"] = json!({"+:l": {"bits": 8}}),
            _ => config["quant_method"] = json!(["gptq", "awq", "bitsandbytes"][random.below(3) as usize]),
        }
        for _ in 0..random.below(3) {
            let name = ["l.qweight", "l.qzeros", "l.scales", "l.g_idx"][random.below(4) as usize];
            dir.damage(name, &mut random);
        }
        try_it(&dir, &config);
        let mut dir = Dir::new();
        let mut state = json!({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [4, 32]});
        state["nested_blocksize"] = json!(1 + random.below(300));
        state["nested_offset"] = json!(0.1);
        let state = state.to_string().into_bytes();
        dir.add("l.weight.quant_state.bitsandbytes__nf4", "U8", &[state.len()], state);
        dir.add("l.weight", "U8", &[64, 1], vec![3; 64]);
        dir.add("l.weight.absmax", "U8", &[2], vec![1, 2]);
        dir.floats("l.weight.nested_absmax", &[1.0, 2.0][..1 + random.below(2) as usize]);
        dir.floats("l.weight.nested_quant_map", &[0.5; 256]);
        dir.floats("l.weight.quant_map", &foreign::NF4);
        for _ in 0..random.below(3) {
            let parts = [".quant_state.bitsandbytes__nf4", "", ".absmax", ".nested_absmax", ".nested_quant_map"];
            dir.damage(&format!("l.weight{}", parts[random.below(5) as usize]), &mut random);
        }
        try_it(&dir, &json!({"quant_method": "bitsandbytes"}));
    }
    assert!(opened.get() > 50, "{} were opened", opened.get());
}
