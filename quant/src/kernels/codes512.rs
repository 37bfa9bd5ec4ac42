//! Block formats in 512-bit registers: how four groups of 32 codes are taken out of each one's blocks. For processors
//! with VBMI (Ice Lake, Zen 4 and later); others take [`super::codes256`].

pub(super) mod panels;

use super::codes256::{Codes, MXFP4_TABLE};
use crate::formats::*;
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// Whether the processor has what these kernels take beyond AVX-512 with VNNI.
pub(super) fn available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| is_x86_feature_detected!("avx512vbmi"))
}

/// A block format, four groups at a time.
///
/// # Safety
/// As for [`Codes`], with all of a run readable. The methods need AVX-512 with VBMI.
pub(super) trait Quads: Codes {
    /// Codes raised by `ZERO`. A quarter of each register belongs to one group, the first sixteen codes of which are in
    /// the first register: so the products of a group end in four lanes, and one conversion serves four groups. With
    /// `HALVES` the codes are in their order: a quarter is what shares a scale.
    unsafe fn quad(run: *const u8, i: usize) -> [__m512i; 2];
    /// Scales and minimums of a run's eight groups, or with `HALVES` of their halves, in the first lanes; the others are
    /// zeros.
    #[inline(always)]
    unsafe fn factors(run: *const u8) -> [__m512; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let joined = |[a, b]: [__m256; 2]| match Self::HALVES {
                true => _mm512_insertf32x8::<1>(_mm512_castps256_ps512(a), b),
                false => _mm512_zextps256_ps512(a),
            };
            let mins = if Self::HAS_MIN { joined(Self::mins(run)) } else { _mm512_setzero_ps() };
            [joined(Self::scales(run)), mins]
        }
    }
}

/// Three registers hold a run of small blocks (of up to 24 bytes): its first 64 bytes, the next, and its last ones.
#[inline(always)]
unsafe fn part<const SIZE: usize>(run: *const u8, i: usize) -> __m512i {
    // SAFETY: the caller's run has 8 * SIZE bytes, which are more than 128.
    unsafe { _mm512_loadu_si512(run.add(if i == 2 { 8 * SIZE - 64 } else { 64 * i }).cast()) }
}

/// For each quad of a run, where in [`part`] `i` and the next one byte `from + b * size + j / share` is found, for byte `j` of
/// quarter `b`: with a `share` of 8 the byte that holds bit `j`, of 16 one byte for all.
const fn places_of(from: usize, size: usize, share: usize) -> [[u8; 64]; 2] {
    assert!(size <= 24);
    let mut places = [[0; 64]; 2];
    let mut j = 0;
    while j < 128 {
        let i = j / 64;
        let (first, second) = if i == 0 { (0, 64) } else { (64, 8 * size - 64) };
        let byte = from + j / 16 * size + j % 16 / share;
        assert!(byte >= first && byte < second + 64);
        places[i][j % 64] = (if byte < first + 64 { byte - first } else { byte - second + 64 }) as u8;
        j += 1;
    }
    places
}

/// The bytes of quad `i` that [`places_of`] names.
#[inline(always)]
unsafe fn found<const SIZE: usize>(run: *const u8, i: usize, places: &[[u8; 64]; 2]) -> __m512i {
    // SAFETY: the caller's pointer has a run, and the table 64 bytes.
    unsafe {
        let places = _mm512_loadu_si512(places[i].as_ptr().cast());
        _mm512_permutex2var_epi8(part::<SIZE>(run, i), places, part::<SIZE>(run, i + 1))
    }
}

/// The low and the high halves of bytes.
#[inline(always)]
unsafe fn nibbles(x: __m512i) -> [__m512i; 2] {
    // SAFETY: the caller has AVX-512.
    unsafe {
        let mask = _mm512_set1_epi8(15);
        [_mm512_and_si512(x, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(x), mask)]
    }
}

/// The 4-bit codes of quad `i` of a run, whose blocks of `SIZE` bytes end with sixteen bytes of them from `FIRST` on.
#[inline(always)]
unsafe fn four_bits<const FIRST: usize, const SIZE: usize>(run: *const u8, i: usize) -> [__m512i; 2] {
    // SAFETY: the caller's pointer has a run.
    unsafe {
        let places = const { places_of(FIRST, SIZE, 1) };
        nibbles(found::<SIZE>(run, i, &places))
    }
}

/// The same with a fifth bit each, which a block keeps in four bytes from `BITS` on, right before the sixteen.
#[inline(always)]
unsafe fn five_bits<const BITS: usize, const SIZE: usize>(run: *const u8, i: usize) -> [__m512i; 2] {
    // SAFETY: the caller's pointer has a run.
    unsafe {
        let places = const { [places_of(BITS + 4, SIZE, 1), places_of(BITS, SIZE, 8), places_of(BITS + 2, SIZE, 8)] };
        let codes = nibbles(found::<SIZE>(run, i, &places[0]));
        let bit = _mm512_set1_epi64(0x8040_2010_0804_0201_u64 as i64);
        let first = _mm512_test_epi8_mask(found::<SIZE>(run, i, &places[1]), bit);
        let second = _mm512_test_epi8_mask(found::<SIZE>(run, i, &places[2]), bit);
        let sixteen = _mm512_set1_epi8(16);
        [
            _mm512_mask_add_epi8(codes[0], first, codes[0], sixteen),
            _mm512_mask_add_epi8(codes[1], second, codes[1], sixteen),
        ]
    }
}

/// The 8-bit codes of quad `i` of a run, whose blocks of `SIZE` bytes end with them, raised by 128.
#[inline(always)]
unsafe fn eight_bits<const SIZE: usize>(run: *const u8, i: usize) -> [__m512i; 2] {
    // SAFETY: the caller's pointer has a run.
    unsafe {
        let codes = |g: usize| _mm256_loadu_si256(run.add((4 * i + g + 1) * SIZE - 32).cast());
        let two = |g: usize| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(codes(g)), codes(g + 1));
        let (a, b) = (two(0), two(2));
        let raise = _mm512_set1_epi8(-128);
        let (first, last) = (_mm512_shuffle_i64x2::<0x88>(a, b), _mm512_shuffle_i64x2::<0xdd>(a, b));
        [_mm512_xor_si512(first, raise), _mm512_xor_si512(last, raise)]
    }
}

/// In which of a run's words (the first 32, the next, those of the last part behind them) the eight f16 are whose first one is word
/// `first` and each other `size / 2` further, and where.
const fn places(first: usize, size: usize) -> [[u16; 32]; 2] {
    let mut places = [[0; 32]; 2];
    let mut g = 0;
    while g < 8 {
        let word = first + g * size / 2;
        if word < 64 {
            places[0][g] = word as u16;
        } else if size <= 24 {
            places[1][g] = (word - (4 * size - 32)) as u16;
        } else {
            places[1][g] = (word - 64) as u16;
        }
        g += 1;
    }
    places
}

/// Word `FIRST` of each of eight blocks of `SIZE` bytes, which is an f16.
#[inline(always)]
unsafe fn halves<const FIRST: usize, const SIZE: usize>(run: *const u8) -> __m256 {
    // SAFETY: the caller's pointer has eight blocks, and no byte beyond them is read: the largest have 272.
    unsafe {
        let places = const { places(FIRST, SIZE) };
        let place = [_mm512_loadu_si512(places[0].as_ptr().cast()), _mm512_loadu_si512(places[1].as_ptr().cast())];
        let near = _mm512_permutex2var_epi16(part::<SIZE>(run, 0), place[0], part::<SIZE>(run, 1));
        let found = if 7 * SIZE + 2 * FIRST < 128 {
            near
        } else {
            // The last blocks begin behind the first 128 bytes.
            let behind = const { (128 - 2 * FIRST).div_ceil(SIZE) };
            let far = if SIZE <= 24 {
                _mm512_permutexvar_epi16(place[1], part::<SIZE>(run, 2))
            } else {
                let at = |from: usize| _mm512_loadu_si512(run.add(from).cast());
                _mm512_permutex2var_epi16(at(128), place[1], at(192))
            };
            _mm512_mask_mov_epi16(near, (0xff << behind) & 0xff, far)
        };
        _mm256_cvtph_ps(_mm512_castsi512_si128(found))
    }
}

/// Formats of 32 weights with an f16 scale at the start of each block, perhaps an f16 minimum behind it.
macro_rules! legacy {
    ($name:ident, |$run:ident, $i:ident| $codes:expr) => {
        impl Quads for $name {
            #[inline(always)]
            unsafe fn quad($run: *const u8, $i: usize) -> [__m512i; 2] {
                // SAFETY: the caller keeps to the run.
                unsafe { $codes }
            }
            #[inline(always)]
            unsafe fn factors(run: *const u8) -> [__m512; 2] {
                // SAFETY: each block begins with its scale, and a format with minimums has them, negated, behind it.
                unsafe {
                    let none = _mm512_setzero_ps();
                    let scales = _mm512_zextps256_ps512(halves::<0, { <$name as BlockFormat>::BYTES }>(run));
                    if !Self::HAS_MIN {
                        return [scales, none];
                    }
                    let mins = halves::<1, { <$name as BlockFormat>::BYTES }>(run);
                    [scales, _mm512_sub_ps(none, _mm512_zextps256_ps512(mins))]
                }
            }
        }
    };
}

legacy!(Q4_0, |run, i| four_bits::<2, 18>(run, i));
legacy!(Q4_1, |run, i| four_bits::<4, 20>(run, i));
legacy!(Q5_0, |run, i| five_bits::<2, 22>(run, i));
legacy!(Q5_1, |run, i| five_bits::<4, 24>(run, i));
legacy!(Q8_0, |run, i| eight_bits::<34>(run, i));
legacy!(IQ4_NL, |run, i| raised(&IQ4_TABLE, 128, four_bits::<2, 18>(run, i)));

impl Quads for MXFP4 {
    #[inline(always)]
    unsafe fn quad(run: *const u8, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller's run.
        unsafe { raised(&MXFP4_TABLE, Self::ZERO, four_bits::<1, 17>(run, i)) }
    }
    #[inline(always)]
    unsafe fn factors(run: *const u8) -> [__m512; 2] {
        // SAFETY: each block begins with its exponent.
        unsafe {
            let places = _mm_setr_epi8(0, 17, 34, 51, 68, 85, 102, 119, 0, 0, 0, 0, 0, 0, 0, 0);
            let found =
                _mm512_permutex2var_epi8(part::<17>(run, 0), _mm512_castsi128_si512(places), part::<17>(run, 1));
            let e = _mm256_cvtepu8_epi32(_mm512_castsi512_si128(found));
            // As `e8m0_half`: the two lowest are below the smallest normal number.
            let one = _mm256_set1_epi32(1);
            let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, one));
            let low = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), e);
            let scales = _mm256_mask_mov_epi32(normal, _mm256_cmple_epu32_mask(e, one), low);
            [_mm512_zextps256_ps512(_mm256_castsi256_ps(scales)), _mm512_setzero_ps()]
        }
    }
}

impl Quads for Q4_Z {
    #[inline(always)]
    unsafe fn quad(run: *const u8, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller's run.
        unsafe {
            // Each block has its own zero point, in the byte before its codes.
            let zero = found::<19>(run, i, &const { places_of(2, 19, 16) });
            let up = _mm512_sub_epi8(_mm512_set1_epi8(Self::ZERO as i8), zero);
            let [first, last] = four_bits::<3, 19>(run, i);
            [_mm512_add_epi8(first, up), _mm512_add_epi8(last, up)]
        }
    }
}

/// Formats of 8-bit codes behind scales in single precision.
macro_rules! wide_scales {
    ($name:ident) => {
        impl Quads for $name {
            #[inline(always)]
            unsafe fn quad(run: *const u8, i: usize) -> [__m512i; 2] {
                // SAFETY: the caller's run.
                unsafe { eight_bits::<{ <$name as BlockFormat>::BYTES }>(run, i) }
            }
        }
    };
}

wide_scales!(Q8_F);
wide_scales!(Q8_Z);

/// Four codes each: lane `4 g + r` of register `j` is lane `4 g + j` of `rows[r]`.
#[inline(always)]
pub(super) unsafe fn turned([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: the caller has AVX-512.
    unsafe {
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        let (ab2, cd2) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(ab2, cd2),
            _mm512_unpackhi_epi64(ab2, cd2),
        ]
    }
}

/// Entries of a table, raised.
#[inline(always)]
unsafe fn raised<const N: usize>(table: &[i8; 16], by: u8, mut codes: [__m512i; N]) -> [__m512i; N] {
    // SAFETY: the caller has AVX-512; the table has 16 bytes.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
        let table = _mm512_add_epi8(table, _mm512_set1_epi8(by as i8));
        for code in &mut codes {
            *code = _mm512_shuffle_epi8(table, *code);
        }
        codes
    }
}

/// The 4-bit codes of four groups that lie as two in each 32 bytes, one in the low halves and one in the high ones.
#[inline(always)]
unsafe fn side_by_side(p: *const u8) -> [__m512i; 2] {
    // SAFETY: the caller's pointer has 64 bytes.
    unsafe {
        let x = _mm512_loadu_si512(p.cast());
        let by = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4);
        let part = |x| _mm512_and_si512(_mm512_srlv_epi64(x, by), _mm512_set1_epi8(15));
        [part(_mm512_shuffle_i64x2::<0xa0>(x, x)), part(_mm512_shuffle_i64x2::<0xf5>(x, x))]
    }
}

/// 32 bytes twice.
#[inline(always)]
unsafe fn doubled(p: *const u8) -> __m512i {
    // SAFETY: the caller's pointer has 32 bytes.
    unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast())) }
}

/// Each half shifted by its own count.
#[inline(always)]
unsafe fn shifted(x: __m512i, low: usize, high: usize) -> __m512i {
    // SAFETY: the caller has AVX-512.
    unsafe {
        let (low, high) = (low as i64, high as i64);
        _mm512_srlv_epi64(x, _mm512_setr_epi64(low, low, low, low, high, high, high, high))
    }
}

/// `codes` with `value` added where the bit `2 i` (in the upper half `2 i + 1`) of 32 bytes is set.
#[inline(always)]
unsafe fn with_bit(codes: __m512i, bits: *const u8, i: usize, value: i8) -> __m512i {
    // SAFETY: the caller's pointer has 32 bytes.
    unsafe {
        let (low, high) = (0x0101_0101_0101_0101 << (2 * i), (0x0202_0202_0202_0202_u64 << (2 * i)) as i64);
        let wanted = _mm512_setr_epi64(low, low, low, low, high, high, high, high);
        let set = _mm512_test_epi8_mask(doubled(bits), wanted);
        _mm512_mask_add_epi8(codes, set, codes, _mm512_set1_epi8(value))
    }
}

/// Scales and minimums of `Q4_K` and `Q5_K`: two f16 numbers and twelve bytes of 6-bit ones.
#[inline(always)]
unsafe fn six_bits(run: *const u8) -> [__m512; 2] {
    // SAFETY: the caller's pointer has 16 bytes.
    unsafe {
        let x = _mm_loadu_si128(run.cast());
        // Bytes 4 to 7 hold the first four scales and, in their upper two bits, those of the last four; 8 to 11 the
        // same for minimums; 12 to 15 the low four bits of the last four scales and, above them, of the minimums.
        let low = _mm_shuffle_epi8(x, _mm_setr_epi8(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
        let shifts = _mm_setr_epi8(0, 8, 16, 24, 32, 40, 48, 56, 0, 8, 16, 24, 36, 44, 52, 60);
        let low = _mm_and_si128(
            _mm_multishift_epi64_epi8(shifts, low),
            _mm_setr_epi32(0x3f3f_3f3f, 0x0f0f_0f0f, 0x3f3f_3f3f, 0x0f0f_0f0f),
        );
        let high = _mm_shuffle_epi8(x, _mm_setr_epi8(-1, -1, -1, -1, 4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10, 11));
        let high = _mm_and_si128(_mm_srli_epi16::<2>(high), _mm_set1_epi8(0x30));
        let numbers = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_or_si128(low, high)));
        let first = _mm256_setr_epi16(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        let by = _mm512_cvtph_ps(_mm256_permutexvar_epi16(first, _mm256_castsi128_si256(x)));
        let both = _mm512_mul_ps(by, numbers);
        let part = |half| _mm512_zextps256_ps512(half);
        [part(_mm512_castps512_ps256(both)), part(_mm512_extractf32x8_ps::<1>(both))]
    }
}

macro_rules! k_quant {
    ($name:ident, |$run:ident, $i:ident| $codes:expr $(, $factors:ident)?) => {
        impl Quads for $name {
            #[inline(always)]
            unsafe fn quad($run: *const u8, $i: usize) -> [__m512i; 2] {
                // SAFETY: the caller keeps to the block.
                unsafe { $codes }
            }
            $(#[inline(always)]
            unsafe fn factors(run: *const u8) -> [__m512; 2] {
                // SAFETY: a block begins with them.
                unsafe { $factors(run) }
            })?
        }
    };
}

k_quant!(Q2_K, |run, i| {
    let part = |by| _mm512_and_si512(shifted(doubled(run.add(16 + 32 * i)), by, by + 2), _mm512_set1_epi8(3));
    [part(0), part(4)]
});
k_quant!(Q3_K, |run, i| {
    let part = |by| _mm512_and_si512(shifted(doubled(run.add(32 + 32 * i)), by, by + 2), _mm512_set1_epi8(3));
    [with_bit(part(0), run, 2 * i, 4), with_bit(part(4), run, 2 * i + 1, 4)]
});
k_quant!(Q4_K, |run, i| side_by_side(run.add(16 + 64 * i)), six_bits);
k_quant!(
    Q5_K,
    |run, i| {
        let codes = side_by_side(run.add(48 + 64 * i));
        let bit = |k: usize| 0x0101_0101_0101_0101 << (4 * i + k);
        let bit = _mm512_setr_epi64(bit(0), bit(0), bit(1), bit(1), bit(2), bit(2), bit(3), bit(3));
        let fifth = |codes, p: *const u8| {
            let set = _mm512_test_epi8_mask(_mm512_broadcast_i32x4(_mm_loadu_si128(p.cast())), bit);
            _mm512_mask_add_epi8(codes, set, codes, _mm512_set1_epi8(16))
        };
        [fifth(codes[0], run.add(16)), fifth(codes[1], run.add(32))]
    },
    six_bits
);
k_quant!(Q6_K, |run, i| {
    let low = nibbles(_mm512_loadu_si512(run.add(64 * i).cast()));
    let high = doubled(run.add(128 + 32 * i));
    // To bits 4 and 5.
    let high = [_mm512_sllv_epi64(high, _mm512_setr_epi64(4, 4, 4, 4, 2, 2, 2, 2)), shifted(high, 0, 2)];
    let both = |h: usize| _mm512_or_si512(low[h], _mm512_and_si512(high[h], _mm512_set1_epi8(0x30)));
    [both(0), both(1)]
});
k_quant!(IQ4_XS, |run, i| raised(&IQ4_TABLE, 128, nibbles(_mm512_loadu_si512(run.add(8 + 64 * i).cast()))));

/// `$function::<$format>` for a block format.
macro_rules! by_quads {
    ($format:expr, $function:ident) => {
        if !$crate::kernels::codes512::available() {
            None
        } else {
            use $crate::formats::*;
            match $format {
                Format::Q4_0 => Some($function::<Q4_0>),
                Format::Q4_1 => Some($function::<Q4_1>),
                Format::Q5_0 => Some($function::<Q5_0>),
                Format::Q5_1 => Some($function::<Q5_1>),
                Format::Q8_0 => Some($function::<Q8_0>),
                Format::Q2_K => Some($function::<Q2_K>),
                Format::Q3_K => Some($function::<Q3_K>),
                Format::Q4_K => Some($function::<Q4_K>),
                Format::Q5_K => Some($function::<Q5_K>),
                Format::Q6_K => Some($function::<Q6_K>),
                Format::IQ4_NL => Some($function::<IQ4_NL>),
                Format::IQ4_XS => Some($function::<IQ4_XS>),
                Format::MXFP4 => Some($function::<MXFP4>),
                Format::Q4_Z => Some($function::<Q4_Z>),
                Format::Q8_F => Some($function::<Q8_F>),
                Format::Q8_Z => Some($function::<Q8_Z>),
                _ => None,
            }
        }
    };
}
pub(super) use by_quads;
