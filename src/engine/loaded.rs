//! A model ready to be talked to: engine, tokenizer, its own sampling settings, and its chat template.

use super::settings::Sampling;
use super::{Engine, Options};
use anyhow::{Context, Result, bail};
use rushlight_models::checkpoint::{Checkpoint, Kind};
use rushlight_models::tokenizer::{ChatTemplate, Tokenizer};
use std::path::Path;
use std::sync::Arc;

/// What [`Loaded::open`] brings together.
pub struct Loaded {
    /// Runs the model.
    pub engine: Engine,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The sampling settings that its makers published.
    pub sampling: Sampling,
}

impl Loaded {
    /// Opens the model at `path`.
    pub fn open(path: &Path, options: &Options) -> Result<Loaded> {
        let checkpoint = Checkpoint::open(path)?;
        let sampling = published_sampling(&checkpoint);
        let tokenizer = Tokenizer::of(&checkpoint)?;
        let engine = Engine::from_checkpoint(checkpoint, options)?;
        Ok(Loaded { engine, tokenizer: Arc::new(tokenizer), sampling })
    }

    /// The chat template: `given` (a built-in one's name or a file) or else the model's own.
    pub fn template(&self, given: Option<&str>) -> Result<Arc<ChatTemplate>> {
        let checkpoint = self.engine.checkpoint();
        let path = checkpoint.path();
        let own = || match checkpoint.metadata() {
            Some(metadata) => ChatTemplate::from_gguf(metadata, path),
            None => ChatTemplate::from_dir(path),
        };
        let template = match given {
            Some(given) => given_template(given)?,
            // A model without one may still have the marks of a template that we know.
            None => ChatTemplate::choose(own()?, &self.tokenizer)?,
        };
        Ok(Arc::new(template))
    }
}

/// The sampling settings that a checkpoint publishes.
pub fn published_sampling(checkpoint: &Checkpoint) -> Sampling {
    match checkpoint.kind() {
        Kind::Gguf(metadata) => Sampling::from_gguf(metadata),
        Kind::HuggingFace { generation_config: Some(config), .. } => Sampling::from_generation_config(config),
        Kind::HuggingFace { .. } => Sampling::default(),
    }
}

/// A built-in template by name, or the one in a file.
pub fn given_template(given: &str) -> Result<ChatTemplate> {
    if let Some(template) = ChatTemplate::builtin(given) {
        return Ok(template);
    }
    if !Path::new(given).is_file() {
        let names = ChatTemplate::builtin_names().collect::<Vec<_>>().join(", ");
        bail!("--template {given}: neither a file nor a built-in template; those are {names}");
    }
    let source = std::fs::read_to_string(given).with_context(|| given.to_string())?;
    Ok(ChatTemplate::from_source(&source, given)?)
}
