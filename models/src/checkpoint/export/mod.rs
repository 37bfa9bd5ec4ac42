//! Hugging Face directories written from others: of quantized weights from one of floats or from a GGUF file, of other
//! floats, and of models whose weights were changed.

mod directory;
mod floats;
mod gptq;
mod nf4;
mod original;
mod trained;

pub use floats::FloatWriter;
pub use gptq::{GptqGrid, GptqLayer, GptqVersion, GptqWriter};
pub(crate) use nf4::blocks as nf4_blocks;
pub use nf4::{Nf4Options, write_nf4};
pub use original::Original;
pub use trained::write_trained;
