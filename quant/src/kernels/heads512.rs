//! Attention of one row of each query head that shares a key head, over f16 keys and values as they lie in the cache:
//! converted in registers, once for several heads.

use super::HalfHeads;
use super::ahead::Ahead;
use std::arch::x86_64::*;

pub(super) const KERNELS: HalfHeads = HalfHeads { scores, mix };

/// Numbers that are fetched ahead: what lies behind the keys and values asked for is asked for next.
const AHEAD: usize = 2048;

/// Calls `$function::<H, ..>` for the first `H` of `$left` heads, at most four.
macro_rules! up_to_four {
    ($left:expr, $function:ident::<$n:literal>($($arg:expr),*)) => {
        match $left {
            1 => $function::<1, $n>($($arg),*),
            2 => $function::<2, $n>($($arg),*),
            3 => $function::<3, $n>($($arg),*),
            _ => $function::<4, $n>($($arg),*),
        }
    };
}

fn scores(q: &[f32], dim: usize, keys: &[u16], out: &mut [f32], stride: usize) {
    let (heads, count, ahead) = (q.len() / dim, keys.len() / dim, Ahead::here());
    assert!(dim.is_multiple_of(16) && (heads == 0 || out.len() >= (heads - 1) * stride + count));
    for h in (0..heads).step_by(4) {
        let (q, out) = (q[h * dim..].as_ptr(), out[h * stride..].as_mut_ptr());
        let whole = count / 4 * 4;
        for j in (0..count).step_by(4) {
            // SAFETY: this table is handed out only where the processor has AVX-512; heads, keys and scores are inside
            // their slices (asserted above). A prefetch beyond them does nothing.
            unsafe {
                if h == 0 {
                    ahead.fetch(keys.as_ptr().wrapping_add(j * dim + AHEAD).cast(), 8 * dim);
                }
                if j < whole {
                    up_to_four!(heads - h, dots::<4>(q, dim, keys[j * dim..].as_ptr(), out.add(j), stride));
                } else {
                    for j in j..count {
                        up_to_four!(heads - h, dots::<1>(q, dim, keys[j * dim..].as_ptr(), out.add(j), stride));
                    }
                }
            }
        }
    }
}

/// # Safety
/// AVX-512, `H` queries, `K` (1 or 4) keys and room for their scores.
#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn dots<const H: usize, const K: usize>(
    q: *const f32,
    dim: usize,
    keys: *const u16,
    out: *mut f32,
    stride: usize,
) {
    let mut acc = [_mm512_setzero_ps(); 16];
    // SAFETY: the caller's promise.
    unsafe {
        for c in (0..dim).step_by(16) {
            let mut key = [_mm512_setzero_ps(); K];
            for k in 0..K {
                key[k] = _mm512_cvtph_ps(_mm256_loadu_si256(keys.add(k * dim + c).cast()));
            }
            for h in 0..H {
                let q = _mm512_loadu_ps(q.add(h * dim + c));
                for k in 0..K {
                    acc[4 * h + k] = _mm512_fmadd_ps(q, key[k], acc[4 * h + k]);
                }
            }
        }
        let sums = added_up(acc);
        let four = [
            _mm512_castps512_ps128(sums),
            _mm512_extractf32x4_ps::<1>(sums),
            _mm512_extractf32x4_ps::<2>(sums),
            _mm512_extractf32x4_ps::<3>(sums),
        ];
        for h in 0..H {
            match K {
                4 => _mm_storeu_ps(out.add(h * stride), four[h]),
                _ => _mm_store_ss(out.add(h * stride), four[h]),
            }
        }
    }
}

/// Lane `i`: the numbers of `acc[i]`, added up. Of two registers one goes on, half of each: what stays in its lanes is taken
/// by a blend, what changes places by one permutation.
#[inline(always)]
unsafe fn added_up(mut acc: [__m512; 16]) -> __m512 {
    // SAFETY: the caller has AVX-512.
    unsafe {
        let by_four = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
        let by_one = _mm512_setr_epi32(1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
        for i in 0..8 {
            let (a, b) = (acc[i], acc[i + 8]);
            acc[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4::<0x4e>(a, b));
        }
        for i in 0..4 {
            let (a, b) = (acc[i], acc[i + 4]);
            acc[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, a, b), _mm512_permutex2var_ps(a, by_four, b));
        }
        for i in 0..2 {
            let (a, b) = (acc[i], acc[i + 2]);
            acc[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps::<0x4e>(a, b));
        }
        let [a, b, ..] = acc;
        _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, a, b), _mm512_permutex2var_ps(a, by_one, b))
    }
}

fn mix(p: &[f32], stride: usize, heads: usize, values: &[u16], dim: usize, out: &mut [f32], distance: usize) {
    let count = values.len() / dim;
    assert!(dim.is_multiple_of(16) && (heads == 0 || p.len() >= (heads - 1) * stride + count));
    assert!(heads == 0 || out.len() >= (heads - 1) * distance + dim);
    for h in (0..heads).step_by(4) {
        let (p, out) = (p[h * stride..].as_ptr(), out[h * distance..].as_mut_ptr());
        let mut c = 0;
        while c < dim {
            let v = values.as_ptr().wrapping_add(c);
            // SAFETY: as in `scores`.
            unsafe {
                if dim - c >= 64 {
                    up_to_four!(heads - h, sums::<4>(p, stride, count, v, dim, out.add(c), distance));
                    c += 64;
                } else {
                    up_to_four!(heads - h, sums::<1>(p, stride, count, v, dim, out.add(c), distance));
                    c += 16;
                }
            }
        }
    }
}

/// # Safety
/// AVX-512, `H` rows of `count` weights and of `16 C` sums, and `count` values.
#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn sums<const H: usize, const C: usize>(
    p: *const f32,
    stride: usize,
    count: usize,
    values: *const u16,
    dim: usize,
    out: *mut f32,
    distance: usize,
) {
    let mut acc = [[_mm512_setzero_ps(); C]; H];
    let ahead = Ahead::here();
    // SAFETY: the caller's promise.
    unsafe {
        for h in 0..H {
            for c in 0..C {
                acc[h][c] = _mm512_loadu_ps(out.add(h * distance + c * 16));
            }
        }
        for j in 0..count {
            ahead.fetch(values.wrapping_add(j * dim + AHEAD).cast(), 32 * C);
            let mut value = [_mm512_setzero_ps(); C];
            for c in 0..C {
                value[c] = _mm512_cvtph_ps(_mm256_loadu_si256(values.add(j * dim + c * 16).cast()));
            }
            for h in 0..H {
                let p = _mm512_set1_ps(*p.add(h * stride + j));
                for c in 0..C {
                    acc[h][c] = _mm512_fmadd_ps(p, value[c], acc[h][c]);
                }
            }
        }
        for h in 0..H {
            for c in 0..C {
                _mm512_storeu_ps(out.add(h * distance + c * 16), acc[h][c]);
            }
        }
    }
}
