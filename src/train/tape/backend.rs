//! The tape as the decoder's backend.

use super::record::{Tape, Value};
use super::{attention, elementwise, experts, linear, norm, rows};
use crate::engine::angles::Angles;
use rushlight_models::Result;
use rushlight_models::backend::{AttentionSpec, Backend, Batch};
use rushlight_models::model::{ExpertWeights, Linear, Model, NormWeights, Table};
use rushlight_models::spec::{Experts, Norm};
use rushlight_quant::ops::Activation;

impl Backend for Tape<'_> {
    type Tensor = Value;

    fn begin(&mut self, model: &Model, batch: &Batch<'_>) -> Result<()> {
        self.sequences.clear();
        self.sequences.extend_from_slice(batch.sequences);
        Angles::update(&mut self.angles, model, batch);
        Ok(())
    }

    fn embed(&mut self, table: &Table, ids: &[u32]) -> Result<Value> {
        rows::embed(self, table, ids)
    }

    fn linears<const N: usize>(&mut self, x: &Value, layers: [&Linear; N]) -> Result<[Value; N]> {
        linear::linears(self, x, layers)
    }

    fn norm(&mut self, x: &Value, width: usize, norm: &Norm, weights: &NormWeights) -> Result<Value> {
        norm::norm(self, x, width, norm, weights)
    }

    fn rope(&mut self, x: Value, head_dim: usize, rope: usize) -> Result<Value> {
        Ok(elementwise::rope(self, x, head_dim, rope))
    }

    fn attention(&mut self, spec: &AttentionSpec<'_>, q: Value, k: Value, v: Value) -> Result<Value> {
        attention::attention(self, spec, q, k, v)
    }

    fn latent(&mut self, kv: Value, rotated: Value, heads: usize, value_dim: usize) -> Result<(Value, Value)> {
        Ok(rows::latent(self, kv, rotated, heads, value_dim))
    }

    fn experts(&mut self, x: &Value, scores: Value, spec: &Experts, weights: &ExpertWeights) -> Result<Value> {
        experts::experts(self, x, scores, spec, weights)
    }

    fn gate_rows(&mut self, x: Value, by: Value) -> Result<Value> {
        Ok(elementwise::gate_rows(self, x, by))
    }

    fn gate(&mut self, act: Activation, gate: Value, up: Value) -> Result<Value> {
        Ok(elementwise::gate(self, act, gate, up))
    }

    fn activate(&mut self, act: Activation, x: Value) -> Result<Value> {
        Ok(elementwise::activate(self, act, x))
    }

    fn add(&mut self, x: Value, y: Value) -> Result<Value> {
        Ok(elementwise::add(self, x, y))
    }

    fn scale(&mut self, x: Value, by: f32) -> Result<Value> {
        Ok(elementwise::scale(self, x, by))
    }

    fn clamp(&mut self, x: Value, limit: f32) -> Result<Value> {
        Ok(elementwise::clamp(self, x, limit))
    }

    fn softcap(&mut self, x: Value, cap: f32) -> Result<Value> {
        Ok(elementwise::softcap(self, x, cap))
    }

    fn rows(&mut self, x: &Value, rows: &[usize]) -> Result<Value> {
        Ok(rows::rows(self, x, rows))
    }
}
