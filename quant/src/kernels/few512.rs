//! The few-row product in 512-bit registers, written once over [`Quads`] for one row of activations or several that
//! share each weight's unpacking.

use super::codes256::Codes;
use super::codes512::{Quads, by_quads};
use super::{DotBatch, DotCodes, QuantizedRow, QuantizedRows};
use crate::formats::{BlockFormat, Format, Q8_0};
use std::arch::x86_64::*;
use std::ops::Range;

/// The product for one row, where the format has one here.
pub(super) fn dot_codes(format: Format) -> Option<DotCodes> {
    fn entry<C: Quads>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
        let x = QuantizedRows { cols: x.q.len(), all: x };
        // SAFETY: this table is handed out only where `available`.
        unsafe { dots::<C>(data, x, 0..1, out) }
    }
    by_quads!(format, entry)
}

/// The product for several rows.
pub(super) fn dot_batch(format: Format) -> Option<DotBatch> {
    fn entry<C: Quads>(data: &[u8], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32]) {
        // SAFETY: this table is handed out only where `available`.
        unsafe { dots::<C>(data, x, rows, out) }
    }
    by_quads!(format, entry)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
fn dots<C: Quads>(data: &[u8], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32]) {
    let row_bytes = x.cols / C::FORMAT.block_len() * C::BYTES;
    let (groups, count) = (x.cols / 32, out.len() / rows.len().max(1));
    assert!(data.len() >= count * row_bytes, "weights are shorter than the rows asked for");
    assert!(x.all.q.len() >= rows.end * x.cols && x.all.d.len() >= rows.end * groups);
    assert!(x.all.s32.len() >= rows.end * groups && x.all.s16.len() >= 2 * rows.end * groups);
    assert!(out.len() == rows.len() * count);
    for o in (0..count).step_by(4) {
        let first = data[o * row_bytes..].as_ptr();
        let mut r = rows.start;
        while r < rows.end {
            let to = &mut out[(r - rows.start) * count + o..];
            // SAFETY: the assertions keep every row of weights, activations and sums inside the slices.
            r += unsafe {
                match (count - o, rows.end - r) {
                    (4.., 4..) => {
                        some::<C, 4, 4>(first, row_bytes, x, r, to, count);
                        4
                    }
                    (4.., 2..) => {
                        some::<C, 4, 2>(first, row_bytes, x, r, to, count);
                        2
                    }
                    (4.., _) => {
                        some::<C, 4, 1>(first, row_bytes, x, r, to, count);
                        1
                    }
                    (few, _) => {
                        for i in 0..few {
                            some::<C, 1, 1>(first.add(i * row_bytes), row_bytes, x, r, &mut to[i..], count);
                        }
                        1
                    }
                }
            };
        }
    }
}

/// Which of a run's factors meet the sixteen sums that begin with factor `first`.
const fn spread(first: usize) -> [i32; 16] {
    let mut from = [0; 16];
    let mut lane = 0;
    while lane < 16 {
        from[lane] = (first + lane / 4) as i32;
        lane += 1;
    }
    from
}
const SPREAD: [[i32; 16]; 4] = [spread(0), spread(4), spread(8), spread(12)];

/// The activations that a run of weights meets.
struct Meets<const B: usize> {
    /// 256 codes of each row, `apart` from each other.
    q: *const i8,
    apart: usize,
    /// Scales, as [`Quads::factors`] has those of weights.
    d: [__m512; B],
    /// Likewise the sums that minimums are multiplied by.
    sums: [__m512; B],
}

/// `R` rows of weights at `first` times the `B` rows of activations from `row` on, whose sums are `stride` apart.
///
/// # Safety
/// All of these rows, and AVX-512 with VNNI and VBMI.
#[inline(always)]
unsafe fn some<C: Quads, const R: usize, const B: usize>(
    first: *const u8,
    row_bytes: usize,
    x: QuantizedRows<'_>,
    row: usize,
    out: &mut [f32],
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let groups = x.cols / 32;
        let mut acc = [[_mm512_setzero_ps(); B]; R];
        let d = |b: usize, g: usize| x.all.d.as_ptr().add((row + b) * groups + g);
        let s32 = |b: usize, g: usize| x.all.s32.as_ptr().add((row + b) * groups + g);
        let q = |g: usize| x.all.q.as_ptr().add(row * x.cols + g * 32);
        let none = [_mm512_setzero_ps(); B];
        // Whole steps of R rows, at least so far that memory answers in time.
        let ahead = (12288usize.div_ceil(R * row_bytes.max(1))) * R * row_bytes;
        for run in 0..groups / 8 {
            let mut meets = Meets { q: q(run * 8), apart: x.cols, d: none, sums: none };
            for b in 0..B {
                meets.d[b] = _mm512_zextps256_ps512(_mm256_loadu_ps(d(b, run * 8)));
                if C::HALVES {
                    let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
                    meets.d[b] = _mm512_permutexvar_ps(twice, meets.d[b]);
                    meets.sums[b] = _mm512_loadu_ps(x.all.s16.as_ptr().add(2 * ((row + b) * groups + run * 8)));
                } else if C::HAS_MIN {
                    meets.sums[b] = _mm512_zextps256_ps512(_mm256_loadu_ps(s32(b, run * 8)));
                }
            }
            let first = first.add(run * C::RUN);
            for r in 0..R {
                // The same part of rows to come: several rows at a time are more streams than the processor follows by
                // itself. Into the second-nearest cache, as prefetches into the nearest one wait in its few miss buffers
                // (which halves the speed of a Zen 4). (A prefetch beyond the end of the weights does nothing.)
                for line in (0..C::RUN).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T1>(first.wrapping_add(r * row_bytes + ahead + line).cast());
                }
            }
            add_run::<C, R, B>(first, row_bytes, meets, 0, &mut acc);
        }
        let rest = groups % 8;
        if C::GROUPS == 1 && rest > 0 {
            let mut meets = Meets { q: std::ptr::null(), apart: x.cols, d: none, sums: none };
            if groups >= 8 {
                // The last eight once more; factors of 0 leave out those that have been.
                let (at, left) = (groups - 8, 0xff << (8 - rest) & 0xff);
                meets.q = q(at);
                for b in 0..B {
                    meets.d[b] = _mm512_maskz_loadu_ps(left, d(b, at));
                    meets.sums[b] = _mm512_maskz_loadu_ps(left, s32(b, at));
                }
                let skip = usize::from(rest <= 4);
                add_run::<C, R, B>(first.add(at * C::BYTES), row_bytes, meets, skip, &mut acc);
            } else {
                let mut blocks = [[0; 8 * LARGEST]; R];
                let mut codes = [[0; 256]; B];
                for r in 0..R {
                    first.add(r * row_bytes).copy_to_nonoverlapping(blocks[r].as_mut_ptr(), groups * C::BYTES);
                }
                for b in 0..B {
                    q(0).add(b * x.cols).copy_to_nonoverlapping(codes[b].as_mut_ptr(), groups * 32);
                    meets.d[b] = _mm512_maskz_loadu_ps((1 << groups) - 1, d(b, 0));
                    meets.sums[b] = _mm512_maskz_loadu_ps((1 << groups) - 1, s32(b, 0));
                }
                (meets.q, meets.apart) = (codes.as_ptr().cast(), 256);
                add_run::<C, R, B>(blocks.as_ptr().cast(), 8 * LARGEST, meets, 0, &mut acc);
            }
        }
        for b in 0..B {
            for r in 0..R {
                out[b * stride + r] = _mm512_reduce_add_ps(acc[r][b]);
            }
        }
    }
}

/// Bytes of the largest block of 32 weights here.
const LARGEST: usize = Q8_0::BYTES;

/// Adds the products of a run of `R` rows of weights at `first`, of its second half alone where `skip` is 1.
///
/// # Safety
/// That run in each row, what `meets` says, and AVX-512 with VNNI and VBMI.
#[inline(always)]
unsafe fn add_run<C: Quads, const R: usize, const B: usize>(
    first: *const u8,
    row_bytes: usize,
    meets: Meets<B>,
    skip: usize,
    acc: &mut [[__m512; B]; R],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut factors = [[_mm512_setzero_ps(); B]; R];
        for r in 0..R {
            let [scales, mins] = C::factors(first.add(r * row_bytes));
            for b in 0..B {
                factors[r][b] = _mm512_mul_ps(scales, meets.d[b]);
                if C::HAS_MIN {
                    acc[r][b] = _mm512_fnmadd_ps(mins, meets.sums[b], acc[r][b]);
                }
            }
        }
        for i in skip..2 {
            let mut codes = [[_mm512_setzero_si512(); 2]; R];
            for r in 0..R {
                codes[r] = C::quad(first.add(r * row_bytes), i);
            }
            for b in 0..B {
                let q = meets.q.add(b * meets.apart + 128 * i);
                let (x, y) = (_mm512_loadu_si512(q.cast()), _mm512_loadu_si512(q.add(64).cast()));
                if C::HALVES {
                    for (h, a) in [x, y].into_iter().enumerate() {
                        let lanes = _mm512_loadu_si512(SPREAD[2 * i + h].as_ptr().cast());
                        let start = below::<C>(_mm512_setzero_si512(), a);
                        for r in 0..R {
                            let dots = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, codes[r][h], a));
                            let factor = _mm512_permutexvar_ps(lanes, factors[r][b]);
                            acc[r][b] = _mm512_fmadd_ps(dots, factor, acc[r][b]);
                        }
                    }
                } else {
                    let lanes = _mm512_loadu_si512(SPREAD[i].as_ptr().cast());
                    let a = _mm512_permutex2var_epi64(x, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), y);
                    let c = _mm512_permutex2var_epi64(x, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), y);
                    let start = below::<C>(below::<C>(_mm512_setzero_si512(), a), c);
                    for r in 0..R {
                        let dots = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, codes[r][0], a), codes[r][1], c);
                        let factor = _mm512_permutexvar_ps(lanes, factors[r][b]);
                        acc[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), factor, acc[r][b]);
                    }
                }
            }
        }
    }
}

/// `start` less what raising the codes by `ZERO` adds to the sums.
#[inline(always)]
unsafe fn below<C: Codes>(start: __m512i, a: __m512i) -> __m512i {
    // SAFETY: the caller has AVX-512 with VNNI.
    unsafe {
        if C::ZERO == 0 {
            return start;
        }
        // Up to 128: as an unsigned byte, with the sign on the other side.
        let raised = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(C::ZERO as i8), a);
        _mm512_sub_epi32(start, raised)
    }
}
