//! The folder of a run: whose it is, and what it was asked to do.

use anyhow::{Context, Result, bail, ensure};
use rushlight_models::checkpoint::{AtomicFile, Bytes, Checkpoint, Kind};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// What decides what a run learns: names of arguments and their values.
pub type Arguments = BTreeMap<String, String>;

const NAME: &str = "run.json";

/// The folder of a run, held by this process alone. Where nothing has come of the run, it is left as it was found.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    /// What the run that is there was asked to do.
    known: Option<Arguments>,
    /// What the run is asked now, where it agrees.
    asked: Option<Arguments>,
    /// It was not there before.
    made: bool,
    /// Locked while this lives.
    _lock: File,
}

impl Folder {
    /// Opens `dir`, or makes it.
    ///
    /// # Errors
    /// When it holds something else, or another run is at work in it.
    pub fn open(dir: &Path) -> Result<Folder> {
        let said = || dir.display().to_string();
        ensure!(!dir.exists() || dir.is_dir(), "{} is a file: name a folder with -o", dir.display());
        let made = !dir.exists();
        std::fs::create_dir_all(dir).with_context(said)?;
        let file = dir.join(NAME);
        let known = match std::fs::read(&file) {
            // Damaged: nothing is known of the run but that it is one.
            Ok(text) => Some(serde_json::from_slice(&text).unwrap_or_default()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(e).with_context(|| file.display().to_string()),
        };
        if known.is_none() {
            for entry in std::fs::read_dir(dir).with_context(said)? {
                let name = entry.with_context(said)?.file_name();
                let own = name == "lock" || name.to_string_lossy().starts_with(".run.json.");
                ensure!(
                    own,
                    "{} is not empty and not a run of rushlight train: name another folder with -o",
                    dir.display()
                );
            }
        }
        let lock = File::create(dir.join("lock")).with_context(said)?;
        if let Err(std::fs::TryLockError::WouldBlock) = lock.try_lock() {
            bail!("another run is at work in {}: wait for it, or name another folder with -o", dir.display());
        }
        Ok(Folder { dir: dir.to_owned(), known, asked: None, made, _lock: lock })
    }

    /// What the argument `name` of the run that is there was.
    pub fn known(&self, name: &str) -> Option<&str> {
        self.known.as_ref()?.get(name).map(String::as_str)
    }

    /// A file or folder in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Compares what the run was asked to do with what it is asked now. `begun`: it has learned something already, which
    /// another run would lose; with `force` it goes on all the same.
    ///
    /// # Errors
    /// When they differ: the message says where.
    pub fn agree(&mut self, arguments: &Arguments, begun: bool, force: bool) -> Result<()> {
        if let Some(known) = self.known.as_ref().filter(|known| begun && !force && *known != arguments) {
            ensure!(
                !known.is_empty(),
                "{} is damaged, and does not say what the run there was asked to do: with --force it goes on as asked now",
                self.path(NAME).display()
            );
            let none = "none";
            let names: std::collections::BTreeSet<&String> = known.keys().chain(arguments.keys()).collect();
            let value =
                |of: &Arguments, name: &String| of.get(name).map_or(none, String::as_str).chars().take(60).collect();
            let differences = names.into_iter().filter(|name| known.get(*name) != arguments.get(*name));
            let each = differences.map(|name| {
                let (was, is): (String, String) = (value(known, name), value(arguments, name));
                format!("{name} was {was}, now {is}")
            });
            bail!(
                "{} holds a run with other arguments ({}): give those to go on with it, --force to go on with the new \
                 ones, or another folder with -o",
                self.dir.display(),
                each.collect::<Vec<_>>().join("; ")
            );
        }
        self.asked = Some(arguments.clone());
        // A run that has begun keeps its arguments until what it has learned turns out to fit the new ones.
        if begun { Ok(()) } else { self.record() }
    }

    /// Writes down what the run was last asked to do.
    pub fn record(&self) -> Result<()> {
        if let Some(asked) = self.asked.as_ref().filter(|asked| self.known.as_ref() != Some(*asked)) {
            let mut out = AtomicFile::create(&self.path(NAME))?;
            serde_json::to_writer_pretty(&mut out, asked).map_err(std::io::Error::from)?;
            out.commit()?;
        }
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let own = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.is_ok_and(|entry| ["lock", NAME].iter().any(|name| entry.file_name() == *name))
        };
        if self.known.is_none() && std::fs::read_dir(&self.dir).is_ok_and(|mut entries| entries.all(own)) {
            let _ = std::fs::remove_file(self.path(NAME));
            let _ = std::fs::remove_file(self.path("lock"));
            if self.made {
                let _ = std::fs::remove_dir(&self.dir);
            }
        }
    }
}

/// Bytes of each end of a tensor that [`base_hash`] reads.
const SAMPLE: usize = 4096;

/// A short name of the numbers of `checkpoint`: a hash of its configuration, of every tensor's name, format and shape, and
/// of both ends of each tensor's bytes. It tells bases apart without reading all of them.
pub fn base_hash(checkpoint: &Checkpoint) -> Result<String> {
    let mut hash = Sha256::new();
    if let Kind::HuggingFace { config, .. } = checkpoint.kind() {
        // Where a model was saved from says nothing about it.
        let mut config = config.clone();
        if let Some(fields) = config.as_object_mut() {
            fields.retain(|name, _| !["_name_or_path", "transformers_version"].contains(&name.as_str()));
        }
        hash.update(config.to_string());
    }
    for info in checkpoint.tensors() {
        hash.update(format!("{} {} {:?};", info.name, info.format, info.shape));
    }
    // Layers that are packed anew when they are asked for would cost as much as loading: their raw tensors are read.
    for raw in checkpoint.raw_tensors() {
        hash.update(format!("{} {} {:?};", raw.name, raw.dtype, raw.shape));
        sample(&mut hash, &raw.data);
    }
    if checkpoint.raw_tensors().is_empty() {
        for info in checkpoint.tensors() {
            sample(&mut hash, &checkpoint.tensor(&info.name)?.data);
        }
    }
    Ok(short(hash))
}

fn sample(hash: &mut Sha256, data: &Bytes) {
    let first = data.len().min(SAMPLE);
    let last = data.len().saturating_sub(SAMPLE).max(first);
    // Windows, so that what has to be made is made of them alone.
    for range in [0..first, last..data.len()] {
        hash.update(data.slice(range).as_deref().unwrap_or_default());
    }
}

/// Sixteen digits of a hash.
pub fn short(hash: Sha256) -> String {
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_run_with_one_set_of_arguments() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("run");
        let arguments = |lr: &str| Arguments::from([("lr".into(), lr.into()), ("seed".into(), "1".into())]);
        let mut folder = Folder::open(&out).unwrap();
        folder.agree(&arguments("0.1"), false, false).unwrap();
        assert!(Folder::open(&out).unwrap_err().to_string().contains("another run is at work"));
        // Nothing has come of it: it leaves nothing, and of what was there nothing goes.
        drop(folder);
        assert!(!out.exists());
        std::fs::create_dir(&out).unwrap();
        Folder::open(&out).unwrap().agree(&arguments("0.1"), false, false).unwrap();
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0);
        let mut folder = Folder::open(&out).unwrap();
        folder.agree(&arguments("0.1"), false, false).unwrap();
        std::fs::write(out.join("metrics.jsonl"), "").unwrap();
        drop(folder);
        let mut folder = Folder::open(&out).unwrap();
        folder.agree(&arguments("0.1"), true, false).unwrap();
        let error = folder.agree(&arguments("0.2"), true, false).unwrap_err().to_string();
        assert!(error.contains("(lr was 0.1, now 0.2)"), "{error}");
        folder.agree(&arguments("0.2"), true, true).unwrap();
        // Until it turns out that the run can go on so, it keeps what it had.
        let written = || std::fs::read_to_string(out.join(NAME)).unwrap();
        assert!(written().contains("0.1"));
        folder.record().unwrap();
        assert!(written().contains("0.2"));
        std::fs::write(out.join(NAME), "{").unwrap();
        drop(folder);
        let mut folder = Folder::open(&out).unwrap();
        let error = folder.agree(&arguments("0.2"), true, false).unwrap_err().to_string();
        assert!(error.contains("run.json is damaged") && error.contains("--force"), "{error}");
        folder.agree(&arguments("0.2"), true, true).unwrap();
        folder.record().unwrap();
        assert!(written().contains("0.2"));
        // Before anything was learned, other arguments are no loss.
        folder.agree(&arguments("0.3"), false, false).unwrap();
        drop(folder);
        Folder::open(&out).unwrap().agree(&arguments("0.3"), true, false).unwrap();
        std::fs::write(dir.path().join("thesis.txt"), "mine").unwrap();
        assert!(Folder::open(dir.path()).unwrap_err().to_string().contains("not a run"));
        assert!(Folder::open(&dir.path().join("thesis.txt")).unwrap_err().to_string().contains("is a file"));
    }

    #[test]
    fn bases_are_told_apart() {
        let hash = |bytes: &[u8]| {
            let mut hash = Sha256::new();
            sample(&mut hash, &Bytes::new(bytes.to_vec()));
            short(hash)
        };
        let mut bytes = vec![7; 20_000];
        let first = hash(&bytes);
        bytes[19_999] = 8;
        assert_ne!(hash(&bytes), first);
        assert_ne!(hash(&[1, 2]), hash(&[2, 1]));
    }
}
