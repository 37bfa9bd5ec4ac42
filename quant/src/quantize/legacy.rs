//! Q4_0 Q4_1 Q5_0 Q5_1 Q8_0: the bytes that llama.cpp's quantizer writes, with and without importance.

use super::float::finite_f16;
use super::groups::{groups, weighted};
use super::pack::put;
use super::search::{self, FINE, Integers};
use crate::formats::Format;

/// Blocks that are searched side by side.
const SIDE: usize = 8;

/// Encodes one row.
#[inline(always)]
pub(super) fn encode(format: Format, row: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    match (format, importance) {
        (Format::Q8_0, _) => q8_0(row, out),
        (_, None) => plain(format, row, out),
        (_, Some(importance)) => searched(format, row, importance, out),
    }
}

/// Bits of a code, and whether blocks have a minimum.
#[inline(always)]
fn kind(format: Format) -> (u32, bool) {
    match format {
        Format::Q4_0 => (4, false),
        Format::Q4_1 => (4, true),
        Format::Q5_0 => (5, false),
        _ => (5, true),
    }
}

/// Without importance: the largest weights set the scale.
#[inline(always)]
fn plain(format: Format, row: &[f32], out: &mut [u8]) {
    let (bits, has_min) = kind(format);
    for (x, block) in row.as_chunks::<32>().0.iter().zip(out.chunks_exact_mut(format.block_bytes())) {
        if has_min {
            let (scale, min, codes) = minimum_rounding((1 << bits) - 1, x);
            write(format, block, scale, Some(min), &codes);
        } else {
            let (scale, codes) = symmetric_rounding(1 << (bits - 1), x);
            write(format, block, scale, None, &codes);
        }
    }
}

/// With importance.
#[inline(always)]
fn searched(format: Format, row: &[f32], importance: &[f32], out: &mut [u8]) {
    let (bits, has_min) = kind(format);
    let mut sum = 0.0;
    for x in row {
        sum += x * x;
    }
    let mean = sum / row.len() as f32;
    let bytes = format.block_bytes();
    for (b, (x, out)) in row.chunks(SIDE * 32).zip(out.chunks_mut(SIDE * bytes)).enumerate() {
        let groups = groups::<32, SIDE>(x);
        let w = weighted(&importance[SIDE * 32 * b..][..x.len()], &groups, [mean; SIDE]);
        let found = match format {
            Format::Q4_0 => search::scale::<Integers<-8, 7>, 32, SIDE>(&groups, &w),
            Format::Q5_0 => search::scale::<Integers<-16, 15>, 32, SIDE>(&groups, &w),
            _ => search::scale_min(((1 << bits) - 1) as f32, FINE, &groups, &w),
        };
        for (k, block) in out.chunks_exact_mut(bytes).enumerate() {
            let codes = std::array::from_fn(|i| found.codes[i][k] as i8);
            write(format, block, found.scale[k], has_min.then_some(found.min[k]), &codes);
        }
    }
}

/// Writes a block.
#[inline(always)]
fn write(format: Format, block: &mut [u8], scale: f32, min: Option<f32>, codes: &[i8; 32]) {
    block[..2].copy_from_slice(&finite_f16(scale).to_le_bytes());
    if let Some(min) = min {
        block[2..4].copy_from_slice(&finite_f16(min).to_le_bytes());
    }
    put(format, block, 0, codes);
}

/// The largest weight by size becomes `-half`, and sets the scale.
#[inline(always)]
fn symmetric_rounding(half: i32, x: &[f32; 32]) -> (f32, [i8; 32]) {
    let scale = largest(x) / -(half as f32);
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
    let (low, high) = bounds(x);
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
        let scale = size(x) / 127.0;
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

/// The largest size of the weights.
#[inline(always)]
fn size(x: &[f32; 32]) -> f32 {
    // As integers, which are in the same order and which compilers take in any.
    let mut size = 0;
    for v in x {
        size = size.max(v.to_bits() & 0x7fff_ffff);
    }
    f32::from_bits(size)
}

/// The first of the weights that are largest by size; 0, not -0, where all are zeros.
#[inline(always)]
fn largest(x: &[f32; 32]) -> f32 {
    let size = size(x);
    let mut first = 32;
    for i in 0..32 {
        first = first.min(if x[i].abs() == size { i } else { 32 });
    }
    if size > 0.0 && first < 32 { x[first] } else { 0.0 }
}

/// The least and the largest weight, each the first of its kind, which tells 0 from -0.
#[inline(always)]
fn bounds(x: &[f32; 32]) -> (f32, f32) {
    const LANES: usize = 16;
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
    for bound in [&mut low[0], &mut high[0]] {
        if *bound == 0.0
            && let Some(zero) = x.iter().find(|v| **v == 0.0)
        {
            *bound = *zero;
        }
    }
    (low[0], high[0])
}
