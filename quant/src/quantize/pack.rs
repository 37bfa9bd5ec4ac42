//! Where the codes of a group lie in a block: the other direction of [`BlockFormat::group`](crate::formats::BlockFormat).

use crate::formats::{Format, IQ4_TABLE};

/// What the codes of a group may be: see [`Group::codes`](crate::formats::Group::codes).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Levels {
    /// Every integer from the first to the second, both included.
    Range(i8, i8),
    /// These, in rising order.
    Table(&'static [i8]),
}

/// Twice the values of E2M1, without the second zero.
const MXFP4_TABLE: [i8; 15] = [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12];

impl Levels {
    /// The level nearest to `code`; the lower of two that are equally near.
    pub fn nearest(self, code: i8) -> i8 {
        match self {
            Levels::Range(low, high) => code.clamp(low, high),
            Levels::Table(table) => {
                table.iter().copied().min_by_key(|&v| (i16::from(v) - i16::from(code)).abs()).unwrap_or(0)
            }
        }
    }
}

impl Format {
    /// The values that the codes of this format's groups take; `None` for the floating-point formats.
    pub fn levels(self) -> Option<Levels> {
        Some(match self {
            Format::F32 | Format::F16 | Format::BF16 => return None,
            // Made by other tools alone.
            Format::Q4_Z | Format::Q8_F | Format::Q8_Z | Format::NF4 | Format::FP4 => return None,
            Format::Q4_0 => Levels::Range(-8, 7),
            Format::Q5_0 => Levels::Range(-16, 15),
            Format::Q8_0 => Levels::Range(-128, 127),
            Format::Q4_1 | Format::Q4_K => Levels::Range(0, 15),
            Format::Q5_1 | Format::Q5_K => Levels::Range(0, 31),
            Format::Q2_K => Levels::Range(0, 3),
            Format::Q3_K => Levels::Range(-4, 3),
            Format::Q6_K => Levels::Range(-32, 31),
            Format::IQ4_NL | Format::IQ4_XS => Levels::Table(&IQ4_TABLE),
            Format::MXFP4 => Levels::Table(&MXFP4_TABLE),
        })
    }
}

/// Replaces the codes of weights `32 g .. 32 g + 32` of a packed row and leaves their scales and minimums as they are.
/// A code that is no level of the format ([`Format::levels`]) is stored as the nearest level.
///
/// # Panics
/// If the format has no codes or is one that is in memory only, or the row is too short to hold the group.
pub fn put_codes(format: Format, row: &mut [u8], g: usize, codes: &[i8; 32]) {
    let groups = format.block_len() / 32;
    assert!(groups > 0, "{format} has no codes");
    let start = g / groups * format.block_bytes();
    let block = &mut row[start..start + format.block_bytes()];
    put(format, block, g % groups, codes);
}

/// [`put_codes`] for one block.
#[inline(always)]
pub(super) fn put(format: Format, block: &mut [u8], g: usize, codes: &[i8; 32]) {
    match format {
        Format::F32 | Format::F16 | Format::BF16 => {}
        Format::Q4_0 => nibbles(&mut block[2..18], &shift(codes, -8, 7)),
        Format::Q4_1 => nibbles(&mut block[4..20], &shift(codes, 0, 15)),
        Format::Q5_0 => {
            let q = shift(codes, -16, 15);
            block[2..6].copy_from_slice(&fifth_bits(&q).to_le_bytes());
            nibbles(&mut block[6..22], &q);
        }
        Format::Q5_1 => {
            let q = shift(codes, 0, 31);
            block[4..8].copy_from_slice(&fifth_bits(&q).to_le_bytes());
            nibbles(&mut block[8..24], &q);
        }
        Format::Q8_0 => block[2..34].copy_from_slice(&codes.map(|q| q as u8)),
        Format::Q2_K => field(&mut block[16 + 32 * (g / 4)..], &shift(codes, 0, 3), 0, 2, 2 * (g % 4)),
        Format::Q3_K => {
            let q = shift(codes, -4, 3);
            field(&mut block[32 + 32 * (g / 4)..], &q, 0, 2, 2 * (g % 4));
            field(block, &q, 2, 1, g);
        }
        Format::Q4_K => field(&mut block[16 + 32 * (g / 2)..], &shift(codes, 0, 15), 0, 4, 4 * (g % 2)),
        Format::Q5_K => {
            let q = shift(codes, 0, 31);
            field(&mut block[48 + 32 * (g / 2)..], &q, 0, 4, 4 * (g % 2));
            field(&mut block[16..], &q, 4, 1, g);
        }
        Format::Q6_K => {
            let q = shift(codes, -32, 31);
            let (half, g4) = (g / 4, g % 4);
            field(&mut block[64 * half + 32 * (g4 % 2)..], &q, 0, 4, 4 * (g4 / 2));
            field(&mut block[128 + 32 * half..], &q, 4, 2, 2 * g4);
        }
        Format::IQ4_NL => nibbles(&mut block[2..18], &codes.map(iq4_index)),
        Format::IQ4_XS => nibbles(&mut block[8 + 16 * g..][..16], &codes.map(iq4_index)),
        Format::MXFP4 => nibbles(&mut block[1..17], &codes.map(e2m1)),
        Format::Q4_Z | Format::Q8_F | Format::Q8_Z | Format::NF4 | Format::FP4 => {
            panic!("{format} is read from other tools' checkpoints, not written")
        }
    }
}

/// Codes counted from the lowest level.
#[inline(always)]
fn shift(codes: &[i8; 32], low: i8, high: i8) -> [u8; 32] {
    let mut q = [0; 32];
    for i in 0..32 {
        q[i] = codes[i].max(low).min(high).wrapping_sub(low) as u8;
    }
    q
}

/// Two codes of 4 bits in each byte: 0..16 in the low halves, 16..32 in the high ones.
#[inline(always)]
fn nibbles(bytes: &mut [u8], q: &[u8; 32]) {
    for i in 0..16 {
        bytes[i] = q[i] & 15 | q[i + 16] << 4;
    }
}

/// Bit `i` is the fifth of code `i`.
#[inline(always)]
fn fifth_bits(q: &[u8; 32]) -> u32 {
    let mut bits = 0;
    for i in 0..32 {
        bits |= u32::from(q[i] >> 4 & 1) << i;
    }
    bits
}

/// Puts bits `from .. from + width` of each code at bit `at` of each byte, and leaves the other bits alone.
#[inline(always)]
fn field(bytes: &mut [u8], q: &[u8; 32], from: usize, width: usize, at: usize) {
    let ones = ((1u16 << width) - 1) as u8;
    for i in 0..32 {
        bytes[i] = bytes[i] & !(ones << at) | (q[i] >> from & ones) << at;
    }
}

/// The index of each value in `IQ4_TABLE`, that of the nearest for the others.
const IQ4_INDEX: [u8; 256] = {
    let mut index = [0; 256];
    let mut value = -128;
    while value < 128 {
        let mut i = 0;
        // Past the middle between two values the upper is nearer.
        while i < 15 && 2 * value > IQ4_TABLE[i] as i32 + IQ4_TABLE[i + 1] as i32 {
            i += 1;
        }
        index[(value + 128) as usize] = i as u8;
        value += 1;
    }
    index
};

#[inline(always)]
fn iq4_index(value: i8) -> u8 {
    IQ4_INDEX[(i16::from(value) + 128) as usize]
}

/// E2M1 bits of half of a level of MXFP4.
fn e2m1(level: i8) -> u8 {
    let magnitudes = [0u8, 1, 2, 3, 4, 6, 8, 12];
    let size = Levels::Table(&MXFP4_TABLE).nearest(level).unsigned_abs();
    let index = magnitudes.iter().position(|&m| m == size).unwrap_or(0) as u8;
    if level < 0 { index | 8 } else { index }
}
