//! Hugging Face directories of floats, written anew from another one with other weights.

use super::directory::{Directory, element};
use crate::checkpoint::safetensors::{Entry, Writer};
use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// A directory of float weights that is being written.
#[derive(Debug)]
pub struct FloatWriter<'a> {
    source: &'a Checkpoint,
    directory: Directory,
    weights: Writer,
    config: Value,
    /// Tensors of other types that come after those of floats.
    last: Vec<Entry>,
}

impl<'a> FloatWriter<'a> {
    /// Begins the directory `target` with the floats `tensors`, which follow by [`FloatWriter::write`] in this order: wide
    /// types before narrow ones, so that each lies at a multiple of its elements' size. What is not floats, tokenizer
    /// and template are those of `source`.
    ///
    /// # Errors
    /// When `target` is there already, or cannot be written.
    pub fn create(
        source: &'a Checkpoint,
        target: &Path,
        tensors: &[TensorInfo],
        config: Value,
    ) -> Result<FloatWriter<'a>> {
        if let Some(other) = tensors.iter().find(|t| !t.format.is_float()) {
            return Err(Error::file(target, format!("cannot be written: '{}' is {}", other.name, other.format)));
        }
        let raw = source.raw_tensors().iter();
        let raw = raw.map(|t| Entry { name: t.name.clone(), dtype: t.dtype.clone(), shape: t.shape.clone() });
        let (mut first, mut last): (Vec<Entry>, Vec<Entry>) = raw.partition(|entry| element(entry) >= 4);
        first.sort_by_key(|entry| std::cmp::Reverse(element(entry)));
        last.sort_by_key(|entry| std::cmp::Reverse(element(entry)));
        let floats = tensors.iter().map(|t| Entry {
            name: t.name.clone(),
            dtype: t.format.name().to_owned(),
            shape: t.shape.clone(),
        });
        let entries: Vec<Entry> = first.iter().cloned().chain(floats).chain(last.iter().cloned()).collect();
        let directory = Directory::create(target)?;
        let mut weights = Writer::create(&directory.file("model.safetensors"), &entries)?;
        copy_raw(source, &first, &mut weights)?;
        Ok(FloatWriter { source, directory, weights, config, last })
    }

    /// Writes the next bytes of tensor `name`.
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<()> {
        self.weights.write(name, data)
    }

    /// Writes the rest and gives the directory its name.
    pub fn finish(self) -> Result<()> {
        let FloatWriter { source, directory, mut weights, config, last } = self;
        copy_raw(source, &last, &mut weights)?;
        weights.finish()?;
        directory.copy_companions(source.path())?;
        directory.json("config.json", &config)?;
        directory.commit()
    }
}

/// Copies tensors of other types than floats.
fn copy_raw(source: &Checkpoint, tensors: &[Entry], weights: &mut Writer) -> Result<()> {
    for Entry { name, .. } in tensors {
        if let Some(raw) = source.raw_tensors().iter().find(|t| &t.name == name) {
            weights.write(name, &raw.data)?;
        }
    }
    Ok(())
}
