//! AVX2 with AVX-VNNI (Alder Lake, Zen 5 and later without their AVX-512): four unsigned by signed byte products added
//! to 32 bits in one step, where AVX2 alone takes four; all else as AVX2 does it.

use super::codes256::{Codes, Dot, by_codes};
use super::panel256::end_group;
use super::scalar::packed;
use super::{CodePanel, DotCodes, Isa, Kernels, PANEL, Peaks, QuantizedRow, QuantizedRows, avx2, few256, peaks};
use crate::formats::Format;
use std::arch::x86_64::*;
use std::ops::Range;

pub(super) fn available() -> bool {
    avx2::available() && is_x86_feature_detected!("avxvnni")
}

pub(super) fn kernels() -> Kernels {
    let peaks = Peaks { int8: Some(peaks::int8_vnni_256), ..peaks::AVX2 };
    // Twice four bytes in a step are as fast as two words, and the panels half as long.
    let words = None;
    Kernels {
        isa: Isa::AvxVnni,
        biased_codes: true,
        dot_codes,
        pack_codes: packed!("avx2,fma,f16c", 0x80),
        mul_panels,
        words,
        peaks,
        ..avx2::kernels()
    }
}

struct Vnni;

impl Dot for Vnni {
    #[inline(always)]
    unsafe fn start(zero: u8, a: __m256i) -> __m256i {
        // SAFETY: the caller has AVX-VNNI.
        unsafe {
            let none = _mm256_setzero_si256();
            if zero == 0 {
                return none;
            }
            _mm256_sub_epi32(none, _mm256_dpbusd_avx_epi32(none, _mm256_set1_epi8(zero as i8), a))
        }
    }

    #[inline(always)]
    unsafe fn dot(start: __m256i, _: u8, codes: __m256i, a: __m256i) -> __m256i {
        // SAFETY: the caller has AVX-VNNI.
        unsafe { _mm256_dpbusd_avx_epi32(start, codes, a) }
    }
}

fn dot_codes(format: Format) -> DotCodes {
    fn entry<C: Codes>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
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
    for (p, panel) in panels.iter().enumerate() {
        let mut r = rows.start;
        while r < rows.end {
            let out = &mut out[(r - rows.start) * stride + p * PANEL..];
            // SAFETY: this table is handed out only where `available`; `mul_some` checks the sizes.
            r += unsafe {
                if rows.end - r >= 6 {
                    mul_some::<6>(panel, x, r, out, stride);
                    6
                } else {
                    mul_some::<1>(panel, x, r, out, stride);
                    1
                }
            };
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn mul_some<const R: usize>(panel: &CodePanel<'_>, x: QuantizedRows<'_>, first: usize, out: &mut [f32], stride: usize) {
    let (cols, sub) = (x.cols, panel.sub);
    let groups = cols / sub;
    assert!(panel.codes.len() >= cols * PANEL && panel.scale.len() >= groups * PANEL);
    assert!(panel.min.is_empty() || panel.min.len() >= groups * PANEL);
    let rows = first + R;
    assert!(x.all.q.len() >= rows * cols && x.all.d.len() >= rows * cols / 32);
    let (c, sums) = if sub == 16 { (x.all.c16, x.all.s16) } else { (x.all.c32, x.all.s32) };
    assert!(c.len() >= rows * groups && sums.len() >= rows * groups && out.len() >= (R - 1) * stride + PANEL);
    let quads = sub / 4;
    let q = x.all.q[first * cols..].as_ptr().cast::<i32>();
    let mut acc = [[_mm256_setzero_ps(); 2]; R];
    for s in 0..groups {
        // SAFETY: rows `first..first + R` of every array, group `s` of the panel: all asserted above.
        unsafe {
            // The panel's codes are raised by 128: begin with what that adds taken off.
            let mut dots = [[_mm256_setzero_si256(); 2]; R];
            for r in 0..R {
                dots[r] = [_mm256_set1_epi32(*c.as_ptr().add((first + r) * groups + s)); 2];
            }
            for k in s * quads..(s + 1) * quads {
                let at = panel.codes.as_ptr().add(k * 64);
                let w = [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())];
                for r in 0..R {
                    let a = _mm256_set1_epi32(q.add(r * (cols / 4) + k).read_unaligned());
                    for h in 0..2 {
                        dots[r][h] = _mm256_dpbusd_avx_epi32(dots[r][h], w[h], a);
                    }
                }
            }
            let scale = panel.scale.as_ptr().add(s * PANEL);
            let min = (!panel.min.is_empty()).then(|| panel.min.as_ptr().add(s * PANEL));
            let d = (x.all.d.as_ptr().add(first * (cols / 32) + s * sub / 32), cols / 32);
            end_group(&mut acc, &dots, scale, min, d, (sums.as_ptr().add(first * groups + s), groups));
        }
    }
    for r in 0..R {
        for h in 0..2 {
            // SAFETY: asserted above.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(r * stride + h * 8), acc[r][h]) }
        }
    }
}
