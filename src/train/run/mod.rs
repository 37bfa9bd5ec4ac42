//! A training run: optimizer, schedule, checkpoints, metrics, reports.
//!
//! ```text
//! DIR/run.json              what the run was asked to do; another command does not go on with it
//! DIR/lock                  held while a run is at work
//! DIR/checkpoints/          the last two states of the run, and the best parameters
//! DIR/metrics.jsonl         a line for every step and every evaluation
//! DIR/events.out.tfevents.* the same for TensorBoard
//! DIR/report.html           the same for people
//! DIR/adapter/ or DIR/model/  what was learned
//! ```

pub mod base;
pub mod checkpoint;
pub mod classify;
pub mod events;
pub mod folder;
pub mod metrics;
mod night;
pub mod optimizer;
pub mod plan;
pub mod prepare;
pub mod pupil;
pub mod report;
pub mod schedule;
mod states8;
#[cfg(test)]
mod tests;

pub use night::{End, Settings, Watch, train};

use super::batch::{Example, Loss};
use super::data::Dataset;
use super::params::{Gradients, Params};
use anyhow::Result;
use std::path::Path;

/// What is to be learned: parameters, and how far they are from it.
pub trait Lesson {
    /// The parameters.
    fn params(&self) -> &Params;

    /// The same, to be changed.
    fn params_mut(&mut self) -> &mut Params;

    /// Adds to `gradients` those of the sum of the loss of `examples`; `noise` seeds dropout.
    fn backward(&mut self, examples: &[Example], noise: u64, gradients: &mut Gradients) -> Result<Loss>;

    /// The loss of each of `examples`, without dropout.
    fn losses(&mut self, examples: &[Example]) -> Result<Vec<Loss>>;

    /// What the model says to each of `prompts` now.
    fn answers(&mut self, prompts: &[String]) -> Result<Vec<String>>;

    /// Writes what was learned into the folder of the run, which is `finished` or was interrupted.
    fn save(&mut self, dir: &Path, finished: bool) -> Result<()>;
}

/// Where examples come from.
pub trait Data {
    /// Number of items: what a batch and an epoch count.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sequences of some items.
    fn batch(&self, items: &[usize]) -> Vec<Example>;
}

impl Data for Dataset {
    fn len(&self) -> usize {
        Dataset::len(self)
    }

    fn batch(&self, items: &[usize]) -> Vec<Example> {
        Dataset::batch(self, items)
    }
}
