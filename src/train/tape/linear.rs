//! Linear layers: the frozen or trained weight, low-rank adapters, bias.

use super::lora::{self, Lora};
use super::pool::Buffer;
use super::record::{Saved, Step, Tape, Value, own};
use rushlight_models::model::{Linear, Weight};
use rushlight_models::{Error, Result};
use rushlight_quant::ops::Waiting;
use rushlight_quant::{Matrix, Phase};
use std::rc::Rc;

/// The weight of a layer.
pub(super) enum Source {
    /// As the file has it.
    Frozen(Weight),
    /// A parameter, `[rows, cols]`.
    Trained(usize),
}

/// One layer of several with the same input.
struct Part {
    rows: usize,
    source: Source,
    bias: Option<usize>,
    lora: Option<Lora>,
    /// What the layer gave before DoRA's gain, where it has one.
    plain: Option<Rc<Buffer>>,
    slot: Option<usize>,
}

/// `y_i = x W_i^T + scale_i (x A_i^T) B_i^T + bias_i`.
pub(super) fn linears<const N: usize>(tape: &mut Tape<'_>, x: &Value, layers: [&Linear; N]) -> Result<[Value; N]> {
    let (n, cols) = (x.data.rows(), x.data.width());
    let (cpu, pool) = (tape.cpu, tape.pool);
    let sites = layers.map(|l| tape.sites.linear(l));
    let mut ys = layers.map(|l| pool.take(n, l.weight().rows()));
    let loras: Vec<(Option<Lora>, usize)> = sites.iter().map(|s| s.lora).zip(layers.map(|l| l.id)).collect();
    let along =
        sites.iter().all(|site| site.weight.is_none()) && lora::goes_along(tape, &loras, &layers.map(Linear::weight));
    let low = if along {
        lora::forward_along(tape, &x.data, &loras, &layers.map(Linear::weight), &mut ys)
    } else {
        base(tape, &x.data, layers, &mut ys);
        lora::forward(tape, &x.data, &loras, &mut ys)
    };
    let mut parts = Vec::with_capacity(N);
    for ((y, layer), site) in ys.iter_mut().zip(layers).zip(&sites) {
        let gain = site.lora.and_then(|l| l.dora).map(|dora| &tape.gains[dora]);
        let plain = gain.map(|gain| {
            let plain = y.copy();
            for row in y.chunks_exact_mut(gain.gain.len()) {
                row.iter_mut().zip(&gain.gain).for_each(|(y, gain)| *y *= gain);
            }
            Rc::new(plain)
        });
        let bias = site.bias.map(|param| tape.param(param)).or(layer.bias.as_ref().map(|b| &b.values[..]));
        if let Some(bias) = bias {
            cpu.add_bias(y, bias);
        }
        let source = match site.weight {
            Some(param) => Source::Trained(param),
            None => Source::Frozen(layer.weight().clone()),
        };
        parts.push(Part { rows: layer.weight().rows(), source, bias: site.bias, lora: site.lora, plain, slot: None });
    }
    let mut values = Vec::with_capacity(N);
    for ((y, part), site) in ys.into_iter().zip(&mut parts).zip(&sites) {
        let value = tape.value(y, x.slot.is_some() || site.learns());
        part.slot = value.slot;
        values.push(value);
    }
    if parts.iter().any(|p| p.slot.is_some()) {
        let wanted = sites.iter().any(|s| s.weight.is_some() || s.lora.is_some());
        let input = wanted.then(|| tape.saved(x));
        tape.push(Linears { n, cols, x: input, x_slot: x.slot, parts, low, along });
    }
    values.try_into().map_err(|_| Error::model("a value for each layer"))
}

/// The products with the weights themselves. Weights whose columns are stored in an order of their own meet activations
/// gathered in it, one product for each order.
fn base<const N: usize>(tape: &Tape<'_>, x: &Buffer, layers: [&Linear; N], ys: &mut [Buffer; N]) {
    let (n, cpu) = (x.rows(), tape.cpu);
    let mut done = [false; N];
    for i in 0..N {
        if let Some(param) = tape.sites.linear(layers[i]).weight {
            ys[i].fill(0.0);
            cpu.floats_matmul(x, n, tape.param(param), layers[i].weight().rows(), x.width(), 1.0, &mut ys[i]);
            done[i] = true;
        }
    }
    for i in 0..N {
        if done[i] {
            continue;
        }
        let order = layers[i].weight().order();
        let same: Vec<usize> = (i..N).filter(|&j| !done[j] && layers[j].weight().order() == order).collect();
        let gathered = order.map(|order| {
            let mut gathered = tape.pool.take(n, x.width());
            cpu.gather_columns(x, order, &mut gathered);
            gathered
        });
        let weights: Vec<Matrix<'_>> = same.iter().map(|&j| layers[j].weight().matrix()).collect();
        let outs = ys.iter_mut().enumerate().filter(|(j, _)| same.contains(j));
        let mut outs: Vec<&mut [f32]> = outs.map(|(_, y)| &mut **y).collect();
        cpu.matmul(Phase::Prompt, gathered.as_ref().unwrap_or(x), n, &weights, &mut outs);
        same.iter().for_each(|&j| done[j] = true);
    }
}

struct Linears {
    n: usize,
    cols: usize,
    /// The input, where something learns from it.
    x: Option<Saved>,
    x_slot: Option<usize>,
    parts: Vec<Part>,
    low: Vec<lora::Low>,
    /// The adapters went along with the weights.
    along: bool,
}

impl Step for Linears {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Linears { n, cols, x, x_slot, parts, low, along } = *self;
        let cpu = tape.cpu;
        let mut gradients: Vec<Option<Rc<Buffer>>> = parts.iter().map(|p| p.slot.and_then(|s| tape.take(s))).collect();
        if gradients.iter().all(Option::is_none) {
            return Ok(());
        }
        let mut input = x;
        let x = if along { None } else { input.take().map(|x| x.matrix(tape.cpu, tape.pool)) };
        for (part, dy) in parts.iter().zip(&mut gradients) {
            let Some(gradient) = dy.take() else { continue };
            if let Some(param) = part.bias {
                cpu.add_bias_backward(&gradient, tape.gradient(param)?);
            }
            let gradient = match (&part.plain, part.lora) {
                (Some(plain), Some(lora)) => Rc::new(lora::gain_backward(tape, &lora, plain, own(gradient))?),
                _ => gradient,
            };
            if let (Source::Trained(param), Some(x)) = (&part.source, &x) {
                cpu.weight_gradient(&gradient, x, n, part.rows, cols, 1.0, tape.gradient(*param)?);
            }
            *dy = Some(gradient);
        }
        let mut dx = x_slot.map(|slot| tape.borrow(slot, n, cols));
        if along {
            let layers = parts.iter().zip(&gradients).filter_map(|(part, dy)| {
                let Source::Frozen(weight) = &part.source else { return None };
                Some((weight, part.lora, dy.as_deref()?))
            });
            let layers: Vec<_> = layers.collect();
            let dlows = lora::backward_along(tape, &layers, &low, n, dx.as_mut())?;
            if let (Some(slot), Some(dx)) = (x_slot, dx) {
                tape.give_back(slot, dx);
            }
            drop((gradients, low));
            return match input {
                None => Ok(()),
                Some(Saved::Kept(x)) => lora::inputs_gradient(tape, x.waiting(), [n, cols], &dlows),
                Some(Saved::Again(recipe)) => {
                    let x = recipe(tape.cpu, tape.pool);
                    lora::inputs_gradient(tape, Waiting::Whole(&x), [n, cols], &dlows)
                }
            };
        }
        if let Some(x) = &x {
            let loras: Vec<_> = parts.iter().map(|p| p.lora).zip(&gradients).collect();
            lora::backward(tape, x, &loras, &low, dx.as_mut())?;
        }
        drop((x, low));
        if let (Some(slot), Some(mut dx)) = (x_slot, dx) {
            base_backward(tape, n, &parts, &gradients, &mut dx);
            tape.give_back(slot, dx);
        }
        Ok(())
    }
}

fn base_backward(tape: &Tape<'_>, n: usize, parts: &[Part], gradients: &[Option<Rc<Buffer>>], dx: &mut Buffer) {
    let cpu = tape.cpu;
    let mut frozen: Vec<(&Weight, &[f32])> = Vec::new();
    for (part, dy) in parts.iter().zip(gradients) {
        let Some(dy) = dy else { continue };
        match &part.source {
            Source::Trained(param) => {
                let cols = dx.width();
                cpu.floats_backward(dy, n, tape.param(*param), part.rows, cols, 1.0, dx);
            }
            Source::Frozen(weight) => frozen.push((weight, dy)),
        }
    }
    while let Some((first, _)) = frozen.first() {
        let order = first.order().cloned();
        let (same, rest): (Vec<_>, Vec<_>) = frozen.into_iter().partition(|(w, _)| w.order() == order.as_ref());
        let weights: Vec<Matrix<'_>> = same.iter().map(|(w, _)| w.matrix()).collect();
        let dys: Vec<&[f32]> = same.iter().map(|(_, dy)| *dy).collect();
        match order {
            None => cpu.matmul_backward(&dys, n, &weights, dx),
            Some(order) => {
                let mut stored = tape.pool.zeros(n, dx.width());
                cpu.matmul_backward(&dys, n, &weights, &mut stored);
                cpu.scatter_columns(&stored, &order, dx);
            }
        }
        frozen = rest;
    }
}
