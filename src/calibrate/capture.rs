//! A backend that shows the inputs of linear layers to an observer, and otherwise computes as the CPU does.

use crate::engine::cpu::{Activations, CpuBackend};
use rushlight_models::backend::{AttentionSpec, Backend, Batch};
use rushlight_models::model::{ExpertWeights, Linear, Model, NormWeights, Table};
use rushlight_models::spec::{Experts, Norm};
use rushlight_models::{Error, Result};
use rushlight_quant::Cpu;
use rushlight_quant::ops::Activation;
use std::ops::ControlFlow;

/// Looks at what goes into linear layers.
pub trait Observer {
    /// `x` is about to be multiplied by the weights of `layers`, which share it. `Break` ends the pass here: the
    /// products are not computed, nor what would follow.
    fn input(&mut self, cpu: &Cpu, x: &Activations, layers: &[&Linear]) -> ControlFlow<()>;

    /// Whether the products that [`Observer::input`] has just heard of are to be left out: zeros take their place.
    fn leaves_out(&self) -> bool {
        false
    }

    /// `ys` are the products of `x` and the weights of `layers`, with the biases. `Break` ends the pass here.
    fn output(&mut self, cpu: &Cpu, x: &Activations, layers: &[&Linear], ys: &[Activations]) -> ControlFlow<()> {
        let _ = (cpu, x, layers, ys);
        ControlFlow::Continue(())
    }

    /// `sum` is the sum of two tensors, such as the residual stream and a branch. `Break` ends the pass here.
    fn sum(&mut self, cpu: &Cpu, sum: &Activations) -> ControlFlow<()> {
        let _ = (cpu, sum);
        ControlFlow::Continue(())
    }
}

/// Looks at nothing.
impl Observer for () {
    fn input(&mut self, _: &Cpu, _: &Activations, _: &[&Linear]) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// [`CpuBackend`] with an observer.
pub struct Capture<'a, O> {
    backend: &'a mut CpuBackend,
    observer: &'a mut O,
    /// All layers use the first layer's cache: for a pass through one layer at a time.
    one_cache: bool,
    stopped: bool,
}

impl<'a, O: Observer> Capture<'a, O> {
    /// Shows `observer` what `backend` multiplies.
    pub fn new(backend: &'a mut CpuBackend, observer: &'a mut O) -> Self {
        Capture { backend, observer, one_cache: false, stopped: false }
    }

    /// The same for passes through one layer at a time, which need the cache of one layer only.
    pub fn layerwise(backend: &'a mut CpuBackend, observer: &'a mut O) -> Self {
        Capture { backend, observer, one_cache: true, stopped: false }
    }

    /// What `pass` gives; `None` where the observer ended it.
    pub fn run<T>(&mut self, pass: impl FnOnce(&mut Self) -> Result<T>) -> Result<Option<T>> {
        self.stopped = false;
        match pass(self) {
            Ok(value) => Ok(Some(value)),
            Err(_) if self.stopped => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// An error that ends the pass where the observer wants that.
    fn goes_on(&mut self, seen: ControlFlow<()>) -> Result<()> {
        if seen.is_continue() {
            return Ok(());
        }
        self.stopped = true;
        // Only the way out of the decoder: `run` takes it back.
        Err(Error::model("the pass was ended by its observer"))
    }

    /// The backend behind.
    pub fn backend(&mut self) -> &mut CpuBackend {
        self.backend
    }
}

impl<O: Observer> Backend for Capture<'_, O> {
    type Tensor = Activations;

    fn begin(&mut self, model: &Model, batch: &Batch<'_>) -> Result<()> {
        self.backend.begin(model, batch)
    }

    fn embed(&mut self, table: &Table, ids: &[u32]) -> Result<Activations> {
        self.backend.embed(table, ids)
    }

    fn linears<const N: usize>(&mut self, x: &Activations, layers: [&Linear; N]) -> Result<[Activations; N]> {
        let seen = self.observer.input(self.backend.cpu(), x, &layers);
        self.goes_on(seen)?;
        let ys = if self.observer.leaves_out() {
            layers.map(|l| {
                let mut y = self.backend.new_tensor(x.rows(), l.weight.rows());
                y.fill(0.0);
                if let Some(bias) = &l.bias {
                    self.backend.cpu().add_bias(&mut y, &bias.values);
                }
                y
            })
        } else {
            self.backend.linears(x, layers)?
        };
        let seen = self.observer.output(self.backend.cpu(), x, &layers, &ys);
        self.goes_on(seen)?;
        Ok(ys)
    }

    fn norm(&mut self, x: &Activations, width: usize, norm: &Norm, weights: &NormWeights) -> Result<Activations> {
        self.backend.norm(x, width, norm, weights)
    }

    fn rope(&mut self, x: Activations, head_dim: usize, rope: usize) -> Result<Activations> {
        self.backend.rope(x, head_dim, rope)
    }

    fn attention(
        &mut self,
        spec: &AttentionSpec<'_>,
        q: Activations,
        k: Activations,
        v: Activations,
    ) -> Result<Activations> {
        let layer = if self.one_cache { 0 } else { spec.layer };
        self.backend.attention(&AttentionSpec { layer, ..*spec }, q, k, v)
    }

    fn latent(
        &mut self,
        kv: Activations,
        rotated: Activations,
        heads: usize,
        value_dim: usize,
    ) -> Result<(Activations, Activations)> {
        self.backend.latent(kv, rotated, heads, value_dim)
    }

    /// What goes into single experts is not shown: each has rows of its own, and too few of them to measure by.
    fn experts(
        &mut self,
        x: &Activations,
        scores: Activations,
        spec: &Experts,
        weights: &ExpertWeights,
    ) -> Result<Activations> {
        self.backend.experts(x, scores, spec, weights)
    }

    fn gate_rows(&mut self, x: Activations, by: Activations) -> Result<Activations> {
        self.backend.gate_rows(x, by)
    }

    fn clamp(&mut self, x: Activations, limit: f32) -> Result<Activations> {
        self.backend.clamp(x, limit)
    }

    fn gate(&mut self, act: Activation, gate: Activations, up: Activations) -> Result<Activations> {
        self.backend.gate(act, gate, up)
    }

    fn activate(&mut self, act: Activation, x: Activations) -> Result<Activations> {
        self.backend.activate(act, x)
    }

    fn add(&mut self, x: Activations, y: Activations) -> Result<Activations> {
        let sum = self.backend.add(x, y)?;
        let seen = self.observer.sum(self.backend.cpu(), &sum);
        self.goes_on(seen)?;
        Ok(sum)
    }

    fn scale(&mut self, x: Activations, by: f32) -> Result<Activations> {
        self.backend.scale(x, by)
    }

    fn softcap(&mut self, x: Activations, cap: f32) -> Result<Activations> {
        self.backend.softcap(x, cap)
    }

    fn rows(&mut self, x: &Activations, rows: &[usize]) -> Result<Activations> {
        self.backend.rows(x, rows)
    }
}
