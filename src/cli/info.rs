//! `rushlight info`: what a model is, and the memory it needs.

use super::{Global, one_line, print_json, size};
use crate::engine::{Engine, Options};
use crate::quantize::types::Target;
use crate::store::Store;
use anyhow::Result;
use rushlight_models::checkpoint::{Checkpoint, Kind};
use rushlight_models::tokenizer::{ChatTemplate, Tokenizer};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

/// Show what a model is: its shape, its tensors by format, the memory it needs
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A .gguf file, a Hugging Face directory, or a name in the store
    model: String,
    /// Also the memory at this context
    #[arg(short, long, value_name = "N")]
    ctx: Option<std::num::NonZeroUsize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Info {
    path: PathBuf,
    kind: &'static str,
    name: Option<String>,
    architecture: Option<String>,
    /// The mix that the file says it was made with.
    #[serde(rename = "type")]
    file_type: Option<&'static str>,
    parameters: u64,
    bytes: u64,
    bits_per_weight: f64,
    formats: Vec<FormatInfo>,
    /// `None`: it cannot be run, `why` says why.
    shape: Option<Shape>,
    why: Option<String>,
    tokenizer: Option<usize>,
    chat_template: bool,
    /// The built-in template that is taken where the model brings none and its tokens tell which it knows.
    chat_format: Option<String>,
    memory: Vec<MemoryInfo>,
}

#[derive(Serialize)]
struct FormatInfo {
    format: String,
    tensors: usize,
    parameters: u64,
    bytes: u64,
    bits_per_weight: f64,
}

#[derive(Serialize)]
struct Shape {
    family: String,
    layers: usize,
    hidden_size: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    context: usize,
}

/// Bytes at a context of so many tokens.
#[derive(Serialize)]
struct MemoryInfo {
    context: usize,
    weights: u64,
    kv: u64,
    total: u64,
}

/// Runs the command.
pub fn run(args: &Args, _: &Global) -> Result<()> {
    let path = Store::open()?.resolve(&args.model)?;
    let info = describe(path, args.ctx.map(|n| n.get()))?;
    if args.json { print_json(&info) } else { print(&info) }
}

fn describe(path: PathBuf, ctx: Option<usize>) -> Result<Info> {
    let checkpoint = Checkpoint::open(&path)?;
    let mut by_format = BTreeMap::<String, (usize, u64, u64)>::new();
    let raw = checkpoint.raw_tensors().iter().map(|t| {
        let elements = t.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        (t.dtype.clone(), elements, Some(t.data.len()))
    });
    for (format, elements, bytes) in
        checkpoint.tensors().iter().map(|t| (t.format.name().to_string(), t.elements(), t.bytes())).chain(raw)
    {
        let row = by_format.entry(format).or_default();
        row.0 += 1;
        row.1 += elements.unwrap_or_default() as u64;
        row.2 += bytes.unwrap_or_default() as u64;
    }
    let bits = |bytes: u64, parameters: u64| if parameters == 0 { 0.0 } else { bytes as f64 * 8.0 / parameters as f64 };
    let mut formats: Vec<FormatInfo> = by_format
        .into_iter()
        .map(|(format, (tensors, parameters, bytes))| FormatInfo {
            format,
            tensors,
            parameters,
            bytes,
            bits_per_weight: bits(bytes, parameters),
        })
        .collect();
    formats.sort_by_key(|f| std::cmp::Reverse(f.bytes));
    let (parameters, bytes) = formats.iter().fold((0, 0), |(p, b), f| (p + f.parameters, b + f.bytes));

    let (kind, name, architecture, tokenizer, template) = match checkpoint.kind() {
        Kind::Gguf(m) => (
            "gguf",
            m.str("general.name").map(String::from),
            m.str("general.architecture").map(String::from),
            Tokenizer::from_gguf(m, &path),
            ChatTemplate::from_gguf(m, &path),
        ),
        Kind::HuggingFace { config, .. } => {
            let text = |v: &serde_json::Value| v.as_str().map(String::from);
            let architecture = text(&config["architectures"][0]).or_else(|| text(&config["model_type"]));
            let name = text(&config["_name_or_path"]).filter(|n| !n.is_empty());
            ("huggingface", name, architecture, Tokenizer::from_dir(&path), ChatTemplate::from_dir(&path))
        }
    };
    let (tokenizer, chat_template) = (tokenizer.ok(), matches!(template, Ok(Some(_))));
    let guessed = tokenizer.as_ref().filter(|_| !chat_template).and_then(|t| ChatTemplate::choose(None, t).ok());
    let chat_format = guessed.map(|template| template.name().to_owned());
    let tokenizer = tokenizer.map(|t| t.vocab_size());

    let file_type = checkpoint.metadata().and_then(|m| m.u64("general.file_type"));
    let file_type =
        file_type.and_then(|n| Target::ALL.into_iter().find(|t| u64::from(t.file_type) == n)).map(|t| t.name);
    let mut info = Info {
        path,
        kind,
        name,
        architecture,
        file_type,
        parameters,
        bytes,
        bits_per_weight: bits(bytes, parameters),
        formats,
        shape: None,
        why: None,
        tokenizer,
        chat_template,
        chat_format,
        memory: Vec::new(),
    };
    // One position is enough to learn what each costs.
    let options = Options { threads: Some(1), context: Some(1), slots: 1, ..Options::default() };
    match Engine::from_checkpoint(checkpoint, &options) {
        Err(e) => info.why = Some(one_line(&e)),
        Ok(engine) => {
            let (spec, memory) = (engine.spec(), engine.memory());
            info.shape = Some(Shape {
                family: spec.family.to_string(),
                layers: spec.layers.len(),
                hidden_size: spec.hidden_size,
                heads: spec.heads,
                kv_heads: spec.kv_heads,
                head_dim: spec.head_dim,
                vocab_size: spec.vocab_size,
                context: spec.context_length,
            });
            let mut contexts = vec![spec.context_length.min(crate::engine::DEFAULT_CONTEXT), spec.context_length];
            contexts.extend(ctx);
            contexts.sort();
            contexts.dedup();
            info.memory = contexts
                .into_iter()
                .map(|context| {
                    let kv = memory.kv_per_token.saturating_mul(context as u64);
                    MemoryInfo { context, weights: memory.weights, kv, total: memory.weights.saturating_add(kv) }
                })
                .collect();
        }
    }
    Ok(info)
}

fn count(n: u64) -> String {
    match n {
        0..=999_999 => n.to_string(),
        1_000_000..=999_999_999 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}

fn print(info: &Info) -> Result<()> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let unknown = || "unknown".to_string();
    writeln!(out, "path          {}", info.path.display())?;
    if let Some(name) = &info.name {
        // Names come from files: no control characters to the terminal.
        writeln!(out, "name          {}", name.escape_debug())?;
    }
    writeln!(out, "kind          {}", if info.kind == "gguf" { "GGUF" } else { "Hugging Face directory" })?;
    let architecture = info.architecture.as_ref().map_or_else(unknown, |a| a.escape_debug().to_string());
    writeln!(out, "architecture  {architecture}")?;
    if let Some(file_type) = info.file_type {
        writeln!(out, "type          {file_type}")?;
    }
    writeln!(out, "parameters    {}", count(info.parameters))?;
    writeln!(out, "weights       {} ({:.2} bits each)", size(info.bytes), info.bits_per_weight)?;
    if let Some(s) = &info.shape {
        writeln!(out, "layers        {} of width {}", s.layers, s.hidden_size)?;
        writeln!(out, "attention     {} heads of {}, {} for keys and values", s.heads, s.head_dim, s.kv_heads)?;
        writeln!(out, "vocabulary    {} tokens", s.vocab_size)?;
        writeln!(out, "context       {} tokens", s.context)?;
    }
    let tokenizer = info.tokenizer.map_or("none".into(), |n| format!("{n} tokens"));
    writeln!(out, "tokenizer     {tokenizer}")?;
    let template = match (info.chat_template, &info.chat_format) {
        (true, _) => "yes".into(),
        (false, Some(name)) => format!("none of its own: {name}, by its tokens"),
        (false, None) => "none".into(),
    };
    writeln!(out, "chat template {template}")?;
    if let Some(why) = &info.why {
        writeln!(out, "cannot be run {why}")?;
    }
    writeln!(
        out,
        "\n{:10} {:>7} {:>10} {:>9} {:>11}  share",
        "format", "tensors", "parameters", "size", "bits/weight"
    )?;
    for f in &info.formats {
        let (params, bytes) = (count(f.parameters), size(f.bytes));
        let share = f.bytes as f64 / info.bytes.max(1) as f64;
        // A bar for each fortieth of the file.
        let bar = "#".repeat((40.0 * share).ceil() as usize);
        let row = format!("{:10} {:>7} {params:>10} {bytes:>9} {:>11.2}", f.format, f.tensors, f.bits_per_weight);
        writeln!(out, "{row}  {:>4.1} % {bar}", 100.0 * share)?;
    }
    if !info.memory.is_empty() {
        writeln!(
            out,
            "\n{:>10} {:>9} {:>9} {:>9}  (working buffers add some 50 MB)",
            "context", "weights", "cache", "memory"
        )?;
        for m in &info.memory {
            writeln!(out, "{:>10} {:>9} {:>9} {:>9}", m.context, size(m.weights), size(m.kv), size(m.total))?;
        }
    }
    Ok(out.flush()?)
}
