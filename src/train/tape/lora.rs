//! Low-rank adapters (Hu et al. 2021) and their kin: `y += scale * drop(x) A^T B^T`, with DoRA's gain on the whole
//! (Liu et al. 2024).

use super::noise;
use super::pool::Buffer;
use super::record::Tape;
use rushlight_models::Result;
use rushlight_models::model::Weight;
use rushlight_quant::ops::Waiting;
use rushlight_quant::{Back, Down, Matrix, Up};
use std::rc::Rc;

/// A trained adapter on one linear layer. Layers that a family's files hold as one matrix share their `a`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lora {
    /// The parameter `[rank, inputs]`.
    pub a: usize,
    /// The parameter `[outputs, rank]`.
    pub b: usize,
    /// Rank.
    pub rank: usize,
    /// What the product is multiplied by.
    pub scale: f32,
    /// DoRA: the parameter `[outputs]`, the magnitude of each row.
    pub magnitude: Option<usize>,
    /// Which of the tape's gains is this layer's.
    pub dora: Option<usize>,
}

/// DoRA's factors of one layer, as the parameters stand.
#[derive(Clone, Debug, Default)]
pub struct Gain {
    /// Magnitude over norm, for each output.
    pub gain: Vec<f32>,
    /// One over the norm of the row of `weight + scale * B A`.
    pub inverse: Vec<f32>,
}

/// `drop(x) A^T`, `[n, rank]`, kept for the way back.
pub(super) struct Low {
    a: usize,
    rank: usize,
    /// Seeds the mask.
    id: usize,
    low: Buffer,
}

/// Adds to each of `ys` what the adapter on it makes of `x`. Each layer comes with its number.
pub(super) fn forward(tape: &Tape<'_>, x: &Buffer, layers: &[(Option<Lora>, usize)], ys: &mut [Buffer]) -> Vec<Low> {
    let (cpu, pool, n, cols) = (tape.cpu, tape.pool, x.rows(), x.width());
    let mut lows = narrow(tape, n, layers);
    match (lows.len(), dropout(tape)) {
        (0, _) => {}
        (_, Some((rate, seed))) => {
            for low in &mut lows {
                let mut dropped = x.copy();
                noise::drop(cpu, &mut dropped, cols, rate, seed, low.id);
                cpu.floats_matmul(&dropped, n, tape.param(low.a), low.rank, cols, 1.0, &mut low.low);
            }
        }
        (1, None) => cpu.floats_matmul(x, n, tape.param(lows[0].a), lows[0].rank, cols, 1.0, &mut lows[0].low),
        (_, None) => {
            // One product for all, so that the input is gone through once.
            let (all, ranks) = joined(tape, &lows, cols);
            let mut together = pool.zeros(n, ranks);
            cpu.floats_matmul(x, n, &all, ranks, cols, 1.0, &mut together);
            let mut first = 0;
            for low in &mut lows {
                for (to, from) in low.low.chunks_exact_mut(low.rank).zip(together.chunks_exact(ranks)) {
                    to.copy_from_slice(&from[first..first + low.rank]);
                }
                first += low.rank;
            }
        }
    }
    for ((lora, _), y) in layers.iter().zip(ys) {
        let Some(lora) = lora else { continue };
        if let Some(low) = lows.iter().find(|low| low.a == lora.a) {
            let outputs = y.width();
            cpu.floats_matmul(&low.low, n, tape.param(lora.b), outputs, lora.rank, lora.scale, y);
        }
    }
    lows
}

/// Zeros for what each `A` gives; layers may share theirs.
fn narrow(tape: &Tape<'_>, n: usize, layers: &[(Option<Lora>, usize)]) -> Vec<Low> {
    let mut lows: Vec<Low> = Vec::new();
    for (lora, id) in layers.iter().filter_map(|(lora, id)| lora.map(|lora| (lora, *id))) {
        if !lows.iter().any(|low| low.a == lora.a) {
            lows.push(Low { a: lora.a, rank: lora.rank, id, low: tape.pool.zeros(n, lora.rank) });
        }
    }
    lows
}

/// Whether the adapters on these frozen weights can be part of the products with them.
pub(super) fn goes_along(tape: &Tape<'_>, layers: &[(Option<Lora>, usize)], weights: &[&Weight]) -> bool {
    let all = weights.iter().all(|w| w.order().is_none() && tape.cpu.takes_adapters_along(&w.matrix()));
    all && layers.iter().any(|(lora, _)| lora.is_some()) && dropout(tape).is_none()
}

/// The products with weights and adapters together. Each layer comes with its number.
pub(super) fn forward_along(
    tape: &Tape<'_>,
    x: &Buffer,
    layers: &[(Option<Lora>, usize)],
    weights: &[&Weight],
    ys: &mut [Buffer],
) -> Vec<Low> {
    let mut lows = narrow(tape, x.rows(), layers);
    let up = |lora: Lora| {
        let down = lows.iter().position(|low| low.a == lora.a)?;
        Some(Up { b: tape.param(lora.b), rank: lora.rank, scale: lora.scale, down })
    };
    let ups: Vec<_> = layers.iter().map(|(lora, _)| lora.and_then(up)).collect();
    let downs = lows.iter_mut().map(|low| Down { a: tape.param(low.a), rank: low.rank, low: &mut low.low });
    let weights: Vec<Matrix<'_>> = weights.iter().map(|w| w.matrix()).collect();
    let mut ys: Vec<&mut [f32]> = ys.iter_mut().map(|y| &mut **y).collect();
    tape.cpu.matmul_adapted(x, x.rows(), &weights, &ups, &mut downs.collect::<Vec<_>>(), &mut ys);
    lows
}

/// The way back through [`forward_along`]: adds to the gradients of each `B`, and to `dx` where it is wanted. Gives the
/// gradients where each `A` ends.
pub(super) fn backward_along(
    tape: &mut Tape<'_>,
    layers: &[(&Weight, Option<Lora>, &Buffer)],
    lows: &[Low],
    n: usize,
    mut dx: Option<&mut Buffer>,
) -> Result<Vec<Low>> {
    let cpu = tape.cpu;
    let mut dlows: Vec<Low> = lows.iter().map(|low| Low { low: tape.pool.zeros(n, low.rank), ..*low }).collect();
    for (weight, lora, dy) in layers {
        let (w, dx) = (weight.matrix(), dx.as_mut().map(|dx| &mut dx[..]));
        let place = lora.and_then(|lora| Some((lora, lows.iter().position(|low| low.a == lora.a)?)));
        let Some((lora, i)) = place else {
            dx.into_iter().for_each(|dx| cpu.matmul_backward(&[dy], n, &[w], dx));
            continue;
        };
        let adapter = Back {
            a: tape.param(lora.a),
            b: tape.param(lora.b),
            rank: lora.rank,
            scale: lora.scale,
            low: &lows[i].low,
            dlow: &mut dlows[i].low,
            db: tape.gradient(lora.b)?,
        };
        cpu.matmul_backward_adapted(dy, n, &w, adapter, dx);
    }
    Ok(dlows)
}

/// What dropout leaves out of 1 and the seed of its masks, where there is any.
fn dropout(tape: &Tape<'_>) -> Option<(f32, u64)> {
    tape.noise.map(|seed| (tape.sites.dropout, seed)).filter(|(rate, _)| *rate > 0.0)
}

/// The `A`s one behind the other, and how many rows that makes.
fn joined(tape: &Tape<'_>, lows: &[Low], cols: usize) -> (Buffer, usize) {
    let ranks = lows.iter().map(|low| low.rank).sum();
    let mut all = tape.pool.take(ranks, cols);
    let mut at = 0;
    for low in lows {
        all[at..at + low.rank * cols].copy_from_slice(tape.param(low.a));
        at += low.rank * cols;
    }
    (all, ranks)
}

/// What `A`s give, as one matrix `[n, ranks]`.
fn side_by_side(tape: &Tape<'_>, lows: &[Low], ranks: usize) -> Buffer {
    let mut together = tape.pool.take(lows.first().map_or(0, |low| low.low.rows()), ranks);
    let mut first = 0;
    for low in lows {
        for (to, from) in together.chunks_exact_mut(ranks).zip(low.low.chunks_exact(low.rank)) {
            to[first..first + low.rank].copy_from_slice(from);
        }
        first += low.rank;
    }
    together
}

/// Adds to the gradient of each `A` its rows of `da`.
fn share(tape: &mut Tape<'_>, da: &[f32], lows: &[Low], cols: usize) -> Result<()> {
    let (cpu, mut at) = (tape.cpu, 0);
    for low in lows {
        cpu.add(tape.gradient(low.a)?, &da[at..at + low.rank * cols]);
        at += low.rank * cols;
    }
    Ok(())
}

/// Adds to the gradients of each `A` of [`backward_along`], which gave `dlows`: `x` has `n` rows of `cols`.
pub(super) fn inputs_gradient(tape: &mut Tape<'_>, x: Waiting<'_>, [n, cols]: [usize; 2], dlows: &[Low]) -> Result<()> {
    let cpu = tape.cpu;
    if let [low] = dlows {
        cpu.adapter_gradient(&low.low, x, n, low.rank, cols, tape.gradient(low.a)?);
        return Ok(());
    }
    let ranks = dlows.iter().map(|low| low.rank).sum();
    let together = side_by_side(tape, dlows, ranks);
    let mut da = tape.pool.zeros(ranks, cols);
    cpu.adapter_gradient(&together, x, n, ranks, cols, &mut da);
    share(tape, &da, dlows, cols)
}

/// Adds to the gradients of the adapters, and to `dx` where it is wanted.
pub(super) fn backward(
    tape: &mut Tape<'_>,
    x: &Buffer,
    layers: &[(Option<Lora>, &Option<Rc<Buffer>>)],
    lows: &[Low],
    dx: Option<&mut Buffer>,
) -> Result<()> {
    let (cpu, pool, n, cols) = (tape.cpu, tape.pool, x.rows(), x.width());
    let mut dlows = Vec::with_capacity(lows.len());
    for low in lows {
        let mut dlow = Low { low: pool.zeros(n, low.rank), ..*low };
        for (lora, dy) in layers {
            let (Some(lora), Some(dy)) = (lora.filter(|lora| lora.a == low.a), dy) else { continue };
            let outputs = dy.width();
            cpu.weight_gradient(dy, &low.low, n, outputs, low.rank, lora.scale, tape.gradient(lora.b)?);
            cpu.floats_backward(dy, n, tape.param(lora.b), outputs, low.rank, lora.scale, &mut dlow.low);
        }
        dlows.push(dlow);
    }
    match (lows, dropout(tape)) {
        ([], _) => {}
        (_, Some((rate, seed))) => {
            let mut dx = dx;
            for (low, dlow) in lows.iter().zip(&dlows) {
                let mut dropped = x.copy();
                noise::drop(cpu, &mut dropped, cols, rate, seed, low.id);
                cpu.weight_gradient(&dlow.low, &dropped, n, low.rank, cols, 1.0, tape.gradient(low.a)?);
                if let Some(dx) = &mut dx {
                    dropped.fill(0.0);
                    cpu.floats_backward(&dlow.low, n, tape.param(low.a), low.rank, cols, 1.0, &mut dropped);
                    noise::drop(cpu, &mut dropped, cols, rate, seed, low.id);
                    cpu.add(dx, &dropped);
                }
            }
        }
        ([low], None) => {
            cpu.weight_gradient(&dlows[0].low, x, n, low.rank, cols, 1.0, tape.gradient(low.a)?);
            if let Some(dx) = dx {
                cpu.floats_backward(&dlows[0].low, n, tape.param(low.a), low.rank, cols, 1.0, dx);
            }
        }
        (_, None) => {
            let (all, ranks) = joined(tape, lows, cols);
            let together = side_by_side(tape, &dlows, ranks);
            let mut da = pool.zeros(ranks, cols);
            cpu.weight_gradient(&together, x, n, ranks, cols, 1.0, &mut da);
            share(tape, &da, &dlows, cols)?;
            if let Some(dx) = dx {
                cpu.floats_backward(&together, n, &all, ranks, cols, 1.0, dx);
            }
        }
    }
    Ok(())
}

/// DoRA's `y = gain * plain` backward, the norm in `gain` taken for a constant: adds to the magnitude's gradient and
/// turns that of `y` into that of `plain`.
pub(super) fn gain_backward(tape: &mut Tape<'_>, lora: &Lora, plain: &Buffer, mut dy: Buffer) -> Result<Buffer> {
    let (Some(magnitude), Some(dora)) = (lora.magnitude, lora.dora) else { return Ok(dy) };
    let gains = tape.gains;
    let Gain { gain, inverse } = &gains[dora];
    let gradient = tape.gradient(magnitude)?;
    for (dy, plain) in dy.chunks_exact_mut(gain.len()).zip(plain.chunks_exact(gain.len())) {
        for o in 0..gain.len() {
            gradient[o] += dy[o] * plain[o] * inverse[o];
            dy[o] *= gain[o];
        }
    }
    Ok(dy)
}
