use super::{Each, Record};
use anyhow::{Result, bail};
use std::io::{BufRead, Read};

/// Bytes of a part, about: enough for its borders not to matter, few enough to set some aside for validation.
const PART: usize = 64 << 10;

/// A text of any length as one document, in parts that end with a line or, in a text without lines, with a word.
pub fn read(mut reader: impl BufRead, each: Each) -> Result<()> {
    let (mut bytes, mut number) = (Vec::new(), 0);
    loop {
        (&mut reader).take(PART as u64).read_to_end(&mut bytes)?;
        let last = reader.fill_buf()?.is_empty();
        let valid = match std::str::from_utf8(&bytes) {
            Ok(text) => text.len(),
            Err(e) if e.error_len().is_none() && !last => e.valid_up_to(),
            Err(_) => bail!("part {} is not UTF-8: save the text as UTF-8", number + 1),
        };
        let text = String::from_utf8_lossy(&bytes[..valid]);
        let end = |what: char| text.rfind(what).map(|at| at + 1).filter(|&end| end > valid / 2);
        let cut = if last { valid } else { end('\n').or_else(|| end(' ')).unwrap_or(valid) };
        // What is blank is kept for the next part.
        if last || !text[..cut].trim().is_empty() {
            number += 1;
            each(number, Ok(Record::Part { text: text[..cut].to_owned(), first: number == 1, last }))?;
            bytes.drain(..cut);
        }
        if last {
            return Ok(());
        }
    }
}
