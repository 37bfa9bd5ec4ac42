//! Hugging Face directories of quantized weights, written from one of float weights.

mod directory;
mod gptq;
mod nf4;

pub use gptq::{GptqGrid, GptqLayer, GptqVersion, GptqWriter};
pub use nf4::{Nf4Options, write_nf4};
