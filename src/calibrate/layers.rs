//! Quantizing a model layer by layer, with what really goes into each linear layer at hand.
//!
//! The hidden states of all calibration sequences lie in the scratch folder. For each layer they are run through it as
//! often as it has steps (queries, keys and values; output; gate and up; down), each time as far as the next step, whose
//! inputs make a Hessian; the weights of the step are then quantized and take part in everything that follows
//! ("true-sequential": each step sees the errors of those before it). A last run gives the next layer's hidden states.
//! Running anew is cheap: what was quantized is multiplied by the fast kernels, and nothing wide has to be kept.
//!
//! Beside them lie the hidden states of the unquantized model. They go through the same layers with the weights as they
//! were, so that each step also sees what its inputs or outputs should be, and can make good part of what was lost before
//! it. In the last step they go on to the layer's end, so that no pass of their own is needed for that.
//!
//! Every finished tensor and every finished layer's hidden states are in the scratch folder before the next begins: a
//! run that is killed goes on there, and since nothing depends on time or threads, with the same result.

use super::capture::{Capture, Observer};
use super::groups::Groups;
use super::step::{self, Step, joined};
use super::text;
use super::work::Work;
use crate::engine::cpu::{Activations, CpuBackend};
use crate::quantize::scratch::Scratch;
use crate::quantize::write::Stopped;
use anyhow::{Context, Result, bail};
use rushlight_models::backend::{Backend, Batch, Sequence};
use rushlight_models::checkpoint::{AtomicFile, Bytes, map};
use rushlight_models::decoder;
use rushlight_models::model::{Linear, Model, Weight};
use rushlight_quant::formats::Format;
use rushlight_quant::quantize::Seen;
use rushlight_quant::{Cpu, Phase};
use std::collections::HashMap;
use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

/// Rows that go through a layer together, unless memory is short.
const CHUNK: usize = 2048;
/// Weights that are quantized in one call: what is taken at once as f32, 128 MB, and what a run can lose.
const SLICE: usize = 32 << 20;

/// What a linear layer is to become.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its name in the output, under which its bytes are kept.
    pub name: String,
    /// The format of its weights; where they are in groups, that of the source and of no account.
    pub format: Format,
    /// Integer codes in groups instead of a block format.
    pub groups: Option<Groups>,
    /// Row `i` of the output is row `rows[i]` of the source; as they stand where `None`.
    pub rows: Option<Vec<u32>>,
}

impl Target {
    /// The weight that `data`, as it is kept, stands for, in the order of its rows; `None` where it is not whole rows.
    fn weight(&self, cols: usize, data: Bytes, scratch: &Scratch) -> Result<Option<Weight>> {
        match &self.groups {
            Some(groups) => groups.weight(&self.name, cols, &data, scratch).map(Some),
            None => Ok(self.format.row_bytes(cols).and_then(|b| Weight::new(self.format, data.len() / b, cols, data))),
        }
    }
}

/// Rows of a linear layer to quantize.
pub struct Job<'a> {
    /// The layer.
    pub linear: &'a Linear,
    /// What it is to become.
    pub target: &'a Target,
    /// Which of its rows.
    pub rows: Range<usize>,
    /// Their weights, `[rows, cols]`.
    pub weights: &'a [f32],
    /// What goes into it, and what its outputs lack.
    pub seen: Seen<'a>,
    /// The same of sequences that are not part of `seen`; `None` where there are too few sequences.
    pub held_out: Option<Seen<'a>>,
}

/// Chooses the packed rows for a [`Job`], in the order of its rows. The same job must give the same bytes.
pub type Quantize<'a> = dyn FnMut(&Cpu, &Job<'_>) -> Result<Vec<u8>> + 'a;

/// A run.
pub struct Run<'a> {
    /// The source. Its weights give way to quantized ones while they are at work.
    pub model: Model,
    /// Threads; the physical cores where `None`.
    pub threads: Option<usize>,
    /// What the model is calibrated on.
    pub sequences: &'a [Vec<u32>],
    /// What becomes of each [`Linear`], by its id; the others stay as they are.
    pub targets: &'a HashMap<usize, Target>,
    /// Where results are kept, in the order of the output's rows.
    pub scratch: &'a Scratch,
    /// Bytes that may be used beside what is mapped from files.
    pub memory: u64,
    /// Set from outside to stop before the next chunk.
    pub stop: &'a AtomicBool,
}

/// How far a run has come.
#[derive(Clone, Copy, Debug)]
pub struct State {
    /// Work done, in units of no meaning.
    pub done: u64,
    /// Work in all.
    pub total: u64,
    /// Layers finished.
    pub layer: usize,
}

impl Run<'_> {
    /// Quantizes every linear layer that has a target, or takes it from the scratch folder if it is there.
    pub fn run(mut self, quantize: &mut Quantize<'_>, progress: &mut dyn FnMut(State)) -> Result<()> {
        let longest = self.sequences.iter().map(Vec::len).max().unwrap_or(0);
        if longest == 0 || self.sequences.iter().any(|s| s.is_empty()) {
            bail!("there is nothing to calibrate on");
        }
        let chunks = chunks(self.sequences, self.rows(longest)?);
        let slots = chunks.iter().map(|c| c.len()).max().unwrap_or(1);
        let mut backend = text::backend(&self.model, self.threads, slots, longest, 1)?;
        let original = self.model.clone();
        let mut work = Work::new(&self, progress);
        let layers = self.model.layers.len();
        let first = self.resume()?;
        if first == 0 && !self.hidden(0).exists() {
            self.embed(&mut backend, &chunks)?;
        }
        for i in first..layers {
            work.reach(i);
            self.layer(&mut backend, &original, &chunks, i, quantize, &mut work)?;
        }
        work.reach(layers);
        self.head(&mut backend, &chunks, quantize, &mut work)?;
        work.finish();
        Ok(())
    }

    /// How many rows may go through a layer together.
    fn rows(&self, longest: usize) -> Result<usize> {
        let linears = || self.model.linears();
        // While a matrix is quantized: two Hessians and a factor (halves of square matrices, f32 and f64), what outputs
        // lack, and the weights with their errors, codes and packed rows in several forms.
        let matrix = |l: &Linear| {
            let (rows, cols) = (l.weight.rows() as u64, l.weight.cols() as u64);
            let drifts = match (l.id == self.model.head.id, rows < cols || joined(&self.model, l.layer).contains(&l.id))
            {
                (true, _) => 0,
                (_, true) => 8 * rows * cols,
                _ => 12 * cols * cols,
            };
            8 * cols * cols + drifts + 40 * (rows * cols).min(SLICE as u64) + 1024 * cols
        };
        let wanted = linears().filter(|l| self.targets.contains_key(&l.id));
        let fixed = wanted.map(matrix).max().unwrap_or(0) + (64 << 20);
        // What a row takes on its way through a layer: the stream and the widest parts in f32, and rounded for a kernel.
        let widest =
            linears().filter(|l| l.id != self.model.head.id).map(|l| l.weight.rows().max(l.weight.cols())).max();
        let row = 48 * (widest.unwrap_or(0) + self.model.spec.hidden_size) as u64;
        let rows = self.memory.saturating_sub(fixed) / row.max(1);
        if rows < longest as u64 {
            bail!(
                "GPTQ on this model needs {} MB of memory; allow that much with --memory, or use --method rtn",
                (fixed + row * longest as u64).div_ceil(1 << 20)
            );
        }
        Ok((rows as usize).min(CHUNK))
    }

    /// Where the hidden states before layer `i` lie.
    fn hidden(&self, i: usize) -> PathBuf {
        self.scratch.dir().join("state").join(format!("hidden-{i:04}"))
    }

    /// Where those of the unquantized model lie. Before the first layer both are the same.
    fn original(&self, i: usize) -> PathBuf {
        if i == 0 { self.hidden(0) } else { self.scratch.dir().join("state").join(format!("original-{i:04}")) }
    }

    /// The first layer that is not finished.
    fn resume(&self) -> Result<usize> {
        let layers = self.model.layers.len();
        for i in (1..=layers).rev() {
            if self.hidden(i).exists() {
                return Ok(i);
            }
        }
        Ok(0)
    }

    fn embed(&self, backend: &mut CpuBackend, chunks: &[Range<usize>]) -> Result<()> {
        let mut out = AtomicFile::create(&self.hidden(0))?;
        for chunk in chunks {
            let (ids, sequences) = batch(&self.model, &self.sequences[chunk.clone()]);
            let batch = Batch { ids: &ids, sequences: &sequences, phase: Phase::Prompt };
            let x = decoder::embed(&self.model, backend, &batch)?;
            put(&mut out, &x)?;
        }
        Ok(out.commit()?)
    }

    fn layer(
        &mut self,
        backend: &mut CpuBackend,
        original: &Model,
        chunks: &[Range<usize>],
        i: usize,
        quantize: &mut Quantize<'_>,
        work: &mut Work<'_>,
    ) -> Result<()> {
        // What an earlier run finished of this layer.
        let ids: Vec<usize> =
            (self.model.linears()).filter(|l| l.layer == i && self.targets.contains_key(&l.id)).map(|l| l.id).collect();
        for id in ids {
            self.take(id)?;
        }
        let (input, wanted) = (map(&self.hidden(i))?, map(&self.original(i))?);
        let steps = step::count(backend, original, i, &self.sequences[0][..1])?;
        for step in 0..steps {
            let mut observer = Step::new(step, step + 1 == steps, self.targets, joined(&self.model, i));
            self.step(backend, original, chunks, i, (&input, &wanted), &mut observer, work)?;
            for id in observer.ids.clone() {
                self.quantize(backend.cpu(), id, &observer, quantize, work)?;
            }
        }
        let (mut out, mut at) = (AtomicFile::create(&self.hidden(i + 1))?, 0);
        for chunk in chunks {
            let (y, rows) = self.pass(backend, &self.model, chunk, i, (&input, &mut at), &mut ())?;
            put(&mut out, &y.context("a pass that nothing ended has no end")?)?;
            work.ran(work.steps() - 1, rows);
        }
        // Those of the unquantized model are there since the last step: a run goes on where both are.
        out.commit()?;
        drop((input, wanted));
        for linear in self.model.linears_mut().filter(|l| l.layer == i) {
            linear.replacement = None;
        }
        for path in [self.hidden(i), self.original(i)] {
            if path.exists() {
                std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
            }
        }
        Ok(())
    }

    /// Shows `observer` its step of layer `i`, of both models. In the last step the unquantized one goes on, and what
    /// comes out is kept.
    fn step(
        &self,
        backend: &mut CpuBackend,
        original: &Model,
        chunks: &[Range<usize>],
        i: usize,
        (input, wanted): (&Bytes, &Bytes),
        observer: &mut Step<'_>,
        work: &mut Work<'_>,
    ) -> Result<()> {
        let (mut at, mut at_wanted) = (0, 0);
        let mut out = if observer.last { Some(AtomicFile::create(&self.original(i + 1))?) } else { None };
        for chunk in chunks {
            let sequences = &self.sequences[chunk.clone()];
            observer.begin(chunk.start, sequences, Some(&self.model));
            let (y, rows) = self.pass(backend, original, chunk, i, (wanted, &mut at_wanted), observer)?;
            if let Some(out) = &mut out {
                put(out, &y.context("a pass that nothing ended has no end")?)?;
            }
            if !observer.known {
                observer.begin(chunk.start, sequences, None);
                self.pass(backend, &self.model, chunk, i, (input, &mut at), observer)?;
            } else if !observer.last {
                break;
            }
            work.ran(observer.step, rows);
        }
        out.map_or(Ok(()), |out| Ok(out.commit()?))
    }

    /// Runs the next hidden states of `input` through layer `i` of `model`, or as far as `observer` lets them, and says
    /// how many they are.
    fn pass(
        &self,
        backend: &mut CpuBackend,
        model: &Model,
        chunk: &Range<usize>,
        i: usize,
        (input, at): (&Bytes, &mut usize),
        observer: &mut impl Observer,
    ) -> Result<(Option<Activations>, usize)> {
        let (ids, sequences) = batch(model, &self.sequences[chunk.clone()]);
        let x = self.load(backend, input, at, ids.len())?;
        let batch = Batch { ids: &ids, sequences: &sequences, phase: Phase::Prompt };
        let mut capture = Capture::layerwise(backend, observer);
        let y = capture.run(|b| {
            b.begin(model, &batch)?;
            decoder::layer(model, b, i, x)
        })?;
        Ok((y, ids.len()))
    }

    fn head(
        &mut self,
        backend: &mut CpuBackend,
        chunks: &[Range<usize>],
        quantize: &mut Quantize<'_>,
        work: &mut Work<'_>,
    ) -> Result<()> {
        let id = self.model.head.id;
        if !self.targets.contains_key(&id) || self.model.spec.tied_head || self.take(id)? {
            return Ok(());
        }
        let input = map(&self.hidden(self.model.layers.len()))?;
        let mut observer = Step::new(0, false, self.targets, Vec::new());
        let mut at = 0;
        for chunk in chunks {
            let x = self.load(backend, &input, &mut at, self.sequences[chunk.clone()].iter().map(Vec::len).sum())?;
            observer.begin(chunk.start, &self.sequences[chunk.clone()], None);
            Capture::layerwise(backend, &mut observer).run(|b| decoder::logits(&self.model, b, &x))?;
        }
        self.quantize(backend.cpu(), id, &observer, quantize, work)
    }

    /// The next `rows` hidden states of `input`, of which `at` bytes are read.
    fn load(&self, backend: &CpuBackend, input: &Bytes, at: &mut usize, rows: usize) -> Result<Activations> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Stopped.into());
        }
        let mut x = backend.new_tensor(rows, self.model.spec.hidden_size);
        let bytes = *at..*at + 4 * x.len();
        *at = bytes.end;
        let Some(bytes) = input.get(bytes) else {
            bail!("hidden states are missing in {}: delete the folder", self.scratch.dir().display());
        };
        x.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(x, b)| *x = f32::from_le_bytes(*b));
        Ok(x)
    }

    /// Puts the finished weight of `id` in force, if it is there.
    fn take(&mut self, id: usize) -> Result<bool> {
        let Some(target) = self.targets.get(&id) else { return Ok(false) };
        let Some(data) = self.scratch.get(&target.name)? else { return Ok(false) };
        let Some(linear) = self.model.linears_mut().find(|l| l.id == id) else { return Ok(false) };
        let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
        let wrong = || {
            let place = self.scratch.dir().display();
            format!("{} in {place} has another size than it should: delete the folder", target.name)
        };
        let stored = target.weight(cols, data, self.scratch)?.filter(|w| w.rows() == rows).with_context(wrong)?;
        linear.replacement = Some(match &target.rows {
            None => stored,
            Some(order) => {
                let mut place = vec![0; rows];
                order.iter().enumerate().for_each(|(i, &row)| place[row as usize] = i);
                stored.with_rows(&place)
            }
        });
        Ok(true)
    }

    /// Quantizes the weight of `id`, keeps it and puts it in force.
    fn quantize(
        &mut self,
        cpu: &Cpu,
        id: usize,
        observer: &Step<'_>,
        quantize: &mut Quantize<'_>,
        work: &mut Work<'_>,
    ) -> Result<()> {
        let Some(target) = self.targets.get(&id) else { return Ok(()) };
        let (Some(linear), Some((most, others))) = (self.model.linears().find(|l| l.id == id), &observer.inputs) else {
            return Ok(());
        };
        if linear.replacement.is_some() {
            return Ok(());
        }
        let weight = &linear.weight;
        let (rows, cols) = (weight.rows(), weight.cols());
        let mut packed = Vec::new();
        let slice = (SLICE / cols).clamp(1, rows);
        let mut weights = Vec::new();
        for start in (0..rows).step_by(slice) {
            let part = start..rows.min(start + slice);
            weights.resize(part.len() * cols, 0.0);
            for (row, out) in part.clone().zip(weights.chunks_exact_mut(cols)) {
                weight.decode_row(row, out);
            }
            if weights.iter().any(|w| !w.is_finite()) {
                bail!("{} holds weights that are not numbers (NaN or infinite): the model is damaged", target.name);
            }
            let drifts = observer.drift(id);
            let seen = Seen { hessian: most, drift: drifts.map(|(drift, _)| (drift, start)) };
            let held_out = Seen { hessian: others, drift: drifts.map(|(_, drift)| (drift, start)) };
            let held_out = (others.rows() > 0).then_some(held_out);
            let job = Job { linear, target, rows: part.clone(), weights: &weights, seen, held_out };
            packed.extend(quantize(cpu, &job)?);
            work.quantized(part.len(), cols);
        }
        let wrong = || format!("the quantizer gave {} bytes for {}", packed.len(), target.name);
        let source = target.weight(cols, Bytes::new(packed.clone()), self.scratch)?;
        let source = source.filter(|w| w.rows() == rows).with_context(wrong)?;
        match &target.rows {
            None => self.scratch.put(&target.name, &packed)?,
            Some(order) => {
                let bytes = packed.len() / rows;
                let ordered = order.iter().flat_map(|&r| packed[r as usize * bytes..][..bytes].iter().copied());
                self.scratch.put(&target.name, &ordered.collect::<Vec<u8>>())?;
            }
        }
        if let Some(linear) = self.model.linears_mut().find(|l| l.id == id) {
            linear.replacement = Some(source);
        }
        Ok(())
    }
}

/// Sequences that go together: as many as have no more than `most` tokens.
fn chunks(sequences: &[Vec<u32>], most: usize) -> Vec<Range<usize>> {
    let mut chunks: Vec<Range<usize>> = Vec::new();
    let mut rows = 0;
    for (i, sequence) in sequences.iter().enumerate() {
        match chunks.last_mut() {
            Some(last) if rows + sequence.len() <= most => last.end = i + 1,
            _ => {
                chunks.push(i..i + 1);
                rows = 0;
            }
        }
        rows += sequence.len();
    }
    chunks
}

/// The tokens of `sequences` behind one another, and a slot for each.
fn batch(model: &Model, sequences: &[Vec<u32>]) -> (Vec<u32>, Vec<Sequence>) {
    let place = |(slot, s): (usize, &Vec<u32>)| Sequence { slot, start: 0, len: s.len(), outline: model.outline(s) };
    (sequences.concat(), sequences.iter().enumerate().map(place).collect())
}

fn put(out: &mut AtomicFile, x: &[f32]) -> Result<()> {
    let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    out.write_all(&bytes).with_context(|| out.target().display().to_string())
}
