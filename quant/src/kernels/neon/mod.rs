//! AArch64 Advanced SIMD. Three levels share this code: plain, with dot products (`sdot`), and with the 8-bit matrix
//! product (`smmla`). All three give the same bits, because integer products are exact and are scaled in one order.
//!
//! `instructions` holds single instructions, `few` and `many` the two shapes of work, `pack` what prepares the second.

mod few;
mod instructions;
mod many;
mod pack;

use super::{DotCodes, Isa, Kernels, MulPanels, Peaks, columns, lanes, scalar};
use crate::formats::Format;
use instructions::{load_f32, load_u16, narrow_f16, store_f32, store_u16, widen_f16};
use std::arch::is_aarch64_feature_detected;

/// What a processor may have beyond plain Advanced SIMD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Plain,
    Dotprod,
    I8mm,
}

impl Level {
    pub(crate) const ALL: [Level; 3] = [Level::Plain, Level::Dotprod, Level::I8mm];

    pub(crate) fn available(self) -> bool {
        match self {
            Level::Plain => true,
            Level::Dotprod => is_aarch64_feature_detected!("dotprod"),
            Level::I8mm => is_aarch64_feature_detected!("dotprod") && is_aarch64_feature_detected!("i8mm"),
        }
    }
}

/// The kernels for the most that this processor has.
pub(crate) fn kernels() -> Kernels {
    let level = Level::ALL.into_iter().rfind(|level| level.available()).unwrap_or(Level::Plain);
    kernels_at(level)
}

/// The kernels of one level; the caller has seen that it is available.
pub(crate) fn kernels_at(level: Level) -> Kernels {
    let (dot_codes, mul_panels): (fn(Format) -> DotCodes, MulPanels) = match level {
        Level::Plain => (few::dot_codes_plain, many::mul_panels_plain),
        Level::Dotprod => (few::dot_codes_dotprod, many::mul_panels_dotprod),
        Level::I8mm => (few::dot_codes_dotprod, many::mul_panels_i8mm),
    };
    Kernels {
        isa: Isa::Neon,
        biased_codes: false,
        // The plain loops are vector code already: Advanced SIMD is part of the base instruction set.
        quantize: |x, out| scalar::quantize(x, out),
        dot_batch: |_| None,
        dot_codes,
        dot_floats: few::dot_floats,
        pack_codes: pack::pack_codes,
        pack_floats: pack::pack_floats,
        columns: columns::plain,
        mul_panels,
        gemm: many::gemm,
        f16_to_f32,
        f32_to_f16,
        half_heads: None,
        half: None,
        half_columns: None,
        split: None,
        words: None,
        peaks: Peaks::default(),
        lanes: lanes::PLAIN,
    }
}

fn f16_to_f32(src: &[u16], dst: &mut [f32]) {
    let len = src.len().min(dst.len());
    let (src, src_rest) = src[..len].as_chunks::<4>();
    let (dst, dst_rest) = dst[..len].as_chunks_mut::<4>();
    for (d, s) in dst.iter_mut().zip(src) {
        store_f32(d, widen_f16(load_u16(s)));
    }
    let (mut s, mut d) = ([0; 4], [0.0; 4]);
    s[..src_rest.len()].copy_from_slice(src_rest);
    store_f32(&mut d, widen_f16(load_u16(&s)));
    dst_rest.copy_from_slice(&d[..dst_rest.len()]);
}

fn f32_to_f16(src: &[f32], dst: &mut [u16]) {
    let len = src.len().min(dst.len());
    let (src, src_rest) = src[..len].as_chunks::<4>();
    let (dst, dst_rest) = dst[..len].as_chunks_mut::<4>();
    for (d, s) in dst.iter_mut().zip(src) {
        store_u16(d, narrow_f16(load_f32(s)));
    }
    let (mut s, mut d) = ([0.0; 4], [0; 4]);
    s[..src_rest.len()].copy_from_slice(src_rest);
    store_u16(&mut d, narrow_f16(load_f32(&s)));
    dst_rest.copy_from_slice(&d[..dst_rest.len()]);
}
