use crate::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A file written beside its target and renamed when whole. Dropped before [`AtomicFile::commit`], it leaves nothing.
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
        let mut partial = std::ffi::OsString::from(".");
        partial.push(name);
        partial.push(format!(".{}-{}.partial", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let partial = target.with_file_name(partial);
        let file = OpenOptions::new().write(true).create_new(true).open(&partial).map_err(|e| Error::io(target, e))?;
        let out = Some(BufWriter::with_capacity(1 << 18, file));
        Ok(AtomicFile { target: target.to_owned(), partial, out })
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
