//! The report of a quantization: what became of each tensor, and how the new model's predictions compare with the
//! original's, as one HTML page that needs nothing else.

use super::plan::{Plan, Planned};
use crate::calibrate::compare::Comparison;
use crate::cli::size;
use anyhow::{Context, Result};
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, context};
use rushlight_models::checkpoint::{AtomicFile, Checkpoint};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Weights that a thread decodes at once.
const PIECE: usize = 1 << 18;

/// All that a report tells.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The program and its version.
    pub program: String,
    /// The model that was quantized.
    pub source: String,
    /// The file that was written.
    pub output: String,
    /// The type asked for, such as `Q4_K_M`.
    pub target: String,
    /// How numbers were chosen, such as `rtn`.
    pub method: String,
    /// Bytes of all tensors before.
    pub bytes_before: u64,
    /// Bytes of all tensors after.
    pub bytes_after: u64,
    /// Bits per weight before.
    pub bits_before: f64,
    /// Bits per weight after.
    pub bits_after: f64,
    /// Every tensor, in the order of the file.
    pub tensors: Vec<TensorReport>,
    /// The new model beside the original, where that was measured.
    pub comparison: Option<Compared>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// What became of a tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// Its name in the file written.
    pub name: String,
    /// Row-major, outermost dimension first.
    pub shape: Vec<usize>,
    /// Format before.
    pub from: String,
    /// Format after.
    pub to: String,
    /// Bytes after.
    pub bytes: u64,
    /// Root mean square of what changed over that of the weights; 0 where nothing did.
    pub relative_error: f64,
    /// The largest change of a weight.
    pub largest_error: f64,
}

/// A comparison and the text that it was made on.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// The text.
    pub text: String,
    /// The figures.
    #[serde(flatten)]
    pub comparison: Comparison,
}

/// How far the tensors of `output` are from those of `source` that `plan` made them of. `progress` is told how many
/// tensors are done.
pub fn errors(
    plan: &Plan,
    source: &Checkpoint,
    output: &Checkpoint,
    threads: usize,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Vec<TensorReport>> {
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || -> Result<Vec<(usize, TensorReport)>> {
        let mut reports = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(tensor) = plan.tensors.get(i) else { return Ok(reports) };
            reports.push((i, error(tensor, source, output)?));
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        }
    };
    let parts = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|t| t.join()).collect::<Vec<_>>()
    });
    let mut all = BTreeMap::new();
    for part in parts {
        match part {
            Ok(reports) => all.extend(reports?),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    Ok(all.into_values().collect())
}

fn error(tensor: &Planned, source: &Checkpoint, output: &Checkpoint) -> Result<TensorReport> {
    let name = &tensor.source.name;
    let (before, after) = (tensor.source.data(source)?, output.tensor(name)?.data);
    let (from, to, cols) = (tensor.source.format, tensor.format, tensor.cols());
    let row = |format: rushlight_quant::formats::Format| format.row_bytes(cols).context("rows are not whole blocks");
    let (row_before, row_after) = (row(from)?, row(to)?);
    let rows = (PIECE / cols.max(1)).max(1);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let (mut squares, mut changes, mut largest) = (0f64, 0f64, 0f32);
    if from != to || before[..] != after[..] {
        for (before, after) in before.chunks(rows * row_before).zip(after.chunks(rows * row_after)) {
            let count = before.len() / row_before * cols;
            a.resize(count, 0f32);
            b.resize(count, 0f32);
            from.decode(before, &mut a);
            to.decode(after, &mut b);
            for (a, b) in a.iter().zip(&b) {
                let change = a - b;
                squares += f64::from(*a) * f64::from(*a);
                changes += f64::from(change) * f64::from(change);
                largest = largest.max(change.abs());
            }
        }
    }
    before.release();
    after.release();
    Ok(TensorReport {
        name: name.clone(),
        shape: tensor.source.shape.clone(),
        from: from.to_string(),
        to: to.to_string(),
        bytes: tensor.bytes().0,
        relative_error: if squares > 0.0 { (changes / squares).sqrt() } else { 0.0 },
        largest_error: f64::from(largest),
    })
}

impl Report {
    /// The page.
    pub fn html(&self) -> Result<String> {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::Html);
        environment.add_filter("size", |bytes: u64| size(bytes));
        environment.add_filter("percent", |share: f64| percent(share));
        environment.add_filter("decimals", |value: f64, digits: usize| format!("{value:.digits$}"));
        environment.add_template("report", include_str!("report.html")).context("the report's template")?;
        let page = environment.get_template("report").context("the report's template")?;
        let worst = self.tensors.iter().map(|t| t.relative_error).fold(0.0, f64::max);
        Ok(page.render(context! {
            r => Serde(self),
            types => Serde(self.types()),
            chart => Serde(self.chart()),
            worst,
        })?)
    }

    /// Writes the page to `path`, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<()> {
        let page = self.html()?;
        let mut file = AtomicFile::create(path)?;
        file.write_all(page.as_bytes()).with_context(|| path.display().to_string())?;
        Ok(file.commit()?)
    }

    /// What each format takes, the largest first.
    fn types(&self) -> Vec<TypeShare> {
        let mut types: BTreeMap<&str, TypeShare> = BTreeMap::new();
        for tensor in &self.tensors {
            let share =
                types.entry(&tensor.to).or_insert_with(|| TypeShare { name: tensor.to.clone(), ..<_>::default() });
            share.tensors += 1;
            share.bytes += tensor.bytes;
        }
        let mut types: Vec<TypeShare> = types.into_values().collect();
        types.sort_by_key(|t| std::cmp::Reverse(t.bytes));
        let mut start = 0.0;
        for share in &mut types {
            share.start = start;
            share.share = share.bytes as f64 / self.bytes_after.max(1) as f64;
            start += share.share;
        }
        types
    }

    /// Errors over layers, a line for each kind of matrix.
    fn chart(&self) -> Chart {
        let mut lines: BTreeMap<&str, Vec<(usize, f64)>> = BTreeMap::new();
        for tensor in &self.tensors {
            let layer = tensor.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
            let Some((Ok(layer), kind)) = layer.map(|(layer, kind)| (layer.parse::<usize>(), kind)) else { continue };
            if tensor.shape.len() > 1 && tensor.relative_error > 0.0 {
                lines
                    .entry(kind.strip_suffix(".weight").unwrap_or(kind))
                    .or_default()
                    .push((layer, tensor.relative_error));
            }
        }
        let last = lines.values().flatten().map(|p| p.0).max().unwrap_or(0);
        let top = nice(lines.values().flatten().map(|p| p.1).fold(0.0, f64::max));
        let place = |(layer, error): &(usize, f64)| {
            let x = Chart::LEFT + Chart::WIDTH * *layer as f64 / last.max(1) as f64;
            (x, Chart::TOP + Chart::HEIGHT * (1.0 - error / top))
        };
        let lines = lines.into_iter().map(|(name, mut points)| {
            points.sort_by_key(|p| p.0);
            Line { name: name.into(), points: points.iter().map(place).collect() }
        });
        let steps = (0..=4).map(|i| {
            let share = f64::from(i) / 4.0;
            (Chart::TOP + Chart::HEIGHT * (1.0 - share), percent(top * share))
        });
        Chart { lines: lines.collect(), steps: steps.collect(), last }
    }
}

/// The part of the file that one format takes.
#[derive(Default, Serialize)]
struct TypeShare {
    name: String,
    tensors: usize,
    bytes: u64,
    /// Of all bytes, and where it begins among them.
    share: f64,
    start: f64,
}

#[derive(Serialize)]
struct Chart {
    lines: Vec<Line>,
    /// Height and label of each line of the grid.
    steps: Vec<(f64, String)>,
    /// The last layer's number.
    last: usize,
}

impl Chart {
    const LEFT: f64 = 50.0;
    const TOP: f64 = 10.0;
    const WIDTH: f64 = 690.0;
    const HEIGHT: f64 = 220.0;
}

#[derive(Serialize)]
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// The next of 1, 2 and 5 times a power of ten that is not below `x`.
fn nice(x: f64) -> f64 {
    if x <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(x.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|n| *n >= x).unwrap_or(x)
}

fn percent(share: f64) -> String {
    let value = 100.0 * share;
    let digits = if value >= 10.0 {
        1
    } else if value >= 0.1 || value == 0.0 {
        2
    } else {
        4
    };
    format!("{value:.digits$} %")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::compare::Score;

    fn report() -> Report {
        let tensor = |name: &str, to: &str, error| TensorReport {
            name: name.into(),
            shape: vec![64, 64],
            from: "F16".into(),
            to: to.into(),
            bytes: 4096,
            relative_error: error,
            largest_error: error * 2.0,
        };
        let score = |perplexity| Score { perplexity, error: 0.1, chunks: 2, tokens: 100 };
        Report {
            program: "rushlight 0".into(),
            source: "<script>alert(1)</script>".into(),
            output: "out.gguf".into(),
            target: "Q4_K_M".into(),
            method: "rtn".into(),
            bytes_before: 40960,
            bytes_after: 12288,
            bits_before: 16.0,
            bits_after: 4.8,
            tensors: vec![
                tensor("token_embd.weight", "Q6_K", 0.01),
                tensor("blk.0.attn_q.weight", "Q4_K", 0.07),
                tensor("blk.1.attn_q.weight", "Q4_K", 0.08),
            ],
            comparison: Some(Compared {
                text: "held-out".into(),
                comparison: Comparison {
                    score: score(12.5),
                    original: score(12.0),
                    kl: 0.031,
                    kl_error: 0.001,
                    kl_99: 0.4,
                    same_top: 0.912,
                },
            }),
            notes: vec!["2 tensors are Q5_0 instead".into()],
        }
    }

    #[test]
    fn a_page_of_all_figures() {
        let page = report().html().unwrap();
        for part in
            ["12.5000", "12.0000", "0.03100", "91.2 %", "blk.1.attn_q.weight", "8.00 %", "Q5_0 instead", "41.0 kB"]
        {
            assert!(page.contains(part), "{part}");
        }
        assert!(!page.contains("<script>alert"), "names are text, not markup");
        assert!(!page.contains("http"), "the page needs nothing else");
        // The scale ends at 10 %: 7 % and 8 % lie at that share of its height, at both ends.
        let chart = report().chart();
        assert_eq!(chart.lines.len(), 1);
        let points: Vec<_> = chart.lines[0].points.iter().map(|p| (p.0.round(), p.1.round())).collect();
        assert_eq!(points, [(50.0, 76.0), (740.0, 54.0)]);
    }

    #[test]
    fn a_page_without_a_comparison() {
        let page = Report { comparison: None, tensors: Vec::new(), ..report() }.html().unwrap();
        assert!(!page.contains("Perplexity"));
    }

    #[test]
    fn round_scales() {
        assert_eq!([0.0, 0.07, 0.1, 0.3, 7.0].map(nice), [1.0, 0.1, 0.1, 0.5, 10.0]);
        assert_eq!([0.0, 0.5, 0.0123, 0.00001].map(percent), ["0.00 %", "50.0 %", "1.23 %", "0.0010 %"]);
    }
}
