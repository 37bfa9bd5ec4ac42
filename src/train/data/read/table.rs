use super::{Bounded, Each, LONGEST, Record};
use anyhow::{Result, bail};
use csv::{ByteRecord, ReaderBuilder};
use serde_json::{Map, Value};
use std::cell::Cell;
use std::io::{self, BufRead, Read};
use std::rc::Rc;

/// A table whose first row names the columns. Where the `delimiter` is not known it is the one that the first row has
/// most of. Fields of tab-separated tables are taken as they stand; others may be quoted.
pub fn read(mut reader: impl BufRead, delimiter: Option<u8>, each: Each) -> Result<()> {
    // Excel may say so in a line of its own, `sep=;`.
    let said = reader.fill_buf()?.strip_prefix(b"sep=").and_then(|rest| {
        let end = if rest.get(1) == Some(&b'\r') { b"\r\n".as_slice() } else { b"\n" };
        rest.get(1..)?.starts_with(end).then_some((rest[0], 5 + end.len()))
    });
    let (delimiter, above) = match (delimiter, said) {
        (None, Some((delimiter, bytes))) => {
            reader.consume(bytes);
            (delimiter, 1)
        }
        (Some(delimiter), _) => (delimiter, 0),
        (None, None) => (guess(reader.fill_buf()?), 0),
    };
    let left = Rc::new(Cell::new(LONGEST));
    let end = Rc::new(Cell::new(None));
    let mut table =
        ReaderBuilder::new().delimiter(delimiter).quoting(delimiter != b'\t').flexible(true).from_reader(Bounded {
            inner: Lines { inner: reader, held: false, last: b'\n', before: b'\n', end: end.clone() },
            left: left.clone(),
        });
    let Ok(header) =
        table.byte_headers()?.iter().map(|h| std::str::from_utf8(h).map(|h| h.trim().to_owned())).collect()
    else {
        bail!("the first row is not UTF-8: save the table as UTF-8");
    };
    let header: Vec<String> = header;
    let mut row = ByteRecord::new();
    loop {
        left.set(LONGEST);
        if !table.read_byte_record(&mut row)? {
            return Ok(());
        }
        // The record's own position may lie before empty lines. Behind it, its line breaks and its end are counted.
        let below = row.as_slice().iter().filter(|b| **b == b'\n').count() as u64;
        let line = (above + table.position().line()).saturating_sub(1 + below);
        // What ends with the file's own line break, and without a quote before it, was never closed.
        if row.as_slice().ends_with(b"\n") && end.get().is_some_and(|byte| byte != b'"') {
            each(line + 1, Err(format!("a quote that opens here is never closed: it takes all of {below} lines")))?;
            continue;
        }
        each(line, fields(&header, &row, below))?;
    }
}

fn guess(begin: &[u8]) -> u8 {
    let (mut counts, mut quoted) = ([0usize; 4], false);
    for &byte in begin {
        match byte {
            b'"' => quoted = !quoted,
            b'\n' if !quoted => break,
            _ if quoted => {}
            _ => DELIMITERS.iter().zip(&mut counts).filter(|(d, _)| **d == byte).for_each(|(_, n)| *n += 1),
        }
    }
    let most = (0..4).rev().max_by_key(|&k| counts[k]).unwrap_or_default();
    DELIMITERS[most]
}

/// The first of those that a header has equally many of.
const DELIMITERS: [u8; 4] = *b",;\t|";

/// A text whose lines end with a line feed alone, the last one, too.
struct Lines<R> {
    inner: R,
    /// A carriage return came, and what follows it decides whether it stays.
    held: bool,
    /// The last byte, and the last that ends no line.
    last: u8,
    before: u8,
    /// The latter, once the text has ended.
    end: Rc<Cell<Option<u8>>>,
}

impl<R: BufRead> Read for Lines<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.len() < 2 {
            return Err(io::Error::other("a buffer of one byte"));
        }
        let mut n = 0;
        while n == 0 {
            let from = self.inner.fill_buf()?;
            if from.is_empty() {
                self.end.set(Some(self.before));
                if self.last == b'\n' {
                    return Ok(0);
                }
                (out[0], self.last) = (b'\n', b'\n');
                return Ok(1);
            }
            let mut used = 0;
            for &byte in from {
                if n + 2 > out.len() {
                    break;
                }
                used += 1;
                if std::mem::replace(&mut self.held, byte == b'\r') && byte != b'\n' {
                    (out[n], n) = (b'\r', n + 1);
                }
                if byte != b'\r' {
                    (out[n], n) = (byte, n + 1);
                }
                self.last = byte;
                if !matches!(byte, b'\r' | b'\n') {
                    self.before = byte;
                }
            }
            self.inner.consume(used);
        }
        Ok(n)
    }
}

/// The fields of `row`, which has `below` line breaks in it.
fn fields(header: &[String], row: &ByteRecord, below: u64) -> Result<Record, String> {
    if row.len() != header.len() && below > 0 {
        return Err(format!(
            "{} fields, where the first row has {}: a quote that opens here closes {below} lines further down",
            row.len(),
            header.len()
        ));
    }
    if row.len() != header.len() {
        return Err(format!("{} fields, where the first row has {}", row.len(), header.len()));
    }
    let mut map = Map::new();
    for (name, field) in header.iter().zip(row) {
        let text = std::str::from_utf8(field).map_err(|_| "not UTF-8: save the table as UTF-8")?;
        map.insert(name.clone(), Value::from(text));
    }
    Ok(Record::Fields(map))
}
