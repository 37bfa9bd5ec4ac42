use crate::{Error, Result};
use std::ffi::OsStr;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A file written beside its target and renamed when whole. Dropped before [`AtomicFile::commit`], it leaves nothing; what
/// a killed program has left of one goes when the next of its kind begins there.
#[derive(Debug)]
pub struct AtomicFile {
    target: PathBuf,
    partial: PathBuf,
    out: Option<BufWriter<File>>,
}

impl AtomicFile {
    /// Begins a file that will be called `target`.
    pub fn create(target: &Path) -> Result<AtomicFile> {
        if target.file_name().is_none() || target.is_dir() {
            return Err(Error::file(target, "cannot be written: it is a directory, name a file"));
        }
        let create = |path: &Path| OpenOptions::new().write(true).create_new(true).open(path).map(Some);
        let (partial, file) = begin(target, create)?;
        Ok(AtomicFile {
            target: target.to_owned(),
            partial,
            out: file.map(|file| BufWriter::with_capacity(1 << 18, file)),
        })
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
            // Taken apart rather than dropped: dropping would try once more to write what could not be written. The file, and
            // with it the lock, is held until it has its name.
            let (_file, _) = out.into_parts();
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

/// Creates what will be called `target` under the name that it has until it is whole, locked to say that it is at work,
/// and removes what killed programs have left of such names there. `create` may have nothing to lock.
pub(super) fn begin(
    target: &Path,
    create: impl Fn(&Path) -> io::Result<Option<File>>,
) -> Result<(PathBuf, Option<File>)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    sweep(target);
    loop {
        let mut name = std::ffi::OsString::from(".");
        name.push(target.file_name().unwrap_or_default());
        name.push(format!(".{}-{}.partial", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let partial = target.with_file_name(name);
        let file = create(&partial).map_err(|e| Error::io(target, e))?;
        // Where another program locked it first, it is sweeping: it took this for something that was left.
        let taken = file.as_ref().is_some_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)));
        if !taken && partial.exists() {
            return Ok((partial, file));
        }
    }
}

/// Removes partial files and directories beside `target`, of its name or of others with its extension, that no program is
/// at work on.
fn sweep(target: &Path) {
    let dir = target.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if whole_name(&name).is_none_or(|whole| Path::new(whole).extension() != target.extension()) {
            continue;
        }
        let (path, folder) = (entry.path(), entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let file = if folder { File::open(&path) } else { OpenOptions::new().write(true).open(&path) };
        // Locked until it is gone: one who has just made it, and locks it only now, makes another.
        if let Ok(file) = file
            && file.try_lock().is_ok()
        {
            let _ = if folder { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            drop(file);
        }
    }
}

/// The name that what is called `partial` was to have, if [`begin`] called it so: `.NAME.PROCESS-COUNT.partial`.
fn whole_name(partial: &OsStr) -> Option<&str> {
    let (name, number) = partial.to_str()?.strip_prefix('.')?.strip_suffix(".partial")?.rsplit_once('.')?;
    let (process, count) = number.split_once('-')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (!name.is_empty() && digits(process) && digits(count)).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_goes_and_what_is_at_work_stays() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m.gguf");
        let left = [".m.gguf.123-0.partial", ".n.gguf.45-10.partial", ".m.gguf.x.partial", ".m.txt.1-0.partial"];
        for left in left {
            std::fs::write(dir.path().join(left), "left").unwrap();
        }
        std::fs::create_dir_all(dir.path().join(".d.gguf.7-0.partial/inside")).unwrap();
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
        assert_eq!(names, [".m.gguf.x.partial", ".m.txt.1-0.partial", "m.gguf"]);
    }

    #[test]
    fn writers_in_one_folder_leave_each_other_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let dir = dir.path();
                scope.spawn(move || {
                    for i in 0..200 {
                        let target = dir.join(format!("{writer}-{i}.gguf"));
                        let mut file = AtomicFile::create(&target).unwrap();
                        file.write_all(b"whole").unwrap();
                        file.commit().unwrap();
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 800);
    }
}
