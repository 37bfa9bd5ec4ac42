//! `rushlight bench`: tokens per second, and what share that is of what the machine can do.

use super::options::adapter;
use super::{Global, Progress, print_json, size};
use crate::engine::{Engine, Options};
use crate::store::Store;
use anyhow::{Result, bail};
use rushlight_models::model::Linear;
use rushlight_quant::PeakArithmetic;
use serde::Serialize;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

/// Measure tokens per second for prompt and generation
///
/// Generation reads every weight once a step: its limit is the machine's read bandwidth, or its arithmetic where many
/// sequences share a step. A prompt takes two operations a weight and token: its limit is the machine's arithmetic.
/// Limits are measured in the same run.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A .gguf file, a Hugging Face directory, or a name in the store
    pub model: String,
    /// Threads, one number or several with commas (default: the physical cores)
    #[arg(short, long, value_name = "N,..", value_delimiter = ',', value_parser = super::options::threads)]
    pub threads: Vec<NonZeroUsize>,
    /// Tokens in the context before either is measured
    #[arg(short, long, value_name = "N,..", value_delimiter = ',', default_values_t = [0])]
    pub depth: Vec<usize>,
    /// Sequences that generate together
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1")]
    pub batch: Vec<NonZeroUsize>,
    /// Tokens of the prompt
    #[arg(short = 'p', long, value_name = "N", default_value_t = 512)]
    pub prompt: usize,
    /// Tokens to generate, for each sequence
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    pub generate: usize,
    /// Repetitions
    #[arg(short, long, value_name = "N", default_value_t = 5)]
    pub repetitions: usize,
    /// An adapter, with its strength if that is not 1; may be repeated
    #[arg(long = "adapter", value_name = "A[=SCALE]", value_parser = adapter)]
    pub adapters: Vec<(PathBuf, f32)>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Report {
    model: String,
    isa: &'static str,
    runs: Vec<Run>,
}

/// What was measured with one number of threads.
#[derive(Serialize)]
struct Run {
    threads: usize,
    /// Until the model could take a token. Nothing is repacked: weights are used as the file has them.
    load_seconds: f64,
    machine: Machine,
    rates: Vec<Rate>,
}

#[derive(Serialize)]
struct Machine {
    /// Bytes a second.
    read_bandwidth: f64,
    peak_arithmetic: Peaks,
}

/// Operations a second, by kind of number.
#[derive(Serialize)]
struct Peaks {
    int8: Option<f64>,
    bf16: Option<f64>,
    f32: Option<f64>,
}

#[derive(Serialize)]
struct Rate {
    /// "prompt" or "generation".
    work: &'static str,
    /// Of each sequence.
    tokens: usize,
    depth: usize,
    batch: usize,
    /// The median of the repetitions; of all sequences together.
    tokens_per_second: f64,
    slowest: f64,
    fastest: f64,
    /// What bounds it: "bandwidth" or "arithmetic".
    limit: &'static str,
    /// How much of that it reaches, where the limit is known.
    share: Option<f64>,
}

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    if args.repetitions == 0 || args.prompt + args.generate == 0 {
        bail!("nothing to measure: give at least one repetition (-r) of a prompt (-p) or of generation (-n)");
    }
    let path = Store::open()?.resolve(&args.model)?;
    let threads: Vec<Option<usize>> = match &args.threads[..] {
        [] => vec![None],
        some => some.iter().map(|n| Some(n.get())).collect(),
    };
    let (mut runs, mut isa) = (Vec::new(), "");
    let sequences: usize = args.batch.iter().map(|n| n.get()).sum();
    let tokens = args.prompt.saturating_add(args.generate.saturating_mul(sequences)).saturating_mul(args.repetitions);
    let total = tokens.saturating_mul(threads.len() * args.depth.len());
    let mut meter = Meter { bar: Progress::count(global.quiet, "bench", total as u64), done: 0 };
    for threads in threads {
        let deepest = args.depth.iter().max().copied().unwrap_or(0);
        let slots = args.batch.iter().max().map_or(1, |n| n.get());
        let context = Some(deepest + args.prompt.max(args.generate));
        let options = Options { threads, context, slots, adapters: args.adapters.clone(), ..Options::default() };
        let start = Instant::now();
        let mut engine = Engine::open(&path, &options)?;
        let load_seconds = start.elapsed().as_secs_f64();
        isa = engine.isa().name();
        let mut measured = Vec::new();
        let ids = fixed_ids(deepest + args.prompt.max(args.generate), engine.vocab_size());
        warm(&mut engine, &ids, args.prompt)?;
        for &depth in &args.depth {
            if args.prompt > 0 {
                measured.push(("prompt", depth, 1, prompt(&mut engine, &ids, depth, args, &mut meter)?, Vec::new()));
            }
            for batch in args.batch.iter().map(|n| n.get()) {
                if args.generate > 0 {
                    let (rates, bandwidths) = generation(&mut engine, &ids, depth, batch, args, &mut meter)?;
                    measured.push(("generation", depth, batch, rates, bandwidths));
                }
            }
        }
        // Last, because it heats the processor.
        let peaks = engine.cpu().peak_arithmetic();
        let mut bandwidths: Vec<f64> = measured.iter().flat_map(|m| m.4.iter().copied()).collect();
        if bandwidths.is_empty() {
            bandwidths.push(engine.cpu().read_bandwidth());
        }
        let machine = Machine {
            read_bandwidth: spread(bandwidths).1,
            peak_arithmetic: Peaks { int8: peaks.int8, bf16: peaks.bf16, f32: peaks.f32 },
        };
        let limits = Limits::new(&engine, machine.read_bandwidth, &peaks);
        let rate = |(work, depth, batch, rates, bandwidths): (&'static str, usize, usize, Vec<f64>, Vec<f64>)| {
            let tokens = if work == "prompt" { args.prompt } else { args.generate };
            let (limit, most) = match work {
                "prompt" => ("arithmetic", limits.prompt),
                _ => limits.generation(batch, depth + tokens / 2),
            };
            // Each repetition is held against what memory gave right before and after it: on a machine that is shared it
            // may be half as much a moment later.
            let shares: Vec<f64> = match most {
                Some(most) if bandwidths.len() == rates.len() => {
                    let at = |bandwidth| limits.at(bandwidth).generation(batch, depth + tokens / 2).1.unwrap_or(most);
                    rates.iter().zip(&bandwidths).map(|(rate, &bandwidth)| rate / at(bandwidth)).collect()
                }
                Some(most) => rates.iter().map(|rate| rate / most).collect(),
                None => Vec::new(),
            };
            let share = (!shares.is_empty()).then(|| spread(shares).1);
            let (slowest, median, fastest) = spread(rates);
            Rate { work, tokens, depth, batch, tokens_per_second: median, slowest, fastest, limit, share }
        };
        let rates = measured.into_iter().map(rate).collect();
        runs.push(Run { threads: engine.threads(), load_seconds, machine, rates });
    }
    meter.bar.finish();
    let report = Report { model: path.display().to_string(), isa, runs };
    if args.json { print_json(&report) } else { print(&report) }
}

/// How many of the tokens to be measured are done.
struct Meter {
    bar: Progress,
    done: usize,
}

impl Meter {
    fn add(&mut self, tokens: usize) {
        self.done += tokens;
        self.bar.at(self.done as u64, "");
    }
}

/// Fixed ids all over the vocabulary: every run and every program can be given the same.
fn fixed_ids(count: usize, vocabulary: usize) -> Vec<u32> {
    (0..count as u64).map(|i| ((i * 7919 + 13) % vocabulary as u64) as u32).collect()
}

/// A turn that is not measured, with as much of the prompt as llama-bench warms up with: pages and buffers are there
/// afterwards.
fn warm(engine: &mut Engine, ids: &[u32], prompt: usize) -> Result<()> {
    engine.prompt(0, &ids[..prompt.clamp(1, 512)], &mut |_| true)?;
    engine.truncate(0, 0);
    engine.step(&[(0, ids[0])])?;
    engine.truncate(0, 0);
    Ok(())
}

/// Fills `slot` up to `depth` tokens.
fn fill(engine: &mut Engine, slot: usize, ids: &[u32], depth: usize, meter: &mut Meter) -> Result<()> {
    engine.truncate(slot, depth);
    let held = engine.len(slot);
    if held < depth {
        engine.prompt(slot, &ids[held..depth], &mut |_| {
            meter.add(0);
            true
        })?;
    }
    Ok(())
}

/// Tokens a second of each repetition of a prompt behind `depth` tokens.
fn prompt(engine: &mut Engine, ids: &[u32], depth: usize, args: &Args, meter: &mut Meter) -> Result<Vec<f64>> {
    let mut rates = Vec::new();
    for _ in 0..args.repetitions {
        fill(engine, 0, ids, depth, meter)?;
        let (start, mut told) = (Instant::now(), 0);
        engine.prompt(0, &ids[depth..depth + args.prompt], &mut |read| {
            meter.add(read - told);
            told = read;
            true
        })?;
        rates.push(args.prompt as f64 / start.elapsed().as_secs_f64());
    }
    Ok(rates)
}

/// Tokens a second of `batch` sequences together, each behind `depth` tokens; and the bytes a second that memory gave
/// around each repetition.
fn generation(
    engine: &mut Engine,
    ids: &[u32],
    depth: usize,
    batch: usize,
    args: &Args,
    meter: &mut Meter,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let (mut rates, mut bandwidths) = (Vec::new(), Vec::new());
    let mut before = engine.cpu().read_bandwidth();
    for _ in 0..args.repetitions {
        for slot in 0..batch {
            fill(engine, slot, ids, depth, meter)?;
        }
        let start = Instant::now();
        // Told seldom: to draw a bar takes time, too.
        for ids in ids[depth..depth + args.generate].chunks(32) {
            for &id in ids {
                let next: Vec<(usize, u32)> = (0..batch).map(|slot| (slot, id)).collect();
                engine.step(&next)?;
            }
            meter.add(batch * ids.len());
        }
        rates.push((batch * args.generate) as f64 / start.elapsed().as_secs_f64());
        let after = engine.cpu().read_bandwidth();
        bandwidths.push((before + after) / 2.0);
        before = after;
    }
    for slot in 0..batch {
        engine.truncate(slot, depth);
    }
    Ok((rates, bandwidths))
}

/// What the machine allows a model.
#[derive(Clone, Copy)]
struct Limits {
    bandwidth: f64,
    /// Bytes of the weights that a token meets, and of the cache for each position.
    weights: f64,
    position: f64,
    /// Tokens of a prompt a second.
    prompt: Option<f64>,
    /// Generated tokens a second that arithmetic allows.
    steps: Option<f64>,
}

impl Limits {
    fn new(engine: &Engine, bandwidth: f64, peaks: &PeakArithmetic) -> Limits {
        let model = engine.model();
        // A token goes through a few of the experts, and sequences that say the same through the same.
        let used = |l: &Linear| match (l.role.expert(), &model.spec.layers[l.layer].experts) {
            (Some(_), Some(experts)) => experts.used as f64 / experts.count as f64,
            _ => 1.0,
        };
        let weights = |l: &Linear| (l.weight().rows() * l.weight().cols()) as f64 * used(l);
        let all = 2.0 * model.linears().map(weights).sum::<f64>();
        // The head works on the prompt's last token alone.
        let layers = all - 2.0 * weights(&model.head);
        let prompts = match (model.is_float(), engine.cpu().prompts_in_bf16()) {
            (true, _) => peaks.f32,
            (false, true) => peaks.bf16,
            (false, false) => peaks.int8,
        };
        Limits {
            bandwidth,
            weights: model.linears().map(|l| l.weight().data().len() as f64 * used(l)).sum(),
            position: engine.memory().kv_per_token as f64,
            prompt: prompts.map(|peak| peak / layers),
            steps: if model.is_float() { peaks.f32 } else { peaks.int8 }.map(|peak| peak / all),
        }
    }

    /// The same with memory of another speed.
    fn at(self, bandwidth: f64) -> Limits {
        Limits { bandwidth, ..self }
    }

    /// What bounds `batch` sequences of `context` tokens each, and at how many tokens a second.
    fn generation(&self, batch: usize, context: usize) -> (&'static str, Option<f64>) {
        let batch = batch as f64;
        let reads = batch * self.bandwidth / (self.weights + batch * context as f64 * self.position);
        match self.steps {
            Some(steps) if steps < reads => ("arithmetic", Some(steps)),
            _ => ("bandwidth", Some(reads)),
        }
    }
}

/// The slowest, the median and the fastest.
fn spread(mut rates: Vec<f64>) -> (f64, f64, f64) {
    rates.sort_by(f64::total_cmp);
    let middle = rates.len() / 2;
    let median = if rates.len() % 2 == 1 { rates[middle] } else { (rates[middle - 1] + rates[middle]) / 2.0 };
    (rates[0], median, rates[rates.len() - 1])
}

fn print(report: &Report) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for run in &report.runs {
        let Run { threads, load_seconds, machine, .. } = run;
        writeln!(out, "{} on {threads} threads ({}), ready in {load_seconds:.2} s", report.model, report.isa)?;
        write!(out, "limits: reads {}/s", size(machine.read_bandwidth as u64))?;
        let peaks = &machine.peak_arithmetic;
        for (name, peak) in [("int8", peaks.int8), ("bf16", peaks.bf16), ("f32", peaks.f32)] {
            if let Some(peak) = peak {
                write!(out, ", {name} {:.2} TOP/s", peak / 1e12)?;
            }
        }
        writeln!(out)?;
        for rate in &run.rates {
            let depth = if rate.depth > 0 { format!(" after {}", rate.depth) } else { String::new() };
            let batch = if rate.batch > 1 { format!(" x {} sequences", rate.batch) } else { String::new() };
            let share = rate.share.map_or(String::new(), |s| format!(", {:.0} % of the {}", 100.0 * s, rate.limit));
            writeln!(
                out,
                "{:<10} {:>5} tokens{batch}{depth}: {:.1} tokens/s ({:.1} to {:.1}){share}",
                rate.work, rate.tokens, rate.tokens_per_second, rate.slowest, rate.fastest
            )?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_count_as_far_as_tokens_meet_them() {
        let shared = std::env::var_os("RUSHLIGHT_SHARED").map(PathBuf::from);
        let shared = shared.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../shared").into());
        let path = shared.join("fixtures/families/mixtral");
        if !path.exists() {
            println!("skipped: no reference data at {}", path.display());
            return;
        }
        let engine = Engine::open(&path, &Options { threads: Some(1), ..Options::default() }).unwrap();
        let peaks = PeakArithmetic { int8: None, bf16: None, f32: Some(1e12) };
        let limits = Limits::new(&engine, 1e9, &peaks);
        let met = |l: &&Linear| l.role.expert().is_none_or(|i| i < 2);
        let weights: usize = engine.model().linears().filter(met).map(|l| l.weight.rows() * l.weight.cols()).sum();
        assert_eq!(engine.spec().layers[0].experts.as_ref().map(|e| e.used), Some(2));
        assert_eq!(limits.weights, 4.0 * weights as f64);
        assert_eq!(limits.steps, Some(1e12 / (2.0 * weights as f64)));
    }
}
