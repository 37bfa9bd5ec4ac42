//! Codes and scales of a whole matrix, while they are being chosen.

use super::grid::{Grid, GroupFit, Levels, nearest};
use super::{encode, pack};
use crate::cpu::Cpu;
use crate::formats::Format;
use crate::threads::Disjoint;

/// What is being quantized, and to what.
pub(super) struct Problem<'a> {
    pub cpu: &'a Cpu,
    /// `[rows, cols]`.
    pub weights: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    pub grid: Grid,
    /// See [`GroupFit::search`] and [`GroupFit::half`].
    pub search: bool,
    pub half: bool,
}

impl Problem<'_> {
    /// Columns whose scales are found together.
    pub fn span(&self) -> usize {
        match self.grid {
            Grid::Blocks(format) => format.block_len(),
            Grid::Group { group, .. } => group.min(self.cols),
        }
    }

    pub fn levels(&self) -> Levels {
        match self.grid {
            Grid::Blocks(format) => match format.levels() {
                Some(pack::Levels::Range(low, high)) => Levels::Range(f32::from(low), f32::from(high)),
                Some(pack::Levels::Table(table)) => Levels::Table(table),
                None => Levels::Range(0.0, 0.0),
            },
            Grid::Group { bits, .. } => Levels::Zero(((1u32 << bits) - 1) as f32),
        }
    }

    /// `None` for groups.
    pub fn format(&self) -> Option<Format> {
        match self.grid {
            Grid::Blocks(format) => Some(format),
            Grid::Group { .. } => None,
        }
    }

    /// `None` for block formats.
    pub fn group_fit(&self) -> Option<GroupFit> {
        match self.grid {
            Grid::Blocks(_) => None,
            Grid::Group { bits, symmetric, .. } => {
                Some(GroupFit { bits, symmetric, search: self.search, half: self.half })
            }
        }
    }
}

/// Columns with a scale of their own in block formats, or part of them.
const UNIT: usize = 16;

/// A choice of codes and scales.
#[derive(Clone)]
pub(super) struct Solution {
    pub rows: usize,
    pub cols: usize,
    /// Which parameters each column has.
    pub unit_of: Vec<u32>,
    pub units: usize,
    /// `[rows, units]`
    pub scales: Vec<f32>,
    /// `[rows, units]`: minimums of block formats, zeros of groups.
    pub offsets: Vec<f32>,
    /// `[rows, cols]`: what stands in [`crate::formats::Group::codes`], or the code of a group with its zero added.
    pub codes: Vec<u8>,
    /// Packed rows; empty for groups.
    pub packed: Vec<u8>,
}

impl Solution {
    /// Nothing chosen yet. `unit_of` says which group each column is in.
    pub fn empty(p: &Problem<'_>, unit_of: Vec<u32>) -> Solution {
        let units = unit_of.iter().max().map_or(0, |u| *u as usize + 1);
        Solution {
            rows: p.rows,
            cols: p.cols,
            unit_of,
            units,
            scales: vec![0.0; p.rows * units],
            offsets: vec![0.0; p.rows * units],
            codes: vec![0; p.rows * p.cols],
            packed: vec![0; p.format().and_then(|f| f.row_bytes(p.cols)).unwrap_or(0) * p.rows],
        }
    }

    /// Groups of neighbouring columns.
    pub fn plain_units(p: &Problem<'_>) -> Vec<u32> {
        let len = match p.grid {
            Grid::Blocks(_) => UNIT,
            Grid::Group { .. } => p.span(),
        };
        (0..p.cols).map(|c| (c / len) as u32).collect()
    }

    /// Rounds each weight to the nearest value of its group's grid. `importance`: how much the squared error of each
    /// column counts for the scales.
    pub fn round(p: &Problem<'_>, importance: Option<&[f32]>) -> Solution {
        let mut s = Solution::empty(p, Solution::plain_units(p));
        let (cols, units, levels) = (s.cols, s.units, p.levels());
        let (span, fit) = (p.span(), p.group_fit());
        let bytes = s.packed.len() / s.rows.max(1);
        let (scales, offsets) = (Disjoint::new(&mut s.scales), Disjoint::new(&mut s.offsets));
        let (codes, packed) = (Disjoint::new(&mut s.codes), Disjoint::new(&mut s.packed));
        p.cpu.split(p.rows, 8, &|part| {
            for r in part {
                // SAFETY: a row belongs to one task.
                let (scales, offsets, codes, packed) = unsafe {
                    (
                        scales.slice(r * units..(r + 1) * units),
                        offsets.slice(r * units..(r + 1) * units),
                        codes.slice(r * cols..(r + 1) * cols),
                        packed.slice(r * bytes..(r + 1) * bytes),
                    )
                };
                let w = &p.weights[r * cols..(r + 1) * cols];
                match p.grid {
                    Grid::Blocks(format) => {
                        encode(format, w, cols, importance, packed);
                        read_params(format, packed, scales, offsets);
                        for (g, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                            if let Some(group) = format.group(packed, g) {
                                *codes = group.codes.map(|q| q as u8);
                            }
                        }
                    }
                    Grid::Group { .. } => {
                        for (u, from) in (0..cols).step_by(span).enumerate() {
                            let range = from..cols.min(from + span);
                            let importance = importance.map(|i| &i[range.clone()]);
                            if let Some(fit) = fit {
                                (scales[u], offsets[u]) = fit.fit(&w[range.clone()], importance);
                            }
                            for c in range {
                                codes[c] = (nearest(levels, scales[u], offsets[u], w[c]).0 + offsets[u]) as u8;
                            }
                        }
                    }
                }
            }
        });
        s
    }

    /// Errors `decoded - weights`, `[rows, cols]`.
    pub fn errors(&self, p: &Problem<'_>, out: &mut [f32]) {
        let cols = self.cols;
        let out = Disjoint::new(out);
        p.cpu.split(self.rows, 8, &|part| {
            for r in part {
                // SAFETY: a row belongs to one task.
                let out = unsafe { out.slice(r * cols..(r + 1) * cols) };
                let w = &p.weights[r * cols..(r + 1) * cols];
                for c in 0..cols {
                    let u = r * self.units + self.unit_of[c] as usize;
                    out[c] = value(p.grid, self.codes[r * cols + c], self.scales[u], self.offsets[u]) - w[c];
                }
            }
        });
    }

    /// Writes the codes into the packed rows of a block format.
    pub fn pack_codes(&mut self, p: &Problem<'_>) {
        let Some(format) = p.format() else { return };
        let (bytes, cols, codes) = (self.packed.len() / self.rows.max(1), self.cols, &self.codes);
        let packed = Disjoint::new(&mut self.packed);
        p.cpu.split(self.rows, 8, &|part| {
            for r in part {
                // SAFETY: a row belongs to one task.
                let packed = unsafe { packed.slice(r * bytes..(r + 1) * bytes) };
                for (g, codes) in codes[r * cols..(r + 1) * cols].as_chunks::<32>().0.iter().enumerate() {
                    pack::put_codes(format, packed, g, &codes.map(|q| q as i8));
                }
            }
        });
    }

    /// Takes row `r` from `other`, whose columns are grouped alike.
    pub fn take_row(&mut self, other: &Solution, r: usize) {
        let (units, cols) = (r * self.units..(r + 1) * self.units, r * self.cols..(r + 1) * self.cols);
        self.scales[units.clone()].copy_from_slice(&other.scales[units.clone()]);
        self.offsets[units.clone()].copy_from_slice(&other.offsets[units]);
        self.codes[cols.clone()].copy_from_slice(&other.codes[cols]);
        let bytes = self.packed.len() / self.rows.max(1);
        self.packed[r * bytes..(r + 1) * bytes].copy_from_slice(&other.packed[r * bytes..(r + 1) * bytes]);
    }
}

/// What a stored code stands for.
#[inline(always)]
pub(super) fn value(grid: Grid, code: u8, scale: f32, offset: f32) -> f32 {
    match grid {
        Grid::Blocks(_) => scale * f32::from(code as i8) - offset,
        Grid::Group { .. } => scale * (f32::from(code) - offset),
    }
}

/// The code to store for one that [`nearest`] gave.
#[inline(always)]
pub(super) fn stored(grid: Grid, code: f32, offset: f32) -> u8 {
    match grid {
        Grid::Blocks(_) => code as i8 as u8,
        Grid::Group { .. } => (code + offset) as u8,
    }
}

/// Reads scales and minimums of packed blocks, one for each 16 columns.
pub(super) fn read_params(format: Format, packed: &[u8], scales: &mut [f32], offsets: &mut [f32]) {
    for (g, (scales, offsets)) in scales.chunks_mut(2).zip(offsets.chunks_mut(2)).enumerate() {
        if let Some(group) = format.group(packed, g) {
            scales.copy_from_slice(&group.scale);
            offsets.copy_from_slice(&group.min);
        }
    }
}
