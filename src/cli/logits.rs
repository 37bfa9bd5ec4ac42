//! `rushlight logits`: what a model makes of token ids.

use super::{Global, ModelOptions, Progress, Usage, print_json};
use crate::engine::Engine;
use anyhow::{Result, bail};
use serde::Serialize;
use std::io::Write;

/// Print a model's logits for token ids (needs no tokenizer)
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelOptions,
    /// Token ids, with commas between
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', required = true)]
    ids: Vec<u32>,
    /// Every position, not only the last
    #[arg(long)]
    all: bool,
    /// Feed the ids one at a time: the path of generated tokens
    #[arg(long)]
    step: bool,
    /// Then go on for N tokens, the likeliest each time
    #[arg(long, value_name = "N", default_value_t = 0)]
    greedy: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Output {
    positions: Vec<Position>,
    greedy: Vec<u32>,
}

#[derive(Serialize)]
struct Position {
    position: usize,
    logits: Vec<f32>,
}

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    let path = args.model.path()?;
    let Some(needed) = args.ids.len().checked_add(args.greedy) else {
        return Err(Usage("--greedy asks for more tokens than can be counted".into()).into());
    };
    let mut engine = Engine::open(&path, &args.model.engine(Some(needed)))?;
    let vocab = engine.vocab_size();
    if let Some(id) = args.ids.iter().find(|&&id| id as usize >= vocab) {
        bail!("there is no token {id}: the model's vocabulary has {vocab} tokens, from 0 to {}", vocab - 1);
    }
    let mut bar = Progress::count(global.quiet, "logits", needed as u64);
    let mut positions = Vec::new();
    let mut last = Vec::new();
    if args.step {
        for (position, &id) in args.ids.iter().enumerate() {
            let logits = engine.step(&[(0, id)])?;
            if args.all {
                positions.push(Position { position, logits: logits.to_vec() });
            }
            last = logits.to_vec();
            bar.at(position as u64 + 1, "");
        }
    } else if args.all {
        engine.prompt_all(0, &args.ids, &mut |position, logits| {
            positions.push(Position { position, logits: logits.to_vec() });
            bar.at(position as u64 + 1, "");
        })?;
        last = positions.last().map(|p| p.logits.clone()).unwrap_or_default();
    } else {
        last = engine
            .prompt(0, &args.ids, &mut |read| {
                bar.at(read as u64, "");
                true
            })?
            .to_vec();
    }
    if !args.all {
        positions.push(Position { position: args.ids.len() - 1, logits: last.clone() });
    }
    let bad = |p: &Position| p.logits.iter().any(|x| !x.is_finite());
    if let Some(p) = positions.iter().find(|p| bad(p)) {
        bail!("the logits at position {} are not finite: the weights are damaged or overflow", p.position);
    }
    let mut greedy = Vec::with_capacity(args.greedy.min(1 << 16));
    for i in 0..args.greedy {
        let id = likeliest(&last);
        greedy.push(id);
        if i + 1 < args.greedy {
            last = engine.step(&[(0, id)])?.to_vec();
        }
        bar.at((args.ids.len() + i) as u64 + 1, "");
    }
    bar.finish();
    if args.json {
        return print_json(&Output { positions, greedy });
    }
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for p in &positions {
        let mut order: Vec<usize> = (0..p.logits.len()).collect();
        order.sort_by(|&a, &b| p.logits[b].total_cmp(&p.logits[a]).then(a.cmp(&b)));
        write!(out, "position {}:", p.position)?;
        for &id in order.iter().take(10) {
            write!(out, "  {id} {:.4}", p.logits[id])?;
        }
        writeln!(out)?;
    }
    if !greedy.is_empty() {
        let ids: Vec<String> = greedy.iter().map(u32::to_string).collect();
        writeln!(out, "greedy: {}", ids.join(","))?;
    }
    Ok(out.flush()?)
}

/// The first of the greatest.
fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = i;
        }
    }
    best as u32
}
