//! What one step of a layer is given, and what its outputs lack.

use super::capture::Observer;
use super::layers::Target;
use crate::engine::cpu::Activations;
use rushlight_models::model::{Linear, Model};
use rushlight_models::spec::Branches;
use rushlight_quant::Cpu;
use rushlight_quant::quantize::{Drift, Hessian};
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

/// Collects what goes into the linear layers of one step of a layer, and what comes out, and ends the pass there.
pub(super) struct Step<'a> {
    /// Which call for products it waits for.
    pub step: usize,
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
    /// What comes out of the unquantized model for this chunk, for each of them.
    outputs: Vec<Vec<f32>>,
    /// What the outputs lack, likewise.
    pub drifts: HashMap<usize, (Drift, Drift)>,
    /// Inputs of a product that is about to be added to the stream.
    waiting: Option<Vec<f32>>,
    /// Nothing has to be collected: all of the step's weights are there, or none is wanted.
    pub known: bool,
}

impl<'a> Step<'a> {
    pub fn new(step: usize, targets: &'a HashMap<usize, Target>, joined: Vec<usize>) -> Self {
        Step {
            step,
            targets,
            joined,
            calls: 0,
            first: 0,
            rows: Vec::new(),
            done: None,
            ids: Vec::new(),
            inputs: None,
            outputs: Vec::new(),
            drifts: HashMap::new(),
            waiting: None,
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

    /// Adds what the outputs `ys` of the layers lack beside their inputs.
    fn drift(&mut self, cpu: &Cpu, x: &[f32], ys: &[&[f32]]) {
        let n = self.rows.last().map_or(0, |rows| rows.end);
        for ((id, wanted), y) in self.ids.iter().zip(&mut self.outputs).zip(ys) {
            if !self.targets.contains_key(id) {
                continue;
            }
            wanted.iter_mut().zip(*y).for_each(|(w, y)| *w -= y);
            let (height, cols) = (y.len() / n, x.len() / n);
            let (most, others) =
                self.drifts.entry(*id).or_insert_with(|| (Drift::new(height, cols), Drift::new(height, cols)));
            for (i, rows) in self.rows.iter().enumerate() {
                let into = if is_held_out(self.first + i) { &mut *others } else { &mut *most };
                into.add(cpu, &wanted[rows.start * height..rows.end * height], &x[rows.start * cols..rows.end * cols]);
            }
        }
    }
}

/// Whether sequence `i` judges what the others brought about.
fn is_held_out(i: usize) -> bool {
    i % HELD_OUT == HELD_OUT - 1
}

impl Observer for Step<'_> {
    fn input(&mut self, cpu: &Cpu, x: &Activations, layers: &[&Linear]) -> ControlFlow<()> {
        self.calls += 1;
        if self.calls <= self.step {
            return ControlFlow::Continue(());
        }
        self.ids = layers.iter().map(|l| l.id).collect();
        if let Some(done) = &self.done {
            self.known = layers.iter().all(|l| done.contains(&l.id) || !self.targets.contains_key(&l.id));
            return if self.known { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        }
        let cols = x.len() / x.rows();
        let (hessian, held_out) = self.inputs.get_or_insert_with(|| (Hessian::new(cols), Hessian::new(cols)));
        for (i, rows) in self.rows.iter().enumerate() {
            let into = if is_held_out(self.first + i) { &mut *held_out } else { &mut *hessian };
            into.add(cpu, &x[rows.start * cols..rows.end * cols]);
        }
        // The head comes without the other model's outputs: it makes nothing good.
        if self.outputs.is_empty() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn output(&mut self, cpu: &Cpu, x: &Activations, layers: &[&Linear], ys: &[Activations]) -> ControlFlow<()> {
        if self.calls <= self.step {
            return ControlFlow::Continue(());
        }
        if let ([layer], [_]) = (layers, ys)
            && self.joined.contains(&layer.id)
        {
            self.waiting = Some(x.to_vec());
            return ControlFlow::Continue(());
        }
        let ys: Vec<&[f32]> = ys.iter().map(|y| &y[..]).collect();
        match self.done {
            Some(_) => self.outputs = ys.iter().map(|y| y.to_vec()).collect(),
            None => self.drift(cpu, x, &ys),
        }
        ControlFlow::Break(())
    }

    fn sum(&mut self, cpu: &Cpu, sum: &Activations) -> ControlFlow<()> {
        let Some(x) = self.waiting.take() else { return ControlFlow::Continue(()) };
        match self.done {
            Some(_) => self.outputs = vec![sum.to_vec()],
            None => self.drift(cpu, &x, &[sum]),
        }
        ControlFlow::Break(())
    }
}
