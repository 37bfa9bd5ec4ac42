//! The report of a run: curves, samples and figures as one HTML page that needs nothing else.

use super::checkpoint::Progress;
use super::metrics::{Evaluation, Line};
use anyhow::{Context, Result};
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, context};
use rushlight_models::checkpoint::AtomicFile;
use serde::Serialize;
use std::io::Write;
use std::path::Path;

/// Most points of a curve: neighbours are joined into their mean.
const POINTS: usize = 600;
/// Evaluations whose samples are shown.
const SHOWN: usize = 12;

/// What a report says besides what was measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// What is trained.
    pub title: String,
    /// The model and the folder.
    pub subtitle: String,
    /// Arguments and what was chosen, a name and a value each.
    pub facts: Vec<(String, String)>,
    /// What became of the records of the data.
    pub data: String,
    /// Steps of the whole run.
    pub steps: u64,
}

/// A chart of curves over the steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Chart {
    name: &'static str,
    curves: Vec<Curve>,
    /// Height and label of each line of the grid.
    grid: Vec<(f64, String)>,
    /// The last step.
    last: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct Curve {
    name: &'static str,
    /// Positions on the page.
    points: Vec<(f64, f64)>,
}

const LEFT: f64 = 60.0;
const WIDTH: f64 = 680.0;
const TOP: f64 = 10.0;
const HEIGHT: f64 = 200.0;

/// Values over steps.
type Series = Vec<(u64, f64)>;

impl Chart {
    fn new(name: &'static str, curves: Vec<(&'static str, Series)>) -> Option<Chart> {
        let curves: Vec<_> = curves.into_iter().filter(|(_, points)| !points.is_empty()).collect();
        let all = || curves.iter().flat_map(|(_, points)| points.iter());
        let last = all().map(|p| p.0).max()?;
        let (mut low, mut high) = all().fold((f64::MAX, f64::MIN), |(l, h), p| (l.min(p.1), h.max(p.1)));
        if high - low < 1e-12 * high.abs() || high == low {
            (low, high) = (low - 0.5 * low.abs().max(1e-6), high + 0.5 * high.abs().max(1e-6));
        }
        let place = |(step, value): (f64, f64)| {
            let x = LEFT + WIDTH * step / last.max(1) as f64;
            (x, TOP + HEIGHT * (high - value) / (high - low))
        };
        let grid = (0..=4).map(|i| {
            let value = low + (high - low) * f64::from(i) / 4.0;
            let label = if value != 0.0 && value.abs() < 0.01 { format!("{value:.1e}") } else { format!("{value:.3}") };
            (place((0.0, value)).1, label)
        });
        let grid = grid.collect();
        let curves = curves
            .into_iter()
            .map(|(name, points)| Curve { name, points: thinned(&points).into_iter().map(place).collect() });
        Some(Chart { name, curves: curves.collect(), grid, last })
    }
}

/// At most [`POINTS`] points: each the mean of neighbours.
fn thinned(points: &[(u64, f64)]) -> Vec<(f64, f64)> {
    let group = points.len().div_ceil(POINTS).max(1);
    let mean = |group: &[(u64, f64)]| {
        let n = group.len() as f64;
        (group.iter().map(|p| p.0 as f64).sum::<f64>() / n, group.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(group).map(mean).collect()
}

impl Report {
    /// The page.
    pub fn html(&self, lines: &[Line], progress: &Progress) -> Result<String> {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::Html);
        environment.add_filter("decimals", |value: f64, digits: usize| format!("{value:.digits$}"));
        environment.add_filter("percent", |share: f64| format!("{:.1} %", 100.0 * share));
        environment.add_filter("time", duration);
        environment.add_template("report", include_str!("report.html")).context("the report's template")?;
        let page = environment.get_template("report").context("the report's template")?;
        let steps = || lines.iter().filter_map(|l| if let Line::Step(s) = l { Some(s) } else { None });
        let evaluations = || lines.iter().filter_map(|l| if let Line::Evaluation(e) = l { Some(e) } else { None });
        let loss = steps().map(|s| (s.step, s.loss)).collect();
        let validation = evaluations().filter_map(|e| Some((e.step, e.val_loss?))).collect();
        let charts = [
            Chart::new("Loss", vec![("training", loss), ("validation", validation)]),
            Chart::new("Learning rate", vec![("learning rate", steps().map(|s| (s.step, s.lr)).collect())]),
            Chart::new("Length of the gradient", vec![("gradient", steps().map(|s| (s.step, s.grad_norm)).collect())]),
        ];
        let charts: Vec<Chart> = charts.into_iter().flatten().collect();
        let samples: Vec<&Evaluation> = evaluations().filter(|e| !e.samples.is_empty()).collect();
        let samples: Vec<_> = samples.into_iter().rev().take(SHOWN).collect();
        let classified = evaluations().filter_map(|e| e.classification.as_ref()).next_back();
        let seconds: f64 = steps().map(|s| s.seconds).sum();
        let tokens: u64 = steps().map(|s| s.tokens).sum();
        let done = steps().count().max(1) as f64;
        Ok(page.render(context! {
            r => Serde(self),
            p => Serde(progress),
            charts => Serde(charts),
            samples => Serde(samples),
            classified => Serde(classified),
            loss => steps().next_back().map(|s| s.loss),
            validation => evaluations().filter_map(|e| e.val_loss).next_back(),
            speed => tokens as f64 / seconds.max(1e-9),
            left => seconds / done * self.steps.saturating_sub(progress.step) as f64,
            program => concat!("rushlight ", env!("CARGO_PKG_VERSION")),
        })?)
    }

    /// Writes the page to `path`, whole or not at all.
    pub fn write(&self, path: &Path, lines: &[Line], progress: &Progress) -> Result<()> {
        let page = self.html(lines, progress)?;
        let mut file = AtomicFile::create(path)?;
        file.write_all(page.as_bytes()).with_context(|| path.display().to_string())?;
        Ok(file.commit()?)
    }
}

/// Seconds as people say them.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.clamp(0.0, 1e9).round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::{Sample, StepLine};
    use super::*;
    use crate::train::data::classes::Confusion;

    fn lines(steps: u64) -> Vec<Line> {
        let step = |step| {
            Line::Step(StepLine {
                step,
                loss: 4.0 - step as f64 / steps as f64,
                grad_norm: 1.0,
                lr: 1e-4,
                tokens: 10,
                seconds: 0.1,
            })
        };
        let mut lines: Vec<Line> = (1..=steps).map(step).collect();
        let samples = vec![Sample { prompt: "<b>who</b>".into(), answer: "a candle".into() }];
        let names = ["yes".to_string(), "no".to_string()];
        let scores = Confusion::new(&names, [(0, Some(0)), (0, Some(0)), (1, Some(1)), (1, Some(0))]).metrics();
        lines.push(Line::Evaluation(Evaluation {
            step: steps,
            val_loss: Some(3.25),
            samples,
            classification: Some(scores),
        }));
        lines
    }

    fn report() -> Report {
        let facts = vec![("learning rate".into(), "0.0002".into())];
        Report {
            title: "LoRA".into(),
            subtitle: "m.gguf → out".into(),
            facts,
            data: "a.jsonl: 3 conversations".into(),
            steps: 5000,
        }
    }

    #[test]
    fn a_page_that_needs_nothing_else() {
        let progress = Progress { step: 2000, tokens: 20_000, seconds: 200.0, skipped: 1, ..Progress::default() };
        let page = report().html(&lines(2000), &progress).unwrap();
        for part in [
            "3.000",
            "3.250",
            "a candle",
            "75.0 %",
            "a.jsonl: 3 conversations",
            "2000 of 5000",
            "100 tokens/s",
            "5 min 0 s",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert!(!page.contains("<b>who") && !page.contains("http"), "text is no markup, and nothing is fetched");
        assert!(page.len() < 100_000, "curves are thinned: {}", page.len());
    }

    #[test]
    fn a_page_before_anything_happened() {
        let page = report().html(&[], &Progress::default()).unwrap();
        assert!(page.contains("0 of 5000") && !page.contains("polyline"));
    }

    #[test]
    fn curves_fill_their_chart() {
        let chart = Chart::new("Loss", vec![("a", vec![(1, 4.0), (2, 3.0)]), ("b", Vec::new())]).unwrap();
        assert_eq!(chart.curves.len(), 1);
        assert_eq!(chart.curves[0].points, [(LEFT + WIDTH / 2.0, TOP), (LEFT + WIDTH, TOP + HEIGHT)]);
        // A curve that never changes is a line in the middle.
        let flat = Chart::new("Rate", vec![("a", vec![(1, 2.0), (9, 2.0)])]).unwrap();
        assert!((flat.curves[0].points[0].1 - (TOP + HEIGHT / 2.0)).abs() < 1e-9);
        assert_eq!(thinned(&(0..6000).map(|i| (i, 1.0)).collect::<Vec<_>>()).len(), POINTS);
        assert_eq!([3.2, 61.0, 7322.0].map(duration), ["3 s", "1 min 1 s", "2 h 2 min"]);
    }
}
