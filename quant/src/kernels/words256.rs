//! [`super::words`] for AVX2: pairs of 16-bit products added in one step.

use super::codes256::{Codes, by_codes};
use super::lanes::compiled;
use super::panel256::end_group;
use super::{PANEL, PackWords, WordKernels, WordPanel, WordRowMut, WordRows, words};
use crate::formats::Format;
use std::arch::x86_64::*;
use std::ops::Range;

pub(super) const KERNELS: WordKernels =
    WordKernels { round: compiled!("avx2,fma,f16c", words::round, (x: &[f32], out: WordRowMut<'_>)), pack, mul };

fn pack(format: Format) -> PackWords {
    fn entry<C: Codes>(data: &[u8], rows: usize, cols: usize, codes: &mut [i16], scale: &mut [f32], min: &mut [f32]) {
        // SAFETY: this table is handed out only where AVX2 is.
        unsafe { pack_of::<C>(data, rows, cols, codes, scale, min) }
    }
    by_codes!(format, entry)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn pack_of<C: Codes>(data: &[u8], rows: usize, cols: usize, codes: &mut [i16], scale: &mut [f32], min: &mut [f32]) {
    let row_bytes = cols / C::FORMAT.block_len() * C::BYTES;
    let (groups, halves) = (cols / 32, if C::HALVES { 2 } else { 1 });
    assert!(rows <= PANEL && data.len() >= rows * row_bytes && codes.len() >= cols * PANEL);
    if rows < PANEL {
        scale.fill(0.0);
        min.fill(0.0);
    }
    for r in 0..rows {
        let mut put = |at: usize, s: f32, m: f32| {
            scale[at * PANEL + r] = s;
            if C::HAS_MIN {
                min[at * PANEL + r] = m;
            }
        };
        for run in 0..groups / 8 {
            let (mut s, mut m) = ([0f32; 16], [0f32; 16]);
            // SAFETY: a whole run of row `r`; sixteen numbers in each array.
            unsafe {
                let at = data.as_ptr().add(r * row_bytes + run * C::RUN);
                for (from, to) in [(C::scales(at), &mut s), (C::mins(at), &mut m)] {
                    _mm256_storeu_ps(to.as_mut_ptr(), from[0]);
                    _mm256_storeu_ps(to.as_mut_ptr().add(8), from[1]);
                }
            }
            (0..8 * halves).for_each(|i| put(run * 8 * halves + i, s[i], m[i]));
        }
        if C::GROUPS == 1 {
            for g in groups / 8 * 8..groups {
                // SAFETY: a group of row `r` behind its last whole run.
                let (s, m) = unsafe { C::scale_and_min(data.as_ptr().add(r * row_bytes + g / 8 * C::RUN), g % 8) };
                put(g, _mm256_cvtss_f32(s), m);
            }
        }
    }
    let zero = _mm256_set1_epi16(i16::from(C::ZERO));
    for g in 0..groups {
        for first in [0, 8] {
            let mut pairs = [[_mm256_setzero_si256(); 8]; 2];
            for r in first..rows.min(first + 8) {
                // SAFETY: group `g` of row `r`.
                let bytes = unsafe { C::codes(data.as_ptr().add(r * row_bytes + g / 8 * C::RUN), g % 8) };
                let halves = [_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes)];
                for h in 0..2 {
                    pairs[h][r - first] = _mm256_sub_epi16(_mm256_cvtepu8_epi16(halves[h]), zero);
                }
            }
            for h in 0..2 {
                for (k, line) in transposed(pairs[h]).into_iter().enumerate() {
                    let at = ((g * 16 + h * 8 + k) * PANEL + first) * 2;
                    // SAFETY: sixteen numbers from here on: `codes` has `cols / 2` lines of 32.
                    unsafe { _mm256_storeu_si256(codes.as_mut_ptr().add(at).cast(), line) }
                }
            }
        }
    }
}

/// Line `k` of the result holds the 32 bits `k` of each of the eight.
#[inline]
#[target_feature(enable = "avx2")]
fn transposed(a: [__m256i; 8]) -> [__m256i; 8] {
    let mut b = a;
    for i in 0..4 {
        b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    let mut c = b;
    for i in 0..2 {
        c[4 * i] = _mm256_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        c[4 * i + 1] = _mm256_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        c[4 * i + 2] = _mm256_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        c[4 * i + 3] = _mm256_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    for k in 0..4 {
        b[k] = _mm256_permute2x128_si256::<0x20>(c[k], c[4 + k]);
        b[4 + k] = _mm256_permute2x128_si256::<0x31>(c[k], c[4 + k]);
    }
    b
}

/// Rows that go through a panel together: their sums fill twelve of the sixteen registers.
const TOGETHER: usize = 6;
/// Columns of a panel that stay in the nearest cache while all rows go over them.
const NEAR: usize = 256;

fn mul(panels: &[WordPanel<'_>], x: WordRows<'_>, rows: Range<usize>, out: &mut [f32], stride: usize) {
    let cols = x.cols;
    assert!(x.q.len() >= rows.end * cols && x.d.len() >= rows.end * (cols / 32));
    assert!(x.s16.len() >= rows.end * (cols / 16) && x.s32.len() >= rows.end * (cols / 32));
    assert!(rows.is_empty() || out.len() >= (rows.len() - 1) * stride + panels.len() * PANEL);
    for (p, panel) in panels.iter().enumerate() {
        let factors = cols / panel.sub * PANEL;
        assert!(panel.codes.len() >= cols * PANEL && panel.scale.len() >= factors && matches!(panel.sub, 16 | 32));
        assert!(panel.min.is_empty() || panel.min.len() >= factors);
        for start in (0..cols).step_by(NEAR) {
            let columns = start..cols.min(start + NEAR);
            let mut r = rows.start;
            while r < rows.end {
                let out = &mut out[(r - rows.start) * stride + p * PANEL..];
                // SAFETY: this table is handed out only where AVX2 is; sizes are asserted above.
                r += unsafe {
                    match rows.end - r {
                        TOGETHER.. => some::<TOGETHER>(panel, x, r, columns.clone(), out, stride),
                        4.. => some::<4>(panel, x, r, columns.clone(), out, stride),
                        2.. => some::<2>(panel, x, r, columns.clone(), out, stride),
                        _ => some::<1>(panel, x, r, columns.clone(), out, stride),
                    }
                };
            }
        }
    }
}

/// The products of `R` rows and these columns, added to `out` where the columns are not the first. Gives `R`.
///
/// # Safety
/// What [`mul`] asserts.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn some<const R: usize>(
    panel: &WordPanel<'_>,
    x: WordRows<'_>,
    first: usize,
    columns: Range<usize>,
    out: &mut [f32],
    stride: usize,
) -> usize {
    let (cols, sub) = (x.cols, panel.sub);
    let (groups, sums) = (cols / sub, if sub == 16 { x.s16 } else { x.s32 });
    // SAFETY: rows `first..first + R` of every array, these columns of the panel: the caller's promise.
    unsafe {
        let out = out.as_mut_ptr();
        let mut acc = [[_mm256_setzero_ps(); 2]; R];
        if columns.start > 0 {
            for r in 0..R {
                acc[r] = [_mm256_loadu_ps(out.add(r * stride)), _mm256_loadu_ps(out.add(r * stride + 8))];
            }
        }
        let q = x.q.as_ptr().add(first * cols);
        for s in columns.start / sub..columns.end / sub {
            let mut dots = [[_mm256_setzero_si256(); 2]; R];
            for k in (s * sub / 2..(s + 1) * sub / 2).step_by(2) {
                // Two lines at a time: half as much counting.
                for k in [k, k + 1] {
                    let at = panel.codes.as_ptr().add(k * 2 * PANEL);
                    let w = [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(PANEL).cast())];
                    for r in 0..R {
                        let a = _mm256_set1_epi32(q.add(r * cols + 2 * k).cast::<i32>().read_unaligned());
                        for h in 0..2 {
                            dots[r][h] = _mm256_add_epi32(dots[r][h], _mm256_madd_epi16(w[h], a));
                        }
                    }
                }
            }
            let scale = panel.scale.as_ptr().add(s * PANEL);
            let min = (!panel.min.is_empty()).then(|| panel.min.as_ptr().add(s * PANEL));
            let d = (x.d.as_ptr().add(first * (cols / 32) + s * sub / 32), cols / 32);
            end_group(&mut acc, &dots, scale, min, d, (sums.as_ptr().add(first * groups + s), groups));
        }
        for r in 0..R {
            for h in 0..2 {
                _mm256_storeu_ps(out.add(r * stride + h * 8), acc[r][h]);
            }
        }
    }
    R
}
