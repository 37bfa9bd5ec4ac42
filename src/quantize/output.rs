//! Where a file goes, and whether it may.

use super::name::Naming;
use crate::replace;
use crate::store::Store;
use anyhow::{Context, Result, bail};
use rushlight_models::checkpoint::{Checkpoint, Kind};
use std::path::{Path, PathBuf};

/// The file that `asked` (the -o option) means for the model `model`, opened from `source`: the file itself; in a folder
/// one named by GGML's convention; and without it `MODEL-TYPE.gguf` in the store for a model of the store, or else one
/// named by the convention beside the source.
pub fn choose(
    asked: Option<&Path>,
    model: &str,
    source: &Path,
    naming: &Naming,
    encoding: &str,
    store: &Store,
) -> Result<PathBuf> {
    if let Some(asked) = asked {
        let folder = asked.as_os_str().as_encoded_bytes().last().is_some_and(|&b| std::path::is_separator(b.into()));
        if !folder && !asked.is_dir() {
            return Ok(asked.to_path_buf());
        }
        return Ok(asked.join(naming.file(encoding)));
    }
    if store.find(model).is_some_and(|entry| entry.path == source) {
        let name = format!("{model}-{}", encoding.to_ascii_lowercase());
        return Ok(store.models().join(format!("{name}.gguf")));
    }
    let whole = std::path::absolute(source).with_context(|| source.display().to_string())?;
    Ok(whole.with_file_name(naming.file(encoding)))
}

/// Fails where writing `output` would destroy a part of `checkpoint`, or something that is not a GGUF file.
pub fn check(output: &Path, checkpoint: &Checkpoint) -> Result<()> {
    if output.is_dir() {
        bail!("{} is a directory: end it with / to have a file named in it", output.display());
    }
    replace::check(output, "a GGUF file", |path| replace::begins(path, b"GGUF"))?;
    // To write it would begin with a new file, so what is not there can be nothing else.
    let Ok(there) = std::fs::canonicalize(output) else { return Ok(()) };
    let source = checkpoint.path();
    let same = |path: &Path| std::fs::canonicalize(path).is_ok_and(|path| path == there);
    let part = match checkpoint.kind() {
        Kind::HuggingFace { .. } => {
            there.parent().is_some_and(same_dir(source)) && there.extension().is_none_or(|ext| ext != "gguf")
        }
        Kind::Gguf(_) => same(source) || parts_of_set(source).iter().any(|path| same(path)),
    };
    if part {
        bail!("{} is what is read: write to another file", output.display());
    }
    Ok(())
}

fn same_dir(dir: &Path) -> impl Fn(&Path) -> bool {
    let dir = std::fs::canonicalize(dir);
    move |other: &Path| dir.as_ref().is_ok_and(|dir| dir == other)
}

/// The files of the set that `first` begins; none where it is a single file.
fn parts_of_set(first: &Path) -> Vec<PathBuf> {
    let name = first.file_name().unwrap_or_default().to_string_lossy();
    let Some((_, total)) = crate::store::split_part(&name) else { return Vec::new() };
    let stem = &name[..name.len() - "00001-of-00001.gguf".len()];
    (1..=total).map(|i| first.with_file_name(format!("{stem}{i:05}-of-{total:05}.gguf"))).collect()
}
