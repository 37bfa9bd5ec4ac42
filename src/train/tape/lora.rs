//! Low-rank adapters (Hu et al. 2021) and their kin: `y += scale * drop(x) A^T B^T`, with DoRA's gain on the whole
//! (Liu et al. 2024).

use super::noise;
use super::pool::Buffer;
use super::record::Tape;
use rushlight_models::Result;
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
    let mut lows: Vec<Low> = Vec::new();
    for (lora, id) in layers.iter().filter_map(|(lora, id)| lora.map(|lora| (lora, *id))) {
        if !lows.iter().any(|low| low.a == lora.a) {
            lows.push(Low { a: lora.a, rank: lora.rank, id, low: pool.zeros(n, lora.rank) });
        }
    }
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
        let mut dlow = pool.zeros(n, low.rank);
        for (lora, dy) in layers {
            let (Some(lora), Some(dy)) = (lora.filter(|lora| lora.a == low.a), dy) else { continue };
            let outputs = dy.width();
            cpu.weight_gradient(dy, &low.low, n, outputs, low.rank, lora.scale, tape.gradient(lora.b)?);
            cpu.floats_backward(dy, n, tape.param(lora.b), outputs, low.rank, lora.scale, &mut dlow);
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
                cpu.weight_gradient(dlow, &dropped, n, low.rank, cols, 1.0, tape.gradient(low.a)?);
                if let Some(dx) = &mut dx {
                    dropped.fill(0.0);
                    cpu.floats_backward(dlow, n, tape.param(low.a), low.rank, cols, 1.0, &mut dropped);
                    noise::drop(cpu, &mut dropped, cols, rate, seed, low.id);
                    cpu.add(dx, &dropped);
                }
            }
        }
        ([low], None) => {
            cpu.weight_gradient(&dlows[0], x, n, low.rank, cols, 1.0, tape.gradient(low.a)?);
            if let Some(dx) = dx {
                cpu.floats_backward(&dlows[0], n, tape.param(low.a), low.rank, cols, 1.0, dx);
            }
        }
        (_, None) => {
            let (all, ranks) = joined(tape, lows, cols);
            let mut together = pool.take(n, ranks);
            let mut first = 0;
            for (low, dlow) in lows.iter().zip(&dlows) {
                for (to, from) in together.chunks_exact_mut(ranks).zip(dlow.chunks_exact(low.rank)) {
                    to[first..first + low.rank].copy_from_slice(from);
                }
                first += low.rank;
            }
            let mut da = pool.zeros(ranks, cols);
            cpu.weight_gradient(&together, x, n, ranks, cols, 1.0, &mut da);
            let mut at = 0;
            for low in lows {
                cpu.add(tape.gradient(low.a)?, &da[at..at + low.rank * cols]);
                at += low.rank * cols;
            }
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
