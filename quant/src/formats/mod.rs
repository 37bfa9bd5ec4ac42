//! Block formats: how a run of weights is laid out in bytes, and what it decodes to.
//!
//! Almost every block format stores integer codes and, for each 16 or 32 of them, a scale and perhaps a minimum.
//! [`Group`] is that common ground: kernels are written once over [`BlockFormat`] and [`Format::visit`] picks the
//! instance. The two formats of `table` look their weights up in a table of floats instead.
//!
//! The last five formats are those that checkpoints of other tools are packed into as they are read. No file has them,
//! and GGUF has no numbers for them.

mod block;
pub mod exact;
mod float;
pub mod grid;
mod iq4;
mod kquants;
mod legacy;
mod mxfp4;
pub mod nf4;
pub mod table;

pub use block::{BlockFormat, Group, GroupIter, Visitor, decode_blocks, groups};
pub use float::{bf16_to_f32, f16_to_f32, f32_to_f16};
pub use grid::{Q4_Z, Q8_F, Q8_Z};
pub use iq4::{IQ4_NL, IQ4_TABLE, IQ4_XS};
pub use kquants::{Q2_K, Q3_K, Q4_K, Q5_K, Q6_K};
pub use legacy::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
pub use mxfp4::{MXFP4, e8m0_half};
pub use table::{FP4, NF4, TableFormat};

/// The storage format of a tensor. Rows are stored one after another, each a whole number of blocks.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper 16 bits of an `F32`.
    BF16,
    /// 32 weights: f16 scale, 4-bit codes around 8.
    Q4_0,
    /// 32 weights: f16 scale and minimum, 4-bit codes.
    Q4_1,
    /// 32 weights: f16 scale, 5-bit codes around 16.
    Q5_0,
    /// 32 weights: f16 scale and minimum, 5-bit codes.
    Q5_1,
    /// 32 weights: f16 scale, 8-bit signed codes.
    Q8_0,
    /// 256 weights in 16 groups: 2-bit codes, 4-bit scales and minimums.
    Q2_K,
    /// 256 weights in 16 groups: 3-bit codes, 6-bit scales.
    Q3_K,
    /// 256 weights in 8 groups: 4-bit codes, 6-bit scales and minimums.
    Q4_K,
    /// 256 weights in 8 groups: 5-bit codes, 6-bit scales and minimums.
    Q5_K,
    /// 256 weights in 16 groups: 6-bit codes, 8-bit scales.
    Q6_K,
    /// 32 weights: f16 scale, 4-bit codes into a table of 16 values.
    IQ4_NL,
    /// 256 weights in 8 groups: 6-bit scales, 4-bit codes into the `IQ4_NL` table.
    IQ4_XS,
    /// 32 weights: E8M0 scale, 4-bit (E2M1) codes.
    MXFP4,
    /// In memory only. 32 weights: f16 scale, integer zero point, 4-bit codes (GPTQ and AWQ with a zero point).
    Q4_Z,
    /// In memory only. 32 weights: f32 scale, 8-bit signed codes (LLM.int8, and grids whose scales f16 cannot hold).
    Q8_F,
    /// In memory only. 32 weights: f32 scale and minimum, 8-bit signed codes (8-bit GPTQ with a zero point).
    Q8_Z,
    /// In memory only. 32 weights: f32 scale, 4-bit codes into the NF4 table of floats (bitsandbytes).
    NF4,
    /// In memory only. 32 weights: f32 scale, 4-bit codes into the FP4 table of floats (bitsandbytes).
    FP4,
}

impl Format {
    /// Every format, in the order of declaration.
    pub const ALL: [Format; 21] = [
        Format::F32,
        Format::F16,
        Format::BF16,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q2_K,
        Format::Q3_K,
        Format::Q4_K,
        Format::Q5_K,
        Format::Q6_K,
        Format::IQ4_NL,
        Format::IQ4_XS,
        Format::MXFP4,
        Format::Q4_Z,
        Format::Q8_F,
        Format::Q8_Z,
        Format::NF4,
        Format::FP4,
    ];

    /// The name that GGUF tools print, such as `Q4_K`; our own for the formats that are in memory only.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "F32",
            Format::F16 => "F16",
            Format::BF16 => "BF16",
            Format::Q4_0 => "Q4_0",
            Format::Q4_1 => "Q4_1",
            Format::Q5_0 => "Q5_0",
            Format::Q5_1 => "Q5_1",
            Format::Q8_0 => "Q8_0",
            Format::Q2_K => "Q2_K",
            Format::Q3_K => "Q3_K",
            Format::Q4_K => "Q4_K",
            Format::Q5_K => "Q5_K",
            Format::Q6_K => "Q6_K",
            Format::IQ4_NL => "IQ4_NL",
            Format::IQ4_XS => "IQ4_XS",
            Format::MXFP4 => "MXFP4",
            Format::Q4_Z => "Q4_Z",
            Format::Q8_F => "Q8_F",
            Format::Q8_Z => "Q8_Z",
            Format::NF4 => "NF4",
            Format::FP4 => "FP4",
        }
    }

    /// Weights in one block.
    pub const fn block_len(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::BF16 => 1,
            Format::Q4_0
            | Format::Q4_1
            | Format::Q5_0
            | Format::Q5_1
            | Format::Q8_0
            | Format::IQ4_NL
            | Format::MXFP4
            | Format::Q4_Z
            | Format::Q8_F
            | Format::Q8_Z
            | Format::NF4
            | Format::FP4 => 32,
            Format::Q2_K | Format::Q3_K | Format::Q4_K | Format::Q5_K | Format::Q6_K | Format::IQ4_XS => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::BF16 => 2,
            Format::Q4_0 => 18,
            Format::Q4_1 => 20,
            Format::Q5_0 => 22,
            Format::Q5_1 => 24,
            Format::Q8_0 => 34,
            Format::Q2_K => 84,
            Format::Q3_K => 110,
            Format::Q4_K => 144,
            Format::Q5_K => 176,
            Format::Q6_K => 210,
            Format::IQ4_NL => 18,
            Format::IQ4_XS => 136,
            Format::MXFP4 => 17,
            Format::Q4_Z => 19,
            Format::Q8_F => 36,
            Format::Q8_Z => 40,
            Format::NF4 | Format::FP4 => 20,
        }
    }

    /// Bytes of a row of `cols` weights; `None` where `cols` is not a whole number of blocks or the size overflows.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Whether weights are plain floating-point numbers rather than blocks of codes.
    pub const fn is_float(self) -> bool {
        matches!(self, Format::F32 | Format::F16 | Format::BF16)
    }

    /// Whether weights are integer codes with scales, which [`Format::visit`] knows and integer kernels multiply; the
    /// others (floats, and 4-bit codes into a table of floats) are multiplied as floats.
    pub const fn is_coded(self) -> bool {
        !self.is_float() && !matches!(self, Format::NF4 | Format::FP4)
    }

    /// Whether this format exists in memory only, for what checkpoints of other tools hold.
    pub const fn is_internal(self) -> bool {
        matches!(self, Format::Q4_Z | Format::Q8_F | Format::Q8_Z | Format::NF4 | Format::FP4)
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
