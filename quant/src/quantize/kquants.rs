//! Q2_K .. Q6_K, as ggml's reference quantizers encode them: a scale (and minimum) for each group by search, then the
//! small integers that stand for these together with the block's own scales, then the codes nearest to the weights.

use super::float::finite_f16;
use super::groups::{Lanes, clamp, groups, nearest, side_by_side, squares, sums, weighted};
use super::pack::put;
use super::search::{FINE, Found, Integers, Schedule, descended_scale, scale, scale_min, steps};
use crate::formats::{Format, f16_to_f32};

/// Weights in a block.
const BLOCK: usize = 256;
/// A block whose scales are all smaller than this is one of zeros.
const NOTHING: f32 = 1e-15;

/// Encodes one row.
#[inline(always)]
pub(super) fn encode(format: Format, row: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    for (b, (x, block)) in row.as_chunks::<BLOCK>().0.iter().zip(out.chunks_exact_mut(format.block_bytes())).enumerate()
    {
        let importance = importance.map(|all| &all[BLOCK * b..][..BLOCK]);
        match format {
            Format::Q2_K => with_minimums::<16, 16>(Format::Q2_K, 3, 15, x, importance, block),
            Format::Q4_K => with_minimums::<32, 8>(Format::Q4_K, 15, 63, x, importance, block),
            Format::Q5_K => with_minimums::<32, 8>(Format::Q5_K, 31, 63, x, importance, block),
            Format::Q3_K => q3_k(x, importance, block),
            _ => q6_k(x, importance, block),
        }
    }
}

/// The mean of a block's squares.
#[inline(always)]
pub(super) fn mean_square(x: &[f32; BLOCK]) -> f32 {
    let mut sum = 0.0;
    for x in x {
        sum += x * x;
    }
    sum / BLOCK as f32
}

/// Q2_K, Q4_K and Q5_K: `N` weights in each of `L` groups.
#[inline(always)]
fn with_minimums<const N: usize, const L: usize>(
    format: Format,
    levels: u8,
    top: u8,
    x: &[f32; BLOCK],
    importance: Option<&[f32]>,
    block: &mut [u8],
) {
    let (levels, top) = (f32::from(levels), f32::from(top));
    let groups = groups::<N, L>(x);
    let found;
    // Scales and minimums of the groups as a scale for each kind times small integers.
    let (d, small): ([u16; 2], [Lanes<L>; 2]);
    if let Some(importance) = importance {
        let spread = mean_square(x) * if format == Format::Q2_K { 1.0 } else { 2.0 };
        let w = weighted(importance, &groups, [spread; L]);
        found = scale_min(levels, FINE, &groups, &w);
        let (size, sum) = (found.size(), sums(&w));
        let of_each = std::array::from_fn(|j| [size[0][j], size[1][j]]);
        let whole: Found<L, 2> = steps(top, &of_each, &sum.map(|w| [w; 2]));
        d = whole.scale.map(finite_f16);
        small = [0, 1].map(|kind| whole.codes.map(|codes| codes[kind]));
    } else {
        let squared = |from, steps| Schedule { from, by: 0.1, steps, absolute: false };
        let (schedule, w) = match format {
            // Errors count by their size there, more for large weights.
            Format::Q2_K => (Schedule { absolute: true, ..squared(-0.5, 15) }, groups.map(|x| x.map(f32::abs))),
            Format::Q4_K => (squared(-1.0, 20), plus_deviation(&groups)),
            _ => (squared(-0.5, 15), plus_deviation(&groups)),
        };
        found = scale_min(levels, schedule, &groups, &w);
        let size = found.size();
        let most = size.map(|size| size.iter().fold(0f32, |most, &size| if size > most { size } else { most }));
        d = most.map(|most| finite_f16(most / top));
        small = [0, 1].map(|kind| {
            let inverse = if most[kind] > 0.0 { top / most[kind] } else { 0.0 };
            size[kind].map(|size| nearest(clamp(inverse * size, 0.0, top)))
        });
    }
    let scale = small[0].map(|s| f16_to_f32(d[0]) * s);
    let min = small[1].map(|m| f16_to_f32(d[1]) * m);
    store(format, block, d, &std::array::from_fn::<_, L, _>(|j| (small[0][j] as u8, small[1][j] as u8)));
    put_nearest(format, [0.0, levels], &scale, &min, &groups, &found.codes, block);
}

/// Each weight's size plus its group's standard deviation from 0.
#[inline(always)]
fn plus_deviation<const N: usize, const L: usize>(x: &[Lanes<L>; N]) -> [Lanes<L>; N] {
    let deviation = sums(&squares(x)).map(|sum| (sum / N as f32).sqrt());
    let mut w = *x;
    for w in &mut w {
        for k in 0..L {
            w[k] = deviation[k] + w[k].abs();
        }
    }
    w
}

/// Writes the code nearest to each weight; where a group's scale is 0, those that the search has found.
#[inline(always)]
fn put_nearest<const N: usize, const L: usize>(
    format: Format,
    [low, high]: [f32; 2],
    scale: &Lanes<L>,
    min: &Lanes<L>,
    x: &[Lanes<L>; N],
    found: &[Lanes<L>; N],
    block: &mut [u8],
) {
    let mut codes = [0i8; BLOCK];
    for i in 0..N {
        for k in 0..L {
            let code = nearest(clamp((x[i][k] + min[k]) / scale[k], low, high));
            codes[N * k + i] = if scale[k] == 0.0 { found[i][k] } else { code } as i8;
        }
    }
    for (g, codes) in codes.as_chunks().0.iter().enumerate() {
        put(format, block, g, codes);
    }
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

/// Q3_K.
#[inline(always)]
fn q3_k(x: &[f32; BLOCK], importance: Option<&[f32]>, block: &mut [u8]) {
    let groups = groups::<16, 16>(x);
    let (found, d, small);
    if let Some(importance) = importance {
        let w = weighted(importance, &groups, [2.0 * mean_square(x); 16]);
        found = scale::<Integers<-4, 3>, 16, 16>(&groups, &w);
        let whole = scale::<Integers<-32, 31>, 16, 1>(&found.scale.map(|s| [s]), &sums(&w).map(|w| [w]));
        d = whole.scale[0];
        small = whole.codes.map(|[code]| code);
    } else {
        found = descended_scale(-4.0, 3.0, &groups, &squares(&groups));
        let inverse = -32.0 / largest(&found.scale);
        // All scales 0: the integers are as in a block of zero bytes.
        let none = inverse.is_infinite();
        d = if none { 0.0 } else { 1.0 / inverse };
        small = found.scale.map(|s| if none { -32.0 } else { nearest(clamp(inverse * s, -32.0, 31.0)) });
    }
    put_block(Format::Q3_K, [-4.0, 3.0], d, small, &groups, &found.codes, block);
}

/// Q6_K.
#[inline(always)]
fn q6_k(x: &[f32; BLOCK], importance: Option<&[f32]>, block: &mut [u8]) {
    let groups = groups::<16, 16>(x);
    let w = importance.map_or_else(|| squares(&groups), side_by_side);
    let found = scale::<Integers<-32, 31>, 16, 16>(&groups, &w);
    let most = largest(&found.scale);
    if most.abs() < NOTHING {
        block.fill(0);
        return;
    }
    let inverse = -128.0 / most;
    let small = found.scale.map(|s| nearest(clamp(inverse * s, -128.0, 127.0)));
    put_block(Format::Q6_K, [-32.0, 31.0], 1.0 / inverse, small, &groups, &found.codes, block);
}

/// The first of the scales that are largest by size.
#[inline(always)]
pub(super) fn largest<const L: usize>(scales: &Lanes<L>) -> f32 {
    scales.iter().fold(0f32, |most, &scale| if scale.abs() > most.abs() { scale } else { most })
}

/// Writes a block without minimums: `d` times `small` are the scales of its groups.
#[inline(always)]
fn put_block(
    format: Format,
    ends: [f32; 2],
    d: f32,
    small: Lanes<16>,
    x: &[Lanes<16>; 16],
    found: &[Lanes<16>; 16],
    block: &mut [u8],
) {
    let d = finite_f16(d);
    store_scales(format, block, d, &small.map(|s| s as i8));
    put_nearest(format, ends, &small.map(|s| f16_to_f32(d) * s), &[0.0; 16], x, found, block);
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
