use super::{Bounded, Each, LONGEST, Record};
use anyhow::{Result, bail};
use csv::{ByteRecord, ReaderBuilder};
use serde_json::{Map, Value};
use std::io::BufRead;
use std::rc::Rc;

/// A table whose first row names the columns. Where the `delimiter` is not known it is the one that the first row has
/// most of. Fields of tab-separated tables are taken as they stand; others may be quoted.
pub fn read(mut reader: impl BufRead, delimiter: Option<u8>, each: Each) -> Result<()> {
    let delimiter = match delimiter {
        Some(delimiter) => delimiter,
        None => guess(reader.fill_buf()?),
    };
    let left = Rc::new(std::cell::Cell::new(LONGEST));
    let mut table = ReaderBuilder::new()
        .delimiter(delimiter)
        .quoting(delimiter != b'\t')
        .flexible(true)
        .from_reader(Bounded { inner: reader, left: left.clone() });
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
        let line = row.position().map_or(0, |p| p.line());
        each(line, fields(&header, &row))?;
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

fn fields(header: &[String], row: &ByteRecord) -> Result<Record, String> {
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
