//! AVX-512 with VNNI: 512-bit registers, four unsigned by signed byte products added to 32 bits in one step.

use super::bf16;
use super::codes256::{Codes, Dot, by_codes};
use super::columns::compiled_columns;
use super::few256;
use super::floats512::{dot_floats, f16_to_f32, f32_to_f16, gemm, pack_floats};
use super::lanes::compiled_lanes;
use super::scalar::packed;
use super::{CodePanel, DotCodes, Isa, Kernels, Lanes, PANEL, QuantizedRow, QuantizedRowMut, QuantizedRows};
use super::{exp512, few512, heads512, peaks};
use crate::formats::Format;
use std::arch::x86_64::*;
use std::ops::Range;

pub(super) fn available() -> bool {
    super::avx2::available()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
}

pub(super) fn kernels() -> Kernels {
    Kernels {
        isa: Isa::Avx512,
        biased_codes: true,
        quantize,
        dot_batch: few512::dot_batch,
        dot_codes,
        dot_floats,
        pack_codes: packed!("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c", 0x80),
        pack_floats,
        columns: compiled_columns!("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"),
        mul_panels,
        gemm,
        f16_to_f32,
        f32_to_f16,
        half_heads: Some(heads512::KERNELS),
        half: bf16::pays().then_some(bf16::KERNELS),
        half_columns: bf16::pays().then_some(bf16::COLUMNS),
        split: None,
        words: None,
        peaks: peaks::avx512(),
        lanes: Lanes {
            across: super::across512::across,
            exp_sum: |max, x| {
                // SAFETY: this table is handed out only where AVX-512 is available.
                unsafe { exp512::exp_sum(max, x) }
            },
            ..compiled_lanes!("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
        },
    }
}

struct Vnni;

impl Dot for Vnni {
    #[inline(always)]
    unsafe fn start(zero: u8, a: __m256i) -> __m256i {
        // SAFETY: the caller has AVX-512 VL and VNNI.
        unsafe {
            let none = _mm256_setzero_si256();
            if zero == 0 {
                return none;
            }
            _mm256_sub_epi32(none, _mm256_dpbusd_epi32(none, _mm256_set1_epi8(zero as i8), a))
        }
    }

    #[inline(always)]
    unsafe fn dot(start: __m256i, _: u8, codes: __m256i, a: __m256i) -> __m256i {
        // SAFETY: the caller has AVX-512 VL and VNNI.
        unsafe { _mm256_dpbusd_epi32(start, codes, a) }
    }
}

/// See [`scalar::quantize`]: the same codes and scales.
fn quantize(x: &[f32], out: QuantizedRowMut<'_>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn inner(x: &[f32], out: QuantizedRowMut<'_>) {
        let groups = x.len() / 32;
        assert!(out.q.len() >= groups * 32 && out.d.len() >= groups && out.s32.len() >= groups);
        assert!(out.c32.len() >= groups && out.s16.len() >= 2 * groups && out.c16.len() >= 2 * groups);
        for g in 0..groups {
            // SAFETY: 32 numbers from `32 g` on; the outputs have this group (asserted above).
            unsafe {
                let x = [_mm512_loadu_ps(x.as_ptr().add(g * 32)), _mm512_loadu_ps(x.as_ptr().add(g * 32 + 16))];
                // As integers, because a comparison of floats would pass over a NaN.
                let (a, b) = (_mm512_castps_si512(_mm512_abs_ps(x[0])), _mm512_castps_si512(_mm512_abs_ps(x[1])));
                let most = f32::from_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(a, b)));
                let d = most / 127.0;
                let inverse = _mm512_set1_ps(if most == 0.0 { 0.0 } else { 127.0 / most });
                let mut total = 0;
                for h in 0..2 {
                    let q = _mm512_cvtps_epi32(_mm512_mul_ps(x[h], inverse));
                    _mm_storeu_si128(out.q.as_mut_ptr().add(g * 32 + h * 16).cast(), _mm512_cvtsepi32_epi8(q));
                    let sum = _mm512_reduce_add_epi32(q);
                    *out.s16.as_mut_ptr().add(2 * g + h) = d * sum as f32;
                    *out.c16.as_mut_ptr().add(2 * g + h) = sum.wrapping_mul(-128);
                    total = i32::wrapping_add(total, sum);
                }
                *out.d.as_mut_ptr().add(g) = d;
                *out.s32.as_mut_ptr().add(g) = d * total as f32;
                *out.c32.as_mut_ptr().add(g) = total.wrapping_mul(-128);
            }
        }
    }
    // SAFETY: this table is handed out only where `available`.
    unsafe { inner(x, out) }
}

fn dot_codes(format: Format) -> DotCodes {
    few512::dot_codes(format).unwrap_or_else(|| dot_codes_256(format))
}

/// For processors without VBMI, which [`few512`] needs.
pub(super) fn dot_codes_256(format: Format) -> DotCodes {
    fn entry<C: Codes>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
        fn inner<C: Codes>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
            // SAFETY: this function's features.
            unsafe { few256::dot_codes::<C, Vnni>(data, x, out) }
        }
        // SAFETY: this table is handed out only where `available`.
        unsafe { inner::<C>(data, x, out) }
    }
    by_codes!(format, entry)
}

fn mul_panels(panels: &[CodePanel<'_>], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32], stride: usize) {
    let mut r = rows.start;
    while r < rows.end {
        let out = &mut out[(r - rows.start) * stride..];
        let left = rows.end - r;
        // SAFETY: this table is handed out only where `available`; `mul_some` checks the sizes.
        unsafe {
            match panels {
                [a, b] if left >= 6 => {
                    mul_some::<6, 2>([a, b], x, r, out, stride);
                    r += 6;
                }
                [a, b] => {
                    mul_some::<1, 2>([a, b], x, r, out, stride);
                    r += 1;
                }
                [a] if left >= 6 => {
                    mul_some::<6, 1>([a], x, r, out, stride);
                    r += 6;
                }
                [a] => {
                    mul_some::<1, 1>([a], x, r, out, stride);
                    r += 1;
                }
                _ => unreachable!("one or two panels"),
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn mul_some<const R: usize, const P: usize>(
    panels: [&CodePanel<'_>; P],
    x: QuantizedRows<'_>,
    first: usize,
    out: &mut [f32],
    stride: usize,
) {
    let (cols, sub) = (x.cols, panels[0].sub);
    let groups = cols / sub;
    for panel in panels {
        assert!(panel.sub == sub && panel.codes.len() >= cols * PANEL && panel.scale.len() >= groups * PANEL);
        assert!(panel.min.is_empty() || panel.min.len() >= groups * PANEL);
    }
    let rows = first + R;
    assert!(x.all.q.len() >= rows * cols && x.all.d.len() >= rows * cols / 32);
    let (c, sums) = if sub == 16 { (x.all.c16, x.all.s16) } else { (x.all.c32, x.all.s32) };
    assert!(c.len() >= rows * groups && sums.len() >= rows * groups && out.len() >= (R - 1) * stride + P * PANEL);
    let quads = sub / 4;
    let with_min = !panels[0].min.is_empty();
    let q = x.all.q[first * cols..].as_ptr().cast::<i32>();
    let mut acc = [[_mm512_setzero_ps(); P]; R];
    for s in 0..groups {
        // SAFETY: rows `first..first + R` of every array, group `s` of every panel: all asserted above.
        unsafe {
            // The panels' codes are raised by 128: begin with what that adds taken off.
            let mut dots = [[_mm512_setzero_si512(); P]; R];
            for r in 0..R {
                dots[r] = [_mm512_set1_epi32(*c.as_ptr().add((first + r) * groups + s)); P];
            }
            for k in s * quads..(s + 1) * quads {
                let mut w = [_mm512_setzero_si512(); P];
                for p in 0..P {
                    w[p] = _mm512_loadu_si512(panels[p].codes.as_ptr().add(k * 64).cast());
                }
                for r in 0..R {
                    let a = _mm512_set1_epi32(q.add(r * (cols / 4) + k).read_unaligned());
                    for p in 0..P {
                        dots[r][p] = _mm512_dpbusd_epi32(dots[r][p], w[p], a);
                    }
                }
            }
            let d = x.all.d.as_ptr().add(first * (cols / 32) + s * sub / 32);
            let sums = sums.as_ptr().add(first * groups + s);
            for p in 0..P {
                let scale = _mm512_loadu_ps(panels[p].scale.as_ptr().add(s * PANEL));
                for r in 0..R {
                    let factor = _mm512_mul_ps(scale, _mm512_set1_ps(*d.add(r * (cols / 32))));
                    acc[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][p]), factor, acc[r][p]);
                }
                if with_min {
                    let min = _mm512_loadu_ps(panels[p].min.as_ptr().add(s * PANEL));
                    for r in 0..R {
                        acc[r][p] = _mm512_fnmadd_ps(min, _mm512_set1_ps(*sums.add(r * groups)), acc[r][p]);
                    }
                }
            }
        }
    }
    for r in 0..R {
        for p in 0..P {
            // SAFETY: asserted above.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(r * stride + p * PANEL), acc[r][p]) }
        }
    }
}
