//! `rushlight train`: fit an adapter, or all weights, to examples.

mod options;

pub use options::Args;

use super::progress::Progress as Bar;
use super::{Global, Interrupted, Usage, interrupt, print_json, shell};
use crate::train::batch::Example;
use crate::train::data::{micro_batches, show};
use crate::train::run::checkpoint::{Checkpoints, Progress};
use crate::train::run::folder::Folder;
use crate::train::run::metrics::{Evaluation, StepLine};
use crate::train::run::plan::{Plan, clock_offset, ends};
use crate::train::run::prepare::{Prepared, Request};
use crate::train::run::pupil::Pupil;
use crate::train::run::report::{Report, duration};
use crate::train::run::{End, Lesson, Watch, train};
use crate::train::tape::Learner;
use anyhow::{Result, anyhow};
use options::Kind;
use rushlight_quant::{Cpu, Isa};
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    let request = args.request()?;
    request.check().map_err(|e| Usage(e.to_string()))?;
    let mut reading = Bar::Silent;
    let mut prepared = request.prepare(&mut |done, total| match done {
        0 => reading = Bar::bytes(global.quiet, "reading examples", total, 0),
        _ => reading.at(done, ""),
    })?;
    reading.finish();
    if let Some(count) = args.show_data {
        return show_data(&prepared, count);
    }
    let data = reports(&prepared);
    let say = |line: &str| {
        if !global.quiet {
            writeln!(std::io::stderr(), "{line}").ok();
        }
    };
    data.lines().for_each(say);
    let (Some(dir), false) = (&args.output, args.plan) else {
        let plan = prepared.plan(None)?;
        return tell_plan(&request, prepared, &plan, args.json);
    };
    let mut folder = Folder::open(dir)?;
    let checkpoints = folder.path("checkpoints");
    let begun = checkpoints.is_dir() && !Checkpoints::open(&checkpoints)?.is_empty()?;
    let plan = prepared.plan(Some(&folder).filter(|_| begun))?;
    prepared.settle(&plan);
    folder.agree(&prepared.arguments, begun, args.force)?;
    plan.lines().iter().chain(&prepared.lines()).for_each(|line| say(line));
    let stop = interrupt::flag(true);
    let settings = prepared.settings.clone();
    let report = Report {
        title: format!("Training {}", args.model),
        subtitle: format!("{} → {}", request.model.display(), dir.display()),
        facts: prepared.arguments.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        data,
        steps: settings.schedule.steps,
    };
    let (data, validation) = (prepared.data.clone(), prepared.validation.clone());
    let (tokenizer, template) = (prepared.tokenizer.clone(), prepared.template.clone());
    let learner = learner(&request, prepared, &plan)?;
    let pupil = Pupil::new(learner, request.method.clone(), &request.model, args.method.gguf, stop.clone())?;
    let mut pupil = pupil.speaking(tokenizer, template, request.threads);
    let mut watch = Show {
        bar: Bar::steps(global.quiet, "training", settings.schedule.steps, 0),
        quiet: global.quiet,
        steps: settings.schedule.steps,
        offset: clock_offset(),
        validation: None,
        seen: Vec::new(),
        first: true,
    };
    let validation = validation.as_ref().map(|v| v as _);
    let end = train(&mut pupil, &data, validation, &settings, &folder, report, &stop, &mut watch)?;
    watch.bar.finish();
    tell_end(args, &end, &pupil, &folder)
}

/// The model with what is to be trained.
fn learner(request: &Request, prepared: Prepared, plan: &Plan) -> Result<Learner> {
    let isa = Isa::from_env().map_err(|e| anyhow!(e))?;
    let mut learner = Learner::new(prepared.model, Cpu::new(request.threads, isa), &request.method, request.seed)?;
    learner.set_checkpointing(plan.checkpointing());
    learner.set_neftune(request.neftune);
    Ok(learner)
}

fn show_data(prepared: &Prepared, count: usize) -> Result<()> {
    let mut out = std::io::stdout();
    let colour = out.is_terminal();
    for item in 0..count.min(prepared.data.len()) {
        let (file, line) = prepared.data.origin(item);
        writeln!(out, "── {} {line}", file.display())?;
        for example in prepared.data.examples(item) {
            writeln!(out, "{}", show(&example, prepared.tokenizer.as_deref(), colour))?;
        }
    }
    writeln!(out, "{}", reports(prepared))?;
    Ok(())
}

/// What became of the records of each file, those to validate on included.
fn reports(prepared: &Prepared) -> String {
    let (data, validation) = (&prepared.data.report, prepared.validation.as_ref().map(|v| &v.report));
    match validation.filter(|v| !Arc::ptr_eq(v, data)) {
        Some(validation) => format!("{data}validation\n{validation}"),
        None => data.to_string(),
    }
}

/// Prints the plan, with the time of a step measured on the first examples.
fn tell_plan(request: &Request, mut prepared: Prepared, plan: &Plan, as_json: bool) -> Result<()> {
    prepared.settle(plan);
    let (lines, steps, tokens) = (prepared.lines(), prepared.settings.schedule.steps, prepared.data.tokens() as u64);
    let per_epoch = prepared.per_epoch;
    let items: Vec<usize> = (0..prepared.settings.batch.min(prepared.data.len())).collect();
    let batch = prepared.data.batch(&items);
    let group = micro_batches(&batch, plan.rows).into_iter().next().unwrap_or(0..0);
    let examples: Vec<Example> = batch[group].to_vec();
    let rows: usize = examples.iter().map(|e| e.ids.len()).sum();
    let mut learner = learner(request, prepared, plan)?;
    let mut gradients = learner.params().gradients();
    // The first pass touches memory for the first time.
    learner.backward(&examples, 0, &mut gradients)?;
    let started = Instant::now();
    learner.backward(&examples, 0, &mut gradients)?;
    let speed = rows as f64 / started.elapsed().as_secs_f64().max(1e-9);
    let seconds = steps as f64 / per_epoch as f64 * tokens as f64 / speed;
    if as_json {
        return print_json(&json!({
            "memory": plan, "total": plan.total(), "steps": steps, "steps_per_epoch": per_epoch,
            "tokens_per_epoch": tokens, "tokens_per_second": speed, "seconds": seconds,
        }));
    }
    let mut out = std::io::stdout();
    for line in plan.lines().iter().chain(&lines) {
        writeln!(out, "{line}")?;
    }
    let offset = clock_offset();
    writeln!(out, "time     {speed:.0} tokens/s measured, done {}", ends(seconds, now(), offset))?;
    Ok(())
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

fn tell_end(args: &Args, end: &End, pupil: &Pupil, folder: &Folder) -> Result<()> {
    let Progress { step, tokens, seconds, skipped, best, stopped, .. } = end.progress;
    if !end.finished {
        let place = folder.dir().display();
        writeln!(std::io::stderr(), "stopped after step {step}; everything is in {place}, the same command goes on")
            .ok();
        return Err(Interrupted.into());
    }
    let result = pupil.result(folder.dir());
    if args.json {
        return print_json(&json!({
            "output": result, "steps": step, "tokens": tokens, "seconds": seconds, "skipped": skipped, "loss": end.loss,
            "best_val_loss": best.map(|b| b.0), "best_step": best.map(|b| b.1), "stopped_early": stopped,
            "trained": pupil.params().count(),
        }));
    }
    let mut out = std::io::stdout();
    let speed = tokens as f64 / seconds.max(1e-9);
    let loss = end.loss.map_or(String::new(), |loss| format!(", loss {loss:.4}"));
    writeln!(out, "{step} steps in {} ({speed:.0} tokens/s){loss}", duration(seconds))?;
    if skipped > 0 {
        writeln!(out, "{skipped} steps were skipped: their numbers were none")?;
    }
    if let Some((loss, best)) = best {
        let early = if stopped { ", stopped early" } else { "" };
        writeln!(out, "best on the validation set after step {best}: loss {loss:.4}, which was kept{early}")?;
    }
    writeln!(out, "{}", result.display())?;
    let way = match args.method.method {
        Kind::Full => format!("rushlight chat {}", shell(&result.to_string_lossy())),
        _ => format!("rushlight chat {} --adapter {}", shell(&args.model), shell(&result.to_string_lossy())),
    };
    let template = args.template().map_or(String::new(), |template| format!(" --template {}", shell(template)));
    Ok(writeln!(out, "talk with it: {way}{template}")?)
}

/// Shows how a run goes.
struct Show {
    bar: Bar,
    quiet: bool,
    steps: u64,
    offset: Option<i64>,
    validation: Option<f64>,
    /// Tokens and seconds of the last steps.
    seen: Vec<(u64, f64)>,
    first: bool,
}

impl Watch for Show {
    fn step(&mut self, progress: &Progress, line: &StepLine) {
        if self.first {
            // Those of an earlier run are not this one's pace.
            self.bar = Bar::steps(self.quiet, "training", self.steps, progress.step - 1);
        }
        self.seen.push((line.tokens, line.seconds));
        if self.seen.len() > 20 {
            self.seen.remove(0);
        }
        let (tokens, seconds) = self.seen.iter().fold((0, 0.0), |(t, s), (tokens, seconds)| (t + tokens, s + seconds));
        let left = seconds / self.seen.len() as f64 * (self.steps - progress.step) as f64;
        if std::mem::take(&mut self.first) && progress.step < self.steps {
            self.note(&format!(
                "time     the first step took {:.1} s ({:.0} tokens/s): done {}",
                line.seconds,
                line.tokens as f64 / line.seconds.max(1e-9),
                ends(left, now(), self.offset)
            ));
        }
        let validation = self.validation.map_or(String::new(), |loss| format!(", validation {loss:.3}"));
        let detail = format!("loss {:.3}{validation}, {:.0} tokens/s", line.loss, tokens as f64 / seconds.max(1e-9));
        self.bar.at(progress.step, &detail);
    }

    fn evaluated(&mut self, evaluation: &Evaluation) {
        self.validation = evaluation.val_loss.or(self.validation);
        let step = evaluation.step;
        if let Some(loss) = evaluation.val_loss {
            self.note(&format!("step {step}: validation loss {loss:.4}"));
        }
        if let Some(classes) = &evaluation.classification {
            self.note(classes.to_string().trim_end());
        }
        for sample in &evaluation.samples {
            self.note(&format!("step {step}: {}\n  {}", sample.prompt, sample.answer.trim().replace('\n', "\n  ")));
        }
    }

    fn note(&mut self, text: &str) {
        if !self.quiet {
            self.bar.note(text);
        }
    }
}
