//! Hugging Face directories of quantized weights, written from one of float weights; and models whose weights were changed.

mod directory;
mod gptq;
mod nf4;
mod trained;

pub use gptq::{GptqGrid, GptqLayer, GptqVersion, GptqWriter};
pub use nf4::{Nf4Options, write_nf4};
pub use trained::write_trained;
