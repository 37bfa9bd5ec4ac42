//! Running a model.

pub mod cpu;
pub mod kv;
pub mod model;

pub use model::{Engine, Memory, Options};
