//! Hugging Face directories written from others: of quantized weights from one of floats, and of other floats.

mod directory;
mod floats;
mod gptq;
mod nf4;

pub use floats::FloatWriter;
pub use gptq::{GptqGrid, GptqLayer, GptqVersion, GptqWriter};
pub use nf4::{Nf4Options, write_nf4};
