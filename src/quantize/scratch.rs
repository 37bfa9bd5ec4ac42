//! What a long run has finished, kept beside its output so that the same command goes on where it stopped.
//!
//! ```text
//! OUT.gguf.unfinished/
//!   fingerprint.json   what the run was asked to do; another command does not go on with it
//!   lock               held while a run is at work
//!   tensors/NAME       a finished tensor's packed rows
//!   state/NAME         what else the method must remember
//! ```
//!
//! Each entry is written beside its name and renamed when the disk holds it, and begins with the SHA-256 of the rest:
//! whatever moment the run is killed at, an entry is whole or absent.

use anyhow::{Context, Result, bail, ensure};
use rushlight_models::checkpoint::{AtomicFile, Bytes, map};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Bytes of the hash before an entry's contents.
const HASH: usize = 32;

/// What decides the bytes that a run writes: names and values, such as `type` and `Q4_0`. The program's version is
/// always among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint(BTreeMap<String, String>);

impl Default for Fingerprint {
    fn default() -> Self {
        Fingerprint(BTreeMap::from([("version".into(), env!("CARGO_PKG_VERSION").into())]))
    }
}

impl Fingerprint {
    /// Adds what decides the result: an argument under its name, the hash of a text.
    pub fn with(mut self, name: &str, value: impl ToString) -> Fingerprint {
        self.0.insert(name.into(), value.to_string());
        self
    }

    /// Adds the files that a result is made from: the name, size and time of change of the file `path`, or of each file
    /// in the directory `path`.
    pub fn with_files(self, name: &str, path: &Path) -> Result<Fingerprint> {
        let about = |path: &Path| -> Result<String> {
            let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
            let changed = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            Ok(format!("{file} {} {}", meta.len(), changed.map_or(0, |t| t.as_nanos())))
        };
        let mut files = Vec::new();
        if path.is_dir() {
            for entry in std::fs::read_dir(path).with_context(|| path.display().to_string())? {
                let entry = entry.with_context(|| path.display().to_string())?.path();
                if entry.is_file() {
                    files.push(about(&entry)?);
                }
            }
            files.sort();
        } else {
            files.push(about(path)?);
        }
        Ok(self.with(name, files.join("; ")))
    }

    /// What of `self` is something else in `other`, in words; what can be read comes before hashes.
    fn difference(&self, other: &Fingerprint) -> Option<String> {
        let value = |f: &Fingerprint, name: &str| f.0.get(name).map_or("none", String::as_str).to_owned();
        let names = self.0.keys().chain(other.0.keys());
        let differing =
            names.map(|name| (name, value(self, name), value(other, name))).filter(|(_, was, is)| was != is);
        let hashed = |text: &str| text.len() >= 16 && text.bytes().take(16).all(|b| b.is_ascii_hexdigit());
        let (name, was, is) = differing.min_by_key(|(_, was, is)| hashed(was) || hashed(is))?;
        let short = |text: &str| text.chars().take(60).collect::<String>();
        Some(match hashed(&was) && hashed(&is) {
            true => format!("other {name}"),
            false => format!("{name} was {}, now {}", short(&was), short(&is)),
        })
    }
}

/// The scratch folder of one output, held by this process alone.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
    resumed: bool,
    /// Locked while this lives.
    _lock: File,
}

impl Scratch {
    /// Where the scratch folder of `output` is: `OUTPUT.unfinished`.
    pub fn place(output: &Path) -> PathBuf {
        let mut name = output.file_name().unwrap_or_default().to_owned();
        name.push(".unfinished");
        output.with_file_name(name)
    }

    /// Opens the scratch folder of `output`, or makes it. What a run with another `fingerprint` left is never touched,
    /// since it may be hours of work: that is an error which says what differs and what to do.
    pub fn open(output: &Path, fingerprint: &Fingerprint) -> Result<Scratch> {
        let dir = Scratch::place(output);
        let said = || dir.display().to_string();
        std::fs::create_dir_all(&dir).with_context(said)?;
        let file = dir.join("fingerprint.json");
        let known = match std::fs::read(&file) {
            Ok(text) => Some(text),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(e).with_context(|| file.display().to_string()),
        };
        if known.is_none() {
            // A run killed before it wrote the fingerprint leaves the lock and at most a partial file.
            for entry in std::fs::read_dir(&dir).with_context(said)? {
                let name = entry.with_context(said)?.file_name();
                ensure!(
                    name == "lock" || name.to_string_lossy().starts_with(".fingerprint.json."),
                    "{} is not a scratch folder of rushlight: move it, or write to another name",
                    dir.display()
                );
            }
        }
        let lock = File::create(dir.join("lock")).with_context(said)?;
        if let Err(std::fs::TryLockError::WouldBlock) = lock.try_lock() {
            bail!("another run is writing {}: wait for it, or write to another name", output.display());
        }
        if let Some(text) = &known {
            let theirs = serde_json::from_slice(text).map(Fingerprint).unwrap_or(Fingerprint(BTreeMap::new()));
            if let Some(what) = theirs.difference(fingerprint) {
                bail!(
                    "{} holds an unfinished run with other settings ({what}): finish that with its own settings, or \
                     delete the folder to start anew",
                    dir.display()
                );
            }
        }
        let scratch = Scratch { dir, resumed: known.is_some(), _lock: lock };
        // The fingerprint first: by it the next run knows the folder, whenever this one is killed.
        if !scratch.resumed {
            let mut out = AtomicFile::create(&file)?;
            serde_json::to_writer_pretty(&mut out, &fingerprint.0).map_err(std::io::Error::from)?;
            out.commit()?;
        }
        for part in ["tensors", "state"] {
            let part = scratch.dir.join(part);
            std::fs::create_dir_all(&part).with_context(|| part.display().to_string())?;
            sweep(&part)?;
        }
        Ok(scratch)
    }

    /// Whether an earlier run had begun.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// Where it is; files of other kinds may be kept in it, and go with it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Keeps the packed rows of the finished tensor `name`, which is then part of the output as it is.
    pub fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.write("tensors", name, bytes)
    }

    /// The packed rows of tensor `name`; `None` where it is not finished.
    pub fn get(&self, name: &str) -> Result<Option<Bytes>> {
        self.read("tensors", name)
    }

    /// Keeps anything else that a method must remember, such as hidden states; replaces what had the name.
    pub fn put_state(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.write("state", name, bytes)
    }

    /// What [`Scratch::put_state`] kept under `name`.
    pub fn get_state(&self, name: &str) -> Result<Option<Bytes>> {
        self.read("state", name)
    }

    /// Forgets the state `name`, if there is one.
    pub fn drop_state(&self, name: &str) -> Result<()> {
        let path = self.path("state", name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).with_context(|| path.display().to_string()),
            _ => Ok(()),
        }
    }

    /// The output is whole: the folder goes.
    pub fn remove(self) -> Result<()> {
        // The fingerprint last but one: should this be interrupted, the next run finds a folder that it knows.
        for part in ["tensors", "state"] {
            let part = self.dir.join(part);
            std::fs::remove_dir_all(&part).with_context(|| part.display().to_string())?;
        }
        std::fs::remove_dir_all(&self.dir).with_context(|| self.dir.display().to_string())
    }

    fn path(&self, part: &str, name: &str) -> PathBuf {
        self.dir.join(part).join(file_name(name))
    }

    fn write(&self, part: &str, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path(part, name);
        let mut out = AtomicFile::create(&path)?;
        let written = out.write_all(&Sha256::digest(bytes)).and_then(|()| out.write_all(bytes));
        written.with_context(|| path.display().to_string())?;
        Ok(out.commit()?)
    }

    fn read(&self, part: &str, name: &str) -> Result<Option<Bytes>> {
        let path = self.path(part, name);
        if !path.exists() {
            return Ok(None);
        }
        let file = map(&path)?;
        let contents = file.slice(HASH.min(file.len())..file.len()).filter(|_| file.len() >= HASH);
        match contents {
            Some(contents) if Sha256::digest(&contents[..])[..] == file[..HASH] => Ok(Some(contents)),
            _ => bail!("{} is damaged: delete it, and the same command computes it again", path.display()),
        }
    }
}

/// A plain file name for any tensor's name: letters, digits, '_', '-' and dots that are not first stay as they are.
fn file_name(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for (i, byte) in name.bytes().enumerate() {
        match byte {
            b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' => out.push(char::from(byte)),
            b'.' if i > 0 => out.push('.'),
            // Capitals too: some systems take A and a for the same name.
            _ => out.push_str(&format!("%{byte:02x}")),
        }
    }
    out
}

/// Removes what killed runs left half written in `dir`.
fn sweep(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry.with_context(|| dir.display().to_string())?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') && name.ends_with(".partial") {
            std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(kind: &str) -> Fingerprint {
        Fingerprint::default().with("type", kind)
    }

    fn hex(text: &str) -> String {
        Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_same_command_finds_what_was_finished() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("m.gguf");
        let scratch = Scratch::open(&out, &fingerprint("Q4_0")).unwrap();
        assert!(!scratch.resumed());
        assert!(scratch.get("blk.0.attn_q.weight").unwrap().is_none());
        scratch.put("blk.0.attn_q.weight", &[1, 2, 3]).unwrap();
        scratch.put("../A/b:c", &[]).unwrap();
        scratch.put_state("hidden", &[9; 1000]).unwrap();
        drop(scratch);
        std::fs::write(dir.path().join("m.gguf.unfinished/tensors/.x.1-0.partial"), b"half").unwrap();

        let scratch = Scratch::open(&out, &fingerprint("Q4_0")).unwrap();
        assert!(scratch.resumed());
        assert_eq!(scratch.get("blk.0.attn_q.weight").unwrap().unwrap()[..], [1, 2, 3]);
        assert!(scratch.get("../A/b:c").unwrap().unwrap().is_empty());
        assert!(scratch.get("../a/b:c").unwrap().is_none());
        assert_eq!(scratch.get_state("hidden").unwrap().unwrap()[..], [9; 1000]);
        scratch.drop_state("hidden").unwrap();
        scratch.drop_state("hidden").unwrap();
        assert!(scratch.get_state("hidden").unwrap().is_none());
        assert!(!scratch.dir().join("tensors/.x.1-0.partial").exists());
        scratch.remove().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn another_command_is_told_what_differs() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("m.gguf");
        let first = Scratch::open(&out, &fingerprint("Q4_0")).unwrap();
        first.put("a", &[1]).unwrap();
        let error = |kind| Scratch::open(&out, &fingerprint(kind)).unwrap_err().to_string();
        assert!(error("Q4_0").contains("another run is writing"), "{}", error("Q4_0"));
        drop(first);
        assert!(error("Q4_1").contains("(type was Q4_0, now Q4_1)"), "{}", error("Q4_1"));
        let hashed = |text: &str| fingerprint("Q4_0").with("calibration", hex(text));
        let of = |a: &str, b: &str| hashed(a).difference(&hashed(b).with("type", "Q4_1")).unwrap();
        assert_eq!(of("one", "two"), "type was Q4_0, now Q4_1");
        assert_eq!(hashed("one").difference(&hashed("two")).unwrap(), "other calibration");
        // Nothing was lost by asking.
        let again = Scratch::open(&out, &fingerprint("Q4_0")).unwrap();
        assert_eq!(again.get("a").unwrap().unwrap()[..], [1]);
    }

    #[test]
    fn damage_and_foreign_folders_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("m.gguf");
        let scratch = Scratch::open(&out, &fingerprint("Q4_0")).unwrap();
        scratch.put("a", &[1; 100]).unwrap();
        let path = scratch.dir().join("tensors/a");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[50] ^= 1;
        for damaged in [&bytes[..], &bytes[..10], &bytes[..131]] {
            std::fs::write(&path, damaged).unwrap();
            assert!(scratch.get("a").unwrap_err().to_string().contains("damaged"));
        }
        let other = dir.path().join("other.gguf");
        std::fs::create_dir(Scratch::place(&other)).unwrap();
        std::fs::write(Scratch::place(&other).join("thesis.txt"), "mine").unwrap();
        let error = Scratch::open(&other, &fingerprint("Q4_0")).unwrap_err().to_string();
        assert!(error.contains("not a scratch folder"), "{error}");
    }

    #[test]
    fn files_are_known_by_size_and_time() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        std::fs::write(&file, "one").unwrap();
        let of = |path: &Path| Fingerprint::default().with_files("source", path).unwrap();
        let (one, all) = (of(&file), of(dir.path()));
        assert_eq!(of(&file), one);
        std::fs::write(&file, "three").unwrap();
        assert_ne!(of(&file), one);
        assert_ne!(of(dir.path()), all);
    }
}
