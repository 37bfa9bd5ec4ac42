//! Few rows of activations: weights are multiplied in the nearest cache as soon as they are unpacked.
//!
//! A panel of all columns would have to be written to a farther cache and read back, which takes as long as few rows take
//! to multiply.

use super::levels::Levels;
use super::{Fetch, ROWS, STEP, TOGETHER, multiply, pack_of};
use crate::formats::Format;
use crate::kernels::ahead::Ahead;
use crate::kernels::codes256::by_codes;
use crate::kernels::{HalfRows, MulShort, NEAR, PANEL, ROW_BLOCK};
use std::ops::Range;

pub(super) fn short(format: Format) -> MulShort {
    fn coded<C: Levels>(
        data: &[u8],
        used: usize,
        x: HalfRows<'_>,
        rows: Range<usize>,
        near: &mut [u16],
        out: &mut [f32],
        stride: usize,
    ) {
        assert!(x.cols.is_multiple_of(STEP) && x.all.len() >= x.padded * x.cols && near.len() >= 2 * NEAR * PANEL);
        assert!(rows.start.is_multiple_of(ROW_BLOCK) && rows.end <= x.padded && x.padded.is_multiple_of(ROW_BLOCK));
        let panels = used.div_ceil(PANEL);
        assert!((1..=2).contains(&panels) && stride >= panels * PANEL);
        assert!(out.len() >= rows.len().next_multiple_of(TOGETHER) * stride);
        // SAFETY: this table is handed out only where the processor has bf16; sizes are asserted above.
        unsafe {
            match panels {
                1 => mul::<C, 1>(data, used, x, rows, near, out, stride),
                _ => mul::<C, 2>(data, used, x, rows, near, out, stride),
            }
        }
    }
    by_codes!(format, coded)
}

/// # Safety
/// What [`short`]'s kernels assert.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")]
unsafe fn mul<C: Levels, const P: usize>(
    data: &[u8],
    used: usize,
    x: HalfRows<'_>,
    rows: Range<usize>,
    near: &mut [u16],
    out: &mut [f32],
    stride: usize,
) {
    let row_bytes = x.cols / C::FORMAT.block_len() * C::BYTES;
    let ahead = Ahead::here();
    // Of the rows behind these as many bytes are fetched with each run of columns as it has.
    let (behind, share) = (used * row_bytes, used * C::RUN);
    let steps = NEAR / STEP * rows.len().div_ceil(TOGETHER);
    let lines = share.div_ceil(64 * steps);
    for (run, k) in (0..x.cols).step_by(NEAR).enumerate() {
        let cols = NEAR.min(x.cols - k);
        let mut panels = [std::ptr::null(); P];
        for (p, panel) in near.chunks_exact_mut(NEAR * PANEL).take(P).enumerate() {
            pack_of::<C, 1>(
                &data[p * PANEL * row_bytes + run * C::RUN..],
                row_bytes,
                PANEL.min(used - p * PANEL),
                cols,
                panel,
            );
            panels[p] = panel.as_ptr();
        }
        for r in (0..rows.len()).step_by(TOGETHER) {
            let row = rows.start + r;
            // SAFETY: eight rows of a block, as rows are padded to whole blocks, and of sums; `cols` columns of both.
            unsafe {
                let x = x.all[row / ROWS * ROWS * x.cols + row % ROWS * STEP..].as_ptr().add(k * ROWS);
                let at = data.as_ptr().wrapping_add(behind + run * share + r * lines * NEAR / STEP / TOGETHER * 64);
                multiply::<P>(
                    panels,
                    x,
                    cols / STEP,
                    k > 0,
                    Fetch { ahead, at, lines },
                    out[r * stride..].as_mut_ptr(),
                    stride,
                );
            }
        }
    }
}
