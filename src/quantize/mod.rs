//! Quantizing: from any checkpoint to a smaller GGUF file.

pub mod allocate;
pub mod directory;
pub mod memory;
pub mod mix;
pub mod name;
pub mod output;
pub mod plan;
pub mod report;
pub mod scratch;
pub mod types;
pub mod write;
