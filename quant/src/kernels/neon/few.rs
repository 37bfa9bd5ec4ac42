//! Few rows: each packed weight row is read once and multiplied where it lies.

use super::instructions::*;
use crate::formats::{BlockFormat, FP4, Format, Group, NF4, TableFormat, Visitor, table};
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
    let blocks = x.q.len() / (32 * F::GROUPS);
    let groups = blocks * F::GROUPS;
    let q = &x.q.as_chunks::<16>().0.as_chunks::<2>().0[..groups];
    let d = &x.d[..groups];
    let sums = &x.s32[..groups];
    let half_sums = &x.s16.as_chunks::<2>().0[..groups];
    for (out, row) in out.iter_mut().zip(data.chunks_exact(blocks * F::BYTES)) {
        let mut acc = Acc { sum: vdupq_n_f32(0.0), mins: 0.0 };
        for (b, block) in row.chunks_exact(F::BYTES).enumerate() {
            // Written out, so that the shifts of each group are constants.
            macro_rules! groups {
                ($($g:literal),*) => {$(
                    let i = b * F::GROUPS + $g;
                    acc.group::<F, S>(&F::group(block, $g), &q[i], d[i], &half_sums[i], sums[i]);
                )*};
            }
            groups!(0);
            if F::GROUPS == 8 {
                groups!(1, 2, 3, 4, 5, 6, 7);
            }
        }
        *out = vaddvq_f32(acc.sum) - acc.mins;
    }
}

/// A dot product on its way.
struct Acc {
    sum: float32x4_t,
    mins: f32,
}

impl Acc {
    #[inline(always)]
    fn group<F: BlockFormat, S: Sdot>(&mut self, w: &Group, q: &[[i8; 16]; 2], d: f32, half_sums: &[f32; 2], sum: f32) {
        let (codes, _) = w.codes.as_chunks::<16>();
        let zero = vdupq_n_s32(0);
        let first = S::sdot(zero, load_i8(&codes[0]), load_i8(&q[0]));
        if F::HALVES {
            let second = S::sdot(zero, load_i8(&codes[1]), load_i8(&q[1]));
            self.sum = vfmaq_n_f32(self.sum, vcvtq_f32_s32(first), w.scale[0] * d);
            self.sum = vfmaq_n_f32(self.sum, vcvtq_f32_s32(second), w.scale[1] * d);
            if F::HAS_MIN {
                self.mins = w.min[0].mul_add(half_sums[0], self.mins);
                self.mins = w.min[1].mul_add(half_sums[1], self.mins);
            }
        } else {
            let both = S::sdot(first, load_i8(&codes[1]), load_i8(&q[1]));
            self.sum = vfmaq_n_f32(self.sum, vcvtq_f32_s32(both), w.scale[0] * d);
            if F::HAS_MIN {
                self.mins = w.min[0].mul_add(sum, self.mins);
            }
        }
    }
}

pub(super) fn dot_floats(format: Format) -> DotFloats {
    match format {
        Format::F32 => dot_floats_of::<F32>,
        Format::F16 => dot_floats_of::<F16>,
        Format::NF4 => dot_table_of::<NF4>,
        Format::FP4 => dot_table_of::<FP4>,
        _ => dot_floats_of::<BF16>,
    }
}

fn dot_table_of<T: TableFormat>(data: &[u8], x: &[f32], out: &mut [f32]) {
    let look_up = FloatTable::new(&T::TABLE);
    let row_bytes = x.len() / 32 * table::BYTES;
    for (out, row) in out.iter_mut().zip(data.chunks_exact(row_bytes)) {
        let mut sums = [vdupq_n_f32(0.0); 4];
        for (block, x) in row.as_chunks::<{ table::BYTES }>().0.iter().zip(x.as_chunks::<32>().0) {
            let ([scale, ..], _) = block.as_chunks::<4>() else { continue };
            let scale = f32::from_le_bytes(*scale);
            let Some(codes) = block.last_chunk::<16>() else { continue };
            let (first, second) = look_up.nibbles(codes);
            let (x, _) = x.as_chunks::<4>();
            for i in 0..4 {
                let products = vfmaq_f32(vmulq_f32(first[i], load_f32(&x[i])), second[i], load_f32(&x[4 + i]));
                sums[i] = vfmaq_n_f32(sums[i], products, scale);
            }
        }
        *out = vaddvq_f32(vaddq_f32(vaddq_f32(sums[0], sums[1]), vaddq_f32(sums[2], sums[3])));
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
