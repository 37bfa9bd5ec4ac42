//! The local store: models that `pull` downloaded, and how a MODEL argument finds its files.
//!
//! `$RUSHLIGHT_HOME/models/NAME.gguf` is a single file, `$RUSHLIGHT_HOME/models/NAME/` a Hugging Face directory or a
//! split GGUF set.

use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};

/// A directory of models by name.
#[derive(Clone, Debug)]
pub struct Store {
    home: PathBuf,
}

/// A model in the store.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// The file to open: a GGUF (the first of a set), or a Hugging Face directory.
    pub path: PathBuf,
    /// Size on disk in bytes.
    pub bytes: u64,
}

impl Store {
    /// The store of this user: `$RUSHLIGHT_HOME`, or else `rushlight` in the system's place for data
    /// (`$XDG_DATA_HOME` or `~/.local/share`; `~/Library/Application Support` on macOS; `%LOCALAPPDATA%` on Windows).
    pub fn open() -> Result<Store> {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(home) = var("RUSHLIGHT_HOME") {
            return Ok(Store { home });
        }
        let data = if cfg!(windows) {
            var("LOCALAPPDATA")
        } else if cfg!(target_os = "macos") {
            var("HOME").map(|home| home.join("Library/Application Support"))
        } else {
            var("XDG_DATA_HOME").filter(|p| p.is_absolute()).or_else(|| var("HOME").map(|h| h.join(".local/share")))
        };
        let data = data.context("there is no home directory to keep models in: set RUSHLIGHT_HOME to a directory")?;
        Ok(Store { home: data.join("rushlight") })
    }

    /// The store at `home`.
    pub fn at(home: impl Into<PathBuf>) -> Store {
        Store { home: home.into() }
    }

    /// Where the store is.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Where its models lie.
    pub fn models(&self) -> PathBuf {
        self.home.join("models")
    }

    /// The models, by name.
    pub fn list(&self) -> Result<Vec<Entry>> {
        let models = self.models();
        let read = match std::fs::read_dir(&models) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            read => read.with_context(|| models.display().to_string())?,
        };
        let mut entries = Vec::new();
        for item in read {
            let path = item.with_context(|| models.display().to_string())?.path();
            let Some(file) = path.file_name().and_then(|f| f.to_str()) else { continue };
            let name = if path.is_dir() { file } else { file.strip_suffix(".gguf").unwrap_or_default() };
            if check_name(name).is_err() {
                continue;
            }
            if let Some(entry) = self.find(name) {
                entries.push(entry);
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries.dedup_by(|a, b| a.name == b.name);
        Ok(entries)
    }

    /// The model called `name`.
    pub fn find(&self, name: &str) -> Option<Entry> {
        check_name(name).ok()?;
        let file = self.models().join(format!("{name}.gguf"));
        if let Ok(meta) = std::fs::metadata(&file)
            && meta.is_file()
        {
            return Some(Entry { name: name.into(), path: file, bytes: meta.len() });
        }
        let dir = self.models().join(name);
        let path = model_in(&dir)?;
        let bytes = std::fs::read_dir(&dir).ok()?.flatten().filter_map(|f| Some(f.path().metadata().ok()?.len())).sum();
        Some(Entry { name: name.into(), path, bytes })
    }

    /// The files of a MODEL argument: an existing path first, then a name in the store.
    pub fn resolve(&self, model: &str) -> Result<PathBuf> {
        ensure!(!model.is_empty(), "the model's name is empty");
        let path = Path::new(model);
        match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => {
                if let Some(found) = model_in(path) {
                    return Ok(found);
                }
                // A tokenizer's directory, for the commands that need no more; others say what they miss.
                if self.find(model).is_none() {
                    return Ok(path.to_path_buf());
                }
            }
            Ok(_) => return Ok(path.to_path_buf()),
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => bail!("{model}: {e}"),
            Err(_) => {}
        }
        if let Some(entry) = self.find(model) {
            return Ok(entry.path);
        }
        bail!("{}", self.unknown(model))
    }

    fn unknown(&self, model: &str) -> String {
        let names: Vec<String> = self.list().unwrap_or_default().into_iter().map(|e| e.name).collect();
        let looks_like_path = model.ends_with(".gguf") || model.starts_with(['.', '/', '~']);
        let what =
            if looks_like_path { "no such file or directory" } else { "no such file, and no model of that name" };
        let close: Vec<&str> = names.iter().map(String::as_str).filter(|name| alike(name, model)).take(3).collect();
        let advice = if !close.is_empty() {
            format!("did you mean {}?", close.join(" or "))
        } else if names.is_empty() {
            "the store is empty; `rushlight pull OWNER/REPO` downloads a model".into()
        } else {
            let more = if names.len() > 20 { ", ..." } else { "" };
            let first = names.iter().take(20).map(String::as_str).collect::<Vec<_>>().join(", ");
            format!("the store has {first}{more}; `rushlight pull OWNER/REPO` downloads another")
        };
        // OWNER/REPO is what one types to download: say how.
        let parts: Vec<&str> = model.split('/').collect();
        if !looks_like_path && parts.len() == 2 && parts.iter().all(|p| check_name(p).is_ok()) {
            return format!("{model}: {what}; `rushlight pull {model}` downloads it from the hub");
        }
        format!("{model}: {what}; {advice}")
    }
}

/// What to open in a directory: itself when it holds a config.json, else the first (or only) GGUF of one set.
fn model_in(dir: &Path) -> Option<PathBuf> {
    if dir.join("config.json").is_file() {
        return Some(dir.to_path_buf());
    }
    let mut ggufs: Vec<PathBuf> = std::fs::read_dir(dir)
        .ok()?
        .flatten()
        .map(|f| f.path())
        .filter(|p| {
            let name = p.file_name().unwrap_or_default().to_string_lossy();
            let starts_set = split_part(&name).is_none_or(|(part, _)| part == 1);
            name.ends_with(".gguf") && !name.starts_with('.') && starts_set && p.is_file()
        })
        .collect();
    ggufs.sort();
    if ggufs.len() == 1 { ggufs.pop() } else { None }
}

/// The number of a split GGUF's part and how many there are: `NAME-00002-of-00005.gguf` is (2, 5).
pub fn split_part(file: &str) -> Option<(u32, u32)> {
    let (rest, total) = file.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (_, part) = rest.rsplit_once('-')?;
    let number = |s: &str| if s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit()) { s.parse().ok() } else { None };
    Some((number(part)?, number(total)?))
}

/// Fails when `name` cannot be a model's name: it must be one plain file name on every system.
pub fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-+".contains(c);
    ensure!(
        !name.is_empty() && name.len() <= 128 && !name.starts_with(['.', '-']) && name.chars().all(plain),
        "'{}' cannot be a model's name: use letters, digits, '.', '_', '-' and '+' (no other characters, not '.' or \
         '-' first, at most 128)",
        name.chars().take(130).collect::<String>().escape_debug()
    );
    Ok(())
}

/// Whether `typed` may be a slip for `name`: one contains the other, or they are a few edits apart.
fn alike(name: &str, typed: &str) -> bool {
    let (name, typed) = (name.to_lowercase(), typed.trim_end_matches(".gguf").to_lowercase());
    if typed.len() >= 3 && name.len() >= 3 && (name.contains(&typed) || typed.contains(&name)) {
        return true;
    }
    typed.len() <= 128 && edits(&name, &typed) <= (name.len().min(typed.len()) / 4).max(1)
}

/// The fewest insertions, deletions and replacements that turn `a` into `b` (Levenshtein).
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let replace = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(files: &[&str]) -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join("models").join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "12345").unwrap();
        }
        let store = Store::at(dir.path());
        (dir, store)
    }

    #[test]
    fn finds_files_directories_and_sets() {
        let (_dir, store) = store(&[
            "one.gguf",
            "hf/config.json",
            "hf/model.safetensors",
            "set/m-00001-of-00002.gguf",
            "set/m-00002-of-00002.gguf",
            "empty/readme.md",
            ".hidden.gguf",
            "half.gguf.part",
        ]);
        let names: Vec<String> = store.list().unwrap().into_iter().map(|e| e.name).collect();
        assert_eq!(names, ["hf", "one", "set"]);
        assert!(store.resolve("one").unwrap().ends_with("models/one.gguf"));
        assert!(store.resolve("hf").unwrap().ends_with("models/hf"));
        assert!(store.resolve("set").unwrap().ends_with("set/m-00001-of-00002.gguf"));
        assert_eq!(store.find("hf").unwrap().bytes, 10);
        // An existing path comes first.
        let path = store.models().join("set");
        assert!(store.resolve(path.to_str().unwrap()).unwrap().ends_with("m-00001-of-00002.gguf"));
    }

    #[test]
    fn unknown_names_get_advice() {
        let (_dir, full) = store(&["smollm2.gguf", "qwen2.5-coder.gguf"]);
        let error = |s: &Store, m: &str| s.resolve(m).unwrap_err().to_string();
        assert!(error(&full, "smolm2").contains("did you mean smollm2?"));
        assert!(error(&full, "qwen").contains("did you mean qwen2.5-coder?"));
        assert!(error(&full, "gemma").contains("the store has qwen2.5-coder, smollm2"));
        assert!(error(&full, "owner/repo").contains("`rushlight pull owner/repo`"));
        assert!(error(&full, "./x.gguf").contains("no such file or directory"));
        let (_dir, empty) = store(&[]);
        assert!(error(&empty, "gemma").contains("the store is empty"));
        assert!(empty.list().unwrap().is_empty());
    }

    #[test]
    fn names_cannot_leave_the_store() {
        let (_dir, store) = store(&["one.gguf"]);
        for bad in ["..", "../one", "a/b", "a\\b", "", ".one", "-n", "a b", "a\0b", "c:d", &"x".repeat(200)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
            assert!(store.find(bad).is_none(), "{bad:?}");
        }
        assert!(check_name("Qwen2.5-Coder_1.5B+x").is_ok());
        assert!(store.resolve("../models/one").is_err());
    }

    #[test]
    fn parts_of_sets() {
        assert_eq!(split_part("m-00002-of-00005.gguf"), Some((2, 5)));
        for no in ["m.gguf", "m-2-of-5.gguf", "m-00002-of-00005.bin", "m-+0002-of-00005.gguf"] {
            assert_eq!(split_part(no), None);
        }
        assert_eq!((edits("kitten", "sitting"), edits("", "abc"), edits("abc", "abc")), (3, 3, 0));
    }
}
