//! `rushlight bench`: tokens per second, and what share that is of what the machine can do.

use super::{Global, ModelOptions, Progress, print_json, size};
use crate::engine::model::Engine;
use anyhow::{Result, bail};
use serde::Serialize;
use std::io::Write;
use std::time::Instant;

/// Measure tokens per second for prompt and generation
///
/// Generation reads every weight once a token: its limit is the machine's read bandwidth. A prompt takes two
/// operations a weight and token: its limit is the machine's arithmetic. Both limits are measured in the same run.
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

#[derive(Serialize)]
struct Report {
    model: String,
    isa: &'static str,
    threads: usize,
    depth: usize,
    load_seconds: f64,
    machine: Machine,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<Rate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<Rate>,
}

#[derive(Serialize)]
struct Machine {
    /// Bytes a second.
    read_bandwidth: f64,
    /// Operations a second with the instructions that multiply a prompt, where that is measured.
    peak_arithmetic: Option<f64>,
}

#[derive(Serialize)]
struct Rate {
    tokens: usize,
    depth: usize,
    /// The median of the repetitions.
    tokens_per_second: f64,
    slowest: f64,
    fastest: f64,
    /// Of the machine's limit: arithmetic for a prompt, bandwidth for generation.
    share: Option<f64>,
}

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    if args.repetitions == 0 || args.prompt + args.generate == 0 {
        bail!("nothing to measure: give at least one repetition (-r) of a prompt (-p) or of generation (-n)");
    }
    let path = args.model.path()?;
    let needed = args.depth + args.prompt.max(args.generate);
    let start = Instant::now();
    let mut engine = Engine::open(&path, &args.model.engine(Some(needed)))?;
    let load_seconds = start.elapsed().as_secs_f64();

    let vocabulary = engine.vocab_size() as u64;
    // Fixed ids all over the vocabulary: every run and every program can be given the same.
    let ids: Vec<u32> = (0..needed as u64).map(|i| ((i * 7919 + 13) % vocabulary) as u32).collect();
    let mut progress = Progress::count(global.quiet, "bench", args.repetitions as u64);
    engine.prompt(0, &ids[..1], &mut |_| true)?;
    engine.step(&[(0, ids[0])])?;
    engine.truncate(0, 0);
    if args.depth > 0 {
        engine.prompt(0, &ids[..args.depth], &mut |_| true)?;
    }
    let (mut prompt, mut generation) = (Vec::new(), Vec::new());
    for repetition in 0..args.repetitions {
        if args.prompt > 0 {
            let start = Instant::now();
            engine.prompt(0, &ids[args.depth..args.depth + args.prompt], &mut |_| true)?;
            prompt.push(args.prompt as f64 / start.elapsed().as_secs_f64());
            engine.truncate(0, args.depth);
        }
        if args.generate > 0 {
            let start = Instant::now();
            for &id in &ids[args.depth..args.depth + args.generate] {
                engine.step(&[(0, id)])?;
            }
            generation.push(args.generate as f64 / start.elapsed().as_secs_f64());
            engine.truncate(0, args.depth);
        }
        progress.at(repetition as u64 + 1, "");
    }
    progress.finish();
    // Last, because it empties the caches and heats the processor.
    let machine =
        Machine { read_bandwidth: engine.cpu().read_bandwidth(), peak_arithmetic: engine.cpu().peak_arithmetic() };

    let read = engine.model().linears().map(|l| l.weight().data().len() as f64).sum::<f64>();
    // The cache as it is half way through.
    let cached = (args.depth + args.generate / 2) as f64 * engine.memory().kv_per_token as f64;
    // The head works on the prompt's last token alone.
    let head = &engine.model().head;
    let weights = |l: &rushlight_models::model::Linear| (l.weight().rows() * l.weight().cols()) as f64;
    let operations = 2.0 * (engine.model().linears().map(weights).sum::<f64>() - weights(head));
    let peak = machine.peak_arithmetic;
    let report = Report {
        model: path.display().to_string(),
        isa: engine.isa().name(),
        threads: engine.threads(),
        depth: args.depth,
        load_seconds,
        prompt: rate(args.prompt, args.depth, prompt, |t| peak.map(|peak| t * operations / peak)),
        generation: rate(args.generate, args.depth, generation, |t| Some(t * (read + cached) / machine.read_bandwidth)),
        machine,
    };
    if args.json {
        return print_json(&report);
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{} on {} threads ({}), ready in {:.2} s", report.model, report.threads, report.isa, load_seconds)?;
    let bandwidth = size(report.machine.read_bandwidth as u64);
    match report.machine.peak_arithmetic {
        Some(peak) => writeln!(out, "limits: reads {bandwidth}/s, {:.2} TOP/s", peak / 1e12)?,
        None => writeln!(out, "limits: reads {bandwidth}/s")?,
    }
    for (name, rate, limit) in
        [("prompt", &report.prompt, "arithmetic"), ("generation", &report.generation, "bandwidth")]
    {
        let Some(rate) = rate else { continue };
        let depth = if rate.depth > 0 { format!(" after {}", rate.depth) } else { String::new() };
        let share = rate.share.map_or(String::new(), |s| format!(", {:.0} % of the {limit}", 100.0 * s));
        writeln!(
            out,
            "{name:<10} {:>5} tokens{depth}: {:.1} tokens/s ({:.1} to {:.1}){share}",
            rate.tokens, rate.tokens_per_second, rate.slowest, rate.fastest
        )?;
    }
    Ok(())
}

/// The median of the rates; `None` where there are none.
fn rate(tokens: usize, depth: usize, mut rates: Vec<f64>, share: impl Fn(f64) -> Option<f64>) -> Option<Rate> {
    rates.sort_by(f64::total_cmp);
    let (slowest, fastest) = (*rates.first()?, *rates.last()?);
    let middle = rates.len() / 2;
    let median = if rates.len() % 2 == 1 { rates[middle] } else { (rates[middle - 1] + rates[middle]) / 2.0 };
    Some(Rate { tokens, depth, tokens_per_second: median, slowest, fastest, share: share(median) })
}
