//! Training: what a person teaches a model, on top of its frozen weights or of all of them.
//!
//! [`data`] makes [`Example`](batch::Example)s of files, [`tape`] gives the loss and the gradients of
//! [`Params`](params::Params) for a batch of them, [`run`] is the night: optimizer, schedule, checkpoints, reports.

pub mod batch;
pub mod data;
pub mod params;
pub mod run;
pub mod tape;
