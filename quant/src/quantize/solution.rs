//! Codes and scales of a whole matrix, while they are being chosen.

use super::grid::{Grid, GroupFit, Levels, nearest};
use crate::cpu::Cpu;
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
            Grid::Blocks(_) => unreachable!(),
            Grid::Group { bits, .. } => Levels::Zero(((1u32 << bits) - 1) as f32),
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
            packed: Vec::new(),
        }
    }

    /// Groups of neighbouring columns.
    pub fn plain_units(p: &Problem<'_>) -> Vec<u32> {
        let len = match p.grid {
            Grid::Blocks(_) => 16,
            Grid::Group { .. } => p.span(),
        };
        (0..p.cols).map(|c| (c / len) as u32).collect()
    }

    /// Rounds each weight to the nearest value of its group's grid. `importance`: how much the squared error of each
    /// column counts for the scales.
    pub fn round(p: &Problem<'_>, importance: Option<&[f32]>) -> Solution {
        let mut s = Solution::empty(p, Solution::plain_units(p));
        let ones = vec![1f32; p.cols];
        let importance = importance.unwrap_or(&ones);
        let (cols, units, levels) = (s.cols, s.units, p.levels());
        let span = p.span();
        let (scales, offsets, codes) =
            (Disjoint::new(&mut s.scales), Disjoint::new(&mut s.offsets), Disjoint::new(&mut s.codes));
        p.cpu.split(p.rows, 8, &|part| {
            for r in part {
                // SAFETY: a row belongs to one task.
                let (scales, offsets, codes) = unsafe {
                    (
                        scales.slice(r * units..(r + 1) * units),
                        offsets.slice(r * units..(r + 1) * units),
                        codes.slice(r * cols..(r + 1) * cols),
                    )
                };
                let w = &p.weights[r * cols..(r + 1) * cols];
                if let Some(fit) = p.group_fit() {
                    for (u, from) in (0..cols).step_by(span).enumerate() {
                        let to = cols.min(from + span);
                        (scales[u], offsets[u]) = fit.fit(&w[from..to], &importance[from..to]);
                        for c in from..to {
                            codes[c] = (nearest(levels, scales[u], offsets[u], w[c]).0 + offsets[u]) as u8;
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
                    out[c] = self.scales[u] * (f32::from(self.codes[r * cols + c]) - self.offsets[u]) - w[c];
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
