//! The exponentials of a softmax in 512-bit registers, with the bits of [`super::lanes`]: that of 2^n is one instruction here.

use std::arch::x86_64::*;

/// [`super::lanes::exp_sum`].
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn exp_sum(max: f32, x: &mut [f32]) -> f32 {
    let max = _mm512_set1_ps(max);
    let mut sums = _mm512_setzero_ps();
    for part in x.chunks_mut(16) {
        let mask = (u32::MAX >> (32 - part.len())) as __mmask16;
        // SAFETY: the mask leaves out what is not in `part`.
        unsafe {
            let x = exp(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, part.as_ptr()), max));
            _mm512_mask_storeu_ps(part.as_mut_ptr(), mask, x);
            sums = _mm512_mask_add_ps(sums, mask, sums, x);
        }
    }
    // Lanes `i` and `i + 8`, then `i + 4`, `i + 2` and `i + 1`.
    let eight = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps::<1>(sums));
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

/// [`super::lanes::exp`]; products and sums are not fused there either.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp(x: __m512) -> __m512 {
    // Of two numbers one of which is NaN, the second is taken.
    let x = _mm512_max_ps(_mm512_set1_ps(-110.0), _mm512_min_ps(_mm512_set1_ps(100.0), x));
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm512_mul_ps(
        x,
        _mm512_set1_ps(std::f32::consts::LOG2_E),
    ));
    let r = _mm512_sub_ps(x, _mm512_mul_ps(n, _mm512_set1_ps(0.693_359_4)));
    let r = _mm512_add_ps(r, _mm512_mul_ps(n, _mm512_set1_ps(2.121_944_4e-4)));
    let mut p = _mm512_set1_ps(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 5e-1] {
        p = _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(c));
    }
    let y = _mm512_add_ps(_mm512_mul_ps(p, _mm512_mul_ps(r, r)), r);
    _mm512_scalef_ps(_mm512_add_ps(y, _mm512_set1_ps(1.0)), n)
}
