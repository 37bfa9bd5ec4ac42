//! Quantize, chat with and train language models on an ordinary computer.
//!
//! See `docs/architecture.md`.

pub mod engine;
