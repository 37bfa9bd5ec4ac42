//! `rushlight perplexity`: how well a model predicts a text, scored as llama.cpp's tool does.

use super::options::read_text;
use super::{Global, ModelOptions, Progress, print_json};
use crate::calibrate::compare::{Chunks, Comparison, Score, compare, perplexity};
use crate::engine::Engine;
use crate::engine::loaded::Loaded;
use crate::engine::model::Options;
use crate::store::Store;
use anyhow::Result;
use rushlight_quant::PromptRounding;
use std::io::Write;
use std::path::PathBuf;

/// Measure how well a model predicts a text
///
/// The text is cut into chunks of the context's length, each begins with the BOS token if the model wants one, and the
/// second half of each is scored, with activations rounded to 8 bits over as many columns as llama.cpp rounds them: the
/// figures compare with its. --fine rounds them as Rushlight rounds those of a prompt.
/// With --against, the model's predictions are also compared with those of the model it was made from.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelOptions,
    /// The text (- is standard input)
    #[arg(short, long, value_name = "TEXT")]
    file: PathBuf,
    /// Compare with this model: KL divergence, and how often both find the same token likeliest
    #[arg(long, value_name = "MODEL")]
    against: Option<String>,
    /// Tokens of a chunk
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(4..=1_048_576))]
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

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    let path = args.model.path()?;
    let against = args.against.as_ref().map(|name| Store::open()?.resolve(name)).transpose()?;
    let text = read_text(&args.file)?;
    let ctx = args.ctx as usize;
    let prompt_rounding = if args.fine { PromptRounding::Fine } else { PromptRounding::EightBits };
    let options = Options { prompt_rounding, ..args.model.engine(Some(ctx)) };
    let Loaded { mut engine, tokenizer, .. } = Loaded::open(&path, &options)?;
    let most = args.chunks.map(|n| n as usize);
    let chunks = Chunks::new(&tokenizer, &text, &args.file.display().to_string(), ctx, most)?;
    let mut bar = Progress::count(global.quiet, "perplexity", (chunks.count() * ctx) as u64);
    if let Some(path) = against {
        let mut original = Engine::open(&path, &Options { adapters: Vec::new(), ..options })?;
        let mut detail = String::new();
        let result = compare(&mut original, &mut engine, &chunks, &mut |read, so_far| {
            if let Some(c) = so_far {
                detail = format!("perplexity {:.4}, KL {:.5}", c.score.perplexity, c.kl);
            }
            bar.at(read as u64, &detail);
        })?;
        bar.finish();
        return if args.json { print_json(&result) } else { tell_comparison(&result, ctx) };
    }
    let mut whole = 0;
    let score = perplexity(&mut engine, &chunks, &mut |read, score| {
        let detail = if score.tokens > 0 { format!("perplexity {:.4}", score.perplexity) } else { String::new() };
        bar.at(read as u64, &detail);
        if score.chunks > whole {
            whole = score.chunks;
            tracing::info!("chunk {whole}: {:.4}", score.perplexity);
        }
    })?;
    bar.finish();
    if args.json {
        return print_json(&score);
    }
    Ok(writeln!(std::io::stdout(), "{}", line(&score, ctx))?)
}

fn line(score: &Score, ctx: usize) -> String {
    let Score { perplexity, error, chunks, tokens } = score;
    format!("perplexity {perplexity:.4} +/- {error:.4} ({tokens} tokens scored in {chunks} chunks of {ctx})")
}

fn tell_comparison(c: &Comparison, ctx: usize) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{}", line(&c.score, ctx))?;
    writeln!(out, "original   {:.4} +/- {:.4}", c.original.perplexity, c.original.error)?;
    writeln!(out, "KL divergence {:.5} +/- {:.5}, 99 % quantile {:.4}", c.kl, c.kl_error, c.kl_99)?;
    Ok(writeln!(out, "same likeliest token {:.2} %", 100.0 * c.same_top)?)
}
