//! Numbers: block formats, kernels and the arithmetic of language models.
//!
//! This crate knows no model, no file and no token. See `docs/architecture.md`.

pub mod buffer;
mod cpu;
pub mod formats;
pub mod kernels;
mod limits;
pub mod matmul;
pub mod ops;
pub mod quantize;
pub mod threads;

pub use cpu::{Cpu, physical_cores};
pub use kernels::Isa;
pub use limits::PeakArithmetic;
pub use matmul::{Back, Down, Matrix, Phase, PromptRounding, Up};
