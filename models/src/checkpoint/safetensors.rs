//! safetensors files, read in place.
//!
//! The header is parsed here rather than by the crate of the same name, which refuses a whole file for one unknown
//! type, lets the last of two tensors of one name win, sets no bound on what a header makes it allocate, and does not
//! say which sizes it expected.

use super::stream::TensorStream;
use super::{Bytes, MAX_TENSORS, RawTensor, Tensor, TensorInfo, index_by_name, map};
use crate::{Error, Result};
use rushlight_quant::formats::Format;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// Longest header: the limit of the reference implementation.
const MAX_HEADER: u64 = 100_000_000;
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 8;
/// Most entries of free-form metadata. Real files have a handful.
const MAX_METADATA: usize = 65_536;

/// One safetensors file: its tensors in place, in file order.
#[derive(Debug)]
pub struct Safetensors {
    /// The free-form strings under `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// The tensors of a known [`Format`].
    pub tensors: Vec<Tensor>,
    /// The tensors of other types.
    pub raw: Vec<RawTensor>,
}

/// Opens the file at `path`.
pub fn open(path: &Path) -> Result<Safetensors> {
    parse(map::map(path)?, path)
}

/// Reads a whole safetensors file from memory; `path` is for messages only.
pub fn parse(file: Bytes, path: &Path) -> Result<Safetensors> {
    let error = |what: String| Error::file(path, what);
    let length = file.first_chunk::<8>().map(|b| u64::from_le_bytes(*b)).unwrap_or(u64::MAX);
    let Some(start) = usize::try_from(length).ok().and_then(|n| n.checked_add(8)).filter(|&n| n <= file.len()) else {
        return Err(error(match map::mistaken_for(&file) {
            Some(what) => what.to_owned(),
            None => format!(
                "the header should end at byte {}, but the file has {}: it is truncated or not a safetensors file, \
                 download it again",
                length.saturating_add(8),
                file.len()
            ),
        }));
    };
    if length > MAX_HEADER {
        return Err(error(format!("the header has {length} bytes, more than the {MAX_HEADER} allowed")));
    }
    let text = &file[8..start];
    if text.first() != Some(&b'{') {
        return Err(error("the header does not begin with '{': not a safetensors file".to_owned()));
    }
    let mut header: Header =
        serde_json::from_slice(text).map_err(|e| error(format!("the header is corrupt ({e}): download it again")))?;
    if let Err(name) = index_by_name(&header.tensors, |t| &t.name) {
        return Err(error(format!("tensor '{name}' comes twice: the file is corrupt")));
    }
    header.tensors.sort_unstable_by(|a, b| (a.begin, a.end, &a.name).cmp(&(b.begin, b.end, &b.name)));
    check_layout(&header.tensors, start, file.len()).map_err(error)?;

    let known = header.tensors.iter().filter(|t| format(t.dtype).is_some()).count();
    let (mut tensors, mut raw) = (Vec::with_capacity(known), Vec::with_capacity(header.tensors.len() - known));
    for Described { name, dtype, shape, begin, end } in header.tensors {
        // Within the file, so within usize.
        let Some(data) = file.slice(start + begin as usize..start + end as usize) else {
            return Err(error(format!("tensor '{name}' lies outside the file")));
        };
        match format(dtype) {
            Some(format) => tensors.push(Tensor { info: TensorInfo { name, format, shape }, data }),
            None => raw.push(RawTensor { name, dtype: dtype.to_owned(), shape, data }),
        }
    }
    Ok(Safetensors { metadata: header.metadata, tensors, raw })
}

/// A tensor of a file to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// The file's name for the element type, such as `I32`.
    pub dtype: String,
    /// Row-major, outermost dimension first.
    pub shape: Vec<usize>,
}

impl Entry {
    /// Bytes of the tensor; `None` for a type that is not known, or a size that overflows.
    pub fn bytes(&self) -> Option<usize> {
        let bits = self.shape.iter().try_fold(usize::from(bits(&self.dtype)?), |n, &dim| n.checked_mul(dim))?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

/// Writes a safetensors file as a stream: first the header, then each tensor's bytes in turn. The file appears under its
/// name only when it is whole; a writer dropped before that leaves nothing.
#[derive(Debug)]
pub struct Writer {
    stream: TensorStream,
}

impl Writer {
    /// Begins the file `path`, marked as readable by PyTorch, with `tensors`, whose bytes follow in the same order.
    pub fn create(path: &Path, tensors: &[Entry]) -> Result<Writer> {
        let error = |what: String| Error::file(path, format!("cannot be written: {what}"));
        if let Err(name) = index_by_name(tensors, |t| &t.name) {
            return Err(error(format!("tensor '{name}' comes twice")));
        }
        let (mut sizes, mut at) = (Vec::with_capacity(tensors.len()), 0usize);
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
        for tensor in tensors {
            let Entry { name, dtype, shape } = tensor;
            let fits = name != "__metadata__" && shape.len() <= MAX_DIMS;
            let bytes = tensor.bytes().filter(|_| fits);
            let Some((bytes, end)) = bytes.and_then(|bytes| Some((bytes, at.checked_add(bytes)?))) else {
                return Err(error(format!("tensor '{name}' of {dtype} {shape:?} is none that safetensors can hold")));
            };
            let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [at, end]});
            header.insert(name.clone(), entry);
            sizes.push((name.clone(), bytes));
            at = end;
        }
        let mut text = serde_json::Value::Object(header).to_string();
        // So that the data begins at a multiple of 8.
        text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
        let mut start = (text.len() as u64).to_le_bytes().to_vec();
        start.extend(text.as_bytes());
        Ok(Writer { stream: TensorStream::create(path, &start, sizes, 1)? })
    }

    /// Writes the next bytes of tensor `name`: all of them, or as many at a time as suits. Tensors come in the order
    /// given at the start, each to its end.
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<()> {
        self.stream.write(name, data)
    }

    /// Gives the file its name. Every tensor must have been written.
    pub fn finish(self) -> Result<()> {
        self.stream.finish()
    }
}

/// The format that `dtype` is; `None` where it is no format for weights.
fn format(dtype: &str) -> Option<Format> {
    match dtype {
        "F32" => Some(Format::F32),
        "F16" => Some(Format::F16),
        "BF16" => Some(Format::BF16),
        _ => None,
    }
}

/// Checks that the tensors, sorted by offset, follow one another from the start of the data at `start` to the end of
/// the file, each as long as its type and shape say.
fn check_layout(tensors: &[Described], start: usize, len: usize) -> Result<(), String> {
    let mut expected = 0;
    for (i, t) in tensors.iter().enumerate() {
        let Described { name, dtype, shape, begin, end } = t;
        if end < begin {
            return Err(format!("tensor '{name}' ends at {end}, before it begins at {begin}: the file is corrupt"));
        }
        if *begin < expected {
            let before = &tensors[i.saturating_sub(1)].name;
            return Err(format!("tensors '{before}' and '{name}' overlap: the file is corrupt"));
        }
        if *begin > expected {
            return Err(format!("bytes {expected} to {begin}, before tensor '{name}', belong to no tensor"));
        }
        let elements = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        let Some(elements) = elements.filter(|&n| n <= isize::MAX as usize / 8) else {
            return Err(format!("tensor '{name}' has the impossible shape {shape:?}"));
        };
        // A type that we do not know may have any size.
        if bits(dtype).is_some_and(|bits| elements as u128 * u128::from(bits) != u128::from(end - begin) * 8) {
            return Err(format!(
                "tensor '{name}' has {} bytes, which does not fit {dtype} {shape:?}: the file is corrupt",
                end - begin
            ));
        }
        expected = *end;
    }
    match (start as u64).checked_add(expected) {
        Some(whole) if whole == len as u64 => Ok(()),
        whole => Err(format!(
            "{} bytes expected, the file has {len}: it is truncated or corrupt, download it again",
            whole.unwrap_or(u64::MAX)
        )),
    }
}

/// Bits of one element of type `dtype`; `None` for one we do not know.
fn bits(dtype: &str) -> Option<u8> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// A tensor as the header describes it. Offsets are bytes from the start of the data.
struct Described<'a> {
    name: String,
    dtype: &'a str,
    shape: Vec<usize>,
    begin: u64,
    end: u64,
}

#[derive(Default)]
struct Header<'a> {
    metadata: BTreeMap<String, String>,
    tensors: Vec<Described<'a>>,
}

impl<'de> Deserialize<'de> for Header<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header<'de>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header<'de>, A::Error> {
                #[derive(serde::Deserialize)]
                struct Entry<'a> {
                    dtype: &'a str,
                    shape: Dims,
                    data_offsets: (u64, u64),
                }
                let mut header = Header::default();
                let mut has_metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if has_metadata {
                            return Err(A::Error::custom("__metadata__ comes twice"));
                        }
                        has_metadata = true;
                        header.metadata = map.next_value::<Strings>()?.0;
                        continue;
                    }
                    if header.tensors.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    let Entry { dtype, shape, data_offsets: (begin, end) } = map.next_value()?;
                    header.tensors.push(Described { name, dtype, shape: shape.0, begin, end });
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// A shape of a bounded number of dimensions.
struct Dims(Vec<usize>);

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Shape;
        impl<'de> Visitor<'de> for Shape {
            type Value = Dims;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "at most {MAX_DIMS} dimensions")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Dims, A::Error> {
                let (mut dims, mut count) = ([0; MAX_DIMS], 0);
                while let Some(dim) = seq.next_element()? {
                    if count == MAX_DIMS {
                        return Err(A::Error::invalid_length(count + 1, &self));
                    }
                    dims[count] = dim;
                    count += 1;
                }
                Ok(Dims(dims[..count].to_vec()))
            }
        }
        deserializer.deserialize_seq(Shape)
    }
}

/// A bounded map of strings, each key once.
struct Strings(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Strings;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strings, A::Error> {
                let mut strings = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if strings.len() == MAX_METADATA {
                        return Err(A::Error::custom(format!("more than {MAX_METADATA} strings")));
                    }
                    if strings.contains_key(&key) {
                        return Err(A::Error::custom(format!("'{key}' comes twice")));
                    }
                    strings.insert(key, value);
                }
                Ok(Strings(strings))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
