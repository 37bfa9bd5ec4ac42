use super::Bytes;
use std::collections::BTreeMap;

/// The type of a GGUF metadata value, with GGUF's own numbers.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    /// The type with GGUF's number `n`.
    pub fn from_number(n: u32) -> Option<ValueType> {
        use ValueType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64].into_iter().find(|&t| t as u32 == n)
    }

    /// Bytes of one value; `None` for strings and arrays, whose size varies.
    pub fn size(self) -> Option<usize> {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            String | Array => None,
        }
    }
}

/// A GGUF metadata value.
#[derive(Clone, Debug)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Either float.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A string.
    String(String),
    /// An array, left in the mapped file.
    Array(Array),
}

/// An array of scalars or strings in GGUF's little-endian encoding, decoded as it is read: a vocabulary of
/// hundreds of thousands of strings costs no memory until it is walked. Whoever makes one has checked that `data`
/// holds `count` elements and that strings are UTF-8.
#[derive(Clone, Debug)]
pub struct Array {
    /// Type of the elements; never `Array`.
    pub kind: ValueType,
    /// Number of elements.
    pub count: usize,
    /// The elements' encoding: scalars back to back, or strings each behind a u64 length.
    pub data: Bytes,
}

impl Array {
    /// An array of strings.
    pub fn of_strings<S: AsRef<str>>(items: impl IntoIterator<Item = S>) -> Array {
        let (mut data, mut count) = (Vec::new(), 0);
        for item in items {
            let text = item.as_ref();
            data.extend((text.len() as u64).to_le_bytes());
            data.extend(text.as_bytes());
            count += 1;
        }
        Array { kind: ValueType::String, count, data: Bytes::new(data) }
    }

    /// An array of 32-bit integers.
    pub fn of_i32(items: &[i32]) -> Array {
        let data: Vec<u8> = items.iter().flat_map(|i| i.to_le_bytes()).collect();
        Array { kind: ValueType::I32, count: items.len(), data: Bytes::new(data) }
    }

    /// An array of booleans.
    pub fn of_bool(items: impl IntoIterator<Item = bool>) -> Array {
        let data: Vec<u8> = items.into_iter().map(u8::from).collect();
        Array { kind: ValueType::Bool, count: data.len(), data: Bytes::new(data) }
    }

    /// An array of 32-bit floats.
    pub fn of_f32(items: &[f32]) -> Array {
        let data: Vec<u8> = items.iter().flat_map(|f| f.to_le_bytes()).collect();
        Array { kind: ValueType::F32, count: items.len(), data: Bytes::new(data) }
    }

    /// The strings; empty when the elements are not strings.
    pub fn strings(&self) -> impl Iterator<Item = &str> {
        let mut rest: &[u8] = if self.kind == ValueType::String { &self.data } else { &[] };
        std::iter::from_fn(move || {
            let (len, tail) = rest.split_first_chunk::<8>()?;
            let (text, tail) = tail.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
            rest = tail;
            std::str::from_utf8(text).ok()
        })
    }

    /// The integers or booleans as i64 (u64 above `i64::MAX` saturates); empty for floats and strings.
    pub fn ints(&self) -> impl Iterator<Item = i64> {
        use ValueType::*;
        let kind = self.kind;
        let size = match kind {
            F32 | F64 | String | Array => 0,
            _ => kind.size().unwrap_or(0),
        };
        let data: &[u8] = if size == 0 { &[] } else { &self.data };
        data.chunks_exact(size.max(1)).map(move |b| {
            let mut wide = [0u8; 8];
            wide[..b.len()].copy_from_slice(b);
            let u = u64::from_le_bytes(wide);
            match kind {
                I8 => i64::from(u as u8 as i8),
                I16 => i64::from(u as u16 as i16),
                I32 => i64::from(u as u32 as i32),
                I64 => u as i64,
                _ => i64::try_from(u).unwrap_or(i64::MAX),
            }
        })
    }

    /// The floats as f32; empty for other elements.
    pub fn floats(&self) -> Vec<f32> {
        match self.kind {
            ValueType::F32 => self.data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            ValueType::F64 => self.data.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
            _ => Vec::new(),
        }
    }
}

/// The metadata of a GGUF file: names and values.
#[derive(Clone, Debug, Default)]
pub struct Metadata(pub BTreeMap<String, Value>);

impl Metadata {
    /// The value called `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// The string called `key`; `None` when absent or of another type (so for all of these).
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// The non-negative integer called `key`.
    pub fn u64(&self, key: &str) -> Option<u64> {
        match *self.get(key)? {
            Value::Unsigned(u) => Some(u),
            Value::Signed(i) => u64::try_from(i).ok(),
            _ => None,
        }
    }

    /// The number called `key`.
    pub fn f32(&self, key: &str) -> Option<f32> {
        match *self.get(key)? {
            Value::Float(f) => Some(f as f32),
            Value::Unsigned(u) => Some(u as f32),
            Value::Signed(i) => Some(i as f32),
            _ => None,
        }
    }

    /// The boolean called `key`.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match *self.get(key)? {
            Value::Bool(b) => Some(b),
            _ => None,
        }
    }

    /// The array called `key`.
    pub fn array(&self, key: &str) -> Option<&Array> {
        match self.get(key)? {
            Value::Array(a) => Some(a),
            _ => None,
        }
    }
}
