//! Q2_K .. Q6_K, IQ4_XS and IQ4_NL: a scale (and minimum) for each group by search, then the small integers that stand
//! for them together with the block's own scales, so that the weighted square error of the block is least.

use super::float::finite_f16;
use super::pack::put;
use super::search::{self, Grid, Integers, Iq4, LANES, clamp, nearest};
use crate::formats::{Format, f16_to_f32};
use crate::kernels::lanes;

/// Weights in a block.
const BLOCK: usize = 256;
/// A block in which no weight is larger is stored as zeros: no format has a scale for so little.
const LEAST: f32 = 1e-8;
/// Weights beyond this are cut to it: more than any format can hold, and small enough for sums of squares.
const MOST: f32 = 3e8;

/// Encodes one row.
#[inline(always)]
pub(super) fn encode(format: Format, row: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    for (b, (x, block)) in row.as_chunks::<BLOCK>().0.iter().zip(out.chunks_exact_mut(format.block_bytes())).enumerate()
    {
        let importance = importance.map(|all| &all[BLOCK * b..][..BLOCK]);
        match format {
            Format::Q2_K => with_minimums::<16, 16>(format, 3, 15, x, importance, block),
            Format::Q4_K => with_minimums::<32, 8>(format, 15, 63, x, importance, block),
            Format::Q5_K => with_minimums::<32, 8>(format, 31, 63, x, importance, block),
            Format::Q3_K => symmetric::<Integers<-4, 3>, 16, 16>(format, -32, 31, x, importance, block),
            Format::Q6_K => symmetric::<Integers<-32, 31>, 16, 16>(format, -128, 127, x, importance, block),
            _ => symmetric::<Iq4, 32, 8>(format, -32, 31, x, importance, block),
        }
    }
}

/// Encodes one row of IQ4_NL.
#[inline(always)]
pub(super) fn encode_iq4_nl(row: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    for (b, (x, block)) in row.as_chunks::<32>().0.iter().zip(out.chunks_exact_mut(18)).enumerate() {
        block.fill(0);
        let Some(x) = bounded(x) else {
            put(Format::IQ4_NL, block, 0, &[0; 32]);
            continue;
        };
        let w = error_weights::<32, 32>(Format::IQ4_NL, &x, importance.map(|all| &all[32 * b..][..32]));
        let d = finite_f16(search::scale::<Iq4, 32>(&x, &w));
        block[..2].copy_from_slice(&d.to_le_bytes());
        let inverse = reciprocal(f16_to_f32(d));
        let mut codes = [0; 32];
        for i in 0..32 {
            codes[i] = Iq4::round(x[i] * inverse) as i8;
        }
        put(Format::IQ4_NL, block, 0, &codes);
    }
}

/// The weights within what the searches can work with; `None` where they are all as good as zero.
#[inline(always)]
fn bounded<const N: usize>(x: &[f32; N]) -> Option<[f32; N]> {
    let mut bounded = [0.0; N];
    for i in 0..N {
        bounded[i] = clamp(x[i], -MOST, MOST);
    }
    (search::size(&bounded) >= LEAST).then_some(bounded)
}

/// How much the square error of each weight of a block counts, 1 in the mean. The forms are those of ggml-quants.c.
#[inline(always)]
fn error_weights<const N: usize, const GROUP: usize>(
    format: Format,
    x: &[f32; N],
    importance: Option<&[f32]>,
) -> [f32; N] {
    let mut w = [0.0; N];
    let mean = lanes::sum_squares(x) / N as f32;
    match (importance, format) {
        (Some(importance), Format::Q6_K) => w.copy_from_slice(importance),
        (Some(importance), _) => {
            let mean = if format == Format::Q2_K { mean } else { 2.0 * mean };
            for i in 0..N {
                w[i] = importance[i] * (mean + x[i] * x[i]).sqrt();
            }
        }
        (None, Format::Q2_K | Format::Q4_K | Format::Q5_K) => {
            for (w, x) in w.chunks_exact_mut(GROUP).zip(x.chunks_exact(GROUP)) {
                let root = (lanes::sum_squares(x) / GROUP as f32).sqrt();
                for i in 0..GROUP {
                    w[i] = root + x[i].abs();
                }
            }
        }
        (None, _) => {
            for i in 0..N {
                w[i] = mean + x[i] * x[i];
            }
        }
    }
    let sum = lanes::sum(&w);
    // A little for each, so that a group that nothing depends on is still encoded as what it is.
    let factor = if sum > 0.0 && sum < f32::INFINITY { N as f32 / sum } else { 0.0 };
    for v in &mut w {
        *v = *v * factor + 1e-6;
    }
    w
}

#[inline(always)]
fn reciprocal(x: f32) -> f32 {
    if x != 0.0 { 1.0 / x } else { 0.0 }
}

/// Q2_K, Q4_K and Q5_K.
#[inline(always)]
fn with_minimums<const N: usize, const GROUPS: usize>(
    format: Format,
    levels: u8,
    steps: u8,
    x: &[f32; BLOCK],
    importance: Option<&[f32]>,
    block: &mut [u8],
) {
    block.fill(0);
    let Some(x) = bounded(x) else { return };
    let w = error_weights::<BLOCK, N>(format, &x, importance);
    let (groups, weights) = (x.as_chunks::<N>().0, w.as_chunks::<N>().0);
    let (levels, steps) = (f32::from(levels), f32::from(steps));

    let mut ideal = [(0f32, 0f32); GROUPS];
    let (mut most, mut most_min) = (0f32, 0f32);
    for j in 0..GROUPS {
        ideal[j] = search::scale_min(levels, &groups[j], &weights[j]);
        most = most.max(ideal[j].0);
        most_min = most_min.max(ideal[j].1);
    }
    let mut d = [finite_f16(most / steps), finite_f16(most_min / steps)];
    let mut best = f32::INFINITY;
    for _ in 0..3 {
        let (scale, min) = (f16_to_f32(d[0]), f16_to_f32(d[1]));
        let mut small = [(0u8, 0u8); GROUPS];
        let mut codes = [0i8; BLOCK];
        let mut error = 0.0;
        // The sums of the equations for the scale and minimum of the block that fit these codes best.
        let (mut qq, mut qm, mut mm, mut xq, mut xm) = (0f32, 0f32, 0f32, 0f32, 0f32);
        for j in 0..GROUPS {
            let (x, w) = (&groups[j], &weights[j]);
            let (s, m, e) = step_pair(levels, steps, [scale, min], ideal[j], x, w);
            small[j] = (s as u8, m as u8);
            error += e;
            let (inverse, offset) = (reciprocal(scale * s), min * m);
            let mut q = [0f32; N];
            let mut wq = [0f32; N];
            for i in 0..N {
                q[i] = nearest(clamp((x[i] + offset) * inverse, 0.0, levels));
                codes[N * j + i] = q[i] as i8;
                wq[i] = w[i] * q[i];
            }
            qq += s * s * lanes::dot(&wq, &q);
            qm += s * m * lanes::sum(&wq);
            mm += m * m * lanes::sum(w);
            xq += s * lanes::dot(&wq, x);
            xm += m * lanes::dot(w, x);
        }
        if error >= best {
            break;
        }
        best = error;
        store(format, block, d, &small);
        for g in 0..8 {
            put(format, block, g, &codes.as_chunks::<32>().0[g]);
        }
        let determinant = qq * mm - qm * qm;
        let fit = if determinant > 1e-6 * qq * mm {
            [(xq * mm - xm * qm) / determinant, (xq * qm - xm * qq) / determinant]
        } else {
            [xq / qq, min]
        };
        if !(fit[0] > 0.0 && fit[1] >= 0.0) {
            break;
        }
        d = fit.map(finite_f16);
    }
}

/// What is added to a group's first guesses at the integers for its scale and its minimum, and how many scales to the
/// minimum: with it moved by a whole scale all codes move by one, which is as good where they do not use every level.
const NEAR: [[f32; LANES]; 3] = [
    [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 1.0, -1.0, 0.0, 1.0, -1.0, 0.0, 1.0, -1.0, 2.0, -2.0, 0.0, 0.0, 1.0, 1.0, -1.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 1.0, -1.0, 1.0, -1.0],
];

/// The integers that stand for the scale and minimum of a group, near the ideal ones, that give the least error; and
/// that error.
#[inline(always)]
fn step_pair<const N: usize>(
    levels: f32,
    steps: f32,
    d: [f32; 2],
    ideal: (f32, f32),
    x: &[f32; N],
    w: &[f32; N],
) -> (f32, f32, f32) {
    let s = clamp(nearest(ideal.0 * reciprocal(d[0])), 0.0, steps);
    let m = clamp(nearest(ideal.1 * reciprocal(d[1])), 0.0, steps);
    let level = nearest(clamp(d[0] * s * reciprocal(d[1]), 0.0, steps));
    let mut steps_s = [0f32; LANES];
    let mut steps_m = [0f32; LANES];
    let mut scale = [0f32; LANES];
    let mut inverse = [0f32; LANES];
    let mut min = [0f32; LANES];
    for k in 0..LANES {
        steps_s[k] = clamp(s + NEAR[0][k], 0.0, steps);
        steps_m[k] = clamp(m + NEAR[1][k] + NEAR[2][k] * level, 0.0, steps);
        scale[k] = d[0] * steps_s[k];
        inverse[k] = reciprocal(scale[k]);
        min[k] = d[1] * steps_m[k];
    }
    let mut errors = [0f32; LANES];
    for i in 0..N {
        for k in 0..LANES {
            let q = nearest(clamp((x[i] + min[k]) * inverse[k], 0.0, levels));
            let error = scale[k] * q - min[k] - x[i];
            errors[k] += w[i] * error * error;
        }
    }
    let best = search::least(&errors);
    (steps_s[best], steps_m[best], errors[best])
}

/// Writes the scales of a block with minimums.
#[inline(always)]
pub(super) fn store(format: Format, block: &mut [u8], d: [u16; 2], small: &[(u8, u8)]) {
    if format == Format::Q2_K {
        for (out, (s, m)) in block.iter_mut().zip(small) {
            *out = s | m << 4;
        }
        block[80..82].copy_from_slice(&d[0].to_le_bytes());
        block[82..84].copy_from_slice(&d[1].to_le_bytes());
        return;
    }
    block[..2].copy_from_slice(&d[0].to_le_bytes());
    block[2..4].copy_from_slice(&d[1].to_le_bytes());
    for j in 0..4 {
        let ((s, m), (s4, m4)) = (small[j], small[j + 4]);
        block[4 + j] = s | s4 >> 4 << 6;
        block[8 + j] = m | m4 >> 4 << 6;
        block[12 + j] = s4 & 15 | m4 << 4;
    }
}

/// Q3_K, Q6_K and IQ4_XS.
#[inline(always)]
fn symmetric<G: Grid, const N: usize, const GROUPS: usize>(
    format: Format,
    low: i8,
    high: i8,
    x: &[f32; BLOCK],
    importance: Option<&[f32]>,
    block: &mut [u8],
) {
    block.fill(0);
    let Some(x) = bounded(x) else {
        for g in 0..8 {
            put(format, block, g, &[0; 32]);
        }
        return;
    };
    let w = error_weights::<BLOCK, N>(format, &x, importance);
    let (groups, weights) = (x.as_chunks::<N>().0, w.as_chunks::<N>().0);
    let (low, high) = (f32::from(low), f32::from(high));

    let mut ideal = [0f32; GROUPS];
    let mut most = 0f32;
    for j in 0..GROUPS {
        ideal[j] = search::scale::<G, N>(&groups[j], &weights[j]);
        if ideal[j].abs() > most.abs() {
            most = ideal[j];
        }
    }
    let mut d = finite_f16(most / low);
    let mut best = f32::INFINITY;
    for _ in 0..3 {
        let scale = f16_to_f32(d);
        let mut small = [0i8; GROUPS];
        let mut codes = [0i8; BLOCK];
        let mut error = 0.0;
        let (mut qq, mut xq) = (0f32, 0f32);
        for j in 0..GROUPS {
            let (x, w) = (&groups[j], &weights[j]);
            let (s, e) = step::<G, N>(low, high, scale, ideal[j], x, w);
            small[j] = s as i8;
            error += e;
            let inverse = reciprocal(scale * s);
            let mut q = [0f32; N];
            let mut wq = [0f32; N];
            for i in 0..N {
                q[i] = G::round(x[i] * inverse);
                codes[N * j + i] = q[i] as i8;
                wq[i] = w[i] * q[i];
            }
            qq += s * s * lanes::dot(&wq, &q);
            xq += s * lanes::dot(&wq, x);
        }
        if error >= best {
            break;
        }
        best = error;
        store_scales(format, block, d, &small);
        for g in 0..8 {
            put(format, block, g, &codes.as_chunks::<32>().0[g]);
        }
        let fit = xq * reciprocal(qq);
        if fit == 0.0 {
            break;
        }
        d = finite_f16(fit);
    }
}

/// The integer that stands for the scale of a group, near the ideal one, that gives the least error; and that error.
#[inline(always)]
fn step<G: Grid, const N: usize>(low: f32, high: f32, d: f32, ideal: f32, x: &[f32; N], w: &[f32; N]) -> (f32, f32) {
    let middle = nearest(clamp(ideal * reciprocal(d), low, high));
    let mut steps = [0f32; LANES];
    let mut scale = [0f32; LANES];
    let mut inverse = [0f32; LANES];
    for k in 0..LANES {
        steps[k] = clamp(middle + ((k + 8) % 16) as f32 - 8.0, low, high);
        scale[k] = d * steps[k];
        inverse[k] = reciprocal(scale[k]);
    }
    let mut errors = [0f32; LANES];
    for i in 0..N {
        for k in 0..LANES {
            let q = G::round(x[i] * inverse[k]);
            let error = scale[k] * q - x[i];
            errors[k] += w[i] * error * error;
        }
    }
    let best = search::least(&errors);
    (steps[best], errors[best])
}

/// Writes the scales of a block without minimums.
#[inline(always)]
pub(super) fn store_scales(format: Format, block: &mut [u8], d: u16, small: &[i8]) {
    let d = d.to_le_bytes();
    match format {
        Format::Q6_K => {
            for j in 0..16 {
                block[192 + j] = small[j] as u8;
            }
            block[208..].copy_from_slice(&d);
        }
        Format::Q3_K => {
            block[96..108].fill(0);
            for j in 0..16 {
                let s = (small[j] + 32) as u8;
                block[96 + j % 8] |= (s & 15) << (4 * (j / 8));
                block[104 + j % 4] |= s >> 4 << (2 * (j / 4));
            }
            block[108..].copy_from_slice(&d);
        }
        _ => {
            block[..8].fill(0);
            block[..2].copy_from_slice(&d);
            let mut high = 0u16;
            for j in 0..8 {
                let s = (small[j] + 32) as u8;
                block[4 + j / 2] |= (s & 15) << (4 * (j % 2));
                high |= u16::from(s >> 4) << (2 * j);
            }
            block[2..4].copy_from_slice(&high.to_le_bytes());
        }
    }
}
