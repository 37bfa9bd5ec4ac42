//! Conversion: what a GGUF file of a checkpoint holds, whatever the checkpoint is. Nothing is written here, and weights
//! stay in the checkpoint until [`Converted::data`] asks for them, one tensor at a time.

mod from_gguf;
mod huggingface;

pub use from_gguf::{Directory, to_huggingface};
pub(crate) use huggingface::role_of;

use crate::checkpoint::{Bytes, Checkpoint, Kind, Metadata, Tensor, TensorInfo};
use crate::families::{self, Naming, Role};
use crate::{Error, Result};
use rushlight_quant::formats::Format;

/// The description of a GGUF file.
#[derive(Clone, Debug)]
pub struct Conversion {
    /// All but `general.file_type` and `general.quantization_version`, which whoever writes the file knows.
    pub metadata: Metadata,
    /// The tensors, in the order in which the file has them.
    pub tensors: Vec<Converted>,
    /// What a person should know of what could not be carried over, a sentence each.
    pub notes: Vec<String>,
}

/// A tensor of a [`Conversion`].
#[derive(Clone, Debug)]
pub struct Converted {
    /// Its name in GGUF.
    pub name: String,
    /// How [`Converted::data`] gives it: as the checkpoint stores it, but vectors in f32.
    pub format: Format,
    /// Row-major, outermost dimension first.
    pub shape: Vec<usize>,
    /// What it is in the model and in which layer, for a weight or a bias of a known family.
    pub role: Option<(Role, usize)>,
    /// Where its numbers come from.
    pub source: Source,
}

/// Where the numbers of a [`Converted`] come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A tensor of the checkpoint.
    Tensor {
        /// Its name there.
        name: String,
        /// Row `i` is row `rows[i]` of that tensor (a vector's rows are its elements). `None`: as they stand.
        rows: Option<Vec<u32>>,
        /// Added to each element of a vector: 1 for norms that are stored as `weight - 1`.
        offset: f32,
    },
    /// Weights of the model as it was loaded, one behind the other: what one form packs and the other does not.
    Parts {
        /// Their packed rows.
        parts: Vec<Bytes>,
        /// Row `i` is row `rows[i]`. `None`: as they stand.
        rows: Option<Vec<u32>>,
    },
    /// Computed here.
    Data(Bytes),
}

impl Converted {
    /// What GGUF says of the tensor.
    pub fn info(&self) -> TensorInfo {
        TensorInfo { name: self.name.clone(), format: self.format, shape: self.shape.clone() }
    }

    /// The packed rows in `self.format`, in the order in which GGUF has them: a window into the checkpoint's file where
    /// nothing has to be changed, a copy otherwise.
    pub fn data(&self, checkpoint: &Checkpoint) -> Result<Bytes> {
        let (name, rows, offset) = match &self.source {
            Source::Data(data) => return Ok(data.clone()),
            Source::Parts { parts, rows } => {
                let data = match &parts[..] {
                    [whole] => whole.passing(),
                    parts => {
                        let mut data = Vec::with_capacity(parts.iter().map(Bytes::len).sum());
                        parts.iter().for_each(|part| data.extend_from_slice(&part.passing()));
                        Bytes::new(data)
                    }
                };
                return Ok(in_order(data, self.shape.first().copied().unwrap_or(1), rows.as_deref()));
            }
            Source::Tensor { name, rows, offset } => (name, rows, *offset),
        };
        let Tensor { info, data } = checkpoint.tensor(name)?;
        let data = if info.format == self.format && offset == 0.0 {
            data
        } else {
            let values = families::floats(info.format, &data).ok_or_else(|| {
                Error::file(checkpoint.path(), format!("{name} is stored as {}, not in floating point", info.format))
            })?;
            Bytes::new(values.iter().flat_map(|v| (v + offset).to_le_bytes()).collect::<Vec<u8>>())
        };
        Ok(in_order(data, info.shape.first().copied().unwrap_or(1), rows.as_deref()))
    }
}

/// `data`, which has `count` rows, with row `i` being row `rows[i]`.
fn in_order(data: Bytes, count: usize, rows: Option<&[u32]>) -> Bytes {
    let Some(rows) = rows else { return data };
    let row_bytes = data.len() / count.max(1);
    let mut out = Vec::with_capacity(rows.len() * row_bytes);
    for &row in rows {
        out.extend_from_slice(&data[row as usize * row_bytes..][..row_bytes]);
    }
    Bytes::new(out)
}

/// What a GGUF file of `checkpoint` holds. A GGUF file gives what it has itself (a split set as one); a Hugging Face
/// directory gets metadata, tokenizer, chat template and tensor names as llama.cpp reads them for its family.
///
/// # Errors
/// When the family has no GGUF form, or something of the model or its tokenizer cannot be said in GGUF.
pub fn to_gguf(checkpoint: &Checkpoint) -> Result<Conversion> {
    match checkpoint.kind() {
        Kind::Gguf(metadata) => Ok(from_gguf(checkpoint, metadata)),
        Kind::HuggingFace { generation_config, .. } => huggingface::convert(checkpoint, generation_config.as_ref()),
    }
}

fn from_gguf(checkpoint: &Checkpoint, metadata: &Metadata) -> Conversion {
    let mut metadata = metadata.clone();
    metadata.0.retain(|key, _| {
        let of_the_file = ["general.alignment", "general.file_type", "general.quantization_version"];
        !key.starts_with("split.") && !of_the_file.contains(&key.as_str())
    });
    let family = metadata.str("general.architecture").and_then(families::by_architecture);
    let tensors = checkpoint.tensors().iter().map(|info| {
        let stem = ["weight", "bias"].iter().find_map(|end| info.name.strip_suffix(end)?.strip_suffix('.'));
        Converted {
            name: info.name.clone(),
            format: info.format,
            shape: info.shape.clone(),
            role: family.zip(stem).and_then(|(family, stem)| family.role(Naming::Gguf, stem)),
            source: Source::Tensor { name: info.name.clone(), rows: None, offset: 0.0 },
        }
    });
    Conversion { tensors: tensors.collect(), metadata, notes: Vec::new() }
}
