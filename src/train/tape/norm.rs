//! Norms.

use super::pool::Buffer;
use super::record::{Saved, Step, Tape, Value};
use rushlight_models::model::{NormWeights, Vector};
use rushlight_models::spec::{Norm, NormKind};
use rushlight_models::{Error, Result};
use rushlight_quant::Cpu;
use std::rc::Rc;

/// A norm with its weights as they stand.
#[derive(Clone)]
struct Ready {
    norm: Norm,
    width: usize,
    weight: Option<Rc<[f32]>>,
    bias: Option<Rc<[f32]>>,
}

impl Ready {
    fn apply(&self, cpu: &Cpu, x: &[f32], y: &mut [f32]) {
        match (self.norm.kind, &self.weight) {
            (NormKind::Rms, Some(weight)) => cpu.rms_norm(x, weight, self.norm.eps, self.norm.weight_offset, y),
            _ => cpu.layer_norm(x, self.width, self.weight.as_deref(), self.bias.as_deref(), self.norm.eps, y),
        }
    }
}

/// Normalises runs of `width` values.
pub(super) fn norm(tape: &mut Tape<'_>, x: &Value, width: usize, norm: &Norm, weights: &NormWeights) -> Result<Value> {
    if norm.kind == NormKind::Rms && weights.weight.is_none() {
        return Err(Error::model("an RMS norm without a weight"));
    }
    let param = |v: &Option<Vector>| v.as_ref().and_then(|v| tape.sites.vector(v));
    let params = [param(&weights.weight), param(&weights.bias)];
    let values = |v: &Option<Vector>, param: Option<usize>| {
        v.as_ref().map(|v| Rc::from(param.map_or(&v.values[..], |param| tape.param(param))))
    };
    let (weight, bias) = (values(&weights.weight, params[0]), values(&weights.bias, params[1]));
    let ready = Ready { norm: *norm, width, weight, bias };
    let mut y = tape.pool.take(x.data.rows(), x.data.width());
    ready.apply(tape.cpu, &x.data, &mut y);
    let mut y = tape.value(y, x.slot.is_some() || params.iter().any(Option::is_some));
    if let Some(slot) = y.slot {
        let x_saved = Rc::new(tape.saved(x));
        let (again, from) = (ready.clone(), x_saved.clone());
        // Cheaper to make again than to keep.
        y.recipe = Some(Rc::new(move |cpu, pool| {
            let x = from.matrix(cpu, pool);
            let mut y = pool.take(x.rows(), x.width());
            again.apply(cpu, &x, &mut y);
            y
        }));
        tape.push(NormStep { ready, params, x: x_saved, x_slot: x.slot, slot });
    }
    Ok(y)
}

struct NormStep {
    ready: Ready,
    /// Of weight and bias.
    params: [Option<usize>; 2],
    x: Rc<Saved>,
    x_slot: Option<usize>,
    slot: usize,
}

impl Step for NormStep {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let NormStep { ready, params, x, x_slot, slot } = *self;
        let Some(dy) = tape.take(slot) else { return Ok(()) };
        let (cpu, pool) = (tape.cpu, tape.pool);
        let x = x.matrix(cpu, pool);
        let mut dx = match x_slot {
            Some(slot) => tape.borrow(slot, x.rows(), x.width()),
            None => pool.zeros(x.rows(), x.width()),
        };
        let zeros = |v: &Option<Rc<[f32]>>, param: Option<usize>| {
            v.as_ref().filter(|_| param.is_some()).map(|v| vec![0f32; v.len()])
        };
        let (mut dweight, mut dbias) = (zeros(&ready.weight, params[0]), zeros(&ready.bias, params[1]));
        backward(cpu, &ready, &x, &dy, &mut dx, dweight.as_deref_mut(), dbias.as_deref_mut());
        for (param, gradient) in params.iter().zip([dweight, dbias]) {
            if let (Some(param), Some(gradient)) = (param, gradient) {
                cpu.add(tape.gradient(*param)?, &gradient);
            }
        }
        if let Some(slot) = x_slot {
            tape.give_back(slot, dx);
        }
        Ok(())
    }
}

fn backward(
    cpu: &Cpu,
    ready: &Ready,
    x: &Buffer,
    dy: &[f32],
    dx: &mut [f32],
    dweight: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
) {
    let Ready { norm, width, weight, .. } = ready;
    match (norm.kind, weight) {
        (NormKind::Rms, Some(weight)) => {
            cpu.rms_norm_backward(x, weight, norm.eps, norm.weight_offset, dy, dx, dweight);
        }
        _ => cpu.layer_norm_backward(x, *width, weight.as_deref(), norm.eps, dy, dx, dweight, dbias),
    }
}
