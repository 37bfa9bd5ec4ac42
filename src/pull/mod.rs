//! Downloading models from a hub into the local store.

mod choose;
mod fetch;
mod hub;

pub use hub::{Hub, Listed};

use crate::store::{Store, check_name};
use anyhow::{Context, Result, anyhow, bail, ensure};
use hub::Failure;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// What to download.
#[derive(Clone, Debug)]
pub struct Request {
    /// OWNER/REPO.
    pub repo: String,
    /// A file of it, or a part of its name such as `Q8_0`; `None`: the most useful.
    pub file: Option<String>,
    /// Branch, tag or commit.
    pub revision: String,
    /// Name in the store; `None`: the last part of the repository's, in lower case.
    pub name: Option<String>,
    /// Download again, and replace what has the name.
    pub force: bool,
    /// The pause before the first retry.
    pub pause: Duration,
}

/// What happens meanwhile.
pub enum Event<'a> {
    /// A line to tell.
    Note(&'a str),
    /// A file begins: `size` bytes, of which `have` are there already.
    File {
        /// Its path in the repository.
        name: &'a str,
        /// Bytes in all.
        size: u64,
        /// Bytes there already.
        have: u64,
    },
    /// So many bytes of the file are there.
    Bytes(u64),
}

/// What a download came to.
#[derive(Debug)]
pub struct Pulled {
    /// The model's name in the store.
    pub name: String,
    /// Its file or directory.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// Nothing was downloaded: it was there already.
    pub present: bool,
}

/// Where a model came from, kept beside it as `.NAME.json`.
#[derive(Serialize, Deserialize)]
struct Origin {
    repo: String,
    revision: String,
    asked: Option<String>,
    files: Vec<OriginFile>,
}

#[derive(Serialize, Deserialize, PartialEq)]
struct OriginFile {
    path: String,
    size: u64,
    sha256: Option<String>,
}

impl Request {
    /// `OWNER/REPO[:FILE]`; the repository's web address will do too.
    pub fn parse(text: &str) -> Result<Request> {
        let (_, text) = text.split_once("huggingface.co/").unwrap_or(("", text));
        let (repo, file) = text.split_once(':').map_or((text, None), |(repo, file)| (repo, Some(file)));
        let repo = repo.trim_end_matches('/');
        let parts: Vec<&str> = repo.split('/').collect();
        ensure!(
            parts.len() == 2 && parts.iter().all(|p| check_name(p).is_ok() && !p.contains("..")),
            "'{}' is not OWNER/REPO or OWNER/REPO:FILE",
            text.escape_debug()
        );
        let file = file.map(str::trim).filter(|f| !f.is_empty()).map(String::from);
        let pause = Duration::from_secs(1);
        Ok(Request { repo: repo.into(), file, revision: "main".into(), name: None, force: false, pause })
    }
}

/// Downloads what `request` names from `hub` into `store`; does nothing where it is there already.
pub fn pull(hub: &Hub, store: &Store, request: &Request, event: &mut dyn FnMut(Event)) -> Result<Pulled> {
    let last = request.repo.rsplit('/').next().unwrap_or_default().to_lowercase();
    let name = request.name.clone().unwrap_or_else(|| last.strip_suffix("-gguf").unwrap_or(&last).to_string());
    check_name(&name)?;
    let models = store.models();
    let (single, folder) = (models.join(format!("{name}.gguf")), models.join(&name));
    let note = models.join(format!(".{name}.json"));
    let origin: Option<Origin> = std::fs::read(&note).ok().and_then(|json| serde_json::from_slice(&json).ok());
    let origin = origin.filter(|o| o.repo == request.repo && o.revision == request.revision);
    let present = |files: &[OriginFile]| {
        let whole = |path: PathBuf, size| std::fs::metadata(path).is_ok_and(|m| m.len() == size);
        match files {
            [] => None,
            [one] if whole(single.clone(), one.size) => Some(single.clone()),
            all => all.iter().all(|f| whole(folder.join(base(&f.path)), f.size)).then(|| folder.clone()),
        }
    };
    let done = |path: PathBuf, files: &[OriginFile], present| {
        let bytes = files.iter().map(|f| f.size).sum();
        Ok(Pulled { name: name.clone(), path, bytes, present })
    };
    if let Some(o) = origin.as_ref().filter(|o| o.asked == request.file && !request.force)
        && let Some(path) = present(&o.files)
    {
        return done(path, &o.files, true);
    }

    let files = patiently(request.pause, event, || hub.list(&request.repo, &request.revision))?;
    let choice = choose::choose(&request.repo, &files, request.file.as_deref())?;
    let files: Vec<OriginFile> = choice
        .files
        .iter()
        .map(|f| OriginFile { path: f.path.clone(), size: f.size, sha256: f.sha256.clone() })
        .collect();
    if !request.force {
        if let Some(o) = &origin
            && o.files == files
            && let Some(path) = present(&files)
        {
            return done(path, &files, true);
        }
        ensure!(
            !single.exists() && !folder.exists(),
            "the store has another model called {name}: choose a name with --name, or replace it with --force"
        );
    }
    event(Event::Note(&choice.note));
    std::fs::create_dir_all(&models).with_context(|| format!("cannot create {}", models.display()))?;
    // A directory is filled under a hidden name and renamed when all its files are whole.
    let partial = models.join(format!(".{name}.partial"));
    if choice.directory {
        std::fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    }
    for file in &choice.files {
        let identity: String = file.identity.chars().filter(char::is_ascii_alphanumeric).take(16).collect();
        let (part, target) = if choice.directory {
            let target = partial.join(base(&file.path));
            (partial.join(format!(".{}.{identity}.part", base(&file.path))), target)
        } else {
            (models.join(format!(".{name}.{identity}.part")), single.clone())
        };
        let whole = |m: std::fs::Metadata| m.len() == file.size;
        if choice.directory && std::fs::metadata(&target).is_ok_and(whole) {
            // Left whole by an earlier run: it got its name after its check.
            continue;
        }
        if let (Some(sha256), Some(cache), false) = (&file.sha256, hub_cache(), part.exists()) {
            let blob = cache.join(format!("models--{}", request.repo.replace('/', "--"))).join("blobs").join(sha256);
            if fetch::from_cache(&blob, sha256, &part, &target)? {
                event(Event::Note(&format!("{}: taken from {}", file.path, cache.display())));
                continue;
            }
        }
        let source =
            fetch::Source { hub, repo: &request.repo, revision: &request.revision, file, pause: request.pause };
        fetch::fetch(&source, &part, &target, event)?;
    }
    let path = if choice.directory {
        if folder.exists() {
            std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        std::fs::rename(&partial, &folder).with_context(|| folder.display().to_string())?;
        std::fs::remove_file(&single).ok();
        folder.clone()
    } else {
        if folder.exists() {
            std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        single.clone()
    };
    let (repo, revision) = (request.repo.clone(), request.revision.clone());
    let origin = Origin { repo, revision, asked: request.file.clone(), files };
    std::fs::write(&note, serde_json::to_vec_pretty(&origin)?).with_context(|| note.display().to_string())?;
    done(path, &origin.files, false)
}

/// The last part of a path in a repository.
fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Where Hugging Face's own tools keep downloads.
fn hub_cache() -> Option<PathBuf> {
    let set = std::env::var_os("HF_HUB_CACHE").filter(|v| !v.is_empty());
    set.map(PathBuf::from).or_else(|| Some(hub::hf_home()?.join("hub")))
}

/// Repeats a request while its failures are passing ones.
fn patiently<T>(
    pause: Duration,
    event: &mut dyn FnMut(Event),
    mut request: impl FnMut() -> Result<T, Failure>,
) -> Result<T> {
    for failures in 0.. {
        match request() {
            Ok(t) => return Ok(t),
            Err(Failure::Final(e)) => return Err(e),
            Err(Failure::Passing(why, _)) if failures == 4 => bail!("{why}: check the network and HF_ENDPOINT"),
            Err(Failure::Passing(why, wait)) => {
                let wait = wait.unwrap_or(pause * 2u32.pow(failures));
                event(Event::Note(&format!("{why}; trying again in {:.0} s", wait.as_secs_f32().ceil())));
                std::thread::sleep(wait);
            }
        }
    }
    Err(anyhow!("no answer"))
}
