//! `metrics.jsonl`: a line for every step and every evaluation, as they happen.

use crate::train::data::classes::Metrics as Classes;
use anyhow::{Context, Result};
use rushlight_models::checkpoint::AtomicFile;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// A step.
    Step(StepLine),
    /// A step that was skipped.
    Skipped(Skipped),
    /// An evaluation: the last, as it can be without anything but its step.
    Evaluation(Evaluation),
}

/// What a step came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepLine {
    /// Its number, from 1.
    pub step: u64,
    /// Mean over the tokens that count, before the update.
    pub loss: f64,
    /// Length of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub lr: f64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Seconds that it took.
    pub seconds: f64,
}

/// What an evaluation came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// After this step.
    pub step: u64,
    /// Mean over the tokens of the validation set that count; `None` where there is no such set.
    pub val_loss: Option<f64>,
    /// Answers to the sample prompts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub samples: Vec<Sample>,
    /// How the validation set is classified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classification: Option<Classes>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// What was asked.
    pub prompt: String,
    /// What the model said.
    pub answer: String,
}

/// A step whose numbers were none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Skipped {
    /// Its number, from 1.
    pub step: u64,
    /// Why.
    pub skipped: String,
}

impl Line {
    /// The step it belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Line::Step(StepLine { step, .. })
            | Line::Evaluation(Evaluation { step, .. })
            | Line::Skipped(Skipped { step, .. }) => *step,
        }
    }
}

/// The file, and all its lines.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    /// `None` after a line could not be written.
    file: Option<File>,
    lines: Vec<Line>,
    /// The same as they are written: a number that is read and written again may differ in its last digit.
    texts: Vec<String>,
}

impl Metrics {
    /// The file at `path` with its lines up to `step`, and its evaluations up to `evaluated`: what is later comes again.
    pub fn open(path: &Path, step: u64, evaluated: u64) -> Result<Metrics> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e).with_context(|| path.display().to_string()),
        };
        // The last line of a killed run may be cut.
        let lines = text.lines().filter_map(|text| Some((serde_json::from_str::<Line>(text).ok()?, text.to_owned())));
        let last = |line: &Line| if matches!(line, Line::Evaluation(_)) { evaluated } else { step };
        let (lines, texts) = lines.filter(|(line, _)| line.step() <= last(line)).unzip();
        let mut metrics = Metrics { path: path.to_owned(), file: None, lines, texts };
        metrics.rewrite()?;
        Ok(metrics)
    }

    /// All lines.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// Adds a line. It is kept when it cannot be written, and written with the next.
    pub fn push(&mut self, line: Line) -> Result<()> {
        let text = serde_json::to_string(&line)?;
        self.lines.push(line);
        self.texts.push(text.clone());
        let Some(file) = &mut self.file else { return self.rewrite() };
        // At once: a line is there as soon as its step is done.
        file.write_all((text + "\n").as_bytes())
            .with_context(|| self.path.display().to_string())
            .inspect_err(|_| self.file = None)
    }

    fn rewrite(&mut self) -> Result<()> {
        let said = || self.path.display().to_string();
        let mut out = AtomicFile::create(&self.path)?;
        for text in &self.texts {
            out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).with_context(said)?;
        }
        out.commit()?;
        self.file = Some(OpenOptions::new().append(true).open(&self.path).with_context(said)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> Line {
        Line::Step(StepLine { step, loss: 0.1 + step as f64, grad_norm: 2.0, lr: 1e-4, tokens: 64, seconds: 0.5 })
    }

    #[test]
    fn lines_are_never_doubled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut metrics = Metrics::open(&path, 0, 0).unwrap();
        for i in 1..=5 {
            metrics.push(step(i)).unwrap();
        }
        let samples = vec![Sample { prompt: "hi".into(), answer: "ho\n".into() }];
        let evaluation = |step| {
            Line::Evaluation(Evaluation { step, val_loss: Some(1.5), samples: samples.clone(), classification: None })
        };
        metrics.push(evaluation(5)).unwrap();
        metrics.push(Line::Skipped(Skipped { step: 6, skipped: "the loss is not a number".into() })).unwrap();
        assert_eq!(Metrics::open(&path, 6, 5).unwrap().lines().len(), 7);
        // Killed in the middle of a line.
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text + "{\"step\":7,\"lo").unwrap();
        let back = Metrics::open(&path, 5, 5).unwrap();
        assert_eq!(back.lines()[..5], (1..=5).map(step).collect::<Vec<_>>());
        assert_eq!(back.lines()[5..], [evaluation(5)]);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 6);
        std::fs::copy(&path, dir.path().join("other")).unwrap();
        assert_eq!(Metrics::open(&dir.path().join("other"), 5, 4).unwrap().lines().len(), 5);
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        let keys: Vec<&str> = first.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["step", "loss", "grad_norm", "lr", "tokens", "seconds"]);
        assert!(!text.lines().last().unwrap().contains("\"loss\""), "readers take lines with step and loss for steps");
    }

    #[test]
    fn a_line_that_could_not_be_written_comes_later() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("run");
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("metrics.jsonl");
        let mut metrics = Metrics::open(&path, 0, 0).unwrap();
        metrics.file = None;
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(metrics.push(step(1)).is_err());
        std::fs::create_dir(&folder).unwrap();
        metrics.push(step(2)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2);
    }
}
