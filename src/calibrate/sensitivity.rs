//! How much each tensor of a model matters: what its rounding alone does to the model's predictions.
//!
//! For small errors the divergence from the original's predictions grows with the square of the error. So one
//! measurement for each tensor is enough: the divergence with this tensor alone in 4 bits, over the squared error that
//! caused it, times the squared error of any other format is what that format costs. Squared errors are weighted by the
//! mean square of the input that each column meets.

use super::compare::divergence;
use super::imatrix::{Squares, collect, gguf_name};
use super::text::{self, Own};
use crate::engine::cpu::{Activations, CpuBackend};
use crate::quantize::allocate::Choice;
use crate::quantize::plan::{Plan, Planned};
use crate::quantize::write::Stopped;
use anyhow::{Context, Result, bail};
use rushlight_models::backend::{Backend, Batch, Sequence};
use rushlight_models::checkpoint::{Bytes, Checkpoint};
use rushlight_models::decoder;
use rushlight_models::model::{Model, Weight};
use rushlight_models::tokenizer::Tokenizer;
use rushlight_quant::formats::Format;
use rushlight_quant::quantize::encode;
use rushlight_quant::{Cpu, Phase};
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Tokens of a sequence that divergences are measured on.
const LENGTH: usize = 128;
/// Such sequences: half from the built-in text, half written by the model.
const SEQUENCES: usize = 4;
/// Sequences of the built-in text that tell what goes into each column.
const IMPORTANCE: usize = 8;
/// The format that a tensor is measured in: fine enough for its error to count as small, coarse enough to be seen.
const PROBE: Format = Format::Q4_0;
/// Rows of a tensor whose errors stand for all.
const ROWS: usize = 128;
/// Formats that tensors may get, from the smallest; those that do not fit a row are left out.
const FORMATS: [Format; 13] = [
    Format::Q2_K,
    Format::Q3_K,
    Format::IQ4_XS,
    Format::Q4_K,
    Format::IQ4_NL,
    Format::Q4_0,
    Format::Q4_1,
    Format::Q5_K,
    Format::Q5_0,
    Format::Q5_1,
    Format::Q6_K,
    Format::Q8_0,
    Format::F16,
];

/// What is known of a tensor's part in a model.
pub struct Sensitivity {
    /// What each format would cost, in nats of mean divergence. One choice where there is nothing to choose.
    pub choices: Vec<Choice>,
    /// Mean square of the input of each column, where it is known.
    pub importance: Option<Vec<f32>>,
}

/// The fewest bytes that the tensors of `plan` can take, of which `free` says which may get another format.
pub fn least(plan: &Plan, free: &dyn Fn(&Planned) -> bool) -> u64 {
    let each = plan.tensors.iter().map(|planned| {
        let bytes = |f: Format| Some(f.row_bytes(planned.cols())? as u64 * planned.rows() as u64);
        let choices = FORMATS.into_iter().filter_map(bytes);
        choices.min().filter(|_| free(planned)).unwrap_or(planned.bytes().0)
    });
    each.sum()
}

/// Measures each tensor of `plan`, in its order. `free` says which may get another format than the plan has for it.
/// `text` and its name take the place of the built-in one and of what the model writes. `progress` hears how many
/// measurements are done and how many there are.
pub fn measure(
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    text: Option<(&str, &str)>,
    plan: &Plan,
    free: &dyn Fn(&Planned) -> bool,
    threads: Option<usize>,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Sensitivity>> {
    let model = Model::load(checkpoint)?;
    let mut probe = Probe::new(model, tokenizer, text, threads)?;
    let ids = probe.ids();
    let mut all = Vec::with_capacity(plan.tensors.len());
    let total = plan.tensors.iter().filter(|t| free(t)).count();
    let mut done = 0;
    for planned in &plan.tensors {
        let fixed = Choice { format: planned.format, bytes: planned.bytes().0, loss: 0.0 };
        let id = ids.get(planned.source.name.as_str()).copied();
        let importance = id.and_then(|id| probe.importance(id));
        let (true, Some(id)) = (free(planned), id) else {
            all.push(Sensitivity { choices: vec![fixed], importance });
            continue;
        };
        if stop.load(Ordering::Relaxed) {
            return Err(Stopped.into());
        }
        let choices = probe.choices(id, planned, importance.as_deref())?;
        all.push(Sensitivity { choices, importance });
        done += 1;
        progress(done, total);
    }
    Ok(all)
}

/// A model that is run with one tensor changed.
struct Probe {
    model: Model,
    backend: CpuBackend,
    sequences: Vec<Vec<u32>>,
    squares: Squares,
    /// The stream before each layer, with nothing changed.
    streams: Vec<Vec<f32>>,
    /// Positions whose predictions are compared, and the original's logits there.
    positions: Vec<usize>,
    logits: Vec<f32>,
}

impl Probe {
    fn new(model: Model, tokenizer: &Tokenizer, text: Option<(&str, &str)>, threads: Option<usize>) -> Result<Probe> {
        let length = LENGTH.min(model.spec.context_length);
        let long = text::length(&model);
        let (read, name) = text.unwrap_or((text::BUILT_IN, "the built-in text"));
        let theirs = text::sequences(tokenizer, read, name, long)?;
        let own = Own { lanes: SEQUENCES / 2, steps: length, seed: 2 };
        let mut sequences = match text {
            Some(_) => Vec::new(),
            None => text::own(&model, tokenizer, threads, u64::MAX, own, &mut |_| {})?,
        };
        sequences.sort_by_key(|s| std::cmp::Reverse(s.len()));
        sequences.truncate(SEQUENCES / 2);
        let missing = SEQUENCES - sequences.len();
        let parts = (0..missing).map(|i| &theirs[(2 * i + 1) * theirs.len() / (2 * missing)]);
        sequences.extend(parts.map(|s| s[..length.min(s.len())].to_vec()));
        let mut backend = text::backend(&model, threads, SEQUENCES, long, model.spec.layers.len())?;
        let read = (0..IMPORTANCE.min(theirs.len())).map(|i| theirs[i * theirs.len() / IMPORTANCE].clone());
        let read: Vec<Vec<u32>> = read.chain(sequences.iter().cloned()).collect();
        let squares = collect(&model, &mut backend, &read, true, &mut |_| {})?;
        let rows = sequences.iter().map(Vec::len).sum::<usize>();
        // As many as keep to 64 MB of logits, evenly from all.
        let most = ((16 << 20) / model.spec.vocab_size).clamp(1, rows);
        let positions = (0..most).map(|i| i * rows / most).collect();
        let mut probe =
            Probe { model, backend, sequences, squares, streams: Vec::new(), positions, logits: Vec::new() };
        let mut streams = Vec::new();
        probe.logits = probe.run(0, Some(&mut streams))?;
        probe.streams = streams;
        Ok(probe)
    }

    /// The id of each linear layer and of the embedding, by the tensor's name in GGUF.
    fn ids(&self) -> HashMap<String, usize> {
        let embedding = "token_embd.weight".to_owned();
        let linears = self.model.linears().filter_map(|l| Some((gguf_name(&self.model, l)?, l.id)));
        std::iter::once((embedding, self.model.embedding.id)).chain(linears).collect()
    }

    fn importance(&self, id: usize) -> Option<Vec<f32>> {
        let inputs = self.squares.of(id)?;
        Some(inputs.sums.iter().map(|sum| (sum / inputs.rows.max(1) as f64) as f32).collect())
    }

    /// What each format would cost `planned`, which is the tensor `id` of the model.
    fn choices(&mut self, id: usize, planned: &Planned, importance: Option<&[f32]>) -> Result<Vec<Choice>> {
        let weight = self.weight(id).with_context(|| format!("'{}' is not in the model", planned.source.name))?;
        let cols = weight.cols();
        let Some(packed) = requantized(self.backend.cpu(), &weight, PROBE, importance) else {
            bail!("rows of '{}' ({cols} columns) have no format to choose from", planned.source.name);
        };
        let kl = self.divergence(id, packed)?;
        let sample = sample(&weight);
        let formats: Vec<Format> = FORMATS.into_iter().filter(|f| f.row_bytes(cols).is_some()).collect();
        let errors = self.errors(&sample, cols, &formats, importance);
        let probe = formats.iter().position(|f| *f == PROBE).map_or(0.0, |i| errors[i]);
        Ok(formats
            .iter()
            .zip(errors)
            .map(|(&format, error)| Choice {
                format,
                bytes: format.row_bytes(cols).unwrap_or(0) as u64 * weight.rows() as u64,
                loss: if probe > 0.0 { kl * error / probe } else { 0.0 },
            })
            .collect())
    }

    fn weight(&self, id: usize) -> Option<Weight> {
        let embedding = Some(&self.model.embedding).filter(|t| t.id == id).map(|t| t.weight.clone());
        embedding.or_else(|| self.model.linears().find(|l| l.id == id).map(|l| l.weight.clone()))
    }

    /// The mean divergence of the predictions with `weight` in the place of tensor `id`.
    fn divergence(&mut self, id: usize, weight: Weight) -> Result<f64> {
        // A change in a layer leaves what is before it as it was; the embedding is before all.
        let embedded = self.model.embedding.id == id;
        let head = self.model.head.id == id;
        let first = match self.model.linears().find(|l| l.id == id) {
            _ if embedded => 0,
            _ if head => self.model.layers.len(),
            Some(linear) => linear.layer,
            None => 0,
        };
        self.replace(id, Some(weight));
        let changed = self.run(first, None);
        self.replace(id, None);
        let (changed, vocab) = (changed?, self.model.spec.vocab_size);
        let sums: Vec<f64> =
            self.logits.chunks_exact(vocab).zip(changed.chunks_exact(vocab)).map(|(p, q)| divergence(p, q)).collect();
        let mean = sums.iter().sum::<f64>() / sums.len().max(1) as f64;
        if !mean.is_finite() {
            bail!("the model's predictions are not numbers: its weights are damaged");
        }
        Ok(mean)
    }

    fn replace(&mut self, id: usize, weight: Option<Weight>) {
        if self.model.embedding.id == id {
            self.model.embedding.replacement = weight.clone();
        }
        for linear in self.model.linears_mut().filter(|l| l.id == id) {
            linear.replacement = weight.clone();
        }
    }

    /// Logits at the compared positions, from layer `first` on. `streams` gets the stream before each layer.
    fn run(&mut self, first: usize, mut streams: Option<&mut Vec<Vec<f32>>>) -> Result<Vec<f32>> {
        let ids: Vec<u32> = self.sequences.concat();
        let place = |(slot, s): (usize, &Vec<u32>)| {
            let outline = self.model.outline(s);
            Sequence { slot, start: 0, len: s.len(), outline }
        };
        let sequences: Vec<Sequence> = self.sequences.iter().enumerate().map(place).collect();
        let batch = Batch { ids: &ids, sequences: &sequences, phase: Phase::Prompt };
        let (model, backend) = (&self.model, &mut self.backend);
        backend.begin(model, &batch)?;
        let mut x: Activations = if first == 0 {
            decoder::embed(model, backend, &batch)?
        } else {
            let stream = &self.streams[first];
            let mut x = backend.new_tensor(ids.len(), model.spec.hidden_size);
            x.copy_from_slice(stream);
            x
        };
        for layer in first..model.layers.len() {
            if let Some(streams) = &mut streams {
                streams.push(x.to_vec());
            }
            x = decoder::layer(model, backend, layer, x)?;
        }
        if let Some(streams) = streams {
            streams.push(x.to_vec());
        }
        let x = backend.rows(&x, &self.positions)?;
        Ok(decoder::logits(model, backend, &x)?.to_vec())
    }

    /// The weighted squared error of rows of `cols` weights in each of `formats`.
    fn errors(&self, rows: &[f32], cols: usize, formats: &[Format], importance: Option<&[f32]>) -> Vec<f64> {
        let errors = Mutex::new(vec![0.0; formats.len()]);
        self.backend.cpu().team().run(formats.len(), &|i| {
            let error = error(rows, cols, formats[i], importance);
            errors.lock().unwrap_or_else(|e| e.into_inner())[i] = error;
        });
        errors.into_inner().unwrap_or_else(|e| e.into_inner())
    }
}

/// All of `weight` in another format; `None` where its rows do not fit.
fn requantized(cpu: &Cpu, weight: &Weight, format: Format, importance: Option<&[f32]>) -> Option<Weight> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let bytes = format.row_bytes(cols)?;
    let parts: Vec<Mutex<Vec<u8>>> = (0..rows.div_ceil(ROWS)).map(|_| Mutex::default()).collect();
    cpu.team().run(parts.len(), &|part| {
        let these = part * ROWS..rows.min((part + 1) * ROWS);
        let mut values = vec![0.0; these.len() * cols];
        for (values, row) in values.chunks_exact_mut(cols).zip(these.clone()) {
            weight.format().decode(weight.row(row), values);
        }
        let mut packed = vec![0; these.len() * bytes];
        encode(format, &values, cols, importance, &mut packed);
        *parts[part].lock().unwrap_or_else(|e| e.into_inner()) = packed;
    });
    let packed: Vec<u8> = parts.into_iter().flat_map(|p| p.into_inner().unwrap_or_else(|e| e.into_inner())).collect();
    Weight::new(format, rows, cols, Bytes::new(packed))
}

/// Some rows of `weight`, evenly from all.
fn sample(weight: &Weight) -> Vec<f32> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let count = rows.min(ROWS);
    let mut values = vec![0.0; count * cols];
    for (i, values) in values.chunks_exact_mut(cols).enumerate() {
        weight.format().decode(weight.row(i * rows / count), values);
    }
    values
}

fn error(rows: &[f32], cols: usize, format: Format, importance: Option<&[f32]>) -> f64 {
    let Some(bytes) = format.row_bytes(cols) else { return 0.0 };
    let mut packed = vec![0; rows.len() / cols * bytes];
    encode(format, rows, cols, importance, &mut packed);
    let mut decoded = vec![0.0; rows.len()];
    format.decode(&packed, &mut decoded);
    let mut sum = 0.0;
    for (row, decoded) in rows.chunks_exact(cols).zip(decoded.chunks_exact(cols)) {
        for (i, (w, q)) in row.iter().zip(decoded).enumerate() {
            let change = f64::from(w - q);
            sum += change * change * importance.map_or(1.0, |all| f64::from(all[i]));
        }
    }
    sum
}
