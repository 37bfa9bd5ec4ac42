//! The CPU as the decoder's backend: every operation at once, in buffers that are used again.

use super::angles::{Angles, logn};
use super::kv::KvCache;
use rushlight_models::backend::{AttentionSpec, Backend, Batch, Sequence};
use rushlight_models::model::{ExpertWeights, Linear, Model, NormWeights, Table};
use rushlight_models::routing;
use rushlight_models::spec::{Experts, Norm, NormKind, Outline};
use rushlight_models::{Error, Result};
use rushlight_quant::buffer::Aligned;
use rushlight_quant::ops::{Activation, Attention, AttentionSequence};
use rushlight_quant::{Cpu, Phase};
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, PoisonError};

/// Buffers not in use. A forward pass takes and returns a few hundred; after the first one it finds them all here.
#[derive(Default)]
struct Pool(Mutex<Vec<Aligned<f32>>>);

impl Pool {
    /// The smallest free buffer of at least `len`, or a new one.
    fn take(&self, len: usize) -> Aligned<f32> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let best = (0..free.len()).filter(|&i| free[i].len() >= len).min_by_key(|&i| free[i].len());
        match best {
            Some(i) => free.swap_remove(i),
            None => Aligned::zeroed(len),
        }
    }

    fn put_back(&self, buffer: Aligned<f32>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }

    fn bytes(&self) -> u64 {
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.iter().map(|b| 4 * b.len() as u64).sum()
    }
}

/// A matrix of activations, `[rows, width]`. Its memory goes back to the pool when it is dropped.
pub struct Activations {
    buffer: Aligned<f32>,
    len: usize,
    width: usize,
    pool: Arc<Pool>,
}

impl Activations {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.len.checked_div(self.width).unwrap_or(0)
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self[row * self.width..][..self.width]
    }
}

impl Deref for Activations {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.buffer[..self.len]
    }
}

impl DerefMut for Activations {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[..self.len]
    }
}

impl Drop for Activations {
    fn drop(&mut self) {
        self.pool.put_back(std::mem::take(&mut self.buffer));
    }
}

/// The CPU with the KV cache of its sequences.
pub struct CpuBackend {
    cpu: Cpu,
    pool: Arc<Pool>,
    /// The cache.
    pub kv: KvCache,
    /// Of the current batch.
    phase: Phase,
    sequences: Vec<Sequence>,
    angles: Vec<Angles>,
}

impl CpuBackend {
    /// A backend that computes on `cpu` and remembers in `kv`.
    pub fn new(cpu: Cpu, kv: KvCache) -> Self {
        let (pool, sequences, angles) = Default::default();
        CpuBackend { cpu, pool, kv, phase: Phase::Prompt, sequences, angles }
    }

    /// The worker team and its kernels.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Bytes held in buffers that are free now.
    pub fn scratch(&self) -> u64 {
        self.pool.bytes()
    }

    /// Empties every slot but for the prefix that an adapter gave the model.
    pub fn put_prefix(&mut self, model: &Model) {
        for slot in 0..self.kv.shape().slots {
            self.kv.set_len(slot, 0);
            let Some(prefix) = &model.prefix else { continue };
            for (layer, (keys, values)) in prefix.layers.iter().enumerate() {
                self.kv.store(&self.cpu, slot, layer, 0, keys, values);
            }
            self.kv.set_len(slot, prefix.len);
        }
    }

    /// Drops the positions `range` of `slot`; those behind it move down.
    pub fn forget(&mut self, model: &Model, slot: usize, range: Range<usize>, outline: &Outline) {
        let rotary = |layer: usize| model.spec.layers[layer].rope.map(|r| &model.rotaries[r]);
        self.kv.forget(&self.cpu, slot, range, outline, rotary);
    }

    /// A matrix of `[rows, width]` to be written to: what it holds is arbitrary.
    pub fn new_tensor(&self, rows: usize, width: usize) -> Activations {
        let len = rows * width;
        Activations { buffer: self.pool.take(len), len, width, pool: self.pool.clone() }
    }

    /// The products of layers of which some store their columns in an order of their own: one product for each order,
    /// with the activations gathered in it.
    fn ordered<const N: usize>(&self, x: &Activations, layers: [&Linear; N], ys: &mut [Activations; N]) {
        let n = x.rows();
        let orders = layers.map(|l| l.weight().order());
        for i in 0..N {
            if orders[..i].contains(&orders[i]) {
                continue;
            }
            let gathered = orders[i].map(|order| {
                let mut gathered = self.new_tensor(n, x.width);
                self.cpu.gather_columns(x, order, &mut gathered);
                gathered
            });
            let same = |j: &usize| orders[*j] == orders[i];
            let weights: Vec<_> = (0..N).filter(same).map(|j| layers[j].weight().matrix()).collect();
            let outs = ys.iter_mut().enumerate().filter(|(j, _)| same(j));
            let mut outs: Vec<&mut [f32]> = outs.map(|(_, y)| &mut **y).collect();
            self.cpu.matmul(self.phase, gathered.as_ref().unwrap_or(x), n, &weights, &mut outs);
        }
    }

    /// Adds to `y` what the adapters of `layer` make of `x`.
    fn adapt(&self, x: &Activations, layer: &Linear, y: &mut Activations) {
        let n = x.rows();
        let base = layer.adapters.iter().any(|a| a.gain.is_some()).then(|| {
            let mut base = self.new_tensor(n, y.width);
            base.copy_from_slice(y);
            base
        });
        for adapter in &layer.adapters {
            let mut low = self.new_tensor(n, adapter.a.rows());
            self.cpu.matmul(self.phase, x, n, &[adapter.a.matrix()], &mut [&mut low]);
            let mut change = self.new_tensor(n, y.width);
            self.cpu.matmul(self.phase, &low, n, &[adapter.b.matrix()], &mut [&mut change]);
            match (&adapter.gain, &base) {
                (Some(gain), Some(base)) => {
                    let rows = y.chunks_exact_mut(gain.len()).zip(base.chunks_exact(gain.len()));
                    for ((y, base), change) in rows.zip(change.chunks_exact(gain.len())) {
                        for o in 0..gain.len() {
                            let changed = gain[o] * (base[o] + adapter.scale * change[o]);
                            y[o] += adapter.strength * (changed - base[o]);
                        }
                    }
                }
                _ => self.cpu.add_scaled(y, adapter.scale * adapter.strength, &change),
            }
        }
    }
}

impl Backend for CpuBackend {
    type Tensor = Activations;

    fn begin(&mut self, model: &Model, batch: &Batch<'_>) -> Result<()> {
        self.phase = batch.phase;
        self.sequences.clear();
        self.sequences.extend_from_slice(batch.sequences);
        Angles::update(&mut self.angles, model, batch);
        Ok(())
    }

    fn embed(&mut self, table: &Table, ids: &[u32]) -> Result<Activations> {
        let weight = table.weight();
        let mut x = self.new_tensor(ids.len(), weight.cols());
        for (&id, row) in ids.iter().zip(x.chunks_exact_mut(weight.cols())) {
            let id = id as usize;
            if id >= weight.rows() {
                return Err(Error::model(format!("token {id} is not in the vocabulary of {}", weight.rows())));
            }
            weight.decode_row(id, row);
        }
        Ok(x)
    }

    fn linears<const N: usize>(&mut self, x: &Activations, layers: [&Linear; N]) -> Result<[Activations; N]> {
        let n = x.rows();
        let mut ys = layers.map(|l| self.new_tensor(n, l.weight().rows()));
        if layers.iter().all(|l| l.weight().order().is_none()) {
            let weights = layers.map(|l| l.weight().matrix());
            self.cpu.matmul(self.phase, x, n, &weights, &mut ys.each_mut().map(|y| &mut **y));
        } else {
            self.ordered(x, layers, &mut ys);
        }
        for (y, layer) in ys.iter_mut().zip(layers) {
            if !layer.adapters.is_empty() {
                self.adapt(x, layer, y);
            }
            if let Some(bias) = &layer.bias {
                self.cpu.add_bias(y, &bias.values);
            }
        }
        Ok(ys)
    }

    fn norm(&mut self, x: &Activations, width: usize, norm: &Norm, weights: &NormWeights) -> Result<Activations> {
        let mut y = self.new_tensor(x.rows(), x.width);
        let weight = weights.weight.as_ref().map(|w| &w.values[..]);
        match (norm.kind, weight) {
            (NormKind::Rms, Some(weight)) => self.cpu.rms_norm(x, weight, norm.eps, norm.weight_offset, &mut y),
            (NormKind::Rms, None) => return Err(Error::model("an RMS norm without a weight")),
            (NormKind::Layer { .. }, weight) => {
                let bias = weights.bias.as_ref().map(|b| &b.values[..]);
                self.cpu.layer_norm(x, width, weight, bias, norm.eps, &mut y);
            }
        }
        Ok(y)
    }

    fn rope(&mut self, mut x: Activations, head_dim: usize, rope: usize) -> Result<Activations> {
        let angles = &self.angles[rope];
        let width = x.width;
        if let Some(layout) = angles.layout {
            let (cos, sin) = (&angles.cos, &angles.sin);
            self.cpu.rope(&mut x, width, head_dim, cos, sin, angles.first, angles.dim, layout);
        }
        Ok(x)
    }

    fn attention(
        &mut self,
        spec: &AttentionSpec<'_>,
        mut q: Activations,
        k: Activations,
        v: Activations,
    ) -> Result<Activations> {
        let mut row = 0;
        for s in &self.sequences {
            let of = |x: &Activations| row * x.width..(row + s.len) * x.width;
            self.kv.store(&self.cpu, s.slot, spec.layer, s.start, &k[of(&k)], &v[of(&v)]);
            row += s.len;
        }
        if let Some(n) = spec.logn {
            let width = q.width;
            for (row, by) in logn(&self.sequences, n) {
                q[row * width..][..width].iter_mut().for_each(|x| *x *= by);
            }
        }
        let mut out = self.new_tensor(q.rows(), spec.heads * spec.value_dim);
        let attention = Attention {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            value_dim: spec.value_dim,
            scale: spec.scale,
            softcap: spec.softcap,
            window: spec.window,
            slopes: spec.alibi.map(|alibi| &alibi.slopes[..]),
            rounded_slopes: spec.alibi.and_then(|alibi| alibi.rounded),
            sinks: spec.sinks.map(|sinks| &sinks.values[..]),
        };
        let mut row = 0;
        let mut next = |s: &Sequence| {
            let (keys, values) = self.kv.view(s.slot, spec.layer);
            let rows = row..row + s.len;
            row = rows.end;
            let context = match s.outline.context {
                0 => 0,
                n => s.outline.before + n,
            };
            AttentionSequence { rows, start: s.start, keys, values, capacity: self.kv.shape().capacity, context }
        };
        match &self.sequences[..] {
            // The usual case needs no list.
            [s] => self.cpu.attention(self.phase, &attention, &q, &[next(s)], &mut out),
            all => {
                let all: Vec<_> = all.iter().map(next).collect();
                self.cpu.attention(self.phase, &attention, &q, &all, &mut out);
            }
        }
        Ok(out)
    }

    fn latent(
        &mut self,
        kv: Activations,
        rotated: Activations,
        heads: usize,
        value_dim: usize,
    ) -> Result<(Activations, Activations)> {
        let (n, size) = (kv.rows(), kv.width / heads);
        let (own, shared) = (size - value_dim, rotated.width);
        let mut k = self.new_tensor(n, heads * (own + shared));
        let mut v = self.new_tensor(n, heads * value_dim);
        let heads_of = k.chunks_exact_mut(own + shared).zip(v.chunks_exact_mut(value_dim)).zip(kv.chunks_exact(size));
        for (i, ((k, v), kv)) in heads_of.enumerate() {
            k[..own].copy_from_slice(&kv[..own]);
            k[own..].copy_from_slice(rotated.row(i / heads));
            v.copy_from_slice(&kv[own..]);
        }
        Ok((k, v))
    }

    /// Rows are gathered by expert, so that each expert's weights are read once for all of its rows; a row's shares are
    /// added in the order of the experts, whatever rows are beside it.
    fn experts(
        &mut self,
        x: &Activations,
        scores: Activations,
        spec: &Experts,
        weights: &ExpertWeights,
    ) -> Result<Activations> {
        let bias = weights.choice_bias.as_ref().map(|b| &b.values[..]);
        let mut rows_of: Vec<Vec<(usize, f32)>> = vec![Vec::new(); spec.count];
        for row in 0..x.rows() {
            for (expert, weight) in routing::choose(spec, scores.row(row), bias) {
                rows_of[expert].push((row, weight));
            }
        }
        let mut out = self.new_tensor(x.rows(), x.width);
        out.fill(0.0);
        for (rows, expert) in rows_of.iter().zip(&weights.experts) {
            if rows.is_empty() {
                continue;
            }
            let mut mine = self.new_tensor(rows.len(), x.width);
            for ((row, _), mine) in rows.iter().zip(mine.chunks_exact_mut(x.width)) {
                mine.copy_from_slice(x.row(*row));
            }
            let y = match &expert.gate {
                Some(gate) => {
                    let [gate, up] = self.linears(&mine, [gate, &expert.up])?;
                    self.gate(spec.mlp.activation, gate, up)?
                }
                None => {
                    let [up] = self.linears(&mine, [&expert.up])?;
                    self.activate(spec.mlp.activation, up)?
                }
            };
            let [y] = self.linears(&y, [&expert.down])?;
            for (&(row, weight), y) in rows.iter().zip(y.chunks_exact(x.width)) {
                self.cpu.add_scaled(&mut out[row * x.width..][..x.width], weight, y);
            }
        }
        Ok(out)
    }

    fn gate_rows(&mut self, mut x: Activations, by: Activations) -> Result<Activations> {
        let width = x.width;
        for (row, by) in x.chunks_exact_mut(width).zip(by.iter()) {
            let by = 1.0 / (1.0 + (-by).exp());
            row.iter_mut().for_each(|x| *x *= by);
        }
        Ok(x)
    }

    fn gate(&mut self, act: Activation, mut gate: Activations, up: Activations) -> Result<Activations> {
        self.cpu.gate(act, &mut gate, &up);
        Ok(gate)
    }

    fn activate(&mut self, act: Activation, mut x: Activations) -> Result<Activations> {
        self.cpu.activate(act, &mut x);
        Ok(x)
    }

    fn add(&mut self, mut x: Activations, y: Activations) -> Result<Activations> {
        self.cpu.add(&mut x, &y);
        Ok(x)
    }

    fn scale(&mut self, mut x: Activations, by: f32) -> Result<Activations> {
        self.cpu.scale(&mut x, by);
        Ok(x)
    }

    fn clamp(&mut self, mut x: Activations, limit: f32) -> Result<Activations> {
        self.cpu.clamp(&mut x, limit);
        Ok(x)
    }

    fn softcap(&mut self, mut x: Activations, cap: f32) -> Result<Activations> {
        self.cpu.soft_cap(&mut x, cap);
        Ok(x)
    }

    fn rows(&mut self, x: &Activations, rows: &[usize]) -> Result<Activations> {
        let mut out = self.new_tensor(rows.len(), x.width);
        for (out, &row) in out.chunks_exact_mut(x.width).zip(rows) {
            out.copy_from_slice(x.row(row));
        }
        Ok(out)
    }
}
