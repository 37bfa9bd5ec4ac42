//! Quantizing a Hugging Face directory to another one.

use super::{Args, Method, with_gptq};
use crate::calibrate::gptq::{Named, named_layers, quantize_groups};
use crate::calibrate::groups::Groups;
use crate::cli::{Global, Interrupted, Progress, Usage, interrupt, print_json, size};
use crate::quantize::directory::{Weights, check, gptq_grid, shape, write_gptq, write_rounded};
use crate::quantize::memory::total;
use crate::quantize::scratch::Fingerprint;
use crate::quantize::write::Stopped;
use anyhow::{Context, Result, bail};
use rushlight_models::checkpoint::Checkpoint;
use rushlight_models::checkpoint::export::{GptqWriter, Nf4Options, Original, write_nf4};
use rushlight_models::model::Model;
use rushlight_quant::quantize::{Fit, GptqOptions, Order, Variant};
use rushlight_quant::{Cpu, Isa, physical_cores};
use serde::Serialize;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

#[derive(Serialize)]
struct Output {
    path: PathBuf,
    #[serde(rename = "type")]
    weights: &'static str,
    /// Linear layers that were quantized.
    layers: usize,
    /// Bytes of all tensors, before and after.
    bytes_before: u64,
    bytes: u64,
    seconds: f64,
}

/// Runs the command for a type that makes a directory.
pub(super) fn run(
    args: &Args,
    global: &Global,
    checkpoint: &Checkpoint,
    weights: Weights,
    started: Instant,
) -> Result<()> {
    let Some(output) = &args.output else {
        return Err(Usage(format!("{} makes a directory: name it with -o", weights.name())).into());
    };
    let gguf_only = [
        ("--imatrix", args.imatrix.is_some()),
        ("--keep", !args.keep.is_empty()),
        ("--output-type", args.output_type.is_some()),
        ("--token-embedding-type", args.token_embedding_type.is_some()),
        ("--report", args.report.is_some()),
        ("--dry-run", args.dry_run),
    ];
    if let Some((option, _)) = gguf_only.iter().find(|(_, given)| *given) {
        return Err(Usage(format!("{option} is for GGUF files, not for {}", weights.name())).into());
    }
    let integers_only = [
        ("--asym", args.asym),
        ("--sym", args.sym),
        ("--act-order", args.act_order),
        ("--group-size", args.group_size.is_some()),
        ("--method gptq", args.method == Method::Gptq),
    ];
    if let (Weights::Nf4, Some((option, _))) = (weights, integers_only.iter().find(|(_, given)| *given)) {
        return Err(Usage(format!("{option} is for integer codes, not for nf4")).into());
    }
    if args.act_order && args.method == Method::Rtn {
        return Err(
            Usage("--act-order is an order in which GPTQ goes: leave one of it and --method rtn out".into()).into()
        );
    }
    check(weights, output)?;
    let original = Original::of(checkpoint)?;
    let mut layers = named_layers(&original, &Model::load(checkpoint)?);
    if layers.is_empty() {
        bail!("{}: no layer has a matrix of its own to quantize", checkpoint.path().display());
    }
    match weights {
        Weights::Integers(bits) => {
            integers(args, global, &original, output, &mut layers, bits)
                .map_err(|e| if e.is::<Stopped>() { Interrupted.into() } else { e })?;
        }
        Weights::Nf4 => {
            let mut progress = Progress::count(global.quiet, "quantizing", layers.len() as u64);
            let mut done = 0;
            let names: Vec<String> = layers.iter().map(|l| l.name.clone()).collect();
            write_nf4(&original, output, &names, Nf4Options { double: true }, &mut |_| {
                done += 1;
                progress.at(done, "");
            })?;
            progress.finish();
        }
    }
    let summary = Output {
        path: output.clone(),
        weights: weights.name(),
        layers: layers.len(),
        bytes_before: checkpoint.bytes(),
        bytes: std::fs::metadata(output.join("model.safetensors")).with_context(|| output.display().to_string())?.len(),
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json {
        return print_json(&summary);
    }
    let Output { layers, bytes_before, bytes, seconds, .. } = summary;
    let mut out = std::io::stdout();
    writeln!(out, "{layers} layers, {} -> {}", size(bytes_before), size(bytes))?;
    Ok(writeln!(out, "{} ({}) in {seconds:.1} s", output.display(), weights.name())?)
}

/// Integer codes.
fn integers(
    args: &Args,
    global: &Global,
    original: &Original<'_>,
    output: &Path,
    layers: &mut Vec<Named>,
    bits: u32,
) -> Result<()> {
    let group = match args.group_size.unwrap_or(128) {
        0 => return Err(Usage("--group-size 0: give a number of inputs, or -1".into()).into()),
        size => usize::try_from(size).unwrap_or(usize::MAX),
    };
    let groups = Groups { bits, group, symmetric: !args.asym };
    let grid = gptq_grid(groups, args.act_order);
    // Layers that fill no whole words stay as they are, as other tools' readers expect of such.
    let holds = |l: &Named| shape(original, &l.name).is_ok_and(|(rows, cols)| grid.holds(rows, cols));
    let (whole, odd): (Vec<Named>, Vec<Named>) = std::mem::take(layers).into_iter().partition(holds);
    *layers = whole;
    let source = original.checkpoint().path().display();
    match (&odd[..], &layers[..]) {
        ([], _) => {}
        (_, []) => bail!("{source}: no layer has rows and columns that {bits}-bit codes fill whole words with"),
        ([first, ..], _) if !global.quiet => {
            let (odd, name) = (odd.len(), &first.name);
            let what = "stay in floating point: their rows or columns do not fill whole words";
            writeln!(std::io::stderr(), "note: {odd} layers, such as {name}, {what}").ok();
        }
        _ => {}
    }
    let names: Vec<String> = layers.iter().map(|l| l.name.clone()).collect();
    // What cannot be written is said before hours of work.
    let writer = GptqWriter::create(original, output, &names, grid)?;
    let stop = interrupt::flag(true);
    if args.method == Method::Rtn {
        let threads = args.threads.map_or_else(physical_cores, NonZeroUsize::get);
        let isa = Isa::from_env().map_err(anyhow::Error::msg)?;
        let mut bar = Progress::count(global.quiet, "quantizing", names.len() as u64);
        let mut done = 0;
        write_rounded(writer, original, &names, groups, &Cpu::new(threads, isa), &mut |_| {
            done += 1;
            bar.at(done, "");
            if stop.load(Ordering::Relaxed) { Err(Stopped.into()) } else { Ok(()) }
        })?;
        bar.finish();
        return Ok(());
    }
    let mut options = GptqOptions::default();
    if args.act_order {
        // Groups are found on the way through the columns, so that those visited together share a scale.
        let variant = |fit| Variant { damping: 0.1, order: Order::Falling, fit };
        options.variants = vec![variant(Fit::Fresh), variant(Fit::Lazy)];
        options.ordered_groups = true;
    }
    let memory = args.memory.unwrap_or_else(|| total() / 2);
    let fingerprint = Fingerprint::default().with("type", format!("{groups:?}"));
    let checkpoint = original.checkpoint();
    let scratch = with_gptq(
        args,
        global,
        fingerprint,
        options,
        checkpoint,
        output,
        memory,
        &stop,
        &mut |tokenizer, scratch, options, at| {
            quantize_groups(checkpoint, tokenizer, layers, groups, scratch, options, at)
        },
    )?;
    write_gptq(writer, original, &names, groups, &scratch)?;
    scratch.remove()
}
