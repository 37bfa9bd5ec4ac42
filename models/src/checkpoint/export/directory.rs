use super::original::Original;
use crate::checkpoint::atomic::begin;
use crate::checkpoint::safetensors::{Entry, Writer};
use crate::{Error, Result};
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Longest file that is copied beside the weights: tokenizers have some 20 MB at most.
const MAX_COMPANION: u64 = 256 << 20;

/// A directory that is written beside its target and renamed when whole. Dropped before [`Directory::commit`], it leaves
/// nothing; what a killed program has left of one goes when the next begins there.
#[derive(Debug)]
pub(super) struct Directory {
    target: PathBuf,
    partial: PathBuf,
    _lock: Option<File>,
    done: bool,
}

impl Directory {
    /// Begins the directory that will be called `target`, which does not exist yet, or is empty.
    pub fn create(target: &Path) -> Result<Directory> {
        if target.file_name().is_none() {
            return Err(Error::file(target, "cannot be written: name a directory"));
        }
        match std::fs::read_dir(target) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    return Err(Error::file(target, "is there already and not empty: name another, or remove it"));
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(target, e)),
        }
        // Some systems do not open directories: there is nothing to lock then, and nothing is swept.
        let create = |path: &Path| std::fs::create_dir(path).map(|()| File::open(path).ok());
        let (partial, lock) = begin(target, create)?;
        Ok(Directory { target: target.to_owned(), partial, _lock: lock, done: false })
    }

    /// Where a file of this directory is now.
    pub fn file(&self, name: &str) -> PathBuf {
        self.partial.join(name)
    }

    /// Writes a JSON file.
    pub fn json(&self, name: &str, value: &Value) -> Result<()> {
        let path = self.file(name);
        let text = serde_json::to_string_pretty(value).map_err(|e| Error::file(&path, e.to_string()))?;
        let mut file = std::fs::File::create_new(&path).map_err(|e| Error::io(&path, e))?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(|e| Error::io(&path, e))
    }

    /// Copies what belongs to a model besides its weights and configuration: tokenizer, chat template, generation
    /// settings, license.
    pub fn copy_companions(&self, source: &Path) -> Result<()> {
        let entries = std::fs::read_dir(source).map_err(|e| Error::io(source, e))?;
        for entry in entries {
            let path = entry.map_err(|e| Error::io(source, e))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let kind = path.extension().and_then(|ext| ext.to_str()).unwrap_or_default();
            let described_anew = ["config.json", "quantize_config.json", "quant_config.json"].contains(&name);
            let wanted = matches!(kind, "json" | "txt" | "model" | "jinja" | "tiktoken") || name.starts_with("LICENSE");
            if described_anew || name.ends_with(".index.json") || name.starts_with("adapter_") || !wanted {
                continue;
            }
            // Through links: downloads often are links into a store.
            let about = std::fs::metadata(&path).map_err(|e| Error::io(&path, e))?;
            if about.is_file() && about.len() <= MAX_COMPANION {
                std::fs::copy(&path, self.file(name)).map_err(|e| Error::io(&path, e))?;
            }
        }
        Ok(())
    }

    /// Gives the whole directory its name.
    pub fn commit(mut self) -> Result<()> {
        std::fs::rename(&self.partial, &self.target).map_err(|e| Error::io(&self.target, e))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !self.done {
            let _ = std::fs::remove_dir_all(&self.partial);
        }
    }
}

/// What a quantized directory takes over from `source`.
pub(super) struct Kept {
    /// The configuration.
    pub config: Value,
    /// The tensors that stay as they are and whose elements have 8 bytes. They come first in a file and the others, wide
    /// types before narrow ones, last: so each lies at a multiple of its elements' size, as PyTorch wants it.
    pub widest: Vec<Entry>,
    /// The others that stay as they are.
    pub tensors: Vec<Entry>,
    /// The linear layers among them, without the head.
    pub linears: Vec<String>,
}

impl Kept {
    /// Everything but the weights of `layers`.
    pub fn of(source: &Original<'_>, layers: &[String]) -> Result<Kept> {
        let error = |what: String| Error::file(source.checkpoint().path(), what);
        if let Some(name) = layers.iter().find(|name| source.find(&format!("{name}.weight")).is_none()) {
            return Err(error(format!("it has no tensor '{name}.weight' to be quantized")));
        }
        let quantized: std::collections::HashSet<String> = layers.iter().map(|name| format!("{name}.weight")).collect();
        let floats = source.tensors().iter().filter(|t| !quantized.contains(&t.name));
        let floats = floats.map(|t| (t.name.clone(), t.format.name().to_owned(), t.shape.clone()));
        let raw = source.raw_tensors().iter().map(|t| (t.name.clone(), t.dtype.clone(), t.shape.clone()));
        let all = floats.chain(raw).map(|(name, dtype, shape)| Entry { name, dtype, shape });
        let (widest, mut tensors): (Vec<Entry>, Vec<Entry>) = all.partition(|t| element(t) >= 8);
        tensors.sort_by_key(|t| std::cmp::Reverse(element(t)));
        let linears = tensors.iter().filter(|t| t.shape.len() == 2 && t.name.contains(".layers."));
        let linears = linears.filter_map(|t| Some(t.name.strip_suffix(".weight")?.to_owned())).collect();
        Ok(Kept { config: source.config().clone(), widest, tensors, linears })
    }
}

/// Bytes of an element, or of a complex number's halves.
pub(super) fn element(entry: &Entry) -> usize {
    match entry.dtype.as_str() {
        "I64" | "U64" | "F64" | "C64" => 8,
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        _ => 1,
    }
}

/// Copies tensors of `source`.
pub(super) fn copy(source: &Original<'_>, tensors: &[Entry], writer: &mut Writer) -> Result<()> {
    for Entry { name, .. } in tensors {
        match source.raw_tensors().iter().find(|t| &t.name == name) {
            Some(raw) => writer.write(name, &raw.data)?,
            None => writer.write(name, &source.tensor(name)?.data)?,
        }
    }
    Ok(())
}

/// The two dimensions of the weight of `layer`.
pub(super) fn shape(source: &Original<'_>, layer: &str) -> Result<(usize, usize)> {
    match source.find(&format!("{layer}.weight")).map(|info| &info.shape[..]) {
        Some(&[rows, cols]) if rows > 0 && cols > 0 => Ok((rows, cols)),
        _ => Err(Error::file(source.checkpoint().path(), format!("tensor '{layer}.weight' is not a matrix"))),
    }
}
