//! Q2_K .. Q6_K: blocks of 256 weights, whose groups have small integer scales under an f16 scale of the block.

#![allow(non_camel_case_types)]

use super::Format;
use super::block::{BlockFormat, Group, f16_at, part, whole};

/// 16 bytes of scales (low 4 bits) and minimums (high 4 bits), 64 bytes of 2-bit codes, f16 `d`, f16 `dmin`:
/// `d * scale * q - dmin * min`, for 16 weights each.
pub struct Q2_K;

impl BlockFormat for Q2_K {
    const FORMAT: Format = Format::Q2_K;
    const HAS_MIN: bool = true;
    const HALVES: bool = true;

    #[inline(always)]
    fn group(block: &[u8], g: usize) -> Group {
        let block: &[u8; 84] = whole(block);
        let g = g & 7;
        let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
        let scales: [u8; 2] = *part(block, 2 * g);
        Group {
            codes: part::<32>(block, 16 + 32 * (g / 4)).map(|q| (q >> (2 * (g % 4)) & 3) as i8),
            scale: scales.map(|s| d * f32::from(s & 15)),
            min: scales.map(|s| dmin * f32::from(s >> 4)),
        }
    }
}

/// 32 bytes of third bits, 64 bytes of the low 2 bits, 12 bytes of 6-bit scales, f16 `d`:
/// `d * (scale - 32) * (q - 4)`, for 16 weights each.
pub struct Q3_K;

impl BlockFormat for Q3_K {
    const FORMAT: Format = Format::Q3_K;
    const HAS_MIN: bool = false;
    const HALVES: bool = true;

    #[inline(always)]
    fn group(block: &[u8], g: usize) -> Group {
        let block: &[u8; 110] = whole(block);
        let g = g & 7;
        let d = f16_at(block, 108);
        let high: &[u8; 32] = part(block, 0);
        let low: &[u8; 32] = part(block, 32 + 32 * (g / 4));
        let packed: &[u8; 12] = part(block, 96);
        let mut codes = [0; 32];
        for i in 0..32 {
            let q = low[i] >> (2 * (g % 4)) & 3 | (high[i] >> g & 1) << 2;
            codes[i] = q as i8 - 4;
        }
        let scale = [2 * g, 2 * g + 1].map(|j| {
            let low = packed[j & 7] >> (4 * (j / 8)) & 15;
            let high = packed[8 + (j & 3)] >> (2 * (j / 4)) & 3;
            d * f32::from((low | high << 4) as i8 - 32)
        });
        Group { codes, scale, min: [0.0; 2] }
    }
}

/// f16 `d`, f16 `dmin`, 12 bytes of 6-bit scales and minimums, 128 bytes of 4-bit codes:
/// `d * scale * q - dmin * min`, for 32 weights each.
pub struct Q4_K;

impl BlockFormat for Q4_K {
    const FORMAT: Format = Format::Q4_K;
    const HAS_MIN: bool = true;
    const HALVES: bool = false;

    #[inline(always)]
    fn group(block: &[u8], g: usize) -> Group {
        let block: &[u8; 144] = whole(block);
        let g = g & 7;
        let (scale, min) = scale_and_min(block, g);
        let codes = part::<32>(block, 16 + 32 * (g / 2)).map(|q| (q >> (4 * (g % 2)) & 15) as i8);
        Group { codes, scale: [scale; 2], min: [min; 2] }
    }
}

/// f16 `d`, f16 `dmin`, 12 bytes of 6-bit scales and minimums, 32 bytes of fifth bits, 128 bytes of the low 4 bits:
/// `d * scale * q - dmin * min`, for 32 weights each.
pub struct Q5_K;

impl BlockFormat for Q5_K {
    const FORMAT: Format = Format::Q5_K;
    const HAS_MIN: bool = true;
    const HALVES: bool = false;

    #[inline(always)]
    fn group(block: &[u8], g: usize) -> Group {
        let block: &[u8; 176] = whole(block);
        let g = g & 7;
        let (scale, min) = scale_and_min(block, g);
        let high: &[u8; 32] = part(block, 16);
        let low: &[u8; 32] = part(block, 48 + 32 * (g / 2));
        let mut codes = [0; 32];
        for i in 0..32 {
            codes[i] = (low[i] >> (4 * (g % 2)) & 15 | (high[i] >> g & 1) << 4) as i8;
        }
        Group { codes, scale: [scale; 2], min: [min; 2] }
    }
}

/// 128 bytes of the low 4 bits, 64 bytes of the high 2 bits, 16 signed 8-bit scales, f16 `d`:
/// `d * scale * (q - 32)`, for 16 weights each.
pub struct Q6_K;

impl BlockFormat for Q6_K {
    const FORMAT: Format = Format::Q6_K;
    const HAS_MIN: bool = false;
    const HALVES: bool = true;

    #[inline(always)]
    fn group(block: &[u8], g: usize) -> Group {
        let block: &[u8; 210] = whole(block);
        let g = g & 7;
        let (half, g4) = (g / 4, g % 4);
        let d = f16_at(block, 208);
        let low: &[u8; 32] = part(block, 64 * half + 32 * (g4 % 2));
        let high: &[u8; 32] = part(block, 128 + 32 * half);
        let mut codes = [0; 32];
        for i in 0..32 {
            let q = low[i] >> (4 * (g4 / 2)) & 15 | (high[i] >> (2 * g4) & 3) << 4;
            codes[i] = q as i8 - 32;
        }
        let scale = part::<2>(block, 192 + 2 * g).map(|s| d * f32::from(s as i8));
        Group { codes, scale, min: [0.0; 2] }
    }
}

/// `d * scale` and `dmin * min` of group `g` of a Q4_K or Q5_K block, which begin alike.
///
/// Groups 0..4 have their 6 bits in bytes 0..4 (scales) and 4..8 (minimums) of the 12; groups 4..8 have the low 4 bits
/// of both in bytes 8..12, and the high 2 bits in the two that the first bytes leave free.
#[inline(always)]
fn scale_and_min(block: &[u8], g: usize) -> (f32, f32) {
    let packed: &[u8; 12] = part(block, 4);
    let (first, second) = (packed[g & 3], packed[4 + (g & 3)]);
    let (scale, min) = if g < 4 {
        (first & 63, second & 63)
    } else {
        let low = packed[8 + (g & 3)];
        (low & 15 | first >> 6 << 4, low >> 4 | second >> 6 << 4)
    };
    (f16_at(block, 0) * f32::from(scale), f16_at(block, 2) * f32::from(min))
}
