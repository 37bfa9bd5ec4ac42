use super::Bytes;
use crate::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::path::Path;

/// The contents of the regular file at `path`, mapped. An empty file is an error.
pub fn map(path: &Path) -> Result<Bytes> {
    // Before opening: to open a pipe would wait for its other end.
    let about = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !about.is_file() {
        return Err(Error::file(path, "not a regular file"));
    }
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    if file.metadata().map_err(|e| Error::io(path, e))?.len() == 0 {
        return Err(Error::file(path, "the file is empty: download it again"));
    }
    // SAFETY: the map is read-only and private, and lives as long as `Bytes` refer to it. What cannot be ruled out is
    // that another program changes or cuts the file meanwhile; every reader of mapped files lives with that. Bytes are
    // only ever read as integers and floats, for which every bit pattern is valid; text is checked when read.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
    // What is read from the disk from now on lies in large pages, where the file system has them: weights that are read
    // faster than pages of 4 KiB are looked up. Whether the advice is taken changes nothing else.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(Bytes::mapped(map))
}

/// What a file that begins with `start` probably is, where it is something often found in place of a model.
pub(super) fn mistaken_for(start: &[u8]) -> Option<&'static str> {
    let known: [(&[u8], &str); 8] = [
        (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run 'git lfs pull' or download it"),
        (b"<", "a web page, not a model: the download failed; download it again"),
        (b"PK\x03\x04", "a zip or PyTorch archive: use the GGUF or safetensors version of the model"),
        (b"\x80\x02", "a pickled PyTorch file: use the GGUF or safetensors version of the model"),
        (b"lmgg", "a GGML file of before GGUF: use the GGUF version of the model"),
        (b"fmgg", "a GGML file of before GGUF: use the GGUF version of the model"),
        (b"tjgg", "a GGML file of before GGUF: use the GGUF version of the model"),
        (b"algg", "a GGML adapter of before GGUF: use the GGUF version of it"),
    ];
    known.iter().find(|(magic, _)| start.starts_with(magic)).map(|&(_, what)| what)
}
