//! IQ4_NL and IQ4_XS: 4-bit codes that stand for 16 unevenly spaced values.

#![allow(non_camel_case_types)]

use super::Format;
use super::block::{BlockFormat, Group, f16_at, nibbles, part, whole};

/// What the 16 codes of IQ4_NL and IQ4_XS stand for.
pub const IQ4_TABLE: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// f16 scale `d`, 16 bytes of 4-bit codes: `d * table[q]`.
pub struct IQ4_NL;

impl BlockFormat for IQ4_NL {
    const FORMAT: Format = Format::IQ4_NL;
    const HAS_MIN: bool = false;
    const HALVES: bool = false;

    #[inline(always)]
    fn group(block: &[u8], _: usize) -> Group {
        let block: &[u8; 18] = whole(block);
        Group { codes: values(part(block, 2)), scale: [f16_at(block, 0); 2], min: [0.0; 2] }
    }
}

/// f16 scale `d`, 16 high bits and 4 bytes of low bits of 6-bit scales, 128 bytes of 4-bit codes:
/// `d * (scale - 32) * table[q]`, for 32 weights each.
pub struct IQ4_XS;

impl BlockFormat for IQ4_XS {
    const FORMAT: Format = Format::IQ4_XS;
    const HAS_MIN: bool = false;
    const HALVES: bool = false;

    #[inline(always)]
    fn group(block: &[u8], g: usize) -> Group {
        let block: &[u8; 136] = whole(block);
        let g = g & 7;
        let high = u16::from_le_bytes(*part(block, 2)) >> (2 * g) & 3;
        let low = block[4 + g / 2] >> (4 * (g % 2)) & 15;
        let scale = f16_at(block, 0) * f32::from((low | (high as u8) << 4) as i8 - 32);
        Group { codes: values(part(block, 8 + 16 * g)), scale: [scale; 2], min: [0.0; 2] }
    }
}

/// What 16 bytes of two codes stand for.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn values(bytes: &[u8; 16]) -> [i8; 32] {
    use std::arch::aarch64::{vld1q_s8, vld1q_u8, vqtbl1q_s8, vst1q_s8};
    let codes = nibbles(bytes);
    let mut values = [0; 32];
    // SAFETY: every AArch64 processor has these instructions, and the arrays hold 16 and 32 bytes.
    unsafe {
        let table = vld1q_s8(IQ4_TABLE.as_ptr());
        for at in [0, 16] {
            let codes = vld1q_u8(codes.as_ptr().add(at));
            vst1q_s8(values.as_mut_ptr().add(at), vqtbl1q_s8(table, codes));
        }
    }
    values
}

/// What 16 bytes of two codes stand for.
#[cfg(not(target_arch = "aarch64"))]
#[inline(always)]
fn values(bytes: &[u8; 16]) -> [i8; 32] {
    nibbles(bytes).map(value)
}

/// `IQ4_TABLE[q]` as a tree of choices by the bits of `q`: unlike a look-up it vectorises, on every instruction set.
#[cfg(not(target_arch = "aarch64"))]
#[inline(always)]
fn value(q: u8) -> i8 {
    let choose = |bit: u8, no: i8, yes: i8| {
        let mask = if q & bit != 0 { -1 } else { 0 };
        no ^ mask & (no ^ yes)
    };
    let pair = |i: usize| choose(1, IQ4_TABLE[i], IQ4_TABLE[i + 1]);
    let four = |i: usize| choose(2, pair(i), pair(i + 2));
    choose(8, choose(4, four(0), four(4)), choose(4, four(8), four(12)))
}
