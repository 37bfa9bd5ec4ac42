//! Codes of a block format as numbers of bf16.
//!
//! Where there are few codes, each is decoded and rounded once for the weights that share a scale, and these take theirs
//! from that table: the same numbers by fewer steps.

use super::rounded;
use crate::formats::*;
use crate::kernels::codes256::{Codes, MXFP4_TABLE};
use std::arch::x86_64::*;

/// # Safety
/// The methods need the instruction sets of [`weights`], and group `g` of `run` (see [`Codes`]). They are always inlined,
/// so that they take on the target features of the kernel that calls them.
pub(super) trait Levels: Codes {
    /// The numbers that codes stand for, before the scale: 16 or 32, or none where there are more of them.
    const LEVELS: &'static [f32] = &[];
    /// For each weight of a group the place of its level, in the last five bits of a word. Of sixteen levels, the last four
    /// bits count; with [`BlockFormat::HALVES`] the others must be 0.
    #[inline(always)]
    unsafe fn places(run: *const u8, g: usize) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtepu8_epi16(Self::codes(run, g)) }
    }
    /// The weights of a group, before the scale.
    #[inline(always)]
    unsafe fn values(run: *const u8, g: usize) -> [__m512; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let (codes, zero) = (Self::codes(run, g), _mm512_set1_epi32(i32::from(Self::ZERO)));
            let low = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes));
            let high = _mm512_cvtepu8_epi32(_mm256_extracti128_si256::<1>(codes));
            [_mm512_cvtepi32_ps(_mm512_sub_epi32(low, zero)), _mm512_cvtepi32_ps(_mm512_sub_epi32(high, zero))]
        }
    }
}

/// The numbers from `-zero` on.
const fn from<const N: usize>(zero: u8) -> [f32; N] {
    let mut levels = [0.0; N];
    let mut i = 0;
    while i < N {
        levels[i] = i as f32 - zero as f32;
        i += 1;
    }
    levels
}

const fn of(table: &[i8; 16]) -> [f32; 16] {
    let mut levels = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        levels[i] = table[i] as f32;
        i += 1;
    }
    levels
}

/// 16 bytes of two 4-bit codes, the low ones first, as places.
#[inline(always)]
unsafe fn nibbles(p: *const u8) -> __m512i {
    // SAFETY: the caller's pointer has 16 bytes; byte `i` goes to the words `i` and `16 + i`, and is shifted in the latter.
    unsafe {
        let x = _mm512_castsi128_si512(_mm_loadu_si128(p.cast()));
        let (low, high) = (0x0003_0002_0001_0000, 0x0007_0006_0005_0004);
        let (low, high) = ([low, high], [low + 0x0008_0008_0008_0008, high + 0x0008_0008_0008_0008]);
        let from = _mm512_setr_epi64(low[0], low[1], high[0], high[1], low[0], low[1], high[0], high[1]);
        let by = _mm512_setr_epi64(0, 0, 0, 0, FOURS, FOURS, FOURS, FOURS);
        _mm512_srlv_epi16(_mm512_permutexvar_epi8(from, x), by)
    }
}

const FOURS: i64 = 0x0004_0004_0004_0004;

/// Formats of 32 weights with an f16 scale, perhaps a (negated) f16 minimum, and 4-bit codes at `$at`.
macro_rules! four_bits {
    ($name:ident, $at:expr, $levels:expr) => {
        impl Levels for $name {
            const LEVELS: &'static [f32] = $levels;
            #[inline(always)]
            unsafe fn places(run: *const u8, g: usize) -> __m512i {
                // SAFETY: the caller keeps to the block.
                unsafe { nibbles(run.add(g * Self::BYTES + $at)) }
            }
        }
    };
}

four_bits!(Q4_0, 2, &from::<16>(8));
four_bits!(Q4_1, 4, &from::<16>(0));
four_bits!(IQ4_NL, 2, &of(&IQ4_TABLE));

/// Formats whose codes are found as for 8-bit products.
macro_rules! few_codes {
    ($name:ident, $levels:expr) => {
        impl Levels for $name {
            const LEVELS: &'static [f32] = $levels;
        }
    };
}

few_codes!(Q5_0, &from::<32>(16));
few_codes!(Q5_1, &from::<32>(0));
few_codes!(Q4_Z, &from::<32>(16));
few_codes!(Q2_K, &from::<16>(0));
few_codes!(Q3_K, &from::<16>(4));
few_codes!(Q5_K, &from::<32>(0));

impl Levels for Q4_K {
    const LEVELS: &'static [f32] = &from::<16>(0);
    #[inline(always)]
    unsafe fn places(run: *const u8, g: usize) -> __m512i {
        // SAFETY: 32 bytes for two groups.
        unsafe {
            let x = _mm512_cvtepu8_epi16(_mm256_loadu_si256(run.add(16 + 32 * (g / 2)).cast()));
            _mm512_srl_epi16(x, _mm_cvtsi64_si128(4 * (g % 2) as i64))
        }
    }
}

impl Levels for IQ4_XS {
    const LEVELS: &'static [f32] = &of(&IQ4_TABLE);
    #[inline(always)]
    unsafe fn places(run: *const u8, g: usize) -> __m512i {
        // SAFETY: the caller keeps to the block.
        unsafe { nibbles(run.add(8 + 16 * g)) }
    }
}

impl Levels for MXFP4 {
    const LEVELS: &'static [f32] = &of(&MXFP4_TABLE);
    #[inline(always)]
    unsafe fn places(run: *const u8, g: usize) -> __m512i {
        // SAFETY: the caller keeps to the block.
        unsafe { nibbles(run.add(g * Self::BYTES + 1)) }
    }
}

impl Levels for Q6_K {}

/// Formats whose codes are signed bytes at the end of each block.
macro_rules! bytes {
    ($name:ident) => {
        impl Levels for $name {
            #[inline(always)]
            unsafe fn values(run: *const u8, g: usize) -> [__m512; 2] {
                // SAFETY: the caller keeps to the block.
                unsafe {
                    let at = run.add((g + 1) * Self::BYTES - 32);
                    let (low, high) = (_mm_loadu_si128(at.cast()), _mm_loadu_si128(at.add(16).cast()));
                    [_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high))]
                }
            }
        }
    };
}

bytes!(Q8_0);
bytes!(Q8_F);
bytes!(Q8_Z);

/// Scales and minimums of one row's run: of each group, or of each half of one.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Factors {
    scale: [f32; 16],
    min: [f32; 16],
}

impl Factors {
    pub(super) const NONE: Factors = Factors { scale: [0.0; 16], min: [0.0; 16] };

    /// Reads those of the first `groups` groups of a run.
    ///
    /// # Safety
    /// They are there; of formats of eight groups a block all are.
    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(super) unsafe fn read<C: Codes>(&mut self, run: *const u8, groups: usize) {
        if C::GROUPS == 1 && groups < 8 {
            for g in 0..groups {
                // SAFETY: the caller's promise.
                let (scale, min) = unsafe { C::scale_and_min(run, g) };
                (self.scale[g], self.min[g]) = (_mm256_cvtss_f32(scale), min);
            }
            return;
        }
        // SAFETY: the caller's promise, and sixteen numbers in each array.
        unsafe {
            let ([a, b], to) = (C::scales(run), self.scale.as_mut_ptr());
            _mm256_store_ps(to, a);
            _mm256_store_ps(to.add(8), b);
            if C::HAS_MIN {
                let ([a, b], to) = (C::mins(run), self.min.as_mut_ptr());
                _mm256_store_ps(to, a);
                _mm256_store_ps(to.add(8), b);
            }
        }
    }
}

/// The 32 weights of group `g`, decoded as the format says, in parts of bf16.
///
/// # Safety
/// `run` has group `g`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")]
pub(super) unsafe fn weights<C: Levels, const PARTS: usize>(
    run: *const u8,
    g: usize,
    factors: &Factors,
) -> [__m512i; PARTS] {
    const { assert!(matches!(C::LEVELS.len(), 0 | 16 | 32) && !(C::HALVES && C::LEVELS.len() == 32)) };
    // SAFETY: the caller's promise; sixteen levels from each place that is read.
    unsafe {
        let [a, b] = if C::HALVES { [2 * g, 2 * g + 1] } else { [g, g] };
        let Factors { scale, min } = factors;
        let scale = [_mm512_set1_ps(scale[a]), _mm512_set1_ps(scale[b])];
        let min = [_mm512_set1_ps(min[a]), _mm512_set1_ps(min[b])];
        let mut values = if C::LEVELS.is_empty() {
            C::values(run, g)
        } else {
            let levels = C::LEVELS.as_ptr();
            [_mm512_loadu_ps(levels), _mm512_loadu_ps(levels.add(C::LEVELS.len() - 16))]
        };
        for h in 0..2 {
            values[h] = _mm512_mul_ps(scale[h], values[h]);
            if C::HAS_MIN {
                values[h] = _mm512_sub_ps(values[h], min[h]);
            }
        }
        let mut parts = rounded::<PARTS>(values[0], values[1]);
        if !C::LEVELS.is_empty() {
            let mut places = C::places(run, g);
            if C::HALVES {
                // The second half has its own scale: its levels lie behind those of the first.
                let second = FOURS << 2;
                places = _mm512_or_si512(places, _mm512_setr_epi64(0, 0, 0, 0, second, second, second, second));
            }
            for part in &mut parts {
                *part = _mm512_permutexvar_epi16(places, *part);
            }
        }
        parts
    }
}
