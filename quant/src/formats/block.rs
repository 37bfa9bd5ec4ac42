//! What all block formats have in common: groups of 32 integer codes with their scales.

use super::{Format, float, grid, iq4, kquants, legacy, mxfp4, table};

/// 32 consecutive weights of a row. Weight `i` is exactly `scale[i / 16] * codes[i] as f32 - min[i / 16]`, each
/// operation rounded to f32 in that order (not fused).
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub struct Group {
    /// Signed and centred where the format is symmetric; from 0 up where it has a minimum.
    pub codes: [i8; 32],
    /// One scale for each half; the same twice where the format has one for all 32.
    pub scale: [f32; 2],
    /// What is taken off each half; `0.0` where the format has no minimum.
    pub min: [f32; 2],
}

impl Group {
    /// The 32 weights as f32.
    #[inline(always)]
    pub fn decode(&self, out: &mut [f32; 32]) {
        for i in 0..32 {
            out[i] = self.scale[i / 16] * f32::from(self.codes[i]) - self.min[i / 16];
        }
    }
}

/// A format whose blocks are groups of integer codes.
///
/// Implemented by a type without fields for each format, so that a kernel generic over it is compiled once for each.
pub trait BlockFormat: 'static {
    /// The format that this type stands for.
    const FORMAT: Format;
    /// Whether groups have a minimum. Without it `Group::min` is zero.
    const HAS_MIN: bool;
    /// Whether the two halves of a group have scales (and minimums) of their own.
    const HALVES: bool;
    /// Bytes in a block.
    const BYTES: usize = Self::FORMAT.block_bytes();
    /// Groups in a block.
    const GROUPS: usize = Self::FORMAT.block_len() / 32;

    /// The `g`-th group of 32 of a block.
    ///
    /// Plain loops over arrays of fixed size, always inlined: LLVM turns them into vector code for the instruction set
    /// of the calling function.
    ///
    /// # Panics
    /// If `block` is shorter than `BYTES`. `g` is taken modulo `GROUPS`.
    fn group(block: &[u8], g: usize) -> Group;
}

/// Something to be done with the type that stands for a format.
pub trait Visitor {
    /// What comes of it.
    type Out;
    /// Called with the type of the format that was asked for.
    fn visit<F: BlockFormat>(self) -> Self::Out;
}

impl Format {
    /// Calls the visitor with the type that stands for this format; `None` for formats without integer codes (see
    /// [`Format::is_coded`]).
    #[inline]
    pub fn visit<V: Visitor>(self, visitor: V) -> Option<V::Out> {
        Some(match self {
            Format::F32 | Format::F16 | Format::BF16 | Format::NF4 | Format::FP4 => return None,
            Format::Q4_0 => visitor.visit::<legacy::Q4_0>(),
            Format::Q4_1 => visitor.visit::<legacy::Q4_1>(),
            Format::Q5_0 => visitor.visit::<legacy::Q5_0>(),
            Format::Q5_1 => visitor.visit::<legacy::Q5_1>(),
            Format::Q8_0 => visitor.visit::<legacy::Q8_0>(),
            Format::Q2_K => visitor.visit::<kquants::Q2_K>(),
            Format::Q3_K => visitor.visit::<kquants::Q3_K>(),
            Format::Q4_K => visitor.visit::<kquants::Q4_K>(),
            Format::Q5_K => visitor.visit::<kquants::Q5_K>(),
            Format::Q6_K => visitor.visit::<kquants::Q6_K>(),
            Format::IQ4_NL => visitor.visit::<iq4::IQ4_NL>(),
            Format::IQ4_XS => visitor.visit::<iq4::IQ4_XS>(),
            Format::MXFP4 => visitor.visit::<mxfp4::MXFP4>(),
            Format::Q4_Z => visitor.visit::<grid::Q4_Z>(),
            Format::Q8_F => visitor.visit::<grid::Q8_F>(),
            Format::Q8_Z => visitor.visit::<grid::Q8_Z>(),
        })
    }

    /// Weights `32 g .. 32 g + 32` of a packed row; `None` for formats without integer codes and past
    /// the end of the row.
    pub fn group(self, row: &[u8], g: usize) -> Option<Group> {
        struct Take<'a>(&'a [u8], usize);
        impl Visitor for Take<'_> {
            type Out = Option<Group>;
            fn visit<F: BlockFormat>(self) -> Option<Group> {
                let start = (self.1 / F::GROUPS).checked_mul(F::BYTES)?;
                let block = self.0.get(start..start.checked_add(F::BYTES)?)?;
                Some(F::group(block, self.1 % F::GROUPS))
            }
        }
        self.visit(Take(row, g)).flatten()
    }

    /// Decodes whole blocks to f32: the format's own reference values, bit for bit.
    ///
    /// # Panics
    /// If `out` is not a whole number of blocks, or `bytes` not exactly their size
    /// (`bytes.len() == self.row_bytes(out.len())`).
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(self.row_bytes(out.len()), Some(bytes.len()), "{self}: {} weights", out.len());
        struct Decode<'a>(&'a [u8], &'a mut [f32]);
        impl Visitor for Decode<'_> {
            type Out = ();
            fn visit<F: BlockFormat>(self) {
                decode_blocks::<F>(self.0, self.1);
            }
        }
        match self {
            Format::F32 => float::decode_f32(bytes, out),
            Format::F16 => float::decode_f16(bytes, out),
            Format::BF16 => float::decode_bf16(bytes, out),
            Format::NF4 => table::decode::<table::NF4>(bytes, out),
            Format::FP4 => table::decode::<table::FP4>(bytes, out),
            _ => {
                self.visit(Decode(bytes, out));
            }
        }
    }
}

/// Decodes as many whole groups as both sides hold; inlined, so that it uses the caller's instruction set.
#[inline(always)]
pub fn decode_blocks<F: BlockFormat>(bytes: &[u8], out: &mut [f32]) {
    for (group, out) in groups::<F>(bytes).zip(out.as_chunks_mut::<32>().0) {
        group.decode(out);
    }
}

/// The groups of a packed row, in order. A part of a block at the end is left out.
#[inline(always)]
pub fn groups<F: BlockFormat>(row: &[u8]) -> GroupIter<'_, F> {
    GroupIter { rest: row, g: 0, format: std::marker::PhantomData }
}

/// See [`groups`].
pub struct GroupIter<'a, F> {
    rest: &'a [u8],
    g: usize,
    format: std::marker::PhantomData<F>,
}

impl<F: BlockFormat> Iterator for GroupIter<'_, F> {
    type Item = Group;

    #[inline(always)]
    fn next(&mut self) -> Option<Group> {
        if self.rest.len() < F::BYTES {
            return None;
        }
        let group = F::group(&self.rest[..F::BYTES], self.g);
        self.g += 1;
        if self.g == F::GROUPS {
            self.g = 0;
            self.rest = &self.rest[F::BYTES..];
        }
        Some(group)
    }
}

/// The block as an array, so that the compiler knows its size and needs no further checks.
#[inline(always)]
pub(super) fn whole<const N: usize>(block: &[u8]) -> &[u8; N] {
    match block.first_chunk() {
        Some(array) => array,
        None => panic!("a block of {N} bytes cut to {}", block.len()),
    }
}

/// `N` bytes of a block from `start`, which the caller keeps within it.
#[inline(always)]
pub(super) fn part<const N: usize>(block: &[u8], start: usize) -> &[u8; N] {
    whole(&block[start..])
}

/// The f16 at `start`, as f32.
#[inline(always)]
pub(super) fn f16_at(block: &[u8], start: usize) -> f32 {
    float::one_f16_to_f32(u16::from_le_bytes(*part(block, start)))
}

/// 16 bytes of two 4-bit codes: the low halves are codes 0..16, the high ones 16..32.
#[inline(always)]
pub(super) fn nibbles(bytes: &[u8; 16]) -> [u8; 32] {
    let mut codes = [0; 32];
    for i in 0..16 {
        codes[i] = bytes[i] & 15;
        codes[i + 16] = bytes[i] >> 4;
    }
    codes
}
