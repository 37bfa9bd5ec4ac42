//! Attention over whole sequences, each behind the model's prefix where it has one.

use super::pool::Buffer;
use super::record::{Bits, Kept, Step, Tape, Value};
use crate::engine::angles::logn;
use rushlight_models::Result;
use rushlight_models::backend::AttentionSpec;
use rushlight_quant::ops::{Attention, AttentionGradients, AttentionRows};
use std::rc::Rc;

/// What an [`AttentionSpec`] says but for what lies in the model.
#[derive(Clone, Copy)]
struct Plan {
    layer: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    scale: f32,
    softcap: Option<f32>,
    window: Option<usize>,
    logn: Option<usize>,
}

impl Plan {
    fn spec<'t>(&self, tape: &Tape<'t>) -> Attention<'t> {
        let model = tape.model;
        let alibi = model.spec.alibi.as_ref();
        let sinks = model.layers[self.layer].sinks.as_ref();
        Attention {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            value_dim: self.value_dim,
            scale: self.scale,
            softcap: self.softcap,
            window: self.window,
            slopes: alibi.map(|alibi| &alibi.slopes[..]),
            rounded_slopes: alibi.and_then(|alibi| alibi.rounded),
            sinks: sinks.map(|s| tape.sites.vector(s).map_or(&s.values[..], |param| tape.param(param))),
        }
    }
}

/// `softmax(q k^T) v` for every head of every sequence.
pub(super) fn attention(tape: &mut Tape<'_>, spec: &AttentionSpec<'_>, q: Value, k: Value, v: Value) -> Result<Value> {
    let plan = Plan {
        layer: spec.layer,
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        value_dim: spec.value_dim,
        scale: spec.scale,
        softcap: spec.softcap,
        window: spec.window,
        logn: spec.logn,
    };
    let slots = [q.slot, k.slot, v.slot];
    let mut q = q.into_buffer();
    if let Some(n) = plan.logn {
        stretch(tape, &mut q, n);
    }
    let sequences = sequences(tape);
    let (k, v) = match prefix(tape, plan.layer) {
        None => (k.data, v.data),
        Some((len, keys, values)) => (
            Rc::new(with_prefix(tape, &sequences, &k.data, len, keys)),
            Rc::new(with_prefix(tape, &sequences, &v.data, len, values)),
        ),
    };
    let sinks = tape.model.layers[plan.layer].sinks.as_ref().is_some_and(|s| tape.sites.vector(s).is_some());
    let learns = slots.iter().any(Option::is_some) || sinks || tape.sites.prefix.is_some();
    // The way back computes the scores once more and must find the same: both begin with what is kept.
    let qkv = [Rc::new(q), k, v].map(|x| tape.keep(x, Bits::Sixteen));
    let [q, k, v] = qkv.clone().map(|x| x.matrix(tape.cpu, tape.pool));
    let mut out = tape.pool.take(q.rows(), plan.heads * plan.value_dim);
    let mut lse = tape.pool.take(q.rows(), plan.heads);
    tape.cpu.attention_train(&plan.spec(tape), &sequences, &q, &k, &v, &mut out, &mut lse);
    let mut y = tape.value(out, learns);
    if let Some(slot) = y.slot {
        let out = tape.keep(y.data.clone(), Bits::Eight);
        if let Kept::Rounded(..) = out {
            let again = out.clone();
            y.recipe = Some(Rc::new(move |cpu, pool| again.clone().into_buffer(cpu, pool)));
        }
        tape.push(AttentionStep { plan, slots, qkv, out, lse, sequences, slot });
    }
    Ok(y)
}

/// Qwen's longer queries at distant positions.
fn stretch(tape: &Tape<'_>, q: &mut Buffer, n: usize) {
    for (row, by) in logn(&tape.sequences, n) {
        tape.cpu.scale(q.row_mut(row), by);
    }
}

/// The rows of each sequence, and those of its keys with the prefix.
fn sequences(tape: &Tape<'_>) -> Vec<AttentionRows> {
    let (mut row, mut key) = (0, 0);
    let each = tape.sequences.iter().map(|s| {
        let (queries, keys) = (row..row + s.len, key..key + s.start + s.len);
        (row, key) = (queries.end, keys.end);
        let context = if s.outline.context == 0 { 0 } else { s.outline.before + s.outline.context };
        AttentionRows { queries, keys, context }
    });
    each.collect()
}

/// Length, keys and values of what stands before every sequence: trained, or the model's own.
fn prefix<'t>(tape: &Tape<'t>, layer: usize) -> Option<(usize, &'t [f32], &'t [f32])> {
    match (&tape.sites.prefix, &tape.model.prefix) {
        (Some(site), _) => {
            let (keys, values) = site.layers[layer];
            Some((site.len, tape.param(keys), tape.param(values)))
        }
        (None, Some(prefix)) => {
            let (keys, values) = &prefix.layers[layer];
            Some((prefix.len, keys, values))
        }
        (None, None) => None,
    }
}

/// The rows of each sequence behind those of the prefix.
fn with_prefix(tape: &Tape<'_>, sequences: &[AttentionRows], x: &Buffer, len: usize, prefix: &[f32]) -> Buffer {
    let width = x.width();
    let mut all = tape.pool.take(x.rows() + sequences.len() * len, width);
    for s in sequences {
        let at = s.keys.start * width;
        all[at..at + prefix.len()].copy_from_slice(prefix);
        let own = &x[s.queries.start * width..s.queries.end * width];
        all[at + prefix.len()..s.keys.end * width].copy_from_slice(own);
    }
    all
}

struct AttentionStep {
    plan: Plan,
    /// Of queries, keys and values.
    slots: [Option<usize>; 3],
    /// Queries as they were used; keys and values with the prefix.
    qkv: [Kept; 3],
    out: Kept,
    lse: Buffer,
    sequences: Vec<AttentionRows>,
    slot: usize,
}

impl Step for AttentionStep {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let AttentionStep { plan, slots, qkv, out, lse, sequences, slot } = *self;
        let Some(dout) = tape.take(slot) else { return Ok(()) };
        let (cpu, pool) = (tape.cpu, tape.pool);
        let ([q, k, v], out) = (qkv.map(|x| x.matrix(cpu, pool)), out.matrix(cpu, pool));
        let mut dq = pool.take(q.rows(), q.width());
        let mut dk = pool.take(k.rows(), k.width());
        let mut dv = pool.take(v.rows(), v.width());
        let sinks = tape.model.layers[plan.layer].sinks.as_ref().and_then(|s| tape.sites.vector(s));
        let mut dsinks = sinks.map(|_| vec![0.0; plan.heads]);
        let spec = plan.spec(tape);
        let gradients = AttentionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv, dsinks: dsinks.as_deref_mut() };
        cpu.attention_backward(&spec, &sequences, [&q, &k, &v], &out, &lse, &dout, gradients);
        if let (Some(param), Some(dsinks)) = (sinks, dsinks) {
            cpu.add(tape.gradient(param)?, &dsinks);
        }
        if let Some(n) = plan.logn {
            stretch(tape, &mut dq, n);
        }
        if let Some(site) = &tape.sites.prefix {
            let (keys, values) = site.layers[plan.layer];
            for (param, gradient) in [(keys, &dk), (values, &dv)] {
                let (width, size) = (gradient.width(), site.len * gradient.width());
                let into = tape.gradient(param)?;
                for s in &sequences {
                    cpu.add(into, &gradient[s.keys.start * width..][..size]);
                }
            }
        }
        let [q_slot, k_slot, v_slot] = slots;
        tape.give(q_slot, Rc::new(dq));
        let behind = prefix(tape, plan.layer).is_some();
        for (slot, gradient) in [(k_slot, dk), (v_slot, dv)] {
            let gradient = if behind { without_prefix(tape, &sequences, q.rows(), &gradient) } else { gradient };
            tape.give(slot, Rc::new(gradient));
        }
        Ok(())
    }
}

/// The rows of `x` that are not the prefix's.
fn without_prefix(tape: &Tape<'_>, sequences: &[AttentionRows], rows: usize, x: &Buffer) -> Buffer {
    let width = x.width();
    let mut own = tape.pool.take(rows, width);
    for s in sequences {
        let from = (s.keys.end - s.queries.len()) * width..s.keys.end * width;
        own[s.queries.start * width..s.queries.end * width].copy_from_slice(&x[from]);
    }
    own
}
