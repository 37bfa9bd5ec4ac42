//! The searches for the scale, and perhaps the minimum, of a group of weights by which ggml's reference quantizers
//! choose them (`ggml-quants.c`). Perplexity answers to single codes as to the throw of a coin: only files with the
//! same codes are never worse.
//!
//! Several groups are searched side by side, each in a lane that goes through its weights in the reference's order.

use super::groups::{Lanes, clamp, nearest, sums};
use crate::formats::IQ4_TABLE;

/// A group whose weights are all smaller than this is one of zeros.
const NOTHING: f32 = 1e-15;

/// What a search found.
pub(super) struct Found<const N: usize, const L: usize> {
    /// Weights are about `scale * code + min`.
    pub scale: Lanes<L>,
    /// Not above 0; 0 for grids without a minimum.
    pub min: Lanes<L>,
    /// The codes that the search ended with.
    pub codes: [Lanes<L>; N],
}

impl<const N: usize, const L: usize> Found<N, L> {
    /// The scales, and how far the minimums lie below 0.
    #[inline(always)]
    pub fn size(&self) -> [Lanes<L>; 2] {
        [self.scale, self.min.map(|min| -min)]
    }
}

/// The first of the weights of each lane that are largest by size.
#[inline(always)]
fn largest<const N: usize, const L: usize>(x: &[Lanes<L>; N]) -> Lanes<L> {
    let mut largest = [0f32; L];
    for x in x {
        for k in 0..L {
            largest[k] = if x[k].abs() > largest[k].abs() { x[k] } else { largest[k] };
        }
    }
    largest
}

/// What a format can hold of `weight / scale`, and the scales that are tried for it.
pub(super) trait Grid {
    /// The least level, which the largest weight gets at first.
    const LOW: f32;
    /// Steps away from that on both sides.
    const STEPS: i32;
    /// Whether the inverse at step 0 is rounded otherwise than the first one, and so worth a try.
    const MIDDLE: bool;
    /// The level nearest to `x`.
    fn round(x: f32) -> f32;
    /// The inverse of the scale at which `largest` gets the least level.
    fn first(largest: f32) -> f32;
    /// The inverse of the scale that is `step` away from it.
    fn inverse(step: i32, largest: f32) -> f32;
    /// `w * x * q`, in the order in which the reference multiplies.
    fn product(w: f32, x: f32, q: f32) -> f32;
}

/// The integers from `LOW` to `HIGH` (`make_qx_quants`).
pub(super) struct Integers<const LOW: i8, const HIGH: i8>;

impl<const LOW: i8, const HIGH: i8> Grid for Integers<LOW, HIGH> {
    const LOW: f32 = LOW as f32;
    const STEPS: i32 = 9;
    const MIDDLE: bool = false;

    #[inline(always)]
    fn round(x: f32) -> f32 {
        nearest(clamp(x, LOW as f32, HIGH as f32))
    }

    #[inline(always)]
    fn first(largest: f32) -> f32 {
        Self::LOW / largest
    }

    #[inline(always)]
    fn inverse(step: i32, largest: f32) -> f32 {
        -(0.1 * step as f32 - Self::LOW) / largest
    }

    #[inline(always)]
    fn product(w: f32, x: f32, q: f32) -> f32 {
        w * x * q
    }
}

/// The 16 values of IQ4_NL and IQ4_XS (`quantize_row_iq4_nl_impl`).
pub(super) struct Iq4;

impl Grid for Iq4 {
    const LOW: f32 = IQ4_TABLE[0] as f32;
    const STEPS: i32 = 7;
    const MIDDLE: bool = true;

    /// The upper of two that are equally near.
    #[inline(always)]
    fn round(x: f32) -> f32 {
        let mut level = Self::LOW;
        for i in 0..15 {
            let (low, high) = (f32::from(IQ4_TABLE[i]), f32::from(IQ4_TABLE[i + 1]));
            level += if x >= 0.5 * (low + high) { high - low } else { 0.0 };
        }
        level
    }

    #[inline(always)]
    fn first(largest: f32) -> f32 {
        1.0 / (-largest / Self::LOW)
    }

    #[inline(always)]
    fn inverse(step: i32, largest: f32) -> f32 {
        (step as f32 + Self::LOW) / largest
    }

    #[inline(always)]
    fn product(w: f32, x: f32, q: f32) -> f32 {
        w * q * x
    }
}

/// The scale at which most of the weighted square of each group is explained, among those around the one that gives its
/// largest weight the least level.
#[inline(always)]
pub(super) fn scale<G: Grid, const N: usize, const L: usize>(x: &[Lanes<L>; N], w: &[Lanes<L>; N]) -> Found<N, L> {
    let largest = largest(x);
    let mut found = Found { scale: [0.0; L], min: [0.0; L], codes: [[G::LOW; L]; N] };
    let mut chosen = [0f32; L];
    let mut best = [0f32; L];
    for k in 0..L {
        chosen[k] = G::first(largest[k]);
    }
    let (products, squares) = explained::<G, N, L>(&chosen, x, w);
    for k in 0..L {
        found.scale[k] = if squares[k] > 0.0 { products[k] / squares[k] } else { 0.0 };
        best[k] = found.scale[k] * products[k];
    }
    for step in (-G::STEPS..=G::STEPS).filter(|step| G::MIDDLE || *step != 0) {
        let mut inverse = [0f32; L];
        for k in 0..L {
            inverse[k] = G::inverse(step, largest[k]);
        }
        let (products, squares) = explained::<G, N, L>(&inverse, x, w);
        for k in 0..L {
            let better = squares[k] > 0.0 && products[k] * products[k] > best[k] * squares[k];
            let scale = products[k] / squares[k];
            found.scale[k] = if better { scale } else { found.scale[k] };
            best[k] = if better { scale * products[k] } else { best[k] };
            chosen[k] = if better { inverse[k] } else { chosen[k] };
        }
    }
    for k in 0..L {
        if largest[k].abs() < NOTHING {
            found.scale[k] = 0.0;
            // NaN is rounded to the least level, which is what the reference leaves here.
            chosen[k] = f32::NAN;
        }
    }
    for i in 0..N {
        for k in 0..L {
            found.codes[i][k] = G::round(chosen[k] * x[i][k]);
        }
    }
    found
}

/// The sums `w x q` and `w q q` of each group for codes `q` at these inverses of scales.
#[inline(always)]
fn explained<G: Grid, const N: usize, const L: usize>(
    inverse: &Lanes<L>,
    x: &[Lanes<L>; N],
    w: &[Lanes<L>; N],
) -> (Lanes<L>, Lanes<L>) {
    let (mut products, mut squares) = ([0f32; L], [0f32; L]);
    for i in 0..N {
        for k in 0..L {
            let q = G::round(inverse[k] * x[i][k]);
            products[k] += G::product(w[i][k], x[i][k], q);
            squares[k] += w[i][k] * q * q;
        }
    }
    (products, squares)
}

/// Which scales [`scale_min`] tries.
#[derive(Clone, Copy)]
pub(super) struct Schedule {
    /// Levels more than there are that the group's span is divided into at first,
    pub from: f32,
    /// how many more at each step,
    pub by: f32,
    /// and the number of steps after the first.
    pub steps: i32,
    /// Whether errors count by their size instead of their square.
    pub absolute: bool,
}

/// Wherever columns have an importance (`make_qkx3_quants`).
pub(super) const FINE: Schedule = Schedule { from: -0.9, by: 0.05, steps: 36, absolute: false };

/// The scale and minimum at which the weighted error of each group, whose codes are `0..=levels`, is least: each step
/// rounds at a scale and with the best minimum so far, and takes the line that fits these codes best
/// (`make_qkx2_quants`, `make_qkx3_quants`).
#[inline(always)]
pub(super) fn scale_min<const N: usize, const L: usize>(
    levels: f32,
    schedule: Schedule,
    x: &[Lanes<L>; N],
    w: &[Lanes<L>; N],
) -> Found<N, L> {
    let (mut min, mut max) = (x[0], x[0]);
    let mut sum_x = [0f32; L];
    for i in 0..N {
        for k in 0..L {
            min[k] = if x[i][k] < min[k] { x[i][k] } else { min[k] };
            max[k] = if x[i][k] > max[k] { x[i][k] } else { max[k] };
            sum_x[k] += w[i][k] * x[i][k];
        }
    }
    let sum_w = sums(w);
    let mut found = Found { scale: [0.0; L], min: [0.0; L], codes: [[0.0; L]; N] };
    // How the best codes are made again: their inverse of a scale and the minimum they were rounded with.
    let (mut chosen, mut chosen_min) = ([0f32; L], [0f32; L]);
    for k in 0..L {
        min[k] = if min[k] > 0.0 { 0.0 } else { min[k] };
        let inverse = levels / (max[k] - min[k]);
        found.scale[k] = 1.0 / inverse;
        // Infinite for a span of next to nothing, of which the reference's rounding makes code 0.
        chosen[k] = if inverse < f32::INFINITY { inverse } else { 0.0 };
        chosen_min[k] = min[k];
    }
    let mut q = codes(levels, &chosen, &min, x);
    let mut best = errors(schedule.absolute, &q, &found.scale, &min, x, w);
    for step in 0..=schedule.steps {
        let mut inverse = [0f32; L];
        for k in 0..L {
            inverse[k] = (schedule.from + schedule.by * step as f32 + levels) / (max[k] - min[k]);
        }
        let (mut sum_q, mut sum_qq, mut sum_qx) = ([0f32; L], [0f32; L], [0f32; L]);
        for i in 0..N {
            for k in 0..L {
                q[i][k] = nearest(clamp(inverse[k] * (x[i][k] - min[k]), 0.0, levels));
                let wq = w[i][k] * q[i][k];
                sum_q[k] += wq;
                sum_qq[k] += wq * q[i][k];
                sum_qx[k] += wq * x[i][k];
            }
        }
        let (mut scale, mut offset, mut fits) = ([0f32; L], [0f32; L], [false; L]);
        for k in 0..L {
            let determinant = sum_w[k] * sum_qq[k] - sum_q[k] * sum_q[k];
            let s = (sum_w[k] * sum_qx[k] - sum_x[k] * sum_q[k]) / determinant;
            let m = (sum_qq[k] * sum_x[k] - sum_q[k] * sum_qx[k]) / determinant;
            // Minimums above 0 cannot be stored: then the best line goes through 0.
            scale[k] = if m > 0.0 { sum_qx[k] / sum_qq[k] } else { s };
            offset[k] = if m > 0.0 { 0.0 } else { m };
            fits[k] = determinant > 0.0;
        }
        let error = errors(schedule.absolute, &q, &scale, &offset, x, w);
        for k in 0..L {
            let better = fits[k] && error[k] < best[k];
            best[k] = if better { error[k] } else { best[k] };
            found.scale[k] = if better { scale[k] } else { found.scale[k] };
            chosen[k] = if better { inverse[k] } else { chosen[k] };
            chosen_min[k] = if better { min[k] } else { chosen_min[k] };
            min[k] = if better { offset[k] } else { min[k] };
        }
    }
    found.min = min;
    found.codes = codes(levels, &chosen, &chosen_min, x);
    found
}

/// Codes in `0..=levels` of what the weights are above `min`.
#[inline(always)]
fn codes<const N: usize, const L: usize>(
    levels: f32,
    inverse: &Lanes<L>,
    min: &Lanes<L>,
    x: &[Lanes<L>; N],
) -> [Lanes<L>; N] {
    let mut q = [[0f32; L]; N];
    for i in 0..N {
        for k in 0..L {
            q[i][k] = nearest(clamp(inverse[k] * (x[i][k] - min[k]), 0.0, levels));
        }
    }
    q
}

/// The weighted error of each group.
#[inline(always)]
fn errors<const N: usize, const L: usize>(
    absolute: bool,
    q: &[Lanes<L>; N],
    scale: &Lanes<L>,
    min: &Lanes<L>,
    x: &[Lanes<L>; N],
    w: &[Lanes<L>; N],
) -> Lanes<L> {
    let mut errors = [0f32; L];
    for i in 0..N {
        for k in 0..L {
            let error = scale[k] * q[i][k] + min[k] - x[i][k];
            errors[k] += w[i][k] * if absolute { error.abs() } else { error * error };
        }
    }
    errors
}

/// The scale and codes of each group after coordinate descent from the codes that give the largest weight the least one
/// (`make_q3_quants`).
#[inline(always)]
pub(super) fn descended_scale<const N: usize, const L: usize>(
    low: f32,
    high: f32,
    x: &[Lanes<L>; N],
    w: &[Lanes<L>; N],
) -> Found<N, L> {
    let largest = largest(x);
    let mut q = [[low; L]; N];
    for i in 0..N {
        for k in 0..L {
            q[i][k] = nearest(clamp(low / largest[k] * x[i][k], low, high));
        }
    }
    let mut scale = descend(low, high, x, w, &mut q);
    for k in 0..L {
        if largest[k].abs() < NOTHING {
            scale[k] = 0.0;
            set_lane(&mut q, k, low);
        }
    }
    Found { scale, min: [0.0; L], codes: q }
}

/// Gives all codes of lane `k` one value.
#[inline(always)]
fn set_lane<const N: usize, const L: usize>(q: &mut [Lanes<L>; N], k: usize, code: f32) {
    for q in q {
        q[k] = code;
    }
}

/// A scale and codes in `0..=top` for numbers that are not negative: the scale of least error among nine, then
/// coordinate descent (`make_qp_quants`).
#[inline(always)]
pub(super) fn steps<const N: usize, const L: usize>(top: f32, x: &[Lanes<L>; N], w: &[Lanes<L>; N]) -> Found<N, L> {
    let mut max = [0f32; L];
    for x in x {
        for k in 0..L {
            max[k] = if x[k] > max[k] { x[k] } else { max[k] };
        }
    }
    let mut chosen = [0f32; L];
    let mut best = [0f32; L];
    // The middle first: others are taken only where they are better.
    for step in [0, -4, -3, -2, -1, 1, 2, 3, 4] {
        let mut inverse = [0f32; L];
        let mut errors = [0f32; L];
        for k in 0..L {
            inverse[k] = (0.1 * step as f32 + top) / max[k];
        }
        for i in 0..N {
            for k in 0..L {
                let q = nearest(clamp(inverse[k] * x[i][k], 0.0, top));
                let error = x[i][k] - 1.0 / inverse[k] * q;
                errors[k] += w[i][k] * error * error;
            }
        }
        for k in 0..L {
            let better = step == 0 || errors[k] < best[k];
            best[k] = if better { errors[k] } else { best[k] };
            chosen[k] = if better { inverse[k] } else { chosen[k] };
        }
    }
    let mut q = [[0f32; L]; N];
    for i in 0..N {
        for k in 0..L {
            q[i][k] = nearest(clamp(chosen[k] * x[i][k], 0.0, top));
        }
    }
    let mut scale = descend(0.0, top, x, w, &mut q);
    for k in 0..L {
        if max[k] < NOTHING {
            scale[k] = 0.0;
            set_lane(&mut q, k, 0.0);
        }
    }
    Found { scale, min: [0.0; L], codes: q }
}

/// Sets, up to five times over each group, each code to what is best with the others as they are, where that explains
/// more of the weighted square; and returns the scales that fit the codes best.
#[inline(always)]
fn descend<const N: usize, const L: usize>(
    low: f32,
    high: f32,
    x: &[Lanes<L>; N],
    w: &[Lanes<L>; N],
    q: &mut [Lanes<L>; N],
) -> Lanes<L> {
    let (mut products, mut squares) = ([0f32; L], [0f32; L]);
    for i in 0..N {
        for k in 0..L {
            products[k] += w[i][k] * x[i][k] * q[i][k];
            squares[k] += w[i][k] * q[i][k] * q[i][k];
        }
    }
    // A lane in which nothing changes stays as it is in the passes that others still need.
    for _ in 0..5 {
        let mut changed = 0u32;
        for i in 0..N {
            for k in 0..L {
                let (x, w, old) = (x[i][k], w[i][k], q[i][k]);
                let product = products[k] - w * x * old;
                let square = squares[k] - w * old * old;
                let new = nearest(clamp(x * square / product, low, high));
                let (new_product, new_square) = (product + w * x * new, square + w * new * new);
                let better = product > 0.0
                    && square > 0.0
                    && new != old
                    && new_product * new_product * squares[k] > products[k] * products[k] * new_square;
                q[i][k] = if better { new } else { old };
                products[k] = if better { new_product } else { products[k] };
                squares[k] = if better { new_square } else { squares[k] };
                changed |= u32::from(better);
            }
        }
        if changed == 0 {
            break;
        }
    }
    let mut scale = [0f32; L];
    for k in 0..L {
        scale[k] = if squares[k] > 0.0 { products[k] / squares[k] } else { 0.0 };
    }
    scale
}
