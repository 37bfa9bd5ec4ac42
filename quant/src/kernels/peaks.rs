//! What the arithmetic units do at most: loops over registers whose multiplications wait for nothing but the unit.

use super::Peaks;
use super::amx;
use super::bf16;
use std::arch::x86_64::*;
use std::hint::black_box;

/// Independent sums: more than the longest latency times the units.
const SUMS: usize = 12;

pub(super) const AVX2: Peaks = Peaks { int8: Some(int8_256), bf16: None, f32: Some(f32_256) };

/// The peaks of a processor that has AVX-512 with VNNI.
pub(super) fn avx512() -> Peaks {
    let bf16: Option<fn(u64) -> u64> = if bf16::pays() { Some(bf16_512) } else { None };
    Peaks { int8: Some(int8_512), bf16, f32: Some(f32_512) }
}

/// The peaks of a processor that has AMX.
pub(super) fn amx() -> Peaks {
    Peaks { bf16: Some(amx::peak), ..avx512() }
}

/// `fn $name(steps)`: each step does `$step` to every one of the sums, `$operations` operations each.
macro_rules! peak {
    ($name:ident, $features:literal, $zero:expr, $operations:expr, |$acc:ident, $a:ident, $b:ident| $step:expr, $values:expr) => {
        pub(super) fn $name(steps: u64) -> u64 {
            #[target_feature(enable = $features)]
            fn inner(steps: u64) {
                let ($a, $b) = black_box($values);
                let mut sums = [$zero; SUMS];
                for _ in 0..steps {
                    for $acc in &mut sums {
                        *$acc = $step;
                    }
                }
                black_box(sums);
            }
            // SAFETY: the table with this entry is handed out only where the processor has the features.
            unsafe { inner(steps) };
            steps * SUMS as u64 * 2 * $operations
        }
    };
}

peak!(
    int8_512,
    "avx512f,avx512vnni",
    _mm512_setzero_si512(),
    64,
    |acc, a, b| _mm512_dpbusd_epi32(*acc, a, b),
    (_mm512_set1_epi8(3), _mm512_set1_epi8(2))
);
peak!(
    bf16_512,
    "avx512f,avx512bf16",
    _mm512_setzero_ps(),
    32,
    |acc, a, b| _mm512_dpbf16_ps(*acc, bf16_of(a), bf16_of(b)),
    (_mm512_set1_epi32(0x3f80_3f80), _mm512_set1_epi32(0x3f80_3f80))
);
peak!(
    f32_512,
    "avx512f",
    _mm512_setzero_ps(),
    16,
    |acc, a, b| _mm512_fmadd_ps(a, b, *acc),
    (_mm512_set1_ps(3.0), _mm512_set1_ps(2.0))
);
peak!(
    int8_256,
    "avx2",
    _mm256_setzero_si256(),
    32,
    |acc, a, b| _mm256_add_epi32(
        *acc,
        _mm256_madd_epi16(_mm256_maddubs_epi16(a, _mm256_xor_si256(b, *acc)), _mm256_set1_epi16(1))
    ),
    (_mm256_set1_epi8(3), _mm256_set1_epi8(2))
);
peak!(
    f32_256,
    "avx2,fma",
    _mm256_setzero_ps(),
    8,
    |acc, a, b| _mm256_fmadd_ps(a, b, *acc),
    (_mm256_set1_ps(3.0), _mm256_set1_ps(2.0))
);

#[inline]
#[target_feature(enable = "avx512f")]
fn bf16_of(x: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of any content.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(x) }
}
