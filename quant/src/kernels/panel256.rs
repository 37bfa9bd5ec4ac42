//! The end of a scale group in products of panels by 256-bit registers: sums of integers become floats.

use std::arch::x86_64::*;

/// `acc += dots * scale * d - min * sum` for `R` rows and the sixteen outputs of a panel. `d` and `sums`: the first row's,
/// and the distance to the next row's.
///
/// # Safety
/// AVX2 and FMA; sixteen numbers at `scale`, and at `min` where there is one; `R` numbers at the distances given.
#[inline(always)]
pub(super) unsafe fn end_group<const R: usize>(
    acc: &mut [[__m256; 2]; R],
    dots: &[[__m256i; 2]; R],
    scale: *const f32,
    min: Option<*const f32>,
    d: (*const f32, usize),
    sums: (*const f32, usize),
) {
    // SAFETY: the caller's promise.
    unsafe {
        for h in 0..2 {
            let scale = _mm256_loadu_ps(scale.add(h * 8));
            for r in 0..R {
                let factor = _mm256_mul_ps(scale, _mm256_set1_ps(*d.0.add(r * d.1)));
                acc[r][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r][h]), factor, acc[r][h]);
            }
            if let Some(min) = min {
                let min = _mm256_loadu_ps(min.add(h * 8));
                for r in 0..R {
                    acc[r][h] = _mm256_fnmadd_ps(min, _mm256_set1_ps(*sums.0.add(r * sums.1)), acc[r][h]);
                }
            }
        }
    }
}
