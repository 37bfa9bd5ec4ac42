//! Checkpoints that other programs wrote. The files are found through `RUSHLIGHT_SHARED`, or beside the workspace.

mod foreign;

use rushlight_models::checkpoint::{Checkpoint, Kind, Metadata, ValueType, gguf, safetensors};
use std::path::{Path, PathBuf};

/// `path` in the reference data; `None`, with a word about it, where there is none.
fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("RUSHLIGHT_SHARED").map(PathBuf::from);
    let root = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"));
    let path = root.join(path);
    if !path.exists() {
        println!("skipped: no reference data at {}", path.display());
        return None;
    }
    Some(path)
}

fn directories(path: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    found.sort();
    found
}

#[test]
fn every_family_opens_and_its_tensors_fill_its_files() {
    let Some(families) = shared("fixtures/families") else { return };
    let mut opened = 0;
    for dir in directories(&families) {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        opened += 1;
        let Kind::HuggingFace { config, generation_config } = checkpoint.kind() else { panic!("{}", dir.display()) };
        assert!(config["model_type"].is_string() || config["architectures"].is_array(), "{}", dir.display());
        assert_eq!(generation_config.is_some(), dir.join("generation_config.json").exists());
        assert!(!checkpoint.tensors().is_empty());
        for info in checkpoint.tensors() {
            let tensor = checkpoint.tensor(&info.name).unwrap();
            assert_eq!(Some(tensor.data.len()), info.bytes(), "{}", info.name);
            assert_eq!(checkpoint.find(&info.name), Some(info));
        }
        let weights = std::fs::read_dir(&dir).unwrap().flatten().filter(|e| {
            let end = e.path().extension().map(|end| end.to_owned());
            end == Some("safetensors".into()) || end == Some("bin".into())
        });
        let on_disk: u64 = weights.map(|e| e.metadata().unwrap().len()).sum();
        assert!(checkpoint.bytes() < on_disk && checkpoint.bytes() > on_disk * 3 / 4, "{}", dir.display());
    }
    assert!(opened > 50, "{opened}");
}

#[test]
fn tensors_of_other_types_are_listed_and_refused_by_name() {
    let mut dir = foreign::Dir::new();
    dir.add("q_proj.qweight", "I32", &[2, 3], vec![1; 24]);
    let checkpoint = Checkpoint::open(&dir.write(&serde_json::Value::Null)).unwrap();
    let raw = checkpoint.raw_tensors().iter().find(|t| t.name.ends_with("q_proj.qweight")).unwrap();
    assert_eq!(raw.dtype, "I32");
    assert_eq!(raw.data.len(), raw.shape.iter().product::<usize>() * 4);
    let error = checkpoint.tensor(&raw.name).unwrap_err().to_string();
    assert!(error.contains(&raw.name) && error.contains("I32"), "{error}");
}

#[test]
fn every_safetensors_file_agrees_with_the_reference_library() {
    let Some(root) = shared("fixtures") else { return };
    let mut checked = 0;
    for path in ["lora_golden", "tiny_llama_train", "gptq_golden"].iter().flat_map(|d| files(&root.join(d))) {
        if path.extension() != Some("safetensors".as_ref()) {
            continue;
        }
        let ours = safetensors::open(&path).unwrap();
        let names = ours.tensors.iter().map(|t| (&t.info.name, &t.info.shape, &t.data));
        let names = names.chain(ours.raw.iter().map(|t| (&t.name, &t.shape, &t.data)));
        // The header once more, without any of our checks.
        let file = std::fs::read(&path).unwrap();
        let start = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&file[8..start]).unwrap();
        for (name, shape, data) in names {
            let entry = &header[name.as_str()];
            let offset = |i: usize| start + entry["data_offsets"][i].as_u64().unwrap() as usize;
            assert_eq!(entry["shape"], serde_json::json!(shape));
            assert!(data[..] == file[offset(0)..offset(1)], "{name}");
            checked += 1;
        }
    }
    assert!(checked > 100, "{checked}");
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn vocabularies_alone_can_be_read() {
    let Some(root) = shared("fixtures/ggml-vocab") else { return };
    let mut read = 0;
    for path in files(&root).iter().filter(|path| path.extension() == Some("gguf".as_ref())) {
        let metadata = gguf::read_metadata(path).unwrap();
        let tokens = metadata.array("tokenizer.ggml.tokens").unwrap();
        assert_eq!(tokens.kind, ValueType::String);
        assert_eq!(tokens.strings().count(), tokens.count);
        assert!(tokens.count > 1000 && metadata.str("tokenizer.ggml.model").is_some());
        let checkpoint = Checkpoint::open(path).unwrap();
        assert!(checkpoint.tensors().is_empty());
        assert_eq!(checkpoint.metadata().map(|Metadata(m)| m.len()), Some(metadata.0.len()));
        read += 1;
    }
    assert!(read > 8, "{read}");
}
