//! What `quantize` tells when it is done.

use crate::cli::size;
use crate::quantize::plan::Plan;
use crate::quantize::report::Report;
use anyhow::Result;
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;

#[derive(Serialize)]
pub(super) struct Summary {
    pub path: PathBuf,
    #[serde(rename = "type")]
    target: &'static str,
    tensors: usize,
    parameters: u64,
    /// Bytes of all tensors, before and after.
    pub bytes_before: u64,
    pub bytes: u64,
    pub bits_per_weight_before: f64,
    pub bits_per_weight: f64,
    formats: Vec<FormatSummary>,
    notes: Vec<String>,
    /// `None` when nothing was written.
    pub seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<Report>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    plan: Vec<TensorSummary>,
}

#[derive(Serialize)]
pub(super) struct FormatSummary {
    format: &'static str,
    tensors: usize,
    parameters: u64,
    bytes: u64,
}

#[derive(Serialize)]
pub(super) struct TensorSummary {
    name: String,
    shape: Vec<usize>,
    from: &'static str,
    to: &'static str,
}

/// What is known before anything is written; `each`: with every tensor.
pub(super) fn summarize(plan: &Plan, path: PathBuf, parameters: u64, each: bool) -> Summary {
    let mut formats: Vec<FormatSummary> = Vec::new();
    for tensor in &plan.tensors {
        let format = tensor.format.name();
        let at = formats.iter().position(|f| f.format == format).unwrap_or_else(|| {
            formats.push(FormatSummary { format, tensors: 0, parameters: 0, bytes: 0 });
            formats.len() - 1
        });
        formats[at].tensors += 1;
        formats[at].parameters += tensor.elements() as u64;
        formats[at].bytes += tensor.bytes().0;
    }
    formats.sort_by_key(|f| std::cmp::Reverse(f.bytes));
    let (bytes, bytes_before) = plan.bytes();
    let bits = |bytes: u64| bytes as f64 * 8.0 / parameters.max(1) as f64;
    let tensors = plan.tensors.iter().map(|t| TensorSummary {
        name: t.source.name.clone(),
        shape: t.source.shape.clone(),
        from: t.source.format.name(),
        to: t.format.name(),
    });
    Summary {
        path,
        target: plan.target.name,
        tensors: plan.tensors.len(),
        parameters,
        bytes_before,
        bytes,
        bits_per_weight_before: bits(bytes_before),
        bits_per_weight: bits(bytes),
        formats,
        notes: plan.notes.clone(),
        seconds: None,
        report: None,
        plan: if each { tensors.collect() } else { Vec::new() },
    }
}

/// Prints it for people.
pub(super) fn print(summary: &Summary) -> Result<()> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for t in &summary.plan {
        let shape: Vec<String> = t.shape.iter().map(usize::to_string).collect();
        writeln!(out, "{:40} {:>16}  {} -> {}", t.name.escape_debug().to_string(), shape.join(" x "), t.from, t.to)?;
    }
    if !summary.plan.is_empty() {
        for note in &summary.notes {
            writeln!(out, "note: {note}")?;
        }
    }
    for f in &summary.formats {
        let share = 100.0 * f.bytes as f64 / summary.bytes.max(1) as f64;
        writeln!(out, "{:8} {:>5} tensors {:>9} {share:>5.1} %", f.format, f.tensors, size(f.bytes))?;
    }
    let (before, after) = (size(summary.bytes_before), size(summary.bytes));
    let (bits_before, bits) = (summary.bits_per_weight_before, summary.bits_per_weight);
    writeln!(out, "{before} -> {after}, {bits_before:.2} -> {bits:.2} bits per weight")?;
    if let Some(c) = summary.report.as_ref().and_then(|r| r.comparison.as_ref()).map(|c| &c.comparison) {
        let (before, after, kl, same) = (c.original.perplexity, c.score.perplexity, c.kl, 100.0 * c.same_top);
        writeln!(
            out,
            "perplexity {before:.4} -> {after:.4}, mean KL divergence {kl:.5}, same likeliest token {same:.1} %"
        )?;
    }
    let path = summary.path.display();
    match summary.seconds {
        Some(seconds) => writeln!(out, "{path} ({}) in {seconds:.1} s", summary.target)?,
        None => writeln!(out, "would write {path} ({})", summary.target)?,
    }
    Ok(out.flush()?)
}
