//! Attention of one row of each query head that shares a key head, over f16 keys and values as they lie in the cache:
//! converted in registers, once for several heads. The sums run as those of [`super::lanes`] do, so the bits are theirs.

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
    let mut acc = [[_mm512_setzero_ps(); 4]; H];
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
                    // Not fused, as elsewhere: the processor multiplies and adds at the same time anyway.
                    acc[h][k] = _mm512_add_ps(acc[h][k], _mm512_mul_ps(q, key[k]));
                }
            }
        }
        for h in 0..H {
            let [a, b, c, d] = acc[h];
            // Lanes `i` and `i + 8`, then `i + 4`, `i + 2` and `i + 1`, of all four keys together.
            let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
            let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
            let all = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
            let all = _mm512_add_ps(all, _mm512_permute_ps::<0x0e>(all));
            let all = _mm512_add_ps(all, _mm512_permute_ps::<0x01>(all));
            let first = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
            let four = _mm512_castps512_ps128(_mm512_permutexvar_ps(first, all));
            match K {
                4 => _mm_storeu_ps(out.add(h * stride), four),
                _ => _mm_store_ss(out.add(h * stride), four),
            }
        }
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
                    acc[h][c] = _mm512_add_ps(acc[h][c], _mm512_mul_ps(p, value[c]));
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
