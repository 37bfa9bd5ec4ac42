//! Few rows: each packed weight row is read once and multiplied where it lies.

use super::instructions::*;
use crate::formats::{BlockFormat, Format, Visitor};
use crate::kernels::{DotCodes, DotFloats, QuantizedRow, scalar};

pub(super) fn dot_codes_plain(format: Format) -> DotCodes {
    fn dot<F: BlockFormat>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
        dot_codes_of::<F, Widening>(data, x, out);
    }
    scalar::by_format!(DotCodes, format, dot)
}

pub(super) fn dot_codes_dotprod(format: Format) -> DotCodes {
    #[target_feature(enable = "neon,dotprod")]
    fn compiled<F: BlockFormat>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
        dot_codes_of::<F, Dotprod>(data, x, out);
    }
    fn dot<F: BlockFormat>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
        // SAFETY: handed out only where the processor has dot products.
        unsafe { compiled::<F>(data, x, out) }
    }
    scalar::by_format!(DotCodes, format, dot)
}

#[inline(always)]
fn dot_codes_of<F: BlockFormat, S: Sdot>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
    let row_bytes = x.q.len() / (32 * F::GROUPS) * F::BYTES;
    let quads = x.q.as_chunks::<16>().0.as_chunks::<2>().0;
    for (out, row) in out.iter_mut().zip(data.chunks_exact(row_bytes)) {
        let mut sum = vdupq_n_f32(0.0);
        let mut mins = 0f32;
        for (b, block) in row.chunks_exact(F::BYTES).enumerate() {
            let first = b * F::GROUPS;
            let q = &quads[first..first + F::GROUPS];
            let d = &x.d[first..first + F::GROUPS];
            let s16 = &x.s16[2 * first..2 * (first + F::GROUPS)];
            let s32 = &x.s32[first..first + F::GROUPS];
            for g in 0..F::GROUPS {
                let group = F::group(block, g);
                let (codes, _) = group.codes.as_chunks::<16>();
                let zero = vdupq_n_s32(0);
                if F::HALVES {
                    for h in 0..2 {
                        let dot = vcvtq_f32_s32(S::sdot(zero, load_i8(&codes[h]), load_i8(&q[g][h])));
                        sum = vfmaq_n_f32(sum, dot, group.scale[h] * d[g]);
                        if F::HAS_MIN {
                            mins = group.min[h].mul_add(s16[2 * g + h], mins);
                        }
                    }
                } else {
                    let dot = S::sdot(zero, load_i8(&codes[0]), load_i8(&q[g][0]));
                    let dot = vcvtq_f32_s32(S::sdot(dot, load_i8(&codes[1]), load_i8(&q[g][1])));
                    sum = vfmaq_n_f32(sum, dot, group.scale[0] * d[g]);
                    if F::HAS_MIN {
                        mins = group.min[0].mul_add(s32[g], mins);
                    }
                }
            }
        }
        *out = vaddvq_f32(sum) - mins;
    }
}

pub(super) fn dot_floats(format: Format) -> DotFloats {
    match format {
        Format::F32 => dot_floats_of::<F32>,
        Format::F16 => dot_floats_of::<F16>,
        _ => dot_floats_of::<BF16>,
    }
}

fn dot_floats_of<F: Floats>(data: &[u8], x: &[f32], out: &mut [f32]) {
    let (chunks, rest) = x.as_chunks::<16>();
    for (out, row) in out.iter_mut().zip(data.chunks_exact(x.len() * F::BYTES)) {
        let mut sums = [vdupq_n_f32(0.0); 4];
        for (x, w) in chunks.iter().zip(row.chunks_exact(16 * F::BYTES)) {
            let (x, _) = x.as_chunks::<4>();
            for i in 0..4 {
                sums[i] = vfmaq_f32(sums[i], load_f32(&x[i]), F::four(&w[4 * F::BYTES * i..]));
            }
        }
        if !rest.is_empty() {
            let mut last = [0f32; 16];
            last[..rest.len()].copy_from_slice(rest);
            let mut bytes = [0u8; 64];
            let tail = &row[16 * F::BYTES * chunks.len()..];
            bytes[..tail.len()].copy_from_slice(tail);
            let (last, _) = last.as_chunks::<4>();
            for i in 0..4 {
                sums[i] = vfmaq_f32(sums[i], load_f32(&last[i]), F::four(&bytes[4 * F::BYTES * i..]));
            }
        }
        *out = vaddvq_f32(vaddq_f32(vaddq_f32(sums[0], sums[1]), vaddq_f32(sums[2], sums[3])));
    }
}
