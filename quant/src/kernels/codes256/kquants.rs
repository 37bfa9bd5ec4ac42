//! Blocks of 256 weights.

use super::*;

/// The 4-bit codes of two groups that lie in the same 32 bytes, one in the low halves and one in the high ones.
#[inline(always)]
unsafe fn low_and_high(p: *const u8) -> [__m256i; 2] {
    // SAFETY: the caller's pointer has 32 bytes.
    unsafe {
        let (x, mask) = (load(p), _mm256_set1_epi8(15));
        [_mm256_and_si256(x, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask)]
    }
}

impl Codes for Q2_K {
    const ZERO: u8 = 0;
    #[inline(always)]
    unsafe fn codes(run: *const u8, g: usize) -> __m256i {
        // SAFETY: the caller keeps to the block.
        unsafe { _mm256_and_si256(shift_right(load(run.add(16 + 32 * (g / 4))), 2 * (g % 4)), _mm256_set1_epi8(3)) }
    }
    #[inline(always)]
    unsafe fn scales(run: *const u8) -> [__m256; 2] {
        // SAFETY: 16 bytes of scales at the start, f16 at 80.
        unsafe {
            let s = _mm_and_si128(_mm_loadu_si128(run.cast()), _mm_set1_epi8(15));
            let d = half_at(run.add(80));
            [_mm256_mul_ps(d, bytes_to_f32(s)), _mm256_mul_ps(d, bytes_to_f32(_mm_srli_si128::<8>(s)))]
        }
    }
    #[inline(always)]
    unsafe fn mins(run: *const u8) -> [__m256; 2] {
        // SAFETY: 16 bytes of minimums at the start, f16 at 82.
        unsafe {
            let m = _mm_and_si128(_mm_srli_epi16::<4>(_mm_loadu_si128(run.cast())), _mm_set1_epi8(15));
            let d = half_at(run.add(82));
            [_mm256_mul_ps(d, bytes_to_f32(m)), _mm256_mul_ps(d, bytes_to_f32(_mm_srli_si128::<8>(m)))]
        }
    }
}

impl Codes for Q3_K {
    const ZERO: u8 = 4;
    #[inline(always)]
    unsafe fn codes(run: *const u8, g: usize) -> __m256i {
        // SAFETY: the caller keeps to the block.
        unsafe {
            let low = _mm256_and_si256(shift_right(load(run.add(32 + 32 * (g / 4))), 2 * (g % 4)), _mm256_set1_epi8(3));
            let high = _mm256_and_si256(shift_right(load(run), g), _mm256_set1_epi8(1));
            _mm256_or_si256(low, _mm256_slli_epi16::<2>(high))
        }
    }
    #[inline(always)]
    unsafe fn scales(run: *const u8) -> [__m256; 2] {
        // SAFETY: 12 bytes of scales at 96, f16 at 108.
        unsafe {
            let word = |i: usize| run.add(96 + 4 * i).cast::<u32>().read_unaligned();
            let (a, b, c) = (word(0), word(1), word(2));
            let (low, two) = (0x0f0f_0f0f, 0x0303_0303);
            let s = _mm_setr_epi32(
                (a & low | (c & two) << 4) as i32,
                (b & low | (c >> 2 & two) << 4) as i32,
                (a >> 4 & low | (c >> 4 & two) << 4) as i32,
                (b >> 4 & low | (c >> 6 & two) << 4) as i32,
            );
            let s = _mm_sub_epi8(s, _mm_set1_epi8(32));
            let d = half_at(run.add(108));
            [_mm256_mul_ps(d, bytes_to_f32(s)), _mm256_mul_ps(d, bytes_to_f32(_mm_srli_si128::<8>(s)))]
        }
    }
}

/// The 6-bit scales and minimums of `Q4_K` and `Q5_K`, eight bytes each.
#[inline(always)]
unsafe fn six_bits(p: *const u8) -> (__m128i, __m128i) {
    // SAFETY: the caller's pointer has 12 bytes.
    unsafe {
        let word = |i: usize| u64::from(p.add(4 * i).cast::<u32>().read_unaligned());
        let (a, b, c) = (word(0), word(1), word(2));
        let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x0303_0303);
        let scales = a & six | (c & four | (a >> 6 & two) << 4) << 32;
        let mins = b & six | (c >> 4 & four | (b >> 6 & two) << 4) << 32;
        (_mm_cvtsi64_si128(scales as i64), _mm_cvtsi64_si128(mins as i64))
    }
}

macro_rules! four_and_five_bits {
    ($name:ident, |$block:ident, $g:ident| $codes:expr, |$run:ident, $i:ident| $pair:expr) => {
        impl Codes for $name {
            const ZERO: u8 = 0;
            const APART: bool = true;
            #[inline(always)]
            unsafe fn pair($run: *const u8, $i: usize) -> [__m256i; 2] {
                // SAFETY: the caller keeps to the block.
                unsafe { $pair }
            }
            #[inline(always)]
            unsafe fn codes($block: *const u8, $g: usize) -> __m256i {
                // SAFETY: the caller keeps to the block.
                unsafe { $codes }
            }
            #[inline(always)]
            unsafe fn scales(run: *const u8) -> [__m256; 2] {
                // SAFETY: f16 at the start, packed scales at 4.
                unsafe { [_mm256_mul_ps(half_at(run), bytes_to_f32(six_bits(run.add(4)).0)), _mm256_setzero_ps()] }
            }
            #[inline(always)]
            unsafe fn mins(run: *const u8) -> [__m256; 2] {
                // SAFETY: f16 at 2, packed minimums at 4.
                unsafe {
                    [_mm256_mul_ps(half_at(run.add(2)), bytes_to_f32(six_bits(run.add(4)).1)), _mm256_setzero_ps()]
                }
            }
        }
    };
}

four_and_five_bits!(
    Q4_K,
    |b, g| _mm256_and_si256(shift_right(load(b.add(16 + 32 * (g / 2))), 4 * (g % 2)), _mm256_set1_epi8(15)),
    |b, i| low_and_high(b.add(16 + 32 * i))
);
four_and_five_bits!(
    Q5_K,
    |b, g| {
        let low = _mm256_and_si256(shift_right(load(b.add(48 + 32 * (g / 2))), 4 * (g % 2)), _mm256_set1_epi8(15));
        let high = _mm256_and_si256(shift_right(load(b.add(16)), g), _mm256_set1_epi8(1));
        _mm256_or_si256(low, _mm256_slli_epi16::<4>(high))
    },
    |b, i| {
        let ([low, high], x) = (low_and_high(b.add(48 + 32 * i)), load(b.add(16)));
        // Bits 2 i and 2 i + 1, to bit 4.
        let bit = |x| _mm256_and_si256(x, _mm256_set1_epi8(16));
        let [x, y] = match i {
            0 => [_mm256_slli_epi16::<4>(x), _mm256_slli_epi16::<3>(x)],
            1 => [_mm256_slli_epi16::<2>(x), _mm256_slli_epi16::<1>(x)],
            2 => [x, _mm256_srli_epi16::<1>(x)],
            _ => [_mm256_srli_epi16::<2>(x), _mm256_srli_epi16::<3>(x)],
        };
        [_mm256_or_si256(low, bit(x)), _mm256_or_si256(high, bit(y))]
    }
);

impl Codes for Q6_K {
    const ZERO: u8 = 32;
    #[inline(always)]
    unsafe fn codes(run: *const u8, g: usize) -> __m256i {
        // SAFETY: the caller keeps to the block.
        unsafe {
            let (half, quarter) = (g / 4, g % 4);
            let low = shift_right(load(run.add(64 * half + 32 * (quarter % 2))), 4 * (quarter / 2));
            let high = shift_right(load(run.add(128 + 32 * half)), 2 * quarter);
            _mm256_or_si256(
                _mm256_and_si256(low, _mm256_set1_epi8(15)),
                _mm256_slli_epi16::<4>(_mm256_and_si256(high, _mm256_set1_epi8(3))),
            )
        }
    }
    #[inline(always)]
    unsafe fn scales(run: *const u8) -> [__m256; 2] {
        // SAFETY: 16 bytes of scales at 192, f16 at 208.
        unsafe {
            let s = _mm_loadu_si128(run.add(192).cast());
            let d = half_at(run.add(208));
            [_mm256_mul_ps(d, bytes_to_f32(s)), _mm256_mul_ps(d, bytes_to_f32(_mm_srli_si128::<8>(s)))]
        }
    }
}

impl Codes for IQ4_XS {
    const ZERO: u8 = 128;
    #[inline(always)]
    unsafe fn codes(run: *const u8, g: usize) -> __m256i {
        // SAFETY: the caller keeps to the block.
        unsafe { lookup(&IQ4_TABLE, 128, nibbles(run.add(8 + 16 * g))) }
    }
    #[inline(always)]
    unsafe fn scales(run: *const u8) -> [__m256; 2] {
        // SAFETY: f16 at the start, high bits at 2, low ones at 4.
        unsafe {
            let high = u32::from(run.add(2).cast::<u16>().read_unaligned());
            let low = run.add(4).cast::<u32>().read_unaligned();
            let counts = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let low = _mm256_srlv_epi32(_mm256_set1_epi32(low as i32), _mm256_slli_epi32::<2>(counts));
            let high = _mm256_srlv_epi32(_mm256_set1_epi32(high as i32), _mm256_slli_epi32::<1>(counts));
            let high = _mm256_slli_epi32::<4>(_mm256_and_si256(high, _mm256_set1_epi32(3)));
            let s = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)), high);
            let s = _mm256_cvtepi32_ps(_mm256_sub_epi32(s, _mm256_set1_epi32(32)));
            [_mm256_mul_ps(half_at(run), s), _mm256_setzero_ps()]
        }
    }
}
