//! MXFP4: 32 weights of 4 bits (E2M1) with a power of two (E8M0) as their scale.

use super::Format;
use super::block::{BlockFormat, Group, nibbles, part, whole};

/// E8M0 scale, 16 bytes of E2M1 codes. E2M1 has halves (0.5, 1.5), so the codes are twice the value, and the scale half.
pub struct MXFP4;

impl BlockFormat for MXFP4 {
    const FORMAT: Format = Format::MXFP4;
    const HAS_MIN: bool = false;
    const HALVES: bool = false;

    #[inline(always)]
    fn group(block: &[u8], _: usize) -> Group {
        let block: &[u8; 17] = whole(block);
        Group { codes: nibbles(part(block, 1)).map(doubled), scale: [e8m0_half(block[0]); 2], min: [0.0; 2] }
    }
}

/// Half of an E8M0 number, `2^(e - 128)`. The code 255, which the standard calls NaN, is read as 2^127, as ggml does.
#[inline(always)]
pub fn e8m0_half(e: u8) -> f32 {
    let bits = match e {
        // Below the smallest normal f32.
        0 | 1 => 0x0020_0000 << e,
        _ => (u32::from(e) - 1) << 23,
    };
    f32::from_bits(bits)
}

/// Twice an E2M1 number: the low three bits are 0, 1, 2, 3, 4, 6, 8, 12, the fourth is the sign.
#[inline(always)]
fn doubled(q: u8) -> i8 {
    let steps = (q & 7) as i8;
    // Steps are single up to 4, double from there to 8, and fourfold in the last.
    let magnitude = steps + (steps - 4).max(0) + 2 * (steps - 6).max(0);
    if q & 8 != 0 { -magnitude } else { magnitude }
}
