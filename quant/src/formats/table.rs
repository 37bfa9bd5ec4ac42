//! NF4 and FP4 of bitsandbytes: 4-bit codes into a table of 16 floats, times the largest magnitude of their block
//! (Dettmers et al. 2023). The tables' steps are no multiples of anything, so these are multiplied as floats.

use super::Format;
use super::block::{nibbles, part, whole};
use super::grid::f32_at;

/// A format of blocks of an f32 scale and 16 bytes of codes (as in Q4_0: low halves first), which stand for
/// `TABLE[code] * scale`.
pub trait TableFormat: 'static {
    /// The format that this type stands for.
    const FORMAT: Format;
    /// What the codes stand for.
    const TABLE: [f32; 16];
}

/// Bytes of a block of 32.
pub const BYTES: usize = 20;

/// Quantiles of the normal distribution.
pub struct NF4;

impl TableFormat for NF4 {
    const FORMAT: Format = Format::NF4;
    #[allow(clippy::excessive_precision)]
    const TABLE: [f32; 16] = [
        -1.0,
        -0.696_192_800_998_687_7,
        -0.525_073_051_452_636_7,
        -0.394_917_488_098_144_53,
        -0.284_441_381_692_886_35,
        -0.184_773_430_228_233_34,
        -0.091_050_036_251_544_95,
        0.0,
        0.079_580_299_556_255_34,
        0.160_930_201_411_247_25,
        0.246_112_301_945_686_34,
        0.337_915_241_718_292_24,
        0.440_709_829_330_444_34,
        0.562_617_003_917_694_1,
        0.722_956_836_223_602_3,
        1.0,
    ];
}

/// Sign, two bits of exponent, one of fraction, as bitsandbytes numbers them.
pub struct FP4;

impl TableFormat for FP4 {
    const FORMAT: Format = Format::FP4;
    const TABLE: [f32; 16] = [
        0.0,
        0.0625 / 12.0,
        8.0 / 12.0,
        1.0,
        4.0 / 12.0,
        0.5,
        2.0 / 12.0,
        0.25,
        -0.0,
        -0.0625 / 12.0,
        -8.0 / 12.0,
        -1.0,
        -4.0 / 12.0,
        -0.5,
        -2.0 / 12.0,
        -0.25,
    ];
}

/// The 32 weights of a block.
#[inline(always)]
pub(crate) fn block<T: TableFormat>(block: &[u8], out: &mut [f32; 32]) {
    let block: &[u8; BYTES] = whole(block);
    let scale = f32_at(block, 0);
    let codes = nibbles(part(block, 4));
    for i in 0..32 {
        out[i] = T::TABLE[usize::from(codes[i])] * scale;
    }
}

/// Decodes whole blocks.
pub(super) fn decode<T: TableFormat>(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        block::<T>(bytes, out);
    }
}

/// Packs 32 codes and their scale into one block.
pub fn put(codes: &[u8; 32], scale: f32, block: &mut [u8; BYTES]) {
    block[..4].copy_from_slice(&scale.to_le_bytes());
    for i in 0..16 {
        block[4 + i] = codes[i] & 15 | codes[i + 16] << 4;
    }
}

/// The table of `format`; `None` where it is no table format.
pub fn table(format: Format) -> Option<&'static [f32; 16]> {
    match format {
        Format::NF4 => Some(&NF4::TABLE),
        Format::FP4 => Some(&FP4::TABLE),
        _ => None,
    }
}
