//! PyTorch's own files (`pytorch_model.bin`), read without running anything: a zip archive that holds a pickle, which
//! describes tensors, and their storages, which are used in place.

mod pickle;

use super::{Bytes, MAX_TENSORS, RawTensor, Tensor, TensorInfo, index_by_name, map};
use crate::{Error, Result};
use pickle::Described;
use rushlight_quant::formats::Format;
use std::collections::HashMap;
use std::path::Path;

/// Longest pickle. Those of the largest models have a few megabytes.
const MAX_PICKLE: usize = 256 << 20;

/// One file: its tensors in place.
#[derive(Debug)]
pub struct Pytorch {
    /// The tensors of a known [`Format`].
    pub tensors: Vec<Tensor>,
    /// The tensors of other types.
    pub raw: Vec<RawTensor>,
}

/// Opens the file at `path`.
pub fn open(path: &Path) -> Result<Pytorch> {
    parse(map::map(path)?, path)
}

/// Reads a whole file from memory; `path` is for messages only.
pub fn parse(file: Bytes, path: &Path) -> Result<Pytorch> {
    let error = |what: String| Error::file(path, what);
    if file.starts_with(b"\x80\x02\x8a") {
        return Err(error(
            "a file of PyTorch before 1.6, which is not read; load it with a newer PyTorch and save it again, best as \
             safetensors"
                .into(),
        ));
    }
    if let Some(what) = map::mistaken_for(&file).filter(|_| !file.starts_with(b"PK")) {
        return Err(error(what.into()));
    }
    let entries =
        entries(&file).map_err(|what| error(format!("{what}: it is truncated or damaged, download it again")))?;
    let Some((pickle, folder)) = entries.iter().find_map(|(name, data)| Some((data, name.strip_suffix("data.pkl")?)))
    else {
        return Err(error("it holds no data.pkl: not a file of PyTorch's".into()));
    };
    if entries.get(&format!("{folder}byteorder")).is_some_and(|order| order.as_ref() == b"big") {
        return Err(error("its numbers are big-endian, which is not read".into()));
    }
    if pickle.len() > MAX_PICKLE {
        return Err(error(format!("its pickle has {} bytes, more than the {MAX_PICKLE} allowed", pickle.len())));
    }
    let described = pickle::read(pickle).map_err(error)?;
    if described.len() > MAX_TENSORS {
        return Err(error(format!("it holds {} tensors, more than the {MAX_TENSORS} allowed", described.len())));
    }
    if let Err(name) = index_by_name(&described, |(name, _)| name) {
        return Err(error(format!("tensor '{name}' comes twice: the file is corrupt")));
    }
    let (mut tensors, mut raw) = (Vec::new(), Vec::new());
    for (name, tensor) in described {
        let storage = entries.get(&format!("{folder}data/{}", tensor.storage));
        let data = storage.ok_or_else(|| "its storage is not in the file".to_owned());
        let data =
            data.and_then(|storage| place(&tensor, storage)).map_err(|e| error(format!("tensor '{name}': {e}")))?;
        let shape = tensor.shape;
        match element(&tensor.class) {
            Some((_, Some(format), _)) => tensors.push(Tensor { info: TensorInfo { name, format, shape }, data }),
            Some((dtype, None, _)) => raw.push(RawTensor { name, dtype: dtype.into(), shape, data }),
            None => return Err(error(format!("tensor '{name}' has elements of an unknown type, {}", tensor.class))),
        }
    }
    Ok(Pytorch { tensors, raw })
}

/// The elements of a class of storages: their name as safetensors has it, the format they are, and their size in bytes.
fn element(class: &str) -> Option<(&'static str, Option<Format>, usize)> {
    Some(match class {
        "FloatStorage" => ("F32", Some(Format::F32), 4),
        "HalfStorage" => ("F16", Some(Format::F16), 2),
        "BFloat16Storage" => ("BF16", Some(Format::BF16), 2),
        "DoubleStorage" => ("F64", None, 8),
        "LongStorage" => ("I64", None, 8),
        "IntStorage" => ("I32", None, 4),
        "ShortStorage" => ("I16", None, 2),
        "CharStorage" => ("I8", None, 1),
        "ByteStorage" => ("U8", None, 1),
        "BoolStorage" => ("BOOL", None, 1),
        _ => return None,
    })
}

/// Where in its storage a tensor lies, which must be in one piece and in order.
fn place(tensor: &Described, storage: &Bytes) -> Result<Bytes, String> {
    let (_, _, size) = element(&tensor.class).ok_or_else(|| format!("the type {} is unknown", tensor.class))?;
    if tensor.elements.checked_mul(size) != Some(storage.len()) {
        return Err(format!("its storage should hold {} elements but has {} bytes", tensor.elements, storage.len()));
    }
    let mut expected = 1usize;
    for (&n, &stride) in tensor.shape.iter().zip(&tensor.stride).rev() {
        if n != 1 && stride != expected {
            return Err("its elements do not lie one behind the other; save it again after .contiguous()".into());
        }
        expected = expected.checked_mul(n).ok_or("its shape is impossible")?;
    }
    let start = tensor.offset.checked_mul(size);
    let end = tensor.offset.checked_add(expected).and_then(|end| end.checked_mul(size));
    let range = start.zip(end).and_then(|(start, end)| storage.slice(start..end));
    range.ok_or_else(|| "it reaches beyond its storage".into())
}

/// The entries of a zip archive by name. They have to be stored as they are, which is how PyTorch stores them.
fn entries(file: &Bytes) -> Result<HashMap<String, Bytes>, String> {
    const END: usize = 22;
    // The directory's end is the last thing in the file but for a comment.
    let from = file.len().saturating_sub(END + 0xffff);
    let end = (from..=file.len().saturating_sub(END)).rev().find(|&at| file[at..].starts_with(b"PK\x05\x06"));
    let end = end.ok_or("it has no end of a zip directory")?;
    let (mut count, mut at) = (number(file, end + 10, 2)?, number(file, end + 16, 4)?);
    // Where a number does not fit, it is in the 64-bit form of the same, which a locator in front of it points to.
    if let Some(locator) = end.checked_sub(20).filter(|&at| file[at..].starts_with(b"PK\x06\x07")) {
        let end = usize::try_from(number(file, locator + 8, 8)?).map_err(|_| "its directory lies outside")?;
        if !file.get(end..).is_some_and(|rest| rest.starts_with(b"PK\x06\x06")) {
            return Err("its 64-bit directory end is missing".into());
        }
        (count, at) = (number(file, end + 32, 8)?, number(file, end + 48, 8)?);
    }
    if count > 2 * MAX_TENSORS as u64 {
        return Err(format!("it claims {count} entries"));
    }
    let mut entries = HashMap::new();
    let mut at = usize::try_from(at).map_err(|_| "its directory lies outside")?;
    for _ in 0..count {
        if !file.get(at..).is_some_and(|rest| rest.starts_with(b"PK\x01\x02")) {
            return Err("an entry of its directory is missing".into());
        }
        let (flags, method) = (number(file, at + 8, 2)?, number(file, at + 10, 2)?);
        let (mut packed, mut size) = (number(file, at + 20, 4)?, number(file, at + 24, 4)?);
        let name_len = number(file, at + 28, 2)? as usize;
        let (extra_len, comment_len) = (number(file, at + 30, 2)? as usize, number(file, at + 32, 2)? as usize);
        let mut offset = number(file, at + 42, 4)?;
        let name = file.get(at + 46..at + 46 + name_len).ok_or("a name is cut off")?;
        let name = String::from_utf8_lossy(name).into_owned();
        let (mut extra, extra_end) = (at + 46 + name_len, at + 46 + name_len + extra_len);
        while extra + 4 <= extra_end {
            let (id, len) = (number(file, extra, 2)?, number(file, extra + 2, 2)? as usize);
            let mut field = extra + 4;
            if id == 1 {
                for value in [&mut size, &mut packed, &mut offset].into_iter().filter(|v| **v == 0xffff_ffff) {
                    *value = number(file, field, 8)?;
                    field += 8;
                }
            }
            extra += 4 + len;
        }
        if method != 0 || packed != size || flags & 1 != 0 {
            return Err(format!("{name} is compressed or encrypted"));
        }
        // The entry's own header may have other extra fields than the directory's.
        let local = usize::try_from(offset).map_err(|_| "an entry lies outside")?;
        if !file.get(local..).is_some_and(|rest| rest.starts_with(b"PK\x03\x04")) {
            return Err(format!("the header of {name} is missing"));
        }
        let start = number(file, local + 26, 2)?
            .checked_add(number(file, local + 28, 2)?)
            .and_then(|n| n.checked_add(offset)?.checked_add(30));
        let range = start.and_then(|start| {
            let end = usize::try_from(start.checked_add(size)?).ok()?;
            file.slice(usize::try_from(start).ok()?..end)
        });
        entries.insert(name.clone(), range.ok_or_else(|| format!("{name} is cut off"))?);
        at = extra_end + comment_len;
    }
    Ok(entries)
}

/// The little-endian number of `bytes` bytes at `at`.
fn number(file: &[u8], at: usize, bytes: usize) -> Result<u64, String> {
    let part = at.checked_add(bytes).and_then(|end| file.get(at..end)).ok_or("it is cut off")?;
    let mut all = [0; 8];
    all[..bytes].copy_from_slice(part);
    Ok(u64::from_le_bytes(all))
}
