//! Hugging Face model directories: `config.json` and safetensors, or else PyTorch's own files, whole or in shards with an
//! index.

use super::{Checkpoint, Kind, RawTensor, Tensor, index_by_name, multimodal, prequantized, pytorch, safetensors};
use crate::{Error, Result};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;
use std::fmt;
use std::io::Read;
use std::path::{Component, Path};

/// Longest configuration and longest index that are read, in bytes.
const MAX_CONFIG: u64 = 16 << 20;
const MAX_INDEX_FILE: u64 = 32 << 20;
/// Most values in a configuration, so that a small file cannot become a large tree. Real ones have hundreds.
const MAX_VALUES: usize = 100_000;
/// Most tensors that an index may place, and most shards.
const MAX_INDEX: usize = 300_000;
const MAX_SHARDS: usize = 10_000;

/// Opens the directory `dir`.
pub(super) fn open(dir: &Path) -> Result<Checkpoint> {
    let config_path = dir.join("config.json");
    if !config_path.exists() {
        return Err(Error::file(dir, without_config(dir)));
    }
    let mut config = read_config(&config_path)?;
    let generation_path = dir.join("generation_config.json");
    let generation_config = if generation_path.exists() { Some(read_config(&generation_path)?) } else { None };

    let wrapped = multimodal::unwrap(&mut config);
    let quantization = prequantized::describe(dir, &config)?;
    let safetensors = |path: &Path| safetensors::open(path).map(|file| (file.tensors, file.raw));
    let pytorch = |path: &Path| pytorch::open(path).map(|file| (file.tensors, file.raw));
    let mut files = match read_files(dir, "model.safetensors", &safetensors)? {
        Some(files) => files,
        None => {
            read_files(dir, "pytorch_model.bin", &pytorch)?.ok_or_else(|| Error::file(dir, without_weights(dir)))?
        }
    };
    if wrapped {
        files.iter_mut().for_each(multimodal::keep_text);
    }
    let checkpoint = Checkpoint::new(dir, Kind::HuggingFace { config, generation_config }, files)?;
    match quantization {
        Some(method) => prequantized::resolve(checkpoint, &method),
        None => Ok(checkpoint),
    }
}

/// The tensors of one file.
pub(super) type Contents = (Vec<Tensor>, Vec<RawTensor>);

/// What the file `name` holds, or the shards that its index lists; `None` where neither is there.
fn read_files(dir: &Path, name: &str, open: &dyn Fn(&Path) -> Result<Contents>) -> Result<Option<Vec<Contents>>> {
    let (single, index_name) = (dir.join(name), format!("{name}.index.json"));
    let index_path = dir.join(&index_name);
    if single.exists() {
        return Ok(Some(vec![open(&single)?]));
    }
    if !index_path.exists() {
        return Ok(None);
    }
    let mut files = Vec::new();
    let index = parse_index(&read(&index_path, MAX_INDEX_FILE)?, &index_path)?;
    let mut seen = vec![false; index.tensors.len()];
    for (number, shard) in index.shards.iter().enumerate() {
        let path = dir.join(shard);
        if !path.exists() {
            let total = index.shards.len();
            return Err(Error::file(
                dir,
                format!("{shard}, one of {total} shards in {index_name}, is missing: download it"),
            ));
        }
        let (tensors, raw) = open(&path)?;
        let names = tensors.iter().map(|t| &t.info.name).chain(raw.iter().map(|t| &t.name));
        for name in names {
            let at = index.tensors.binary_search_by(|(n, _)| n.cmp(name)).ok();
            let placed = at.filter(|&i| index.tensors[i].1 as usize == number);
            let Some(i) = placed else {
                let claim = match at {
                    Some(i) => format!("places it in {}", index.shards[index.tensors[i].1 as usize]),
                    None => "does not have it".to_owned(),
                };
                return Err(Error::file(
                    path,
                    format!("holds tensor '{name}', but {index_name} {claim}: download both again"),
                ));
            };
            seen[i] = true;
        }
        files.push((tensors, raw));
    }
    if let Some(i) = seen.iter().position(|seen| !seen) {
        let (name, shard) = &index.tensors[i];
        return Err(Error::file(
            dir.join(&index.shards[*shard as usize]),
            format!("tensor '{name}', which {index_name} places here, is missing: download it again"),
        ));
    }
    Ok(Some(files))
}

/// Reads a JSON object such as `config.json`.
pub fn read_config(path: &Path) -> Result<Value> {
    parse_config(&read(path, MAX_CONFIG)?, path)
}

/// Reads a JSON object such as `config.json` from memory; `path` is for messages only.
pub fn parse_config(text: &[u8], path: &Path) -> Result<Value> {
    // Every value but the first comes after one of these.
    if text.iter().filter(|b| b",[{".contains(b)).count() > MAX_VALUES {
        return Err(Error::file(path, format!("holds more than {MAX_VALUES} values: not a model's configuration")));
    }
    let value: Value = serde_json::from_slice(text).map_err(|e| not_json(path, &e))?;
    match value.is_object() {
        true => Ok(value),
        false => Err(Error::file(path, "is not a JSON object: download it again")),
    }
}

fn not_json(path: &Path, error: &serde_json::Error) -> Error {
    Error::file(path, format!("not valid JSON ({error}): download it again"))
}

/// The contents of a file of at most `limit` bytes.
fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    // Before opening: to open a pipe would wait for its other end.
    let about = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !about.is_file() {
        return Err(Error::file(path, "not a regular file"));
    }
    if about.len() > limit {
        return Err(Error::file(path, format!("has {} bytes, more than the {limit} allowed", about.len())));
    }
    let mut text = Vec::with_capacity(about.len() as usize);
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    file.take(limit).read_to_end(&mut text).map_err(|e| Error::io(path, e))?;
    Ok(text)
}

/// What to do about a directory without config.json.
fn without_config(dir: &Path) -> String {
    let names = file_names(dir);
    if let Some(gguf) = names.iter().find(|n| n.ends_with(".gguf")) {
        return format!("a directory of GGUF files: name one of them, such as {}", dir.join(gguf).display());
    }
    if names.iter().any(|n| n == "adapter_config.json") {
        return "an adapter, not a whole model: give the model that it was trained on, and this with --adapter".into();
    }
    match names.iter().any(|n| n.ends_with(".safetensors")) {
        true => "config.json is missing: download it beside the weights".into(),
        false => "neither config.json nor weights are here: not a model's directory".into(),
    }
}

/// What to do about a directory without safetensors.
fn without_weights(dir: &Path) -> String {
    let names = file_names(dir);
    let has = |start: &str, end: &str| names.iter().any(|n| n.starts_with(start) && n.ends_with(end));
    if has("pytorch_model-", ".bin") {
        return "pytorch_model.bin.index.json is missing: download it beside the shards".into();
    }
    if has("model-", ".safetensors") {
        return "model.safetensors.index.json is missing: download it beside the shards".into();
    }
    match names.iter().find(|n| n.ends_with(".safetensors")) {
        Some(other) => {
            format!("model.safetensors is missing, and {other} is not read in its place: rename or download")
        }
        None => "has a config.json but no weights: download model.safetensors (or its shards and their index)".into(),
    }
}

/// The names in `dir` that are text, sorted.
fn file_names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Which shard holds which tensor.
#[derive(Debug)]
pub struct Index {
    /// The shards' file names, in order.
    pub shards: Vec<String>,
    /// Tensors' names and the shard of each as an index into `shards`, ordered by name.
    pub tensors: Vec<(String, u32)>,
}

/// Reads `model.safetensors.index.json` from memory; `path` is for messages only.
pub fn parse_index(text: &[u8], path: &Path) -> Result<Index> {
    #[derive(serde::Deserialize)]
    struct File {
        weight_map: Index,
    }
    let File { weight_map: mut index } = serde_json::from_slice(text).map_err(|e| not_json(path, &e))?;
    for shard in &index.shards {
        // A name that leads elsewhere would read files that are no part of the model.
        let mut parts = Path::new(shard).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) || shard.contains(['/', '\\']) {
            return Err(Error::file(path, format!("names the shard '{shard}', which is not a plain file name")));
        }
    }
    if let Err(name) = index_by_name(&index.tensors, |t| &t.0) {
        return Err(Error::file(path, format!("places tensor '{name}' twice")));
    }
    index.tensors.sort_unstable();
    // Shards are read in the order of their numbers.
    let mut order: Vec<u32> = (0..index.shards.len() as u32).collect();
    order.sort_unstable_by_key(|&i| &index.shards[i as usize]);
    let mut rank = vec![0; order.len()];
    for (place, &i) in order.iter().enumerate() {
        rank[i as usize] = place as u32;
    }
    for (_, shard) in &mut index.tensors {
        *shard = rank[*shard as usize];
    }
    index.shards.sort_unstable();
    Ok(index)
}

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Index;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object that places tensors in shards")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
                let mut index = Index { shards: Vec::new(), tensors: Vec::new() };
                let mut numbers = std::collections::HashMap::new();
                while let Some((name, shard)) = map.next_entry::<String, String>()? {
                    let number = match numbers.get(&shard) {
                        Some(&number) => number,
                        None => {
                            let number = index.shards.len() as u32;
                            index.shards.push(shard.clone());
                            numbers.insert(shard, number);
                            number
                        }
                    };
                    index.tensors.push((name, number));
                    if index.tensors.len() > MAX_INDEX || index.shards.len() > MAX_SHARDS {
                        return Err(A::Error::custom("more tensors or shards than any model has"));
                    }
                }
                Ok(index)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
