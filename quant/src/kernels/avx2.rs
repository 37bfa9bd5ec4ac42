//! AVX2 with FMA and F16C: 256-bit registers, bytes multiplied in pairs.

use super::codes256::{Codes, Dot, by_codes};
use super::columns::compiled_columns;
use super::few256::{self, add_across};
use super::lanes::{compiled, compiled_lanes};
use super::panel256::end_group;
use super::peaks;
use super::scalar::{self, packed};
use super::{
    CodePanel, DotCodes, DotFloats, GemmShape, Isa, Kernels, PANEL, PackFloats, QuantizedRow, QuantizedRowMut,
    QuantizedRows, words256,
};
use crate::formats::{FP4, Format, NF4, TableFormat, table};
use std::arch::x86_64::*;
use std::ops::Range;

pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

pub(super) fn kernels() -> Kernels {
    Kernels {
        isa: Isa::Avx2,
        biased_codes: false,
        quantize: compiled!("avx2,fma,f16c", scalar::quantize, (x: &[f32], out: QuantizedRowMut<'_>)),
        dot_batch: |_| None,
        dot_codes,
        dot_floats,
        pack_codes: packed!("avx2,fma,f16c", 0),
        pack_floats,
        columns: compiled_columns!("avx2,fma,f16c"),
        mul_panels,
        gemm,
        f16_to_f32,
        f32_to_f16,
        half_heads: None,
        half: None,
        half_columns: None,
        split: None,
        words: Some(words256::KERNELS),
        peaks: peaks::AVX2,
        lanes: compiled_lanes!("avx2,fma,f16c"),
    }
}

/// Bytes multiplied in pairs into 16 bits, which cannot overflow: codes below 64 as they are, others as magnitude
/// with the sign moved to the activation (|-128| * 127 * 2 < 2^15).
struct Pairs;

impl Dot for Pairs {
    #[inline(always)]
    unsafe fn start(zero: u8, a: __m256i) -> __m256i {
        // SAFETY: the caller has AVX2.
        unsafe {
            if zero == 0 || zero == 128 {
                return _mm256_setzero_si256();
            }
            let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(zero as i8), a);
            _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn dot(start: __m256i, zero: u8, codes: __m256i, a: __m256i) -> __m256i {
        // SAFETY: the caller has AVX2.
        unsafe {
            let pairs = if zero == 128 {
                let signed = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
                _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(a, signed))
            } else {
                _mm256_maddubs_epi16(codes, a)
            };
            _mm256_add_epi32(start, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn dots(start: __m256i, zero: u8, codes: [__m256i; 2], a: [__m256i; 2]) -> __m256i {
        // SAFETY: the caller has AVX2.
        unsafe {
            if zero == 128 {
                return Self::dot(Self::dot(start, zero, codes[0], a[0]), zero, codes[1], a[1]);
            }
            // Codes below 64: the sum of four products fits 16 bits.
            let fours = _mm256_add_epi16(_mm256_maddubs_epi16(codes[0], a[0]), _mm256_maddubs_epi16(codes[1], a[1]));
            _mm256_add_epi32(start, _mm256_madd_epi16(fours, _mm256_set1_epi16(1)))
        }
    }
}

fn dot_codes(format: Format) -> DotCodes {
    fn entry<C: Codes>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn inner<C: Codes>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
            // SAFETY: this function's features.
            unsafe { few256::dot_codes::<C, Pairs>(data, x, out) }
        }
        // SAFETY: this table is handed out only where `available`.
        unsafe { inner::<C>(data, x, out) }
    }
    by_codes!(format, entry)
}

fn mul_panels(panels: &[CodePanel<'_>], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32], stride: usize) {
    for (p, panel) in panels.iter().enumerate() {
        let mut r = rows.start;
        while r < rows.end {
            let n = if rows.end - r >= 4 { 4 } else { 1 };
            let out = &mut out[(r - rows.start) * stride + p * PANEL..];
            // SAFETY: this table is handed out only where `available`; `mul_some` checks the sizes.
            unsafe {
                match n {
                    4 => mul_some::<4>(panel, x, r, out, stride),
                    _ => mul_some::<1>(panel, x, r, out, stride),
                }
            }
            r += n;
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn mul_some<const R: usize>(panel: &CodePanel<'_>, x: QuantizedRows<'_>, first: usize, out: &mut [f32], stride: usize) {
    let cols = x.cols;
    let (groups, sums) = (cols / panel.sub, if panel.sub == 16 { x.all.s16 } else { x.all.s32 });
    assert!(panel.codes.len() >= cols * PANEL && panel.scale.len() >= groups * PANEL);
    assert!(panel.min.is_empty() || panel.min.len() >= groups * PANEL);
    let rows = first + R;
    assert!(x.all.q.len() >= rows * cols && x.all.d.len() >= rows * cols / 32 && sums.len() >= rows * groups);
    assert!(out.len() >= (R - 1) * stride + PANEL);
    let q = x.all.q[first * cols..].as_ptr().cast::<i32>();
    let quads = panel.sub / 4;
    let ones = _mm256_set1_epi16(1);
    let mut acc = [[_mm256_setzero_ps(); 2]; R];
    for s in 0..groups {
        let mut dots = [[_mm256_setzero_si256(); 2]; R];
        for k in s * quads..(s + 1) * quads {
            // SAFETY: `k < cols / 4`, and the first assertion.
            let at = panel.codes[k * 64..(k + 1) * 64].as_ptr();
            // SAFETY: 64 codes from here on.
            let w = unsafe { [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())] };
            let magnitude = [_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])];
            for r in 0..R {
                // SAFETY: each row has `cols` codes.
                let a = _mm256_set1_epi32(unsafe { q.add(r * (cols / 4) + k).read_unaligned() });
                for h in 0..2 {
                    let pairs = _mm256_maddubs_epi16(magnitude[h], _mm256_sign_epi8(a, w[h]));
                    dots[r][h] = _mm256_add_epi32(dots[r][h], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        // SAFETY: group `s` of the panel, and of `R` rows.
        unsafe {
            let scale = panel.scale.as_ptr().add(s * PANEL);
            let min = (!panel.min.is_empty()).then(|| panel.min.as_ptr().add(s * PANEL));
            let d = (x.all.d.as_ptr().add(first * (cols / 32) + s * panel.sub / 32), cols / 32);
            end_group(&mut acc, &dots, scale, min, d, (sums.as_ptr().add(first * groups + s), groups));
        }
    }
    for r in 0..R {
        for h in 0..2 {
            // SAFETY: the last assertion.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(r * stride + h * 8), acc[r][h]) }
        }
    }
}

/// Eight floats of a row.
trait Floats {
    const FORMAT: Format;
    unsafe fn load(p: *const u8) -> __m256;
}
struct F32;
struct F16;
struct BF16;
impl Floats for F32 {
    const FORMAT: Format = Format::F32;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m256 {
        // SAFETY: the caller's pointer has 32 bytes.
        unsafe { _mm256_loadu_ps(p.cast()) }
    }
}
impl Floats for F16 {
    const FORMAT: Format = Format::F16;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m256 {
        // SAFETY: the caller's pointer has 16 bytes.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
}
impl Floats for BF16 {
    const FORMAT: Format = Format::BF16;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m256 {
        // SAFETY: the caller's pointer has 16 bytes.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
    }
}

fn dot_floats(format: Format) -> DotFloats {
    fn entry<F: Floats>(data: &[u8], x: &[f32], out: &mut [f32]) {
        // SAFETY: this table is handed out only where `available`.
        unsafe { dot_floats_of::<F>(data, x, out) }
    }
    fn table_entry<T: TableFormat>(data: &[u8], x: &[f32], out: &mut [f32]) {
        // SAFETY: this table is handed out only where `available`.
        unsafe { dot_table_of::<T>(data, x, out) }
    }
    match format {
        Format::F32 => entry::<F32>,
        Format::F16 => entry::<F16>,
        Format::NF4 => table_entry::<NF4>,
        Format::FP4 => table_entry::<FP4>,
        _ => entry::<BF16>,
    }
}

/// Codes are looked up in two registers of eight, and the fourth bit chooses between them.
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_table_of<T: TableFormat>(data: &[u8], x: &[f32], out: &mut [f32]) {
    let row_bytes = x.len() / 32 * table::BYTES;
    assert!(data.len() >= out.len() * row_bytes, "weights are shorter than the rows asked for");
    // SAFETY: sixteen numbers.
    let (low, high) = unsafe { (_mm256_loadu_ps(T::TABLE.as_ptr()), _mm256_loadu_ps(T::TABLE.as_ptr().add(8))) };
    for (r, out) in out.iter_mut().enumerate() {
        let row = &data[r * row_bytes..(r + 1) * row_bytes];
        let mut sums = [_mm256_setzero_ps(); 2];
        for (block, x) in row.as_chunks::<{ table::BYTES }>().0.iter().zip(x.as_chunks::<32>().0) {
            let scale = _mm256_set1_ps(f32::from_le_bytes([block[0], block[1], block[2], block[3]]));
            for h in 0..2 {
                // SAFETY: eight bytes of codes from `4 + 8 h` on, and eight activations at `8 h` and at `16 + 8 h`.
                unsafe {
                    let codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(block.as_ptr().add(4 + 8 * h).cast()));
                    let second = _mm256_srli_epi32::<4>(codes);
                    let (a, b) = (_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes));
                    let w = _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes)));
                    let products = _mm256_mul_ps(w, _mm256_loadu_ps(x.as_ptr().add(8 * h)));
                    let (a, b) = (_mm256_permutevar8x32_ps(low, second), _mm256_permutevar8x32_ps(high, second));
                    let w = _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(second)));
                    let products = _mm256_fmadd_ps(w, _mm256_loadu_ps(x.as_ptr().add(16 + 8 * h)), products);
                    sums[h] = _mm256_fmadd_ps(products, scale, sums[h]);
                }
            }
        }
        // SAFETY: this function's features.
        *out = unsafe { add_across(_mm256_add_ps(sums[0], sums[1])) };
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn dot_floats_of<F: Floats>(data: &[u8], x: &[f32], out: &mut [f32]) {
    let size = F::FORMAT.block_bytes();
    let row_bytes = x.len() * size;
    assert!(data.len() >= out.len() * row_bytes, "weights are shorter than the rows asked for");
    let whole = x.len() / 8 * 8;
    for (r, out) in out.iter_mut().enumerate() {
        let row = &data[r * row_bytes..(r + 1) * row_bytes];
        let mut acc = [_mm256_setzero_ps(); 4];
        for i in (0..whole).step_by(8) {
            // SAFETY: eight more numbers in both rows.
            let (w, x) = unsafe { (F::load(row.as_ptr().add(i * size)), _mm256_loadu_ps(x.as_ptr().add(i))) };
            acc[i / 8 % 4] = _mm256_fmadd_ps(w, x, acc[i / 8 % 4]);
        }
        let both = [_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3])];
        // SAFETY: this function's features.
        let mut sum = unsafe { add_across(_mm256_add_ps(both[0], both[1])) };
        for i in whole..x.len() {
            sum += x[i] * scalar::float_at(F::FORMAT, row, i);
        }
        *out = sum;
    }
}

/// [`scalar::pack_table_of`] for one format, compiled with these target features.
macro_rules! pack_table {
    ($features:literal, $table:ty) => {
        $crate::kernels::lanes::compiled!(
            $features,
            $crate::kernels::scalar::pack_table_of::<$table>,
            (data: &[u8], rows: usize, cols: usize, out: &mut [f32])
        )
    };
}
pub(super) use pack_table;

fn pack_floats(format: Format) -> PackFloats {
    fn entry<F: Floats>(data: &[u8], rows: usize, cols: usize, out: &mut [f32]) {
        // SAFETY: this table is handed out only where `available`.
        unsafe { pack_floats_of::<F>(data, rows, cols, out) }
    }
    match format {
        Format::F32 => entry::<F32>,
        Format::F16 => entry::<F16>,
        Format::NF4 => pack_table!("avx2,fma,f16c", NF4),
        Format::FP4 => pack_table!("avx2,fma,f16c", FP4),
        _ => entry::<BF16>,
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn pack_floats_of<F: Floats>(data: &[u8], rows: usize, cols: usize, out: &mut [f32]) {
    let size = F::FORMAT.block_bytes();
    assert!(rows <= PANEL && data.len() >= rows * cols * size && out.len() >= cols * PANEL);
    let whole = cols / 8 * 8;
    for c in (0..whole).step_by(8) {
        let mut tile = [[0f32; 8]; PANEL];
        for r in 0..rows {
            // SAFETY: eight more numbers in the row; eight in the tile's.
            unsafe { _mm256_storeu_ps(tile[r].as_mut_ptr(), F::load(data.as_ptr().add((r * cols + c) * size))) }
        }
        for j in 0..8 {
            let to = &mut out[(c + j) * PANEL..][..PANEL];
            for r in 0..PANEL {
                to[r] = tile[r][j];
            }
        }
    }
    for c in whole..cols {
        for r in 0..PANEL {
            let row = &data[r.min(rows - 1) * cols * size..][..cols * size];
            out[c * PANEL + r] = if r < rows { scalar::float_at(F::FORMAT, row, c) } else { 0.0 };
        }
    }
}

fn gemm(s: GemmShape, a: &[f32], b: &[f32], c: &mut [f32]) {
    assert!(s.m == 0 || (a.len() >= (s.m - 1) * s.lda + s.k && c.len() >= (s.m - 1) * s.ldc + s.n));
    let panels = s.n.div_ceil(PANEL);
    assert!(panels == 0 || b.len() >= (panels - 1) * s.ldb + s.k * PANEL);
    for p in 0..panels {
        let b = &b[p * s.ldb..];
        let width = PANEL.min(s.n - p * PANEL);
        let mut r = 0;
        while r < s.m {
            let n = [6, 4, 2].into_iter().find(|n| s.m - r >= *n).unwrap_or(1);
            let (a, c) = (&a[r * s.lda..], &mut c[r * s.ldc + p * PANEL..]);
            // SAFETY: this table is handed out only where `available`; sizes are asserted above.
            unsafe {
                match n {
                    6 => gemm_some::<6>(s, width, a, b, c),
                    4 => gemm_some::<4>(s, width, a, b, c),
                    2 => gemm_some::<2>(s, width, a, b, c),
                    _ => gemm_some::<1>(s, width, a, b, c),
                }
            }
            r += n;
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn gemm_some<const R: usize>(s: GemmShape, width: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
    let mut acc = [[_mm256_setzero_ps(); 2]; R];
    let mut edge = [[0f32; PANEL]; R];
    if s.add {
        for r in 0..R {
            edge[r][..width].copy_from_slice(&c[r * s.ldc..][..width]);
            for h in 0..2 {
                // SAFETY: eight numbers.
                acc[r][h] = unsafe { _mm256_loadu_ps(edge[r].as_ptr().add(h * 8)) };
            }
        }
    }
    for k in 0..s.k {
        // SAFETY: `b` has `k` rows of 16 and `a` `R` rows of `k` (asserted by `gemm`).
        unsafe {
            let b0 = _mm256_loadu_ps(b.as_ptr().add(k * PANEL));
            let b1 = _mm256_loadu_ps(b.as_ptr().add(k * PANEL + 8));
            for r in 0..R {
                let a = _mm256_broadcast_ss(&*a.as_ptr().add(r * s.lda + k));
                acc[r][0] = _mm256_fmadd_ps(a, b0, acc[r][0]);
                acc[r][1] = _mm256_fmadd_ps(a, b1, acc[r][1]);
            }
        }
    }
    for r in 0..R {
        for h in 0..2 {
            // SAFETY: eight numbers.
            unsafe { _mm256_storeu_ps(edge[r].as_mut_ptr().add(h * 8), acc[r][h]) }
        }
        c[r * s.ldc..][..width].copy_from_slice(&edge[r][..width]);
    }
}

fn f16_to_f32(src: &[u16], dst: &mut [f32]) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn inner(src: &[u16], dst: &mut [f32]) {
        let (from, tail) = src.as_chunks::<8>();
        let (to, rest) = dst.as_chunks_mut::<8>();
        for (from, to) in from.iter().zip(to) {
            // SAFETY: eight numbers each.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast()))) }
        }
        for (from, to) in tail.iter().zip(rest) {
            *to = half::f16::from_bits(*from).to_f32();
        }
    }
    assert_eq!(src.len(), dst.len());
    // SAFETY: this table is handed out only where `available`.
    unsafe { inner(src, dst) }
}

fn f32_to_f16(src: &[f32], dst: &mut [u16]) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn inner(src: &[f32], dst: &mut [u16]) {
        let (from, tail) = src.as_chunks::<8>();
        let (to, rest) = dst.as_chunks_mut::<8>();
        for (from, to) in from.iter().zip(to) {
            // SAFETY: eight numbers each.
            unsafe {
                let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(from.as_ptr()));
                _mm_storeu_si128(to.as_mut_ptr().cast(), half)
            }
        }
        for (from, to) in tail.iter().zip(rest) {
            *to = half::f16::from_f32(*from).to_bits();
        }
    }
    assert_eq!(src.len(), dst.len());
    // SAFETY: this table is handed out only where `available`.
    unsafe { inner(src, dst) }
}
