//! What a quantized directory is made of: a Hugging Face directory, or a GGUF file seen as one.

use super::directory::Directory;
use crate::checkpoint::{Bytes, Checkpoint, Kind, RawTensor, Tensor, TensorInfo};
use crate::convert::{Converted, Source, to_huggingface};
use crate::{Error, Result, tokenizer};
use rushlight_quant::formats::{Format, f32_to_f16};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashMap;

/// A model under the names of its family's Hugging Face implementation, in floating point.
#[derive(Debug)]
pub struct Original<'a> {
    checkpoint: &'a Checkpoint,
    config: Value,
    infos: Cow<'a, [TensorInfo]>,
    by_name: HashMap<String, usize>,
    /// Where a GGUF file has each of `infos`; empty for a directory.
    converted: Vec<Converted>,
}

impl<'a> Original<'a> {
    /// The model in `checkpoint`.
    ///
    /// # Errors
    /// When it is a directory whose weights are quantized already, or a GGUF file of which no directory can be made.
    pub fn of(checkpoint: &'a Checkpoint) -> Result<Original<'a>> {
        let (config, infos, converted) = match checkpoint.kind() {
            Kind::HuggingFace { config, .. } => {
                if config.get("quantization_config").is_some_and(|v| !v.is_null()) {
                    let what = "its weights are quantized already: use the original checkpoint";
                    return Err(Error::file(checkpoint.path(), what));
                }
                (config.clone(), Cow::Borrowed(checkpoint.tensors()), Vec::new())
            }
            Kind::Gguf(_) => {
                let directory = to_huggingface(checkpoint)?;
                let float = |t: &Converted| if t.format.is_float() { t.format } else { Format::F16 };
                let info = |t: &Converted| TensorInfo { format: float(t), ..t.info() };
                let infos: Vec<TensorInfo> = directory.tensors.iter().map(info).collect();
                let mut config = directory.config;
                config["torch_dtype"] = dtype(&infos).into();
                (config, Cow::Owned(infos), directory.tensors)
            }
        };
        let by_name = infos.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Original { checkpoint, config, infos, by_name, converted })
    }

    /// The checkpoint itself.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// config.json.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Every tensor, of floats.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    /// The tensors of other types.
    pub fn raw_tensors(&self) -> &[RawTensor] {
        self.checkpoint.raw_tensors()
    }

    /// The tensor called `name`.
    pub fn find(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.infos[i])
    }

    /// Row `i` of the tensor called `name` is row `rows[i]` of the one in the checkpoint; `None` where they are in the
    /// same order.
    pub fn rows(&self, name: &str) -> Option<&[u32]> {
        match &self.converted.get(*self.by_name.get(name)?)?.source {
            Source::Tensor { rows, .. } | Source::Parts { rows, .. } => rows.as_deref(),
            Source::Data(_) => None,
        }
    }

    /// The tensor called `name` with its numbers.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let Some((info, converted)) =
            self.by_name.get(name).and_then(|&i| Some((&self.infos[i], self.converted.get(i)?)))
        else {
            return self.checkpoint.tensor(name);
        };
        let data = converted.data(self.checkpoint)?;
        let data = match converted.format {
            format if format == info.format => data,
            packed => {
                let mut values = vec![0.0; info.elements().unwrap_or(0)];
                packed.decode(&data, &mut values);
                Bytes::new(values.iter().flat_map(|v| f32_to_f16(*v).to_le_bytes()).collect::<Vec<u8>>())
            }
        };
        Ok(Tensor { info: info.clone(), data })
    }

    /// Puts into `directory` what belongs to the model besides its weights and configuration.
    pub(super) fn companions(&self, directory: &Directory) -> Result<()> {
        match self.checkpoint.metadata() {
            None => directory.copy_companions(self.checkpoint.path()),
            Some(metadata) => {
                let files = tokenizer::files(metadata, self.checkpoint.path())?;
                files.iter().try_for_each(|(name, content)| directory.json(name, content))
            }
        }
    }
}

/// What transformers is to load a model as: the type that most weights have.
fn dtype(infos: &[TensorInfo]) -> &'static str {
    let count = |format| infos.iter().filter(|t| t.format == format).filter_map(TensorInfo::elements).sum::<usize>();
    let types = [(Format::F32, "float32"), (Format::BF16, "bfloat16"), (Format::F16, "float16")];
    types.into_iter().max_by_key(|(format, _)| count(*format)).map_or("float32", |(_, name)| name)
}
