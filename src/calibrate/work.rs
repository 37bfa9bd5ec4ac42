//! How much of a run is done.

use super::layers::{Run, State};
use rushlight_models::model::Linear;

/// What quantizing a weight costs, in products for each column.
const FOR_WEIGHTS: u64 = 8;

/// Counts the work, so that the time left can be told: in products of two numbers, by what each kind costs.
pub(super) struct Work<'a> {
    progress: &'a mut dyn FnMut(State),
    tokens: u64,
    /// For each layer, and then the head, what a token costs in each step's run, and what the weights cost.
    parts: Vec<(Vec<u64>, u64)>,
    state: State,
    /// In products.
    done: u64,
}

impl<'a> Work<'a> {
    pub fn new(run: &Run<'_>, progress: &'a mut dyn FnMut(State)) -> Self {
        let tokens = run.sequences.iter().map(|s| s.len() as u64).sum();
        let part = |steps: &[Vec<&Linear>]| {
            let (mut costs, mut forward, mut weights) = (Vec::new(), 0, 0);
            for (i, linears) in steps.iter().enumerate() {
                let cols = linears[0].weight.cols() as u64;
                let wanted = linears.iter().filter(|l| run.targets.contains_key(&l.id));
                let rows: u64 = wanted.map(|l| l.weight.rows() as u64).sum();
                // Products of bf16, which are about twice as fast as f32: one matrix' outputs are looked at, or else what
                // goes in.
                let own = linears.iter().map(|l| l.weight.rows() as u64 * cols / 2).sum::<u64>();
                let products = match (rows, linears.len()) {
                    (0, _) => 0,
                    (_, 1) => cols * cols / 4 + rows * cols / 2,
                    _ => cols * cols,
                };
                let shown = if linears.len() == 1 || i + 1 == steps.len() { own } else { 0 };
                costs.push(2 * forward + shown + products);
                weights += if rows > 0 { FOR_WEIGHTS * rows * cols * cols } else { 0 };
                forward += own;
            }
            costs.push(forward);
            (costs, weights)
        };
        let mut parts: Vec<_> = (run.model.layers.iter())
            .map(|l| {
                let mut steps = vec![vec![&l.q, &l.k, &l.v], vec![&l.o]];
                if let Some(mlp) = &l.mlp {
                    steps.push(mlp.gate.iter().chain([&mlp.up]).collect());
                    steps.push(vec![&mlp.down]);
                }
                part(&steps)
            })
            .collect();
        if !run.model.spec.tied_head {
            parts.push(part(&[vec![&run.model.head]]));
        }
        let total = parts.iter().map(|(steps, weights)| steps.iter().sum::<u64>() * tokens + weights).sum();
        Work { progress, tokens, parts, state: State { done: 0, total, layer: 0 }, done: 0 }
    }

    /// Runs through the present layer, the whole one among them.
    pub fn steps(&self) -> usize {
        self.parts.get(self.state.layer).map_or(1, |p| p.0.len())
    }

    /// All before `layer` is done.
    pub fn reach(&mut self, layer: usize) {
        let cost = |(steps, weights): &(Vec<u64>, u64)| steps.iter().sum::<u64>() * self.tokens + weights;
        self.done = self.parts.iter().take(layer).map(cost).sum();
        self.state.layer = layer;
        self.tell();
    }

    /// `rows` more tokens have gone through the layer as far as `step`.
    pub fn ran(&mut self, step: usize, rows: usize) {
        let steps = self.parts.get(self.state.layer).map(|p| &p.0[..]);
        self.done += steps.and_then(|s| s.get(step)).map_or(0, |cost| cost * rows as u64);
        self.tell();
    }

    pub fn quantized(&mut self, rows: usize, cols: usize) {
        self.done += FOR_WEIGHTS * (rows * cols * cols) as u64;
        self.tell();
    }

    /// Nothing is left.
    pub fn finish(&mut self) {
        self.done = self.state.total;
        self.tell();
    }

    fn tell(&mut self) {
        self.state.done = self.done.min(self.state.total);
        (self.progress)(self.state);
    }
}
