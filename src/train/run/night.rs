//! The loop: steps, evaluations and checkpoints until it is done or stopped.

use super::checkpoint::{self, Checkpoints, Progress};
use super::classify::Classification;
use super::events::{Events, Scalar};
use super::folder::Folder;
use super::metrics::{Evaluation, Line, Metrics, Sample, Skipped, StepLine};
use super::optimizer::{Optimizer, Rule, clip, norm};
use super::report::Report;
use super::schedule::Schedule;
use super::{Data, Lesson};
use crate::engine::random::Random;
use crate::train::batch::Loss;
use crate::train::data::{Batches, Position, micro_batches};
use crate::train::params::Gradients;
use anyhow::{Context, Result, bail};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Steps in a row whose numbers are none before the run gives up.
const BAD: u64 = 5;
/// Items of the validation set that are taken at a time.
const EVALUATED: usize = 64;
/// How long the report stays as it is at least.
const REPORT: Duration = Duration::from_secs(20);
/// How long after a checkpoint that could not be written the next is tried.
const AGAIN: Duration = Duration::from_secs(60);

/// How a run goes.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Seed of the order of examples and of dropout.
    pub seed: u64,
    /// Whether examples come in a random order.
    pub shuffle: bool,
    /// Examples of a step.
    pub batch: usize,
    /// Tokens that go through the model together.
    pub rows: usize,
    /// The learning rate, and the number of steps.
    pub schedule: Schedule,
    /// The optimizer.
    pub rule: Rule,
    /// Weight decay.
    pub decay: f64,
    /// Longest gradient; `None`: as they are.
    pub clip: Option<f64>,
    /// Steps between evaluations; 0: none.
    pub eval_steps: u64,
    /// Evaluations without a lower loss after which the run stops.
    pub patience: Option<u64>,
    /// What the model is asked at each evaluation.
    pub prompts: Vec<String>,
    /// The validation set as questions, where it is to be classified.
    pub classes: Option<Classification>,
    /// Time between checkpoints.
    pub save_every: Duration,
    /// Threads of the optimizer.
    pub threads: usize,
}

/// Who watches a run.
pub trait Watch {
    /// A step is done: `progress.step` of `steps`.
    fn step(&mut self, progress: &Progress, line: &StepLine);

    /// An evaluation is done.
    fn evaluated(&mut self, evaluation: &Evaluation);

    /// Something that a person should know.
    fn note(&mut self, text: &str);
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Where it stands.
    pub progress: Progress,
    /// Whether it is finished; otherwise it was interrupted.
    pub finished: bool,
    /// The loss of the last step.
    pub loss: Option<f64>,
}

/// Goes on with the run of `folder`, or begins it, until it is done or `stop` is set.
///
/// # Errors
/// When the model or the disk fails in a way that waiting does not mend, or the loss is no number several times in a row.
pub fn train(
    lesson: &mut dyn Lesson,
    train: &dyn Data,
    validation: Option<&dyn Data>,
    settings: &Settings,
    folder: &Folder,
    report: Report,
    stop: &AtomicBool,
    watch: &mut dyn Watch,
) -> Result<End> {
    let checkpoints = Checkpoints::open(&folder.path("checkpoints"))?;
    let mut optimizer = Optimizer::new(settings.rule, lesson.params(), settings.decay, settings.threads);
    let loaded = checkpoints.load(lesson.params_mut(), &mut optimizer, &mut |text| watch.note(&text))?;
    folder.record()?;
    if let Some(progress) = &loaded {
        watch.note(&format!("going on after step {} of {}", progress.step, settings.schedule.steps));
    }
    let mut progress = loaded.unwrap_or_default();
    // With more patience than it had, a run goes on.
    progress.stopped = settings.patience.is_some_and(|most| progress.waited >= most);
    let metrics = Metrics::open(&folder.path("metrics.jsonl"), progress.step, progress.evaluated)?;
    let time = now();
    let known: Vec<Vec<Scalar<'_>>> = metrics.lines().iter().map(|line| scalars(line, time)).collect();
    let events = Events::create(folder.dir(), time, &known.concat())?;
    let batches = Batches::new(train.len(), settings.batch, settings.shuffle.then_some(settings.seed));
    let gradients = lesson.params().gradients();
    let mut night = Night {
        lesson,
        train,
        validation,
        settings,
        folder,
        report,
        stop,
        watch,
        checkpoints,
        optimizer,
        progress,
        metrics,
        events,
        batches,
        gradients,
        saved: Instant::now(),
        save_after: settings.save_every,
        reported: None,
        complaints: [false; 2],
    };
    night.run()
}

struct Night<'a> {
    lesson: &'a mut dyn Lesson,
    train: &'a dyn Data,
    validation: Option<&'a dyn Data>,
    settings: &'a Settings,
    folder: &'a Folder,
    report: Report,
    stop: &'a AtomicBool,
    watch: &'a mut dyn Watch,
    checkpoints: Checkpoints,
    optimizer: Optimizer,
    progress: Progress,
    metrics: Metrics,
    events: Events,
    batches: Batches,
    gradients: Gradients,
    saved: Instant,
    save_after: Duration,
    reported: Option<Instant>,
    /// Whether it was said that checkpoints, or curves, cannot be written.
    complaints: [bool; 2],
}

impl Night<'_> {
    fn run(&mut self) -> Result<End> {
        let (mut bad, mut loss) = (0, None);
        let mut interrupted = false;
        loop {
            // First what the steps done still owe: a run may have been stopped before its evaluation.
            if self.evaluation_due() && !self.evaluate()? {
                interrupted = true;
                break;
            }
            if self.progress.step >= self.settings.schedule.steps || self.progress.stopped {
                break;
            }
            if self.saved.elapsed() >= self.save_after {
                self.save(false)?;
            }
            if self.reported.is_none_or(|at| at.elapsed() >= REPORT) {
                self.write_report();
            }
            let Some(line) = self.step()? else {
                interrupted = true;
                break;
            };
            match &line {
                Line::Step(done) => {
                    (bad, loss) = (0, Some(done.loss));
                    self.watch.step(&self.progress, done);
                }
                Line::Skipped(skipped) => {
                    bad += 1;
                    self.progress.skipped += 1;
                    let (step, why) = (skipped.step, skipped.skipped.clone());
                    self.watch.note(&format!("step {step} is skipped: {why}"));
                }
                Line::Evaluation(_) => {}
            }
            self.log(line);
            if bad == BAD {
                self.save(true)?;
                self.write_report();
                bail!(
                    "the loss or its gradient was no number {BAD} steps in a row (last at step {}), which skipping does not \
                     mend. Everything up to there is saved in {}. A lower --lr or --clip, or a longer --warmup-steps, with \
                     another -o usually helps",
                    self.progress.step,
                    self.folder.dir().display()
                );
            }
        }
        self.finish(interrupted, loss)
    }

    /// Saves, and writes what was learned.
    fn finish(&mut self, interrupted: bool, loss: Option<f64>) -> Result<End> {
        self.save(true)?;
        self.write_report();
        let steps = self.metrics.lines().iter().rev().filter(|line| !matches!(line, Line::Evaluation(_)));
        let bad = steps.take_while(|line| matches!(line, Line::Skipped(_))).count();
        // One step may be skipped for its own examples; several that are the last, or all, are no lesson.
        if !interrupted && bad > 0 && (bad > 1 || self.progress.updates == 0) && self.progress.best.is_none() {
            let (steps, place) = (self.progress.step, self.folder.dir().display());
            bail!(
                "the loss or its gradient was no number in the last {bad} of {steps} steps, so no adapter is written. \
                 Everything is saved in {place}. If `rushlight run` shows that the model itself is sound, a lower --lr or \
                 --clip, or a longer --warmup-steps, with another -o usually helps"
            );
        }
        let best = self.progress.best.map(|(_, step)| step).filter(|step| *step != self.progress.step && !interrupted);
        if let Some(step) = best {
            checkpoint::read(&self.checkpoints.best(step), self.lesson.params_mut(), None)?;
        }
        self.lesson.save(self.folder.dir(), !interrupted)?;
        Ok(End { progress: self.progress.clone(), finished: !interrupted, loss })
    }

    /// Whether the parameters as they are should be evaluated and are not yet.
    fn evaluation_due(&self) -> bool {
        let (step, every) = (self.progress.step, self.settings.eval_steps);
        let due = step > 0 && every > 0 && (step.is_multiple_of(every) || step == self.settings.schedule.steps);
        due && self.progress.evaluated < step
    }

    /// One step; `None`: interrupted, and nothing has changed.
    fn step(&mut self) -> Result<Option<Line>> {
        let started = Instant::now();
        let step = self.progress.step;
        let per_epoch = self.batches.per_epoch() as u64;
        // The place in the data follows from the step.
        let item = (step % per_epoch) as usize * self.settings.batch;
        self.batches.seek(Position { epoch: step / per_epoch, item });
        let examples = self.train.batch(&self.batches.next_batch());
        self.gradients.clear();
        let mut loss = Loss::default();
        for (i, group) in micro_batches(&examples, self.settings.rows).into_iter().enumerate() {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let noise = mix(mix(self.settings.seed, step), i as u64);
            loss += self.lesson.backward(&examples[group], noise, &mut self.gradients)?;
        }
        let lr = self.settings.schedule.at(step);
        // The mean over all tokens of the step, however they were grouped.
        let mean = 1.0 / loss.tokens.max(1) as f64;
        let grad_norm = norm(&self.gradients) * mean;
        let tokens: u64 = examples.iter().map(|e| e.ids.len() as u64).sum();
        self.progress.step += 1;
        self.progress.tokens += tokens;
        let number = self.progress.step;
        if !loss.sum.is_finite() || !grad_norm.is_finite() {
            let what = if loss.sum.is_finite() { "gradient" } else { "loss" };
            self.progress.seconds += started.elapsed().as_secs_f64();
            let skipped = format!("the {what} is not a number");
            return Ok(Some(Line::Skipped(Skipped { step: number, skipped })));
        }
        let scale = mean * clip(grad_norm, self.settings.clip);
        self.optimizer.step(self.lesson.params_mut(), &self.gradients, scale as f32, lr);
        self.progress.updates = self.optimizer.updates;
        self.progress.uneven = self.optimizer.uneven();
        let seconds = started.elapsed().as_secs_f64();
        self.progress.seconds += seconds;
        Ok(Some(Line::Step(StepLine { step: number, loss: loss.mean(), grad_norm, lr, tokens, seconds })))
    }

    /// Loss, classes and samples of the parameters as they are; false: interrupted.
    fn evaluate(&mut self) -> Result<bool> {
        let mut loss = Loss::default();
        let items: Vec<usize> = (0..self.validation.map_or(0, |data| data.len())).collect();
        for items in items.chunks(EVALUATED) {
            let examples = self.validation.map_or(Vec::new(), |data| data.batch(items));
            for group in micro_batches(&examples, self.settings.rows) {
                if self.stop.load(Ordering::Relaxed) {
                    return Ok(false);
                }
                self.lesson.losses(&examples[group])?.into_iter().for_each(|l| loss += l);
            }
        }
        let classification = match &self.settings.classes {
            Some(classification) => Some(classification.metrics(self.lesson, self.settings.rows)?),
            None => None,
        };
        let prompts = &self.settings.prompts;
        let answers = self.lesson.answers(prompts)?;
        if self.stop.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let sample = |(prompt, answer): (&String, String)| Sample { prompt: prompt.clone(), answer };
        let samples = prompts.iter().zip(answers).map(sample).collect();
        let step = self.progress.step;
        let val_loss = (loss.tokens > 0).then(|| loss.mean());
        if let Some(loss) = val_loss {
            if loss.is_finite() && self.progress.best.is_none_or(|(best, _)| loss < best) {
                let path = self.checkpoints.best(step);
                match checkpoint::write(&path, &self.progress, self.lesson.params(), None) {
                    Ok(()) => (self.progress.best, self.progress.waited) = (Some((loss, step)), 0),
                    Err(e) => self.complain(0, &e),
                }
            } else {
                self.progress.waited += 1;
            }
            self.progress.stopped = self.settings.patience.is_some_and(|most| self.progress.waited >= most);
        }
        self.progress.evaluated = step;
        let evaluation = Evaluation { step, val_loss, samples, classification };
        self.watch.evaluated(&evaluation);
        self.log(Line::Evaluation(evaluation));
        self.write_report();
        Ok(true)
    }

    /// Adds a line to the files of curves.
    fn log(&mut self, line: Line) {
        let written = self.events.add(&scalars(&line, now()));
        let result = self.metrics.push(line).and(written);
        match result {
            Ok(()) => self.complaints[1] = false,
            Err(e) => self.complain(1, &e),
        }
    }

    /// Saves a checkpoint. Where that fails the run goes on with the last one in place, and tries again; unless it is the
    /// `last` chance.
    fn save(&mut self, last: bool) -> Result<()> {
        let saved = self.checkpoints.save(&self.progress, self.lesson.params(), &self.optimizer);
        self.saved = Instant::now();
        match saved {
            Ok(()) => {
                if std::mem::take(&mut self.complaints[0]) {
                    self.watch.note("checkpoints are written again");
                }
                self.save_after = self.settings.save_every;
                Ok(())
            }
            Err(e) if last => Err(e).with_context(|| {
                let place = self.folder.dir().display();
                match self.checkpoints.newest() {
                    Some(step) => format!(
                        "the last checkpoint could not be written; that of step {step} is in {place}: make room, and the \
                         same command goes on from there"
                    ),
                    None => format!(
                        "the checkpoint could not be written, and there is none in {place}: make room, and begin again with \
                         the same command"
                    ),
                }
            }),
            Err(e) => {
                self.complain(0, &e);
                self.save_after = AGAIN.min(self.settings.save_every);
                Ok(())
            }
        }
    }

    /// Says once that something cannot be written.
    fn complain(&mut self, what: usize, error: &anyhow::Error) {
        if !std::mem::replace(&mut self.complaints[what], true) {
            let things = ["a checkpoint", "the curves"][what];
            let rest = ["; the last good one is kept", "; they are kept in memory"][what];
            self.watch
                .note(&format!("{things} could not be written ({error:#}){rest}, training goes on and tries again"));
        }
    }

    fn write_report(&mut self) {
        self.reported = Some(Instant::now());
        let path = self.folder.path("report.html");
        if let Err(e) = self.report.write(&path, self.metrics.lines(), &self.progress) {
            self.complain(1, &e);
        }
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}

/// The values of a line for TensorBoard.
fn scalars(line: &Line, time: f64) -> Vec<Scalar<'static>> {
    let scalar = |tag, step, value: f64| Scalar { tag, step, value: value as f32, time };
    match line {
        Line::Step(s) => vec![
            scalar("train/loss", s.step, s.loss),
            scalar("train/grad_norm", s.step, s.grad_norm),
            scalar("train/learning_rate", s.step, s.lr),
            scalar("train/tokens_per_second", s.step, s.tokens as f64 / s.seconds.max(1e-9)),
        ],
        Line::Evaluation(e) => {
            let loss = e.val_loss.map(|loss| scalar("eval/loss", e.step, loss));
            let accuracy = e.classification.as_ref().map(|c| scalar("eval/accuracy", e.step, c.accuracy));
            loss.into_iter().chain(accuracy).collect()
        }
        Line::Skipped(_) => Vec::new(),
    }
}

/// A number that follows from two, unlike its neighbours.
fn mix(seed: u64, n: u64) -> u64 {
    Random::new(seed ^ Random::new(n).bits()).bits()
}
