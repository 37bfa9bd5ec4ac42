//! Quantizing: from any checkpoint to a smaller GGUF file.

pub mod scratch;
