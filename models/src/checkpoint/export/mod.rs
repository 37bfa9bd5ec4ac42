//! Hugging Face directories of quantized weights, written from a directory of float weights or a GGUF file.

mod directory;
mod gptq;
mod nf4;
mod original;

pub use gptq::{GptqGrid, GptqLayer, GptqVersion, GptqWriter};
pub use nf4::{Nf4Options, write_nf4};
pub use original::Original;
