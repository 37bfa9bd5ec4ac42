use super::{DEFAULT_ALIGNMENT, MAX_DIMS, number};
use crate::checkpoint::stream::TensorStream;
use crate::checkpoint::{Metadata, TensorInfo, Value, ValueType, index_by_name};
use crate::{Error, Result};
use std::path::Path;

/// Longest tensor name that llama.cpp reads.
const MAX_TENSOR_NAME: usize = 63;

/// Writes a GGUF file as a stream: first everything that describes it, then each tensor's bytes in turn. The file
/// appears under its name only when it is whole; a writer dropped before that leaves nothing.
#[derive(Debug)]
pub struct Writer {
    stream: TensorStream,
}

impl Writer {
    /// Begins the file `path` with `metadata` and `tensors`, whose bytes follow in the same order.
    ///
    /// Integers are written in 32 bits where they fit, and floats in 32, which is what llama.cpp expects of every key
    /// that it reads; elements of arrays keep their type. An alignment in `metadata` gives way to the one used, 32.
    pub fn create(path: &Path, metadata: &Metadata, tensors: &[TensorInfo]) -> Result<Writer> {
        if let Err(name) = index_by_name(tensors, |t| &t.name) {
            return Err(Error::file(path, format!("cannot be written: tensor '{name}' comes twice")));
        }
        let (mut sizes, mut numbers) = (Vec::with_capacity(tensors.len()), Vec::with_capacity(tensors.len()));
        for tensor in tensors {
            let fits = tensor.name.len() <= MAX_TENSOR_NAME
                && tensor.shape.len() <= MAX_DIMS as usize
                && !tensor.shape.contains(&0);
            let Some(bytes) = tensor.bytes().filter(|_| fits) else {
                let TensorInfo { name, format, shape } = tensor;
                return Err(Error::file(path, format!("GGUF cannot hold tensor '{name}': {format} {shape:?}")));
            };
            let Some(number) = number(tensor.format) else {
                let TensorInfo { name, format, .. } = tensor;
                return Err(Error::file(
                    path,
                    format!("GGUF has no type for tensor '{name}', which is {format} in memory: convert it first"),
                ));
            };
            sizes.push((tensor.name.clone(), bytes));
            numbers.push(number);
        }
        let header = header(metadata, tensors, &numbers, &sizes);
        Ok(Writer { stream: TensorStream::create(path, &header, sizes, DEFAULT_ALIGNMENT as usize)? })
    }

    /// Writes the next bytes of tensor `name`: all of them, or as many rows at a time as suits. Tensors come in the
    /// order given at the start, each to its end.
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<()> {
        self.stream.write(name, data)
    }

    /// Gives the file its name. Every tensor must have been written.
    pub fn finish(self) -> Result<()> {
        self.stream.finish()
    }
}

fn header(metadata: &Metadata, tensors: &[TensorInfo], numbers: &[u32], sizes: &[(String, usize)]) -> Vec<u8> {
    let entries = || metadata.0.iter().filter(|(key, _)| *key != "general.alignment");
    let mut out = Vec::new();
    out.extend(b"GGUF");
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((entries().count() as u64).to_le_bytes());
    // By convention the architecture is told first.
    let (first, rest): (Vec<_>, Vec<_>) = entries().partition(|(key, _)| *key == "general.architecture");
    for (key, value) in first.into_iter().chain(rest) {
        put_string(&mut out, key);
        put_value(&mut out, value);
    }
    let mut offset = 0u64;
    for ((tensor, number), (_, bytes)) in tensors.iter().zip(numbers).zip(sizes) {
        put_string(&mut out, &tensor.name);
        // A scalar is written as one element: readers want a dimension.
        let shape: &[usize] = if tensor.shape.is_empty() { &[1] } else { &tensor.shape };
        out.extend((shape.len() as u32).to_le_bytes());
        for &dim in shape.iter().rev() {
            out.extend((dim as u64).to_le_bytes());
        }
        out.extend(number.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += (*bytes as u64).next_multiple_of(DEFAULT_ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
    out
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let mut put = |kind: ValueType, bytes: &[u8]| {
        out.extend((kind as u32).to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Value::Unsigned(u) => match u32::try_from(*u) {
            Ok(u) => put(ValueType::U32, &u.to_le_bytes()),
            Err(_) => put(ValueType::U64, &u.to_le_bytes()),
        },
        Value::Signed(i) => match i32::try_from(*i) {
            Ok(i) => put(ValueType::I32, &i.to_le_bytes()),
            Err(_) => put(ValueType::I64, &i.to_le_bytes()),
        },
        Value::Float(f) => put(ValueType::F32, &(*f as f32).to_le_bytes()),
        Value::Bool(b) => put(ValueType::Bool, &[u8::from(*b)]),
        Value::String(text) => {
            put(ValueType::String, &(text.len() as u64).to_le_bytes());
            out.extend(text.as_bytes());
        }
        Value::Array(array) => {
            put(ValueType::Array, &(array.kind as u32).to_le_bytes());
            out.extend((array.count as u64).to_le_bytes());
            out.extend_from_slice(&array.data);
        }
    }
}
