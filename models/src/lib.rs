//! What a model is: checkpoints, tokenizers, families and the forward pass.
//!
//! See `docs/architecture.md`.

pub mod adapter;
pub mod backend;
pub mod checkpoint;
pub mod convert;
pub mod decoder;
mod error;
pub mod families;
pub mod fold;
pub mod model;
pub mod packing;
pub mod rope;
pub mod routing;
pub mod spec;
pub mod tokenizer;

pub use error::{Error, Result, is_full};
