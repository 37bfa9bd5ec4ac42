//! Q4_0 Q4_1 Q5_0 Q5_1 Q8_0: the bytes that llama.cpp's quantizer writes, with and without importance.

use super::float::finite_f16;
use super::pack::put;
use super::search;
use crate::formats::Format;

/// Encodes one row.
#[inline(always)]
pub(super) fn encode(format: Format, row: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    let (bits, has_min) = match format {
        Format::Q4_0 => (4, false),
        Format::Q4_1 => (4, true),
        Format::Q5_0 => (5, false),
        Format::Q5_1 => (5, true),
        _ => return q8_0(row, out),
    };
    // The mean square keeps importance from making a weight near zero count for nothing.
    let mut sum = 0.0;
    if importance.is_some() {
        for x in row {
            sum += x * x;
        }
    }
    let mean = sum / row.len() as f32;
    for (b, (x, block)) in row.as_chunks::<32>().0.iter().zip(out.chunks_exact_mut(format.block_bytes())).enumerate() {
        let weights = importance.map(|importance| search::weights(&importance[32 * b..], x, mean));
        let codes = if has_min {
            let levels = (1 << bits) - 1;
            let found = weights.map(|w| search::llama_scale_min(levels, x, &w));
            // Sums of squares of huge weights overflow; the plain way has none.
            let found = found.filter(|(scale, min, _)| scale.is_finite() && min.is_finite());
            let (scale, min, codes) = found.unwrap_or_else(|| minimum_rounding(levels, x));
            block[..2].copy_from_slice(&finite_f16(scale).to_le_bytes());
            block[2..4].copy_from_slice(&finite_f16(min).to_le_bytes());
            codes
        } else {
            let half = 1 << (bits - 1);
            let found = weights.map(|w| search::llama_scale(half, x, &w)).filter(|(scale, _)| scale.is_finite());
            let (scale, codes) = found.unwrap_or_else(|| symmetric_rounding(half, x));
            block[..2].copy_from_slice(&finite_f16(scale).to_le_bytes());
            codes
        };
        put(format, block, 0, &codes);
    }
}

/// The largest weight by size becomes `-half`, and sets the scale.
#[inline(always)]
fn symmetric_rounding(half: i32, x: &[f32; 32]) -> (f32, [i8; 32]) {
    let scale = search::largest(x) / -(half as f32);
    let inverse = if scale != 0.0 { 1.0 / scale } else { 0.0 };
    let mut codes = [0; 32];
    for i in 0..32 {
        let q = truncate(x[i] * inverse + (half as f32 + 0.5)).min(2 * half - 1);
        codes[i] = (q - half) as i8;
    }
    (scale, codes)
}

/// The least weight becomes 0 and the largest `levels`.
#[inline(always)]
fn minimum_rounding(levels: i32, x: &[f32; 32]) -> (f32, f32, [i8; 32]) {
    let (low, high) = search::first_bounds(x);
    let scale = (high - low) / levels as f32;
    let inverse = if scale != 0.0 { 1.0 / scale } else { 0.0 };
    let mut codes = [0; 32];
    for i in 0..32 {
        codes[i] = truncate((x[i] - low) * inverse + 0.5).min(levels) as i8;
    }
    (scale, low, codes)
}

#[inline(always)]
fn q8_0(row: &[f32], out: &mut [u8]) {
    for (x, block) in row.as_chunks::<32>().0.iter().zip(out.chunks_exact_mut(34)) {
        let scale = search::size(x) / 127.0;
        let inverse = if scale != 0.0 { 1.0 / scale } else { 0.0 };
        let mut codes = [0; 32];
        for i in 0..32 {
            let v = x[i] * inverse;
            // Halves go away from zero here, not to even: truncating half a unit farther out. The number below 1/2,
            // because adding 1/2 itself would carry 0.49999997 to 1.
            codes[i] = truncate(v + 0.499_999_97f32.copysign(v)) as i8;
        }
        block[..2].copy_from_slice(&finite_f16(scale).to_le_bytes());
        put(Format::Q8_0, block, 0, &codes);
    }
}

/// Towards zero; 0 for what an f32 inverse of a subnormal scale makes of a weight (infinity or NaN): the scale itself
/// is 0 as f16, so that any code stands for 0.
#[inline(always)]
fn truncate(v: f32) -> i32 {
    if v.abs() < 512.0 { v as i32 } else { 0 }
}
