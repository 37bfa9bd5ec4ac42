//! Weights that are multiplied as floats, and conversions between their widths, in 512-bit registers.

use super::ahead::Ahead;
use super::avx2::pack_table;
use super::bf16::store_transposed;
use super::{DotFloats, GemmShape, PANEL, PackFloats};
use crate::formats::{FP4, Format, NF4, TableFormat, table};
use std::arch::x86_64::*;

/// Sixteen floats of a row, of which the first `n` are read.
pub(super) trait Floats {
    const FORMAT: Format;
    /// # Safety
    /// `p` has the masked numbers.
    unsafe fn load(p: *const u8, mask: __mmask16) -> __m512;
}
pub(super) struct F32;
pub(super) struct F16;
pub(super) struct BF16;
impl Floats for F32 {
    const FORMAT: Format = Format::F32;
    #[inline(always)]
    unsafe fn load(p: *const u8, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's pointer has the masked numbers.
        unsafe { _mm512_maskz_loadu_ps(mask, p.cast()) }
    }
}
impl Floats for F16 {
    const FORMAT: Format = Format::F16;
    #[inline(always)]
    unsafe fn load(p: *const u8, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's pointer has the masked numbers.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p.cast())) }
    }
}
impl Floats for BF16 {
    const FORMAT: Format = Format::BF16;
    #[inline(always)]
    unsafe fn load(p: *const u8, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's pointer has the masked numbers.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
}

/// The first `n` lanes.
fn first(n: usize) -> __mmask16 {
    if n >= 16 { !0 } else { (1 << n) - 1 }
}

pub(super) fn dot_floats(format: Format) -> DotFloats {
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

/// The whole table is one register.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn dot_table_of<T: TableFormat>(data: &[u8], x: &[f32], out: &mut [f32]) {
    let row_bytes = x.len() / 32 * table::BYTES;
    assert!(data.len() >= out.len() * row_bytes, "weights are shorter than the rows asked for");
    // SAFETY: sixteen numbers.
    let table = unsafe { _mm512_loadu_ps(T::TABLE.as_ptr()) };
    for (r, out) in out.iter_mut().enumerate() {
        let row = &data[r * row_bytes..(r + 1) * row_bytes];
        let mut sums = [_mm512_setzero_ps(); 2];
        for (b, (block, x)) in row.as_chunks::<{ table::BYTES }>().0.iter().zip(x.as_chunks::<32>().0).enumerate() {
            let scale = _mm512_set1_ps(f32::from_le_bytes([block[0], block[1], block[2], block[3]]));
            // SAFETY: 16 bytes of codes from 4 on, and 32 activations.
            unsafe {
                let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(block.as_ptr().add(4).cast()));
                // A permutation looks at four bits of each index, so the codes above them do no harm.
                let (first, second) = (codes, _mm512_srli_epi32::<4>(codes));
                let products = _mm512_mul_ps(_mm512_permutexvar_ps(first, table), _mm512_loadu_ps(x.as_ptr()));
                let w = _mm512_permutexvar_ps(second, table);
                let products = _mm512_fmadd_ps(w, _mm512_loadu_ps(x.as_ptr().add(16)), products);
                sums[b % 2] = _mm512_fmadd_ps(products, scale, sums[b % 2]);
            }
        }
        *out = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
    }
}

/// Bytes that weights are fetched ahead.
const AHEAD: usize = 4096;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn dot_floats_of<F: Floats>(data: &[u8], x: &[f32], out: &mut [f32]) {
    let size = F::FORMAT.block_bytes();
    let row_bytes = x.len() * size;
    // Other processors follow one stream as well by themselves.
    let fetches = Ahead::here() == Ahead::Past;
    assert!(data.len() >= out.len() * row_bytes, "weights are shorter than the rows asked for");
    for (r, out) in out.iter_mut().enumerate() {
        let row = &data[r * row_bytes..(r + 1) * row_bytes];
        let mut acc = [_mm512_setzero_ps(); 4];
        let whole = x.len() / 64 * 64;
        for i in (0..whole).step_by(64) {
            if fetches {
                Ahead::Past.fetch(row.as_ptr().wrapping_add(i * size + AHEAD), 64 * size);
            }
            for j in 0..4 {
                let at = i + j * 16;
                // SAFETY: sixteen more numbers in both rows.
                let (w, x) = unsafe { (F::load(row.as_ptr().add(at * size), !0), _mm512_loadu_ps(x.as_ptr().add(at))) };
                acc[j] = _mm512_fmadd_ps(w, x, acc[j]);
            }
        }
        for (j, at) in (whole..x.len()).step_by(16).enumerate() {
            let mask = first(x.len() - at);
            // SAFETY: the masked numbers are inside both rows.
            let (w, x) = unsafe {
                (F::load(row.as_ptr().add(at * size), mask), _mm512_maskz_loadu_ps(mask, x.as_ptr().add(at)))
            };
            acc[j] = _mm512_fmadd_ps(w, x, acc[j]);
        }
        *out = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3])));
    }
}

pub(super) fn pack_floats(format: Format) -> PackFloats {
    fn entry<F: Floats>(data: &[u8], rows: usize, cols: usize, out: &mut [f32]) {
        // SAFETY: this table is handed out only where `available`.
        unsafe { pack_floats_of::<F>(data, rows, cols, out) }
    }
    match format {
        Format::F32 => entry::<F32>,
        Format::F16 => entry::<F16>,
        Format::NF4 => pack_table!("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", NF4),
        Format::FP4 => pack_table!("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", FP4),
        _ => entry::<BF16>,
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn pack_floats_of<F: Floats>(data: &[u8], rows: usize, cols: usize, out: &mut [f32]) {
    let size = F::FORMAT.block_bytes();
    assert!(rows <= PANEL && data.len() >= rows * cols * size && out.len() >= cols * PANEL);
    for c in (0..cols / 16 * 16).step_by(16) {
        let mut tile = [_mm512_setzero_si512(); PANEL];
        for r in 0..rows {
            // SAFETY: sixteen numbers of the row.
            tile[r] = _mm512_castps_si512(unsafe { F::load(data.as_ptr().add((r * cols + c) * size), !0) });
        }
        // SAFETY: sixteen lines of the panel (asserted above).
        unsafe { store_transposed(tile, out.as_mut_ptr().add(c * PANEL).cast()) };
    }
    for c in (cols / 16 * 16..cols).step_by(16) {
        let n = cols - c;
        let mut tile = [[0f32; 16]; PANEL];
        for r in 0..rows {
            // SAFETY: the masked numbers are inside the row; the tile's rows have sixteen.
            unsafe {
                let x = F::load(data.as_ptr().add((r * cols + c) * size), first(n));
                _mm512_storeu_ps(tile[r].as_mut_ptr(), x)
            }
        }
        for j in 0..n {
            let to = &mut out[(c + j) * PANEL..][..PANEL];
            for r in 0..PANEL {
                to[r] = tile[r][j];
            }
        }
    }
}

pub(super) fn gemm(s: GemmShape, a: &[f32], b: &[f32], c: &mut [f32]) {
    assert!(s.m == 0 || (a.len() >= (s.m - 1) * s.lda + s.k && c.len() >= (s.m - 1) * s.ldc + s.n));
    let panels = s.n.div_ceil(PANEL);
    assert!(panels == 0 || b.len() >= (panels - 1) * s.ldb + s.k * PANEL);
    let mut p = 0;
    while p < panels {
        let two = panels - p >= 2;
        let mut r = 0;
        while r < s.m {
            let rows = [12, 8, 4, 2].into_iter().find(|rows| s.m - r >= *rows).unwrap_or(1);
            let (a, b, c) = (&a[r * s.lda..], &b[p * s.ldb..], &mut c[r * s.ldc + p * PANEL..]);
            let width = s.n - p * PANEL;
            // SAFETY: this table is handed out only where `available`; sizes are asserted above.
            unsafe {
                match (two, rows) {
                    (true, 12) => gemm_some::<12, 2>(s, width, a, b, c),
                    (true, 8) => gemm_some::<8, 2>(s, width, a, b, c),
                    (true, 4) => gemm_some::<4, 2>(s, width, a, b, c),
                    (true, 2) => gemm_some::<2, 2>(s, width, a, b, c),
                    (true, _) => gemm_some::<1, 2>(s, width, a, b, c),
                    (false, 12) => gemm_some::<12, 1>(s, width, a, b, c),
                    (false, 8) => gemm_some::<8, 1>(s, width, a, b, c),
                    (false, 4) => gemm_some::<4, 1>(s, width, a, b, c),
                    (false, 2) => gemm_some::<2, 1>(s, width, a, b, c),
                    (false, _) => gemm_some::<1, 1>(s, width, a, b, c),
                }
            }
            r += rows;
        }
        p += if two { 2 } else { 1 };
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn gemm_some<const R: usize, const P: usize>(s: GemmShape, width: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
    let mut masks = [0 as __mmask16; P];
    for p in 0..P {
        masks[p] = first(width - p * PANEL);
    }
    let mut acc = [[_mm512_setzero_ps(); P]; R];
    if s.add {
        for r in 0..R {
            for p in 0..P {
                // SAFETY: the masked numbers are inside the row of `c` (asserted by `gemm`).
                acc[r][p] = unsafe { _mm512_maskz_loadu_ps(masks[p], c.as_ptr().add(r * s.ldc + p * PANEL)) };
            }
        }
    }
    for k in 0..s.k {
        // SAFETY: each panel of `b` has `k` rows of 16, and `a` has `R` rows of `k` (asserted by `gemm`).
        unsafe {
            let mut w = [_mm512_setzero_ps(); P];
            for p in 0..P {
                w[p] = _mm512_loadu_ps(b.as_ptr().add(p * s.ldb + k * PANEL));
            }
            for r in 0..R {
                let a = _mm512_set1_ps(*a.as_ptr().add(r * s.lda + k));
                for p in 0..P {
                    acc[r][p] = _mm512_fmadd_ps(a, w[p], acc[r][p]);
                }
            }
        }
    }
    for r in 0..R {
        for p in 0..P {
            // SAFETY: as for the loads.
            unsafe { _mm512_mask_storeu_ps(c.as_mut_ptr().add(r * s.ldc + p * PANEL), masks[p], acc[r][p]) }
        }
    }
}

pub(super) fn f16_to_f32(src: &[u16], dst: &mut [f32]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn inner(src: &[u16], dst: &mut [f32]) {
        for i in (0..src.len()).step_by(16) {
            let mask = first(src.len() - i);
            // SAFETY: the masked numbers are inside both slices.
            unsafe {
                let x = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, src.as_ptr().add(i).cast()));
                _mm512_mask_storeu_ps(dst.as_mut_ptr().add(i), mask, x)
            }
        }
    }
    assert_eq!(src.len(), dst.len());
    // SAFETY: this table is handed out only where `available`.
    unsafe { inner(src, dst) }
}

pub(super) fn f32_to_f16(src: &[f32], dst: &mut [u16]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn inner(src: &[f32], dst: &mut [u16]) {
        for i in (0..src.len()).step_by(16) {
            let mask = first(src.len() - i);
            // SAFETY: the masked numbers are inside both slices.
            unsafe {
                let x = _mm512_maskz_loadu_ps(mask, src.as_ptr().add(i));
                let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(x);
                _mm256_mask_storeu_epi16(dst.as_mut_ptr().add(i).cast(), mask, half)
            }
        }
    }
    assert_eq!(src.len(), dst.len());
    // SAFETY: this table is handed out only where `available`.
    unsafe { inner(src, dst) }
}
