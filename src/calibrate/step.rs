//! What one step of a layer is given, and what its outputs lack.

use super::capture::{Capture, Observer};
use super::layers::Target;
use crate::engine::cpu::{Activations, CpuBackend};
use anyhow::Result;
use rushlight_models::backend::{Backend, Batch, Sequence};
use rushlight_models::decoder;
use rushlight_models::model::{Linear, Model};
use rushlight_models::spec::Branches;
use rushlight_quant::quantize::{Drift, Hessian};
use rushlight_quant::{Cpu, Phase};
use std::collections::HashMap;
use std::ops::{ControlFlow, Range};

/// One sequence in so many judges what the others brought about.
const HELD_OUT: usize = 8;

/// The linear layers of layer `i` whose products are added to the residual stream as they are: what the stream itself
/// lacks can be made good there.
pub(super) fn joined(model: &Model, i: usize) -> Vec<usize> {
    let (spec, layer) = (&model.spec, &model.layers[i]);
    let mut ids = Vec::new();
    if spec.branches != Branches::Sequential || spec.residual_scale != 1.0 {
        return ids;
    }
    if layer.attention_post_norm.is_none() {
        ids.push(layer.o.id);
    }
    if let (Some(mlp), None, None) = (&layer.mlp, &layer.experts, &layer.mlp_post_norm) {
        ids.push(mlp.down.id);
    }
    ids
}

/// Calls for products in layer `i`, for any token `ids`.
pub(super) fn count(backend: &mut CpuBackend, model: &Model, i: usize, ids: &[u32]) -> Result<usize> {
    let sequence = Sequence { slot: 0, start: 0, len: ids.len(), outline: model.outline(ids) };
    let batch = Batch { ids, sequences: &[sequence], phase: Phase::Prompt };
    let mut x = backend.new_tensor(ids.len(), model.spec.hidden_size);
    x.fill(1.0);
    let mut count = Count(0);
    Capture::layerwise(backend, &mut count).run(|b| {
        b.begin(model, &batch)?;
        decoder::layer(model, b, i, x)
    })?;
    Ok(count.0)
}

struct Count(usize);

impl Observer for Count {
    fn input(&mut self, _: &Cpu, _: &Activations, _: &[&Linear]) -> ControlFlow<()> {
        self.0 += 1;
        ControlFlow::Continue(())
    }
}

/// How what a step's outputs lack is learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// From what the unquantized model's outputs are: one call for each layer.
    Outputs,
    /// The same, where the output is added to the residual stream: from the stream behind it.
    Stream,
    /// From what goes into the unquantized layers, which is the same for all of the step: least work where outputs are
    /// many.
    Inputs,
}

/// Collects what goes into the linear layers of one step of a layer, and what their outputs should be, and ends the pass
/// there. No products are made for it but the unquantized model's.
pub(super) struct Step<'a> {
    /// Which call for products it waits for.
    pub step: usize,
    /// Whether the unquantized model goes on to the layer's end.
    pub last: bool,
    targets: &'a HashMap<usize, Target>,
    /// See [`joined`].
    joined: Vec<usize>,
    /// Calls seen in this chunk.
    calls: usize,
    /// Number of the chunk's first sequence.
    first: usize,
    /// The chunk's sequences as rows.
    rows: Vec<Range<usize>>,
    /// The linear layers that are quantized already, while the unquantized model is at work.
    done: Option<Vec<usize>>,
    /// The linear layers of the step.
    pub ids: Vec<usize>,
    /// What goes into them: most sequences, and those that are held out.
    pub inputs: Option<(Hessian, Hessian)>,
    way: Way,
    /// What comes out of the unquantized model for this chunk, for each of them, or what goes in.
    wanted: Vec<Vec<f32>>,
    /// What the outputs lack, likewise for each of them, or all together.
    drifts: Vec<Option<(Drift, Drift)>>,
    /// What a product that is about to be added to the stream is of, weighed; nothing of the unquantized model.
    waiting: Option<Vec<f32>>,
    /// What each of the chunk's rows counts, where the way is by the stream: see [`weights`].
    weights: Vec<f32>,
    /// Nothing has to be collected: all of the step's weights are there, or none is wanted.
    pub known: bool,
}

impl<'a> Step<'a> {
    pub fn new(step: usize, last: bool, targets: &'a HashMap<usize, Target>, joined: Vec<usize>) -> Self {
        Step {
            step,
            last,
            targets,
            joined,
            calls: 0,
            first: 0,
            rows: Vec::new(),
            done: None,
            ids: Vec::new(),
            inputs: None,
            way: Way::Outputs,
            wanted: Vec::new(),
            drifts: Vec::new(),
            waiting: None,
            weights: Vec::new(),
            known: false,
        }
    }

    /// A chunk of `sequences` is next; through the unquantized model where `quantized` is the other one.
    pub fn begin(&mut self, first: usize, sequences: &[Vec<u32>], quantized: Option<&Model>) {
        (self.calls, self.first) = (0, first);
        self.done = quantized.map(|m| m.linears().filter(|l| l.replacement.is_some()).map(|l| l.id).collect());
        let mut end = 0;
        let range = |s: &Vec<u32>| {
            end += s.len();
            end - s.len()..end
        };
        self.rows = sequences.iter().map(range).collect();
    }

    /// What the outputs of `id` lack: on most sequences, and on those held out.
    pub fn drift(&self, id: usize) -> Option<(&Drift, &Drift)> {
        let at = match self.way {
            Way::Inputs => 0,
            _ => self.ids.iter().position(|i| *i == id)?,
        };
        self.drifts.get(at)?.as_ref().map(|(most, others)| (most, others))
    }

    /// Takes off `wanted` what the quantized model has in its place, and keeps how the rest goes along with the inputs.
    fn drift_from(&mut self, cpu: &Cpu, x: &[f32], got: &[&[f32]]) {
        let n = self.rows.last().map_or(0, |rows| rows.end).max(1);
        let cols = x.len() / n;
        let inputs = self.split(x, cols);
        self.drifts.resize_with(got.len(), || None);
        for (i, got) in got.iter().enumerate() {
            if self.way != Way::Inputs && !self.targets.contains_key(&self.ids[i]) {
                continue;
            }
            let mut less = std::mem::take(&mut self.wanted[i]);
            less.iter_mut().zip(*got).for_each(|(w, y)| *w -= y);
            let height = less.len() / n;
            scale(&mut less, &self.weights);
            let less = self.split(&less, height);
            let new = || match self.way {
                Way::Inputs => Drift::of_inputs(cols).coarse(),
                _ => Drift::of_outputs(height, cols).coarse(),
            };
            let (most, others) = self.drifts[i].get_or_insert_with(|| (new(), new()));
            most.add(cpu, &less.0, &inputs.0);
            others.add(cpu, &less.1, &inputs.1);
        }
    }

    /// The rows of most sequences, and those of the ones held out.
    fn split(&self, x: &[f32], width: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut most, mut others) = (Vec::with_capacity(x.len()), Vec::new());
        for (i, rows) in self.rows.iter().enumerate() {
            let into = if is_held_out(self.first + i) { &mut others } else { &mut most };
            into.extend_from_slice(&x[rows.start * width..rows.end * width]);
        }
        (most, others)
    }

    /// Where the unquantized model has shown what is wanted of it.
    fn shown(&mut self, wanted: Vec<Vec<f32>>) -> ControlFlow<()> {
        self.wanted = wanted;
        if self.last { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

/// What each of `n` rows of the residual stream counts: whatever reads the stream divides it by its root mean square
/// first, and so the error in it. Without this the few tokens with enormous activations (Sun et al. 2024, "Massive
/// activations in large language models") would be all that a product into the stream is judged by.
fn weights(stream: &[f32], n: usize) -> Vec<f32> {
    let squares = |row: &[f32]| row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() / row.len() as f64;
    let width = stream.len() / n.max(1);
    stream.chunks_exact(width.max(1)).map(|row| (1.0 / squares(row).sqrt().max(1e-6)) as f32).collect()
}

/// Multiplies each row of `x` by its weight; where there are none, all count alike.
fn scale(x: &mut [f32], weights: &[f32]) {
    let width = x.len().checked_div(weights.len()).unwrap_or(0);
    for (row, weight) in x.chunks_exact_mut(width.max(1)).zip(weights) {
        row.iter_mut().for_each(|x| *x *= weight);
    }
}

/// Whether sequence `i` judges what the others brought about.
fn is_held_out(i: usize) -> bool {
    i % HELD_OUT == HELD_OUT - 1
}

impl Observer for Step<'_> {
    fn input(&mut self, cpu: &Cpu, x: &Activations, layers: &[&Linear]) -> ControlFlow<()> {
        self.calls += 1;
        if self.calls != self.step + 1 {
            return ControlFlow::Continue(());
        }
        self.ids = layers.iter().map(|l| l.id).collect();
        let cols = x.len() / x.rows().max(1);
        if let Some(done) = &self.done {
            self.known = layers.iter().all(|l| done.contains(&l.id) || !self.targets.contains_key(&l.id));
            let rows: usize = layers.iter().filter(|l| self.targets.contains_key(&l.id)).map(|l| l.weight.rows()).sum();
            self.way = match layers {
                [layer] if self.joined.contains(&layer.id) => Way::Stream,
                _ if rows < cols => Way::Outputs,
                _ => Way::Inputs,
            };
            return match (self.known, self.way) {
                (true, _) => self.shown(Vec::new()),
                (false, Way::Inputs) => self.shown(vec![x.to_vec()]),
                (false, _) => ControlFlow::Continue(()),
            };
        }
        let mut weighed = None;
        if let (Way::Stream, [wanted]) = (self.way, &self.wanted[..]) {
            self.weights = weights(wanted, self.rows.last().map_or(0, |rows| rows.end));
            let x = weighed.insert(x.to_vec());
            scale(x, &self.weights);
        }
        let x = weighed.as_deref().unwrap_or(&x[..]);
        let (x_most, x_others) = self.split(x, cols);
        let (most, others) = self.inputs.get_or_insert_with(|| (Hessian::coarse(cols), Hessian::coarse(cols)));
        most.add(cpu, &x_most);
        others.add(cpu, &x_others);
        // The head comes without the other model's numbers: it makes nothing good.
        if self.wanted.is_empty() {
            return ControlFlow::Break(());
        }
        if self.way == Way::Inputs {
            self.drift_from(cpu, x, &[x]);
            return ControlFlow::Break(());
        }
        // What the sum behind the product will be compared with.
        self.waiting = weighed;
        ControlFlow::Continue(())
    }

    fn leaves_out(&self) -> bool {
        self.done.is_none() && self.calls == self.step + 1
    }

    fn output(&mut self, cpu: &Cpu, x: &Activations, _: &[&Linear], ys: &[Activations]) -> ControlFlow<()> {
        if self.calls != self.step + 1 || self.known || self.way == Way::Inputs {
            return ControlFlow::Continue(());
        }
        if self.way == Way::Stream {
            if self.done.is_some() {
                // Of the unquantized model only the sum is wanted.
                self.waiting = Some(Vec::new());
            }
            return ControlFlow::Continue(());
        }
        if self.done.is_some() {
            return self.shown(ys.iter().map(|y| y.to_vec()).collect());
        }
        let ys: Vec<&[f32]> = ys.iter().map(|y| &y[..]).collect();
        self.drift_from(cpu, x, &ys);
        ControlFlow::Break(())
    }

    fn sum(&mut self, cpu: &Cpu, sum: &Activations) -> ControlFlow<()> {
        let Some(x) = self.waiting.take() else { return ControlFlow::Continue(()) };
        if self.done.is_some() {
            return self.shown(vec![sum.to_vec()]);
        }
        self.drift_from(cpu, &x, &[sum]);
        ControlFlow::Break(())
    }
}
