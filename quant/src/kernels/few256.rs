//! The few-row product in 256-bit registers, written once over [`Codes`] for AVX2 and AVX-512.

use super::QuantizedRow;
use super::ahead::Ahead;
use super::codes256::{Codes, Dot, halves_joined};
use std::arch::x86_64::*;

/// See [`super::DotCodes`].
///
/// # Safety
/// AVX2, FMA, F16C and what `D` needs.
#[inline(always)]
pub(super) unsafe fn dot_codes<C: Codes, D: Dot>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
    let row_bytes = x.q.len() / C::FORMAT.block_len() * C::BYTES;
    assert!(data.len() >= out.len() * row_bytes, "weights are shorter than the rows asked for");
    assert!(x.d.len() * 32 == x.q.len() && x.s32.len() == x.d.len() && x.s16.len() == 2 * x.d.len());
    let (fours, rest) = out.as_chunks_mut::<4>();
    let (mut row, ahead) = (data.as_ptr(), Ahead::here());
    for out in fours {
        // SAFETY: the assertions keep every row and every group inside the slices.
        unsafe {
            dot_some::<C, D, 4>(row, row_bytes, ahead, x, out);
            row = row.add(4 * row_bytes);
        }
    }
    for out in rest {
        // SAFETY: as above.
        unsafe {
            dot_some::<C, D, 1>(row, row_bytes, ahead, x, std::array::from_mut(out));
            row = row.add(row_bytes);
        }
    }
}

#[repr(align(64))]
struct Factors([f32; 16]);

/// What the products of a run's groups are multiplied by: `R` rows' scales times the activations', and the minimums
/// added up. Functions rather than closures: a closure would not take on the target features of the kernel.
#[inline(always)]
unsafe fn prepare<C: Codes, const R: usize>(
    first: *const u8,
    row_bytes: usize,
    d: *const f32,
    s32: *const f32,
    s16: *const f32,
    factors: &mut [Factors; R],
    mins: &mut [__m256; R],
) {
    // SAFETY: the caller vouches for a run in each row, and eight (`s16`: sixteen) numbers behind each pointer.
    unsafe {
        let d = _mm256_loadu_ps(d);
        for r in 0..R {
            let at = first.add(r * row_bytes);
            let [a, b] = C::scales(at);
            let to = factors[r].0.as_mut_ptr();
            if C::HALVES {
                let low = _mm256_permutevar8x32_ps(d, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
                let high = _mm256_permutevar8x32_ps(d, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
                _mm256_store_ps(to, _mm256_mul_ps(a, low));
                _mm256_store_ps(to.add(8), _mm256_mul_ps(b, high));
            } else {
                _mm256_store_ps(to, _mm256_mul_ps(a, d));
            }
            if C::HAS_MIN {
                let [a, b] = C::mins(at);
                if C::HALVES {
                    mins[r] = _mm256_fmadd_ps(a, _mm256_loadu_ps(s16), mins[r]);
                    mins[r] = _mm256_fmadd_ps(b, _mm256_loadu_ps(s16.add(8)), mins[r]);
                } else {
                    mins[r] = _mm256_fmadd_ps(a, _mm256_loadu_ps(s32), mins[r]);
                }
            }
        }
    }
}

/// Which of eight factors meet the eight sums that begin with factor `first`.
const fn spread(first: usize) -> [i32; 8] {
    let mut from = [0; 8];
    let mut lane = 0;
    while lane < 8 {
        from[lane] = (first + lane / 4) as i32;
        lane += 1;
    }
    from
}
const SPREAD: [[i32; 8]; 4] = [spread(0), spread(2), spread(4), spread(6)];

/// Adds the products of the groups `2 I` and `2 I + 1` of the run at `first` and of the 64 activations at `q`.
#[inline(always)]
unsafe fn multiply<C: Codes, D: Dot, const R: usize, const I: usize>(
    first: *const u8,
    row_bytes: usize,
    q: *const i8,
    factors: &[Factors; R],
    sums: &mut [__m256; R],
) {
    // SAFETY: the caller vouches for the groups in each row and for 64 activations.
    unsafe {
        let a = [_mm256_loadu_si256(q.cast()), _mm256_loadu_si256(q.add(32).cast())];
        let a = if C::APART { a } else { halves_joined(a[0], a[1]) };
        let start = [D::start(C::ZERO, a[0]), D::start(C::ZERO, a[1])];
        let both = _mm256_add_epi32(start[0], start[1]);
        let place = |i: usize| _mm256_loadu_si256(SPREAD[i].as_ptr().cast());
        for r in 0..R {
            let codes = C::pair(first.add(r * row_bytes), I);
            let factor = factors[r].0.as_ptr();
            if C::APART {
                for h in 0..2 {
                    let dots = _mm256_cvtepi32_ps(D::dot(start[h], C::ZERO, codes[h], a[h]));
                    let factor = match C::HALVES {
                        true => _mm256_permutevar8x32_ps(_mm256_load_ps(factor.add(I / 2 * 8)), place(I % 2 * 2 + h)),
                        false => _mm256_broadcast_ss(&*factor.add(2 * I + h)),
                    };
                    sums[r] = _mm256_fmadd_ps(dots, factor, sums[r]);
                }
            } else {
                let dots = _mm256_cvtepi32_ps(D::dots(both, C::ZERO, codes, a));
                let factor = _mm256_permutevar8x32_ps(_mm256_load_ps(factor), place(I));
                sums[r] = _mm256_fmadd_ps(dots, factor, sums[r]);
            }
        }
    }
}

#[inline(always)]
unsafe fn dot_some<C: Codes, D: Dot, const R: usize>(
    first: *const u8,
    row_bytes: usize,
    ahead: Ahead,
    x: QuantizedRow<'_>,
    out: &mut [f32; R],
) {
    // SAFETY: the caller vouches for `R` rows of weights and the activations' sizes.
    unsafe {
        let groups = x.d.len();
        let mut sums = [_mm256_setzero_ps(); R];
        let mut mins = [_mm256_setzero_ps(); R];
        let mut factors = [const { Factors([0.0; 16]) }; R];
        let q = x.q.as_ptr();
        for run in 0..groups / 8 {
            ahead.fetch_behind(first, R, row_bytes, run * C::RUN, C::RUN);
            let (first, at) = (first.add(run * C::RUN), run * 8);
            let (d, s32, s16) = (x.d.as_ptr().add(at), x.s32.as_ptr().add(at), x.s16.as_ptr().add(2 * at));
            prepare::<C, R>(first, row_bytes, d, s32, s16, &mut factors, &mut mins);
            // From here on factors are read from memory: broadcast from there they cost no place among the products, which the
            // compiler would give to shuffles of what it has in registers.
            std::arch::asm!("/* {0} */", in(reg) factors.as_mut_ptr(), options(nostack, preserves_flags));
            let q = q.add(at * 32);
            multiply::<C, D, R, 0>(first, row_bytes, q, &factors, &mut sums);
            multiply::<C, D, R, 1>(first, row_bytes, q.add(64), &factors, &mut sums);
            multiply::<C, D, R, 2>(first, row_bytes, q.add(128), &factors, &mut sums);
            multiply::<C, D, R, 3>(first, row_bytes, q.add(192), &factors, &mut sums);
        }
        if C::GROUPS == 1 {
            let done = groups / 8 * C::RUN;
            ahead.fetch_behind(first, R, row_bytes, done, row_bytes - done);
            let first = first.add(done);
            for g in 0..groups % 8 {
                let at = groups / 8 * 8 + g;
                let a = _mm256_loadu_si256(q.add(at * 32).cast());
                let start = D::start(C::ZERO, a);
                let d = _mm256_set1_ps(x.d[at]);
                for r in 0..R {
                    let row = first.add(r * row_bytes);
                    let (scale, min) = C::scale_and_min(row, g);
                    let dots = _mm256_cvtepi32_ps(D::dot(start, C::ZERO, C::codes(row, g), a));
                    sums[r] = _mm256_fmadd_ps(dots, _mm256_mul_ps(scale, d), sums[r]);
                    if C::HAS_MIN {
                        let min = _mm256_zextps128_ps256(_mm_set_ss(min * x.s32[at]));
                        mins[r] = _mm256_add_ps(mins[r], min);
                    }
                }
            }
        }
        for r in 0..R {
            out[r] = add_across(if C::HAS_MIN { _mm256_sub_ps(sums[r], mins[r]) } else { sums[r] });
        }
    }
}

/// The sum of eight lanes.
///
/// # Safety
/// AVX.
#[inline(always)]
pub(super) unsafe fn add_across(x: __m256) -> f32 {
    // SAFETY: the caller has AVX.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}
