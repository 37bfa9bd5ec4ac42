//! The decoder recorded: loss and gradients.
//!
//! [`Tape`](record::Tape) is a backend of the decoder that remembers, for each operation, what its way back needs; the
//! files beside it have the operations, forward and backward side by side. [`Learner`] runs micro-batches over it.

mod attention;
mod backend;
mod elementwise;
mod experts;
mod learner;
mod linear;
mod lora;
mod memory;
mod method;
mod noise;
mod norm;
mod pool;
mod record;
mod rows;
mod setup;
mod sites;
mod targets;

pub use learner::Learner;
pub use memory::{MemoryEstimate, memory};
pub use method::{Checkpointing, LoraConfig, Method};
pub use setup::check as check_lora;
pub use sites::Sites;
pub use targets::{Module, module, ordinary};
