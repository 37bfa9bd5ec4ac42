//! `rushlight eval`: how many multiple-choice questions a model answers rightly.

use super::{Global, Interrupted, ModelOptions, Progress, Usage, interrupt, print_json};
use crate::engine::Engine;
use crate::eval::find::{Split, Wanted, subjects};
use crate::eval::result::{Answer, Score};
use crate::eval::score::{Scorer, TOGETHER, encode, fit, longest};
use crate::replace;
use crate::store::Store;
use anyhow::{Context, Result, bail};
use rushlight_models::checkpoint::{AtomicFile, Checkpoint};
use rushlight_models::families::recognise;
use rushlight_models::tokenizer::Tokenizer;
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Measure how many multiple-choice questions a model answers rightly
///
/// The choice counts that the model finds likeliest behind the question, as EleutherAI's lm-evaluation-harness scores it,
/// in the words of its tasks. Read are the published files of MMLU, C-Eval and CMMLU (CSV or the hub's Parquet) and HellaSwag
/// (JSON lines or Parquet), and JSON or JSON lines of {"question": "..", "choices": ["..", ".."], "answer": 0, "subject": ".."}, where the answer is a number
/// from 0, a letter or the text of a choice.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelOptions,
    /// A file, a folder of files (with folders dev, val and test or not), or a name in the folder tasks of the store
    #[arg(long, value_name = "FILE|DIR|NAME")]
    task: String,
    /// Examples with answers before each question, from the dev files of the set
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1000))]
    shots: u16,
    /// A file to take the examples from
    #[arg(long, value_name = "FILE")]
    examples: Option<PathBuf>,
    /// Only the first N questions of each subject
    #[arg(long, value_name = "N")]
    limit: Option<std::num::NonZeroUsize>,
    /// The part of a set to ask (default: test, where it has answers, or else val)
    #[arg(long, value_name = "PART")]
    split: Option<Split>,
    /// JSON lines: compare the texts of choices instead of their letters
    #[arg(long)]
    text: bool,
    /// Write what became of each question, a JSON object a line
    #[arg(short, long, value_name = "FILE.jsonl")]
    output: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Output<'a> {
    model: &'a str,
    task: &'a str,
    shots: u16,
    /// All questions together.
    #[serde(flatten)]
    total: Score,
    /// The mean of the subjects' accuracies.
    accuracy_by_subject: f64,
    subjects: Vec<Score>,
    /// Questions whose beginning was cut off, since the model's context is too short for them.
    truncated: usize,
    /// Tokens that went through the model.
    tokens: u64,
    seconds: f64,
}

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    if args.examples.is_some() && args.shots == 0 {
        return Err(Usage("--examples has examples to show, but --shots says how many of them".into()).into());
    }
    let path = args.model.path()?;
    let task = find(&args.task)?;
    let wanted = Wanted {
        shots: args.shots.into(),
        limit: args.limit.map(|n| n.get()),
        split: args.split,
        examples: args.examples.clone(),
        texts: args.text,
    };
    let subjects = subjects(&task, &wanted)?;
    if let Some(output) = &args.output {
        replace::check(output, "a file of this command", |path| {
            replace::is_json_lines(path, &["place", "chosen", "log_likelihoods"])
        })?;
    }
    let mut file = args.output.as_ref().map(|path| AtomicFile::create(path)).transpose()?;
    let checkpoint = Checkpoint::open(&path)?;
    let tokenizer = Tokenizer::of(&checkpoint)?;
    let mut asked = encode(&subjects, &tokenizer)?;
    let most = recognise(&checkpoint)?.1.context_length;
    let truncated = fit(&mut asked, most);
    if truncated > 0 && !global.quiet {
        let notice = format!("{truncated} questions are longer than the model's context of {most} tokens");
        writeln!(std::io::stderr(), "note: {notice}; they are cut at the beginning").ok();
    }
    let slots = asked.iter().map(|a| a.choices.len()).max().unwrap_or(1).min(TOGETHER);
    let options = crate::engine::Options { slots, ..args.model.engine(Some(longest(&asked).max(1))) };
    let mut engine = Engine::from_checkpoint(checkpoint, &options)?;
    let mut scorer = Scorer::new(&mut engine);
    let stop = interrupt::flag(true);
    let started = Instant::now();
    let mut progress = Progress::count(global.quiet, "evaluating", asked.len() as u64);
    let mut answers: Vec<Vec<Answer>> = vec![Vec::new(); subjects.len()];
    let mut right = 0;
    for (i, question) in asked.iter().enumerate() {
        if stop.load(Ordering::Relaxed) {
            return Err(Interrupted.into());
        }
        let subject = &subjects[question.subject];
        let answer = scorer.answer(subject, question).with_context(|| subject.items[question.item].place.clone())?;
        right += usize::from(answer.chosen == answer.answer);
        if let (Some(file), Some(path)) = (&mut file, &args.output) {
            write_line(file, &answer).with_context(|| path.display().to_string())?;
        }
        answers[question.subject].push(answer);
        let share = 100.0 * right as f64 / (i + 1) as f64;
        progress.at(i as u64 + 1, &format!("{}, accuracy {share:.1} %", subject.name));
    }
    progress.finish();
    file.map_or(Ok(()), AtomicFile::commit)?;
    let scores: Vec<Score> =
        subjects.iter().zip(&answers).map(|(s, answers)| Score::of(&s.name, answers, s.texts)).collect();
    let output = Output {
        model: &args.model.model,
        task: &args.task,
        shots: args.shots,
        total: Score::all(&scores),
        accuracy_by_subject: scores.iter().map(|s| s.accuracy).sum::<f64>() / scores.len().max(1) as f64,
        subjects: scores,
        truncated,
        tokens: scorer.tokens,
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json { print_json(&output) } else { tell(&output) }
}

fn write_line(file: &mut AtomicFile, answer: &Answer) -> Result<()> {
    serde_json::to_writer(&mut *file, answer).map_err(std::io::Error::from)?;
    Ok(file.write_all(b"\n")?)
}

/// Where the task `name` is.
fn find(name: &str) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(path.to_owned());
    }
    let tasks = Store::open()?.home().join("tasks");
    let plain = path.components().count() == 1;
    match Some(tasks.join(name)).filter(|path| plain && path.exists()) {
        Some(path) => Ok(path),
        None => bail!(
            "--task {name}: there is no such file or folder, and none in {}: download the set's published files and name \
             their folder",
            tasks.display()
        ),
    }
}

fn tell(output: &Output) -> Result<()> {
    let all = output.subjects.iter().chain((output.subjects.len() > 1).then_some(&output.total));
    let width = all.clone().map(|s| s.subject.chars().count()).max().unwrap_or(0).max("subject".len());
    let texts = output.total.accuracy_norm.is_some();
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let norm = if texts { "   by length, %" } else { "" };
    writeln!(out, "{:width$}  questions     accuracy, %{norm}", "subject")?;
    for score in all {
        let share = |share: f64, error: f64| format!("{:6.2} +/- {:5.2}", 100.0 * share, 100.0 * error);
        write!(out, "{:width$}  {:9}  {}", score.subject, score.questions, share(score.accuracy, score.stderr))?;
        if let (Some(norm), Some(error)) = (score.accuracy_norm, score.stderr_norm) {
            write!(out, "  {}", share(norm, error))?;
        }
        writeln!(out)?;
    }
    if output.subjects.len() > 1 {
        writeln!(out, "mean of {} subjects: {:.2} %", output.subjects.len(), 100.0 * output.accuracy_by_subject)?;
    }
    writeln!(out, "{} tokens in {:.1} s", output.tokens, output.seconds)?;
    Ok(out.flush()?)
}
