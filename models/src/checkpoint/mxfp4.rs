//! MXFP4 as gpt-oss is published: `NAME_blocks` `[experts, rows, groups, 16]` and `NAME_scales` `[experts, rows, groups]`
//! are the matrices of all experts, each row an output's.
//!
//! A group is 32 weights of 4 bits (E2M1) with a power of two (E8M0) as their scale: what ggml calls a block of MXFP4, but
//! that two neighbours share a byte here, and weights that are 16 apart there. Codes and scales stay as they are.

use super::bytes::Rows;
use super::prequantized::{Layer, LayerParts, Layers, Part};
use crate::Result;
use rushlight_quant::formats::Format;
use std::ops::Range;
use std::sync::Arc;

/// Weights in a group, and bytes of their codes.
const GROUP: usize = 32;
const CODES: usize = GROUP / 2;
/// What E8M0 has for "not a number".
const NAN: u8 = 255;

/// The matrices of one tensor.
#[derive(Debug)]
pub(super) struct Blocks {
    groups: usize,
    blocks: Part,
    scales: Part,
}

impl Rows for Blocks {
    fn row_bytes(&self) -> usize {
        self.groups * (1 + CODES)
    }

    fn make(&self, row: usize, out: &mut [u8]) {
        let first = row * self.groups;
        let groups = self.blocks.data[first * CODES..].as_chunks::<CODES>().0.iter().zip(&self.scales.data[first..]);
        for (out, (codes, &scale)) in out.as_chunks_mut::<{ 1 + CODES }>().0.iter_mut().zip(groups) {
            out[0] = scale;
            for i in 0..CODES / 2 {
                let (low, high) = (codes[i], codes[i + CODES / 2]);
                out[1 + 2 * i] = low & 15 | high << 4;
                out[2 + 2 * i] = low >> 4 | high & 0xf0;
            }
        }
    }

    fn let_go(&self, rows: Range<usize>) {
        for (part, size) in [(&self.blocks, CODES), (&self.scales, 1)] {
            let size = size * self.groups;
            if let Some(bytes) = part.data.slice(rows.start * size..rows.end * size) {
                bytes.release();
            }
        }
    }
}

/// Finds every tensor of such matrices.
pub(super) fn find(layers: &mut Layers) -> Result<()> {
    // Scales without blocks are a layer too: one that is not whole.
    let mut names = layers.parts.with_end("_blocks");
    names.extend(layers.parts.with_end("_scales"));
    names.sort_unstable();
    names.dedup();
    for name in names {
        let (outer, layer) = layer(layers, &name).map_err(|what| layers.error(what))?;
        layers.add_stack(name, &outer, layer);
    }
    Ok(())
}

/// The matrices called `name`, one behind the other, and the dimensions before a matrix's own.
fn layer(layers: &mut Layers, name: &str) -> Result<(Vec<usize>, Layer), String> {
    let blocks = layers.parts.need(&format!("{name}_blocks"), &["U8"], None)?;
    let [outer @ .., of_matrix, groups, CODES] = &blocks.shape[..] else {
        let Part { name, shape, .. } = &blocks;
        return Err(format!("tensor '{name}' should be [experts, rows, groups, {CODES}] but is {shape:?}"));
    };
    let (outer, of_matrix, groups) = (outer.to_vec(), *of_matrix, *groups);
    let stored = [&outer[..], &[of_matrix, groups]].concat();
    if stored.contains(&0) {
        return Err(format!("tensor '{}' is empty: {:?}", blocks.name, blocks.shape));
    }
    let scales = layers.parts.need(&format!("{name}_scales"), &["U8"], Some(&stored))?;
    if let Some(at) = scales.data.iter().position(|&scale| scale == NAN) {
        return Err(format!(
            "tensor '{}' holds a scale that is not a number (row {}, group {}): the file is damaged; download it again",
            scales.name,
            at / groups,
            at % groups
        ));
    }
    let (rows, cols) = (scales.data.len() / groups, groups * GROUP);
    scales.data.release();
    let parts = LayerParts::Blocks(Arc::new(Blocks { groups, blocks, scales }));
    Ok((outer, Layer { rows, cols, format: Format::MXFP4, order: None, parts }))
}
