//! `rushlight merge`: adapters made part of a model.

use super::options::adapter;
use super::{Global, Interrupted, Progress, Usage, interrupt, print_json, size};
use crate::merge::{attached, plan_directory, plan_gguf, write_directory};
use crate::quantize::memory::total;
use crate::quantize::name::Naming;
use crate::quantize::output;
use crate::quantize::plan::{GivenImatrix, Plan};
use crate::quantize::types::{Keep, Target, Wishes};
use crate::quantize::write::{Change, Options, Stopped, write};
use crate::store::Store;
use anyhow::{Context, Result, bail};
use rushlight_models::checkpoint::imatrix::Imatrix;
use rushlight_models::checkpoint::{Checkpoint, Kind};
use rushlight_quant::physical_cores;
use serde::Serialize;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

/// Fold adapters into the weights of a model
///
/// A Hugging Face directory becomes another one, with its tensors in the types they have, unless OUT ends with .gguf;
/// everything else becomes a GGUF file, F16 if --type does not say otherwise. With the type that a GGUF file already has,
/// tensors that no adapter changes keep their bytes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A .gguf file, a Hugging Face directory, or a name in the store
    model: String,
    /// An adapter, with its strength if that is not 1; may be repeated
    #[arg(long = "adapter", value_name = "A[=SCALE]", value_parser = adapter, required = true)]
    adapters: Vec<(PathBuf, f32)>,
    /// Where to write: a .gguf file, or a directory that is not there yet
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// The type to write: F16, BF16 or F32, for GGUF files also any that quantize has
    #[arg(long = "type", value_name = "TYPE", value_parser = Target::parse)]
    target: Option<Target>,
    /// How important each column is, for a quantized type: a file of `rushlight imatrix` or llama.cpp's llama-imatrix
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// The format of tensors whose name has PATTERN (a regular expression), such as 'ffn_down=Q6_K'; may be repeated
    #[arg(long, value_name = "PATTERN=FORMAT", value_parser = Keep::parse)]
    keep: Vec<Keep>,
    /// Threads (default: the physical cores)
    #[arg(short, long, value_name = "N", value_parser = super::options::threads)]
    threads: Option<NonZeroUsize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Output {
    path: PathBuf,
    #[serde(rename = "type")]
    target: &'static str,
    tensors: usize,
    /// Those that an adapter has changed.
    merged: usize,
    /// Bytes of all tensors, before and after.
    bytes_before: u64,
    bytes: u64,
    /// The part of the change that the written weights have.
    kept: Option<f64>,
    notes: Vec<String>,
    seconds: f64,
}

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    let started = Instant::now();
    let store = Store::open()?;
    let source = store.resolve(&args.model)?;
    let checkpoint = Checkpoint::open(&source)?;
    let is_gguf = args.output.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("gguf"));
    let directory = matches!(checkpoint.kind(), Kind::HuggingFace { .. }) && !is_gguf;
    for path in args.adapters.iter().map(|(path, _)| path).chain(directory.then_some(&source)) {
        if std::fs::canonicalize(path).is_ok_and(|path| std::fs::canonicalize(&args.output).is_ok_and(|o| o == path)) {
            bail!("{} is what is read: write to another place", args.output.display());
        }
    }
    let stop = interrupt::flag(true);
    let threads = args.threads.map_or_else(physical_cores, NonZeroUsize::get);
    let options = Options { threads, memory: total() / 2, stop: &stop, scratch: None };
    let interrupted = |e: anyhow::Error| if e.is::<Stopped>() { Interrupted.into() } else { e };
    if directory {
        check_directory(args)?;
        let model = attached(&checkpoint, &args.adapters)?;
        let directory = plan_directory(&checkpoint, &model, args.target.map(|t| t.format), &args.keep)?;
        drop(model);
        let mut progress = begin(&directory.plan, global);
        let change =
            write_directory(&directory, &checkpoint, &args.output, &options, &mut |done| progress.at(done, ""))
                .map_err(interrupted)?;
        progress.finish();
        return tell(args, global, &directory.plan, change, args.output.clone(), started);
    }
    let target = match args.target {
        Some(target) => target,
        None => Target::parse("F16").map_err(Usage)?,
    };
    let imatrix =
        args.imatrix.as_deref().map(|path| Ok::<_, anyhow::Error>((path, Imatrix::read(path)?))).transpose()?;
    let given = imatrix.as_ref().map(|(path, imatrix)| GivenImatrix { path, imatrix });
    let model = attached(&checkpoint, &args.adapters)?;
    let wishes = Wishes { keep: args.keep.clone(), ..Wishes::default() };
    let plan = plan_gguf(&checkpoint, &model, target, &wishes, given.as_ref())?;
    drop(model);
    let parameters = plan.tensors.iter().map(|t| t.elements() as u64).sum();
    let naming = Naming::of(&plan.metadata, &source, parameters);
    let path = output::choose(Some(&args.output), &args.model, &source, &naming, target.name, &store)?;
    if let Some(folder) = path.parent().filter(|_| path != args.output) {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    output::check(&path, &checkpoint)?;
    let mut progress = begin(&plan, global);
    let change = write(&plan, &checkpoint, &path, &options, &mut |done| progress.at(done, "")).map_err(interrupted)?;
    progress.finish();
    tell(args, global, &plan, change, path, started)
}

/// Fails on options that a directory has no use for.
fn check_directory(args: &Args) -> Result<()> {
    let float = |format: rushlight_quant::formats::Format| format.is_float();
    let other = args.target.filter(|t| !float(t.format)).map(|t| t.name);
    let other = other.or(args.keep.iter().find(|k| !float(k.format)).map(|k| k.format.name()));
    if let Some(name) = other {
        let what = format!("{name} is a type of GGUF files, but {} will be a directory", args.output.display());
        return Err(Usage(format!("{what}: end its name with .gguf, or choose F16, BF16 or F32")).into());
    }
    if args.imatrix.is_some() {
        return Err(Usage("--imatrix is for quantized GGUF files, not for directories".into()).into());
    }
    Ok(())
}

fn begin(plan: &Plan, global: &Global) -> Progress {
    if !global.quiet {
        for note in &plan.notes {
            writeln!(std::io::stderr(), "note: {note}").ok();
        }
    }
    Progress::bytes(global.quiet, "merging", plan.bytes().1, 0)
}

/// Below this part of the change an adapter's work is hardly to be seen in the merged model.
const HARDLY: f64 = 0.8;

fn tell(args: &Args, global: &Global, plan: &Plan, change: Change, path: PathBuf, started: Instant) -> Result<()> {
    let (bytes, bytes_before) = plan.bytes();
    let kept = change.kept();
    let mut notes = plan.notes.clone();
    if let Some(kept) = kept.filter(|kept| *kept < HARDLY) {
        let note = format!(
            "of what the adapters change, {:.0} % is in the merged weights: the steps of {} are coarser than the rest. Keep the \
             adapter beside the model (--adapter), or choose --type Q8_0, or F16 and then `rushlight quantize --method gptq`, \
             whose codes work together",
            100.0 * kept.max(0.0),
            plan.target.name
        );
        if !global.quiet {
            writeln!(std::io::stderr(), "note: {note}").ok();
        }
        notes.push(note);
    }
    let summary = Output {
        target: plan.target.name,
        tensors: plan.tensors.len(),
        merged: plan.tensors.iter().filter(|t| t.fold.is_some()).count(),
        bytes_before,
        bytes,
        kept,
        notes,
        seconds: started.elapsed().as_secs_f64(),
        path,
    };
    if args.json {
        return print_json(&summary);
    }
    let mut out = std::io::stdout();
    let Output { merged, tensors, target, seconds, .. } = &summary;
    let kept = match kept {
        None => String::new(),
        // Rounding moves the weights, too, and here more than they do.
        Some(kept) if kept > 1.2 => ", the adapters change less than rounding does".into(),
        Some(kept) => format!(", {:.0} % of the change kept", 100.0 * kept.max(0.0)),
    };
    writeln!(out, "{merged} of {tensors} tensors merged, {} -> {}{kept}", size(bytes_before), size(bytes))?;
    Ok(writeln!(out, "{} ({target}) in {seconds:.1} s", summary.path.display())?)
}
