use crate::{Error, Result};
use std::ffi::OsStr;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A file written beside its target and renamed when whole. Dropped before [`AtomicFile::commit`], it leaves nothing; what
/// a killed program has left of one goes when the next of the same name begins.
#[derive(Debug)]
pub struct AtomicFile {
    target: PathBuf,
    partial: PathBuf,
    out: Option<BufWriter<File>>,
}

impl AtomicFile {
    /// Begins a file that will be called `target`.
    pub fn create(target: &Path) -> Result<AtomicFile> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let Some(name) = target.file_name().filter(|_| !target.is_dir()) else {
            return Err(Error::file(target, "cannot be written: it is a directory, name a file"));
        };
        let mut start = std::ffi::OsString::from(".");
        start.push(name);
        start.push(".");
        sweep(target, &start);
        loop {
            let mut partial = start.clone();
            partial.push(format!("{}-{}.partial", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
            let partial = target.with_file_name(partial);
            let file =
                OpenOptions::new().write(true).create_new(true).open(&partial).map_err(|e| Error::io(target, e))?;
            // The lock says that this one is at work. Where another program came first, it is sweeping: it took this for
            // a file that was left.
            if !matches!(file.try_lock(), Err(TryLockError::WouldBlock)) && partial.exists() {
                let out = Some(BufWriter::with_capacity(1 << 18, file));
                return Ok(AtomicFile { target: target.to_owned(), partial, out });
            }
        }
    }

    /// The name that the file will have.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Gives the whole file its name, once the disk holds it.
    pub fn commit(mut self) -> Result<()> {
        self.try_commit().map_err(|e| Error::io(&self.target, e))
    }

    fn try_commit(&mut self) -> io::Result<()> {
        if let Some(mut out) = self.out.take() {
            let whole = out.flush().and_then(|()| out.get_ref().sync_all());
            // Taken apart rather than dropped: dropping would try once more to write what could not be written.
            drop(out.into_parts());
            whole.and_then(|()| std::fs::rename(&self.partial, &self.target)).inspect_err(|_| {
                let _ = std::fs::remove_file(&self.partial);
            })?;
        }
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.out.as_mut().map_or(Err(io::ErrorKind::BrokenPipe.into()), |out| out.write(data))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.as_mut().map_or(Ok(()), |out| out.flush())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(out) = self.out.take() {
            drop(out.into_parts());
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

/// Removes the partial files of `target`, which begin with `start`, that no program is at work on.
fn sweep(target: &Path, start: &OsStr) {
    let dir = target.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let rest = name.as_encoded_bytes().strip_prefix(start.as_encoded_bytes());
        let Some(number) = rest.and_then(|rest| rest.strip_suffix(b".partial")) else { continue };
        if number.is_empty() || !number.iter().all(|b| b.is_ascii_digit() || *b == b'-') {
            continue;
        }
        let path = entry.path();
        if OpenOptions::new().write(true).open(&path).is_ok_and(|file| file.try_lock().is_ok()) {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_goes_and_what_is_at_work_stays() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m.gguf");
        for left in [".m.gguf.123-0.partial", ".m.gguf.x.partial", ".n.gguf.123-0.partial"] {
            std::fs::write(dir.path().join(left), "left").unwrap();
        }
        let mut first = AtomicFile::create(&target).unwrap();
        let mut second = AtomicFile::create(&target).unwrap();
        first.write_all(b"first").unwrap();
        second.write_all(b"second").unwrap();
        second.commit().unwrap();
        first.commit().unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"first");
        drop(AtomicFile::create(&target).unwrap());
        let mut names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [".m.gguf.x.partial", ".n.gguf.123-0.partial", "m.gguf"]);
    }
}
