//! Sixteen rows as columns, in 512-bit registers.

use super::PANEL;
use super::bf16::store_transposed;
use std::arch::x86_64::*;

/// See [`super::Lanes::across`].
pub(super) fn across(rows: &[f32], stride: usize, used: usize, len: usize, out: &mut [f32]) {
    #[target_feature(enable = "avx512f")]
    fn inner(rows: &[f32], stride: usize, used: usize, len: usize, out: &mut [f32]) {
        for (c, out) in out[..len * PANEL].chunks_mut(PANEL * PANEL).enumerate() {
            let columns = out.len() / PANEL;
            let mask = if columns == PANEL { !0 } else { (1 << columns) - 1 };
            let mut tile = [_mm512_setzero_si512(); PANEL];
            for r in 0..used {
                // SAFETY: the masked numbers are inside row `r` (asserted below).
                tile[r] = unsafe { _mm512_maskz_loadu_epi32(mask, rows.as_ptr().add(r * stride + c * PANEL).cast()) };
            }
            if columns == PANEL {
                // SAFETY: 256 numbers.
                unsafe { store_transposed(tile, out.as_mut_ptr().cast()) };
            } else {
                let mut whole = [0f32; PANEL * PANEL];
                // SAFETY: 256 numbers.
                unsafe { store_transposed(tile, whole.as_mut_ptr().cast()) };
                out.copy_from_slice(&whole[..columns * PANEL]);
            }
        }
    }
    assert!(used <= PANEL && (used == 0 || rows.len() >= (used - 1) * stride + len));
    // SAFETY: this table is handed out only where AVX-512 is.
    unsafe { inner(rows, stride, used, len, out) }
}
