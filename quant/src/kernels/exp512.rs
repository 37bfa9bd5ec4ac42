//! The exponentials of a softmax in 512-bit registers: half of the plain function's instructions, by fused products and by
//! the one that multiplies by a power of two.

use std::arch::x86_64::*;

/// Replaces each number by `e^(x - max)`, and gives their sum. Where `x <= max` it is within 1 unit in the last place, and 0
/// far below.
#[target_feature(enable = "avx512f")]
pub(super) fn exp_sum(max: f32, x: &mut [f32]) -> f32 {
    let max = _mm512_set1_ps(max);
    let mut sums = [_mm512_setzero_ps(); 2];
    let (pairs, rest) = x.as_chunks_mut::<32>();
    for pair in pairs {
        let (a, b) = pair.split_at_mut(16);
        // SAFETY: sixteen numbers each.
        unsafe {
            let [x, y] = [
                exp(_mm512_sub_ps(_mm512_loadu_ps(a.as_ptr()), max)),
                exp(_mm512_sub_ps(_mm512_loadu_ps(b.as_ptr()), max)),
            ];
            _mm512_storeu_ps(a.as_mut_ptr(), x);
            _mm512_storeu_ps(b.as_mut_ptr(), y);
            sums = [_mm512_add_ps(sums[0], x), _mm512_add_ps(sums[1], y)];
        }
    }
    for part in rest.chunks_mut(16) {
        let mask = (u32::MAX >> (32 - part.len())) as __mmask16;
        // SAFETY: the mask leaves out what is not in `part`.
        unsafe {
            let x = exp(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, part.as_ptr()), max));
            _mm512_mask_storeu_ps(part.as_mut_ptr(), mask, x);
            sums[0] = _mm512_mask_add_ps(sums[0], mask, sums[0], x);
        }
    }
    _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]))
}

/// `e^x` as [`super::lanes::exp`] has it; NaN for NaN.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp(x: __m512) -> __m512 {
    // Below, 2^n is 0 anyway; minus infinity would become NaN. (Of two numbers one of which is NaN, the second is taken.)
    let x = _mm512_max_ps(_mm512_set1_ps(-110.0), x);
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm512_mul_ps(
        x,
        _mm512_set1_ps(std::f32::consts::LOG2_E),
    ));
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693_359_4), x);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.121_944_4e-4), r);
    let mut p = _mm512_set1_ps(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 5e-1] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    let one = _mm512_set1_ps(1.0);
    _mm512_scalef_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, one)), n)
}
