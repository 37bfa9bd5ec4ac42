//! Whole runs, over a lesson small enough to be computed at once: a table of numbers that follow tokens.

use super::checkpoint::{Checkpoints, Progress};
use super::folder::Folder;
use super::metrics::{Evaluation, StepLine};
use super::optimizer::Rule;
use super::report::Report;
use super::schedule::{Schedule, Shape};
use super::*;
use crate::train::params::Param;
use rushlight_quant::buffer::Aligned;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const TOKENS: usize = 8;

/// Logits of the next token for each token.
struct Bigrams {
    params: Params,
    /// Passes until it says to stop, or breaks.
    passes: u64,
    nan_from: u64,
    saved: Vec<bool>,
}

impl Bigrams {
    fn new() -> Bigrams {
        let values = Aligned::zeroed(TOKENS * TOKENS);
        let table =
            Param { name: "table".into(), shape: vec![TOKENS, TOKENS], values, rate: 1.0, decay: true, idles: false };
        Bigrams { params: Params { list: vec![table] }, passes: 0, nan_from: u64::MAX, saved: Vec::new() }
    }

    fn pass(&self, examples: &[Example], mut gradients: Option<&mut Gradients>) -> Vec<Loss> {
        let table = &self.params.list[0].values;
        let each = examples.iter().map(|e| {
            let mut loss = Loss::default();
            for (id, target) in e.ids.iter().zip(&e.targets) {
                let Some(target) = target else { continue };
                let row = *id as usize * TOKENS;
                let sum: f64 = table[row..][..TOKENS].iter().map(|x| f64::from(*x).exp()).sum();
                loss += Loss { sum: sum.ln() - f64::from(table[row + *target as usize]), tokens: 1 };
                if let Some(gradients) = &mut gradients {
                    for t in 0..TOKENS {
                        let p = (f64::from(table[row + t]).exp() / sum) as f32;
                        gradients[0][row + t] += p - f32::from(t == *target as usize);
                    }
                }
            }
            loss
        });
        each.collect()
    }
}

impl Lesson for Bigrams {
    fn params(&self) -> &Params {
        &self.params
    }

    fn params_mut(&mut self) -> &mut Params {
        &mut self.params
    }

    fn backward(&mut self, examples: &[Example], noise: u64, gradients: &mut Gradients) -> Result<Loss> {
        self.passes += 1;
        let mut loss = Loss::default();
        self.pass(examples, Some(gradients)).into_iter().for_each(|l| loss += l);
        // What dropout would do: the random numbers belong to the step.
        gradients[0][0] += (noise % 1000) as f32 * 1e-6;
        if self.passes >= self.nan_from {
            loss.sum = f64::NAN;
        }
        Ok(loss)
    }

    fn losses(&mut self, examples: &[Example]) -> Result<Vec<Loss>> {
        Ok(self.pass(examples, None))
    }

    fn answers(&mut self, prompts: &[String]) -> Result<Vec<String>> {
        Ok(prompts.iter().map(|p| format!("{p}!")).collect())
    }

    fn save(&mut self, dir: &Path, finished: bool) -> Result<()> {
        self.saved.push(finished);
        let bytes: Vec<u8> = self.params.list[0].values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Ok(std::fs::write(dir.join("result"), bytes)?)
    }
}

/// Sets the flag after so many steps.
struct Until<'a>(u64, &'a AtomicBool, Vec<String>);

impl Watch for Until<'_> {
    fn step(&mut self, progress: &Progress, line: &StepLine) {
        assert_eq!(progress.step, line.step);
        if line.step == self.0 {
            self.1.store(true, Ordering::Relaxed);
        }
    }

    fn evaluated(&mut self, _: &Evaluation) {}

    fn note(&mut self, text: &str) {
        self.2.push(text.into());
    }
}

impl Data for Vec<Example> {
    fn len(&self) -> usize {
        self.len()
    }

    fn batch(&self, items: &[usize]) -> Vec<Example> {
        items.iter().map(|&i| self[i].clone()).collect()
    }
}

fn examples(count: usize) -> Vec<Example> {
    let example = |i: usize| {
        let ids: Vec<u32> = (0..3 + i % 4).map(|k| ((i + 3 * k) % TOKENS) as u32).collect();
        let labels: Vec<_> = ids.iter().map(|&t| Some(t)).collect();
        Example::from_labels(ids, &labels)
    };
    (0..count).map(example).collect()
}

fn settings() -> Settings {
    Settings {
        seed: 7,
        shuffle: true,
        batch: 4,
        rows: 10,
        schedule: Schedule { shape: Shape::Cosine, rate: 0.05, warmup: 2, steps: 24 },
        rule: Rule::Adamw,
        decay: 0.01,
        clip: Some(1.0),
        eval_steps: 5,
        patience: None,
        prompts: vec!["hi".into()],
        classes: None,
        save_every: Duration::ZERO,
        threads: 2,
    }
}

/// Runs until `until` steps are done; how it ended, what was said, and the bytes of the result.
fn run(dir: &Path, lesson: &mut Bigrams, settings: &Settings, until: u64) -> (Result<End>, Vec<String>, Vec<u8>) {
    let stop = AtomicBool::new(until == 0);
    let mut watch = Until(until, &stop, Vec::new());
    let folder = Folder::open(dir).unwrap();
    let (data, validation) = (examples(30), examples(5));
    let end = train(lesson, &data, Some(&validation), settings, &folder, Report::default(), &stop, &mut watch);
    (end, watch.2, std::fs::read(dir.join("result")).unwrap_or_default())
}

fn begin(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("run.json"), "{}").unwrap();
}

/// Lines of the metrics without their times.
fn lines(dir: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines().map(|l| l.split(",\"seconds\"").next().unwrap().to_string()).collect()
}

#[test]
fn it_learns_and_writes_everything() {
    let dir = tempfile::tempdir().unwrap();
    begin(dir.path());
    let mut lesson = Bigrams::new();
    let (end, notes, _) = run(dir.path(), &mut lesson, &settings(), u64::MAX);
    let end = end.unwrap();
    assert!(end.finished && end.progress.step == 24 && notes.is_empty(), "{notes:?}");
    let all = super::metrics::Metrics::open(&dir.path().join("metrics.jsonl"), 99, 99).unwrap();
    let losses: Vec<f64> =
        all.lines().iter().filter_map(|l| if let metrics::Line::Step(s) = l { Some(s.loss) } else { None }).collect();
    assert_eq!(losses.len(), 24);
    assert!(losses[23] < 0.8 * losses[0], "{losses:?}");
    // Every fifth step, and the last.
    let evaluations: Vec<u64> =
        all.lines().iter().filter(|l| matches!(l, metrics::Line::Evaluation(_))).map(|l| l.step()).collect();
    assert_eq!(evaluations, [5, 10, 15, 20, 24]);
    let page = std::fs::read_to_string(dir.path().join("report.html")).unwrap();
    assert!(page.contains("hi!") && page.contains("polyline"));
    assert_eq!(lesson.saved, [true]);
    // The same command again finds it done.
    let mut again = Bigrams::new();
    let (end, notes, _) = run(dir.path(), &mut again, &settings(), u64::MAX);
    assert!(end.unwrap().finished && again.passes == 0, "{notes:?}");
    assert_eq!(again.params.list[0].values[..], lesson.params.list[0].values[..]);
}

#[test]
fn wherever_it_is_stopped_it_ends_alike() {
    for rule in [Rule::Adamw, Rule::Adamw8bit, Rule::Sgd] {
        let settings = Settings { rule, patience: Some(100), ..settings() };
        let dir = tempfile::tempdir().unwrap();
        let whole = dir.path().join("whole");
        begin(&whole);
        let (_, _, want) = run(&whole, &mut Bigrams::new(), &settings, u64::MAX);
        for stops in [vec![1], vec![5, 6, 10], vec![0, 7, 0, 23, 24]] {
            let path = dir.path().join(format!("{stops:?}"));
            begin(&path);
            for until in &stops {
                let (end, _, _) = run(&path, &mut Bigrams::new(), &settings, *until);
                assert!(!end.unwrap().finished || *until == 24);
            }
            let (end, _, result) = run(&path, &mut Bigrams::new(), &settings, u64::MAX);
            assert!(end.unwrap().finished);
            assert_eq!(result, want, "{rule:?} {stops:?}");
            assert_eq!(lines(&path), lines(&whole), "{rule:?} {stops:?}");
        }
    }
}

#[test]
fn a_killed_run_goes_on_from_its_last_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    begin(&whole);
    let (_, _, want) = run(&whole, &mut Bigrams::new(), &settings(), u64::MAX);
    let path = dir.path().join("killed");
    begin(&path);
    run(&path, &mut Bigrams::new(), &settings(), 13).0.unwrap();
    // The newest checkpoint is cut, the curves are ahead, and a temporary file is left.
    let checkpoints = Checkpoints::open(&path.join("checkpoints")).unwrap();
    let bytes = std::fs::read(checkpoints.path(13)).unwrap();
    std::fs::write(checkpoints.path(13), &bytes[..bytes.len() / 2]).unwrap();
    std::fs::write(path.join("checkpoints/.step-000000014.ckpt.1-0.partial"), "half").unwrap();
    let (end, notes, result) = run(&path, &mut Bigrams::new(), &settings(), u64::MAX);
    assert!(end.unwrap().finished && notes[0].contains("damaged") && notes[1].contains("after step 12"), "{notes:?}");
    assert_eq!(result, want);
    assert_eq!(lines(&path), lines(&whole));
}

#[test]
fn a_run_that_learned_nothing_fails() {
    let dir = tempfile::tempdir().unwrap();
    begin(dir.path());
    let plain = settings();
    let schedule = Schedule { steps: 3, ..plain.schedule };
    let plain = Settings { rows: usize::MAX, eval_steps: 0, schedule, ..plain };
    for _ in 0..2 {
        // The same command once more does not make it better.
        let mut lesson = Bigrams { nan_from: 1, ..Bigrams::new() };
        let error = format!("{:#}", run(dir.path(), &mut lesson, &plain, u64::MAX).0.unwrap_err());
        assert!(
            error.contains("no number in the last 3 of 3 steps") && error.contains("no adapter is written"),
            "{error}"
        );
    }
}

#[test]
fn numbers_that_are_none_are_skipped_and_then_stop_it() {
    let dir = tempfile::tempdir().unwrap();
    begin(dir.path());
    let plain = Settings { rows: usize::MAX, eval_steps: 0, ..settings() };
    let mut lesson = Bigrams { nan_from: 11, ..Bigrams::new() };
    let (end, notes, _) = run(dir.path(), &mut lesson, &plain, u64::MAX);
    let error = format!("{:#}", end.unwrap_err());
    assert!(error.contains("5 steps in a row") && error.contains("step 15") && error.contains("--lr"), "{error}");
    assert_eq!(notes.iter().filter(|n| n.contains("is skipped")).count(), 5);
    // What was learned before is there, untouched.
    let mut params = Bigrams::new().params;
    let progress = checkpoint::read(&dir.path().join("checkpoints/step-000000015.ckpt"), &mut params, None).unwrap();
    assert_eq!((progress.skipped, progress.updates), (5, 10));
    assert!(params.list[0].values.iter().all(|x| x.is_finite()));
    assert_eq!(params.list[0].values[..], lesson.params.list[0].values[..]);
    assert_eq!(lines(dir.path()).iter().filter(|l| l.contains("skipped")).count(), 5);
}

#[test]
fn the_best_is_kept_and_patience_ends() {
    let dir = tempfile::tempdir().unwrap();
    begin(dir.path());
    // So fast that the validation set is soon left behind.
    let fast = Schedule { shape: Shape::Constant, rate: 3.0, warmup: 0, steps: 400 };
    let settings = Settings { schedule: fast, eval_steps: 1, patience: Some(3), clip: None, ..settings() };
    let mut lesson = Bigrams::new();
    let (end, _, result) = run(dir.path(), &mut lesson, &settings, u64::MAX);
    let end = end.unwrap();
    let (loss, step) = end.progress.best.unwrap();
    assert!(end.finished && end.progress.stopped && end.progress.step == step + 3, "{end:?}");
    // What was written are the best parameters, not the last.
    let validation = examples(5);
    let total = lesson.losses(&validation).unwrap().iter().fold(Loss::default(), |mut sum, l| {
        sum += *l;
        sum
    });
    assert_eq!(total.mean(), loss);
    assert_eq!(result.len(), 4 * TOKENS * TOKENS);
}

#[test]
fn a_disk_that_refuses_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    begin(dir.path());
    struct Blocks<'a>(&'a Path, Vec<String>);
    impl Watch for Blocks<'_> {
        fn step(&mut self, progress: &Progress, _: &StepLine) {
            if progress.step == 3 {
                std::fs::remove_dir_all(self.0.join("checkpoints")).unwrap();
                std::fs::write(self.0.join("checkpoints"), "in the way").unwrap();
            }
            if progress.step == 6 {
                std::fs::remove_file(self.0.join("checkpoints")).unwrap();
                std::fs::create_dir(self.0.join("checkpoints")).unwrap();
            }
        }
        fn evaluated(&mut self, _: &Evaluation) {}
        fn note(&mut self, text: &str) {
            self.1.push(text.into());
        }
    }
    let folder = Folder::open(dir.path()).unwrap();
    let (data, stop) = (examples(30), AtomicBool::new(false));
    let mut watch = Blocks(dir.path(), Vec::new());
    let settings = Settings { eval_steps: 0, ..settings() };
    let end =
        train(&mut Bigrams::new(), &data, None, &settings, &folder, Report::default(), &stop, &mut watch).unwrap();
    assert!(end.finished);
    assert_eq!(watch.1.len(), 2, "{:?}", watch.1);
    assert!(watch.1[0].contains("could not be written") && watch.1[0].contains("training goes on"), "{:?}", watch.1);
    assert!(watch.1[1].contains("again"), "{:?}", watch.1);
    assert!(dir.path().join("checkpoints/step-000000024.ckpt").exists());
}
