//! `rushlight quantize`: a smaller file of a model.

use super::options::read_text;
use super::{Global, Interrupted, Progress, Usage, interrupt, print_json, size};
use crate::calibrate::gptq;
use crate::calibrate::sensitivity::measure;
use crate::calibrate::text::{self, BUILT_IN};
use crate::quantize::allocate::fit;
use crate::quantize::memory::{parse_size, total};
use crate::quantize::name::Naming;
use crate::quantize::output;
use crate::quantize::plan::{GivenImatrix, Plan};
use crate::quantize::scratch::{Fingerprint, Scratch};
use crate::quantize::types::{Keep, Target, Wishes, parse_format};
use crate::quantize::write::{Options, Stopped, write};
use crate::store::Store;
use anyhow::{Context, Result};
use rushlight_models::checkpoint::Checkpoint;
use rushlight_models::checkpoint::imatrix::Imatrix;
use rushlight_models::model::Model;
use rushlight_models::tokenizer::Tokenizer;
use rushlight_quant::formats::Format;
use rushlight_quant::physical_cores;
use rushlight_quant::quantize::GptqOptions;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Make a model smaller: write it as GGUF with fewer bits to a weight
///
/// Takes GGUF of any type and Hugging Face directories; what it writes runs in rushlight and in llama.cpp. The mixes
/// (Q4_K_M and the like) are those of llama.cpp. A type that does not fit a tensor's rows gives way to the nearest that
/// does. The file gets its name when it is whole; a GGUF file of that name is replaced then.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A .gguf file, a Hugging Face directory, or a name in the store
    model: String,
    /// The file to write, or a folder (then it is named by GGML's convention, such as
    /// Name-1.5B-Instruct-v1.0-Q4_K_M.gguf). Default: NAME-TYPE in the store for a model of the store, or else a file
    /// named by the convention beside MODEL
    #[arg(short, long, value_name = "OUT")]
    output: Option<PathBuf>,
    /// F32 F16 BF16 Q8_0 Q6_K Q5_1 Q5_0 Q5_K_M Q5_K_S Q4_1 Q4_K_M Q4_K_S Q4_0 IQ4_NL IQ4_XS MXFP4_MOE Q3_K_L Q3_K_M
    /// Q3_K_S Q2_K Q2_K_S. Default: Q4_K_M, or for a GPTQ, AWQ or LLM.int8 checkpoint the type that keeps its codes
    #[arg(short, long = "type", value_name = "TYPE", value_parser = Target::parse)]
    target: Option<Target>,
    /// Choose a format for each matrix, so that the least is lost with this many bits per weight; --type counts for the
    /// embedding only. Which matrices matter is measured
    #[arg(long, value_name = "BITS", conflicts_with = "size", value_parser = bits)]
    bpw: Option<f64>,
    /// The same, for a file of at most this size, such as 3.5GB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
    /// How codes are chosen. rtn: to the nearest. gptq: layer by layer so that outputs change least on a calibration
    /// text, which takes far longer and loses far less
    #[arg(long, value_enum, default_value_t = Method::Rtn)]
    method: Method,
    /// The text that GPTQ calibrates on, instead of the built-in one with texts that the model writes itself
    #[arg(long, value_name = "FILE")]
    calib: Option<PathBuf>,
    /// How important each column is: a file of `rushlight imatrix` or llama.cpp's llama-imatrix (GGUF or .dat)
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// The format of tensors whose GGUF name has PATTERN (a regular expression), such as 'ffn_down=Q6_K'; may be
    /// repeated, the first that fits counts
    #[arg(long, value_name = "PATTERN=FORMAT", value_parser = Keep::parse)]
    keep: Vec<Keep>,
    /// The format of the output matrix
    #[arg(long = "output-type", value_name = "FORMAT", value_parser = parse_format)]
    output_type: Option<Format>,
    /// The format of the token embedding
    #[arg(long, value_name = "FORMAT", value_parser = parse_format)]
    token_embedding_type: Option<Format>,
    /// No mix: the type itself for every matrix
    #[arg(long)]
    pure: bool,
    /// Only show what would be written
    #[arg(long)]
    dry_run: bool,
    /// Threads (default: the physical cores)
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Memory that may be used, such as 4GB (default: half of the machine's)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Method {
    Rtn,
    Gptq,
}

#[derive(Serialize)]
struct Summary {
    path: PathBuf,
    #[serde(rename = "type")]
    target: &'static str,
    tensors: usize,
    parameters: u64,
    /// Bytes of all tensors, before and after.
    bytes_before: u64,
    bytes: u64,
    bits_per_weight_before: f64,
    bits_per_weight: f64,
    formats: Vec<FormatSummary>,
    notes: Vec<String>,
    /// `None` when nothing was written.
    seconds: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    plan: Vec<TensorSummary>,
}

#[derive(Serialize)]
struct FormatSummary {
    format: &'static str,
    tensors: usize,
    parameters: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct TensorSummary {
    name: String,
    shape: Vec<usize>,
    from: &'static str,
    to: &'static str,
}

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    let started = Instant::now();
    let store = Store::open()?;
    let source = store.resolve(&args.model)?;
    let checkpoint = Checkpoint::open(&source)?;
    let imatrix =
        args.imatrix.as_deref().map(|path| Ok::<_, anyhow::Error>((path, Imatrix::read(path)?))).transpose()?;
    let given = imatrix.as_ref().map(|(path, imatrix)| GivenImatrix { path, imatrix });
    let wishes = Wishes {
        keep: args.keep.clone(),
        output: args.output_type,
        embedding: args.token_embedding_type,
        pure: args.pure,
    };
    let target = args.target.unwrap_or_else(|| Target::natural(&checkpoint));
    let mut plan = Plan::new(&checkpoint, target, &wishes, given.as_ref())?;
    let parameters = plan.tensors.iter().map(|t| t.elements() as u64).sum();
    let stop = interrupt::flag(true);
    let budget = match (args.bpw, args.size) {
        (Some(bits), _) => Some((bits * parameters as f64 / 8.0) as u64),
        (None, Some(size)) => Some(size.saturating_sub(plan.description_bytes())),
        (None, None) => None,
    };
    if let Some(budget) = budget {
        let chosen = choose_formats(args, global, &mut plan, &checkpoint, budget, &stop);
        chosen.map_err(|e| if e.is::<Stopped>() { Interrupted.into() } else { e })?;
    }
    let naming = Naming::of(&plan.metadata, &source, parameters);
    let path = output::choose(args.output.as_deref(), &args.model, &source, &naming, target.name, &store)?;
    if !args.dry_run {
        // A folder that was asked for, and a name in it chosen here.
        if let (Some(asked), Some(folder)) = (&args.output, path.parent())
            && *asked != path
        {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        output::check(&path, &checkpoint)?;
    }
    let memory = args.memory.unwrap_or_else(|| total() / 2);
    if memory < 32 << 20 {
        return Err(Usage(format!("--memory {}: at least 32 MB are needed", size(memory))).into());
    }
    let mut summary = summarize(&plan, path, parameters, args.dry_run);
    if !args.dry_run {
        if !global.quiet {
            for note in &plan.notes {
                writeln!(std::io::stderr(), "note: {note}").ok();
            }
        }
        let threads = args.threads.map_or_else(physical_cores, NonZeroUsize::get);
        let result = make(args, global, &plan, &checkpoint, &summary, memory, threads, &stop);
        result.map_err(|e| if e.is::<Stopped>() { Interrupted.into() } else { e })?;
        summary.seconds = Some(started.elapsed().as_secs_f64());
    }
    if args.json { print_json(&summary) } else { print(&summary) }
}

/// `4.25`, of bits per weight.
fn bits(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|n| (1.0..=16.0).contains(n));
    number.ok_or_else(|| format!("'{}' is not a number of bits from 1 to 16", text.escape_debug()))
}

fn tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer> {
    Ok(match checkpoint.metadata() {
        Some(metadata) => Tokenizer::from_gguf(metadata, checkpoint.path())?,
        None => Tokenizer::from_dir(checkpoint.path())?,
    })
}

/// Has `plan` give each matrix the format that loses least within `budget` bytes.
fn choose_formats(
    args: &Args,
    global: &Global,
    plan: &mut Plan,
    checkpoint: &Checkpoint,
    budget: u64,
    stop: &AtomicBool,
) -> Result<()> {
    /// Tokens that the measurement reads: it goes over them about a hundred times.
    const TOKENS: usize = 256;
    let model = Model::load(checkpoint)?;
    let built_in = || Ok::<_, anyhow::Error>((BUILT_IN.to_owned(), "the built-in text".to_owned()));
    let (text, name) =
        args.calib.as_deref().map_or_else(built_in, |path| Ok((read_text(path)?, path.display().to_string())))?;
    let all = text::sequences(&tokenizer(checkpoint)?, &text, &name, (TOKENS / 4).min(text::length(&model)))?;
    let some: Vec<Vec<u32>> = (0..4).map(|i| all[(2 * i + 1) * all.len() / 8].clone()).collect();
    let mut progress = None;
    let threads = args.threads.map(NonZeroUsize::get);
    let sensitivity = measure(model.clone(), threads, &some, stop, &mut |done, of| {
        let bar = progress.get_or_insert_with(|| Progress::count(global.quiet, "measuring", of as u64));
        bar.at(done as u64, "");
    })?;
    fit(plan, &model, &sensitivity, budget, &|name| args.keep.iter().any(|keep| keep.pattern.is_match(name)))
}

/// Writes the file; with GPTQ, what is finished lies beside it until then.
fn make(
    args: &Args,
    global: &Global,
    plan: &Plan,
    checkpoint: &Checkpoint,
    summary: &Summary,
    memory: u64,
    threads: usize,
    stop: &AtomicBool,
) -> Result<()> {
    let scratch = match args.method {
        Method::Rtn => None,
        Method::Gptq => Some(calibrated(args, global, plan, checkpoint, &summary.path, memory, stop)?),
    };
    let options = Options { threads, memory, stop, scratch: scratch.as_ref() };
    let mut progress = Progress::bytes(global.quiet, "quantizing", summary.bytes_before, 0);
    write(plan, checkpoint, &summary.path, &options, &mut |done| progress.at(done, ""))?;
    progress.finish();
    scratch.map_or(Ok(()), Scratch::remove)
}

/// The scratch folder with every linear layer quantized by GPTQ.
fn calibrated(
    args: &Args,
    global: &Global,
    plan: &Plan,
    checkpoint: &Checkpoint,
    output: &Path,
    memory: u64,
    stop: &AtomicBool,
) -> Result<Scratch> {
    let text = args.calib.as_deref().map(|path| Ok::<_, anyhow::Error>((read_text(path)?, path))).transpose()?;
    let name = text.as_ref().map(|(_, path)| path.display().to_string()).unwrap_or_default();
    let options = gptq::Options {
        text: text.as_ref().map(|(text, _)| (text.as_str(), name.as_str())),
        threads: args.threads.map(NonZeroUsize::get),
        memory,
        stop,
        gptq: GptqOptions::default(),
    };
    let tokenizer = tokenizer(checkpoint)?;
    options.check(&tokenizer)?;
    let formats: Vec<String> = plan.tensors.iter().map(|t| format!("{} {}", t.source.name, t.format)).collect();
    let fingerprint = Fingerprint::default()
        .with("method", "gptq")
        .with("type", plan.target.name)
        .with("formats", hash(formats.join("\n")))
        .with_files("source", checkpoint.path())?;
    let scratch = Scratch::open(output, &options.fingerprint(fingerprint))?;
    // In thousandths, for the time left.
    let (mut writing, mut layers) = (None, None);
    gptq::quantize(checkpoint, &tokenizer, plan, &scratch, &options, &mut |at| match at {
        gptq::Progress::Writing(step, of) => {
            let bar = writing.get_or_insert_with(|| Progress::count(global.quiet, "writing a text", of as u64));
            bar.at(step as u64, "");
        }
        gptq::Progress::Layers(state) => {
            writing = None;
            let at = |done: u64| (u128::from(done) * 1000 / u128::from(state.total.max(1))) as u64;
            let new = || Progress::share(global.quiet, "GPTQ", 1000, at(state.done));
            layers.get_or_insert_with(new).at(at(state.done), &format!("GPTQ, layer {}", state.layer));
        }
    })?;
    Ok(scratch)
}

fn hash(text: String) -> String {
    Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn summarize(plan: &Plan, path: PathBuf, parameters: u64, each: bool) -> Summary {
    let mut formats: Vec<FormatSummary> = Vec::new();
    for tensor in &plan.tensors {
        let format = tensor.format.name();
        let at = formats.iter().position(|f| f.format == format).unwrap_or_else(|| {
            formats.push(FormatSummary { format, tensors: 0, parameters: 0, bytes: 0 });
            formats.len() - 1
        });
        formats[at].tensors += 1;
        formats[at].parameters += tensor.elements() as u64;
        formats[at].bytes += tensor.bytes().0;
    }
    formats.sort_by_key(|f| std::cmp::Reverse(f.bytes));
    let (bytes, bytes_before) = plan.bytes();
    let bits = |bytes: u64| bytes as f64 * 8.0 / parameters.max(1) as f64;
    let tensors = plan.tensors.iter().map(|t| TensorSummary {
        name: t.source.name.clone(),
        shape: t.source.shape.clone(),
        from: t.source.format.name(),
        to: t.format.name(),
    });
    Summary {
        path,
        target: plan.target.name,
        tensors: plan.tensors.len(),
        parameters,
        bytes_before,
        bytes,
        bits_per_weight_before: bits(bytes_before),
        bits_per_weight: bits(bytes),
        formats,
        notes: plan.notes.clone(),
        seconds: None,
        plan: if each { tensors.collect() } else { Vec::new() },
    }
}

fn print(summary: &Summary) -> Result<()> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for t in &summary.plan {
        let shape: Vec<String> = t.shape.iter().map(usize::to_string).collect();
        writeln!(out, "{:40} {:>16}  {} -> {}", t.name.escape_debug().to_string(), shape.join(" x "), t.from, t.to)?;
    }
    if !summary.plan.is_empty() {
        for note in &summary.notes {
            writeln!(out, "note: {note}")?;
        }
    }
    for f in &summary.formats {
        let share = 100.0 * f.bytes as f64 / summary.bytes.max(1) as f64;
        writeln!(out, "{:8} {:>5} tensors {:>9} {share:>5.1} %", f.format, f.tensors, size(f.bytes))?;
    }
    let (before, after) = (size(summary.bytes_before), size(summary.bytes));
    let (bits_before, bits) = (summary.bits_per_weight_before, summary.bits_per_weight);
    writeln!(out, "{before} -> {after}, {bits_before:.2} -> {bits:.2} bits per weight")?;
    let path = summary.path.display();
    match summary.seconds {
        Some(seconds) => writeln!(out, "{path} ({}) in {seconds:.1} s", summary.target)?,
        None => writeln!(out, "would write {path} ({})", summary.target)?,
    }
    Ok(out.flush()?)
}
