//! Many rows of bf16, in one part or two, rounded and laid out as AMX and AVX512-BF16 take them; and AVX512-BF16's
//! products, of one part.
//!
//! `vdpbf16ps` has half the rate of VNNI, which needs two passes for activations of as many bits, and stops at no scale
//! group. (Intel's processors before AMX take it at a quarter of that rate: see [`pays`].)

mod columns;
mod rows;

use super::codes256::{Codes, by_codes};
use super::floats512::{BF16, F16, F32, Floats};
use super::processor::amd_family;
use super::{HalfKernels, HalfRows, MulHalf, MulHalfTo, PANEL, PackHalf, PackHalfColumns, ROW_BLOCK};
use crate::formats::Format;
use std::arch::x86_64::*;
use std::ops::Range;

/// Rows of a block of [`HalfRows`].
pub(super) const ROWS: usize = 16;
/// Columns of a block of [`HalfRows`].
pub(super) const STEP: usize = 32;

/// Whether the processor multiplies vectors of bf16 at half the rate of 8-bit integers. AMD's do; Intel's are slower at
/// it than at f32, and those that matter have AMX.
pub(super) fn pays() -> bool {
    amd_family().is_some() && is_x86_feature_detected!("avx512bf16")
}

pub(super) const KERNELS: HalfKernels = kernels::<1>(mul, None);
pub(super) const COLUMNS: fn(Format) -> PackHalfColumns = columns::columns;

/// The kernels for so many [`HalfKernels::parts`], which `mul` and `mul_to` multiply.
pub(super) const fn kernels<const PARTS: usize>(mul: MulHalf, mul_to: Option<MulHalfTo>) -> HalfKernels {
    HalfKernels {
        parts: PARTS,
        round: round::<PARTS>,
        pack: pack::<PARTS>,
        across: rows::across::<PARTS>,
        pairs: rows::pairs::<PARTS>,
        turn: rows::turn,
        mul,
        mul_to,
    }
}

/// 32 numbers in parts of bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded<const PARTS: usize>(low: __m512, high: __m512) -> [__m512i; PARTS] {
    let mut rest = [low, high];
    let mut parts = [_mm512_setzero_si512(); PARTS];
    for part in 0..PARTS {
        // SAFETY: both are 64 bytes.
        parts[part] = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(rest[1], rest[0])) };
        let halves = [_mm512_castsi512_si256(parts[part]), _mm512_extracti64x4_epi64::<1>(parts[part])];
        for (rest, half) in rest.iter_mut().zip(halves) {
            let wide = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
            *rest = _mm512_sub_ps(*rest, wide);
        }
    }
    parts
}

fn round<const PARTS: usize>(x: &[f32], cols: usize, out: &mut [u16]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn inner<const PARTS: usize>(x: &[f32], cols: usize, out: &mut [u16]) {
        for (r, row) in x.chunks_exact(cols).enumerate() {
            for (k, x) in row.as_chunks::<STEP>().0.iter().enumerate() {
                // SAFETY: 32 numbers.
                let (low, high) = unsafe { (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))) };
                for (part, line) in rounded::<PARTS>(low, high).into_iter().enumerate() {
                    let out = &mut out[part * ROWS * cols..][(k * ROWS + r) * STEP..][..STEP];
                    // SAFETY: 32 numbers.
                    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), line) }
                }
            }
        }
    }
    assert!(cols.is_multiple_of(STEP) && x.len() <= ROWS * cols && out.len() == PARTS * ROWS * cols);
    // SAFETY: this table is handed out only where the processor has bf16.
    unsafe { inner::<PARTS>(x, cols, out) }
}

fn pack<const PARTS: usize>(format: Format) -> PackHalf {
    fn one<C: Codes>(data: &[u8], rows: usize, cols: usize, out: &mut [u16]) {
        // SAFETY: this table is handed out only where the processor has bf16.
        unsafe { pack_of::<C, 1>(data, rows, cols, out) }
    }
    fn two<C: Codes>(data: &[u8], rows: usize, cols: usize, out: &mut [u16]) {
        // SAFETY: as above.
        unsafe { pack_of::<C, 2>(data, rows, cols, out) }
    }
    fn floats<F: Floats, const PARTS: usize>(data: &[u8], rows: usize, cols: usize, out: &mut [u16]) {
        // SAFETY: as above.
        unsafe { pack_floats_of::<F, PARTS>(data, rows, cols, out) }
    }
    match format {
        Format::F32 => floats::<F32, PARTS>,
        Format::F16 => floats::<F16, PARTS>,
        Format::BF16 => floats::<BF16, 1>,
        format if PARTS == 1 => by_codes!(format, one),
        format => by_codes!(format, two),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pack_floats_of<F: Floats, const PARTS: usize>(data: &[u8], rows: usize, cols: usize, out: &mut [u16]) {
    let (size, panel) = (F::FORMAT.block_bytes(), cols * PANEL);
    assert!(cols.is_multiple_of(STEP) && rows <= PANEL && data.len() >= rows * cols * size);
    assert!(out.len() >= PARTS * panel);
    for c in (0..cols).step_by(STEP) {
        let mut pairs = [[_mm512_setzero_si512(); PANEL]; PARTS];
        for r in 0..rows {
            // SAFETY: 32 numbers of the row.
            let (low, high) = unsafe {
                let at = data.as_ptr().add((r * cols + c) * size);
                (F::load(at, !0), F::load(at.add(16 * size), !0))
            };
            for (part, line) in rounded::<PARTS>(low, high).into_iter().enumerate() {
                pairs[part][r] = line;
            }
        }
        for (part, pairs) in pairs.into_iter().enumerate() {
            // SAFETY: this step's place in a part of `out` (asserted above).
            unsafe { store_transposed(pairs, out.as_mut_ptr().add(part * panel + c * PANEL)) };
        }
    }
}

/// Scales and minimums of one row's run: of each group, or of each half of one.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Factors {
    scale: [f32; 16],
    min: [f32; 16],
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn pack_of<C: Codes, const PARTS: usize>(data: &[u8], rows: usize, cols: usize, out: &mut [u16]) {
    let (row_bytes, panel) = (cols / C::FORMAT.block_len() * C::BYTES, cols * PANEL);
    assert!(rows <= PANEL && data.len() >= rows * row_bytes && out.len() >= PARTS * panel);
    let groups = cols / 32;
    let mut factors = [Factors { scale: [0.0; 16], min: [0.0; 16] }; PANEL];
    for run in 0..groups / 8 {
        for r in 0..rows {
            // SAFETY: a whole run of row `r` (asserted above), and sixteen numbers in each array.
            unsafe {
                let at = data.as_ptr().add(r * row_bytes + run * C::RUN);
                let ([a, b], to) = (C::scales(at), factors[r].scale.as_mut_ptr());
                _mm256_store_ps(to, a);
                _mm256_store_ps(to.add(8), b);
                if C::HAS_MIN {
                    let ([a, b], to) = (C::mins(at), factors[r].min.as_mut_ptr());
                    _mm256_store_ps(to, a);
                    _mm256_store_ps(to.add(8), b);
                }
            }
        }
        for g in 0..8 {
            let mut pairs = [[_mm512_setzero_si512(); PANEL]; PARTS];
            for r in 0..rows {
                let Factors { scale, min } = &factors[r];
                let [a, b] = if C::HALVES { [2 * g, 2 * g + 1] } else { [g, g] };
                // SAFETY: group `g` of this run of row `r`.
                let codes = unsafe { C::codes(data.as_ptr().add(r * row_bytes + run * C::RUN), g) };
                let [low, high] = weights::<C>(codes, [scale[a], scale[b]], [min[a], min[b]]);
                for (part, line) in rounded::<PARTS>(low, high).into_iter().enumerate() {
                    pairs[part][r] = line;
                }
            }
            for (part, pairs) in pairs.into_iter().enumerate() {
                // SAFETY: this group's place in a part of `out` (asserted above).
                unsafe { store_transposed(pairs, out.as_mut_ptr().add(part * panel + (run * 8 + g) * STEP * PANEL)) };
            }
        }
    }
    if C::GROUPS == 1 {
        for g in groups / 8 * 8..groups {
            let mut pairs = [[_mm512_setzero_si512(); PANEL]; PARTS];
            for r in 0..rows {
                // SAFETY: a group of row `r` behind its last whole run.
                let [low, high] = unsafe {
                    let at = data.as_ptr().add(r * row_bytes + groups / 8 * C::RUN);
                    let (scale, min) = C::scale_and_min(at, g % 8);
                    weights::<C>(C::codes(at, g % 8), [_mm256_cvtss_f32(scale); 2], [min; 2])
                };
                for (part, line) in rounded::<PARTS>(low, high).into_iter().enumerate() {
                    pairs[part][r] = line;
                }
            }
            for (part, pairs) in pairs.into_iter().enumerate() {
                // SAFETY: this group's place in a part of `out` (asserted above).
                unsafe { store_transposed(pairs, out.as_mut_ptr().add(part * panel + g * STEP * PANEL)) };
            }
        }
    }
}

/// 32 weights, decoded as the format says.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn weights<C: Codes>(codes: __m256i, scale: [f32; 2], min: [f32; 2]) -> [__m512; 2] {
    let zero = _mm512_set1_epi32(i32::from(C::ZERO));
    let halves = [_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes)];
    let mut values = [_mm512_setzero_ps(); 2];
    for h in 0..2 {
        let centred = _mm512_sub_epi32(_mm512_cvtepu8_epi32(halves[h]), zero);
        values[h] = _mm512_mul_ps(_mm512_set1_ps(scale[h]), _mm512_cvtepi32_ps(centred));
        if C::HAS_MIN {
            values[h] = _mm512_sub_ps(values[h], _mm512_set1_ps(min[h]));
        }
    }
    values
}

/// Stores 16 rows of 16 pairs as 16 lines, of which line `k` holds pair `k` of each row.
///
/// # Safety
/// `out` has room for 512 numbers.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store_transposed(rows: [__m512i; 16], out: *mut u16) {
    let (mut a, mut b) = (rows, rows);
    for i in 0..8 {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for i in 0..4 {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    // Now `a[4 i + k]` holds, in its quarter `q`, pair `4 q + k` of the rows `4 i .. 4 i + 4`.
    for k in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x88>(a[k], a[4 + k]);
        let high = _mm512_shuffle_i32x4::<0x88>(a[8 + k], a[12 + k]);
        b[k] = _mm512_shuffle_i32x4::<0x88>(low, high);
        b[8 + k] = _mm512_shuffle_i32x4::<0xdd>(low, high);
        let low = _mm512_shuffle_i32x4::<0xdd>(a[k], a[4 + k]);
        let high = _mm512_shuffle_i32x4::<0xdd>(a[8 + k], a[12 + k]);
        b[4 + k] = _mm512_shuffle_i32x4::<0x88>(low, high);
        b[12 + k] = _mm512_shuffle_i32x4::<0xdd>(low, high);
    }
    for (k, line) in b.into_iter().enumerate() {
        // SAFETY: line `k` of the caller's sixteen.
        unsafe { _mm512_storeu_si512(out.add(k * 32).cast(), line) }
    }
}

/// Rows that go through a panel together: with two panels their sums fill half of the registers.
const TOGETHER: usize = 8;
/// Columns of a panel that stay in the nearest cache while all rows go over them.
const NEAR: usize = 256;

fn mul(panels: &[&[u16]], x: HalfRows<'_>, rows: Range<usize>, out: &mut [f32], stride: usize) {
    let (cols, padded) = (x.cols, x.padded);
    assert!(cols.is_multiple_of(STEP) && panels.iter().all(|p| p.len() >= cols * PANEL));
    assert!(rows.start.is_multiple_of(ROW_BLOCK) && rows.end <= padded && padded.is_multiple_of(ROW_BLOCK));
    assert!(x.all.len() >= padded * cols);
    assert!(rows.is_empty() || out.len() >= (rows.len() - 1) * stride + panels.len() * PANEL);
    // SAFETY: this table is handed out only where the processor has bf16; sizes are asserted above.
    unsafe {
        match panels {
            [a, b] => mul_panels::<2>([a.as_ptr(), b.as_ptr()], x, rows, out, stride),
            [a] => mul_panels::<1>([a.as_ptr()], x, rows, out, stride),
            _ => unreachable!("one or two panels"),
        }
    }
}

/// # Safety
/// What [`mul`] asserts.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn mul_panels<const P: usize>(
    panels: [*const u16; P],
    x: HalfRows<'_>,
    rows: Range<usize>,
    out: &mut [f32],
    stride: usize,
) {
    let cols = x.cols;
    // The first of the rows `r .. r + 8`: the upper or the lower half of a block.
    let block = |r: usize| x.all[r / ROWS * ROWS * cols + r % ROWS * STEP..].as_ptr();
    let whole = rows.len() / TOGETHER * TOGETHER;
    for k in (0..cols).step_by(NEAR) {
        let steps = NEAR.min(cols - k) / STEP;
        let panels = panels.map(|p| p.wrapping_add(k * PANEL));
        for r in (0..whole).step_by(TOGETHER) {
            let to = out[r * stride..].as_mut_ptr();
            // SAFETY: eight rows of activations and of sums; `steps` steps of each panel from `k` on.
            unsafe { multiply(panels, block(rows.start + r).add(k * ROWS), steps, k > 0, to, stride) };
        }
    }
    if whole < rows.len() {
        let mut edge = [0f32; TOGETHER * 2 * PANEL];
        // SAFETY: the block has rows up to `padded`; `edge` has eight rows of sums.
        unsafe {
            multiply(panels, block(rows.start + whole), cols / STEP, false, edge.as_mut_ptr(), 2 * PANEL);
        }
        for (r, sums) in (whole..rows.len()).zip(edge.chunks_exact(2 * PANEL)) {
            out[r * stride..][..P * PANEL].copy_from_slice(&sums[..P * PANEL]);
        }
    }
}

/// Eight rows of activations, 64 bytes of each step apart, times `P` panels; with `add` the products are added to `out`.
///
/// # Safety
/// `steps` steps of activations and of each panel, and eight rows of sums at distance `stride`.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn multiply<const P: usize>(
    panels: [*const u16; P],
    x: *const u16,
    steps: usize,
    add: bool,
    out: *mut f32,
    stride: usize,
) {
    let mut acc = [[_mm512_setzero_ps(); P]; TOGETHER];
    // SAFETY: the caller's promise.
    unsafe {
        if add {
            for r in 0..TOGETHER {
                for p in 0..P {
                    acc[r][p] = _mm512_loadu_ps(out.add(r * stride + p * PANEL));
                }
            }
        }
        for s in 0..steps {
            for j in 0..STEP / 2 {
                let mut w = [_mm512_setzero_si512(); P];
                for p in 0..P {
                    w[p] = _mm512_loadu_si512(panels[p].add((s * STEP / 2 + j) * 2 * PANEL).cast());
                }
                for r in 0..TOGETHER {
                    let pair = x.add(s * ROWS * STEP + r * STEP + 2 * j).cast::<i32>().read_unaligned();
                    let pair: __m512bh = std::mem::transmute(_mm512_set1_epi32(pair));
                    for p in 0..P {
                        acc[r][p] = _mm512_dpbf16_ps(acc[r][p], std::mem::transmute::<__m512i, __m512bh>(w[p]), pair);
                    }
                }
            }
        }
        for r in 0..TOGETHER {
            for p in 0..P {
                _mm512_storeu_ps(out.add(r * stride + p * PANEL), acc[r][p]);
            }
        }
    }
}
