//! `rushlight merge`: a merged model says what the model says with its adapters attached.

mod golden;

use golden::{Steps, check, distance, options, shared};
use rushlight::engine::Engine;
use rushlight::merge::{attached, plan_directory, plan_gguf, write_directory};
use rushlight::quantize::types::{Target, Wishes};
use rushlight::quantize::write::{Change, Options, write};
use rushlight_models::checkpoint::safetensors::{Entry, Writer};
use rushlight_models::checkpoint::{Checkpoint, Kind};
use rushlight_models::families::{Naming, Role, recognise};
use rushlight_quant::formats::Format;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;

type Adapters = Vec<(PathBuf, f32)>;

fn merge(source: &Path, adapters: &Adapters, out: &Path, target: &str) -> anyhow::Result<Change> {
    let checkpoint = Checkpoint::open(source)?;
    let model = attached(&checkpoint, adapters)?;
    let stop = AtomicBool::new(false);
    let options = Options { threads: 2, memory: 1 << 28, stop: &stop, scratch: None };
    let target = Target::parse(target).unwrap();
    if out.extension().is_some_and(|ext| ext == "gguf") {
        let plan = plan_gguf(&checkpoint, &model, target, &Wishes::default(), None)?;
        return write(&plan, &checkpoint, out, &options, &mut |_| {});
    }
    let directory = plan_directory(&checkpoint, &model, Some(target.format), &[])?;
    write_directory(&directory, &checkpoint, out, &options, &mut |_| {})
}

/// Whether the family of `source` has a form in GGUF that can say what this model is.
fn in_gguf(source: &Path) -> bool {
    rushlight_models::convert::to_gguf(&Checkpoint::open(source).unwrap()).is_ok()
}

#[test]
fn merged_reference_adapters_give_the_reference_logits() {
    let out = tempfile::tempdir().unwrap();
    for family in ["llama", "qwen2", "baichuan-7b", "baichuan2-13b", "chatglm2-6b", "internlm2"] {
        let Some(dir) = shared(&format!("fixtures/families/{family}")) else { return };
        let plain = out.path().join(format!("{family}-plain.gguf"));
        merge(&dir, &vec![], &plain, "F32").unwrap();
        for entry in std::fs::read_dir(dir.join("adapters")).unwrap() {
            let adapter = entry.unwrap().path();
            let name = format!("{family}-{}", adapter.file_name().unwrap().to_str().unwrap());
            let (folder, file) = (out.path().join(&name), out.path().join(format!("{name}.gguf")));
            let adapters = vec![(adapter.clone(), 1.0)];
            if name == "llama-prefix-tuning" {
                for to in [&folder, &file] {
                    let error = merge(&dir, &adapters, to, "F32").unwrap_err().to_string();
                    assert!(error.contains("prefix-tuning: a prefix stands before the text"), "{error}");
                    assert!(!to.exists());
                }
                continue;
            }
            let again = out.path().join(format!("{name}-again.gguf"));
            merge(&dir, &adapters, &folder, "F32").unwrap();
            merge(&dir, &adapters, &file, "F32").unwrap();
            // Rows of queries and keys stand in another order there.
            merge(&plain, &adapters, &again, "F32").unwrap();
            for merged in [&folder, &file, &again] {
                check(&mut Engine::open(merged, &options(&[])).unwrap(), &adapter.join("golden.json"), Steps::All);
            }
        }
    }
}

/// Random numbers about 0.
struct Random(u64);

impl Random {
    fn bytes(&mut self, count: usize, size: f32) -> Vec<u8> {
        let each = (0..count).flat_map(|_| {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (size * ((self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0)).to_le_bytes()
        });
        each.collect()
    }
}

/// Which parts a made-up adapter has.
#[derive(Clone, Copy, PartialEq)]
enum Kinds {
    LowRank,
    Dora,
    /// Embedding, head and one of the other matrices whole.
    Whole,
}

/// Writes an adapter for every matrix of `source` that can have one.
fn make_adapter(source: &Path, dir: &Path, seed: u64, kinds: Kinds) {
    const RANK: usize = 3;
    let checkpoint = Checkpoint::open(source).unwrap();
    let (family, spec) = recognise(&checkpoint).unwrap();
    let mut random = Random(seed);
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    let mut add = |name: String, shape: &[usize], bytes: Vec<u8>| {
        entries.push(Entry { name: format!("base_model.model.{name}"), dtype: "F32".into(), shape: shape.to_vec() });
        data.push(bytes);
    };
    let mut modules: Vec<(String, usize, usize)> = Vec::new();
    for info in checkpoint.tensors() {
        let Some(stem) = info.name.strip_suffix(".weight") else { continue };
        let (Some((role, layer)), &[rows, cols]) = (family.role(Naming::HuggingFace, stem), &info.shape[..]) else {
            continue;
        };
        // A table has no low rank here, and layers beyond the model's are idle.
        if matches!(role, Role::Positions) || layer >= spec.layers.len() || role == Role::Head && spec.tied_head {
            continue;
        }
        if role == Role::Embedding {
            if kinds == Kinds::Whole {
                add(format!("{stem}.weight"), &[rows, cols], random.bytes(rows * cols, 0.1));
            }
            continue;
        }
        let transposed = family.is_transposed(Naming::HuggingFace, role);
        let (rows, cols) = if transposed { (cols, rows) } else { (rows, cols) };
        // A head that is normalised when it is loaded cannot be changed in a directory.
        if role == Role::Head && spec.normed_head {
            continue;
        }
        modules.push((stem.into(), rows, cols));
    }
    if spec.tied_head {
        let head = family.name(Naming::HuggingFace, Role::Head, 0).unwrap();
        modules.push((head, spec.vocab_size, spec.hidden_size));
    }
    let count = modules.len();
    for (i, (module, rows, cols)) in modules.into_iter().enumerate() {
        if kinds == Kinds::Whole {
            if i + 2 >= count {
                // As the directory has it.
                let role = family.role(Naming::HuggingFace, &module).unwrap().0;
                let turned = family.is_transposed(Naming::HuggingFace, role);
                let shape = if turned { [cols, rows] } else { [rows, cols] };
                add(format!("{module}.weight"), &shape, random.bytes(rows * cols, 0.1));
            }
            continue;
        }
        add(format!("{module}.lora_A.weight"), &[RANK, cols], random.bytes(RANK * cols, 0.2));
        add(format!("{module}.lora_B.weight"), &[rows, RANK], random.bytes(rows * RANK, 0.2));
        if kinds == Kinds::Dora {
            let magnitude = (0..rows).flat_map(|r| (0.8f32 + 0.05 * (r % 7) as f32).to_le_bytes());
            add(format!("{module}.lora_magnitude_vector"), &[rows], magnitude.collect());
        }
    }
    std::fs::create_dir_all(dir).unwrap();
    let mut writer = Writer::create(&dir.join("adapter_model.safetensors"), &entries).unwrap();
    entries.iter().zip(&data).for_each(|(entry, bytes)| writer.write(&entry.name, bytes).unwrap());
    writer.finish().unwrap();
    let config = json!({"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "use_dora": kinds == Kinds::Dora});
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
}

fn logits(model: &Path, adapters: &Adapters) -> Vec<Vec<f32>> {
    let options = rushlight::engine::Options { adapters: adapters.clone(), ..options(&[]) };
    let mut engine = Engine::open(model, &options).unwrap();
    let mut all = Vec::new();
    engine.prompt_all(0, &[1, 5, 9, 2, 30, 17, 6], &mut |_, logits| all.push(logits.to_vec())).unwrap();
    all
}

fn assert_same(got: &[Vec<f32>], want: &[Vec<f32>], label: &str) {
    let most = want.iter().flatten().fold(10.0f32, |most, x| most.max(x.abs()));
    for (got, want) in got.iter().zip(want) {
        let d = distance(got, want);
        assert!(d < 3e-5 * most, "{label}: off by {d} of {most}");
    }
}

#[test]
fn every_family_merges_packed_transposed_tied_and_expert_weights() {
    let out = tempfile::tempdir().unwrap();
    let families = "llama llama-tied-bias qwen2-tied mixtral qwen2_moe deepseek_v2 phi3 phi chatglm2-6b chatglm-6b internlm2 \
                    gpt2 gpt_bigcode-mha gpt_bigcode gpt_neox falcon-40b-style bloom gemma glm4 baichuan2-7b qwen-7b";
    let mut failed = Vec::new();
    for family in families.split_whitespace() {
        let Some(dir) = shared(&format!("fixtures/families/{family}")) else { return };
        let place = out.path().join(family);
        let one = || {
            let adapters = |kinds: &[(Kinds, f32)]| -> Adapters {
                let each = kinds.iter().enumerate().map(|(i, (kind, strength))| {
                    let path = place.join(format!("adapter-{}-{i}", *kind as u32));
                    make_adapter(&dir, &path, 7 + i as u64, *kind);
                    (path, *strength)
                });
                each.collect()
            };
            for (i, kinds) in
                [&[(Kinds::LowRank, 0.7), (Kinds::Dora, -0.4)][..], &[(Kinds::Whole, 1.0), (Kinds::LowRank, 0.5)]]
                    .into_iter()
                    .enumerate()
            {
                let adapters = adapters(kinds);
                let want = logits(&dir, &adapters);
                assert!(distance(&want[6], &logits(&dir, &vec![])[6]) > 0.01, "the adapter changes nothing");
                let folder = place.join(format!("merged-{i}"));
                merge(&dir, &adapters, &folder, "F32").unwrap();
                assert_same(&logits(&folder, &vec![]), &want, &format!("{family}, directory {i}"));
                if in_gguf(&dir) {
                    let file = place.join(format!("merged-{i}.gguf"));
                    merge(&dir, &adapters, &file, "F32").unwrap();
                    assert_same(&logits(&file, &vec![]), &want, &format!("{family}, GGUF {i}"));
                }
            }
        };
        if std::panic::catch_unwind(one).is_err() {
            failed.push(family);
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

fn rushlight(args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rushlight"));
    let output = command.args(args).stdin(Stdio::null()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

#[test]
fn the_command_keeps_what_stays_and_refuses_what_it_cannot_do() {
    let Some(dir) = shared("models/stories260K-hf") else { return };
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name).to_str().unwrap().to_string();
    let source = dir.to_str().unwrap();
    let adapter = path("adapter");
    // One matrix alone.
    std::fs::create_dir(&adapter).unwrap();
    let entry = |name: &str, shape: [usize; 2]| Entry {
        name: format!("base_model.model.model.layers.1.self_attn.o_proj.{name}.weight"),
        dtype: "F32".into(),
        shape: shape.to_vec(),
    };
    let entries = [entry("lora_A", [2, 64]), entry("lora_B", [64, 2])];
    let mut writer = Writer::create(&Path::new(&adapter).join("adapter_model.safetensors"), &entries).unwrap();
    let mut random = Random(3);
    entries.iter().for_each(|entry| writer.write(&entry.name, &random.bytes(128, 0.3)).unwrap());
    writer.finish().unwrap();
    std::fs::write(format!("{adapter}/adapter_config.json"), r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4}"#)
        .unwrap();

    // The type stays: so do the bytes of what no adapter changes.
    let (base, merged) = (path("base.gguf"), path("merged.gguf"));
    assert_eq!(rushlight(&["quantize", source, "-o", &base, "--type", "q8_0"]).0, 0);
    let args = ["merge", &base, "--adapter", &format!("{adapter}=0.5"), "-o", &merged, "--type", "q8_0", "--json"];
    let (status, told, err) = rushlight(&args);
    assert_eq!(status, 0, "{err}");
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["merged"], &told["type"]), (&json!(1), &json!("Q8_0")));
    assert!(err.contains("quantized in the source") && !err.contains("is in the merged weights"), "{err}");
    assert!((told["kept"].as_f64().unwrap() - 1.0).abs() < 0.05, "{told}");
    let (before, after) = (Checkpoint::open(Path::new(&base)).unwrap(), Checkpoint::open(Path::new(&merged)).unwrap());
    for info in before.tensors() {
        let (a, b) = (before.tensor(&info.name).unwrap(), after.tensor(&info.name).unwrap());
        assert_eq!(a.info, b.info);
        assert_eq!(a.data[..] == b.data[..], info.name != "blk.1.attn_output.weight", "{}", info.name);
    }
    // A change that is smaller than the steps of the type is rounded away, and that is said.
    let coarse = path("coarse.gguf");
    assert_eq!(rushlight(&["quantize", source, "-o", &coarse, "--type", "q4_0"]).0, 0);
    for (target, least, most) in [("q4_0", -0.1, 0.5), ("f16", 0.99, 1.01)] {
        let (adapter, merged) = (format!("{adapter}=0.005"), path(&format!("small-{target}.gguf")));
        let args = ["merge", &coarse, "--adapter", &adapter, "-o", &merged, "--type", target, "--json"];
        let (status, told, err) = rushlight(&args);
        assert_eq!(status, 0, "{err}");
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        let kept = told["kept"].as_f64().unwrap();
        assert!(least < kept && kept < most, "{target} {kept}");
        assert_eq!(err.contains("is in the merged weights"), target == "q4_0", "{err}");
        assert_eq!(told["notes"].to_string().contains("is in the merged weights"), target == "q4_0", "{told}");
    }
    // Without a type: F16.
    assert_eq!(rushlight(&["merge", &base, "--adapter", &adapter, "-o", &path("half.gguf")]).0, 0);
    let half = Checkpoint::open(Path::new(&path("half.gguf"))).unwrap();
    assert_eq!(half.find("blk.0.ffn_up.weight").unwrap().format, Format::F16);
    // A directory keeps its types, and gets others when asked.
    let folder = path("folder");
    assert_eq!(rushlight(&["merge", source, "--adapter", &adapter, "-o", &folder]).0, 0);
    let checkpoint = Checkpoint::open(Path::new(&folder)).unwrap();
    let own = Checkpoint::open(&dir).unwrap();
    for info in own.tensors().iter().filter(|t| t.name != "lm_head.weight") {
        assert_eq!(checkpoint.find(&info.name), Some(info));
    }
    assert!(Path::new(&folder).join("tokenizer_config.json").exists());
    assert_eq!(rushlight(&["merge", source, "--adapter", &adapter, "-o", &path("b"), "--type", "bf16"]).0, 0);
    let Kind::HuggingFace { config, .. } = Checkpoint::open(Path::new(&path("b"))).unwrap().kind().clone() else {
        panic!("not a directory")
    };
    assert!(config["dtype"] == "bfloat16" || config["torch_dtype"] == "bfloat16", "{config}");

    let before = std::fs::read_dir(out.path()).unwrap().count();
    let text = std::fs::read(&base).unwrap();
    let new = path("new");
    for (args, status, what) in [
        (vec![&base[..], "-o", &base], 1, "is what is read"),
        (vec![source, "-o", source], 1, "is what is read"),
        (vec![source, "-o", &adapter], 1, "is what is read"),
        (vec![source, "-o", &folder], 1, "is there already"),
        (vec![source, "-o", &new, "--type", "q4_0"], 2, "end its name with .gguf"),
        (vec![source, "-o", &new, "--keep", "nothing=F32"], 1, "fits no tensor"),
        (vec![&base, "-o", "/nowhere/x.gguf"], 1, "there is no directory /nowhere"),
    ] {
        let (code, _, err) = rushlight(&[&["merge", "--adapter", &adapter], &args[..]].concat());
        assert_eq!(code, status, "{args:?}: {err}");
        assert!(err.contains(what), "{args:?}: {err}");
    }
    let (code, _, err) = rushlight(&["merge", source, "-o", &new]);
    assert!(code == 2 && err.contains("--adapter"), "{err}");
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), before);
    assert_eq!(std::fs::read(&base).unwrap(), text);
}
