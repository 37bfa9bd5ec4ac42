//! `rushlight quantize`: a smaller file of a model.

mod directory;
mod summary;

use self::summary::{Summary, print, summarize};
use super::options::read_text;
use super::{Global, Interrupted, Progress, Usage, interrupt, print_json, size};
use crate::calibrate::compare::{Chunks, compare};
use crate::calibrate::{gptq, sensitivity, text};
use crate::engine::{Engine, model};
use crate::quantize::allocate::fit;
use crate::quantize::directory::Weights;
use crate::quantize::memory::{parse_size, total};
use crate::quantize::name::Naming;
use crate::quantize::output;
use crate::quantize::plan::{GivenImatrix, Plan, Planned};
use crate::quantize::report::{self, Compared, Report};
use crate::quantize::scratch::{Fingerprint, Scratch};
use crate::quantize::types::{Keep, Target, Wishes, parse_format};
use crate::quantize::write::{Options, Stopped, write};
use crate::replace;
use crate::store::Store;
use anyhow::{Context, Result, anyhow, ensure};
use rushlight_models::checkpoint::Checkpoint;
use rushlight_models::checkpoint::imatrix::Imatrix;
use rushlight_models::tokenizer::Tokenizer;
use rushlight_quant::formats::Format;
use rushlight_quant::physical_cores;
use rushlight_quant::quantize::GptqOptions;
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
    /// Q3_K_S Q2_K Q2_K_S. Default: Q4_K_M, or for a GPTQ, AWQ or LLM.int8 checkpoint the type that keeps its codes,
    /// with embedding and output matrix in Q8_0. int2, int3, int4, int8 (by GPTQ, as GPTQModel and transformers load it)
    /// and nf4 (as bitsandbytes does) make a Hugging Face directory
    #[arg(short, long = "type", value_name = "TYPE", value_parser = Type::parse)]
    target: Option<Type>,
    /// For int2 to int8: inputs that share a scale, or -1 for whole rows. Default: 128
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..=1 << 20))]
    group_size: Option<i64>,
    /// For int2 to int8: groups have a zero point of their own (and a directory of GPTQ's second version)
    #[arg(long, conflicts_with = "sym")]
    asym: bool,
    /// For int2 to int8: codes lie evenly around zero. The default
    #[arg(long)]
    sym: bool,
    /// For int2 to int8: columns go into groups in the order in which GPTQ visits them, those that matter most first
    #[arg(long, visible_alias = "desc-act")]
    act_order: bool,
    /// Choose a format for each tensor, so that the file takes at most SIZE, such as 3.5GB, and loses the least: what the
    /// rounding of each tensor does to the model's predictions is measured first
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with_all = ["target", "bpw", "pure"])]
    size: Option<u64>,
    /// The same with so many bits to a weight, such as 4.25
    #[arg(long, value_name = "BITS", value_parser = parse_bits, conflicts_with_all = ["target", "pure"])]
    bpw: Option<f64>,
    /// How codes are chosen. rtn: to the nearest. gptq: layer by layer so that outputs change least on a calibration
    /// text, which takes far longer and loses far less
    #[arg(
        long,
        value_enum,
        default_value = "rtn",
        default_value_if("target", "int2", "gptq"),
        default_value_if("target", "int3", "gptq"),
        default_value_if("target", "int4", "gptq"),
        default_value_if("target", "int8", "gptq")
    )]
    method: Method,
    /// The text that GPTQ, --size and --bpw calibrate on, instead of the built-in one with texts that the model writes itself
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
    /// Compare the new model with the original and write a page on it: perplexity, KL divergence, the error of each
    /// tensor. With --json the figures are in the object too
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// The text that --report compares on, instead of the built-in one
    #[arg(long, value_name = "FILE", requires = "report")]
    report_text: Option<PathBuf>,
    /// Only show what would be written
    #[arg(long)]
    dry_run: bool,
    /// Threads (default: the physical cores)
    #[arg(long, value_name = "N", value_parser = super::options::threads)]
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

/// What `--type` names.
#[derive(Clone, Copy, Debug)]
enum Type {
    Gguf(Target),
    Directory(Weights),
}

impl Type {
    fn parse(name: &str) -> Result<Type, String> {
        match Weights::parse(name) {
            Some(weights) => Ok(Type::Directory(weights)),
            None => Target::parse(name).map(Type::Gguf).map_err(|e| format!("{e} int8 int4 int3 int2 nf4")),
        }
    }
}

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    let started = Instant::now();
    let store = Store::open()?;
    let source = store.resolve(&args.model)?;
    let checkpoint = Checkpoint::open(&source)?;
    checkpoint.expect_model()?;
    let named = match args.target {
        Some(Type::Directory(weights)) => return directory::run(args, global, &checkpoint, weights, started),
        Some(Type::Gguf(target)) => Some(target),
        None => None,
    };
    let integers = [
        ("--group-size", args.group_size.is_some()),
        ("--asym", args.asym),
        ("--sym", args.sym),
        ("--act-order", args.act_order),
    ];
    if let Some((option, _)) = integers.iter().find(|(_, given)| *given) {
        return Err(Usage(format!("{option} is for the types int2, int3, int4 and int8")).into());
    }
    let imatrix =
        args.imatrix.as_deref().map(|path| Ok::<_, anyhow::Error>((path, Imatrix::read(path)?))).transpose()?;
    let given = imatrix.as_ref().map(|(path, imatrix)| GivenImatrix { path, imatrix });
    let fitting = args.size.is_some() || args.bpw.is_some();
    let natural = if fitting { None } else { Target::natural(&checkpoint) };
    let default = if fitting { Target::MIX } else { Target::DEFAULT };
    let target = named.or(natural).unwrap_or(default);
    // A type that was chosen to change nothing should not spoil what the other tool has left in floats either.
    let fine = (args.target.is_none() && natural.is_some()).then_some(Format::Q8_0);
    let wishes = Wishes {
        keep: args.keep.clone(),
        output: args.output_type.or(fine),
        embedding: args.token_embedding_type.or(fine),
        pure: args.pure,
    };
    let mut plan = Plan::new(&checkpoint, target, &wishes, given.as_ref())?;
    let parameters = plan.tensors.iter().map(|t| t.elements() as u64).sum();
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
        if let Some(page) = &args.report {
            replace::check(page, "a report", |page| replace::begins(page, b"<!doctype html"))?;
            if std::path::absolute(page)? == std::path::absolute(&path)? {
                return Err(Usage(format!("--report {}: the model is written there", page.display())).into());
            }
        }
    }
    let report_text = args.report_text.as_deref().map(read_text).transpose()?;
    let stop = interrupt::flag(true);
    let memory = args.memory.unwrap_or_else(|| total() / 2);
    if memory < 32 << 20 {
        return Err(Usage(format!("--memory {}: at least 32 MB are needed", size(memory))).into());
    }
    if fitting {
        let fitted = fitted(args, global, &mut plan, &checkpoint, parameters, &stop);
        fitted.map_err(|e| if e.is::<Stopped>() { Interrupted.into() } else { e })?;
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
        if let Some(page) = &args.report {
            let report = reported(args, global, &plan, checkpoint, &summary, threads, report_text.as_deref())?;
            report.write(page)?;
            summary.report = Some(report);
        }
    }
    if args.json { print_json(&summary) } else { print(&summary) }
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
    let formats: Vec<String> = plan.tensors.iter().map(|t| format!("{} {}", t.source.name, t.format)).collect();
    let fingerprint = Fingerprint::default().with("type", plan.target.name).with("formats", hash(formats.join("\n")));
    let run: &mut RunGptq<'_> =
        &mut |tokenizer, scratch, options, at| gptq::quantize(checkpoint, tokenizer, plan, scratch, options, at);
    with_gptq(args, global, fingerprint, GptqOptions::default(), checkpoint, output, memory, stop, run)
}

/// What runs GPTQ once all that it needs is at hand.
type RunGptq<'a> =
    dyn FnMut(&Tokenizer, &Scratch, &gptq::Options<'_>, &mut dyn FnMut(gptq::Progress)) -> Result<()> + 'a;

/// Has `run` fill the scratch folder of `output` by GPTQ with the settings `gptq`. It may hold what an earlier run of the same `fingerprint` finished.
fn with_gptq(
    args: &Args,
    global: &Global,
    fingerprint: Fingerprint,
    gptq: GptqOptions,
    checkpoint: &Checkpoint,
    output: &Path,
    memory: u64,
    stop: &AtomicBool,
    run: &mut RunGptq<'_>,
) -> Result<Scratch> {
    let text = args.calib.as_deref().map(|path| Ok::<_, anyhow::Error>((read_text(path)?, path))).transpose()?;
    let name = text.as_ref().map(|(_, path)| path.display().to_string()).unwrap_or_default();
    let options = gptq::Options {
        text: text.as_ref().map(|(text, _)| (text.as_str(), name.as_str())),
        threads: args.threads.map(NonZeroUsize::get),
        memory,
        stop,
        gptq,
    };
    let tokenizer = Tokenizer::of(checkpoint)?;
    options.check(&tokenizer)?;
    let fingerprint = fingerprint.with("method", "gptq").with_files("source", checkpoint.path())?;
    let scratch = Scratch::open(output, &options.fingerprint(fingerprint))?;
    // In thousandths, for the time left.
    let (mut writing, mut layers) = (None, None);
    run(&tokenizer, &scratch, &options, &mut |at| match at {
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

/// Reads the bits of `--bpw`.
fn parse_bits(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(bits) if (1.0..=32.0).contains(&bits) => Ok(bits),
        _ => Err(format!("'{}' is not a number of bits: give one such as 4.25", text.escape_debug())),
    }
}

/// Gives each matrix of `plan` the format by which the model loses least at the size that was asked for.
fn fitted(
    args: &Args,
    global: &Global,
    plan: &mut Plan,
    checkpoint: &Checkpoint,
    parameters: u64,
    stop: &AtomicBool,
) -> Result<()> {
    let plan_overhead = plan.overhead();
    let budget = match (args.size, args.bpw) {
        (Some(size), _) => size.saturating_sub(plan_overhead),
        (None, bits) => (bits.unwrap_or(16.0) * parameters as f64 / 8.0) as u64,
    };
    let own = |t: &Planned| match t.source.name.as_str() {
        name if args.keep.iter().any(|keep| keep.pattern.is_match(name)) => true,
        "output.weight" => args.output_type.is_some(),
        "token_embd.weight" => args.token_embedding_type.is_some(),
        _ => false,
    };
    let free = |t: &Planned| t.source.shape.len() == 2 && !t.format.is_float() && !own(t);
    let text = args.calib.as_deref().map(|path| Ok::<_, anyhow::Error>((read_text(path)?, path))).transpose()?;
    let text = text.as_ref().map(|(text, path)| (text.as_str(), path.display().to_string()));
    let text = text.as_ref().map(|(text, name)| (*text, name.as_str()));
    let free_choice = args.keep.is_empty() && args.output_type.is_none() && args.token_embedding_type.is_none();
    let with = if free_choice { "" } else { " with what --keep and its like ask for" };
    let too_small = |least: u64| match args.size {
        Some(wanted) => {
            let least = least + plan_overhead;
            anyhow!("--size {}: it does not fit, {} is the smallest possible{with}", size(wanted), size(least))
        }
        None => {
            let least = least as f64 * 8.0 / parameters as f64;
            anyhow!("--bpw: it does not fit, {least:.2} is the smallest possible{with}")
        }
    };
    // Known before anything is measured, which takes long.
    let least = sensitivity::least(plan, &free);
    ensure!(least <= budget, too_small(least));
    let mut bar = None;
    let threads = args.threads.map(NonZeroUsize::get);
    let measured = sensitivity::measure(
        checkpoint,
        &Tokenizer::of(checkpoint)?,
        text,
        plan,
        &free,
        threads,
        stop,
        &mut |done, of| {
            bar.get_or_insert_with(|| Progress::count(global.quiet, "measuring tensors", of as u64))
                .at(done as u64, "");
        },
    )?;
    drop(bar);
    let choices: Vec<_> = measured.iter().map(|m| m.choices.clone()).collect();
    let loss = fit(plan, &choices, budget).map_err(too_small)?;
    if args.imatrix.is_none() {
        for (tensor, measured) in plan.tensors.iter_mut().zip(measured) {
            tensor.importance = measured.importance.filter(|i| i.len() == tensor.cols() && !tensor.format.is_float());
        }
    }
    plan.notes.push(format!("formats were chosen tensor by tensor; the expected KL divergence is {loss:.5}"));
    Ok(())
}

/// What became of the model.
fn reported(
    args: &Args,
    global: &Global,
    plan: &Plan,
    checkpoint: Checkpoint,
    summary: &Summary,
    threads: usize,
    given: Option<&str>,
) -> Result<Report> {
    let source = checkpoint.path().display().to_string();
    let written = Checkpoint::open(&summary.path)?;
    let bar = std::sync::Mutex::new(Progress::count(global.quiet, "comparing tensors", plan.tensors.len() as u64));
    let tensors = report::errors(plan, &checkpoint, &written, threads, &|done| {
        bar.lock().unwrap_or_else(|e| e.into_inner()).at(done as u64, "");
    })?;
    drop(bar);
    // A vocabulary may be missing: then nothing can be said of texts.
    let comparison = match Tokenizer::of(&checkpoint) {
        Err(e) => {
            tracing::warn!("the report has no comparison of predictions: {e}");
            None
        }
        Ok(tokenizer) => {
            let name = args.report_text.as_ref().map_or("the built-in text".into(), |path| path.display().to_string());
            let ctx = checkpoint_context(&checkpoint)?;
            let chunks = Chunks::new(&tokenizer, given.unwrap_or(text::HELD_OUT), &name, ctx, Some(40))?;
            let options = model::Options { threads: Some(threads), context: Some(ctx), ..model::Options::default() };
            let mut original = Engine::from_checkpoint(checkpoint, &options)?;
            let mut other = Engine::from_checkpoint(written, &options)?;
            let mut bar = Progress::count(global.quiet, "comparing predictions", (chunks.count() * ctx) as u64);
            let comparison = compare(&mut original, &mut other, &chunks, &mut |read, _| bar.at(read as u64, ""))?;
            bar.finish();
            Some(Compared { text: name, comparison })
        }
    };
    Ok(Report {
        program: format!("rushlight {}", env!("CARGO_PKG_VERSION")),
        source,
        output: summary.path.display().to_string(),
        target: plan.target.name.into(),
        method: if args.method == Method::Gptq { "GPTQ".into() } else { "round to nearest".into() },
        bytes_before: summary.bytes_before,
        bytes_after: summary.bytes,
        bits_before: summary.bits_per_weight_before,
        bits_after: summary.bits_per_weight,
        tensors,
        comparison,
        notes: plan.notes.clone(),
    })
}

/// Tokens of a chunk that models are compared on.
fn checkpoint_context(checkpoint: &Checkpoint) -> Result<usize> {
    Ok(rushlight_models::families::recognise(checkpoint)?.1.context_length.min(512))
}
