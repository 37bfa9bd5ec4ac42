//! File formats: each gives its records as JSON objects, or says which line is broken. Nothing holds more of a file than
//! a record.

mod json;
#[cfg(feature = "parquet")]
mod pages;
#[cfg(feature = "parquet")]
mod parquet;
mod sheet;
mod table;
mod text;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value};
use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::rc::Rc;

/// What a file holds one of.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// Fields by name.
    Fields(Map<String, Value>),
    /// A part of a plain text file, and whether it is the first and the last.
    Part { text: String, first: bool, last: bool },
}

/// Takes a record and its number in the file, or what is wrong with the one of that number. Its error ends the reading.
pub type Each<'a> = &'a mut dyn FnMut(u64, Result<Record, String>) -> Result<()>;

/// Most bytes of one record: beyond it, a file is not what its name says.
const LONGEST: u64 = 256 << 20;

/// How many bytes of a file have been read, about.
pub type Done = Rc<Cell<u64>>;

/// Gives `each` the records of the file `path` and returns what they are counted by. `done` tells how far it is.
pub fn read(path: &Path, done: &Done, each: Each) -> Result<&'static str> {
    let name = path.display();
    let file = File::open(path).with_context(|| name.to_string())?;
    if file.metadata().with_context(|| name.to_string())?.is_dir() {
        bail!("{name}: this is a directory; name a file of examples");
    }
    let mut reader = BufReader::with_capacity(1 << 16, Counted { file, done: done.clone() });
    let begin = reader.fill_buf().with_context(|| name.to_string())?;
    if begin.is_empty() {
        bail!("{name}: the file is empty");
    }
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_lowercase();
    if begin.starts_with(b"PK\x03\x04") {
        return sheet::read(path, done, each).map(|()| "row");
    }
    if begin.starts_with(b"PAR1") {
        #[cfg(feature = "parquet")]
        return parquet::read(path, done, each).map(|()| "record");
        #[cfg(not(feature = "parquet"))]
        bail!("{name}: this build reads no Parquet; build with the feature `parquet`, or save the data as JSONL");
    }
    for (mark, what) in [
        (&b"\x1F\x8B"[..], "compressed with gzip: unpack it first"),
        (b"\x28\xB5\x2F\xFD", "compressed with zstd: unpack it first"),
        (b"\xD0\xCF\x11\xE0", "a spreadsheet of the old kind: save it as .xlsx or .csv"),
        (b"\xFF\xFE", "UTF-16 text: save it as UTF-8"),
        (b"\xFE\xFF", "UTF-16 text: save it as UTF-8"),
        (b"GGUF", "a model: --data takes a file of examples"),
    ] {
        if begin.starts_with(mark) {
            bail!("{name}: this is {what}");
        }
    }
    if begin.starts_with(b"\xEF\xBB\xBF") {
        reader.consume(3);
    }
    let first = reader.fill_buf().with_context(|| name.to_string())?.trim_ascii_start().first().copied();
    let done = match (extension.as_str(), first) {
        ("csv", _) => table::read(reader, None, each).map(|()| "line"),
        ("tsv" | "tab", _) => table::read(reader, Some(b'\t'), each).map(|()| "line"),
        ("txt" | "text" | "raw" | "md", _) => text::read(reader, each).map(|()| "part"),
        ("jsonl" | "ndjson", Some(b'{')) => json::lines(reader, each).map(|()| "line"),
        (_, Some(b'{' | b'[')) => json::read(reader, each),
        ("json" | "jsonl" | "ndjson", _) => Err(anyhow!("this is no JSON: it begins with neither {{ nor [")),
        _ => Err(anyhow!("not a format of examples: those are .jsonl, .json, .csv, .tsv, .xlsx, .parquet and .txt")),
    };
    done.with_context(|| name.to_string())
}

/// A file that counts what is read of it.
struct Counted {
    file: File,
    done: Done,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.done.set(self.done.get() + n as u64);
        Ok(n)
    }
}

impl Seek for Counted {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// Runs a call of another's reader, which may panic where a file is damaged.
fn guarded<T>(call: impl FnOnce() -> T) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).map_err(|_| anyhow!("the file is damaged"))
}

/// A reader that gives up when too much is read between two calls of [`Bounded::reset`]: a stray quote would have
/// a whole file read as one field.
struct Bounded<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        let left = self.left.get().checked_sub(n as u64);
        self.left.set(left.ok_or_else(|| io::Error::other("a record of more than 256 MiB: is a quote open?"))?);
        Ok(n)
    }
}
