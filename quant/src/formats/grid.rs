//! Integer grids of checkpoints that were quantized elsewhere (GPTQ, AWQ, LLM.int8): weights are
//! `scale * (code - zero)`, with a scale and an integer zero point over a group of inputs.
//!
//! Which block holds such a grid exactly depends on the numbers in it: [`block_format`] chooses, [`put`] packs. A
//! symmetric 4-bit grid is a Q4_0 block as it stands, a symmetric 8-bit grid a Q8_0 block; the formats of this file are
//! for the rest.

#![allow(non_camel_case_types)]

use super::Format;
use super::block::{BlockFormat, Group, f16_at, nibbles, part, whole};
use half::f16;

/// f16 scale `d`, zero point `z` (0 to 16) in a byte, 16 bytes of 4-bit codes: `d * (q - z)`.
pub struct Q4_Z;

impl BlockFormat for Q4_Z {
    const FORMAT: Format = Format::Q4_Z;
    const HAS_MIN: bool = false;
    const HALVES: bool = false;

    #[inline(always)]
    fn group(block: &[u8], _: usize) -> Group {
        let block: &[u8; 19] = whole(block);
        let zero = block[2] as i8;
        let codes = nibbles(part(block, 3)).map(|q| (q as i8).wrapping_sub(zero));
        Group { codes, scale: [f16_at(block, 0); 2], min: [0.0; 2] }
    }
}

/// f32 scale `d`, 32 signed bytes: `d * q`.
pub struct Q8_F;

impl BlockFormat for Q8_F {
    const FORMAT: Format = Format::Q8_F;
    const HAS_MIN: bool = false;
    const HALVES: bool = false;

    #[inline(always)]
    fn group(block: &[u8], _: usize) -> Group {
        let block: &[u8; 36] = whole(block);
        let codes = part::<32>(block, 4).map(|q| q as i8);
        Group { codes, scale: [f32_at(block, 0); 2], min: [0.0; 2] }
    }
}

/// f32 scale `d` and minimum `m`, 32 signed bytes: `d * q - m`.
pub struct Q8_Z;

impl BlockFormat for Q8_Z {
    const FORMAT: Format = Format::Q8_Z;
    const HAS_MIN: bool = true;
    const HALVES: bool = false;

    #[inline(always)]
    fn group(block: &[u8], _: usize) -> Group {
        let block: &[u8; 40] = whole(block);
        let codes = part::<32>(block, 8).map(|q| q as i8);
        Group { codes, scale: [f32_at(block, 0); 2], min: [f32_at(block, 4); 2] }
    }
}

/// The f32 at `start`.
#[inline(always)]
pub(super) fn f32_at(block: &[u8], start: usize) -> f32 {
    f32::from_le_bytes(*part(block, start))
}

/// Whether f16 holds `x` as it is.
pub fn is_f16(x: f32) -> bool {
    f16::from_f32(x).to_f32().to_bits() == x.to_bits()
}

/// The smallest block format that holds a grid exactly: codes of `bits` (2, 3, 4 or 8), zero points from `zeros.0` to
/// `zeros.1`, and scales that are all f16 numbers or not (see [`is_f16`]). `None` where no format can.
///
/// Exact means bit for bit where the scales are f16 numbers. Otherwise a code beyond 8 signed bits rounds twice, which is
/// within 2^-23 of the larger term.
pub fn block_format(bits: u32, zeros: (u16, u16), f16_scales: bool) -> Option<Format> {
    if !matches!(bits, 2 | 3 | 4 | 8) || zeros.0 > zeros.1 || u32::from(zeros.1) > 1 << bits {
        return None;
    }
    // What codes less their zero points can be.
    let (least, most) = (-i32::from(zeros.1), (1 << bits) - 1 - i32::from(zeros.0));
    Some(match (f16_scales, least, most) {
        (true, -8.., ..=7) => Format::Q4_0,
        (true, -16.., ..=15) => Format::Q4_Z,
        (true, -128.., ..=127) => Format::Q8_0,
        (false, -128.., ..=127) => Format::Q8_F,
        _ => Format::Q8_Z,
    })
}

/// Packs 32 weights `scale * (code - zero)` into one block of `format`, which [`block_format`] gave for them.
///
/// # Panics
/// If `format` is not one of those, or `block` is not one block of it.
pub fn put(format: Format, codes: &[u8; 32], zero: u16, scale: f32, block: &mut [u8]) {
    assert_eq!(block.len(), format.block_bytes(), "{format}");
    let nibbles = |to: &mut [u8], raise: u8| {
        for i in 0..16 {
            to[i] = codes[i].wrapping_add(raise) & 15 | codes[i + 16].wrapping_add(raise) << 4;
        }
    };
    let half = f16::from_f32(scale).to_le_bytes();
    match format {
        Format::Q4_0 => {
            block[..2].copy_from_slice(&half);
            nibbles(&mut block[2..], 8u8.wrapping_sub(zero as u8));
        }
        Format::Q4_Z => {
            block[..2].copy_from_slice(&half);
            block[2] = zero as u8;
            nibbles(&mut block[3..], 0);
        }
        Format::Q8_0 | Format::Q8_F => {
            let start = block.len() - 32;
            match format {
                Format::Q8_0 => block[..2].copy_from_slice(&half),
                _ => block[..4].copy_from_slice(&scale.to_le_bytes()),
            }
            for (to, q) in block[start..].iter_mut().zip(codes) {
                *to = q.wrapping_sub(zero as u8);
            }
        }
        Format::Q8_Z => {
            block[..4].copy_from_slice(&scale.to_le_bytes());
            // Codes around 128, so that they fit into signed bytes; the minimum makes up for it.
            let min = scale * (f32::from(zero) - 128.0);
            block[4..8].copy_from_slice(&min.to_le_bytes());
            for (to, q) in block[8..].iter_mut().zip(codes) {
                *to = q ^ 0x80;
            }
        }
        _ => panic!("{format} holds no integer grid"),
    }
}
