//! Plain Rust: the oracle that the other instruction sets are tested against, and what runs where none of them does.

use super::{
    CodePanel, DotCodes, DotFloats, GemmShape, Isa, Kernels, PANEL, PackCodes, PackFloats, Peaks, QuantizedRow,
    QuantizedRowMut, QuantizedRows, columns, lanes, words,
};
use crate::formats::{BlockFormat, FP4, Format, NF4, TableFormat, Visitor, table};
use half::{bf16, f16};
use std::ops::Range;

/// The scalar kernels.
pub(crate) fn kernels() -> Kernels {
    Kernels {
        isa: Isa::Scalar,
        biased_codes: false,
        quantize,
        dot_batch: |_| None,
        dot_codes,
        dot_floats,
        pack_codes,
        pack_floats,
        columns: columns::plain,
        mul_panels,
        gemm,
        f16_to_f32,
        f32_to_f16,
        half_heads: None,
        half: None,
        half_columns: None,
        split: None,
        words: Some(words::KERNELS),
        peaks: Peaks::default(),
        lanes: lanes::PLAIN,
    }
}

/// Rounds a row to 8 bits, as [`QuantizedRow`] says. A NaN or infinity makes its 32 columns' scale NaN or infinite, so
/// that it is seen in the result.
#[inline(always)]
pub(crate) fn quantize(x: &[f32], mut out: QuantizedRowMut<'_>) {
    for (g, x) in x.as_chunks::<32>().0.iter().enumerate() {
        round_group(x, largest(x), g, &mut out);
    }
}

/// [`quantize`] with a scale over each `span` columns (a multiple of 32) instead of each 32.
pub(crate) fn quantize_wide(x: &[f32], span: usize, mut out: QuantizedRowMut<'_>) {
    for (s, x) in x.chunks_exact(span).enumerate() {
        let groups = x.as_chunks::<32>().0;
        // The largest by its bits, as in `largest`: all are positive.
        let most = groups.iter().map(|x| largest(x).to_bits()).max().unwrap_or(0);
        for (g, x) in groups.iter().enumerate() {
            round_group(x, f32::from_bits(most), s * span / 32 + g, &mut out);
        }
    }
}

/// The largest absolute value; NaN or infinity where there is one.
#[inline(always)]
pub(super) fn largest(x: &[f32; 32]) -> f32 {
    // As integers, because a comparison of floats would pass over a NaN.
    let mut top = [0u32; 16];
    for i in 0..16 {
        top[i] = (x[i].to_bits() & 0x7fff_ffff).max(x[i + 16].to_bits() & 0x7fff_ffff);
    }
    let mut most = 0;
    for t in top {
        most = most.max(t);
    }
    f32::from_bits(most)
}

/// Rounds group `g` of a row to 8 bits with the scale `most / 127`.
#[inline(always)]
fn round_group(x: &[f32; 32], most: f32, g: usize, out: &mut QuantizedRowMut<'_>) {
    let d = most / 127.0;
    let inverse = if most == 0.0 { 0.0 } else { 127.0 / most };
    let q = &mut out.q[g * 32..][..32];
    let mut sums = [0i32; 2];
    for h in 0..2 {
        for i in 0..16 {
            let code = (x[h * 16 + i] * inverse).round_ties_even() as i32 as i8;
            q[h * 16 + i] = code;
            sums[h] += i32::from(code);
        }
        out.s16[g * 2 + h] = d * sums[h] as f32;
        out.c16[g * 2 + h] = -128 * sums[h];
    }
    out.d[g] = d;
    out.s32[g] = d * (sums[0] + sums[1]) as f32;
    out.c32[g] = -128 * (sums[0] + sums[1]);
}

/// Hands out the entry of a table of functions generic over the block format.
macro_rules! by_format {
    ($fn_type:ty, $format:expr, $function:ident) => {{
        struct Pick;
        impl Visitor for Pick {
            type Out = $fn_type;
            fn visit<F: BlockFormat>(self) -> $fn_type {
                $function::<F>
            }
        }
        $format.visit(Pick).expect("a block format")
    }};
}
pub(crate) use by_format;

fn dot_codes(format: Format) -> DotCodes {
    by_format!(DotCodes, format, dot_codes_of)
}

fn dot_codes_of<F: BlockFormat>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
    let (len, bytes) = (F::FORMAT.block_len(), F::FORMAT.block_bytes());
    let row_bytes = x.q.len() / len * bytes;
    for (out, row) in out.iter_mut().zip(data.chunks_exact(row_bytes)) {
        let (mut sum, mut mins) = (0f32, 0f32);
        for g in 0..x.q.len() / 32 {
            let block = g * 32 / len;
            let group = F::group(&row[block * bytes..][..bytes], g % (len / 32));
            let q = &x.q[g * 32..][..32];
            let mut dots = [0i32; 2];
            for i in 0..32 {
                dots[i / 16] += i32::from(group.codes[i]) * i32::from(q[i]);
            }
            if F::HALVES {
                for h in 0..2 {
                    sum += dots[h] as f32 * (group.scale[h] * x.d[g]);
                    mins += group.min[h] * x.s16[g * 2 + h];
                }
            } else {
                sum += (dots[0] + dots[1]) as f32 * (group.scale[0] * x.d[g]);
                mins += group.min[0] * x.s32[g];
            }
        }
        *out = if F::HAS_MIN { sum - mins } else { sum };
    }
}

/// Reads the `i`-th float of a row of floats.
#[inline(always)]
pub(crate) fn float_at(format: Format, row: &[u8], i: usize) -> f32 {
    match format {
        Format::F32 => f32::from_le_bytes([row[4 * i], row[4 * i + 1], row[4 * i + 2], row[4 * i + 3]]),
        Format::F16 => f16::from_le_bytes([row[2 * i], row[2 * i + 1]]).to_f32(),
        _ => bf16::from_le_bytes([row[2 * i], row[2 * i + 1]]).to_f32(),
    }
}

fn dot_floats(format: Format) -> DotFloats {
    fn dot(format: Format, data: &[u8], x: &[f32], out: &mut [f32]) {
        let row_bytes = x.len() * format.block_bytes();
        for (out, row) in out.iter_mut().zip(data.chunks_exact(row_bytes)) {
            // Eight sums, as many as a vector has at the least: closer to the exact sum than one after another.
            let mut sums = [0f32; 8];
            for (i, x) in x.iter().enumerate() {
                sums[i % 8] += x * float_at(format, row, i);
            }
            *out = sums.iter().sum();
        }
    }
    match format {
        Format::F32 => |data, x, out| dot(Format::F32, data, x, out),
        Format::F16 => |data, x, out| dot(Format::F16, data, x, out),
        Format::NF4 => dot_table_of::<NF4>,
        Format::FP4 => dot_table_of::<FP4>,
        _ => |data, x, out| dot(Format::BF16, data, x, out),
    }
}

fn dot_table_of<T: TableFormat>(data: &[u8], x: &[f32], out: &mut [f32]) {
    let row_bytes = x.len() / 32 * table::BYTES;
    for (out, row) in out.iter_mut().zip(data.chunks_exact(row_bytes)) {
        let mut sums = [0f32; 8];
        for (block, x) in row.as_chunks::<{ table::BYTES }>().0.iter().zip(x.as_chunks::<32>().0) {
            let mut weights = [0f32; 32];
            table::block::<T>(block, &mut weights);
            for i in 0..32 {
                sums[i % 8] += x[i] * weights[i];
            }
        }
        *out = sums.iter().sum();
    }
}

fn pack_codes(format: Format) -> PackCodes {
    fn pack<F: BlockFormat>(
        data: &[u8],
        rows: usize,
        cols: usize,
        codes: &mut [i8],
        scale: &mut [f32],
        min: &mut [f32],
    ) {
        pack_codes_of::<F, 0>(data, rows, cols, codes, scale, min)
    }
    by_format!(PackCodes, format, pack)
}

/// See [`PackCodes`]; `FLIP` is 0x80 for codes + 128, or 0.
#[inline(always)]
pub(crate) fn pack_codes_of<F: BlockFormat, const FLIP: u8>(
    data: &[u8],
    rows: usize,
    cols: usize,
    codes: &mut [i8],
    scale: &mut [f32],
    min: &mut [f32],
) {
    let (len, bytes) = (F::FORMAT.block_len(), F::FORMAT.block_bytes());
    let row_bytes = cols / len * bytes;
    let halves = if F::HALVES { 2 } else { 1 };
    if rows < PANEL {
        codes.fill(FLIP as i8);
        scale.fill(0.0);
        min.fill(0.0);
    }
    let (quads, _) = codes.as_chunks_mut::<4>();
    for r in 0..rows {
        let row = &data[r * row_bytes..][..row_bytes];
        for (b, block) in row.chunks_exact(bytes).enumerate() {
            for i in 0..len / 32 {
                let group = F::group(block, i);
                let g = b * (len / 32) + i;
                let quads = &mut quads[g * 8 * PANEL..][..8 * PANEL];
                for (k, four) in group.codes.as_chunks::<4>().0.iter().enumerate() {
                    quads[k * PANEL + r] = four.map(|c| (c as u8 ^ FLIP) as i8);
                }
                for h in 0..halves {
                    scale[(g * halves + h) * PANEL + r] = group.scale[h];
                    if F::HAS_MIN {
                        min[(g * halves + h) * PANEL + r] = group.min[h];
                    }
                }
            }
        }
    }
}

/// [`pack_codes_of`] for every format, compiled with the target features `$features`; `$flip` as there.
#[cfg(target_arch = "x86_64")]
macro_rules! packed {
    ($features:literal, $flip:literal) => {{
        use $crate::formats::{BlockFormat, Visitor};
        use $crate::kernels::PackCodes;
        use $crate::kernels::scalar::{by_format, pack_codes_of};
        #[target_feature(enable = $features)]
        fn inner<F: BlockFormat>(
            data: &[u8],
            rows: usize,
            cols: usize,
            codes: &mut [i8],
            scale: &mut [f32],
            min: &mut [f32],
        ) {
            pack_codes_of::<F, $flip>(data, rows, cols, codes, scale, min)
        }
        fn entry<F: BlockFormat>(
            data: &[u8],
            rows: usize,
            cols: usize,
            codes: &mut [i8],
            scale: &mut [f32],
            min: &mut [f32],
        ) {
            // SAFETY: a table with this entry is handed out only on a processor that has these features.
            unsafe { inner::<F>(data, rows, cols, codes, scale, min) }
        }
        |format| by_format!(PackCodes, format, entry)
    }};
}
#[cfg(target_arch = "x86_64")]
pub(super) use packed;

fn pack_floats(format: Format) -> PackFloats {
    match format {
        Format::F32 => |data, rows, cols, out| pack_floats_of(Format::F32, data, rows, cols, out),
        Format::F16 => |data, rows, cols, out| pack_floats_of(Format::F16, data, rows, cols, out),
        Format::NF4 => |data, rows, cols, out| pack_table_of::<NF4>(data, rows, cols, out),
        Format::FP4 => |data, rows, cols, out| pack_table_of::<FP4>(data, rows, cols, out),
        _ => |data, rows, cols, out| pack_floats_of(Format::BF16, data, rows, cols, out),
    }
}

#[inline(always)]
pub(crate) fn pack_floats_of(format: Format, data: &[u8], rows: usize, cols: usize, out: &mut [f32]) {
    if rows < PANEL {
        out.fill(0.0);
    }
    let row_bytes = cols * format.block_bytes();
    for r in 0..rows {
        let row = &data[r * row_bytes..][..row_bytes];
        for c in 0..cols {
            out[c * PANEL + r] = float_at(format, row, c);
        }
    }
}

/// See [`PackFloats`], for the formats that look their weights up.
#[inline(always)]
pub(crate) fn pack_table_of<T: TableFormat>(data: &[u8], rows: usize, cols: usize, out: &mut [f32]) {
    let (data, _) = data.as_chunks::<{ table::BYTES }>();
    let blocks = cols / 32;
    for (b, out) in out.as_chunks_mut::<PANEL>().0.as_chunks_mut::<32>().0.iter_mut().enumerate().take(blocks) {
        let mut tile = [[0f32; 32]; PANEL];
        for r in 0..rows {
            table::block::<T>(&data[r * blocks + b], &mut tile[r]);
        }
        for i in 0..32 {
            for r in 0..PANEL {
                out[i][r] = tile[r][i];
            }
        }
    }
}

fn mul_panels(panels: &[CodePanel<'_>], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32], stride: usize) {
    for (p, panel) in panels.iter().enumerate() {
        let (quads, _) = panel.codes.as_chunks::<4>();
        for (at, r) in rows.clone().enumerate() {
            let x = x.row(r);
            let mut acc = [0f32; PANEL];
            for s in 0..x.q.len() / panel.sub {
                let d = x.d[s * panel.sub / 32];
                let sum = if panel.sub == 16 { x.s16[s] } else { x.s32[s] };
                for o in 0..PANEL {
                    let mut dot = 0i32;
                    for k in s * panel.sub / 4..(s + 1) * panel.sub / 4 {
                        for j in 0..4 {
                            dot += i32::from(quads[k * PANEL + o][j]) * i32::from(x.q[k * 4 + j]);
                        }
                    }
                    acc[o] += dot as f32 * (panel.scale[s * PANEL + o] * d);
                    if !panel.min.is_empty() {
                        acc[o] -= panel.min[s * PANEL + o] * sum;
                    }
                }
            }
            out[at * stride + p * PANEL..][..PANEL].copy_from_slice(&acc);
        }
    }
}

fn gemm(s: GemmShape, a: &[f32], b: &[f32], c: &mut [f32]) {
    for r in 0..s.m {
        for j in 0..s.n {
            let panel = &b[j / PANEL * s.ldb..];
            let mut sum = if s.add { c[r * s.ldc + j] } else { 0.0 };
            for k in 0..s.k {
                sum += a[r * s.lda + k] * panel[k * PANEL + j % PANEL];
            }
            c[r * s.ldc + j] = sum;
        }
    }
}

fn f16_to_f32(src: &[u16], dst: &mut [f32]) {
    for (d, s) in dst.iter_mut().zip(src) {
        *d = f16::from_bits(*s).to_f32();
    }
}

fn f32_to_f16(src: &[f32], dst: &mut [u16]) {
    for (d, s) in dst.iter_mut().zip(src) {
        *d = f16::from_f32(*s).to_bits();
    }
}
