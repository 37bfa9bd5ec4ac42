//! Running a model: sampling, constraints, conversations.

pub mod random;
pub mod sampler;
pub mod settings;
