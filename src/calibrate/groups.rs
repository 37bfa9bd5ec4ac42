//! Layers of integer codes in groups of inputs: how they lie in the scratch folder, and as what they run while the layers
//! after them are calibrated.
//!
//! A finished layer is a record for each output: the scales of its groups in f32, their zero points and its codes, a byte
//! each. The group of each input is kept apart, since a matrix is quantized some rows at a time.

use crate::quantize::scratch::Scratch;
use anyhow::{Context, Result, bail};
use rushlight_models::checkpoint::Bytes;
use rushlight_models::model::Weight;
use rushlight_quant::formats::grid;
use rushlight_quant::quantize::Codes;
use std::sync::Arc;

/// The grid of such layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u32,
    /// Inputs of a group; the last of a row may be shorter, and one longer than a row is the row.
    pub group: usize,
    /// Whether every zero point is in the middle.
    pub symmetric: bool,
}

/// A finished layer: weight `[o, i]` is `scales[o, g] * (codes[o, i] - zeros[o, g])` with `g = g_idx[i]`.
pub struct Layer {
    /// `[outputs, inputs]`.
    pub codes: Vec<u8>,
    /// `[outputs, groups]`, each an f16 number.
    pub scales: Vec<f32>,
    /// `[outputs, groups]`.
    pub zeros: Vec<u8>,
    /// The group of each input.
    pub g_idx: Vec<u32>,
}

impl Groups {
    /// The records of some rows of the layer `name`. What `codes` say of the inputs' groups goes into `scratch`.
    pub fn records(&self, name: &str, codes: &Codes, scratch: &Scratch) -> Result<Vec<u8>> {
        let Codes::Groups { codes, scales, zeros, group_of } = codes else {
            bail!("{name}: the quantizer gave blocks, not groups");
        };
        let bytes: Vec<u8> = group_of.iter().flat_map(|g| g.to_le_bytes()).collect();
        match scratch.get_state(&state(name))? {
            None => scratch.put_state(&state(name), &bytes)?,
            Some(known) if known[..] == bytes => {}
            Some(_) => bail!("{name}: its rows are in groups of different inputs"),
        }
        let cols = group_of.len();
        let groups = scales.len() / (codes.len() / cols.max(1)).max(1);
        let mut out = Vec::with_capacity(codes.len() + 5 * scales.len());
        let parameters = scales.chunks_exact(groups).zip(zeros.chunks_exact(groups));
        for (codes, (scales, zeros)) in codes.chunks_exact(cols).zip(parameters) {
            out.extend(scales.iter().flat_map(|s| s.to_le_bytes()));
            out.extend_from_slice(zeros);
            out.extend_from_slice(codes);
        }
        Ok(out)
    }

    /// The layer `name` of `cols` inputs that `records` hold.
    pub fn layer(&self, name: &str, cols: usize, records: &[u8], scratch: &Scratch) -> Result<Layer> {
        let kept = scratch.get_state(&state(name))?.with_context(|| format!("{name} is not finished"))?;
        let g_idx: Vec<u32> = kept.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let groups = g_idx.iter().max().map_or(0, |g| *g as usize + 1);
        let record = 5 * groups + cols;
        if g_idx.len() != cols || !records.len().is_multiple_of(record) {
            bail!("{name} in {} has another size than it should: delete the folder", scratch.dir().display());
        }
        let mut layer = Layer { codes: Vec::new(), scales: Vec::new(), zeros: Vec::new(), g_idx };
        for record in records.chunks_exact(record) {
            let (scales, rest) = record.split_at(4 * groups);
            layer.scales.extend(scales.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
            layer.zeros.extend_from_slice(&rest[..groups]);
            layer.codes.extend_from_slice(&rest[groups..]);
        }
        Ok(layer)
    }

    /// The same as a weight that the kernels take, packed as a reader of the finished directory packs it.
    pub fn weight(&self, name: &str, cols: usize, records: &[u8], scratch: &Scratch) -> Result<Weight> {
        let Layer { codes, scales, zeros, g_idx } = self.layer(name, cols, records, scratch)?;
        let rows = codes.len() / cols.max(1);
        let groups = scales.len() / rows.max(1);
        // Inputs by group, and within a group as they come.
        let mut order: Vec<u32> = (0..cols as u32).collect();
        order.sort_by_key(|&i| g_idx[i as usize]);
        let alike = |run: &[u32]| run.iter().all(|&i| g_idx[i as usize] == g_idx[run[0] as usize]);
        let whole = cols.is_multiple_of(32) && order.chunks(32).all(alike);
        let range = (zeros.iter().min().copied().unwrap_or(0).into(), zeros.iter().max().copied().unwrap_or(0).into());
        let halves = scales.iter().all(|s| grid::is_f16(*s));
        let format = grid::block_format(self.bits, range, halves).filter(|_| whole);
        let damaged = || format!("{name} in {} is damaged: delete the folder", scratch.dir().display());
        let Some(format) = format else {
            let value = |(i, q): (usize, &u8)| {
                let unit = i / cols * groups + g_idx[i % cols] as usize;
                scales[unit] * (f32::from(*q) - f32::from(zeros[unit]))
            };
            let values: Vec<f32> = codes.iter().enumerate().map(value).collect();
            return Weight::from_f32(rows, cols, &values).with_context(damaged);
        };
        let mut packed = vec![0; codes.len() / 32 * format.block_bytes()];
        for (i, block) in packed.chunks_exact_mut(format.block_bytes()).enumerate() {
            let (row, first) = (i / (cols / 32), i % (cols / 32) * 32);
            let inputs = &order[first..first + 32];
            let codes: [u8; 32] = std::array::from_fn(|k| codes[row * cols + inputs[k] as usize]);
            let unit = row * groups + g_idx[inputs[0] as usize] as usize;
            grid::put(format, &codes, zeros[unit].into(), scales[unit], block);
        }
        let weight = Weight::new(format, rows, cols, Bytes::new(packed)).with_context(damaged)?;
        match order.is_sorted() {
            true => Ok(weight),
            false => weight.with_order(Arc::from(order)).with_context(damaged),
        }
    }
}

fn state(name: &str) -> String {
    format!("{name}.g_idx")
}
