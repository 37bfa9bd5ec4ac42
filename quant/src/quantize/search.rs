//! Searches for the scale, and perhaps the minimum, of a group of weights.
//!
//! The searches run over candidates in lanes: all lanes take the weights in the same order, so that their sums are the
//! same on every instruction set, and those of a single candidate at a time.

use crate::formats::IQ4_TABLE;
use crate::kernels::lanes;

/// Candidates that are tried at once.
pub(super) const LANES: usize = 16;

/// A group whose weights are all smaller than this is one of zeros.
pub(super) const NOTHING: f32 = 1e-15;

/// The nearest integer, ties to even, of a number below 2^22 in size.
#[inline(always)]
pub(super) fn nearest(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves no bits for a fraction.
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC) - MAGIC
}

/// `x` between `low` and `high`; `low` for NaN.
#[inline(always)]
pub(super) fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > low { x } else { low };
    if x < high { x } else { high }
}

/// The largest size of the weights.
#[inline(always)]
pub(super) fn size<const N: usize>(x: &[f32; N]) -> f32 {
    // As integers, which are in the same order and which compilers take in any.
    let mut size = 0;
    for v in x {
        size = size.max(v.to_bits() & 0x7fff_ffff);
    }
    f32::from_bits(size)
}

/// The first of the weights that are largest by size; 0, not -0, where all are zeros.
#[inline(always)]
pub(super) fn largest<const N: usize>(x: &[f32; N]) -> f32 {
    let size = size(x);
    let mut first = N as u32;
    for i in 0..N {
        first = first.min(if x[i].abs() == size { i as u32 } else { N as u32 });
    }
    if size > 0.0 && (first as usize) < N { x[first as usize] } else { 0.0 }
}

/// The least and the largest weight.
#[inline(always)]
pub(super) fn bounds<const N: usize>(x: &[f32; N]) -> (f32, f32) {
    let (mut low, mut high) = ([x[0]; LANES], [x[0]; LANES]);
    for x in x.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            low[i] = if x[i] < low[i] { x[i] } else { low[i] };
            high[i] = if x[i] > high[i] { x[i] } else { high[i] };
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            low[i] = if low[i + width] < low[i] { low[i + width] } else { low[i] };
            high[i] = if high[i + width] > high[i] { high[i + width] } else { high[i] };
        }
        width /= 2;
    }
    (low[0], high[0])
}

/// [`bounds`], each the first of its kind, which tells 0 from -0.
#[inline(always)]
pub(super) fn first_bounds<const N: usize>(x: &[f32; N]) -> (f32, f32) {
    let mut bounds = bounds(x);
    for bound in [&mut bounds.0, &mut bounds.1] {
        if *bound == 0.0
            && let Some(zero) = x.iter().find(|v| **v == 0.0)
        {
            *bound = *zero;
        }
    }
    bounds
}

/// The first lane with the least value; values are not negative, and NaN is more than any.
#[inline(always)]
pub(super) fn least(values: &[f32; LANES]) -> usize {
    let mut least = u32::MAX;
    for v in values {
        least = least.min(v.to_bits());
    }
    let mut first = LANES as u32 - 1;
    for k in 0..LANES {
        first = first.min(if values[k].to_bits() == least { k as u32 } else { u32::MAX });
    }
    first as usize
}

/// The first lane with the greatest value; values are not negative.
#[inline(always)]
pub(super) fn greatest(values: &[f32; LANES]) -> usize {
    let mut most = 0;
    for v in values {
        most = most.max(v.to_bits());
    }
    let mut first = LANES as u32 - 1;
    for k in 0..LANES {
        first = first.min(if values[k].to_bits() == most { k as u32 } else { u32::MAX });
    }
    first as usize
}

/// How much the error of each weight counts: its column's importance, more for larger weights.
#[inline(always)]
pub(super) fn weights<const N: usize>(importance: &[f32], x: &[f32; N], mean_square: f32) -> [f32; N] {
    let mut weights = [0.0; N];
    for i in 0..N {
        weights[i] = importance[i] * (mean_square + x[i] * x[i]).sqrt();
    }
    weights
}

/// The scale, and codes in `-half..half`, that llama.cpp finds among 19 (ggml-quants.c, `make_qx_quants`).
#[inline(always)]
pub(super) fn llama_scale(half: i32, x: &[f32; 32], w: &[f32; 32]) -> (f32, [i8; 32]) {
    let largest = largest(x);
    if largest.abs() < NOTHING {
        return (0.0, [-half as i8; 32]);
    }
    let half = half as f32;
    let mut inverses = [-half / largest; 2 * LANES];
    for (k, step) in (-9..=9).filter(|&s| s != 0).enumerate() {
        inverses[k + 1] = -(half + 0.1 * step as f32) / largest;
    }
    let mut products = [0f32; 2 * LANES];
    let mut squares = [0f32; 2 * LANES];
    for i in 0..32 {
        for k in 0..2 * LANES {
            let q = clamp(nearest(inverses[k] * x[i]), -half, half - 1.0);
            products[k] += w[i] * x[i] * q;
            squares[k] += w[i] * q * q;
        }
    }
    let mut scale = if squares[0] != 0.0 { products[0] / squares[0] } else { 0.0 };
    let mut best = scale * products[0];
    let mut inverse = inverses[0];
    for k in 1..19 {
        if squares[k] > 0.0 && products[k] * products[k] > best * squares[k] {
            scale = products[k] / squares[k];
            best = scale * products[k];
            inverse = inverses[k];
        }
    }
    let mut codes = [0; 32];
    for i in 0..32 {
        codes[i] = clamp(nearest(inverse * x[i]), -half, half - 1.0) as i8;
    }
    (scale, codes)
}

/// The scale, minimum (as it is added) and codes in `0..=levels` that llama.cpp finds in 37 steps, each of which starts
/// from the best minimum so far (ggml-quants.c, `make_qkx3_quants`).
#[inline(always)]
pub(super) fn llama_scale_min(levels: i32, x: &[f32; 32], w: &[f32; 32]) -> (f32, f32, [i8; 32]) {
    let levels = levels as f32;
    let (mut min, max) = first_bounds(x);
    let (mut sum_w, mut sum_x) = (0.0, 0.0);
    for i in 0..32 {
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    if min > 0.0 {
        min = 0.0;
    }
    if max <= min {
        return (0.0, min, [0; 32]);
    }
    let mut inverse = levels / (max - min);
    let mut scale = 1.0 / inverse;
    let mut codes = [0f32; 32];
    let mut best = 0.0;
    for i in 0..32 {
        // Beyond 2^22 only where the inverse is infinite, and then llama.cpp's rounding gives 0.
        let level = inverse * (x[i] - min);
        codes[i] = if level < 4_194_304.0 { clamp(nearest(level), 0.0, levels) } else { 0.0 };
        let error = scale * codes[i] + min - x[i];
        best += w[i] * (error * error);
    }
    for step in 0..=36 {
        inverse = (-0.9 + 0.05 * step as f32 + levels) / (max - min);
        let mut q = [0f32; 32];
        let (mut sum_q, mut sum_qq, mut sum_qx) = (0.0, 0.0, 0.0);
        for i in 0..32 {
            q[i] = nearest(clamp(inverse * (x[i] - min), 0.0, levels));
            sum_q += w[i] * q[i];
            sum_qq += w[i] * q[i] * q[i];
            sum_qx += w[i] * q[i] * x[i];
        }
        let determinant = sum_w * sum_qq - sum_q * sum_q;
        if determinant > 0.0 {
            let mut try_scale = (sum_w * sum_qx - sum_x * sum_q) / determinant;
            let mut try_min = (sum_qq * sum_x - sum_q * sum_qx) / determinant;
            if try_min > 0.0 {
                try_min = 0.0;
                try_scale = sum_qx / sum_qq;
            }
            let mut error = 0.0;
            for i in 0..32 {
                let e = try_scale * q[i] + try_min - x[i];
                error += w[i] * (e * e);
            }
            if error < best {
                (best, scale, min, codes) = (error, try_scale, try_min, q);
            }
        }
    }
    (scale, min, codes.map(|q| q as i8))
}

/// What a format can hold of `weight / scale`.
pub(super) trait Grid {
    /// The least and the greatest level.
    const ENDS: (f32, f32);
    /// The level nearest to `x`.
    fn round(x: f32) -> f32;
}

/// The integers from `LOW` to `HIGH`.
pub(super) struct Integers<const LOW: i8, const HIGH: i8>;

impl<const LOW: i8, const HIGH: i8> Grid for Integers<LOW, HIGH> {
    const ENDS: (f32, f32) = (LOW as f32, HIGH as f32);

    #[inline(always)]
    fn round(x: f32) -> f32 {
        nearest(clamp(x, LOW as f32, HIGH as f32))
    }
}

/// The 16 values of IQ4_NL and IQ4_XS.
pub(super) struct Iq4;

impl Grid for Iq4 {
    const ENDS: (f32, f32) = (IQ4_TABLE[0] as f32, IQ4_TABLE[15] as f32);

    #[inline(always)]
    fn round(x: f32) -> f32 {
        let mut level = f32::from(IQ4_TABLE[0]);
        for i in 0..15 {
            let (low, high) = (f32::from(IQ4_TABLE[i]), f32::from(IQ4_TABLE[i + 1]));
            level += if x > 0.5 * (low + high) { high - low } else { 0.0 };
        }
        level
    }
}

/// The scale that loses least of a group, found among 16 first guesses by rounding and fitting in turns.
#[inline(always)]
pub(super) fn scale<G: Grid, const N: usize>(x: &[f32; N], w: &[f32; N]) -> f32 {
    let (low, high) = bounds(x);
    let largest = if high > -low { high } else { low };
    if largest.abs() < NOTHING {
        return 0.0;
    }
    // Half of the guesses put the largest weight near one end of the levels, and half near the other.
    let mut inverse = [0f32; LANES];
    for k in 0..LANES / 2 {
        let shrink = 1.06 - 0.045 * k as f32;
        inverse[k] = G::ENDS.0 * shrink / largest;
        inverse[k + LANES / 2] = G::ENDS.1 * shrink / largest;
    }
    let mut products = [0f32; LANES];
    let mut squares = [0f32; LANES];
    for _ in 0..3 {
        (products, squares) = ([0f32; LANES], [0f32; LANES]);
        for i in 0..N {
            let wx = w[i] * x[i];
            for k in 0..LANES {
                let q = G::round(inverse[k] * x[i]);
                products[k] += wx * q;
                squares[k] += w[i] * q * q;
            }
        }
        for k in 0..LANES {
            inverse[k] = if products[k] != 0.0 { squares[k] / products[k] } else { 0.0 };
        }
    }
    let mut gain = [0f32; LANES];
    for k in 0..LANES {
        // The square of the weights that this lane explains; the one that explains most has the least error.
        gain[k] = if squares[k] > 0.0 { products[k] * products[k] / squares[k] } else { 0.0 };
    }
    let best = greatest(&gain);
    if gain[best] > 0.0 { products[best] / squares[best] } else { largest / G::ENDS.0 }
}

/// The scale and minimum (as it is taken off, not below 0) that lose least of a group whose codes are `0..=levels`.
#[inline(always)]
pub(super) fn scale_min<const N: usize>(levels: f32, x: &[f32; N], w: &[f32; N]) -> (f32, f32) {
    let (low, high) = bounds(x);
    let low = if low > 0.0 { 0.0 } else { low };
    if high <= low {
        return (0.0, -low);
    }
    let (sum_w, sum_x) = (lanes::sum(w), lanes::dot(w, x));
    let mut inverse = [0f32; LANES];
    let mut offset = [0f32; LANES];
    for k in 0..LANES {
        inverse[k] = (levels - 0.9 + 0.12 * k as f32) / (high - low);
        offset[k] = -low * inverse[k];
    }
    let mut scale = [0f32; LANES];
    let mut min = [0f32; LANES];
    let mut gain = [0f32; LANES];
    for _ in 0..3 {
        let mut sum_q = [0f32; LANES];
        let mut sum_qq = [0f32; LANES];
        let mut sum_qx = [0f32; LANES];
        for i in 0..N {
            for k in 0..LANES {
                let q = nearest(clamp(inverse[k] * x[i] + offset[k], 0.0, levels));
                let wq = w[i] * q;
                sum_q[k] += wq;
                sum_qq[k] += wq * q;
                sum_qx[k] += wq * x[i];
            }
        }
        for k in 0..LANES {
            let determinant = sum_w * sum_qq[k] - sum_q[k] * sum_q[k];
            let s = (sum_w * sum_qx[k] - sum_x * sum_q[k]) / determinant;
            let m = (sum_qq[k] * sum_x - sum_q[k] * sum_qx[k]) / determinant;
            // Minimums above 0 cannot be stored: then the best line goes through 0.
            let (s, m) = if m > 0.0 { (sum_qx[k] / sum_qq[k], 0.0) } else { (s, m) };
            let good = determinant > 0.0 && s > 0.0;
            // Where not every level is used, all codes moved by one are as good but for rounding: a little for the
            // smaller minimum, which keeps weights that lie on a grid already on the same grid.
            let explained = (s * sum_qx[k] + m * sum_x) * (1.0 + 4e-6 * m / (high - low));
            gain[k] = if good && explained > 0.0 { explained } else { 0.0 };
            scale[k] = if good { s } else { scale[k] };
            min[k] = if good { m } else { min[k] };
            inverse[k] = if good { 1.0 / s } else { inverse[k] };
            offset[k] = if good { -m / s } else { offset[k] };
        }
    }
    let best = greatest(&gain);
    if gain[best] > 0.0 { (scale[best], -min[best]) } else { ((high - low) / levels, -low) }
}
