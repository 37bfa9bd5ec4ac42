//! The few-row product in 512-bit registers, two groups of 32 codes at a time: how a pair of groups is taken out of
//! each format's blocks, and the product written once over them, for one row of activations or several that share
//! each weight's unpacking. For processors with VBMI (Ice Lake, Zen 4 and later); others take [`super::codes256`].

use super::codes256::Codes;
use super::{DotBatch, DotCodes, QuantizedRow, QuantizedRows};
use crate::formats::*;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

/// Whether the processor has what these kernels take beyond AVX-512 with VNNI.
pub(super) fn available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| is_x86_feature_detected!("avx512vbmi"))
}

/// A block format, two groups at a time.
///
/// # Safety
/// As for [`Codes`]; `pair` reads the groups `2 i` and `2 i + 1` of the run and no byte beyond their blocks. The
/// methods need AVX-512 with VBMI.
trait Pairs: Codes {
    /// Codes raised by `ZERO`, those of the even group first.
    unsafe fn pair(run: *const u8, i: usize) -> __m512i;
    /// See [`Codes::scales`].
    #[inline(always)]
    unsafe fn run_scales(run: *const u8) -> [__m256; 2] {
        // SAFETY: the caller's promise.
        unsafe { Self::scales(run) }
    }
    /// See [`Codes::mins`].
    #[inline(always)]
    unsafe fn run_mins(run: *const u8) -> [__m256; 2] {
        // SAFETY: the caller's promise.
        unsafe { Self::mins(run) }
    }
}

/// Where the bytes of two blocks' nibbles are taken from, `first` in a block of `size`: each block's sixteen twice.
const fn twice(first: usize, size: usize) -> [u8; 64] {
    let mut from = [0; 64];
    let mut i = 0;
    while i < 64 {
        from[i] = (i / 32 * size + first + i % 16) as u8;
        i += 1;
    }
    from
}

/// The 4-bit codes of two blocks of `SIZE` bytes at `p`, each of which keeps sixteen bytes of them from `FIRST` on.
#[inline(always)]
unsafe fn nibbles<const FIRST: usize, const SIZE: usize>(p: *const u8) -> __m512i {
    // SAFETY: the caller's pointer has two blocks, and no byte beyond them is read.
    unsafe {
        let bytes = _mm512_maskz_loadu_epi8((1 << (2 * SIZE)) - 1, p.cast());
        let from = const { twice(FIRST, SIZE) };
        let spread = _mm512_permutexvar_epi8(_mm512_loadu_si512(from.as_ptr().cast()), bytes);
        // The first sixteen bytes of each block as they are, the second ones from their fifth bit on.
        let (low, high) = (0x3830_2820_1810_0800, 0x3c34_2c24_1c14_0c04);
        let shifts = _mm512_setr_epi64(low, low, high, high, low, low, high, high);
        _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, spread), _mm512_set1_epi8(15))
    }
}

/// The same with a fifth bit each, which a block keeps in four bytes from `BITS` on.
#[inline(always)]
unsafe fn five_bits<const BITS: usize, const FIRST: usize, const SIZE: usize>(p: *const u8) -> __m512i {
    // SAFETY: the caller's pointer has two blocks.
    unsafe {
        let bits = |block: usize| u64::from(p.add(block * SIZE + BITS).cast::<u32>().read_unaligned());
        let low = nibbles::<FIRST, SIZE>(p);
        _mm512_mask_add_epi8(low, bits(0) | bits(1) << 32, low, _mm512_set1_epi8(16))
    }
}

/// Eight f16 numbers, the first of which is word `first` and each other `stride` words further.
const fn places(first: usize, stride: usize) -> [[u16; 32]; 2] {
    let mut places = [[0; 32]; 2];
    let mut g = 0;
    while g < 8 {
        let word = first + g * stride;
        places[word / 64][g] = (word % 64) as u16;
        g += 1;
    }
    places
}

/// Word `FIRST` of each of eight blocks of `SIZE` bytes, which is an f16.
#[inline(always)]
unsafe fn halves<const FIRST: usize, const SIZE: usize>(run: *const u8) -> __m256 {
    // SAFETY: the caller's pointer has eight blocks, and no byte beyond them is read.
    unsafe {
        let left = |from: usize| (8 * SIZE).saturating_sub(from).min(64);
        let load = |from: usize| match left(from) {
            0 => _mm512_setzero_si512(),
            64 => _mm512_loadu_si512(run.add(from).cast()),
            n => _mm512_maskz_loadu_epi8((1 << n) - 1, run.add(from).cast()),
        };
        let places = const { places(FIRST, SIZE / 2) };
        let place = |i: usize| _mm512_loadu_si512(places[i].as_ptr().cast());
        let found = _mm512_permutex2var_epi16(load(0), place(0), load(64));
        let found = if 7 * SIZE + 2 * FIRST < 128 {
            found
        } else {
            // The last blocks begin behind the first 128 bytes.
            let behind = const { (128 - 2 * FIRST).div_ceil(SIZE) };
            let rest = _mm512_permutex2var_epi16(load(128), place(1), load(192));
            _mm512_mask_mov_epi16(found, (0xff << behind) & 0xff, rest)
        };
        _mm256_cvtph_ps(_mm512_castsi512_si128(found))
    }
}

/// Formats of 32 weights with an f16 scale at the start of each block, perhaps an f16 minimum behind it.
macro_rules! legacy {
    ($name:ident, |$p:ident| $codes:expr) => {
        impl Pairs for $name {
            #[inline(always)]
            unsafe fn pair(run: *const u8, i: usize) -> __m512i {
                // SAFETY: the caller keeps to the two blocks.
                unsafe {
                    let $p = run.add(2 * i * Self::BYTES);
                    $codes
                }
            }
            #[inline(always)]
            unsafe fn run_scales(run: *const u8) -> [__m256; 2] {
                // SAFETY: each block begins with its scale.
                unsafe { [halves::<0, { <$name as BlockFormat>::BYTES }>(run), _mm256_setzero_ps()] }
            }
            #[inline(always)]
            unsafe fn run_mins(run: *const u8) -> [__m256; 2] {
                // SAFETY: a format with minimums has them behind the scale. They are stored negated.
                unsafe {
                    let m = halves::<1, { <$name as BlockFormat>::BYTES }>(run);
                    [_mm256_sub_ps(_mm256_setzero_ps(), m), _mm256_setzero_ps()]
                }
            }
        }
    };
}

legacy!(Q4_0, |p| nibbles::<2, 18>(p));
legacy!(Q4_1, |p| nibbles::<4, 20>(p));
legacy!(Q5_0, |p| five_bits::<2, 6, 22>(p));
legacy!(Q5_1, |p| five_bits::<4, 8, 24>(p));
legacy!(Q8_0, |p| {
    let low = _mm512_castsi256_si512(_mm256_loadu_si256(p.add(2).cast()));
    let both = _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(p.add(36).cast()));
    _mm512_xor_si512(both, _mm512_set1_epi8(-128))
});
legacy!(IQ4_NL, |p| raised(&IQ4_TABLE, 128, nibbles::<2, 18>(p)));

/// Entries of a table, raised.
#[inline(always)]
unsafe fn raised(table: &[i8; 16], by: u8, codes: __m512i) -> __m512i {
    // SAFETY: the caller has AVX-512; the table has 16 bytes.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
        _mm512_shuffle_epi8(_mm512_add_epi8(table, _mm512_set1_epi8(by as i8)), codes)
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

macro_rules! k_quant {
    ($name:ident, |$run:ident, $i:ident| $codes:expr) => {
        impl Pairs for $name {
            #[inline(always)]
            unsafe fn pair($run: *const u8, $i: usize) -> __m512i {
                // SAFETY: the caller keeps to the block.
                unsafe { $codes }
            }
        }
    };
}

k_quant!(Q2_K, |run, i| {
    let by = 4 * (i % 2);
    _mm512_and_si512(shifted(doubled(run.add(16 + 32 * (i / 2))), by, by + 2), _mm512_set1_epi8(3))
});
k_quant!(Q3_K, |run, i| {
    let by = 4 * (i % 2);
    let low = _mm512_and_si512(shifted(doubled(run.add(32 + 32 * (i / 2))), by, by + 2), _mm512_set1_epi8(3));
    with_bit(low, run, i, 4)
});
k_quant!(Q4_K, |run, i| _mm512_and_si512(shifted(doubled(run.add(16 + 32 * i)), 0, 4), _mm512_set1_epi8(15)));
k_quant!(Q5_K, |run, i| {
    let low = _mm512_and_si512(shifted(doubled(run.add(48 + 32 * i)), 0, 4), _mm512_set1_epi8(15));
    with_bit(low, run.add(16), i, 16)
});
k_quant!(Q6_K, |run, i| {
    let low = _mm512_loadu_si512(run.add(64 * (i / 2)).cast());
    let low = if i.is_multiple_of(2) { low } else { _mm512_srli_epi16::<4>(low) };
    let high = doubled(run.add(128 + 32 * (i / 2)));
    // To bits 4 and 5.
    let high = if i.is_multiple_of(2) {
        _mm512_sllv_epi64(high, _mm512_setr_epi64(4, 4, 4, 4, 2, 2, 2, 2))
    } else {
        shifted(high, 0, 2)
    };
    _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi8(15)), _mm512_and_si512(high, _mm512_set1_epi8(0x30)))
});
k_quant!(IQ4_XS, |run, i| {
    let both = _mm512_castsi256_si512(_mm256_loadu_si256(run.add(8 + 32 * i).cast()));
    let spread = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), both);
    let codes = _mm512_srlv_epi64(spread, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
    raised(&IQ4_TABLE, 128, _mm512_and_si512(codes, _mm512_set1_epi8(15)))
});

/// The product for one row, where the format has one here.
pub(super) fn dot_codes(format: Format) -> Option<DotCodes> {
    fn entry<C: Pairs>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
        let x = QuantizedRows { cols: x.q.len(), all: x };
        // SAFETY: this table is handed out only where `available`.
        unsafe { dots::<C>(data, x, 0..1, out) }
    }
    by_pairs!(format, entry)
}

/// The product for several rows.
pub(super) fn dot_batch(format: Format) -> Option<DotBatch> {
    fn entry<C: Pairs>(data: &[u8], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32]) {
        // SAFETY: this table is handed out only where `available`.
        unsafe { dots::<C>(data, x, rows, out) }
    }
    by_pairs!(format, entry)
}

/// `$function::<$format>` for the formats that come in pairs.
macro_rules! by_pairs {
    ($format:expr, $function:ident) => {
        if !available() {
            None
        } else {
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
                _ => None,
            }
        }
    };
}
use by_pairs;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
fn dots<C: Pairs>(data: &[u8], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32]) {
    let row_bytes = x.cols / C::FORMAT.block_len() * C::BYTES;
    let (groups, count) = (x.cols / 32, out.len() / rows.len().max(1));
    assert!(data.len() >= count * row_bytes, "weights are shorter than the rows asked for");
    assert!(x.all.q.len() >= rows.end * x.cols && x.all.d.len() >= rows.end * groups);
    assert!(x.all.s32.len() >= rows.end * groups && x.all.s16.len() >= 2 * rows.end * groups);
    assert!(out.len() == rows.len() * count);
    for o in (0..count).step_by(4) {
        let first = data[o * row_bytes..].as_ptr();
        let mut r = rows.start;
        while r < rows.end {
            let to = &mut out[(r - rows.start) * count + o..];
            // SAFETY: the assertions keep every row of weights, activations and sums inside the slices.
            r += unsafe {
                match (count - o, rows.end - r) {
                    (4.., 4..) => {
                        some::<C, 2, 4>(first, row_bytes, x, r, to, count);
                        some::<C, 2, 4>(first.add(2 * row_bytes), row_bytes, x, r, &mut to[2..], count);
                        4
                    }
                    (4.., 2..) => {
                        some::<C, 4, 2>(first, row_bytes, x, r, to, count);
                        2
                    }
                    (4.., _) => {
                        some::<C, 4, 1>(first, row_bytes, x, r, to, count);
                        1
                    }
                    (few, _) => {
                        for i in 0..few {
                            some::<C, 1, 1>(first.add(i * row_bytes), row_bytes, x, r, &mut to[i..], count);
                        }
                        1
                    }
                }
            };
        }
    }
}

/// Which of a run's factors meet the sixteen sums of pair `i`.
const fn spread(halves: bool, i: usize) -> [i32; 16] {
    let mut from = [0; 16];
    let mut lane = 0;
    while lane < 16 {
        from[lane] = if halves { 4 * i + lane / 4 } else { 2 * i + lane / 8 } as i32;
        lane += 1;
    }
    from
}

/// Sixteen numbers: one for each group in the lower half, or one for each half of a group.
#[inline(always)]
unsafe fn joined(halves: bool, [a, b]: [__m256; 2]) -> __m512 {
    // SAFETY: the caller has AVX-512.
    unsafe { if halves { _mm512_insertf32x8::<1>(_mm512_castps256_ps512(a), b) } else { _mm512_zextps256_ps512(a) } }
}

/// `R` rows of weights at `first` times the `B` rows of activations from `row` on, whose sums are `stride` apart.
///
/// # Safety
/// All of these rows, and AVX-512 with VNNI and VBMI.
#[inline(always)]
unsafe fn some<C: Pairs, const R: usize, const B: usize>(
    first: *const u8,
    row_bytes: usize,
    x: QuantizedRows<'_>,
    row: usize,
    out: &mut [f32],
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let groups = x.cols / 32;
        let mut acc = [[_mm512_setzero_ps(); B]; R];
        let q = |b: usize, g: usize| x.all.q.as_ptr().add((row + b) * x.cols + g * 32);
        let at = |b: usize, g: usize| (row + b) * groups + g;
        // Whole steps of R rows, at least so far that memory answers in time.
        let ahead = (4096usize.div_ceil(R * row_bytes.max(1))) * R * row_bytes;
        for run in 0..groups / 8 {
            let mut factors = [[_mm512_setzero_ps(); B]; R];
            let mut d = [_mm512_setzero_ps(); B];
            for b in 0..B {
                d[b] = _mm512_zextps256_ps512(_mm256_loadu_ps(x.all.d.as_ptr().add(at(b, run * 8))));
                if C::HALVES {
                    let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
                    d[b] = _mm512_permutexvar_ps(twice, d[b]);
                }
            }
            for r in 0..R {
                let run = first.add(r * row_bytes + run * C::RUN);
                // The same part of rows to come: several rows at a time are more streams than the processor follows by
                // itself. (A prefetch beyond the end of the weights does nothing.)
                for line in (0..C::RUN).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(run.wrapping_add(ahead + line).cast());
                }
                let scales = joined(C::HALVES, C::run_scales(run));
                for b in 0..B {
                    factors[r][b] = _mm512_mul_ps(scales, d[b]);
                }
            }
            if C::HAS_MIN {
                for r in 0..R {
                    let mins = joined(C::HALVES, C::run_mins(first.add(r * row_bytes + run * C::RUN)));
                    for b in 0..B {
                        let sums = if C::HALVES {
                            _mm512_loadu_ps(x.all.s16.as_ptr().add(2 * at(b, run * 8)))
                        } else {
                            _mm512_zextps256_ps512(_mm256_loadu_ps(x.all.s32.as_ptr().add(at(b, run * 8))))
                        };
                        acc[r][b] = _mm512_fnmadd_ps(mins, sums, acc[r][b]);
                    }
                }
            }
            for i in 0..4 {
                let lanes =
                    const { [spread(C::HALVES, 0), spread(C::HALVES, 1), spread(C::HALVES, 2), spread(C::HALVES, 3)] };
                let lanes = _mm512_loadu_si512(lanes[i].as_ptr().cast());
                let mut a = [_mm512_setzero_si512(); B];
                let mut start = [_mm512_setzero_si512(); B];
                for b in 0..B {
                    a[b] = _mm512_loadu_si512(q(b, run * 8 + 2 * i).cast());
                    start[b] = below::<C>(a[b]);
                }
                for r in 0..R {
                    let codes = C::pair(first.add(r * row_bytes + run * C::RUN), i);
                    for b in 0..B {
                        let dots = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start[b], codes, a[b]));
                        acc[r][b] = _mm512_fmadd_ps(dots, _mm512_permutexvar_ps(lanes, factors[r][b]), acc[r][b]);
                    }
                }
            }
        }
        if C::GROUPS == 1 {
            for g in groups / 8 * 8..groups {
                for r in 0..R {
                    let block = first.add(r * row_bytes + g * C::BYTES);
                    let (scale, min) = C::scale_and_min(block, 0);
                    let codes = _mm512_zextsi256_si512(C::codes(block, 0));
                    for b in 0..B {
                        // Nothing is added to the upper half: its activations are zeros.
                        let a = _mm512_zextsi256_si512(_mm256_loadu_si256(q(b, g).cast()));
                        let dots = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(below::<C>(a), codes, a));
                        let factor = _mm512_set1_ps(_mm256_cvtss_f32(scale) * *x.all.d.as_ptr().add(at(b, g)));
                        acc[r][b] = _mm512_fmadd_ps(dots, factor, acc[r][b]);
                        if C::HAS_MIN {
                            let min = _mm_set_ss(min * *x.all.s32.as_ptr().add(at(b, g)));
                            acc[r][b] = _mm512_sub_ps(acc[r][b], _mm512_zextps128_ps512(min));
                        }
                    }
                }
            }
        }
        for b in 0..B {
            for r in 0..R {
                out[b * stride + r] = _mm512_reduce_add_ps(acc[r][b]);
            }
        }
    }
}

/// Minus what raising the codes by `ZERO` adds to the sums.
#[inline(always)]
unsafe fn below<C: Codes>(a: __m512i) -> __m512i {
    // SAFETY: the caller has AVX-512 with VNNI.
    unsafe {
        let none = _mm512_setzero_si512();
        if C::ZERO == 0 {
            return none;
        }
        _mm512_sub_epi32(none, _mm512_dpbusd_epi32(none, _mm512_set1_epi8(C::ZERO as i8), a))
    }
}
