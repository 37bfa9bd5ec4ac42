//! Rows of f32 as right sides of products of bf16, for attention.

use super::columns::{check, interleave};
use super::{STEP, store_transposed};
use crate::kernels::PANEL;
use std::arch::x86_64::*;

/// Up to 32 numbers from the start of `row`, as bf16, with zeros behind them.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded(row: &[f32]) -> __m512i {
    let mask = if row.len() >= STEP { !0u32 } else { (1 << row.len()) - 1 };
    // SAFETY: the masked numbers are in the row.
    unsafe {
        let low = _mm512_maskz_loadu_ps(mask as u16, row.as_ptr());
        let high = _mm512_maskz_loadu_ps((mask >> 16) as u16, row.as_ptr().wrapping_add(16));
        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
    }
}

/// See [`super::HalfKernels::across`].
pub(super) fn across(rows: &[f32], stride: usize, used: usize, len: usize, out: &mut [u16]) {
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn inner(rows: &[f32], stride: usize, used: usize, len: usize, out: &mut [u16]) {
        let (out, _) = out.as_chunks_mut::<{ STEP * PANEL }>();
        for (first, out) in (0..len).step_by(STEP).zip(out) {
            let mut tile = [_mm512_setzero_si512(); PANEL];
            for r in 0..used {
                tile[r] = rounded(&rows[r * stride..][first..len]);
            }
            // SAFETY: 512 numbers.
            unsafe { store_transposed(tile, out.as_mut_ptr()) };
        }
    }
    assert!(used <= PANEL && out.len() >= len.next_multiple_of(STEP) * PANEL);
    // SAFETY: this table is handed out only where the processor has bf16.
    unsafe { inner(rows, stride, used, len, out) }
}

/// See [`super::HalfKernels::pairs`].
pub(super) fn pairs(rows: &[f32], stride: usize, used: usize, len: usize, ldb: usize, out: &mut [u16]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn inner(rows: &[f32], stride: usize, used: usize, len: usize, ldb: usize, out: &mut [u16]) {
        let panels = len.div_ceil(PANEL);
        for pair in 0..used.div_ceil(2) {
            for p in (0..panels).step_by(2) {
                let a = rounded(&rows[2 * pair * stride..][p * PANEL..len]);
                let b = match 2 * pair + 1 < used {
                    true => rounded(&rows[(2 * pair + 1) * stride..][p * PANEL..len]),
                    false => _mm512_setzero_si512(),
                };
                for (h, line) in interleave(a, b).into_iter().enumerate().take(panels - p) {
                    let to = &mut out[(p + h) * ldb + pair * 2 * PANEL..][..2 * PANEL];
                    // SAFETY: 64 bytes.
                    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), line) }
                }
            }
        }
    }
    check(used, len.div_ceil(PANEL), ldb, out);
    // SAFETY: this table is handed out only where the processor has bf16.
    unsafe { inner(rows, stride, used, len, ldb, out) }
}
