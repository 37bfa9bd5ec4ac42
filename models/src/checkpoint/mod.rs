//! One view of a model on disk: a GGUF file (or split set), or a Hugging Face directory, mapped and used in place.
//!
//! Nothing that a file says of itself is believed before it is checked against the file; see `docs/file-formats.md`.

mod atomic;
mod awq;
mod bitsandbytes;
mod bytes;
pub mod export;
pub mod gguf;
mod gptq;
pub mod huggingface;
pub mod imatrix;
mod map;
mod metadata;
mod multimodal;
mod mxfp4;
mod prequantized;
pub mod pytorch;
pub mod safetensors;
mod stream;

pub use atomic::AtomicFile;
pub use bytes::Bytes;
pub use map::map;
pub use metadata::{Array, Metadata, Value, ValueType};

use crate::{Error, Result};
use prequantized::Layer;
use rushlight_quant::formats::Format;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most tensors that one file may hold: more than the largest published models have in all, and few enough that a list
/// of them stays small.
const MAX_TENSORS: usize = 100_000;

/// A tensor's name, format and shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, as the file spells it.
    pub name: String,
    /// How its weights are stored.
    pub format: Format,
    /// Row-major, outermost dimension first: `[rows, cols]`. GGUF's dimensions are reversed to this.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Bytes of the whole tensor; `None` where a row is not a whole number of blocks or the size overflows.
    pub fn bytes(&self) -> Option<usize> {
        let (cols, outer) = self.shape.split_last().unwrap_or((&1, &[]));
        outer.iter().try_fold(self.format.row_bytes(*cols)?, |bytes, &n| bytes.checked_mul(n))
    }

    /// Number of weights; `None` where it overflows.
    pub fn elements(&self) -> Option<usize> {
        self.shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim))
    }
}

/// A tensor in its file.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// What it is.
    pub info: TensorInfo,
    /// Its packed rows, in place in the mapped file where it has them so: exactly [`TensorInfo::bytes`] long, at any
    /// address.
    pub data: Bytes,
}

/// A tensor whose type is not one of [`Format`]'s, such as the packed integers of a GPTQ layer.
#[derive(Clone, Debug)]
pub struct RawTensor {
    /// Its name, as the file spells it.
    pub name: String,
    /// The file's own name for the element type, such as `I32`.
    pub dtype: String,
    /// Row-major, outermost dimension first.
    pub shape: Vec<usize>,
    /// Its elements, little-endian, in place in the mapped file.
    pub data: Bytes,
}

/// Where a checkpoint's description comes from.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A GGUF file, described by its metadata.
    Gguf(Metadata),
    /// A Hugging Face directory.
    HuggingFace {
        /// `config.json`: always an object.
        config: serde_json::Value,
        /// `generation_config.json`, where there is one: always an object.
        generation_config: Option<serde_json::Value>,
    },
}

/// A model's tensors and description, mapped from disk.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    kind: Kind,
    infos: Vec<TensorInfo>,
    /// Where the bytes of each of `infos` come from.
    data: Vec<Stored>,
    /// Indices into `infos`, ordered by name.
    by_name: Vec<u32>,
    raw: Vec<RawTensor>,
    notes: Vec<String>,
}

/// Where a tensor's packed rows come from.
#[derive(Debug)]
enum Stored {
    /// They lie in the file.
    Mapped(Bytes),
    /// They are packed, each time they are asked for, from what another tool has written.
    Packed(Box<Layer>),
}

impl Checkpoint {
    /// Opens a `.gguf` file (the first of a split set opens the set) or a Hugging Face directory.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let about = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if about.is_dir() {
            return huggingface::open(path);
        }
        match path.extension().and_then(|ext| ext.to_str()) {
            Some("safetensors" | "json") => {
                Err(Error::file(path, "a part of a Hugging Face model: name the directory that holds it"))
            }
            _ => gguf::open(path),
        }
    }

    /// Puts together what `files` hold, each in file order. Fails on a name that comes twice.
    fn new(path: &Path, kind: Kind, files: Vec<(Vec<Tensor>, Vec<RawTensor>)>) -> Result<Checkpoint> {
        let total = files.iter().map(|(tensors, _)| tensors.len()).sum();
        let (mut infos, mut data) = (Vec::with_capacity(total), Vec::with_capacity(total));
        let mut raw = Vec::with_capacity(files.iter().map(|(_, raw)| raw.len()).sum());
        for (tensors, more) in files {
            for tensor in tensors {
                infos.push(tensor.info);
                data.push(Stored::Mapped(tensor.data));
            }
            raw.extend(more);
        }
        let by_name = index_by_name(&infos, |t| &t.name)
            .map_err(|name| Error::file(path, format!("tensor '{name}' comes twice: the file is corrupt")))?;
        if let Err(name) = index_by_name(&raw, |t| &t.name) {
            return Err(Error::file(path, format!("tensor '{name}' comes twice: the file is corrupt")));
        }
        let checkpoint = Checkpoint { path: path.to_owned(), kind, infos, data, by_name, raw, notes: Vec::new() };
        match checkpoint.raw.iter().find(|t| checkpoint.find(&t.name).is_some()) {
            Some(t) => Err(Error::file(path, format!("tensor '{}' comes twice: the file is corrupt", t.name))),
            None => Ok(checkpoint),
        }
    }

    /// What a GGUF file of `tensors` looks like to those who only ask for names and shapes: it holds no bytes.
    pub(crate) fn described(path: &Path, tensors: &[TensorInfo]) -> Result<Checkpoint> {
        let tensors = tensors.iter().map(|info| Tensor { info: info.clone(), data: Bytes::new(Vec::new()) });
        Checkpoint::new(path, Kind::Gguf(Metadata::default()), vec![(tensors.collect(), Vec::new())])
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The checkpoint's description.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// The GGUF metadata; `None` for a Hugging Face directory.
    pub fn metadata(&self) -> Option<&Metadata> {
        match &self.kind {
            Kind::Gguf(metadata) => Some(metadata),
            Kind::HuggingFace { .. } => None,
        }
    }

    /// Fails on a GGUF file that says to be something beside a model (`general.type`).
    pub fn expect_model(&self) -> Result<()> {
        let what = match self.metadata().and_then(|metadata| metadata.str("general.type")) {
            Some("adapter") => {
                "an adapter, not a whole model: give the model that it was trained on, and this with --adapter"
            }
            Some("imatrix") => "an importance matrix, not a model: quantize takes it with --imatrix",
            Some("mmproj") => {
                "only the part of a model that turns pictures or sounds into its input: give the model itself"
            }
            _ => return Ok(()),
        };
        Err(Error::file(&self.path, what))
    }

    /// Every tensor of a known [`Format`], in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    /// The tensors of other types (safetensors only), in file order.
    pub fn raw_tensors(&self) -> &[RawTensor] {
        &self.raw
    }

    /// What is known of the tensor called `name`; `None` where there is none of a known [`Format`].
    pub fn find(&self, name: &str) -> Option<&TensorInfo> {
        self.position(name).map(|i| &self.infos[i])
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        if let Some(i) = self.position(name) {
            let data = match &self.data[i] {
                Stored::Mapped(data) => data.clone(),
                Stored::Packed(layer) => layer.pack().map_err(|what| Error::file(&self.path, what))?,
            };
            return Ok(Tensor { info: self.infos[i].clone(), data });
        }
        Err(Error::file(
            &self.path,
            match self.raw.iter().find(|t| t.name == name) {
                Some(t) => format!("tensor '{name}' is stored as {}; only F32, F16 and BF16 can be used here", t.dtype),
                None => format!("tensor '{name}' is missing: the file is incomplete, or of another architecture"),
            },
        ))
    }

    /// The order in which the columns of the tensor called `name` are stored, where it is not their own: column `i` of
    /// its rows is input `order[i]` of the layer. GPTQ with act-order groups its columns in such an order. Tensors with
    /// equal orders share one.
    pub fn column_order(&self, name: &str) -> Option<Arc<[u32]>> {
        match &self.data[self.position(name)?] {
            Stored::Mapped(_) => None,
            Stored::Packed(layer) => layer.order.clone(),
        }
    }

    /// Whether the tensor called `name` is packed anew from what another tool has quantized (GPTQ, AWQ, bitsandbytes,
    /// MXFP4), a row for each output. Those tools multiply by floats: activations that meet it are rounded finely, but for
    /// MXFP4, which GGUF files hold as well.
    pub fn is_repacked(&self, name: &str) -> bool {
        self.position(name).is_some_and(|i| matches!(self.data[i], Stored::Packed(_)))
    }

    /// Gives back the memory that the mapped bytes of the tensor called `name` take, if any: see [`Bytes::release`].
    pub fn release(&self, name: &str) {
        if let Some(Stored::Mapped(data)) = self.position(name).map(|i| &self.data[i]) {
            data.release();
        }
    }

    /// What a person should know of how the files were read.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Bytes of all tensors together, as they are used.
    pub fn bytes(&self) -> u64 {
        let tensors = self.infos.iter().map(|t| t.bytes().unwrap_or(0) as u64).sum::<u64>();
        tensors + self.raw.iter().map(|t| t.data.len() as u64).sum::<u64>()
    }

    fn position(&self, name: &str) -> Option<usize> {
        let at = self.by_name.binary_search_by(|&i| self.infos[i as usize].name.as_str().cmp(name)).ok()?;
        Some(self.by_name[at] as usize)
    }
}

/// The indices of `items` ordered by name, or a name that comes twice.
fn index_by_name<T>(items: &[T], name: impl Fn(&T) -> &str) -> Result<Vec<u32>, String> {
    let mut order: Vec<u32> = (0..items.len() as u32).collect();
    order.sort_unstable_by_key(|&i| name(&items[i as usize]));
    match order.windows(2).find(|pair| name(&items[pair[0] as usize]) == name(&items[pair[1] as usize])) {
        Some(pair) => Err(name(&items[pair[0] as usize]).to_owned()),
        None => Ok(order),
    }
}
