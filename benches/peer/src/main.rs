//! llama.cpp behind a few of Rushlight's own commands, so that both can be timed and compared on the same file.
//! Results are JSON on standard output, in the shape of Rushlight's `--json`.

mod imatrix;
mod llama;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Instant;

use llama::{Context, FlashAttention, Model, Result, Token};

const USAGE: &str = "usage:
  rushlight-peer bench MODEL [--threads N] [-p 512] [-n 128] [--depth 0] [--batch 1] [-r 5] [--flash-attn auto|on|off]
  rushlight-peer quantize IN OUT --type Q4_K_M [--imatrix FILE.dat] [--threads N]
  rushlight-peer logits MODEL --ids 1,2,3 [--all] [--greedy N] [--adapter FILE.gguf] [--threads N] [--flash-attn auto|on|off]
  rushlight-peer perplexity MODEL -f FILE [--chunks N] [--ctx 512] [--threads N] [--flash-attn auto|on|off]
  rushlight-peer tokenize MODEL -f FILE [--no-bos] [--parse-special]
  rushlight-peer info
Every command prints one JSON object (--json is accepted and changes nothing).";

fn main() -> ExitCode {
    let mut args = Arguments(std::env::args().skip(1).collect());
    match dispatch(&mut args) {
        Ok(json) => {
            // A reader that has seen enough and left is no failure.
            let _ = writeln!(std::io::stdout(), "{json}");
            ExitCode::SUCCESS
        }
        Err(Failure::Usage(message)) => {
            eprintln!("error: {message}\n{USAGE}");
            ExitCode::from(2)
        }
        Err(Failure::Work(message)) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

enum Failure {
    Usage(String),
    Work(String),
}

impl From<String> for Failure {
    fn from(message: String) -> Failure {
        Failure::Work(message)
    }
}

type Answer<T> = std::result::Result<T, Failure>;

fn dispatch(args: &mut Arguments) -> Answer<String> {
    args.flag("--json");
    let threads = args.number("--threads", std::thread::available_parallelism().map_or(1, usize::from))?;
    let attention = match args.value("--flash-attn")?.as_deref() {
        None | Some("auto") => FlashAttention::Auto,
        Some("on") => FlashAttention::On,
        Some("off") => FlashAttention::Off,
        Some(other) => return Err(Failure::Usage(format!("--flash-attn {other}: auto, on or off"))),
    };
    llama::start();
    match args.positional("COMMAND")?.as_str() {
        "bench" => {
            let plan = Plan {
                prompt: args.number("-p", 512)?,
                generate: args.number("-n", 128)?,
                depth: args.number("--depth", 0)?,
                batch: args.number("--batch", 1)?.max(1),
                repeats: args.number("-r", 5)?.max(1),
                threads,
                attention,
            };
            let model = args.path("MODEL")?;
            args.finish()?;
            Ok(bench(&model, &plan)?)
        }
        "quantize" => {
            let kind = args.required("--type")?;
            let importance = args.value("--imatrix")?.map(|file| imatrix::read(Path::new(&file))).transpose()?;
            let (input, output) = (args.path("IN")?, args.path("OUT")?);
            args.finish()?;
            llama::quantize(&input, &output, &kind, importance.as_deref(), threads)?;
            Ok(format!("{{\"bytes\":{}}}", std::fs::metadata(&output).map_or(0, |m| m.len())))
        }
        "logits" => {
            let ids = args.required("--ids")?;
            let ids: std::result::Result<Vec<Token>, _> = ids.split(',').map(|id| id.trim().parse()).collect();
            let ids = ids.map_err(|_| Failure::Usage("--ids takes numbers with commas between them".to_owned()))?;
            let (all, greedy) = (args.flag("--all"), args.number("--greedy", 0)?);
            let adapter = args.value("--adapter")?.map(PathBuf::from);
            let model = args.path("MODEL")?;
            args.finish()?;
            Ok(logits(&model, adapter.as_deref(), &ids, (all, greedy), threads, attention)?)
        }
        "perplexity" => {
            let file = PathBuf::from(args.required("-f")?);
            let (chunks, ctx) = (args.number("--chunks", usize::MAX)?, args.number("--ctx", 512)?);
            let model = args.path("MODEL")?;
            args.finish()?;
            Ok(perplexity(&model, &file, chunks, ctx, threads, attention)?)
        }
        "tokenize" => {
            let file = PathBuf::from(args.required("-f")?);
            let (no_bos, parse_special) = (args.flag("--no-bos"), args.flag("--parse-special"));
            let model = args.path("MODEL")?;
            args.finish()?;
            let model = Model::open(&model, true)?;
            let ids = model.tokenize(&read(&file)?, !no_bos, parse_special)?;
            Ok(format!("{{\"ids\":{ids:?}}}"))
        }
        "info" => {
            args.finish()?;
            Ok(format!("{{\"system\":{:?}}}", llama::system_info()))
        }
        other => Err(Failure::Usage(format!("no command {other}"))),
    }
}

/// What `bench` measures; lengths in tokens.
struct Plan {
    prompt: usize,
    generate: usize,
    depth: usize,
    /// Sequences that generate together.
    batch: usize,
    repeats: usize,
    threads: usize,
    attention: FlashAttention,
}

/// Times a prompt and then single tokens, each after `depth` tokens: as llama-bench does it, each in a context of just
/// the size it needs, after one untimed turn, the next token fixed instead of sampled.
fn bench(path: &Path, plan: &Plan) -> Result<String> {
    let start = Instant::now();
    let model = Model::open(path, false)?;
    let load = start.elapsed().as_secs_f64();
    let prompt = rates(&model, plan, plan.prompt, 512)?;
    let generation = match plan.batch {
        1 => rates(&model, plan, plan.generate, 1)?,
        batch => rates_together(&model, plan, batch)?,
    };
    Ok(format!(
        "{{\"prompt\":{{\"tokens\":{},\"depth\":{},\"tokens_per_second\":{:.3},\"runs\":{prompt:?}}},\
         \"generation\":{{\"tokens\":{},\"depth\":{},\"tokens_per_second\":{:.3},\"runs\":{generation:?}}},\
         \"threads\":{},\"flash_attention\":{:?},\"load_seconds\":{load:.3},\"peak_memory_bytes\":{},\"system\":{:?}}}",
        plan.prompt,
        plan.depth,
        median(&prompt),
        plan.generate,
        plan.depth,
        median(&generation),
        plan.threads,
        match plan.attention {
            FlashAttention::Auto => "auto",
            FlashAttention::Off => "off",
            FlashAttention::On => "on",
        },
        peak_memory(),
        llama::system_info(),
    ))
}

/// Tokens per second of each repeat: `count` tokens in batches of `batch`, after the plan's depth.
fn rates(model: &Model, plan: &Plan, count: usize, batch: usize) -> Result<Vec<f64>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let ids = fixed_ids(plan.depth + count, model.vocab_size());
    let (before, timed) = ids.split_at(plan.depth);
    let mut context = model.context(ids.len(), 1, plan.threads, plan.attention)?;
    let fill =
        |context: &mut Context, ids: &[Token], batch| ids.chunks(batch).try_for_each(|b| context.decode(b, false));
    fill(&mut context, &timed[..batch.min(count)], batch)?;
    let mut rates = Vec::new();
    for _ in 0..plan.repeats {
        context.clear();
        fill(&mut context, before, 512)?;
        let start = Instant::now();
        fill(&mut context, timed, batch)?;
        rates.push(count as f64 / start.elapsed().as_secs_f64());
    }
    Ok(rates)
}

/// Tokens per second of each repeat, of all sequences: `batch` of them, each after the plan's depth.
fn rates_together(model: &Model, plan: &Plan, batch: usize) -> Result<Vec<f64>> {
    let ids = fixed_ids(plan.depth + plan.generate, model.vocab_size());
    let mut context = model.context(ids.len().max(1), batch, plan.threads, plan.attention)?;
    let step = |context: &mut Context, position: usize| {
        context.decode_in(&(0..batch).map(|s| (ids[position], position, s)).collect::<Vec<_>>())
    };
    let mut rates = Vec::new();
    for turn in 0..plan.repeats + 1 {
        context.clear();
        for sequence in 0..batch {
            for start in (0..plan.depth).step_by(512) {
                let range = start..plan.depth.min(start + 512);
                context.decode_in(&range.map(|i| (ids[i], i, sequence)).collect::<Vec<_>>())?;
            }
        }
        if turn == 0 {
            // Not timed: as in `rates`.
            step(&mut context, plan.depth)?;
            continue;
        }
        let start = Instant::now();
        (plan.depth..ids.len()).try_for_each(|position| step(&mut context, position))?;
        rates.push((batch * plan.generate) as f64 / start.elapsed().as_secs_f64());
    }
    Ok(rates)
}

/// The same scattered ids every time (a small linear congruential generator).
fn fixed_ids(n: usize, vocab: usize) -> Vec<Token> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) as usize % vocab.max(1)) as Token
    };
    (0..n).map(|_| next()).collect()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// The most memory this process has held, in bytes; 0 where the system does not say.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).map_or(0, |kb| kb * 1024)
}

fn logits(
    path: &Path,
    adapter: Option<&Path>,
    ids: &[Token],
    (all, greedy): (bool, usize),
    threads: usize,
    attention: FlashAttention,
) -> Result<String> {
    let model = Model::open(path, false)?;
    if let Some(id) = ids.iter().find(|&&id| id < 0 || id as usize >= model.vocab_size()) {
        return Err(format!("id {id} is not in the vocabulary of {} tokens", model.vocab_size()));
    }
    let mut context = model.context(ids.len() + greedy, 1, threads, attention)?;
    if let Some(adapter) = adapter {
        context.adapt(adapter)?;
    }
    let mut positions = Vec::new();
    for (i, chunk) in ids.chunks(512).enumerate() {
        context.decode(chunk, all)?;
        for j in 0..if all { chunk.len() } else { 0 } {
            positions.push(position(i * 512 + j, context.logits(j as i32)?));
        }
    }
    if !all {
        positions.push(position(ids.len() - 1, context.logits(-1)?));
    }
    let mut continuation = Vec::new();
    for _ in 0..greedy {
        let row = context.logits(-1)?;
        let best = (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best });
        continuation.push(best);
        context.decode(&[best as Token], false)?;
    }
    Ok(format!("{{\"positions\":[{}],\"greedy\":{continuation:?}}}", positions.join(",")))
}

fn position(position: usize, logits: &[f32]) -> String {
    let mut text = format!("{{\"position\":{position},\"logits\":[");
    for (i, value) in logits.iter().enumerate() {
        let _ = write!(text, "{}{value}", if i > 0 { "," } else { "" });
    }
    text + "]}"
}

/// Scored as llama.cpp's own tool does: the text cut into chunks of `ctx` tokens, each from an empty context, with the
/// beginning token (where the model wants one) in place of its first token; the second half of each chunk counts.
fn perplexity(
    path: &Path,
    file: &Path,
    chunks: usize,
    ctx: usize,
    threads: usize,
    attention: FlashAttention,
) -> Result<String> {
    if ctx < 4 {
        return Err("--ctx must be at least 4".to_owned());
    }
    let model = Model::open(path, false)?;
    let ids = model.tokenize(&read(file)?, true, false)?;
    let chunks = chunks.min(ids.len() / ctx);
    if chunks == 0 {
        return Err(format!("{}: {} tokens are fewer than one chunk of {ctx}", file.display(), ids.len()));
    }
    let mut context = model.context(ctx, 1, threads, attention)?;
    let (mut sum, mut count) = (0.0, 0usize);
    for (done, chunk) in ids.chunks_exact(ctx).take(chunks).enumerate() {
        let mut input = chunk.to_vec();
        if let Some(bos) = model.bos() {
            input[0] = bos;
        }
        context.clear();
        for (start, part) in input.chunks(512).enumerate() {
            context.decode(part, true)?;
            for i in 0..part.len() {
                let at = start * 512 + i;
                if at >= ctx / 2 && at + 1 < ctx {
                    sum += surprise(context.logits(i as i32)?, chunk[at + 1] as usize);
                    count += 1;
                }
            }
        }
        eprintln!("[{}/{chunks}] {:.4}", done + 1, (sum / count as f64).exp());
    }
    let perplexity = (sum / count as f64).exp();
    Ok(format!("{{\"perplexity\":{perplexity:.6},\"chunks\":{chunks},\"tokens\":{count}}}"))
}

/// -log of the probability that the softmax of `logits` gives to `id`.
fn surprise(logits: &[f32], id: usize) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    sum.ln() - f64::from(logits[id] - max)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))
}

/// Command-line arguments not yet taken.
struct Arguments(Vec<String>);

impl Arguments {
    fn flag(&mut self, name: &str) -> bool {
        let found = self.0.iter().position(|arg| arg == name);
        found.inspect(|&i| drop(self.0.remove(i))).is_some()
    }

    fn value(&mut self, name: &str) -> Answer<Option<String>> {
        let Some(i) = self.0.iter().position(|arg| arg == name) else { return Ok(None) };
        self.0.remove(i);
        if i == self.0.len() {
            return Err(Failure::Usage(format!("{name} needs a value")));
        }
        Ok(Some(self.0.remove(i)))
    }

    fn required(&mut self, name: &str) -> Answer<String> {
        self.value(name)?.ok_or_else(|| Failure::Usage(format!("{name} is missing")))
    }

    fn number<T: FromStr>(&mut self, name: &str, default: T) -> Answer<T> {
        match self.value(name)? {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| Failure::Usage(format!("{name} {text}: not a number"))),
        }
    }

    fn positional(&mut self, name: &str) -> Answer<String> {
        if self.0.is_empty() {
            return Err(Failure::Usage(format!("{name} is missing")));
        }
        Ok(self.0.remove(0))
    }

    fn path(&mut self, name: &str) -> Answer<PathBuf> {
        self.positional(name).map(PathBuf::from)
    }

    fn finish(&self) -> Answer<()> {
        match self.0.first() {
            None => Ok(()),
            Some(arg) => Err(Failure::Usage(format!("{arg} is not an argument of this command"))),
        }
    }
}
