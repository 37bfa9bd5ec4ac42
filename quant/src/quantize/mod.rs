//! The algorithms that choose the numbers: [`encode`] rounds rows of f32 weights to packed rows of any format, and
//! [`gptq`](gptq()) does so with a mind to what the layer's inputs are.
//!
//! Rows get the bytes that llama.cpp's quantizer gives them, with and without importance, wherever weights and scales are
//! finite there. Searches of our own had lower weighted errors, but the perplexity that comes of a difference so small is a
//! coin's throw: the same codes are the only ones that are never worse.

mod drift;
mod factor;
mod float;
mod gptq;
mod gram;
mod grid;
mod groups;
mod hessian;
mod iq4;
mod kquants;
mod layer;
mod legacy;
mod mxfp4;
mod pack;
#[cfg(test)]
mod reference;
mod refine;
mod round;
mod search;
mod solution;
#[cfg(test)]
mod tests;

use crate::formats::Format;
use crate::kernels::Isa;
#[cfg(target_arch = "x86_64")]
use crate::kernels::lanes::compiled;
pub use drift::{Drift, Seen};
pub use gptq::{Fit, Order, Variant};
pub use grid::Grid;
use groups::MOST_IMPORTANT;
pub use hessian::Hessian;
pub use layer::{Codes, GptqError, GptqOptions, Method, Quantized, gptq};
pub use pack::{Levels, put_codes};
pub use round::round_groups;
use std::sync::OnceLock;

/// Encodes whole rows of `cols` weights as packed rows of `format`, one after another.
///
/// `importance` is how much the square error of each column counts: `cols` numbers, none negative, of any size (the
/// mean square of what the column is multiplied with, as an importance matrix holds it). The floating-point formats,
/// Q8_0 and MXFP4 make no use of it.
///
/// Every row stands for itself, so the result does not depend on how rows are cut over calls and threads; nor does it
/// depend on the instruction set. Weights are finite: for others the codes are unspecified (the call still returns).
///
/// # Panics
/// If the format is one that is in memory only, if `cols` is 0 or not a whole number of blocks, or if the lengths do not
/// fit: `weights.len()` whole rows, `importance.len() == cols`, `out.len()` exactly the bytes of the rows.
pub fn encode(format: Format, weights: &[f32], cols: usize, importance: Option<&[f32]>, out: &mut [u8]) {
    static ISA: OnceLock<Isa> = OnceLock::new();
    // A wrong name in the environment is reported by whoever makes the `Cpu`.
    let isa = *ISA.get_or_init(|| Isa::from_env().unwrap_or(Isa::best()));
    encode_with(isa, format, weights, cols, importance, out);
}

/// [`encode`] by the code for one instruction set (the plain one where this machine lacks it).
///
/// # Panics
/// As [`encode`].
pub fn encode_with(isa: Isa, format: Format, weights: &[f32], cols: usize, importance: Option<&[f32]>, out: &mut [u8]) {
    let bytes = match format.row_bytes(cols) {
        Some(bytes) if bytes > 0 => bytes,
        _ => panic!("{format}: a row of {cols} weights is no whole number of blocks"),
    };
    assert!(weights.len().is_multiple_of(cols), "{} weights are no whole number of rows of {cols}", weights.len());
    assert_eq!(Some(out.len()), (weights.len() / cols).checked_mul(bytes), "{format}: bytes of the encoded rows");
    assert!(
        importance.is_none_or(|i| i.len() == cols),
        "importance of {:?} columns of {cols}",
        importance.map(<[f32]>::len)
    );
    // Only ratios count, which a power of two leaves as they are.
    let scaled: Vec<f32>;
    let importance = match importance {
        Some(huge) if huge.iter().any(|i| *i > MOST_IMPORTANT) => {
            let factor = MOST_IMPORTANT / f32::exp2(127.0) / 2.0;
            scaled = huge.iter().map(|i| i.min(f32::MAX) * factor).collect();
            Some(&scaled[..])
        }
        other => other,
    };
    let row_encoder = row_encoder(isa);
    for (row, out) in weights.chunks_exact(cols).zip(out.chunks_exact_mut(bytes)) {
        row_encoder(format, row, importance, out);
    }
}

/// Encodes one row.
#[inline(always)]
fn row(format: Format, row: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    match format {
        Format::F32 | Format::F16 | Format::BF16 => float::encode(format, row, out),
        Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 => {
            legacy::encode(format, row, importance, out);
        }
        Format::Q2_K | Format::Q3_K | Format::Q4_K | Format::Q5_K | Format::Q6_K => {
            kquants::encode(format, row, importance, out);
        }
        Format::IQ4_NL => iq4::encode_nl(row, importance, out),
        Format::IQ4_XS => iq4::encode_xs(row, importance, out),
        Format::MXFP4 => mxfp4::encode(row, out),
        Format::Q4_Z | Format::Q8_F | Format::Q8_Z | Format::NF4 | Format::FP4 => {
            panic!("{format} is read from other tools' checkpoints, not encoded")
        }
    }
}

/// [`row`] as a function.
type RowEncoder = fn(Format, &[f32], Option<&[f32]>, &mut [u8]);

/// [`row`] as compiled for an instruction set.
fn row_encoder(isa: Isa) -> RowEncoder {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni if isa.available() => {
            compiled!("avx2,fma,f16c", row, (f: Format, x: &[f32], i: Option<&[f32]>, out: &mut [u8]))
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx if isa.available() => {
            compiled!(
                "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c",
                row,
                (f: Format, x: &[f32], i: Option<&[f32]>, out: &mut [u8])
            )
        }
        _ => row,
    }
}
