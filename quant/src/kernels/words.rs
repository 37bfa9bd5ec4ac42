//! Many rows of 16-bit activations, for processors that multiply pairs of 16-bit integers well and bytes no better: one
//! pass where 8 bits need two for as many bits. Plain Rust here: the oracle, and what runs where nothing else does.

use super::scalar::{by_format, largest};
use super::{PANEL, PackWords, WordKernels, WordPanel, WordRowMut, WordRows};
use crate::formats::{BlockFormat, Format, Visitor};
use std::ops::Range;

pub(super) const KERNELS: WordKernels = WordKernels { round, pack, mul };

/// See [`WordKernels::round`].
#[inline(always)]
pub(super) fn round(x: &[f32], out: WordRowMut<'_>) {
    for (g, x) in x.as_chunks::<32>().0.iter().enumerate() {
        let most = largest(x);
        let d = most / 32767.0;
        let inverse = if most == 0.0 { 0.0 } else { 32767.0 / most };
        let q = &mut out.q[g * 32..][..32];
        let mut sums = [0i32; 2];
        for h in 0..2 {
            for i in 0..16 {
                // The product may exceed 32767 by its rounding.
                let code = (x[h * 16 + i] * inverse).round_ties_even().clamp(-32767.0, 32767.0) as i32 as i16;
                q[h * 16 + i] = code;
                sums[h] += i32::from(code);
            }
            out.s16[g * 2 + h] = d * sums[h] as f32;
        }
        out.d[g] = d;
        out.s32[g] = d * (sums[0] + sums[1]) as f32;
    }
}

fn pack(format: Format) -> PackWords {
    by_format!(PackWords, format, pack_of)
}

fn pack_of<F: BlockFormat>(
    data: &[u8],
    rows: usize,
    cols: usize,
    codes: &mut [i16],
    scale: &mut [f32],
    min: &mut [f32],
) {
    let groups_of_block = F::FORMAT.block_len() / 32;
    let row_bytes = cols / F::FORMAT.block_len() * F::FORMAT.block_bytes();
    let halves = if F::HALVES { 2 } else { 1 };
    for r in 0..PANEL {
        for g in 0..cols / 32 {
            let group = (r < rows).then(|| {
                let block = &data[r * row_bytes + g / groups_of_block * F::FORMAT.block_bytes()..];
                F::group(&block[..F::FORMAT.block_bytes()], g % groups_of_block)
            });
            for i in 0..32 {
                let at = ((g * 32 + i) / 2 * PANEL + r) * 2 + i % 2;
                codes[at] = group.as_ref().map_or(0, |group| i16::from(group.codes[i]));
            }
            for h in 0..halves {
                scale[(g * halves + h) * PANEL + r] = group.as_ref().map_or(0.0, |group| group.scale[h]);
                if F::HAS_MIN {
                    min[(g * halves + h) * PANEL + r] = group.as_ref().map_or(0.0, |group| group.min[h]);
                }
            }
        }
    }
}

fn mul(panels: &[WordPanel<'_>], x: WordRows<'_>, rows: Range<usize>, out: &mut [f32], stride: usize) {
    for (p, panel) in panels.iter().enumerate() {
        let (pairs, _) = panel.codes.as_chunks::<2>();
        let (groups, sums) = (x.cols / panel.sub, if panel.sub == 16 { x.s16 } else { x.s32 });
        for (at, r) in rows.clone().enumerate() {
            let (q, _) = x.q[r * x.cols..][..x.cols].as_chunks::<2>();
            let mut acc = [0f32; PANEL];
            for s in 0..groups {
                let d = x.d[r * (x.cols / 32) + s * panel.sub / 32];
                for o in 0..PANEL {
                    let mut dot = 0i32;
                    for k in s * panel.sub / 2..(s + 1) * panel.sub / 2 {
                        let w = pairs[k * PANEL + o];
                        dot += i32::from(w[0]) * i32::from(q[k][0]) + i32::from(w[1]) * i32::from(q[k][1]);
                    }
                    acc[o] += dot as f32 * (panel.scale[s * PANEL + o] * d);
                    if !panel.min.is_empty() {
                        acc[o] -= panel.min[s * PANEL + o] * sums[r * groups + s];
                    }
                }
            }
            out[at * stride + p * PANEL..][..PANEL].copy_from_slice(&acc);
        }
    }
}
