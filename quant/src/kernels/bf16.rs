//! Many rows of bf16, in one part or two, rounded and laid out as AMX and AVX512-BF16 take them; and AVX512-BF16's
//! products, of one part.
//!
//! `vdpbf16ps` has half the rate of VNNI, which needs two passes for activations of as many bits, and stops at no scale
//! group. (Intel's processors before AMX take it at a quarter of that rate: see [`pays`].)

mod columns;
mod levels;
mod rows;
mod short;

use super::ahead::Ahead;
use super::codes256::by_codes;
use super::floats512::{BF16, F16, F32, Floats};
use super::processor::amd_family;
use super::{HalfKernels, HalfRows, MulHalf, MulHalfTo, NEAR, PANEL, PackHalf, PackHalfColumns, ROW_BLOCK};
use crate::formats::Format;
use levels::{Factors, Levels, weights};
use std::arch::x86_64::*;
use std::ops::Range;

/// Rows of a block of [`HalfRows`].
pub(super) const ROWS: usize = 16;
/// Columns of a block of [`HalfRows`].
pub(super) const STEP: usize = 32;

/// Whether the processor has what all of this needs; those with AMX do.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vbmi")
}

/// Whether the processor multiplies vectors of bf16 at half the rate of 8-bit integers. AMD's do; Intel's are slower at
/// it than at f32, and those that matter have AMX.
pub(super) fn pays() -> bool {
    amd_family().is_some() && available()
}

pub(super) const KERNELS: HalfKernels = HalfKernels { short: Some(short::short), ..kernels::<1>(mul, None) };
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
        short: None,
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
    fn one<C: Levels>(data: &[u8], rows: usize, cols: usize, out: &mut [u16]) {
        // SAFETY: this table is handed out only where the processor has bf16.
        unsafe { pack_of::<C, 1>(data, cols / C::FORMAT.block_len() * C::BYTES, rows, cols, out) }
    }
    fn two<C: Levels>(data: &[u8], rows: usize, cols: usize, out: &mut [u16]) {
        // SAFETY: as above.
        unsafe { pack_of::<C, 2>(data, cols / C::FORMAT.block_len() * C::BYTES, rows, cols, out) }
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

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")]
fn pack_of<C: Levels, const PARTS: usize>(data: &[u8], row_bytes: usize, rows: usize, cols: usize, out: &mut [u16]) {
    let panel = cols * PANEL;
    assert!(rows <= PANEL && cols.is_multiple_of(C::FORMAT.block_len()) && out.len() >= PARTS * panel);
    assert!(rows == 0 || data.len() >= (rows - 1) * row_bytes + cols / C::FORMAT.block_len() * C::BYTES);
    let mut factors = [Factors::NONE; PANEL];
    for g in 0..cols / STEP {
        let run = data.as_ptr().wrapping_add(g / 8 * C::RUN);
        // SAFETY: group `g` of as many rows (asserted above), and its place in each part of `out`.
        unsafe {
            if g % 8 == 0 {
                for (r, factors) in factors.iter_mut().enumerate().take(rows) {
                    factors.read::<C>(run.add(r * row_bytes), (cols / STEP - g).min(8));
                }
            }
            let mut pairs = [[_mm512_setzero_si512(); PANEL]; PARTS];
            for r in 0..rows {
                let lines = weights::<C, PARTS>(run.add(r * row_bytes), g % 8, &factors[r]);
                for (part, line) in lines.into_iter().enumerate() {
                    pairs[part][r] = line;
                }
            }
            for (part, pairs) in pairs.into_iter().enumerate() {
                store_transposed(pairs, out.as_mut_ptr().add(part * panel + g * STEP * PANEL));
            }
        }
    }
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
            unsafe { multiply(panels, block(rows.start + r).add(k * ROWS), steps, k > 0, Fetch::NOTHING, to, stride) };
        }
    }
    if whole < rows.len() {
        let mut edge = [0f32; TOGETHER * 2 * PANEL];
        // SAFETY: the block has rows up to `padded`; `edge` has eight rows of sums.
        unsafe {
            multiply(
                panels,
                block(rows.start + whole),
                cols / STEP,
                false,
                Fetch::NOTHING,
                edge.as_mut_ptr(),
                2 * PANEL,
            );
        }
        for (r, sums) in (whole..rows.len()).zip(edge.chunks_exact(2 * PANEL)) {
            out[r * stride..][..P * PANEL].copy_from_slice(&sums[..P * PANEL]);
        }
    }
}

/// Lines that are fetched in each step of a product: so many from `at` on, and in the next step those behind them. All at
/// once they would fill the processor's queue of what memory owes it, and hold up what comes after.
#[derive(Clone, Copy)]
struct Fetch {
    ahead: Ahead,
    at: *const u8,
    lines: usize,
}

impl Fetch {
    const NOTHING: Fetch = Fetch { ahead: Ahead::Near, at: std::ptr::null(), lines: 0 };
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
    fetch: Fetch,
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
            fetch.ahead.fetch(fetch.at.wrapping_add(s * fetch.lines * 64), fetch.lines * 64);
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
