//! Groups of weights side by side, one in each lane. A lane adds up its weights one after another, in f32 and without
//! fused multiply-add, as ggml's reference quantizers do: so its sums are theirs, and the same on every instruction set.

/// Weights beyond this are cut to it: more than any format can hold, and small enough for sums of squares.
const MOST: f32 = 3e8;
/// Importance is not above this: then no sum overflows.
pub(super) const MOST_IMPORTANT: f32 = (1u64 << 50) as f32;

/// A number for each lane.
pub(super) type Lanes<const L: usize> = [f32; L];

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

/// `1 / x`, and 0 for 0.
#[inline(always)]
pub(super) fn reciprocal(x: f32) -> f32 {
    if x != 0.0 { 1.0 / x } else { 0.0 }
}

/// Groups that lie one after another, side by side.
#[inline(always)]
pub(super) fn side_by_side<const N: usize, const L: usize>(x: &[f32]) -> [Lanes<L>; N] {
    let mut lanes = [[0.0; L]; N];
    for (k, group) in x.as_chunks::<N>().0.iter().enumerate() {
        for i in 0..N {
            lanes[i][k] = group[i];
        }
    }
    lanes
}

/// The weights of groups that lie one after another, side by side.
#[inline(always)]
pub(super) fn groups<const N: usize, const L: usize>(x: &[f32]) -> [Lanes<L>; N] {
    side_by_side(x).map(|x| x.map(|x| clamp(x, -MOST, MOST)))
}

/// The sum of each lane.
#[inline(always)]
pub(super) fn sums<const N: usize, const L: usize>(x: &[Lanes<L>; N]) -> Lanes<L> {
    let mut sums = [0.0; L];
    for x in x {
        for k in 0..L {
            sums[k] += x[k];
        }
    }
    sums
}

/// The squares of all weights.
#[inline(always)]
pub(super) fn squares<const N: usize, const L: usize>(x: &[Lanes<L>; N]) -> [Lanes<L>; N] {
    x.map(|x| x.map(|x| x * x))
}

/// How much errors count: each column's importance, more for larger weights. `spread` is a mean square, which keeps
/// weights near zero from counting for nothing.
#[inline(always)]
pub(super) fn weighted<const N: usize, const L: usize>(
    importance: &[f32],
    x: &[Lanes<L>; N],
    spread: Lanes<L>,
) -> [Lanes<L>; N] {
    let mut w = side_by_side::<N, L>(importance);
    for i in 0..N {
        for k in 0..L {
            w[i][k] *= (spread[k].min(MOST * MOST) + x[i][k] * x[i][k]).sqrt();
        }
    }
    w
}
