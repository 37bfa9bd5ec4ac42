use crate::checkpoint::{Array, Bytes, Value, ValueType};
use crate::{Error, Result};
use std::path::Path;

/// Longest metadata key, tensor name: what the format allows.
const MAX_NAME: usize = 65_535;

/// A place in a GGUF file's header. Every read is checked against the end of the file.
pub(super) struct Cursor<'a> {
    pub file: &'a Bytes,
    pub path: &'a Path,
    pub at: usize,
}

impl<'a> Cursor<'a> {
    /// An error about this file.
    pub fn error(&self, what: impl Into<String>) -> Error {
        Error::file(self.path, what)
    }

    /// Bytes not yet read.
    pub fn remaining(&self) -> usize {
        self.file.len() - self.at
    }

    /// The next `size` bytes, which hold `what`.
    fn take(&mut self, size: u64, what: &str) -> Result<Bytes> {
        let end = usize::try_from(size).ok().and_then(|size| self.at.checked_add(size));
        let slice = end.and_then(|end| Some((end, self.file.slice(self.at..end)?)));
        let Some((end, slice)) = slice else {
            return Err(self.error(format!(
                "the file ends inside {what}: {size} bytes expected at byte {}, but the file has {} bytes; \
                 it is truncated or corrupt, download it again",
                self.at,
                self.file.len()
            )));
        };
        self.at = end;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let bytes = self.take(N as u64, what)?;
        let mut array = [0; N];
        array.copy_from_slice(&bytes);
        Ok(array)
    }

    pub fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A string behind its u64 length.
    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        let bytes = self.take(len, what)?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(self.error(format!("{what} is not UTF-8: the file is corrupt, download it again"))),
        }
    }

    /// A metadata key or tensor name.
    pub fn name(&mut self, what: &str) -> Result<String> {
        let name = self.string(what)?;
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(self.error(format!("{what} has {} bytes, but 1 to {MAX_NAME} are allowed", name.len())));
        }
        Ok(name)
    }

    /// The metadata type that follows; `what` says of which entry.
    pub fn value_type(&mut self, what: &str) -> Result<ValueType> {
        let n = self.u32(what)?;
        ValueType::from_number(n).ok_or_else(|| {
            self.error(format!("{what} has the unknown type {n}: the file is corrupt, download it again"))
        })
    }

    /// The value, of type `kind`, that follows; `what` says of which entry.
    pub fn value(&mut self, what: &str, kind: ValueType) -> Result<Value> {
        use ValueType::*;
        Ok(match kind {
            U8 => Value::Unsigned(u8::from_le_bytes(self.array(what)?).into()),
            U16 => Value::Unsigned(u16::from_le_bytes(self.array(what)?).into()),
            U32 => Value::Unsigned(u32::from_le_bytes(self.array(what)?).into()),
            U64 => Value::Unsigned(u64::from_le_bytes(self.array(what)?)),
            I8 => Value::Signed(i8::from_le_bytes(self.array(what)?).into()),
            I16 => Value::Signed(i16::from_le_bytes(self.array(what)?).into()),
            I32 => Value::Signed(i32::from_le_bytes(self.array(what)?).into()),
            I64 => Value::Signed(i64::from_le_bytes(self.array(what)?)),
            F32 => Value::Float(f32::from_le_bytes(self.array(what)?).into()),
            F64 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            Bool => Value::Bool(self.array::<1>(what)? != [0]),
            String => Value::String(self.string(what)?),
            Array => Value::Array(self.elements(what)?),
        })
    }

    /// An array, left where it is.
    fn elements(&mut self, what: &str) -> Result<Array> {
        let kind = self.value_type(what)?;
        if kind == ValueType::Array {
            return Err(self.error(format!("{what} is an array of arrays, which GGUF models do not use")));
        }
        let count = self.u64(what)?;
        let start = self.at;
        // The least that `count` elements take, so that a lie about the count is found before anything is walked.
        let least = count.saturating_mul(kind.size().unwrap_or(8) as u64);
        let mut data = self.take(least, what)?;
        if kind == ValueType::String {
            self.at = start;
            // Vocabularies have hundreds of thousands of strings: they are walked as one slice.
            let file: &[u8] = self.file;
            for _ in 0..count {
                let text = file[self.at..]
                    .split_first_chunk::<8>()
                    .and_then(|(len, rest)| rest.get(..usize::try_from(u64::from_le_bytes(*len)).ok()?));
                let Some(text) = text else {
                    // Says what is missing.
                    let len = self.u64(what)?;
                    self.take(len, what)?;
                    return Err(self.error(format!("{what} is corrupt")));
                };
                if std::str::from_utf8(text).is_err() {
                    return Err(self.error(format!("{what} holds a string that is not UTF-8")));
                }
                self.at += 8 + text.len();
            }
            data = self.file.slice(start..self.at).unwrap_or(data);
        }
        // Fits in usize: that many elements are in the file.
        Ok(Array { kind, count: count as usize, data })
    }
}
