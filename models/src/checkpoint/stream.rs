use super::AtomicFile;
use crate::{Error, Result};
use std::io::Write;
use std::path::Path;

/// The tensors of a file being written, one after another behind a header. The file appears under its name only when it
/// is whole; dropped before that, it leaves nothing.
#[derive(Debug)]
pub(super) struct TensorStream {
    out: AtomicFile,
    /// Names and sizes in bytes.
    tensors: Vec<(String, usize)>,
    /// The tensor being written, and how many of its bytes are.
    current: usize,
    written: usize,
    /// Each tensor is followed by zeros up to a multiple of this many bytes; at most 32.
    alignment: usize,
}

impl TensorStream {
    /// Begins the file `path` with `header`.
    pub fn create(path: &Path, header: &[u8], tensors: Vec<(String, usize)>, alignment: usize) -> Result<TensorStream> {
        let mut stream = TensorStream { out: AtomicFile::create(path)?, tensors, current: 0, written: 0, alignment };
        stream.put(header)?;
        stream.skip_written()?;
        Ok(stream)
    }

    /// Writes the next bytes of tensor `name`.
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<()> {
        let (expected, size) = match self.tensors.get(self.current) {
            Some((expected, size)) => (expected.as_str(), *size),
            None => ("no further tensor", 0),
        };
        if expected != name {
            return Err(Error::file(self.out.target(), format!("tensor '{name}' was written, {expected} was due")));
        }
        if data.len() > size - self.written {
            return Err(Error::file(self.out.target(), format!("tensor '{name}' has more than its {size} bytes")));
        }
        self.put(data)?;
        self.written += data.len();
        self.skip_written()
    }

    /// Gives the file its name. Every tensor must have been written.
    pub fn finish(self) -> Result<()> {
        match self.tensors.get(self.current) {
            Some((name, _)) => Err(Error::file(self.out.target(), format!("tensor '{name}' was not written whole"))),
            None => self.out.commit(),
        }
    }

    /// Goes on to the next tensor when the current one is whole.
    fn skip_written(&mut self) -> Result<()> {
        while self.tensors.get(self.current).is_some_and(|(_, size)| *size == self.written) {
            let padding = self.written.next_multiple_of(self.alignment) - self.written;
            self.put(&[0; 32][..padding])?;
            self.current += 1;
            self.written = 0;
        }
        Ok(())
    }

    fn put(&mut self, data: &[u8]) -> Result<()> {
        self.out.write_all(data).map_err(|e| Error::io(self.out.target(), e))
    }
}
