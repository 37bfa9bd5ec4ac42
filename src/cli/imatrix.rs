//! `rushlight imatrix`: how strongly each column of a model's matrices is used.

use super::options::read_text;
use super::{Global, ModelOptions, Progress};
use crate::calibrate::compare::Chunks;
use crate::calibrate::imatrix::{collect, gguf_name};
use crate::calibrate::text::BUILT_IN;
use crate::engine::loaded::Loaded;
use crate::replace;
use anyhow::{Context, Result};
use rushlight_models::checkpoint::imatrix::{Entry, Imatrix};
use std::io::Write;
use std::path::PathBuf;

/// Measure how strongly each column of a model's matrices is used
///
/// Runs the model over a text and adds up the squares of what goes into each matrix: an importance matrix, as
/// `quantize --imatrix` reads it, ours and llama.cpp's.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelOptions,
    /// The text (- is standard input; default: the built-in one)
    #[arg(short, long, value_name = "TEXT")]
    file: Option<PathBuf>,
    /// The file to write: GGUF if its name ends in .gguf, otherwise llama.cpp's older form
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Tokens of a chunk
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(4..=1_048_576))]
    ctx: u32,
    /// Only the first N chunks
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,
    /// Measure the head too, as llama.cpp does when asked by the same name
    #[arg(long)]
    process_output: bool,
}

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    let path = args.model.path()?;
    replace::check(&args.output, "an importance matrix", |path| Imatrix::read(path).is_ok())?;
    let (text, name) = match &args.file {
        Some(file) => (read_text(file)?, file.display().to_string()),
        None => (BUILT_IN.to_owned(), "the built-in text".to_owned()),
    };
    let ctx = args.ctx as usize;
    let Loaded { mut engine, tokenizer, .. } = Loaded::open(&path, &args.model.engine(Some(ctx)))?;
    let chunks = Chunks::new(&tokenizer, &text, &name, ctx, args.chunks.map(|n| n as usize))?;
    let sequences: Vec<Vec<u32>> = (0..chunks.count()).map(|i| chunks.chunk(i).0).collect();
    let mut bar = Progress::count(global.quiet, "imatrix", chunks.count() as u64);
    let (model, backend) = engine.parts();
    let squares = collect(model, backend, &sequences, args.process_output, &mut |done| bar.at(done as u64, ""))?;
    bar.finish();
    let mut imatrix =
        Imatrix { datasets: vec![name], chunks: chunks.count() as u32, chunk_size: args.ctx, ..Imatrix::default() };
    for linear in engine.model().linears() {
        let Some(inputs) = squares.of(linear.id) else { continue };
        let name = gguf_name(engine.model(), linear).with_context(|| {
            format!("{} models have no form in GGUF to name their matrices by", engine.spec().family)
        })?;
        let sums = inputs.sums.iter().map(|&sum| sum as f32).collect();
        imatrix.entries.insert(name, Entry { sums, counts: vec![inputs.rows] });
    }
    imatrix.write(&args.output)?;
    let (entries, tokens) = (imatrix.entries.len(), chunks.count() * ctx);
    Ok(writeln!(std::io::stdout(), "{}: {entries} matrices, from {tokens} tokens", args.output.display())?)
}
