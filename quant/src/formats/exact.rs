//! From the blocks that checkpoints of other tools are read into to blocks that a GGUF file can hold, code by code.

use super::Format;
use super::block::whole;
use half::f16;

/// The GGUF format that takes over the codes of `from` as they are; `None` where there is none. Q4_0 and Q8_0, which
/// hold symmetric grids, are such already and answer themselves.
pub fn target(from: Format) -> Option<Format> {
    match from {
        Format::Q4_Z => Some(Format::Q4_1),
        Format::Q4_0 | Format::Q8_0 => Some(from),
        _ => None,
    }
}

/// Converts packed rows of `from` into rows of `to`, keeping every code and scale. The answer is false, and `out`
/// untouched, where that cannot be:
///
/// | from | to | what changes |
/// | --- | --- | --- |
/// | any | the same | nothing |
/// | Q4_Z | Q4_1 | the minimum `-zero * scale` is rounded to f16 |
/// | Q4_Z | Q4_0 | nothing, where every zero point is 8 |
/// | Q8_F | Q8_0 | nothing, where every scale is an f16 number |
///
/// # Panics
/// If `out` has not room for exactly as many blocks as `rows` has.
pub fn convert(from: Format, to: Format, rows: &[u8], out: &mut [u8]) -> bool {
    let blocks = rows.len() / from.block_bytes();
    assert_eq!(blocks * from.block_bytes(), rows.len(), "whole blocks of {from}");
    assert_eq!(blocks * to.block_bytes() * from.block_len(), out.len() * to.block_len(), "as many weights of {to}");
    let blocks = || rows.chunks_exact(from.block_bytes());
    match (from, to) {
        _ if from == to => out.copy_from_slice(rows),
        (Format::Q4_Z, Format::Q4_1) => {
            let min = |block: &[u8; 19]| -f32::from(block[2]) * f16::from_le_bytes([block[0], block[1]]).to_f32();
            if blocks().any(|block| !f16::from_f32(min(whole(block))).is_finite()) {
                return false;
            }
            for (block, out) in blocks().zip(out.as_chunks_mut::<20>().0) {
                let block: &[u8; 19] = whole(block);
                out[..2].copy_from_slice(&block[..2]);
                out[2..4].copy_from_slice(&f16::from_f32(min(block)).to_le_bytes());
                out[4..].copy_from_slice(&block[3..]);
            }
        }
        (Format::Q4_Z, Format::Q4_0) if blocks().all(|block| block[2] == 8) => {
            for (block, out) in blocks().zip(out.as_chunks_mut::<18>().0) {
                out[..2].copy_from_slice(&block[..2]);
                out[2..].copy_from_slice(&block[3..]);
            }
        }
        (Format::Q8_F, Format::Q8_0) => {
            let scale = |block: &[u8]| super::grid::f32_at(block, 0);
            if !blocks().all(|block| super::grid::is_f16(scale(block))) {
                return false;
            }
            for (block, out) in blocks().zip(out.as_chunks_mut::<34>().0) {
                out[..2].copy_from_slice(&f16::from_f32(scale(block)).to_le_bytes());
                out[2..].copy_from_slice(&block[4..]);
            }
        }
        _ => return false,
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::grid;

    /// Codes of every size and a zero point and scale for each block.
    fn rows(format: Format, bits: u32, zeros: &[u16], scales: &[f32]) -> (Vec<u8>, Vec<f32>) {
        let (mut packed, mut weights) = (Vec::new(), Vec::new());
        for (b, (&zero, &scale)) in zeros.iter().zip(scales).enumerate() {
            let codes: [u8; 32] = std::array::from_fn(|i| ((i * 7 + b * 13) % (1 << bits)) as u8);
            let mut block = vec![0xaa; format.block_bytes()];
            grid::put(format, &codes, zero, scale, &mut block);
            packed.extend(block);
            weights.extend(codes.iter().map(|&q| scale * (f32::from(q) - f32::from(zero))));
        }
        (packed, weights)
    }

    fn decoded(format: Format, packed: &[u8]) -> Vec<f32> {
        let mut weights = vec![0.0; packed.len() / format.block_bytes() * 32];
        format.decode(packed, &mut weights);
        weights
    }

    #[test]
    fn every_grid_has_a_block_that_holds_it_exactly() {
        for bits in [2, 3, 4, 8] {
            for zeros in [(0, 0), (8, 8), (128, 128), (0, 15), (1, 16), (3, 200), (256, 256)] {
                for scales in [[0.5, -0.00123_f32, 3.0e-7], [0.1, 1.0e-9, 7.7]] {
                    let scales = match scales[0] == 0.5 {
                        true => scales.map(|s| f16::from_f32(s).to_f32()),
                        false => scales,
                    };
                    let Some(format) = grid::block_format(bits, zeros, scales[0] == 0.5) else {
                        assert!(u32::from(zeros.1) > 1 << bits);
                        continue;
                    };
                    let zeros = [zeros.0, zeros.1, zeros.0];
                    let (packed, want) = rows(format, bits, &zeros, &scales);
                    let got = decoded(format, &packed);
                    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                        let room = if scales[0] == 0.5 { 0.0 } else { 4e-5 * scales[i / 32].abs() };
                        assert!((got - want).abs() <= room, "{bits} bits {zeros:?} as {format}: {got} is not {want}");
                    }
                }
            }
        }
        assert_eq!(grid::block_format(4, (8, 8), true), Some(Format::Q4_0));
        assert_eq!(grid::block_format(4, (7, 8), true), Some(Format::Q4_Z));
        assert_eq!(grid::block_format(3, (0, 8), true), Some(Format::Q4_0));
        assert_eq!(grid::block_format(8, (128, 128), true), Some(Format::Q8_0));
        assert_eq!(grid::block_format(8, (128, 128), false), Some(Format::Q8_F));
        assert_eq!(grid::block_format(8, (127, 128), true), Some(Format::Q8_Z));
        assert_eq!(grid::block_format(5, (0, 0), true), None);
    }

    #[test]
    fn codes_and_scales_are_kept() {
        let scales = [0.25, 0.0019989014, 0.12347412].map(|s| f16::from_f32(s).to_f32());
        // A zero point of 8 is a power of two, so its minimum is an f16 number; others may be rounded.
        let (packed, want) = rows(Format::Q4_Z, 4, &[8, 8, 8], &scales);
        for to in [Format::Q4_0, Format::Q4_1] {
            let mut out = vec![0; 3 * to.block_bytes()];
            assert!(convert(Format::Q4_Z, to, &packed, &mut out));
            assert_eq!(decoded(to, &out), want, "{to}");
        }
        let (packed, want) = rows(Format::Q4_Z, 4, &[0, 11, 16], &scales);
        let mut out = vec![7; 3 * 18];
        assert!(!convert(Format::Q4_Z, Format::Q4_0, &packed, &mut out));
        assert_eq!(out, [7; 3 * 18]);
        let mut out = vec![0; 3 * 20];
        assert!(convert(Format::Q4_Z, Format::Q4_1, &packed, &mut out));
        for (i, (got, want)) in decoded(Format::Q4_1, &out).iter().zip(&want).enumerate() {
            assert!((got - want).abs() <= 16.0 * scales[i / 32] / 2048.0, "{got} is not {want}");
            let (old, new) = (Format::Q4_Z.group(&packed, i / 32).unwrap(), Format::Q4_1.group(&out, i / 32).unwrap());
            assert_eq!(old.scale, new.scale);
            assert_eq!(i16::from(new.codes[i % 32]) - i16::from(old.codes[i % 32]), [0, 11, 16][i / 32]);
        }
        let (packed, want) = rows(Format::Q8_F, 8, &[128; 3], &scales);
        let mut out = vec![0; 3 * 34];
        assert!(convert(Format::Q8_F, Format::Q8_0, &packed, &mut out));
        assert_eq!(decoded(Format::Q8_0, &out), want);
        let (packed, _) = rows(Format::Q8_F, 8, &[128; 3], &[0.25, 0.1, 0.5]);
        assert!(!convert(Format::Q8_F, Format::Q8_0, &packed, &mut out));
        assert!(!convert(Format::Q8_0, Format::Q4_0, &out.clone(), &mut [0; 3 * 18]));
        // A minimum beyond f16 must not become infinite.
        let (packed, _) = rows(Format::Q4_Z, 4, &[16], &[60000.0]);
        assert!(!convert(Format::Q4_Z, Format::Q4_1, &packed, &mut [0; 20]));
    }
}
