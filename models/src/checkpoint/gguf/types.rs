//! GGUF's numbers for tensor types.

use rushlight_quant::formats::Format;

/// GGUF's number for `format`; `None` for the formats that exist in memory only.
pub fn number(format: Format) -> Option<u32> {
    Some(match format {
        Format::F32 => 0,
        Format::F16 => 1,
        Format::Q4_0 => 2,
        Format::Q4_1 => 3,
        Format::Q5_0 => 6,
        Format::Q5_1 => 7,
        Format::Q8_0 => 8,
        Format::Q2_K => 10,
        Format::Q3_K => 11,
        Format::Q4_K => 12,
        Format::Q5_K => 13,
        Format::Q6_K => 14,
        Format::IQ4_NL => 20,
        Format::IQ4_XS => 23,
        Format::BF16 => 30,
        Format::MXFP4 => 39,
        Format::Q4_Z | Format::Q8_F | Format::Q8_Z | Format::NF4 | Format::FP4 => return None,
    })
}

/// The format with GGUF's number `n`.
pub fn format(n: u32) -> Option<Format> {
    Format::ALL.into_iter().find(|&format| number(format) == Some(n))
}

/// The name of a type that GGUF knows and we do not.
pub(super) fn foreign_name(n: u32) -> &'static str {
    match n {
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        40 => "NVFP4",
        _ => "unknown",
    }
}
