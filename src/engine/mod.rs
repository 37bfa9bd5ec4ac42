//! Running a model: the CPU backend, sampling, constraints, conversations.

pub mod answer;
pub mod constraint;
pub mod loaded;
pub mod random;
pub mod sampler;
pub mod session;
pub mod settings;
pub mod stop;
