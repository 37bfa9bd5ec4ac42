//! How much memory a step will take, before anything is computed.

use super::learner::chunk;
use super::method::{Checkpointing, LoraConfig, Method};
use super::targets::{Patterns, module, name, norms, targeted};
use anyhow::Result;
use rushlight_models::families::Role;
use rushlight_models::model::{Linear, Model};
use rushlight_models::spec::{Branches, LayerSpec, ModelSpec, Placement, QkNorm};
use std::collections::HashSet;

/// Bytes that training takes beside the model's own weights and the optimizer's states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Trained numbers.
    pub params: u64,
    /// Their gradients.
    pub gradients: u64,
    /// What the layers keep for the way back.
    pub activations: u64,
    /// What exists for a moment: one layer's way back.
    pub scratch: u64,
    /// Logits of some rows and the way back through the head, at another moment.
    pub logits: u64,
}

impl MemoryEstimate {
    /// What a pass takes at most: logits are gone when the layers' way back begins.
    pub fn pass(&self) -> u64 {
        self.activations + self.scratch.max(self.logits)
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.params + self.gradients + self.pass()
    }
}

/// What a micro-batch of `rows` tokens, all of which the loss may fall on, takes.
///
/// # Errors
/// When the method does not fit the model.
pub fn memory(model: &Model, method: &Method, rows: usize, checkpointing: Checkpointing) -> Result<MemoryEstimate> {
    let (spec, params) = (&model.spec, 4 * count(model, method)?);
    let adapted = adapted(model, method)?;
    let half = half(model, method);
    let layers = spec.layers.len();
    let (mut inputs, mut kept, mut whole) = (0, 0, 0);
    for i in 0..layers {
        let all = of_layer(spec, &spec.layers[i], half) + 4 * adapters(model, method, &adapted, i);
        if checkpointing.again(i) {
            inputs += 4 * spec.hidden_size;
            whole = whole.max(all);
        } else {
            kept += all;
        }
    }
    // A layer that is computed again is there as a whole while its way back lasts; by then those behind it have gone.
    let again = whole.saturating_sub(kept);
    let chunk = chunk(spec.vocab_size).min(rows);
    let bytes = |per_row: usize| (rows * per_row) as u64;
    Ok(MemoryEstimate {
        params,
        gradients: params,
        activations: bytes(inputs + kept + 4 * spec.hidden_size),
        scratch: bytes(again + 4 * (0..layers).map(|i| passing(spec, &spec.layers[i], half)).max().unwrap_or(0)),
        logits: 4 * (chunk * (spec.vocab_size * if spec.logit_softcap.is_some() { 2 } else { 1 })) as u64
            + 4 * ((3 * chunk + rows) * spec.hidden_size) as u64,
    })
}

/// Values that `method` trains.
fn count(model: &Model, method: &Method) -> Result<u64> {
    let size = |l: &Linear| l.weight.rows() * l.weight.cols();
    let table = model.embedding.weight.rows() * model.embedding.weight.cols();
    let positions = model.positions.as_ref().map_or(0, |p| p.weight.rows() * p.weight.cols());
    let of_norm = |n: &rushlight_models::model::NormWeights| {
        n.weight.iter().chain(&n.bias).map(|v| v.values.len()).sum::<usize>()
    };
    let values = match method {
        Method::Prefix { tokens } => 2 * model.layers.len() * tokens * model.spec.kv_width(),
        Method::Full => {
            let tied = |l: &&Linear| l.role != Role::Head || l.id != model.embedding.id;
            let bias = |l: &Linear| l.bias.as_ref().map_or(0, |b| b.values.len());
            let linears: usize = model.linears().filter(tied).map(|l| size(l) + bias(l)).sum();
            let sinks: usize = model.layers.iter().filter_map(|l| l.sinks.as_ref()).map(|s| s.values.len()).sum();
            let norms: usize = norms(model).iter().map(|(.., n)| of_norm(n)).sum();
            table + positions + linears + sinks + norms
        }
        Method::Lora(config) => {
            let mut patterns = Patterns::new(&config.train_full)?;
            let mut whole = 0;
            if patterns.mean(&name(model, Role::Embedding, 0)) {
                whole += table;
            }
            if model.positions.is_some() && patterns.mean(&name(model, Role::Positions, 0)) {
                whole += positions;
            }
            for (role, layer, n) in norms(model) {
                whole += if patterns.mean(&name(model, role, layer)) { of_norm(n) } else { 0 };
            }
            for linear in model.linears() {
                let meant = module(model, linear).is_some_and(|m| patterns.mean(&m.name));
                whole += if meant { size(linear) } else { 0 };
            }
            let mut shared = HashSet::new();
            for (linear, module) in targeted(model, &config.targets)? {
                if patterns.mean(&module.name) {
                    continue;
                }
                let magnitude = if config.dora { linear.weight.rows() } else { 0 };
                whole += config.rank * linear.weight.rows() + magnitude;
                if shared.insert(module.name) {
                    whole += config.rank * linear.weight.cols();
                }
            }
            whole
        }
    };
    Ok(values as u64)
}

/// The numbers of the linear layers with adapters.
fn adapted(model: &Model, method: &Method) -> Result<HashSet<usize>> {
    match method {
        Method::Lora(config) => Ok(targeted(model, &config.targets)?.iter().map(|(l, _)| l.id).collect()),
        _ => Ok(HashSet::new()),
    }
}

/// What the adapters of layer `i` keep for each row: inputs times A, and what DoRA's gain is multiplied with. Of a
/// mixture's experts only some are used.
fn adapters(model: &Model, method: &Method, adapted: &HashSet<usize>, i: usize) -> usize {
    let Method::Lora(LoraConfig { rank, dora, .. }) = method else { return 0 };
    let each = model.linears().filter(|l| l.layer == i && l.role != Role::Head && adapted.contains(&l.id));
    let used = model.spec.layers[i].experts.as_ref().map_or(0, |e| e.used);
    each.filter(|l| l.role.expert().is_none_or(|e| e < used))
        .map(|l| rank + if *dora { l.weight.rows() } else { 0 })
        .sum()
}

/// Whether what is kept for the way back is kept in bf16: where the frozen weights are coarser than that. Weights that are
/// trained in f32 are not.
pub(super) fn half(model: &Model, method: &Method) -> bool {
    !model.is_float() && *method != Method::Full
}

/// Bytes that a layer keeps for each row.
fn of_layer(spec: &ModelSpec, layer: &LayerSpec, half: bool) -> usize {
    let hidden = spec.hidden_size;
    let (q, k, v) = (spec.query_width(), spec.kv_width(), spec.value_width());
    let normed = if spec.qk_norm == QkNorm::None { 0 } else { q + k };
    let clipped = if spec.clip_qkv.is_some() { q + k + v } else { 0 };
    let latent = spec.latent.as_ref().map_or(0, |l| l.kv + l.query.unwrap_or(0));
    let (attention, out) = (q + k + v + normed + latent, spec.heads * spec.value_dim);
    let posts = match spec.placement {
        Placement::After | Placement::Both => 2 * hidden,
        _ => 0,
    };
    let stream = if spec.branches == Branches::Sequential { 2 * hidden } else { hidden };
    let mlp = |width: usize, gated: bool| if gated { 2 * width } else { width };
    let dense = layer.mlp.as_ref().map_or(0, |m| mlp(m.width, m.gated));
    let (routed, experts, mixed) = layer
        .experts
        .as_ref()
        .map_or((0, 0, 0), |e| (e.used * hidden, e.used * mlp(e.mlp.width, e.mlp.gated), e.used * hidden + e.count));
    let exact = 4 * (clipped + spec.heads + mixed);
    if !half {
        return 4 * (stream + attention + out + posts + dense + routed + experts) + exact;
    }
    // A scale for each 64 codes.
    let rough = |values: usize| values + values / 16;
    2 * (stream + attention + posts + routed) + rough(out + dense + experts) + exact
}

/// Values for each row that a layer's way there or back has in hand at once, beside what is kept.
fn passing(spec: &ModelSpec, layer: &LayerSpec, half: bool) -> usize {
    let width = layer.mlp.iter().chain(layer.experts.as_ref().map(|e| &e.mlp)).map(|m| m.width).max().unwrap_or(0);
    let (qkv, out) = (spec.query_width() + spec.kv_width() + spec.value_width(), spec.heads * spec.value_dim);
    // What is kept in bf16 comes back in f32 beside it.
    let (mlp, attention) = (2 * width, if half { 2 * qkv + 2 * out } else { 2 * qkv });
    // Gradients of the stream before and after a branch, and the branch's widest values with their gradient.
    3 * spec.hidden_size + mlp.max(attention)
}
