//! How much a model's predictions suffer from errors in each of its matrices.
//!
//! One matrix after another is rounded coarsely, everything behind it is computed anew for a few hundred tokens, and the
//! KL divergence from the unharmed model's predictions is divided by the square error that the rounding caused in the
//! matrix's outputs. For small errors the divergence is proportional to that square, so that the quotient tells what any
//! other rounding of the matrix would cost: its error times this sensitivity.

use super::capture::Capture;
use super::compare::divergence;
use super::imatrix::{Squares, collect};
use super::text;
use crate::engine::cpu::CpuBackend;
use crate::quantize::write::Stopped;
use anyhow::Result;
use rushlight_models::backend::{Backend, Batch, Sequence};
use rushlight_models::checkpoint::Bytes;
use rushlight_models::decoder;
use rushlight_models::model::{Linear, Model, Weight};
use rushlight_quant::Phase;
use rushlight_quant::formats::Format;
use rushlight_quant::quantize::encode;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

/// Rows of a matrix of which an error is estimated: every so manyth, so that there are about this many.
const SAMPLE: usize = 48;

/// What errors in the matrices of a model cost.
pub struct Sensitivity {
    /// For each [`Linear`] by its id: KL divergence (nats a token) for each unit of square error.
    pub linears: HashMap<usize, f64>,
    /// What goes into each of them.
    pub squares: Squares,
}

impl Sensitivity {
    /// The KL divergence to be expected if `linear` is rounded to `format`; `None` where its rows are no whole blocks of
    /// it or nothing is known of it.
    pub fn loss(&self, linear: &Linear, format: Format) -> Option<f64> {
        Some(self.linears.get(&linear.id)? * error(linear, format, &self.squares)?)
    }
}

/// Square error of the outputs of `linear`, summed over them, for the mean token, if its weights are rounded to `format`:
/// errors of different columns are taken as independent.
fn error(linear: &Linear, format: Format, squares: &Squares) -> Option<f64> {
    let weight = &linear.weight;
    let (rows, cols) = (weight.rows(), weight.cols());
    let inputs = squares.of(linear.id)?;
    let importance: Vec<f32> = inputs.sums.iter().map(|s| (s / inputs.rows.max(1) as f64) as f32).collect();
    let mut packed = vec![0; format.row_bytes(cols)?];
    let (mut before, mut after) = (vec![0f32; cols], vec![0f32; cols]);
    let (mut sum, mut count) = (0.0, 0);
    for row in (0..rows).step_by((rows / SAMPLE).max(1)) {
        weight.decode_row(row, &mut before);
        encode(format, &before, cols, Some(&importance), &mut packed);
        format.decode(&packed, &mut after);
        let columns = before.iter().zip(&after).zip(&importance);
        sum += columns.map(|((a, b), i)| f64::from((a - b) * (a - b)) * f64::from(*i)).sum::<f64>();
        count += 1;
    }
    Some(sum * rows as f64 / f64::from(count.max(1)))
}

/// Measures every linear layer of `model` on `sequences`, of which a few hundred tokens are enough. `progress` hears how
/// many of the layers are done.
pub fn measure(
    mut model: Model,
    threads: Option<usize>,
    sequences: &[Vec<u32>],
    stop: &AtomicBool,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Sensitivity> {
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let mut backend = text::backend(&model, threads, sequences.len().max(1), longest, 1)?;
    let squares = {
        let mut whole = text::backend(&model, threads, 1, longest, model.layers.len())?;
        collect(&model, &mut whole, sequences, true, &mut |_| ())?
    };
    let ids = sequences.concat();
    let place = |(slot, s): (usize, &Vec<u32>)| Sequence { slot, start: 0, len: s.len(), outline: model.outline(s) };
    let places: Vec<Sequence> = sequences.iter().enumerate().map(place).collect();
    let batch = Batch { ids: &ids, sequences: &places, phase: Phase::Prompt };
    let layers = model.layers.len();
    // The stream before each layer, and behind the last.
    let mut streams = Vec::with_capacity(layers + 1);
    streams.push(decoder::embed(&model, &mut backend, &batch)?.to_vec());
    for i in 0..layers {
        let next = run(&model, &mut backend, &batch, &streams[i], i..i + 1)?;
        streams.push(next);
    }
    let vocab = model.spec.vocab_size;
    let reference = logits(&model, &mut backend, &streams[layers], ids.len())?;
    let all: Vec<(usize, usize)> = model.linears().map(|l| (l.id, l.layer)).collect();
    let head = model.head.id;
    let mut linears = HashMap::new();
    for (done, &(id, layer)) in all.iter().enumerate() {
        if stop.load(Ordering::Relaxed) {
            return Err(Stopped.into());
        }
        let Some(linear) = model.linears_mut().find(|l| l.id == id) else { continue };
        let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
        // Coarse, so that the divergence stands out from the arithmetic's own noise; fine enough to be small.
        let Some(format) = [Format::Q3_K, Format::Q4_0].into_iter().find(|f| f.row_bytes(cols).is_some()) else {
            continue;
        };
        let Some(unit) = error(linear, format, &squares).filter(|e| *e > 0.0) else { continue };
        let harm = rounded(linear, format, rows, cols, &squares)?;
        linear.replacement = Some(harm.clone());
        let stream = if id != head {
            run(&model, &mut backend, &batch, &streams[layer], layer..layers)?
        } else if model.spec.tied_head {
            // The embedding is the same tensor.
            model.embedding.replacement = Some(harm);
            let first = decoder::embed(&model, &mut backend, &batch)?.to_vec();
            model.embedding.replacement = None;
            run(&model, &mut backend, &batch, &first, 0..layers)?
        } else {
            streams[layers].clone()
        };
        let harmed = logits(&model, &mut backend, &stream, ids.len())?;
        if let Some(linear) = model.linears_mut().find(|l| l.id == id) {
            linear.replacement = None;
        }
        let pairs = reference.chunks_exact(vocab).zip(harmed.chunks_exact(vocab));
        let kl: f64 = pairs.map(|(a, b)| divergence(a, b)).sum::<f64>() / ids.len() as f64;
        linears.insert(id, kl / unit);
        progress(done + 1, all.len());
    }
    Ok(Sensitivity { linears, squares })
}

fn rounded(linear: &Linear, format: Format, rows: usize, cols: usize, squares: &Squares) -> Result<Weight> {
    let importance: Option<Vec<f32>> = squares.of(linear.id).map(|i| i.sums.iter().map(|&s| s as f32).collect());
    let bytes = format.row_bytes(cols).unwrap_or(0);
    let mut packed = vec![0; rows * bytes];
    let mut values = vec![0f32; cols];
    for (row, out) in packed.chunks_exact_mut(bytes.max(1)).enumerate() {
        linear.weight.decode_row(row, &mut values);
        encode(format, &values, cols, importance.as_deref(), out);
    }
    Weight::new(format, rows, cols, Bytes::new(packed))
        .ok_or_else(|| anyhow::anyhow!("{format} rows of {cols} weights have another size than they should"))
}

/// What `layers` make of `stream`.
fn run(
    model: &Model,
    backend: &mut CpuBackend,
    batch: &Batch<'_>,
    stream: &[f32],
    layers: std::ops::Range<usize>,
) -> Result<Vec<f32>> {
    let mut nothing = ();
    let mut backend = Capture::layerwise(backend, &mut nothing);
    let mut x = backend.backend().new_tensor(batch.ids.len(), model.spec.hidden_size);
    x.copy_from_slice(stream);
    backend.begin(model, batch)?;
    for i in layers {
        x = decoder::layer(model, &mut backend, i, x)?;
    }
    Ok(x.to_vec())
}

fn logits(model: &Model, backend: &mut CpuBackend, stream: &[f32], rows: usize) -> Result<Vec<f32>> {
    let mut x = backend.new_tensor(rows, model.spec.hidden_size);
    x.copy_from_slice(stream);
    Ok(decoder::logits(model, backend, &x)?.to_vec())
}
