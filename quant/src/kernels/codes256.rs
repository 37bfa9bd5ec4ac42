//! Block formats in 256-bit registers: how each one's codes and scales are taken out of a block. Shared by AVX2 and
//! AVX-512, which differ in how they multiply bytes.

mod kquants;

use crate::formats::*;
use std::arch::x86_64::*;

/// E2M1, doubled.
pub(super) const MXFP4_TABLE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// A block format, eight groups of 32 codes (a "run") at a time.
///
/// # Safety
/// The methods need AVX2 and F16C, and `run` to point at as many whole groups as are asked for. They are always
/// inlined, so that they take on the target features of the kernel that calls them.
pub(super) trait Codes: BlockFormat {
    /// What codes are raised by to make them unsigned.
    const ZERO: u8;
    /// Bytes of a run.
    const RUN: usize = 8 / Self::GROUPS * Self::BYTES;

    /// Codes of group `g`, raised by `ZERO`.
    unsafe fn codes(run: *const u8, g: usize) -> __m256i;
    /// Whether [`Codes::pair`] gives a group in each register although each has one scale: where joining them takes more
    /// steps than one conversion saves.
    const APART: bool = Self::HALVES;
    /// Codes of the groups `2 i` and `2 i + 1`: the first sixteen of each in the first register, a half for each group, so
    /// that the products of a group end in four lanes and one conversion serves both. With `APART`, a group in each register.
    #[inline(always)]
    unsafe fn pair(run: *const u8, i: usize) -> [__m256i; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let (a, b) = (Self::codes(run, 2 * i), Self::codes(run, 2 * i + 1));
            if Self::APART { [a, b] } else { halves_joined(a, b) }
        }
    }
    /// Scales: one a group in `[0]`, or with `HALVES` one a half in both.
    unsafe fn scales(run: *const u8) -> [__m256; 2];
    /// Minimums, likewise; 0 for formats that have none.
    #[inline(always)]
    unsafe fn mins(_run: *const u8) -> [__m256; 2] {
        // SAFETY: the caller has AVX2.
        unsafe { [_mm256_setzero_ps(); 2] }
    }
    /// Scale of group `g` in every lane, and its minimum: for the groups behind the last whole run, which only formats
    /// of one group a block have.
    #[inline(always)]
    unsafe fn scale_and_min(_run: *const u8, _g: usize) -> (__m256, f32) {
        unreachable!("blocks of 256 are whole runs")
    }
}

/// Products of unsigned codes and signed activations.
///
/// # Safety
/// The methods need the instruction set that the type stands for.
pub(super) trait Dot {
    /// Minus the products of `zero` and `a`, summed by fours.
    unsafe fn start(zero: u8, a: __m256i) -> __m256i;
    /// Adds the products of the codes (less `zero`) and `a`, summed by fours, to what `start` gave.
    unsafe fn dot(start: __m256i, zero: u8, codes: __m256i, a: __m256i) -> __m256i;
    /// The same for two registers, whose sums are added.
    #[inline(always)]
    unsafe fn dots(start: __m256i, zero: u8, codes: [__m256i; 2], a: [__m256i; 2]) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { Self::dot(Self::dot(start, zero, codes[0], a[0]), zero, codes[1], a[1]) }
    }
}

#[inline(always)]
unsafe fn load(p: *const u8) -> __m256i {
    // SAFETY: the caller's pointer has 32 bytes.
    unsafe { _mm256_loadu_si256(p.cast()) }
}

/// The lower halves of both, and the upper ones.
#[inline(always)]
pub(super) unsafe fn halves_joined(a: __m256i, b: __m256i) -> [__m256i; 2] {
    // SAFETY: the caller has AVX2.
    unsafe { [_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b)] }
}

/// The low and the high halves of twice 16 bytes.
#[inline(always)]
unsafe fn nibbles_of_two(a: *const u8, b: *const u8) -> [__m256i; 2] {
    // SAFETY: both of the caller's pointers have 16 bytes.
    unsafe {
        let (a, b) = (_mm_loadu_si128(a.cast()), _mm_loadu_si128(b.cast()));
        let x = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), b);
        let mask = _mm256_set1_epi8(15);
        [_mm256_and_si256(x, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask)]
    }
}

/// 16 bytes of two 4-bit codes: the low ones first.
#[inline(always)]
unsafe fn nibbles(p: *const u8) -> __m256i {
    // SAFETY: the caller's pointer has 16 bytes.
    unsafe {
        let x = _mm_loadu_si128(p.cast());
        let both = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(x), _mm_srli_epi16::<4>(x));
        _mm256_and_si256(both, _mm256_set1_epi8(15))
    }
}

/// Byte `i` is `value` where bit `i` of the word at `p` is set.
#[inline(always)]
unsafe fn bits(p: *const u8, value: i8) -> __m256i {
    // SAFETY: the caller's pointer has 4 bytes.
    unsafe {
        let word = _mm256_set1_epi32(p.cast::<i32>().read_unaligned());
        let bytes = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
        let spread = _mm256_shuffle_epi8(word, bytes);
        let mask = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, mask), mask);
        _mm256_and_si256(set, _mm256_set1_epi8(value))
    }
}

#[inline(always)]
unsafe fn shift_right(x: __m256i, by: usize) -> __m256i {
    // SAFETY: the caller has AVX2.
    unsafe { _mm256_srl_epi16(x, _mm_cvtsi64_si128(by as i64)) }
}

/// Eight f16 numbers at `p`, `p + stride`, ...
#[inline(always)]
unsafe fn halves_at(p: *const u8, stride: usize) -> __m256 {
    // SAFETY: the caller's pointer has eight numbers at this distance.
    unsafe {
        // Put together outside of the vector units, which have enough to do.
        let at = |i: usize| u64::from(p.add(i * stride).cast::<u16>().read_unaligned());
        let four = |i: usize| (at(i) | at(i + 1) << 16 | (at(i + 2) | at(i + 3) << 16) << 32) as i64;
        _mm256_cvtph_ps(_mm_set_epi64x(four(4), four(0)))
    }
}

/// Eight f32 numbers at `p`, `p + stride`, ...
#[inline(always)]
unsafe fn floats_at(p: *const u8, stride: usize) -> __m256 {
    // SAFETY: the caller's pointer has eight numbers at this distance.
    unsafe {
        let at = |i: usize| p.add(i * stride).cast::<f32>().read_unaligned();
        _mm256_setr_ps(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7))
    }
}

#[inline(always)]
unsafe fn half_at(p: *const u8) -> __m256 {
    // SAFETY: the caller's pointer has 2 bytes.
    unsafe { _mm256_cvtph_ps(_mm_set1_epi16(p.cast::<i16>().read_unaligned())) }
}

#[inline(always)]
unsafe fn bytes_to_f32(x: __m128i) -> __m256 {
    // SAFETY: the caller has AVX2.
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)) }
}

#[inline(always)]
unsafe fn lookup(table: &[i8; 16], raise: u8, nibbles: __m256i) -> __m256i {
    // SAFETY: the caller has AVX2; the table has 16 bytes.
    unsafe {
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
        _mm256_add_epi8(_mm256_shuffle_epi8(table, nibbles), _mm256_set1_epi8(raise as i8))
    }
}

/// Formats of 32 weights: an f16 scale at the start of each block, perhaps an f16 minimum behind it.
macro_rules! legacy {
    ($name:ident, $zero:expr, |$block:ident| $codes:expr $(, |$p:ident| $pair:expr)?) => {
        impl Codes for $name {
            const ZERO: u8 = $zero;
            $(#[inline(always)]
            unsafe fn pair(run: *const u8, i: usize) -> [__m256i; 2] {
                // SAFETY: the caller keeps to the two blocks.
                unsafe {
                    let $p = run.add(2 * i * Self::BYTES);
                    $pair
                }
            })?
            #[inline(always)]
            unsafe fn codes(run: *const u8, g: usize) -> __m256i {
                // SAFETY: the caller keeps to the block.
                unsafe {
                    let $block = run.add(g * Self::BYTES);
                    $codes
                }
            }
            #[inline(always)]
            unsafe fn scales(run: *const u8) -> [__m256; 2] {
                // SAFETY: each block begins with its scale.
                unsafe { [halves_at(run, Self::BYTES), _mm256_setzero_ps()] }
            }
            #[inline(always)]
            unsafe fn mins(run: *const u8) -> [__m256; 2] {
                // SAFETY: a format with minimums has them behind the scale. They are stored negated.
                unsafe {
                    let m = if Self::HAS_MIN { halves_at(run.add(2), Self::BYTES) } else { _mm256_setzero_ps() };
                    [_mm256_sub_ps(_mm256_setzero_ps(), m), _mm256_setzero_ps()]
                }
            }
            #[inline(always)]
            unsafe fn scale_and_min(run: *const u8, g: usize) -> (__m256, f32) {
                // SAFETY: as above.
                unsafe {
                    let block = run.add(g * Self::BYTES);
                    let min = if Self::HAS_MIN { -_mm256_cvtss_f32(half_at(block.add(2))) } else { 0.0 };
                    (half_at(block), min)
                }
            }
        }
    };
}

legacy!(Q4_0, 8, |b| nibbles(b.add(2)), |p| nibbles_of_two(p.add(2), p.add(20)));
legacy!(Q4_1, 0, |b| nibbles(b.add(4)), |p| nibbles_of_two(p.add(4), p.add(24)));
legacy!(Q5_0, 16, |b| _mm256_or_si256(nibbles(b.add(6)), bits(b.add(2), 16)));
legacy!(Q5_1, 0, |b| _mm256_or_si256(nibbles(b.add(8)), bits(b.add(4), 16)));
legacy!(Q8_0, 128, |b| _mm256_xor_si256(load(b.add(2)), _mm256_set1_epi8(-128)));
legacy!(IQ4_NL, 128, |b| lookup(&IQ4_TABLE, 128, nibbles(b.add(2))), |p| {
    let [a, b] = nibbles_of_two(p.add(2), p.add(20));
    [lookup(&IQ4_TABLE, 128, a), lookup(&IQ4_TABLE, 128, b)]
});

legacy!(Q4_Z, 16, |b| _mm256_add_epi8(nibbles(b.add(3)), _mm256_set1_epi8(16 - *b.add(2) as i8)));

/// Formats of 32 weights: an f32 scale at the start of each block, perhaps an f32 minimum behind it, then signed bytes.
macro_rules! wide_scales {
    ($name:ident) => {
        impl Codes for $name {
            const ZERO: u8 = 128;
            #[inline(always)]
            unsafe fn codes(run: *const u8, g: usize) -> __m256i {
                // SAFETY: the caller keeps to the block, which ends with its 32 codes.
                unsafe { _mm256_xor_si256(load(run.add((g + 1) * Self::BYTES - 32)), _mm256_set1_epi8(-128)) }
            }
            #[inline(always)]
            unsafe fn scales(run: *const u8) -> [__m256; 2] {
                // SAFETY: each block begins with its scale.
                unsafe { [floats_at(run, Self::BYTES), _mm256_setzero_ps()] }
            }
            #[inline(always)]
            unsafe fn mins(run: *const u8) -> [__m256; 2] {
                // SAFETY: a format with minimums has them behind the scale.
                unsafe {
                    let m = if Self::HAS_MIN { floats_at(run.add(4), Self::BYTES) } else { _mm256_setzero_ps() };
                    [m, _mm256_setzero_ps()]
                }
            }
            #[inline(always)]
            unsafe fn scale_and_min(run: *const u8, g: usize) -> (__m256, f32) {
                // SAFETY: as above.
                unsafe {
                    let block = run.add(g * Self::BYTES).cast::<f32>();
                    let min = if Self::HAS_MIN { block.add(1).read_unaligned() } else { 0.0 };
                    (_mm256_set1_ps(block.read_unaligned()), min)
                }
            }
        }
    };
}

wide_scales!(Q8_F);
wide_scales!(Q8_Z);

impl Codes for MXFP4 {
    const ZERO: u8 = 16;
    #[inline(always)]
    unsafe fn codes(run: *const u8, g: usize) -> __m256i {
        // SAFETY: the caller keeps to the block.
        unsafe { lookup(&MXFP4_TABLE, 16, nibbles(run.add(g * Self::BYTES + 1))) }
    }
    #[inline(always)]
    unsafe fn scale_and_min(run: *const u8, g: usize) -> (__m256, f32) {
        // SAFETY: each block begins with its exponent.
        unsafe { (_mm256_set1_ps(e8m0_half(*run.add(g * Self::BYTES))), 0.0) }
    }
    #[inline(always)]
    unsafe fn scales(run: *const u8) -> [__m256; 2] {
        let mut scales = [0f32; 8];
        for (g, scale) in scales.iter_mut().enumerate() {
            // SAFETY: each block begins with its exponent.
            *scale = e8m0_half(unsafe { *run.add(g * Self::BYTES) });
        }
        // SAFETY: eight numbers.
        unsafe { [_mm256_loadu_ps(scales.as_ptr()), _mm256_setzero_ps()] }
    }
}

/// Hands out `$function::<$format, $($more),*>` for a block format.
macro_rules! by_codes {
    ($format:expr, $function:ident) => {{
        use crate::formats::*;
        match $format {
            Format::Q4_0 => $function::<Q4_0>,
            Format::Q4_1 => $function::<Q4_1>,
            Format::Q5_0 => $function::<Q5_0>,
            Format::Q5_1 => $function::<Q5_1>,
            Format::Q8_0 => $function::<Q8_0>,
            Format::Q2_K => $function::<Q2_K>,
            Format::Q3_K => $function::<Q3_K>,
            Format::Q4_K => $function::<Q4_K>,
            Format::Q5_K => $function::<Q5_K>,
            Format::Q6_K => $function::<Q6_K>,
            Format::IQ4_NL => $function::<IQ4_NL>,
            Format::IQ4_XS => $function::<IQ4_XS>,
            Format::MXFP4 => $function::<MXFP4>,
            Format::Q4_Z => $function::<Q4_Z>,
            Format::Q8_F => $function::<Q8_F>,
            Format::Q8_Z => $function::<Q8_Z>,
            Format::F32 | Format::F16 | Format::BF16 | Format::NF4 | Format::FP4 => {
                unreachable!("floats have no codes")
            }
        }
    }};
}
pub(super) use by_codes;
