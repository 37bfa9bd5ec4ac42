//! Weight rows unpacked into panels for many-row products.

use super::instructions::*;
use crate::formats::{BlockFormat, FP4, Format, Group, NF4, Visitor};
use crate::kernels::{PANEL, PackCodes, PackFloats, scalar};

pub(super) fn pack_codes(format: Format) -> PackCodes {
    scalar::by_format!(PackCodes, format, pack_codes_of)
}

fn pack_codes_of<F: BlockFormat>(
    data: &[u8],
    rows: usize,
    cols: usize,
    codes: &mut [i8],
    scale: &mut [f32],
    min: &mut [f32],
) {
    const ABSENT: Group = Group { codes: [0; 32], scale: [0.0; 2], min: [0.0; 2] };
    let row_bytes = cols / (32 * F::GROUPS) * F::BYTES;
    let halves = if F::HALVES { 2 } else { 1 };
    // For each 32 columns: 8 quads of columns, of 4 quads of rows, of 4 x 4 codes.
    let quads = codes.as_chunks_mut::<16>().0.as_chunks_mut::<4>().0.as_chunks_mut::<8>().0;
    for quarter in 0..PANEL / 4 {
        for g in 0..cols / 32 {
            let mut groups = [ABSENT; 4];
            for (i, group) in groups.iter_mut().enumerate() {
                let r = 4 * quarter + i;
                if r < rows {
                    let block = &data[r * row_bytes + g / F::GROUPS * F::BYTES..][..F::BYTES];
                    *group = F::group(block, g % F::GROUPS);
                }
                for h in 0..halves {
                    scale[(g * halves + h) * PANEL + r] = group.scale[h];
                    if F::HAS_MIN {
                        min[(g * halves + h) * PANEL + r] = group.min[h];
                    }
                }
            }
            let quads = &mut quads[g];
            for half in 0..2 {
                let mut v = [vdupq_n_f32(0.0); 4];
                for i in 0..4 {
                    v[i] = vreinterpretq_f32_s8(load_i8(&groups[i].codes.as_chunks::<16>().0[half]));
                }
                let v = transpose(v);
                for i in 0..4 {
                    store_i8(&mut quads[4 * half + i][quarter], vreinterpretq_s8_f32(v[i]));
                }
            }
        }
    }
}

pub(super) fn pack_floats(format: Format) -> PackFloats {
    match format {
        Format::F32 => pack_floats_of::<F32>,
        Format::F16 => pack_floats_of::<F16>,
        Format::NF4 => scalar::pack_table_of::<NF4>,
        Format::FP4 => scalar::pack_table_of::<FP4>,
        _ => pack_floats_of::<BF16>,
    }
}

fn pack_floats_of<F: Floats>(data: &[u8], rows: usize, cols: usize, out: &mut [f32]) {
    let (columns, _) = out.as_chunks_mut::<PANEL>();
    for quarter in 0..PANEL / 4 {
        for c in (0..cols).step_by(4) {
            let count = 4.min(cols - c);
            let mut v = [vdupq_n_f32(0.0); 4];
            for i in 0..4 {
                let r = 4 * quarter + i;
                if r < rows {
                    let from = &data[(r * cols + c) * F::BYTES..][..count * F::BYTES];
                    v[i] = if count == 4 {
                        F::four(from)
                    } else {
                        let mut padded = [0u8; 16];
                        padded[..from.len()].copy_from_slice(from);
                        F::four(&padded)
                    };
                }
            }
            let v = transpose(v);
            for i in 0..count {
                store_f32(&mut columns[c + i].as_chunks_mut::<4>().0[quarter], v[i]);
            }
        }
    }
}
