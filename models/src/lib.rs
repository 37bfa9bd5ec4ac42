//! What a model is: checkpoints, tokenizers, families and the forward pass.
//!
//! See `docs/architecture.md`.

pub mod checkpoint;
mod error;
pub mod tokenizer;

pub use error::{Error, Result};
