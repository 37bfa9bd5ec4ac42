//! The forward pass of a decoder, written once for every family and every backend.

use crate::backend::{AttentionSpec, Backend, Batch};
use crate::model::{LatentWeights, Layer, Linear, MlpWeights, Model, NormWeights};
use crate::spec::{Branches, Mlp, Placement, QkNorm};
use crate::{Error, Result};

/// Runs `batch` through every layer: the residual stream behind the last one, a row per token.
pub fn hidden<B: Backend>(model: &Model, backend: &mut B, batch: &Batch<'_>) -> Result<B::Tensor> {
    backend.begin(model, batch)?;
    let mut x = embed(model, backend, batch)?;
    for i in 0..model.layers.len() {
        x = layer(model, backend, i, x)?;
    }
    Ok(x)
}

/// The residual stream before the first layer, a row for each token of the batch that `backend` has begun.
pub fn embed<B: Backend>(model: &Model, backend: &mut B, batch: &Batch<'_>) -> Result<B::Tensor> {
    let mut x = backend.embed(&model.embedding, batch.ids)?;
    x = scaled(backend, x, model.spec.embedding_scale)?;
    if let Some(table) = &model.positions {
        let positions: Vec<u32> = batch.sequences.iter().flat_map(|s| s.positions()).map(|p| p as u32).collect();
        let y = backend.embed(table, &positions)?;
        x = backend.add(x, y)?;
    }
    match &model.embedding_norm {
        Some(norm) => backend.norm(&x, model.spec.hidden_size, &model.spec.norm, norm),
        None => Ok(x),
    }
}

/// What layer `i` makes of the residual stream `x`, whose rows are those of the batch that `backend` has begun.
///
/// # Panics
/// When the model has no layer `i`.
pub fn layer<B: Backend>(model: &Model, backend: &mut B, i: usize, x: B::Tensor) -> Result<B::Tensor> {
    Pass { model, layer: i, weights: &model.layers[i], backend }.layer(x)
}

/// The logits of rows of [`hidden`]: final norm and head.
pub fn logits<B: Backend>(model: &Model, backend: &mut B, hidden: &B::Tensor) -> Result<B::Tensor> {
    let spec = &model.spec;
    let x = backend.norm(hidden, spec.hidden_size, &spec.norm, &model.final_norm)?;
    let [x] = backend.linears(&x, [&model.head])?;
    let x = scaled(backend, x, spec.logit_scale)?;
    match spec.logit_softcap {
        Some(cap) => backend.softcap(x, cap),
        None => Ok(x),
    }
}

fn scaled<B: Backend>(backend: &mut B, x: B::Tensor, by: f32) -> Result<B::Tensor> {
    if by == 1.0 { Ok(x) } else { backend.scale(x, by) }
}

/// One layer of one pass.
struct Pass<'a, B> {
    model: &'a Model,
    layer: usize,
    weights: &'a Layer,
    backend: &'a mut B,
}

impl<B: Backend> Pass<'_, B> {
    fn layer(&mut self, x: B::Tensor) -> Result<B::Tensor> {
        let w = self.weights;
        let a_in = self.norm(&x, &w.attention_norm)?;
        let a = self.attention(a_in.as_ref().unwrap_or(&x))?;
        let a = self.finish(a, &w.attention_post_norm)?;
        match self.model.spec.branches {
            Branches::Sequential => {
                let x = self.join(x, a_in, a)?;
                let m_in = self.norm(&x, &w.mlp_norm)?;
                let m = self.feed_forward(m_in.as_ref().unwrap_or(&x))?;
                let m = self.finish(m, &w.mlp_post_norm)?;
                self.join(x, m_in, m)
            }
            Branches::Parallel | Branches::ParallelShared => {
                let own = self.norm(&x, &w.mlp_norm)?;
                let m = self.feed_forward(own.as_ref().or(a_in.as_ref()).unwrap_or(&x))?;
                let m = self.finish(m, &w.mlp_post_norm)?;
                let x = self.join(x, a_in, a)?;
                self.backend.add(x, m)
            }
        }
    }

    /// Adds a branch's output to the residual stream `x`, or to what the branch was given where that is the stream.
    fn join(&mut self, x: B::Tensor, normed: Option<B::Tensor>, branch: B::Tensor) -> Result<B::Tensor> {
        let spec = &self.model.spec;
        let stream = match (spec.placement, normed) {
            (Placement::Stream, Some(normed)) => normed,
            _ => x,
        };
        let stream = scaled(self.backend, stream, spec.stream_scale)?;
        self.backend.add(stream, branch)
    }

    /// The norm before a branch, where the model has one there.
    fn norm(&mut self, x: &B::Tensor, weights: &Option<NormWeights>) -> Result<Option<B::Tensor>> {
        let spec = &self.model.spec;
        weights.as_ref().map(|w| self.backend.norm(x, spec.hidden_size, &spec.norm, w)).transpose()
    }

    /// What happens to a branch's output before it is added to the stream.
    fn finish(&mut self, branch: B::Tensor, post_norm: &Option<NormWeights>) -> Result<B::Tensor> {
        let normed = self.norm(&branch, post_norm)?;
        scaled(self.backend, normed.unwrap_or(branch), self.model.spec.residual_scale)
    }

    fn attention(&mut self, x: &B::Tensor) -> Result<B::Tensor> {
        let (spec, w) = (&self.model.spec, self.weights);
        let [mut q, mut k, mut v] = match &w.latent {
            None => self.backend.linears(x, [&w.q, &w.k, &w.v])?,
            Some(latent) => self.latent(x, latent)?,
        };
        if let Some(limit) = spec.clip_qkv {
            q = self.backend.clamp(q, limit)?;
            k = self.backend.clamp(k, limit)?;
            v = self.backend.clamp(v, limit)?;
        }
        if let (Some(q_norm), Some(k_norm)) = (&w.q_norm, &w.k_norm) {
            let (q_width, k_width) = match spec.qk_norm {
                QkNorm::Projection => (spec.query_width(), spec.kv_width()),
                QkNorm::Head | QkNorm::Heads | QkNorm::None => (spec.head_dim, spec.head_dim),
            };
            q = self.backend.norm(&q, q_width, &spec.norm, q_norm)?;
            k = self.backend.norm(&k, k_width, &spec.norm, k_norm)?;
        }
        let layer = &spec.layers[self.layer];
        if let Some(rope) = layer.rope {
            q = self.backend.rope(q, spec.head_dim, rope)?;
            k = self.backend.rope(k, spec.head_dim, rope)?;
        }
        let attention = AttentionSpec {
            layer: self.layer,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            value_dim: spec.value_dim,
            scale: spec.attention_scale * layer.attention_scale,
            softcap: spec.attention_softcap,
            window: layer.window,
            alibi: spec.alibi.as_ref(),
            logn: spec.logn,
            sinks: w.sinks.as_ref(),
        };
        let y = self.backend.attention(&attention, q, k, v)?;
        self.linear(&y, &w.o)
    }

    /// Queries, keys and values from latent vectors (DeepSeek-V2, 2024, equations 9 to 19).
    fn latent(&mut self, x: &B::Tensor, latent: &LatentWeights) -> Result<[B::Tensor; 3]> {
        let (spec, w) = (&self.model.spec, self.weights);
        let Some(sizes) = &spec.latent else { return Err(Error::model("latent weights without their sizes")) };
        let [c, rotated] = self.backend.linears(x, [&w.v, &w.k])?;
        let q = match &latent.query {
            None => self.linear(x, &w.q)?,
            Some((down, norm)) => {
                let q = self.linear(x, down)?;
                let q = self.backend.norm(&q, sizes.query.unwrap_or(0), &sizes.norm, norm)?;
                self.linear(&q, &w.q)?
            }
        };
        let c = self.backend.norm(&c, sizes.kv, &sizes.norm, &latent.norm)?;
        let kv = self.linear(&c, &latent.up)?;
        let (k, v) = self.backend.latent(kv, rotated, spec.heads, spec.value_dim)?;
        Ok([q, k, v])
    }

    fn feed_forward(&mut self, x: &B::Tensor) -> Result<B::Tensor> {
        let (layer, w) = (&self.model.spec.layers[self.layer], self.weights);
        let dense = match (&layer.mlp, &w.mlp) {
            (Some(mlp), Some(weights)) => Some(self.mlp(x, mlp, weights)?),
            _ => None,
        };
        let (Some(experts), Some(weights)) = (&layer.experts, &w.experts) else {
            return dense.ok_or_else(|| Error::model("a layer without an MLP"));
        };
        let scores = self.linear(x, &weights.router)?;
        let y = self.backend.experts(x, scores, experts, weights)?;
        match (dense, &weights.shared_gate) {
            (None, _) => Ok(y),
            (Some(shared), None) => self.backend.add(y, shared),
            (Some(shared), Some(gate)) => {
                let gate = self.linear(x, gate)?;
                let shared = self.backend.gate_rows(shared, gate)?;
                self.backend.add(y, shared)
            }
        }
    }

    fn mlp(&mut self, x: &B::Tensor, mlp: &Mlp, weights: &MlpWeights) -> Result<B::Tensor> {
        let y = match &weights.gate {
            Some(gate) => {
                let [gate, up] = self.backend.linears(x, [gate, &weights.up])?;
                self.backend.gate(mlp.activation, gate, up)?
            }
            None => {
                let up = self.linear(x, &weights.up)?;
                self.backend.activate(mlp.activation, up)?
            }
        };
        self.linear(&y, &weights.down)
    }

    fn linear(&mut self, x: &B::Tensor, layer: &Linear) -> Result<B::Tensor> {
        let [y] = self.backend.linears(x, [layer])?;
        Ok(y)
    }
}
