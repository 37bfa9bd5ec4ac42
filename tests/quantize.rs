//! `rushlight quantize` as a person runs it: what it writes, what it refuses, and what is left when it is stopped.

mod chat_model;

use rushlight_models::checkpoint::imatrix::{Entry, Imatrix};
use rushlight_models::checkpoint::{Checkpoint, Metadata, TensorInfo, Value, gguf};
use rushlight_quant::formats::Format;
use rushlight_quant::quantize::encode;
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

struct Place {
    dir: tempfile::TempDir,
}

const HIDDEN: usize = 256;
const FFN: usize = 512;

impl Place {
    fn new() -> Place {
        Place { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().into()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rushlight"));
        command.arg("quantize").args(args).env("RUSHLIGHT_HOME", self.dir.path().join("home"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What it says, and its notes.
    fn ok(&self, args: &[&str]) -> (Json, String) {
        let args = [args, &["--json"]].concat();
        let output = self.run(&args);
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {err}");
        (serde_json::from_slice(&output.stdout).unwrap(), err)
    }

    /// The one line of a failure.
    fn error(&self, status: i32, args: &[&str]) -> String {
        failure(self.run(args), status)
    }

    fn files(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.dir.path()).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }
}

fn failure(output: Output, status: i32) -> String {
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{err}");
    let last = err.lines().last().unwrap_or_default().to_string();
    assert!(last.starts_with("error: "), "{err}");
    last
}

fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("RUSHLIGHT_SHARED").map(PathBuf::from);
    let path = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared")).join(path);
    if !path.exists() {
        println!("skipped: no reference data at {}", path.display());
        return None;
    }
    Some(path)
}

/// The matrices of a llama of two layers.
fn shapes() -> Vec<(String, Vec<usize>)> {
    let mut shapes =
        vec![("token_embd.weight".to_string(), vec![96, HIDDEN]), ("output_norm.weight".into(), vec![HIDDEN])];
    for i in 0..2 {
        for (name, shape) in [
            ("attn_norm", vec![HIDDEN]),
            ("attn_q", vec![HIDDEN, HIDDEN]),
            ("attn_k", vec![HIDDEN / 2, HIDDEN]),
            ("attn_v", vec![HIDDEN / 2, HIDDEN]),
            ("attn_output", vec![HIDDEN, HIDDEN]),
            ("ffn_norm", vec![HIDDEN]),
            ("ffn_gate", vec![FFN, HIDDEN]),
            ("ffn_up", vec![FFN, HIDDEN]),
            ("ffn_down", vec![HIDDEN, FFN]),
        ] {
            shapes.push((format!("blk.{i}.{name}.weight"), shape));
        }
    }
    shapes
}

/// Writes a GGUF file of random weights in F16 (vectors in F32); `change` may alter a tensor's weights.
fn model_of(path: &str, shapes: &[(String, Vec<usize>)], change: &dyn Fn(&str, &mut [f32])) {
    let text = |s: &str| Value::String(s.into());
    let n = |n: usize| Value::Unsigned(n as u64);
    let metadata = Metadata(BTreeMap::from(
        [
            ("general.architecture", text("llama")),
            ("general.name", text("Tiny Random")),
            ("general.size_label", text("1.5M")),
            ("llama.block_count", n(2)),
            ("llama.context_length", n(128)),
            ("llama.embedding_length", n(HIDDEN)),
            ("llama.feed_forward_length", n(FFN)),
            ("llama.attention.head_count", n(8)),
            ("llama.attention.head_count_kv", n(4)),
            ("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5)),
            ("tokenizer.ggml.model", text("none")),
        ]
        .map(|(key, value)| (key.to_string(), value)),
    ));
    let infos: Vec<TensorInfo> = shapes
        .iter()
        .map(|(name, shape)| TensorInfo {
            name: name.clone(),
            format: if shape.len() == 1 { Format::F32 } else { Format::F16 },
            shape: shape.clone(),
        })
        .collect();
    let mut seed = 7u64;
    let mut random = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut writer = gguf::Writer::create(Path::new(path), &metadata, &infos).unwrap();
    for info in &infos {
        let count = info.elements().unwrap();
        // The sum of four is nearly normal.
        let mut weights: Vec<f32> = (0..count).map(|_| 0.03 * (random() + random() + random() + random())).collect();
        change(&info.name, &mut weights);
        let mut bytes = vec![0; info.bytes().unwrap()];
        encode(info.format, &weights, *info.shape.last().unwrap(), None, &mut bytes);
        writer.write(&info.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn model(path: &str) {
    model_of(path, &shapes(), &|_, _| {});
}

fn formats(path: &str) -> BTreeMap<String, Format> {
    let checkpoint = Checkpoint::open(Path::new(path)).unwrap();
    checkpoint.tensors().iter().map(|t| (t.name.clone(), t.format)).collect()
}

fn weights(path: &str, name: &str) -> Vec<f32> {
    let tensor = Checkpoint::open(Path::new(path)).unwrap().tensor(name).unwrap();
    let mut out = vec![0.0; tensor.info.elements().unwrap()];
    tensor.info.format.decode(&tensor.data, &mut out);
    out
}

#[test]
fn every_type_writes_a_file_near_the_original() {
    let place = Place::new();
    let (source, out) = (place.path("m.gguf"), place.path("out.gguf"));
    model(&source);
    let original = weights(&source, "blk.1.ffn_up.weight");
    let square: f32 = original.iter().map(|w| w * w).sum();
    let mut before = f64::INFINITY;
    for (kind, allowed) in [
        ("F32", 0.0),
        ("bf16", 1e-4),
        ("q8_0", 1e-4),
        ("Q6_K", 1e-3),
        ("Q5_K_M", 3e-3),
        ("Q4_K_M", 1e-2),
        ("Q4_0", 1e-2),
        ("IQ4_XS", 1e-2),
        ("Q3_K_S", 0.05),
        ("Q2_K", 0.12),
    ] {
        let (said, notes) = place.ok(&[&source, "-o", &out, "--type", kind, "--quiet"]);
        assert_eq!(notes, "", "{kind}");
        let rounded = weights(&out, "blk.1.ffn_up.weight");
        let error: f32 = original.iter().zip(&rounded).map(|(a, b)| (a - b) * (a - b)).sum();
        assert!(error <= allowed * square, "{kind}: {}", error / square);
        assert!(kind == "F32" || error > 0.0);
        // What is not a matrix stays as it is.
        assert_eq!(weights(&out, "blk.0.attn_norm.weight"), weights(&source, "blk.0.attn_norm.weight"));
        let bits = said["bits_per_weight"].as_f64().unwrap();
        assert!(bits <= before, "{kind}: {bits} after {before}");
        before = bits;
        let file = Checkpoint::open(Path::new(&out)).unwrap();
        assert_eq!(said["bytes"].as_u64().unwrap(), file.bytes());
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.str("general.name"), Some("Tiny Random"));
        assert_eq!(metadata.u64("general.quantization_version"), Some(2));
    }
    assert_eq!(place.files(), ["m.gguf", "out.gguf"]);
}

#[test]
fn the_bytes_do_not_depend_on_threads_or_memory() {
    let place = Place::new();
    let source = place.path("m.gguf");
    model(&source);
    let mut files = Vec::new();
    for (i, options) in
        [&["--threads", "1"][..], &["--threads", "2"], &["--threads", "5", "--memory", "33MiB"]].iter().enumerate()
    {
        let out = place.path(&format!("{i}.gguf"));
        place.ok(&[&[source.as_str(), "-o", &out, "--type", "Q4_K_M"], *options].concat());
        files.push(std::fs::read(&out).unwrap());
    }
    assert!(files[0] == files[1] && files[1] == files[2]);
}

#[test]
fn what_is_of_the_type_already_is_copied() {
    let place = Place::new();
    let (source, once, twice) = (place.path("m.gguf"), place.path("once.gguf"), place.path("twice.gguf"));
    model(&source);
    place.ok(&[&source, "-o", &once, "--type", "Q4_K_S"]);
    let (_, notes) = place.ok(&[&once, "-o", &twice, "--type", "Q4_K_S"]);
    assert_eq!(notes, "");
    assert_eq!(std::fs::read(&once).unwrap(), std::fs::read(&twice).unwrap());
    // Another type is a second loss, which is said.
    let (said, notes) = place.ok(&[&once, "-o", &twice, "--type", "Q3_K_S"]);
    assert!(notes.contains("quantized already") && notes.contains("start from the F16"), "{notes}");
    assert_eq!(said["notes"].as_array().unwrap().len(), 1);
}

#[test]
fn wishes_decide() {
    let place = Place::new();
    let (source, out) = (place.path("m.gguf"), place.path("out.gguf"));
    model(&source);
    let wishes = ["--keep", "blk\\.1\\.ffn_down=F16", "--keep", "ffn_=Q8_0", "--token-embedding-type", "Q5_1"];
    place.ok(&[&[source.as_str(), "-o", &out, "-t", "Q4_0"], &wishes[..]].concat());
    let formats = formats(&out);
    assert_eq!(formats["blk.1.ffn_down.weight"], Format::F16);
    assert_eq!(formats["blk.0.ffn_down.weight"], Format::Q8_0);
    assert_eq!(formats["token_embd.weight"], Format::Q5_1);
    assert_eq!(formats["blk.0.attn_q.weight"], Format::Q4_0);
    let (said, _) = place.ok(&[&source, "-o", &place.path("none.gguf"), "-t", "Q4_K_M", "--dry-run"]);
    let plan = said["plan"].as_array().unwrap();
    assert_eq!((plan.len(), plan[0]["to"].as_str(), plan[0]["from"].as_str()), (20, Some("Q6_K"), Some("F16")));
    assert!(!place.files().contains(&"none.gguf".to_string()));
}

#[test]
fn rows_that_do_not_divide_fall_back_and_say_so() {
    let place = Place::new();
    let (source, out) = (place.path("m.gguf"), place.path("out.gguf"));
    let mut shapes = shapes();
    for (name, shape) in &mut shapes {
        match name.as_str() {
            "blk.0.ffn_up.weight" => shape[1] = 96,
            "blk.1.ffn_up.weight" => shape[1] = 40,
            _ => {}
        }
    }
    model_of(&source, &shapes, &|_, _| {});
    let (_, notes) = place.ok(&[&source, "-o", &out, "--type", "Q4_K_S"]);
    let formats = formats(&out);
    assert_eq!((formats["blk.0.ffn_up.weight"], formats["blk.1.ffn_up.weight"]), (Format::Q5_0, Format::F16));
    assert!(
        notes.contains("note: 1 tensor is Q5_0 instead of Q4_K, whose blocks of 256 do not divide a row of 96"),
        "{notes}"
    );
    assert!(notes.contains("1 tensor is F16 instead of Q4_K"), "{notes}");
}

#[test]
fn weights_that_are_not_numbers_are_named() {
    let place = Place::new();
    let (source, wide, out) = (place.path("m.gguf"), place.path("wide.gguf"), place.path("out.gguf"));
    model(&source);
    place.ok(&[&source, "-o", &wide, "--type", "F32"]);
    let whole = std::fs::read(&wide).unwrap();
    let damage = |value: f32| {
        // The last tensor is blk.1.ffn_down.weight: 256 rows of 512.
        let mut bytes = whole.clone();
        let at = bytes.len() - 4 * ((HIDDEN - 3) * FFN - 17);
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        std::fs::write(&wide, bytes).unwrap();
    };
    for (value, word) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        damage(value);
        for kind in ["Q4_K_M", "F16", "F32"] {
            let error = place.error(1, &[&wide, "-o", &out, "--type", kind]);
            let what = format!("tensor 'blk.1.ffn_down.weight' has {word} at row 3, column 17 (weight 1553)");
            assert!(error.contains(&what) && error.contains("wide.gguf"), "{error}");
            assert_eq!(place.files(), ["m.gguf", "wide.gguf"], "nothing is left");
        }
    }
    // Numbers that a format cannot hold are no less wrong.
    damage(-3e9);
    for kind in ["F16", "Q8_0", "Q4_K_S", "Q2_K"] {
        let error = place.error(1, &[&wide, "-o", &out, "--type", kind, "--pure"]);
        let what =
            format!("'blk.1.ffn_down.weight' has the weight -3e9 in row 3, which {}", kind.trim_end_matches("_S"));
        assert!(error.contains(&what), "{error}");
    }
    place.ok(&[&wide, "-o", &out, "--type", "BF16"]);
}

#[test]
#[cfg(unix)]
fn what_must_not_be_overwritten_is_not() {
    let place = Place::new();
    let source = place.path("m.gguf");
    model(&source);
    let before = std::fs::read(&source).unwrap();
    let link = place.path("link.gguf");
    std::os::unix::fs::symlink(&source, &link).unwrap();
    for out in [&source, &link, &place.path("./m.gguf")] {
        let error = place.error(1, &[&source, "-o", out]);
        assert!(error.contains("is what is read"), "{error}");
    }
    std::fs::write(place.path("thesis.txt"), "mine").unwrap();
    let error = place.error(1, &[&source, "-o", &place.path("thesis.txt")]);
    assert!(error.contains("not a GGUF file"), "{error}");
    let error = place.error(1, &[&source, "-o", &place.path("nowhere/out.gguf")]);
    assert!(error.contains("there is no directory"), "{error}");
    assert_eq!(std::fs::read(&source).unwrap(), before);
    assert_eq!(std::fs::read(place.path("thesis.txt")).unwrap(), b"mine");
    assert_eq!(place.files(), ["link.gguf", "m.gguf", "thesis.txt"]);
    // A GGUF file is replaced, but only by a whole one.
    let out = place.path("out.gguf");
    place.ok(&[&source, "-o", &out, "-t", "Q8_0"]);
    place.ok(&[&source, "-o", &out, "-t", "Q4_0"]);
    assert_eq!(formats(&out)["blk.0.attn_q.weight"], Format::Q4_0);
}

#[test]
fn wrong_arguments_say_what_is_right() {
    let place = Place::new();
    let source = place.path("m.gguf");
    model(&source);
    let out = place.path("out.gguf");
    for (args, what) in [
        (&["--type", "Q9_X"][..], "the types are F32 F16 BF16 Q8_0"),
        (&["--keep", "ffn"], "PATTERN=FORMAT"),
        (&["--keep", "(=F16"], "not a regular expression"),
        (&["--output-type", "Q4_K_M"], "the formats are"),
        (&["--memory", "much"], "is not a size"),
        (&["--memory", "1MB"], "at least 32 MB"),
        (&["--threads", "0"], "threads"),
    ] {
        let output = place.run(&[&[source.as_str(), "-o", &out], args].concat());
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {err}");
        assert!(err.contains(what), "{args:?}: {err}");
    }
    let error = place.error(1, &[&source, "-o", &out, "--keep", "nothing=F16"]);
    assert!(error.contains("fits no tensor") && error.contains("blk.1.ffn_down.weight"), "{error}");
    assert_eq!(place.files(), ["m.gguf"]);
}

#[test]
fn a_folder_gets_a_name_by_the_convention() {
    let place = Place::new();
    let source = place.path("m.gguf");
    model(&source);
    let (said, _) = place.ok(&[&source, "-o", &place.path("out/"), "-t", "Q4_K_M"]);
    assert!(said["path"].as_str().unwrap().ends_with("out/Tiny-Random-1.5M-v1.0-Q4_K_M.gguf"), "{said}");
    let (said, _) = place.ok(&[&source, "-t", "Q8_0"]);
    assert_eq!(said["path"].as_str().unwrap(), place.path("Tiny-Random-1.5M-v1.0-Q8_0.gguf"));
    // A model of the store stays in the store.
    let models = place.dir.path().join("home/models");
    std::fs::create_dir_all(&models).unwrap();
    std::fs::copy(&source, models.join("tiny.gguf")).unwrap();
    place.ok(&["tiny", "-t", "q4_k"]);
    assert!(models.join("tiny-q4_k_m.gguf").is_file());
}

#[test]
fn an_imatrix_is_used_and_checked() {
    let place = Place::new();
    let (source, plain, out) = (place.path("m.gguf"), place.path("plain.gguf"), place.path("out.gguf"));
    model(&source);
    place.ok(&[&source, "-o", &plain, "-t", "Q4_K_S"]);
    let imatrix = |cols: usize, only: &str| {
        let matrices = shapes().into_iter().filter(|(name, shape)| shape.len() == 2 && name.contains(only));
        let entries = matrices.map(|(name, shape)| {
            let cols = if cols == 0 { shape[1] } else { cols };
            // The first column is what matters.
            (name, Entry { sums: (0..cols).map(|c| if c == 0 { 1e4 } else { 1.0 }).collect(), counts: vec![2] })
        });
        Imatrix { entries: entries.collect(), datasets: vec!["a text".into()], chunks: 3, chunk_size: 8 }
    };
    for file in ["i.gguf", "i.dat"] {
        let file = place.path(file);
        imatrix(0, "blk").write(Path::new(&file)).unwrap();
        let (_, notes) = place.ok(&[&source, "-o", &out, "-t", "Q4_K_S", "--imatrix", &file]);
        assert_eq!(notes, "");
        let name = "blk.0.ffn_up.weight";
        let (original, without, with) = (weights(&source, name), weights(&plain, name), weights(&out, name));
        let error = |rounded: &[f32]| -> f64 {
            let rows = original.chunks(HIDDEN).zip(rounded.chunks(HIDDEN));
            rows.map(|(a, b)| f64::from(a[0] - b[0]).powi(2)).sum()
        };
        assert!(error(&with) < 0.3 * error(&without), "{} {}", error(&with), error(&without));
        let checkpoint = Checkpoint::open(Path::new(&out)).unwrap();
        let metadata = checkpoint.metadata().unwrap();
        assert_eq!(metadata.str("quantize.imatrix.dataset"), Some("a text"));
        assert_eq!(metadata.u64("quantize.imatrix.chunks_count"), Some(3));
    }
    let file = place.path("i.gguf");
    imatrix(0, "ffn_up").write(Path::new(&file)).unwrap();
    let (_, notes) = place.ok(&[&source, "-o", &out, "-t", "Q4_K_S", "--imatrix", &file]);
    assert!(notes.contains("the imatrix has nothing for 12 of 14 tensors"), "{notes}");
    imatrix(7, "ffn_up").write(Path::new(&file)).unwrap();
    let error = place.error(1, &[&source, "-o", &out, "-t", "Q4_K_S", "--imatrix", &file]);
    assert!(error.contains("'blk.0.ffn_up.weight' has 7 values, but the model's has 256 columns"), "{error}");
    imatrix(0, "token_embd").write(Path::new(&file)).unwrap();
    let other = Imatrix {
        entries: BTreeMap::from([("x".into(), Entry { sums: vec![1.0], counts: vec![1] })]),
        ..imatrix(0, "no")
    };
    other.write(Path::new(&file)).unwrap();
    let error = place.error(1, &[&source, "-o", &out, "-t", "Q4_K_S", "--imatrix", &file]);
    assert!(error.contains("of another model"), "{error}");
    let error = place.error(1, &[&source, "-o", &out, "--imatrix", &source]);
    assert!(error.contains("not an importance matrix"), "{error}");
}

#[test]
fn a_full_disk_is_one_clear_line() {
    let place = Place::new();
    let (source, out) = (place.path("m.gguf"), place.path("out.gguf"));
    model(&source);
    // A limit on the size of files stands for a full disk; the signal for it is ignored, as a full disk sends none.
    let script = "trap '' XFSZ; ulimit -f 400; exec \"$@\"";
    let command = place.command(&[&source, "-o", &out, "-t", "Q8_0"]);
    let mut limited = Command::new("bash");
    limited.args(["-c", script, "bash"]).arg(command.get_program()).args(command.get_args());
    limited.env("RUSHLIGHT_HOME", place.dir.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let error = failure(limited.output().unwrap(), 1);
    assert!(error.contains("no space left for the file, which takes 2 MB"), "{error}");
    assert_eq!(place.files(), ["m.gguf"]);
}

#[test]
fn killed_at_any_moment_nothing_has_the_name() {
    let place = Place::new();
    let (source, out) = (place.path("m.gguf"), place.path("out.gguf"));
    // Large enough to be caught at work.
    let mut shapes = shapes();
    shapes[0].1[0] = 20_000;
    model_of(&source, &shapes, &|_, _| {});
    let args = [source.as_str(), "-o", &out, "-t", "Q3_K_S", "--threads", "1", "--quiet"];
    let (mut caught, mut finished) = (0, Vec::new());
    for delay in [20, 60, 100, 150, 200] {
        let mut child = place.command(&args).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        // What has the name is whole, also where the end came right behind it.
        match std::fs::read(&out) {
            Ok(bytes) => {
                finished.push(bytes);
                std::fs::remove_file(&out).unwrap();
            }
            Err(_) => caught += 1,
        }
    }
    assert!(caught > 0);
    // What was left half written goes with the next run, which is whole.
    place.ok(&args);
    assert_eq!(place.files(), ["m.gguf", "out.gguf"]);
    assert_eq!(formats(&out)["blk.0.attn_q.weight"], Format::Q3_K);
    let whole = std::fs::read(&out).unwrap();
    assert!(finished.iter().all(|bytes| *bytes == whole));
}

#[test]
fn a_directory_becomes_a_file_that_can_chat() {
    let place = Place::new();
    let dir = place.dir.path().join("tiny");
    chat_model::write(&dir);
    let out = place.path("out.gguf");
    let (said, _) = place.ok(&[dir.to_str().unwrap(), "-o", &out, "-t", "Q8_0"]);
    assert_eq!(said["type"], "Q8_0");
    let mut run = Command::new(env!("CARGO_BIN_EXE_rushlight"));
    run.args(["run", &out, "-p", "hello", "-n", "4", "--quiet"]).env("RUSHLIGHT_HOME", place.dir.path());
    let output = run.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // Norms are f32 in GGUF, whatever the directory has.
    assert!(formats(&out).iter().all(|(name, format)| !name.ends_with("_norm.weight") || *format == Format::F32));
    // A part of it that is missing is named.
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    let index = r#"{"weight_map":{"a":"model-00001-of-00002.safetensors"}}"#;
    std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    let error = place.error(1, &[dir.to_str().unwrap(), "-o", &place.path("new.gguf")]);
    assert!(error.contains("model-00001-of-00002.safetensors") && error.contains("missing"), "{error}");
}

#[test]
fn codes_of_other_tools_are_kept() {
    let place = Place::new();
    for (name, kind, allowed) in [
        ("gptq_b4_g32_sym", "Q4_0", 2e-4),
        ("gptq_b8_g32_sym", "Q8_0", 2e-4),
        // The minimum is rounded to f16.
        ("gptq_v2_b4_g32_asym", "Q4_1", 1e-2),
        ("awq_gemm_b4_g32", "Q4_1", 1e-2),
    ] {
        let Some(dir) = shared(&format!("fixtures/gptq_ckpt_tiny/{name}")) else { return };
        let (dir, out) = (dir.to_str().unwrap(), place.path("out.gguf"));
        let (said, notes) = place.ok(&[dir, "-o", &out]);
        assert_eq!(said["type"], kind, "{name}");
        assert!(notes.contains("14 tensors are quantized already and keep their codes"), "{name}: {notes}");
        // With nothing else rounded, the model says the same.
        place.ok(&[dir, "-o", &out, "--output-type", "F32", "--token-embedding-type", "F32"]);
        let logits = |model: &str| -> Vec<f64> {
            let mut command = Command::new(env!("CARGO_BIN_EXE_rushlight"));
            // A GGUF file's prompts may meet in bf16, not so with the plain kernels.
            command.env("RUSHLIGHT_ISA", "scalar");
            let output = command.args(["logits", model, "--ids", "1,2,3", "--json"]).output().unwrap();
            let said: Json = serde_json::from_slice(&output.stdout).unwrap();
            said["positions"][0]["logits"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
        };
        let far = logits(dir).iter().zip(logits(&out)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(far <= allowed, "{name}: {far}");
    }
    // In act-order the blocks' columns lie apart: such layers are rounded anew, with their columns back in order.
    let Some(dir) = shared("fixtures/gptq_ckpt_tiny/gptq_b4_g32_sym_act") else { return };
    let out = place.path("out.gguf");
    let (said, notes) = place.ok(&[dir.to_str().unwrap(), "-o", &out, "-t", "F32"]);
    assert_eq!((said["type"].as_str(), notes.contains("codes")), (Some("F32"), false), "{notes}");
    let (own, converted) =
        (weights(dir.to_str().unwrap(), "model.layers.0.mlp.up_proj.weight"), weights(&out, "blk.0.ffn_up.weight"));
    let order = Checkpoint::open(&dir).unwrap().column_order("model.layers.0.mlp.up_proj.weight").unwrap();
    for (own, converted) in own.chunks(order.len()).zip(converted.chunks(order.len())) {
        assert!(own.iter().zip(&*order).all(|(w, &at)| *w == converted[at as usize]));
    }
}

#[test]
fn a_real_model_tells_the_same_story() {
    let Some(dir) = shared("models/stories260K-hf") else { return };
    let place = Place::new();
    let out = place.path("stories.gguf");
    place.ok(&[dir.to_str().unwrap(), "-o", &out, "-t", "F32"]);
    let reference: Json = serde_json::from_slice(&std::fs::read(dir.join("greedy_reference.json")).unwrap()).unwrap();
    let ids =
        |key: &str| -> Vec<u64> { reference[key].as_array().unwrap().iter().map(|i| i.as_u64().unwrap()).collect() };
    let prompt = ids("prompt_ids").iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    let mut logits = Command::new(env!("CARGO_BIN_EXE_rushlight"));
    logits.args(["logits", &out, "--ids", &prompt, "--greedy", "40", "--json"]);
    let said: Json = serde_json::from_slice(&logits.output().unwrap().stdout).unwrap();
    let told: Vec<u64> = said["greedy"].as_array().unwrap().iter().map(|i| i.as_u64().unwrap()).collect();
    let (start, want) = (ids("prompt_ids").len(), ids("greedy_ids"));
    assert!(told == want[1..41] || told == want[..40] || told == want[start..start + 40], "{told:?} {want:?}");
}
