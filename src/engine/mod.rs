//! Running a model: the CPU backend, sampling, constraints, conversations.

pub mod angles;
pub mod answer;
pub mod channels;
pub mod constraint;
pub mod cpu;
pub mod kv;
pub mod loaded;
pub mod model;
pub mod random;
pub mod sampler;
pub mod session;
pub mod settings;
pub mod speculate;
pub mod stop;

pub use model::{DEFAULT_CONTEXT, Engine, Memory, Options};
