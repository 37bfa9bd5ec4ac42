//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 weights with an f16 scale and perhaps an f16 minimum.

#![allow(non_camel_case_types)]

use super::Format;
use super::block::{BlockFormat, Group, f16_at, nibbles, part, whole};

/// f16 scale `d`, 16 bytes of 4-bit codes: `d * (q - 8)`.
pub struct Q4_0;

impl BlockFormat for Q4_0 {
    const FORMAT: Format = Format::Q4_0;
    const HAS_MIN: bool = false;
    const HALVES: bool = false;

    #[inline(always)]
    fn group(block: &[u8], _: usize) -> Group {
        let block: &[u8; 18] = whole(block);
        let codes = nibbles(part(block, 2)).map(|q| q as i8 - 8);
        Group { codes, scale: [f16_at(block, 0); 2], min: [0.0; 2] }
    }
}

/// f16 scale `d` and minimum `m`, 16 bytes of 4-bit codes: `d * q + m`.
pub struct Q4_1;

impl BlockFormat for Q4_1 {
    const FORMAT: Format = Format::Q4_1;
    const HAS_MIN: bool = true;
    const HALVES: bool = false;

    #[inline(always)]
    fn group(block: &[u8], _: usize) -> Group {
        let block: &[u8; 20] = whole(block);
        let codes = nibbles(part(block, 4)).map(|q| q as i8);
        Group { codes, scale: [f16_at(block, 0); 2], min: [-f16_at(block, 2); 2] }
    }
}

/// f16 scale `d`, 32 fifth bits, 16 bytes of the low 4 bits: `d * (q - 16)`.
pub struct Q5_0;

impl BlockFormat for Q5_0 {
    const FORMAT: Format = Format::Q5_0;
    const HAS_MIN: bool = false;
    const HALVES: bool = false;

    #[inline(always)]
    fn group(block: &[u8], _: usize) -> Group {
        let block: &[u8; 22] = whole(block);
        let codes = five_bits(part(block, 6), part(block, 2)).map(|q| q as i8 - 16);
        Group { codes, scale: [f16_at(block, 0); 2], min: [0.0; 2] }
    }
}

/// f16 scale `d` and minimum `m`, 32 fifth bits, 16 bytes of the low 4 bits: `d * q + m`.
pub struct Q5_1;

impl BlockFormat for Q5_1 {
    const FORMAT: Format = Format::Q5_1;
    const HAS_MIN: bool = true;
    const HALVES: bool = false;

    #[inline(always)]
    fn group(block: &[u8], _: usize) -> Group {
        let block: &[u8; 24] = whole(block);
        let codes = five_bits(part(block, 8), part(block, 4)).map(|q| q as i8);
        Group { codes, scale: [f16_at(block, 0); 2], min: [-f16_at(block, 2); 2] }
    }
}

/// f16 scale `d`, 32 signed bytes: `d * q`.
pub struct Q8_0;

impl BlockFormat for Q8_0 {
    const FORMAT: Format = Format::Q8_0;
    const HAS_MIN: bool = false;
    const HALVES: bool = false;

    #[inline(always)]
    fn group(block: &[u8], _: usize) -> Group {
        let block: &[u8; 34] = whole(block);
        let codes = part::<32>(block, 2).map(|q| q as i8);
        Group { codes, scale: [f16_at(block, 0); 2], min: [0.0; 2] }
    }
}

/// 4-bit codes with their fifth bits: bit `i` of the little-endian `high` belongs to code `i`.
#[inline(always)]
fn five_bits(low: &[u8; 16], high: &[u8; 4]) -> [u8; 32] {
    // A byte for each code first and then the bit of each byte: so both are whole vectors.
    let mut bytes = [0; 32];
    for i in 0..4 {
        bytes[8 * i..8 * i + 8].fill(high[i]);
    }
    let mut codes = nibbles(low);
    for i in 0..32 {
        codes[i] |= if bytes[i] & BITS[i] != 0 { 16 } else { 0 };
    }
    codes
}

/// Bit `i % 8` at each `i`.
const BITS: [u8; 32] = {
    let mut bits = [0; 32];
    let mut i = 0;
    while i < 32 {
        bits[i] = 1 << (i % 8);
        i += 1;
    }
    bits
};
