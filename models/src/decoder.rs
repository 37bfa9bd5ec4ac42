//! The forward pass of a decoder, written once for every family and every backend.

use crate::Result;
use crate::backend::{AttentionSpec, Backend, Batch};
use crate::model::{Layer, Linear, Model, NormWeights};
use crate::spec::{Branches, QkNorm};

/// Runs `batch` through every layer: the residual stream behind the last one, a row per token.
pub fn hidden<B: Backend>(model: &Model, backend: &mut B, batch: &Batch<'_>) -> Result<B::Tensor> {
    backend.begin(model, batch)?;
    let mut x = embed(model, backend, batch.ids)?;
    for i in 0..model.layers.len() {
        x = layer(model, backend, i, x)?;
    }
    Ok(x)
}

/// The residual stream before the first layer, a row for each of `ids`.
pub fn embed<B: Backend>(model: &Model, backend: &mut B, ids: &[u32]) -> Result<B::Tensor> {
    let x = backend.embed(&model.embedding, ids)?;
    scaled(backend, x, model.spec.embedding_scale)
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
                drop(a_in);
                let x = self.backend.add(x, a)?;
                let m_in = self.norm(&x, &w.mlp_norm)?;
                let m = self.mlp(m_in.as_ref().unwrap_or(&x))?;
                let m = self.finish(m, &w.mlp_post_norm)?;
                self.backend.add(x, m)
            }
            Branches::Parallel | Branches::ParallelShared => {
                let own = self.norm(&x, &w.mlp_norm)?;
                let m = self.mlp(own.as_ref().or(a_in.as_ref()).unwrap_or(&x))?;
                let m = self.finish(m, &w.mlp_post_norm)?;
                let x = self.backend.add(x, a)?;
                self.backend.add(x, m)
            }
        }
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
        let [mut q, mut k, v] = self.backend.linears(x, [&w.q, &w.k, &w.v])?;
        if let (Some(q_norm), Some(k_norm)) = (&w.q_norm, &w.k_norm) {
            let (q_width, k_width) = match spec.qk_norm {
                QkNorm::Projection => (spec.query_width(), spec.kv_width()),
                QkNorm::Head | QkNorm::None => (spec.head_dim, spec.head_dim),
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
            scale: spec.attention_scale,
            softcap: spec.attention_softcap,
            window: layer.window,
        };
        let y = self.backend.attention(&attention, q, k, v)?;
        self.linear(&y, &w.o)
    }

    fn mlp(&mut self, x: &B::Tensor) -> Result<B::Tensor> {
        let act = self.model.spec.layers[self.layer].mlp.activation;
        let w = &self.weights.mlp;
        let y = match &w.gate {
            Some(gate) => {
                let [gate, up] = self.backend.linears(x, [gate, &w.up])?;
                self.backend.gate(act, gate, up)?
            }
            None => {
                let up = self.linear(x, &w.up)?;
                self.backend.activate(act, up)?
            }
        };
        self.linear(&y, &w.down)
    }

    fn linear(&mut self, x: &B::Tensor, layer: &Linear) -> Result<B::Tensor> {
        let [y] = self.backend.linears(x, [layer])?;
        Ok(y)
    }
}
