//! `rushlight bench`: tokens per second.

use super::{Global, ModelOptions};
use anyhow::Result;

/// Measure tokens per second for prompt and generation
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelOptions,
    /// Tokens of the prompt
    #[arg(short = 'p', long, value_name = "N", default_value_t = 512)]
    pub prompt: usize,
    /// Tokens to generate
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    pub generate: usize,
    /// Repetitions
    #[arg(short, long, value_name = "N", default_value_t = 5)]
    pub repetitions: usize,
    /// Tokens in the context before either is measured
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub depth: usize,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub fn run(_: &Args, _: &Global) -> Result<()> {
    anyhow::bail!("not measured yet")
}
