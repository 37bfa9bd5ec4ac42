//! Quantizing a Hugging Face directory to another one.

use super::{Args, Method, with_gptq};
use crate::calibrate::gptq::{group_format, layer_names, quantize_groups};
use crate::cli::{Global, Interrupted, Progress, Usage, interrupt, print_json, size};
use crate::quantize::directory::{Weights, check, gptq_grid, write_gptq};
use crate::quantize::memory::total;
use crate::quantize::scratch::Fingerprint;
use crate::quantize::write::Stopped;
use anyhow::{Context, Result, bail};
use rushlight_models::checkpoint::Checkpoint;
use rushlight_models::checkpoint::export::{GptqWriter, Nf4Options, write_nf4};
use rushlight_models::model::Model;
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};
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
    check(checkpoint, weights, output)?;
    let model = Model::load(checkpoint)?;
    let layers: Vec<String> = layer_names(checkpoint, &model).into_iter().map(|(_, name)| name).collect();
    drop(model);
    if layers.is_empty() {
        bail!("{}: no layer has a matrix of its own to quantize", checkpoint.path().display());
    }
    match (weights, args.method) {
        (Weights::Integers(_), Method::Rtn) => {
            return Err(Usage(format!("{} is made by GPTQ: leave --method out", weights.name())).into());
        }
        (Weights::Integers(bits), Method::Gptq) => {
            integers(args, global, checkpoint, output, &layers, bits)
                .map_err(|e| if e.is::<Stopped>() { Interrupted.into() } else { e })?;
        }
        (Weights::Nf4, _) => {
            let mut progress = Progress::count(global.quiet, "quantizing", layers.len() as u64);
            let mut done = 0;
            write_nf4(checkpoint, output, &layers, Nf4Options { double: true }, &mut |_| {
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

/// Integer codes by GPTQ.
fn integers(
    args: &Args,
    global: &Global,
    checkpoint: &Checkpoint,
    output: &Path,
    layers: &[String],
    bits: u32,
) -> Result<()> {
    let group = usize::try_from(args.group_size).ok();
    if group.is_some_and(|group| group == 0 || !group.is_multiple_of(32)) {
        return Err(Usage(format!("--group-size {}: give a multiple of 32, or -1", args.group_size)).into());
    }
    let grid = gptq_grid(bits, group);
    // What cannot be written is said before hours of work.
    let writer = GptqWriter::create(checkpoint, output, layers, grid)?;
    let stop = interrupt::flag(true);
    let memory = args.memory.unwrap_or_else(|| total() / 2);
    let fingerprint = Fingerprint::default().with("type", format!("int{bits} in groups of {}", args.group_size));
    let scratch = with_gptq(
        args,
        global,
        fingerprint,
        checkpoint,
        output,
        memory,
        &stop,
        &mut |tokenizer, scratch, options, at| {
            let grid = (bits, group.unwrap_or(usize::MAX));
            quantize_groups(checkpoint, tokenizer, layers, grid, scratch, options, at)
        },
    )?;
    write_gptq(writer, checkpoint, layers, grid, group_format(bits), &scratch)?;
    scratch.remove()
}
