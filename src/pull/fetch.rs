//! One file from the hub to the disk: resumed where it broke, checked while it comes, named when it is whole.

use super::Event;
use super::hub::{Failure, Hub, Listed};
use anyhow::{Context, Result, anyhow, bail};
use rushlight_models::is_full;
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;
use ureq::http::{StatusCode, header};

/// Attempts that bring nothing new before we give up.
const ATTEMPTS: u32 = 6;

/// What to fetch and from where.
pub struct Source<'a> {
    pub hub: &'a Hub,
    pub repo: &'a str,
    pub revision: &'a str,
    pub file: &'a Listed,
    /// The first pause after a failure; each further one is twice as long.
    pub pause: Duration,
}

/// A file that grows: what it holds already, and the hash of it.
struct Part<'a> {
    path: &'a Path,
    file: File,
    len: u64,
    hash: Sha256,
}

impl Part<'_> {
    fn open(path: &Path) -> Result<Part<'_>> {
        let name = || path.display().to_string();
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).with_context(name)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("{}: another rushlight is downloading this file; wait for it", path.display())
            }
            // A file system without locks: nothing to wait for.
            Err(TryLockError::Error(_)) => {}
        }
        let mut part = Part { path, file, len: 0, hash: Sha256::new() };
        let mut buffer = vec![0; 1 << 20];
        // Only a plain file has a beginning to go on from.
        if part.file.metadata().with_context(name)?.is_file() {
            loop {
                let n = part.file.read(&mut buffer).with_context(name)?;
                if n == 0 {
                    break;
                }
                part.hash.update(&buffer[..n]);
                part.len += n as u64;
            }
        }
        Ok(part)
    }

    fn restart(&mut self) -> Result<()> {
        let name = || self.path.display().to_string();
        self.file.seek(SeekFrom::Start(0)).with_context(name)?;
        if self.file.metadata().with_context(name)?.is_file() {
            self.file.set_len(0).with_context(name)?;
        }
        self.len = 0;
        self.hash = Sha256::new();
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| match is_full(&e) {
            true => anyhow!(
                "{}: {e}: make room and run the same command again, it goes on from here; or set RUSHLIGHT_HOME to a \
                 larger disk",
                self.path.display()
            ),
            false => anyhow!("{}: {e}", self.path.display()),
        })?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn sha256(&self) -> String {
        self.hash.clone().finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// Downloads `source` to `part`, goes on from what `part` holds, checks size and sha256, and renames it to `target`.
pub fn fetch(source: &Source, part: &Path, target: &Path, event: &mut dyn FnMut(Event)) -> Result<()> {
    let Source { file, .. } = *source;
    let mut part_file = Part::open(part)?;
    let resumed = part_file.len > 0;
    event(Event::File { name: &file.path, size: file.size, have: part_file.len.min(file.size) });
    let sha256 = match download(source, &mut part_file, event) {
        // What an interrupted run left may be damaged: that is worth one fresh start.
        Err(Failure::Final(e)) if resumed && e.is::<WrongHash>() => {
            event(Event::Note("what was there does not fit: starting again"));
            part_file.restart()?;
            event(Event::Bytes(0));
            download(source, &mut part_file, event)
        }
        other => other,
    };
    match sha256 {
        Ok(()) => {}
        Err(Failure::Final(e)) => {
            if e.is::<WrongHash>() {
                // Never to be resumed from.
                std::fs::remove_file(part).ok();
            }
            return Err(e);
        }
        Err(Failure::Passing(why, _)) => bail!("{why}; run the same command again, it goes on from here"),
    }
    part_file.file.sync_all().with_context(|| part.display().to_string())?;
    std::fs::rename(part, target).with_context(|| format!("cannot rename {} to {}", part.display(), target.display()))
}

/// The contents are not what the hub's listing says.
#[derive(Debug)]
struct WrongHash(String);

impl std::fmt::Display for WrongHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongHash {}

fn download(source: &Source, part: &mut Part, event: &mut dyn FnMut(Event)) -> Result<(), Failure> {
    let file = source.file;
    let mut expected = file.sha256.clone();
    let mut etag = None;
    let (mut failures, mut best) = (0, part.len);
    loop {
        let result = attempt(source, part, &mut expected, &mut etag, event);
        let (why, wait) = match result {
            Ok(()) => break,
            Err(Failure::Passing(why, wait)) => (why, wait),
            other => return other,
        };
        // Only bytes never seen before are progress: a server that ignores ranges starts over each time.
        failures = if part.len > best { 1 } else { failures + 1 };
        best = best.max(part.len);
        if failures >= ATTEMPTS {
            return Err(Failure::Passing(why, None));
        }
        let wait = wait.unwrap_or(source.pause * 2u32.pow(failures - 1));
        event(Event::Note(&format!("{why}; trying again in {:.0} s", wait.as_secs_f32().ceil())));
        std::thread::sleep(wait);
    }
    if let Some(expected) = expected
        && part.sha256() != expected
    {
        let wrong = format!(
            "{}: the download's sha256 is {}, the hub's listing says {expected}: nothing was kept; try again later",
            file.path,
            part.sha256()
        );
        return Err(Failure::Final(WrongHash(wrong).into()));
    }
    Ok(())
}

/// One request for what is missing. Done when the file has its size.
fn attempt(
    source: &Source,
    part: &mut Part,
    expected: &mut Option<String>,
    etag: &mut Option<String>,
    event: &mut dyn FnMut(Event),
) -> Result<(), Failure> {
    let (file, size) = (source.file, source.file.size);
    if part.len > size {
        part.restart().map_err(Failure::Final)?;
    }
    if part.len == size {
        return Ok(());
    }
    let range = format!("bytes={}-", part.len);
    let mut headers = Vec::new();
    if part.len > 0 {
        headers.push(("Range", range.as_str()));
        if let Some(etag) = etag {
            headers.push(("If-Range", etag.as_str()));
        }
    }
    let url = source.hub.file_url(source.repo, source.revision, &file.path);
    let answer = source.hub.get(&url, &headers)?;
    if let (Some(linked), Some(listed)) = (&answer.linked_sha256, &*expected)
        && linked != listed
    {
        return Err(Failure::Final(anyhow!("{}: changed on the hub while we looked; run it again", file.path)));
    }
    *expected = expected.take().or(answer.linked_sha256);
    let response = answer.response;
    let status = response.status();
    let text = |name: header::HeaderName| response.headers().get(name).and_then(|v| v.to_str().ok());
    match status {
        StatusCode::PARTIAL_CONTENT => {
            // "bytes 5-99/100"
            let range = text(header::CONTENT_RANGE).unwrap_or_default();
            let start = range.strip_prefix("bytes ").and_then(|r| r.split_once('-')?.0.trim().parse::<u64>().ok());
            let total = range.rsplit_once('/').and_then(|(_, t)| t.parse::<u64>().ok());
            if start != Some(part.len) || total.is_some_and(|t| t != size) {
                part.restart().map_err(Failure::Final)?;
                return Err(Failure::Passing(format!("{}: the server sent another range than asked", file.path), None));
            }
        }
        // The whole file: the range was ignored, or the file changed.
        StatusCode::OK => part.restart().map_err(Failure::Final)?,
        StatusCode::RANGE_NOT_SATISFIABLE => {
            part.restart().map_err(Failure::Final)?;
            return Err(Failure::Passing(format!("{}: the server does not have that range", file.path), None));
        }
        _ => return Err(source.hub.refused(&response, source.repo, Some(&file.path))),
    }
    let length = text(header::CONTENT_LENGTH).and_then(|l| l.parse::<u64>().ok());
    if let Some(length) = length.filter(|&l| l != size - part.len) {
        return Err(Failure::Final(anyhow!(
            "{}: the server sends {} bytes, the hub's listing says {size}: not kept",
            file.path,
            part.len.saturating_add(length)
        )));
    }
    // A weak validator cannot vouch for bytes.
    *etag = text(header::ETAG).filter(|e| !e.starts_with("W/")).map(String::from);
    event(Event::Bytes(part.len));
    let mut body = response.into_body().into_reader();
    let mut buffer = vec![0; 256 << 10];
    loop {
        let n = match body.read(&mut buffer) {
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(Failure::Passing(format!("{}: the connection broke ({e})", file.path), None)),
        };
        if n == 0 {
            break;
        }
        if n as u64 > size - part.len {
            return Err(Failure::Final(anyhow!("{}: the server sends more than the {size} bytes listed", file.path)));
        }
        part.append(&buffer[..n]).map_err(Failure::Final)?;
        event(Event::Bytes(part.len));
    }
    if part.len < size {
        let missing = size - part.len;
        return Err(Failure::Passing(format!("{}: the connection ended {missing} bytes early", file.path), None));
    }
    Ok(())
}

/// Takes `file` from where Hugging Face's own tools keep it (`$HF_HOME/hub`), where it is there and whole.
pub fn from_cache(blob: &Path, sha256: &str, part: &Path, target: &Path) -> Result<bool> {
    if !blob.is_file() || (std::fs::hard_link(blob, part).is_err() && std::fs::copy(blob, part).is_err()) {
        return Ok(false);
    }
    if Part::open(part)?.sha256() != sha256 {
        std::fs::remove_file(part).ok();
        return Ok(false);
    }
    std::fs::rename(part, target).with_context(|| target.display().to_string())?;
    Ok(true)
}
