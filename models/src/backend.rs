//! What a decoder needs from whoever computes it.

use crate::Result;
use crate::model::{Linear, Model, NormWeights, Table};
use crate::spec::Norm;
use rushlight_quant::Phase;
use rushlight_quant::ops::Activation;

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
}

/// How one layer attends.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpec {
    /// The layer, which picks the cache.
    pub layer: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// A position sees itself and the `window - 1` before it.
    pub window: Option<usize>,
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
        spec: &AttentionSpec,
        q: Self::Tensor,
        k: Self::Tensor,
        v: Self::Tensor,
    ) -> Result<Self::Tensor>;

    /// `act(gate) * up`, value by value.
    fn gate(&mut self, act: Activation, gate: Self::Tensor, up: Self::Tensor) -> Result<Self::Tensor>;

    /// `act(x)`, value by value.
    fn activate(&mut self, act: Activation, x: Self::Tensor) -> Result<Self::Tensor>;

    /// `x + y`.
    fn add(&mut self, x: Self::Tensor, y: Self::Tensor) -> Result<Self::Tensor>;

    /// `x * by`.
    fn scale(&mut self, x: Self::Tensor, by: f32) -> Result<Self::Tensor>;

    /// `cap * tanh(x / cap)`, value by value.
    fn softcap(&mut self, x: Self::Tensor, cap: f32) -> Result<Self::Tensor>;

    /// The given rows of `x`, in the order given.
    fn rows(&mut self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor>;
}
