//! Importance matrices, as llama.cpp's `llama-imatrix` writes them: for each matrix of a model, how strongly each of
//! its columns is used. In both of their forms: GGUF, and the older `.dat`.

use super::{Array, AtomicFile, Bytes, MAX_TENSORS, Metadata, TensorInfo, Value, gguf, map};
use crate::{Error, Result};
use rushlight_quant::formats::Format;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// Longest name of a tensor or a text that is read.
const MAX_NAME: usize = 4096;

/// The importance of a model's columns.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    /// By the GGUF name of the matrix, such as `blk.0.ffn_down.weight`.
    pub entries: BTreeMap<String, Entry>,
    /// The texts that it was computed from, by name.
    pub datasets: Vec<String>,
    /// How many chunks of text were run.
    pub chunks: u32,
    /// Tokens in a chunk; 0 where the file does not say.
    pub chunk_size: u32,
}

/// What one matrix has seen, or a stack of matrices such as a layer's experts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entry {
    /// For each column, the sum of the squares of its inputs; matrix after matrix. Finite and not negative.
    pub sums: Vec<f32>,
    /// For each matrix, how many inputs it has seen. `sums.len()` is a multiple of its length, which is not 0.
    pub counts: Vec<u64>,
}

impl Entry {
    /// The mean square of each column's inputs; 1 throughout a matrix that has seen none.
    pub fn importance(&self) -> Vec<f32> {
        let cols = self.sums.len() / self.counts.len().max(1);
        let mean = self.sums.chunks(cols.max(1)).zip(&self.counts);
        mean.flat_map(|(sums, &count)| sums.iter().map(move |&s| if count == 0 { 1.0 } else { s / count as f32 }))
            .collect()
    }
}

impl Imatrix {
    /// Reads the file at `path`, in either form.
    pub fn read(path: &Path) -> Result<Imatrix> {
        Imatrix::parse(map(path)?, path)
    }

    /// Reads either form from memory; `path` is for messages only.
    pub fn parse(file: Bytes, path: &Path) -> Result<Imatrix> {
        let imatrix = match file.starts_with(b"GGUF") {
            true => parse_gguf(file, path)?,
            false => parse_dat(&file, path)?,
        };
        for (name, entry) in &imatrix.entries {
            if let Some(i) = entry.sums.iter().position(|s| !s.is_finite() || *s < 0.0) {
                let what = format!("'{name}' has {} for column {i}: the importance matrix is damaged", entry.sums[i]);
                return Err(Error::file(path, what));
            }
        }
        Ok(imatrix)
    }

    /// What [`Entry::importance`] says of the matrix `name`; `None` where there is no entry.
    pub fn importance(&self, name: &str) -> Option<Vec<f32>> {
        self.entries.get(name).map(Entry::importance)
    }

    /// Writes the file `path`: as GGUF where its name ends so, otherwise in the older form.
    pub fn write(&self, path: &Path) -> Result<()> {
        if path.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("gguf")) {
            return self.write_gguf(path);
        }
        let mut out = AtomicFile::create(path)?;
        out.write_all(&self.dat()).map_err(|e| Error::io(path, e))?;
        out.commit()
    }

    fn write_gguf(&self, path: &Path) -> Result<()> {
        let metadata = Metadata(BTreeMap::from([
            ("general.type".into(), Value::String("imatrix".into())),
            ("imatrix.datasets".into(), Value::Array(Array::of_strings(&self.datasets))),
            ("imatrix.chunk_count".into(), Value::Unsigned(self.chunks.into())),
            ("imatrix.chunk_size".into(), Value::Unsigned(self.chunk_size.into())),
        ]));
        let tensor = |name: String, shape: [usize; 2]| TensorInfo { name, format: Format::F32, shape: shape.to_vec() };
        let infos = self.entries.iter().flat_map(|(name, entry)| {
            let matrices = entry.counts.len();
            let cols = entry.sums.len() / matrices.max(1);
            [tensor(format!("{name}.counts"), [matrices, 1]), tensor(format!("{name}.in_sum2"), [matrices, cols])]
        });
        let mut writer = gguf::Writer::create(path, &metadata, &infos.collect::<Vec<_>>())?;
        for (name, entry) in &self.entries {
            let counts: Vec<u8> = entry.counts.iter().flat_map(|&n| (n as f32).to_le_bytes()).collect();
            writer.write(&format!("{name}.counts"), &counts)?;
            let sums: Vec<u8> = entry.sums.iter().flat_map(|s| s.to_le_bytes()).collect();
            writer.write(&format!("{name}.in_sum2"), &sums)?;
        }
        writer.finish()
    }

    /// The older form. It has one count for each entry, of chunks: the sums are scaled to it.
    fn dat(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let int = |out: &mut Vec<u8>, n: u64| out.extend((n.min(i32::MAX as u64) as i32).to_le_bytes());
        int(&mut out, self.entries.len() as u64);
        for (name, entry) in &self.entries {
            int(&mut out, name.len() as u64);
            out.extend(name.as_bytes());
            let most = entry.counts.iter().copied().max().unwrap_or(0);
            let calls = most.div_ceil(u64::from(self.chunk_size.max(1))).clamp(1, i32::MAX as u64);
            int(&mut out, calls);
            int(&mut out, entry.sums.len() as u64);
            out.extend(entry.importance().iter().flat_map(|mean| (mean * calls as f32).to_le_bytes()));
        }
        int(&mut out, self.chunks.into());
        let dataset = self.datasets.first().map_or("", String::as_str);
        int(&mut out, dataset.len() as u64);
        out.extend(dataset.as_bytes());
        out
    }
}

fn parse_gguf(file: Bytes, path: &Path) -> Result<Imatrix> {
    let file = gguf::parse(file, path)?;
    let metadata = &file.metadata;
    let number = |key: &str| metadata.u64(key).and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    let datasets = metadata.array("imatrix.datasets").into_iter().flat_map(|a| a.strings().map(String::from));
    let mut imatrix = Imatrix {
        entries: BTreeMap::new(),
        datasets: datasets.collect(),
        chunks: number("imatrix.chunk_count"),
        chunk_size: number("imatrix.chunk_size"),
    };
    let mut counts = BTreeMap::new();
    for tensor in &file.tensors {
        let name = &tensor.info.name;
        let sums_of = name.strip_suffix(".in_sum2");
        let Some(of) = sums_of.or_else(|| name.strip_suffix(".counts")) else { continue };
        if tensor.info.format != Format::F32 {
            return Err(Error::file(
                path,
                format!("'{name}' is {}, not F32: not an importance matrix", tensor.info.format),
            ));
        }
        let values = tensor.data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        match sums_of {
            Some(of) => {
                imatrix.entries.insert(of.to_owned(), Entry { sums: values.collect(), counts: Vec::new() });
            }
            None => {
                counts.insert(of, values.collect::<Vec<f32>>());
            }
        }
    }
    if imatrix.entries.is_empty() {
        return Err(Error::file(path, "not an importance matrix: no tensor is called NAME.in_sum2"));
    }
    for (name, entry) in &mut imatrix.entries {
        let counts = counts.remove(name.as_str()).unwrap_or_default();
        if counts.is_empty() || !entry.sums.len().is_multiple_of(counts.len()) {
            let (sums, counts) = (entry.sums.len(), counts.len());
            return Err(Error::file(path, format!("'{name}' has {sums} sums and {counts} counts, which do not fit")));
        }
        if let Some(bad) = counts.iter().find(|n| !n.is_finite() || **n < 0.0) {
            return Err(Error::file(path, format!("'{name}' has the count {bad}: the importance matrix is damaged")));
        }
        entry.counts = counts.into_iter().map(|n| n.round() as u64).collect();
    }
    Ok(imatrix)
}

/// Reads along a `.dat` file.
struct Reader<'a> {
    rest: &'a [u8],
    path: &'a Path,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or_else(|| {
            let what =
                "neither GGUF nor a whole importance matrix of the older form: it is truncated or something else";
            Error::file(self.path, what)
        })?;
        self.rest = rest;
        Ok(taken)
    }

    /// A number that is not negative.
    fn int(&mut self, what: &str) -> Result<usize> {
        let bytes = self.take(4)?;
        let n = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        usize::try_from(n).map_err(|_| Error::file(self.path, format!("not an importance matrix: {what} is {n}")))
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let len = self.int(what)?;
        let text = self.take(len)?;
        match std::str::from_utf8(text) {
            Ok(text) if len <= MAX_NAME && !text.contains(char::is_control) => Ok(text.to_owned()),
            _ => Err(Error::file(self.path, format!("not an importance matrix: {what} is not a plain text"))),
        }
    }
}

fn parse_dat(file: &[u8], path: &Path) -> Result<Imatrix> {
    let mut reader = Reader { rest: file, path };
    let count = reader.int("the number of entries")?;
    if count == 0 || count > MAX_TENSORS {
        return Err(Error::file(
            path,
            format!("not an importance matrix: {count} entries (1 to {MAX_TENSORS} can be)"),
        ));
    }
    let mut imatrix = Imatrix::default();
    for _ in 0..count {
        let name = reader.text("the name of an entry")?;
        let calls = reader.int("the count of an entry")? as u64;
        let len = reader.int("the length of an entry")?;
        if len == 0 {
            return Err(Error::file(path, format!("'{name}' has no values: the importance matrix is damaged")));
        }
        let data = reader.take(len.saturating_mul(4))?;
        let sums = data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if imatrix.entries.insert(name.clone(), Entry { sums, counts: vec![calls] }).is_some() {
            return Err(Error::file(path, format!("'{name}' comes twice: the importance matrix is damaged")));
        }
    }
    // The oldest files end here.
    if !reader.rest.is_empty() {
        imatrix.chunks = reader.int("the number of chunks")? as u32;
        if !reader.rest.is_empty() {
            let dataset = reader.text("the name of the text")?;
            imatrix.datasets.extend(Some(dataset).filter(|name| !name.is_empty()));
        }
    }
    Ok(imatrix)
}
