//! Rows of f32 as right sides of products of bf16, for attention.

use super::columns::{check, interleave};
use super::{ROWS, STEP, rounded, store_transposed};
use crate::kernels::{HalfRows, PANEL};
use std::arch::x86_64::*;

/// Up to 32 numbers from the start of `row`, with zeros behind them.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn load<const PARTS: usize>(row: &[f32]) -> [__m512i; PARTS] {
    let mask = if row.len() >= STEP { !0u32 } else { (1 << row.len()) - 1 };
    // SAFETY: the masked numbers are in the row.
    let (low, high) = unsafe {
        (
            _mm512_maskz_loadu_ps(mask as u16, row.as_ptr()),
            _mm512_maskz_loadu_ps((mask >> 16) as u16, row.as_ptr().wrapping_add(16)),
        )
    };
    rounded(low, high)
}

/// See [`super::HalfKernels::across`].
pub(super) fn across<const PARTS: usize>(rows: &[f32], stride: usize, used: usize, len: usize, out: &mut [u16]) {
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn inner<const PARTS: usize>(rows: &[f32], stride: usize, used: usize, len: usize, out: &mut [u16]) {
        let steps = len.div_ceil(STEP);
        let (out, _) = out.as_chunks_mut::<{ STEP * PANEL }>();
        for step in 0..steps {
            let mut tiles = [[_mm512_setzero_si512(); PANEL]; PARTS];
            for r in 0..used {
                for (part, line) in load::<PARTS>(&rows[r * stride..][step * STEP..len]).into_iter().enumerate() {
                    tiles[part][r] = line;
                }
            }
            for (part, tile) in tiles.into_iter().enumerate() {
                // SAFETY: 512 numbers.
                unsafe { store_transposed(tile, out[part * steps + step].as_mut_ptr()) };
            }
        }
    }
    assert!(used <= PANEL && out.len() >= PARTS * len.next_multiple_of(STEP) * PANEL);
    // SAFETY: this table is handed out only where the processor has bf16.
    unsafe { inner::<PARTS>(rows, stride, used, len, out) }
}

/// See [`super::HalfKernels::pairs`].
pub(super) fn pairs<const PARTS: usize>(
    rows: &[f32],
    stride: usize,
    used: usize,
    len: usize,
    ldb: usize,
    out: &mut [u16],
) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn inner<const PARTS: usize>(rows: &[f32], stride: usize, used: usize, len: usize, ldb: usize, out: &mut [u16]) {
        let (panels, size) = (len.div_ceil(PANEL), used.next_multiple_of(STEP) * PANEL);
        for pair in 0..used.div_ceil(2) {
            for p in (0..panels).step_by(2) {
                let a = load::<PARTS>(&rows[2 * pair * stride..][p * PANEL..len]);
                let b = match 2 * pair + 1 < used {
                    true => load::<PARTS>(&rows[(2 * pair + 1) * stride..][p * PANEL..len]),
                    false => [_mm512_setzero_si512(); PARTS],
                };
                for part in 0..PARTS {
                    for (h, line) in interleave(a[part], b[part]).into_iter().enumerate().take(panels - p) {
                        let to = &mut out[(p + h) * ldb + part * size + pair * 2 * PANEL..][..2 * PANEL];
                        // SAFETY: 64 bytes.
                        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), line) }
                    }
                }
            }
        }
    }
    for part in 0..PARTS {
        let at = part * used.next_multiple_of(STEP) * PANEL;
        check(used, len.div_ceil(PANEL), ldb, &mut out[at..]);
    }
    // SAFETY: this table is handed out only where the processor has bf16.
    unsafe { inner::<PARTS>(rows, stride, used, len, ldb, out) }
}

/// See [`super::HalfKernels::turn`].
pub(super) fn turn(x: HalfRows<'_>, step: usize, out: &mut [u16]) {
    #[target_feature(enable = "avx512f,avx512bw")]
    fn inner(x: HalfRows<'_>, step: usize, out: &mut [u16]) {
        let (a, b) = out[..2 * x.padded * PANEL].split_at_mut(x.padded * PANEL);
        let mut lines = a.as_chunks_mut::<{ 2 * PANEL }>().0.iter_mut().zip(b.as_chunks_mut::<{ 2 * PANEL }>().0);
        for block in x.all.chunks_exact(ROWS * x.cols).take(x.padded / ROWS) {
            let rows = block[step * ROWS * STEP..][..ROWS * STEP].as_chunks::<{ 2 * STEP }>().0;
            for (pair, (a, b)) in rows.iter().zip(&mut lines) {
                // SAFETY: each is 64 bytes; a pair of rows twice that.
                unsafe {
                    let at = pair.as_ptr();
                    let rows = [_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(STEP).cast())];
                    let [low, high] = interleave(rows[0], rows[1]);
                    _mm512_storeu_si512(a.as_mut_ptr().cast(), low);
                    _mm512_storeu_si512(b.as_mut_ptr().cast(), high);
                }
            }
        }
    }
    assert!((step + 1) * STEP <= x.cols && x.all.len() >= x.padded * x.cols);
    // SAFETY: this table is handed out only where the processor has bf16.
    unsafe { inner(x, step, out) }
}
