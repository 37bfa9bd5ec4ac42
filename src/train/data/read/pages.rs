//! The pages of a Parquet file, looked through before they are read: the reader makes room for as much as a page's header
//! asks for, and a dictionary's entries are made before there is one.

use super::guarded;
use crate::cli::size;
use anyhow::{Context, Result, anyhow, bail, ensure};
use parquet::basic::Compression;
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

/// Most bytes of a page, and of one that is a dictionary. Writers aim at one million for both.
const PAGE: u64 = 256 << 20;
const DICTIONARY: u64 = 64 << 20;
/// Deepest nesting in a header.
const DEPTH: usize = 8;

/// Refuses a file with a page that would take absurdly much memory.
pub fn check(file: &File, about: &ParquetMetaData) -> Result<()> {
    let size = file.metadata()?.len();
    let mut reader = BufReader::new(file.try_clone()?);
    for (group, rows) in about.row_groups().iter().enumerate() {
        for column in rows.columns() {
            let what = || format!("row group {group}, column {}", column.column_path());
            walk(&mut reader, column, size).with_context(what)?;
        }
    }
    Ok(())
}

fn walk(reader: &mut BufReader<File>, column: &ColumnChunkMetaData, size_of_file: u64) -> Result<()> {
    let (mut at, length) = guarded(|| column.byte_range())?;
    let end = at.checked_add(length).filter(|&end| end <= size_of_file).context("damaged: it ends behind the file")?;
    while at < end {
        reader.seek(SeekFrom::Start(at))?;
        let (header, length) = header(reader.take(end - at)).context("damaged: a page's header")?;
        let begin = at + length;
        let unpacked = header.unpacked;
        let most = if header.dictionary.is_some() { DICTIONARY } else { PAGE };
        ensure!(
            unpacked <= most,
            "one of its pages would take {}, and {} is the most that is read of one",
            size(unpacked),
            size(most)
        );
        // An entry takes a byte at least.
        let entries = header.dictionary.unwrap_or(0);
        ensure!(entries <= unpacked, "damaged: a dictionary of {entries} entries in {unpacked} bytes");
        at = begin
            .checked_add(header.packed)
            .filter(|&at| at <= end)
            .context("damaged: a page ends behind its column")?;
        if matches!(column.compression(), Compression::GZIP(_)) {
            reader.seek(SeekFrom::Start(begin))?;
            let stream = flate2::read::MultiGzDecoder::new(reader.take(header.packed));
            ensure!(
                count(stream, unpacked) <= unpacked,
                "damaged: a page unpacks to more than the {unpacked} bytes that it should have"
            );
        }
    }
    Ok(())
}

/// How many bytes `reader` has, as far as one more than `most`. What breaks on the way is found again by who reads it.
fn count(mut reader: impl Read, most: u64) -> u64 {
    let (mut buffer, mut all) = (vec![0; 1 << 16], 0);
    while all <= most {
        match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => all += n as u64,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    all
}

/// What the header of a page says.
#[derive(Default)]
struct Header {
    unpacked: u64,
    packed: u64,
    /// Entries, of a dictionary.
    dictionary: Option<u64>,
}

/// The header at the beginning of `reader`, and its length: a struct in Thrift's compact protocol.
fn header(reader: impl Read) -> Result<(Header, u64)> {
    let mut thrift = Thrift { reader, read: 0 };
    let mut header = Header::default();
    let size = |n: i64| u64::try_from(n).map_err(|_| anyhow!("a negative size"));
    let mut field = 0;
    while let Some(kind) = thrift.field(&mut field)? {
        match (field, kind) {
            (2, INT) => header.unpacked = size(thrift.int()?)?,
            (3, INT) => header.packed = size(thrift.int()?)?,
            (7, STRUCT) => {
                let (mut inner, mut entries) = (0, 0);
                while let Some(kind) = thrift.field(&mut inner)? {
                    match (inner, kind) {
                        (1, INT) => entries = size(thrift.int()?)?,
                        (_, kind) => thrift.skip(kind, 0)?,
                    }
                }
                header.dictionary = Some(entries);
            }
            (_, kind) => thrift.skip(kind, 0)?,
        }
    }
    Ok((header, thrift.read))
}

/// Kinds of values in the compact protocol.
const INT: u8 = 5;
const STRUCT: u8 = 12;

struct Thrift<R> {
    reader: R,
    read: u64,
}

impl<R: Read> Thrift<R> {
    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        self.reader.read_exact(&mut byte)?;
        self.read += 1;
        Ok(byte[0])
    }

    fn unsigned(&mut self) -> Result<u64> {
        let mut all = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            all |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(all);
            }
        }
        bail!("a number of more than 64 bits")
    }

    fn int(&mut self) -> Result<i64> {
        let n = self.unsigned()?;
        Ok((n >> 1) as i64 ^ -((n & 1) as i64))
    }

    /// The kind of the next field, whose number `field` becomes; `None` at the end of the struct.
    fn field(&mut self, field: &mut i64) -> Result<Option<u8>> {
        let byte = self.byte()?;
        if byte == 0 {
            return Ok(None);
        }
        *field = match byte >> 4 {
            0 => self.int()?,
            by => field.saturating_add(i64::from(by)),
        };
        Ok(Some(byte & 15))
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Result<()> {
        ensure!(depth < DEPTH, "nested too deep");
        match kind {
            1 | 2 => {}
            3 => self.byte().map(drop)?,
            4..=6 => self.unsigned().map(drop)?,
            7 => (0..8).try_for_each(|_| self.byte().map(drop))?,
            8 => {
                let len = self.unsigned()?;
                let skipped = io::copy(&mut (&mut self.reader).take(len), &mut io::sink())?;
                ensure!(skipped == len, "it ends too early");
                self.read += len;
            }
            9 | 10 => {
                let about = self.byte()?;
                let len = if about >> 4 == 15 { self.unsigned()? } else { u64::from(about >> 4) };
                let of = about & 15;
                // Each takes a byte, even of the kinds that as fields take none.
                for _ in 0..len {
                    if of <= 2 { self.byte().map(drop)? } else { self.skip(of, depth + 1)? }
                }
            }
            STRUCT => {
                let mut field = 0;
                while let Some(kind) = self.field(&mut field)? {
                    self.skip(kind, depth + 1)?;
                }
            }
            // Maps are in no page's header.
            _ => bail!("a value of kind {kind}"),
        }
        Ok(())
    }
}
