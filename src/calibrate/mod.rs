//! Running a model over text while looking at what goes through it: importance of columns, Hessians for GPTQ, and how
//! much a quantized model differs from the original.

pub mod capture;
pub mod compare;
pub mod gptq;
pub mod groups;
pub mod imatrix;
pub mod layers;
pub mod sensitivity;
mod step;
pub mod text;
mod work;
