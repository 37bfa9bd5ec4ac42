//! Models split over several GGUF files, `name-00001-of-00003.gguf` and so on.

use super::{Gguf, map, parse};
use crate::checkpoint::{MAX_TENSORS, Metadata};
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Adds to `first`, read from `path`, the tensors of the other parts where it begins a split set.
pub(super) fn gather(path: &Path, first: &mut Gguf) -> Result<()> {
    let Gguf { metadata, tensors } = first;
    let count = metadata.u64("split.count").unwrap_or(1);
    if count <= 1 {
        return Ok(());
    }
    let total = metadata.u64("split.tensors.count");
    let number = part_number(metadata, path)?;
    let Some(stem) = stem(path, number, count) else {
        return Err(Error::file(
            path,
            format!(
                "part {} of {count} of a split model, but the name does not end in -{:05}-of-{count:05}.gguf, so the \
                 other parts cannot be found: give the files their own names back",
                number + 1,
                number + 1
            ),
        ));
    };
    if number != 0 {
        let first = part_path(path, &stem, 0, count);
        return Err(Error::file(
            path,
            format!("part {} of {count} of a split model: open the first, {}", number + 1, first.display()),
        ));
    }
    for i in 1..count {
        let part_path = part_path(path, &stem, i, count);
        if !part_path.exists() {
            return Err(Error::file(
                path,
                format!("part {} of {count} is missing: put {} beside it", i + 1, part_path.display()),
            ));
        }
        let part = parse(map::map(&part_path)?, &part_path)?;
        let claims = (part_number(&part.metadata, &part_path)?, part.metadata.u64("split.count"));
        if claims != (i, Some(count)) {
            return Err(Error::file(
                &part_path,
                format!("its metadata do not say that it is part {} of {count}: download it again", i + 1),
            ));
        }
        tensors.extend(part.tensors);
        if tensors.len() > MAX_TENSORS {
            return Err(Error::file(path, format!("the parts hold more than the {MAX_TENSORS} tensors allowed")));
        }
    }
    match total {
        Some(total) if total != tensors.len() as u64 => Err(Error::file(
            path,
            format!("the {count} parts hold {} tensors of {total}: download them again", tensors.len()),
        )),
        _ => Ok(()),
    }
}

/// Which part, from 0, the metadata claim to be of.
fn part_number(metadata: &Metadata, path: &Path) -> Result<u64> {
    // The format keeps it in 16 bits.
    metadata
        .u64("split.no")
        .filter(|&n| n <= u64::from(u16::MAX))
        .ok_or_else(|| Error::file(path, "belongs to a split model, but its metadata do not say which part (split.no)"))
}

/// The part of the file's name before `-00001-of-00003.gguf`.
fn stem(path: &Path, number: u64, count: u64) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    Some(name.strip_suffix(&suffix(number, count))?.to_owned())
}

fn part_path(path: &Path, stem: &str, number: u64, count: u64) -> PathBuf {
    path.with_file_name(format!("{stem}{}", suffix(number, count)))
}

fn suffix(number: u64, count: u64) -> String {
    format!("-{:05}-of-{count:05}.gguf", number + 1)
}
