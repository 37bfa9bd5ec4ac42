//! Quantize, chat with and train language models on an ordinary computer.
//!
//! See `docs/architecture.md`.

pub mod calibrate;
pub mod cli;
pub mod engine;
pub mod eval;
pub mod merge;
#[cfg(feature = "hub")]
pub mod pull;
pub mod quantize;
mod replace;
pub mod store;
pub mod train;
