//! Columns of packed weights as panels of bf16, for gradients.

use super::levels::{Factors, Levels, weights};
use super::{STEP, rounded};
use crate::formats::Format;
use crate::kernels::PANEL;
use crate::kernels::codes256::by_codes;
use crate::kernels::columns::{PackHalfColumns, Weights, by_weights};
use std::arch::x86_64::*;
use std::ops::Range;

pub(super) fn columns(format: Format) -> PackHalfColumns {
    fn coded<C: Levels>(
        data: &[u8],
        row_bytes: usize,
        rows: usize,
        columns: Range<usize>,
        ldb: usize,
        out: &mut [u16],
    ) {
        // SAFETY: this table is handed out only where the processor has bf16.
        unsafe { pack_codes::<C>(data, row_bytes, rows, columns, ldb, out) }
    }
    fn other<W: Weights>(
        data: &[u8],
        row_bytes: usize,
        rows: usize,
        columns: Range<usize>,
        ldb: usize,
        out: &mut [u16],
    ) {
        // SAFETY: this table is handed out only where the processor has bf16.
        unsafe { pack_weights::<W>(data, row_bytes, rows, columns, ldb, out) }
    }
    match format.is_coded() {
        true => by_codes!(format, coded),
        false => by_weights!(PackHalfColumns, format, other),
    }
}

/// Two rows of 32 weights as a line of each of two panels.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn interleave(a: __m512i, b: __m512i) -> [__m512i; 2] {
    // Word 2 j is word j of the first row, word 2 j + 1 that of the second (numbered from 32); then from 16 on.
    let pairs = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let low = _mm512_or_si512(pairs, _mm512_slli_epi32::<16>(_mm512_or_si512(pairs, _mm512_set1_epi32(32))));
    let high = _mm512_or_si512(low, _mm512_set1_epi32(16 << 16 | 16));
    [_mm512_permutex2var_epi16(a, low, b), _mm512_permutex2var_epi16(a, high, b)]
}

/// Makes sure of the panels' size and clears the lines behind the last row.
pub(super) fn check(rows: usize, panels: usize, ldb: usize, out: &mut [u16]) {
    let lines = rows.next_multiple_of(STEP) / 2;
    assert!(panels == 0 || out.len() >= (panels - 1) * ldb + lines * 2 * PANEL);
    for p in 0..panels {
        out[p * ldb..][rows / 2 * 2 * PANEL..lines * 2 * PANEL].fill(0);
    }
}

/// Pairs of rows that are fetched ahead: of a row only some columns are read, so the processor cannot guess the next.
const AHEAD: usize = 8;

/// Fetches `len` bytes from `at` on, wherever that is.
#[inline(always)]
fn fetch(at: *const u8, len: usize) {
    for line in (0..len).step_by(64) {
        // SAFETY: a fetch of an address that is not there does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line).cast()) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")]
fn pack_codes<C: Levels>(
    data: &[u8],
    row_bytes: usize,
    rows: usize,
    columns: Range<usize>,
    ldb: usize,
    out: &mut [u16],
) {
    let (first, last) = (columns.start / 32, columns.end / 32);
    let total = row_bytes / C::BYTES * C::GROUPS;
    assert!(columns.start.is_multiple_of(32) && columns.end.is_multiple_of(32) && last <= total);
    assert!(data.len() >= rows * row_bytes, "weights are shorter than the rows asked for");
    check(rows, 2 * (last - first), ldb, out);
    let mut factors = [Factors::NONE; 2];
    let span = first / C::GROUPS * C::BYTES..last.div_ceil(C::GROUPS) * C::BYTES;
    for pair in 0..rows.div_ceil(2) {
        for r in 0..2 {
            let at = data.as_ptr().wrapping_add((2 * (pair + AHEAD) + r) * row_bytes + span.start);
            fetch(at, span.len());
        }
        let used = (rows - 2 * pair).min(2);
        for run in first / 8..last.div_ceil(8) {
            let groups = first.max(run * 8)..last.min(run * 8 + 8);
            for r in 0..used {
                // SAFETY: what there is of a run of row `2 pair + r` (asserted above).
                unsafe {
                    let at = data.as_ptr().add((2 * pair + r) * row_bytes + run * C::RUN);
                    factors[r].read::<C>(at, (total - run * 8).min(8));
                }
            }
            for g in groups {
                let mut pairs = [_mm512_setzero_si512(); 2];
                for r in 0..used {
                    // SAFETY: group `g` of row `2 pair + r`.
                    [pairs[r]] = unsafe {
                        let at = data.as_ptr().add((2 * pair + r) * row_bytes + run * C::RUN);
                        weights::<C, 1>(at, g % 8, &factors[r])
                    };
                }
                for (h, line) in interleave(pairs[0], pairs[1]).into_iter().enumerate() {
                    let to = &mut out[(2 * (g - first) + h) * ldb + pair * 2 * PANEL..][..2 * PANEL];
                    // SAFETY: 64 bytes.
                    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), line) }
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn pack_weights<W: Weights>(
    data: &[u8],
    row_bytes: usize,
    rows: usize,
    columns: Range<usize>,
    ldb: usize,
    out: &mut [u16],
) {
    let panels = columns.len().div_ceil(PANEL);
    check(rows, panels, ldb, out);
    for pair in 0..rows.div_ceil(2) {
        for p in (0..panels).step_by(2) {
            let mut pairs = [_mm512_setzero_si512(); 2];
            for r in 0..(rows - 2 * pair).min(2) {
                let row = &data[(2 * pair + r) * row_bytes..][..row_bytes];
                let weights = W::group(row, columns.start / 32 + p / 2);
                // SAFETY: 32 numbers.
                let [low, high] = [0, 16].map(|at| unsafe { _mm512_loadu_ps(weights.as_ptr().add(at)) });
                [pairs[r]] = rounded(low, high);
            }
            for (h, line) in interleave(pairs[0], pairs[1]).into_iter().enumerate().take(panels - p) {
                let to = &mut out[(p + h) * ldb + pair * 2 * PANEL..][..2 * PANEL];
                // SAFETY: 64 bytes.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), line) }
            }
        }
    }
}
