//! `rushlight perplexity`: how well a model predicts a text, scored as llama.cpp's tool does.

use super::options::read_text;
use super::{Global, ModelOptions, Progress, print_json};
use crate::engine::loaded::Loaded;
use crate::engine::model::Options;
use anyhow::{Result, bail};
use rushlight_models::tokenizer::Specials;
use rushlight_quant::PromptRounding;
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;

/// Measure how well a model predicts a text
///
/// The text is cut into chunks of the context's length, each begins with the BOS token if the model wants one, and the
/// second half of each is scored, with activations rounded to 8 bits over as many columns as llama.cpp rounds them: the
/// figures compare with its. --fine rounds them as Rushlight rounds those of a prompt.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelOptions,
    /// The text (- is standard input)
    #[arg(short, long, value_name = "TEXT")]
    file: PathBuf,
    /// Tokens of a chunk
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(4..=1_048_576))]
    ctx: u32,
    /// Only the first N chunks
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,
    /// Round activations as those of a prompt are (bf16 or 16 bits), instead of 8 bits
    #[arg(long)]
    fine: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Output {
    perplexity: f64,
    /// Standard error of the perplexity.
    error: f64,
    chunks: usize,
    /// Tokens scored.
    tokens: usize,
}

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    let path = args.model.path()?;
    let text = read_text(&args.file)?;
    let ctx = args.ctx as usize;
    let prompt_rounding = if args.fine { PromptRounding::Fine } else { PromptRounding::EightBits };
    let options = Options { prompt_rounding, ..args.model.engine(Some(ctx)) };
    let Loaded { mut engine, tokenizer, .. } = Loaded::open(&path, &options)?;
    let bos = if tokenizer.add_bos() { tokenizer.bos() } else { None };
    let mut ids: Vec<u32> = bos.into_iter().collect();
    ids.extend(tokenizer.encode(&text, Specials::AsText)?);
    let available = ids.len() / ctx;
    if available == 0 {
        let (name, n) = (args.file.display(), ids.len());
        bail!("{name} has {n} tokens, fewer than the {ctx} of one chunk: give a longer text or a smaller --ctx");
    }
    let chunks = available.min(args.chunks.map_or(usize::MAX, |n| n as usize));
    let first = ctx / 2;
    let mut progress = Progress::count(global.quiet, "perplexity", chunks as u64);
    let (mut sum, mut squares, mut count) = (0.0, 0.0, 0usize);
    let mut input = Vec::with_capacity(ctx);
    for chunk in 0..chunks {
        let targets = &ids[chunk * ctx..(chunk + 1) * ctx];
        input.clear();
        input.extend_from_slice(targets);
        if let Some(bos) = bos {
            input[0] = bos;
        }
        engine.truncate(0, 0);
        // The first half is context only, and the last token has nothing to predict.
        engine.prompt(0, &input[..first], &mut |_| true)?;
        engine.prompt_all(0, &input[first..], &mut |position, logits| {
            if position < ctx - 1 {
                let loss = negative_log_likelihood(logits, targets[position + 1]);
                sum += loss;
                squares += loss * loss;
                count += 1;
            }
        })?;
        if !sum.is_finite() {
            bail!("the model gave logits that are not numbers in chunk {}: its weights are damaged", chunk + 1);
        }
        let so_far = (sum / count as f64).exp();
        progress.at(chunk as u64 + 1, &format!("perplexity {so_far:.4}"));
        tracing::info!("chunk {}: {so_far:.4}", chunk + 1);
    }
    progress.finish();
    let mean = sum / count as f64;
    let perplexity = mean.exp();
    let variance = (squares / count as f64 - mean * mean).max(0.0) / (count.max(2) - 1) as f64;
    let output = Output { perplexity, error: variance.sqrt() * perplexity, chunks, tokens: count };
    if args.json {
        return print_json(&output);
    }
    let Output { error, chunks, tokens, .. } = output;
    Ok(writeln!(
        std::io::stdout(),
        "perplexity {perplexity:.4} +/- {error:.4} ({tokens} tokens scored in {chunks} chunks of {ctx})"
    )?)
}

/// -ln of the probability that `logits` give to `target`, in f64. NaN where the logits are not numbers.
fn negative_log_likelihood(logits: &[f32], target: u32) -> f64 {
    let Some(&own) = logits.get(target as usize) else { return f64::NAN };
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    sum.ln() - f64::from(own - max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihoods() {
        let logits = [1.0f32, 2.0, 3.0];
        let p: f64 = 2f64.exp() / (1f64.exp() + 2f64.exp() + 3f64.exp());
        assert!((negative_log_likelihood(&logits, 1) + p.ln()).abs() < 1e-12);
        assert!((negative_log_likelihood(&[1000.0, 1000.0], 0) - 2f64.ln()).abs() < 1e-12);
        assert!(negative_log_likelihood(&[f32::NAN, 1.0], 0).is_nan());
        assert!(negative_log_likelihood(&logits, 3).is_nan());
    }
}
