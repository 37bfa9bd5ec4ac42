//! Many rows: activations times panels of unpacked weights.

use super::instructions::*;
use crate::kernels::{CodePanel, GemmShape, PANEL, QuantizedRows};
use std::ops::Range;

/// Integer products of `R` rows of activations with `Q` quads of weight rows.
trait Products<const R: usize, const Q: usize> {
    /// `codes` are the quads of columns (64 codes each) that `q` holds, and `from` the first quad of weight rows.
    fn products(codes: &[[i8; 64]], from: usize, q: &[&[i8]; R]) -> [[int32x4_t; Q]; R];
}

impl<S: Sdot, const R: usize> Products<R, 4> for S {
    #[inline(always)]
    fn products(codes: &[[i8; 64]], _: usize, q: &[&[i8]; R]) -> [[int32x4_t; 4]; R] {
        let mut acc = [[vdupq_n_s32(0); 4]; R];
        for (c, codes) in codes.as_chunks::<4>().0.iter().enumerate() {
            let mut x = [vdupq_n_s8(0); R];
            for r in 0..R {
                x[r] = load_i8(&q[r].as_chunks::<16>().0[c]);
            }
            macro_rules! column_quad {
                ($lane:literal) => {
                    let (w, _) = codes[$lane].as_chunks::<16>();
                    for o in 0..4 {
                        let w = load_i8(&w[o]);
                        for r in 0..R {
                            acc[r][o] = S::sdot_lane::<$lane>(acc[r][o], w, x[r]);
                        }
                    }
                };
            }
            column_quad!(0);
            column_quad!(1);
            column_quad!(2);
            column_quad!(3);
        }
        acc
    }
}

/// By `smmla`. Only for functions compiled for i8mm, which run only where the processor has it.
struct Matrix;

impl Products<8, 2> for Matrix {
    #[inline(always)]
    fn products(codes: &[[i8; 64]], from: usize, q: &[&[i8]; 8]) -> [[int32x4_t; 2]; 8] {
        let wide = |v| vreinterpretq_s64_s8(v);
        // Pairs of rows by pairs of weight rows.
        let mut acc = [[vdupq_n_s32(0); 4]; 4];
        for (c, codes) in codes.as_chunks::<4>().0.iter().enumerate() {
            // Two rows in turns of 8 columns: the first 8, then the last 8 of 16.
            let mut x = [[vdupq_n_s8(0); 4]; 2];
            for pair in 0..4 {
                let a = wide(load_i8(&q[2 * pair].as_chunks::<16>().0[c]));
                let b = wide(load_i8(&q[2 * pair + 1].as_chunks::<16>().0[c]));
                x[0][pair] = vreinterpretq_s8_s64(vzip1q_s64(a, b));
                x[1][pair] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
            }
            for eight in 0..2 {
                // Four weight rows of four columns each, and of the next four: zipped, they are pairs of 8 columns.
                let mut w = [vdupq_n_s8(0); 4];
                for quad in 0..2 {
                    let at = |k: usize| vreinterpretq_s32_s8(load_i8(&codes[k].as_chunks::<16>().0[from + quad]));
                    let (a, b) = (at(2 * eight), at(2 * eight + 1));
                    w[2 * quad] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
                    w[2 * quad + 1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
                }
                for pair in 0..4 {
                    for o in 0..4 {
                        acc[pair][o] = smmla(acc[pair][o], x[eight][pair], w[o]);
                    }
                }
            }
        }
        let mut out = [[vdupq_n_s32(0); 2]; 8];
        for pair in 0..4 {
            for quad in 0..2 {
                let a = vreinterpretq_s64_s32(acc[pair][2 * quad]);
                let b = vreinterpretq_s64_s32(acc[pair][2 * quad + 1]);
                out[2 * pair][quad] = vreinterpretq_s32_s64(vzip1q_s64(a, b));
                out[2 * pair + 1][quad] = vreinterpretq_s32_s64(vzip2q_s64(a, b));
            }
        }
        out
    }
}

/// `R` rows from `row` times `Q` quads of weight rows from `from`, into `out` (which begins at the first of both).
#[inline(always)]
fn mul_tile<P: Products<R, Q>, const R: usize, const Q: usize>(
    panel: &CodePanel<'_>,
    from: usize,
    x: &QuantizedRows<'_>,
    row: usize,
    out: &mut [f32],
    stride: usize,
) {
    let (cols, sub) = (x.cols, panel.sub);
    let per_row = cols / sub;
    let sums = if sub == 16 { x.all.s16 } else { x.all.s32 };
    let (codes, _) = panel.codes.as_chunks::<64>();
    let quads = |numbers: &'_ [f32], s: usize, o: usize| load_f32(&numbers.as_chunks::<4>().0[4 * s + from + o]);
    let mut acc = [[vdupq_n_f32(0.0); Q]; R];
    for s in 0..per_row {
        let mut q: [&[i8]; R] = [&[]; R];
        for r in 0..R {
            q[r] = &x.all.q[(row + r) * cols + s * sub..][..sub];
        }
        let dots = P::products(&codes[s * sub / 4..(s + 1) * sub / 4], from, &q);
        for o in 0..Q {
            let scale = quads(panel.scale, s, o);
            for r in 0..R {
                let d = x.all.d[((row + r) * cols + s * sub) / 32];
                acc[r][o] = vfmaq_f32(acc[r][o], vcvtq_f32_s32(dots[r][o]), vmulq_n_f32(scale, d));
            }
            if !panel.min.is_empty() {
                let min = quads(panel.min, s, o);
                for r in 0..R {
                    acc[r][o] = vfmsq_n_f32(acc[r][o], min, sums[(row + r) * per_row + s]);
                }
            }
        }
    }
    for r in 0..R {
        let (to, _) = out[r * stride..][..4 * Q].as_chunks_mut::<4>();
        for o in 0..Q {
            store_f32(&mut to[o], acc[r][o]);
        }
    }
}

/// Rows by fours and then one by one.
#[inline(always)]
fn mul_rows<S: Sdot>(
    panels: &[CodePanel<'_>],
    x: QuantizedRows<'_>,
    rows: Range<usize>,
    out: &mut [f32],
    stride: usize,
) {
    let mut row = rows.start;
    while row < rows.end {
        let fours = rows.end - row >= 4;
        for (p, panel) in panels.iter().enumerate() {
            let out = &mut out[(row - rows.start) * stride + p * PANEL..];
            if fours {
                mul_tile::<S, 4, 4>(panel, 0, &x, row, out, stride);
            } else {
                mul_tile::<S, 1, 4>(panel, 0, &x, row, out, stride);
            }
        }
        row += if fours { 4 } else { 1 };
    }
}

pub(super) fn mul_panels_plain(
    panels: &[CodePanel<'_>],
    x: QuantizedRows<'_>,
    rows: Range<usize>,
    out: &mut [f32],
    stride: usize,
) {
    mul_rows::<Widening>(panels, x, rows, out, stride);
}

pub(super) fn mul_panels_dotprod(
    panels: &[CodePanel<'_>],
    x: QuantizedRows<'_>,
    rows: Range<usize>,
    out: &mut [f32],
    stride: usize,
) {
    #[target_feature(enable = "neon,dotprod")]
    fn compiled(panels: &[CodePanel<'_>], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32], stride: usize) {
        mul_rows::<Dotprod>(panels, x, rows, out, stride);
    }
    // SAFETY: handed out only where the processor has dot products.
    unsafe { compiled(panels, x, rows, out, stride) }
}

pub(super) fn mul_panels_i8mm(
    panels: &[CodePanel<'_>],
    x: QuantizedRows<'_>,
    rows: Range<usize>,
    out: &mut [f32],
    stride: usize,
) {
    #[target_feature(enable = "neon,dotprod,i8mm")]
    fn compiled(panels: &[CodePanel<'_>], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32], stride: usize) {
        let eights = rows.len() / 8 * 8;
        for row in (rows.start..rows.start + eights).step_by(8) {
            for (p, panel) in panels.iter().enumerate() {
                for from in [0, 2] {
                    let out = &mut out[(row - rows.start) * stride + p * PANEL + 4 * from..];
                    mul_tile::<Matrix, 8, 2>(panel, from, &x, row, out, stride);
                }
            }
        }
        if eights < rows.len() {
            mul_rows::<Dotprod>(panels, x, rows.start + eights..rows.end, &mut out[eights * stride..], stride);
        }
    }
    // SAFETY: handed out only where the processor has both.
    unsafe { compiled(panels, x, rows, out, stride) }
}

pub(super) fn gemm(s: GemmShape, a: &[f32], b: &[f32], c: &mut [f32]) {
    for j in (0..s.n).step_by(PANEL) {
        let (panel, _) = b[j / PANEL * s.ldb..][..s.k * PANEL].as_chunks::<PANEL>();
        let mut r = 0;
        while r < s.m {
            if s.m - r >= 4 {
                gemm_tile::<4>(&s, r, j, a, panel, c);
                r += 4;
            } else {
                gemm_tile::<1>(&s, r, j, a, panel, c);
                r += 1;
            }
        }
    }
}

/// `R` rows from `row` of a panel of columns from `j`.
#[inline(always)]
fn gemm_tile<const R: usize>(s: &GemmShape, row: usize, j: usize, a: &[f32], panel: &[[f32; PANEL]], c: &mut [f32]) {
    let width = PANEL.min(s.n - j);
    let mut acc = [[vdupq_n_f32(0.0); 4]; R];
    let mut x: [&[f32]; R] = [&[]; R];
    for r in 0..R {
        x[r] = &a[(row + r) * s.lda..][..s.k];
        if s.add {
            let mut start = [0f32; PANEL];
            start[..width].copy_from_slice(&c[(row + r) * s.ldc + j..][..width]);
            for o in 0..4 {
                acc[r][o] = load_f32(&start.as_chunks::<4>().0[o]);
            }
        }
    }
    let (fours, rest) = panel.as_chunks::<4>();
    for (k, four) in fours.iter().enumerate() {
        let mut v = [vdupq_n_f32(0.0); R];
        for r in 0..R {
            v[r] = load_f32(&x[r].as_chunks::<4>().0[k]);
        }
        macro_rules! column {
            ($lane:literal) => {
                for o in 0..4 {
                    let b = load_f32(&four[$lane].as_chunks::<4>().0[o]);
                    for r in 0..R {
                        acc[r][o] = vfmaq_laneq_f32::<$lane>(acc[r][o], b, v[r]);
                    }
                }
            };
        }
        column!(0);
        column!(1);
        column!(2);
        column!(3);
    }
    for (k, b) in rest.iter().enumerate() {
        for r in 0..R {
            for o in 0..4 {
                acc[r][o] = vfmaq_n_f32(acc[r][o], load_f32(&b.as_chunks::<4>().0[o]), x[r][4 * fours.len() + k]);
            }
        }
    }
    for r in 0..R {
        let mut end = [0f32; PANEL];
        for o in 0..4 {
            store_f32(&mut end.as_chunks_mut::<4>().0[o], acc[r][o]);
        }
        c[(row + r) * s.ldc + j..][..width].copy_from_slice(&end[..width]);
    }
}
