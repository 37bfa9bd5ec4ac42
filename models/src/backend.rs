//! What a decoder needs from whoever computes it.

use crate::Result;
use crate::model::{ExpertWeights, Linear, Model, NormWeights, Table, Vector};
use crate::spec::{Alibi, Experts, Norm, Outline};
use rushlight_quant::Phase;
use rushlight_quant::ops::Activation;
use std::ops::Range;

/// Rows of tokens to run through the model together, sequence after sequence.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The tokens of all sequences, one behind the other.
    pub ids: &'a [u32],
    /// How `ids` is cut into sequences. No slot twice.
    pub sequences: &'a [Sequence],
    /// Prompt or generated tokens. It picks the kernels, so that a token's numbers do not depend on its company.
    pub phase: Phase,
}

/// The next tokens of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Which KV cache the sequence lives in.
    pub slot: usize,
    /// Position of its first row here: how many positions the cache holds already.
    pub start: usize,
    /// Number of rows here.
    pub len: usize,
    /// What they need to know of the whole sequence: [`Model::outline`].
    pub outline: Outline,
}

impl Sequence {
    /// The positions of the rows as embeddings count them: those of a prefix that is not counted left out.
    pub fn positions(&self) -> Range<usize> {
        let start = self.start - self.outline.before.min(self.start);
        start..start + self.len
    }
}

/// How one layer attends.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpec<'a> {
    /// The layer, which picks the cache.
    pub layer: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head of queries and keys.
    pub head_dim: usize,
    /// Width of a head of values.
    pub value_dim: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// A position sees itself and the `window - 1` before it.
    pub window: Option<usize>,
    /// What distances add to the scores.
    pub alibi: Option<&'a Alibi>,
    /// Queries behind this many positions are multiplied by `ln(position + 1) / ln(this)`.
    pub logn: Option<usize>,
    /// One more score for each head, which is dropped after the softmax.
    pub sinks: Option<&'a Vector>,
}

/// The operations of a decoder. Tensors are f32 matrices with a row per token; an operation that takes one by value
/// may reuse its memory. Eager inference computes at once, a training tape records, a GPU enqueues.
pub trait Backend {
    /// A matrix of activations, a row per token.
    type Tensor;

    /// Called before the first operation of a batch.
    fn begin(&mut self, model: &Model, batch: &Batch<'_>) -> Result<()>;

    /// The table's rows `ids`.
    fn embed(&mut self, table: &Table, ids: &[u32]) -> Result<Self::Tensor>;

    /// Several linear layers of the same input: weight, adapters and bias of each.
    fn linears<const N: usize>(&mut self, x: &Self::Tensor, layers: [&Linear; N]) -> Result<[Self::Tensor; N]>;

    /// Normalises runs of `width` values, each row of `x` being a whole number of them.
    fn norm(&mut self, x: &Self::Tensor, width: usize, norm: &Norm, weights: &NormWeights) -> Result<Self::Tensor>;

    /// Turns each head of `x` by its row's position, with rotary embedding `rope` of the model.
    fn rope(&mut self, x: Self::Tensor, head_dim: usize, rope: usize) -> Result<Self::Tensor>;

    /// Puts keys and values behind those the layer has of each sequence, and lets the queries attend to them all.
    fn attention(
        &mut self,
        spec: &AttentionSpec<'_>,
        q: Self::Tensor,
        k: Self::Tensor,
        v: Self::Tensor,
    ) -> Result<Self::Tensor>;

    /// Keys and values from a latent vector's: each row of `kv` holds `heads` times `[key | value]`, and behind each key
    /// go the row's `rotated` values, which all heads share. Values are `value_dim` wide.
    fn latent(
        &mut self,
        kv: Self::Tensor,
        rotated: Self::Tensor,
        heads: usize,
        value_dim: usize,
    ) -> Result<(Self::Tensor, Self::Tensor)>;

    /// A mixture of experts: `scores` are the router's for each row of `x`, [`choose`](crate::routing::choose) says who
    /// takes part and by how much.
    fn experts(
        &mut self,
        x: &Self::Tensor,
        scores: Self::Tensor,
        spec: &Experts,
        weights: &ExpertWeights,
    ) -> Result<Self::Tensor>;

    /// Each row of `x` times the sigmoid of the row's one value in `by`.
    fn gate_rows(&mut self, x: Self::Tensor, by: Self::Tensor) -> Result<Self::Tensor>;

    /// `act(gate) * up`, value by value.
    fn gate(&mut self, act: Activation, gate: Self::Tensor, up: Self::Tensor) -> Result<Self::Tensor>;

    /// `act(x)`, value by value.
    fn activate(&mut self, act: Activation, x: Self::Tensor) -> Result<Self::Tensor>;

    /// `x + y`.
    fn add(&mut self, x: Self::Tensor, y: Self::Tensor) -> Result<Self::Tensor>;

    /// `x * by`.
    fn scale(&mut self, x: Self::Tensor, by: f32) -> Result<Self::Tensor>;

    /// `x` no further than `limit` from 0, value by value.
    fn clamp(&mut self, x: Self::Tensor, limit: f32) -> Result<Self::Tensor>;

    /// `cap * tanh(x / cap)`, value by value.
    fn softcap(&mut self, x: Self::Tensor, cap: f32) -> Result<Self::Tensor>;

    /// The given rows of `x`, in the order given.
    fn rows(&mut self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor>;
}
