//! F32, F16 and BF16, to nearest even. What is beyond the largest finite number of the format becomes that number:
//! one infinite weight would spoil a whole model.

use crate::formats::Format;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Encodes one row.
pub(super) fn encode(format: Format, row: &[f32], out: &mut [u8]) {
    match format {
        Format::F16 => {
            // In pieces, because whole slices are converted by vector instructions.
            for (x, out) in row.chunks(64).zip(out.chunks_mut(128)) {
                let (mut bounded, mut halves) = ([0f32; 64], [f16::ZERO; 64]);
                for (bounded, x) in bounded.iter_mut().zip(x) {
                    *bounded = x.clamp(-65504.0, 65504.0);
                }
                halves.convert_from_f32_slice(&bounded);
                for (half, out) in halves.iter().zip(out.as_chunks_mut().0) {
                    *out = half.to_le_bytes();
                }
            }
        }
        Format::BF16 => {
            let most = bf16::MAX.to_f32();
            for (x, out) in row.iter().zip(out.as_chunks_mut().0) {
                *out = bf16::from_f32(x.clamp(-most, most)).to_le_bytes();
            }
        }
        _ => {
            for (x, out) in row.iter().zip(out.as_chunks_mut().0) {
                *out = x.to_le_bytes();
            }
        }
    }
}

/// The f16 nearest to `x`, as bits; the largest finite one where `x` is beyond it.
#[inline(always)]
pub(super) fn finite_f16(x: f32) -> u16 {
    f16::from_f32(x.clamp(-65504.0, 65504.0)).to_bits()
}
