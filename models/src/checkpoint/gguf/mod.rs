//! GGUF, versions 2 and 3, little-endian: read in place, and written.

mod cursor;
mod split;
mod types;
mod writer;

pub use types::{format, number};
pub use writer::{Writer, header_bytes};

use super::{Bytes, Checkpoint, Kind, MAX_TENSORS, Metadata, Tensor, TensorInfo, ValueType, map};
use crate::{Error, Result};
use cursor::Cursor;
use std::path::Path;

/// Most metadata entries that a file may have. Real files have dozens.
const MAX_METADATA: u64 = 65_536;
/// Most dimensions of a tensor.
const MAX_DIMS: u32 = 4;
/// Where tensor data is aligned to unless the metadata says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
/// The largest alignment that is believed.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// One GGUF file: its metadata, and its tensors in place.
#[derive(Debug)]
pub struct Gguf {
    /// Names and values.
    pub metadata: Metadata,
    /// The tensors, in the order of their descriptions.
    pub tensors: Vec<Tensor>,
}

/// Opens the file at `path`, and with the first of a split set the others.
pub(super) fn open(path: &Path) -> Result<Checkpoint> {
    let mut file = parse(map::map(path)?, path)?;
    split::gather(path, &mut file)?;
    Checkpoint::new(path, Kind::Gguf(file.metadata), vec![(file.tensors, Vec::new())])
}

/// The metadata of the file at `path`. Its tensors are not looked at: they may be missing (a vocabulary alone), or of
/// types that are not supported.
pub fn read_metadata(path: &Path) -> Result<Metadata> {
    let file = map::map(path)?;
    let mut cursor = Cursor { file: &file, path, at: 0 };
    let header = read_header(&mut cursor)?;
    Ok(read_metadata_entries(&mut cursor, header.metadata)?.0)
}

/// Reads a whole GGUF file from memory; `path` is for messages only.
pub fn parse(file: Bytes, path: &Path) -> Result<Gguf> {
    let mut cursor = Cursor { file: &file, path, at: 0 };
    let header = read_header(&mut cursor)?;
    let (metadata, alignment) = read_metadata_entries(&mut cursor, header.metadata)?;
    // A description takes at least 33 bytes: lengths, one letter of name, one dimension, type and offset.
    let count = usize::try_from(header.tensors).ok().filter(|&n| n <= cursor.remaining() / 33 && n <= MAX_TENSORS);
    let Some(count) = count else {
        return Err(cursor.error(format!(
            "the header claims {} tensors, more than a file of {} bytes can hold: it is truncated or corrupt, \
             download it again",
            header.tensors,
            file.len()
        )));
    };
    let mut placed = Vec::with_capacity(count);
    for _ in 0..count {
        placed.push(read_tensor_info(&mut cursor, alignment)?);
    }
    let end_of_header = cursor.at as u64;
    let start = match placed.is_empty() {
        true => end_of_header,
        false => end_of_header.next_multiple_of(alignment),
    };
    let tensors = place(&file, path, start, placed)?;
    Ok(Gguf { metadata, tensors })
}

struct Header {
    tensors: u64,
    metadata: u64,
}

fn read_header(cursor: &mut Cursor) -> Result<Header> {
    if !cursor.file.starts_with(b"GGUF") {
        let what = map::mistaken_for(cursor.file).unwrap_or("not a GGUF file: it does not begin with 'GGUF'");
        return Err(cursor.error(what));
    }
    cursor.at = 4;
    let version = cursor.u32("the version")?;
    match version {
        2 | 3 => {}
        1 => return Err(cursor.error("GGUF version 1 is not supported: use a newer version of the model")),
        v if matches!(v.swap_bytes(), 1..=3) => {
            return Err(cursor.error("a big-endian GGUF file, which is not supported: use the little-endian one"));
        }
        v => return Err(cursor.error(format!("GGUF version {v} is not supported; versions 2 and 3 are"))),
    }
    let header =
        Header { tensors: cursor.u64("the number of tensors")?, metadata: cursor.u64("the number of entries")? };
    // An entry takes at least 14 bytes: length, one letter of key, type and one byte of value.
    if header.metadata > MAX_METADATA.min(cursor.remaining() as u64 / 14) {
        return Err(cursor.error(format!(
            "the header claims {} metadata entries, more than a file of {} bytes can hold: it is truncated or corrupt, \
             download it again",
            header.metadata,
            cursor.file.len()
        )));
    }
    Ok(header)
}

/// The metadata, and the alignment that it asks for.
fn read_metadata_entries(cursor: &mut Cursor, count: u64) -> Result<(Metadata, u64)> {
    let mut metadata = Metadata::default();
    let mut alignment = DEFAULT_ALIGNMENT;
    for _ in 0..count {
        let key = cursor.name("a metadata key")?;
        let what = format!("metadata '{key}'");
        let kind = cursor.value_type(&what)?;
        let value = cursor.value(&what, kind)?;
        let key_is_alignment = key == "general.alignment";
        if metadata.0.contains_key(&key) {
            return Err(cursor.error(format!("metadata '{key}' comes twice: the file is corrupt")));
        }
        metadata.0.insert(key, value);
        if key_is_alignment {
            let asked = metadata.u64("general.alignment").filter(|_| kind == ValueType::U32);
            alignment = match asked {
                Some(a) if a.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&a) => a,
                _ => {
                    let what = asked.map_or_else(|| format!("of type {kind:?}"), |a| a.to_string());
                    return Err(cursor.error(format!(
                        "general.alignment is {what}; it must be a 32-bit power of two from 8 to {MAX_ALIGNMENT}"
                    )));
                }
            };
        }
    }
    Ok((metadata, alignment))
}

/// A tensor's description and its offset from the start of the data.
fn read_tensor_info(cursor: &mut Cursor, alignment: u64) -> Result<(TensorInfo, u64)> {
    let name = cursor.name("a tensor's name")?;
    let what = format!("the description of tensor '{name}'");
    let dims = cursor.u32(&what)?;
    if dims == 0 || dims > MAX_DIMS {
        return Err(cursor.error(format!("tensor '{name}' has {dims} dimensions; 1 to {MAX_DIMS} are allowed")));
    }
    let mut shape = Vec::with_capacity(dims as usize);
    for _ in 0..dims {
        let dim = cursor.u64(&what)?;
        match usize::try_from(dim) {
            Ok(dim) if dim > 0 => shape.push(dim),
            _ => return Err(cursor.error(format!("tensor '{name}' has a dimension of {dim}"))),
        }
    }
    shape.reverse();
    let kind = cursor.u32(&what)?;
    let offset = cursor.u64(&what)?;
    let Some(format) = format(kind) else {
        let kind_name = types::foreign_name(kind);
        return Err(cursor.error(format!(
            "tensor '{name}' has the type {kind_name} (number {kind}), which is not supported; use another \
             quantization of the model, such as Q4_K_M or Q8_0"
        )));
    };
    if !offset.is_multiple_of(alignment) {
        return Err(cursor.error(format!("tensor '{name}' is at offset {offset}, not a multiple of {alignment}")));
    }
    let info = TensorInfo { name, format, shape };
    if format.row_bytes(info.shape[info.shape.len() - 1]).is_none() && !format.is_float() {
        return Err(cursor.error(format!(
            "tensor '{}' has shape {:?}, whose rows are not whole blocks of {} weights of {format}",
            info.name,
            info.shape,
            format.block_len()
        )));
    }
    // The elements too: whoever decodes the tensor multiplies the shape out.
    if info.bytes().is_none() || info.elements().is_none_or(|n| n > isize::MAX as usize) {
        return Err(cursor.error(format!("tensor '{}' has the impossible shape {:?}", info.name, info.shape)));
    }
    Ok((info, offset))
}

/// Finds each tensor's bytes in the file, whose data begin at `start`.
fn place(file: &Bytes, path: &Path, start: u64, placed: Vec<(TensorInfo, u64)>) -> Result<Vec<Tensor>> {
    let mut ranges: Vec<(u64, u64, u32)> = Vec::with_capacity(placed.len());
    let mut expected = start;
    let mut beyond = None;
    for (i, (info, offset)) in placed.iter().enumerate() {
        let size = info.bytes().unwrap_or(usize::MAX) as u64;
        let begin = start.checked_add(*offset);
        let Some((begin, end)) = begin.and_then(|begin| Some((begin, begin.checked_add(size)?))) else {
            return Err(Error::file(path, format!("tensor '{}' has the impossible offset {offset}", info.name)));
        };
        if end > file.len() as u64 && beyond.is_none() {
            beyond = Some(&info.name);
        }
        expected = expected.max(end);
        ranges.push((begin, end, i as u32));
    }
    if let Some(name) = beyond {
        return Err(Error::file(
            path,
            format!(
                "tensor '{name}' ends beyond the end of the file: {expected} bytes expected, the file has {}; \
                 it is truncated or corrupt, download it again",
                file.len()
            ),
        ));
    }
    let mut ordered = ranges.clone();
    ordered.sort_unstable();
    for pair in ordered.windows(2) {
        if pair[1].0 < pair[0].1 {
            let (a, b) = (&placed[pair[0].2 as usize].0.name, &placed[pair[1].2 as usize].0.name);
            return Err(Error::file(path, format!("tensors '{a}' and '{b}' overlap: the file is corrupt")));
        }
    }
    let mut tensors = Vec::with_capacity(placed.len());
    for ((info, _), (begin, end, _)) in placed.into_iter().zip(ranges) {
        // Within the file, so within usize.
        let Some(data) = file.slice(begin as usize..end as usize) else {
            return Err(Error::file(path, format!("tensor '{}' lies outside the file", info.name)));
        };
        tensors.push(Tensor { info, data });
    }
    if let Err(name) = super::index_by_name(&tensors, |t| &t.info.name) {
        return Err(Error::file(path, format!("tensor '{name}' comes twice: the file is corrupt")));
    }
    Ok(tensors)
}
