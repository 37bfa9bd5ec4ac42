//! The product with a frozen weight, backward: `dy . W`, straight from the packed blocks.
//!
//! A task unpacks some columns of the weight, as many rows of it as stay in cache, and uses them for every row of the
//! gradient: the sums run over weight rows. Where the processor multiplies bf16 faster than f32, gradients and weights
//! are rounded to it; only f32 weights, which are exact in training's checks, stay f32 throughout.

use super::Matrix;
use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::formats::Format;
use crate::kernels::{GemmShape, HalfKernels, HalfRows, PANEL, PackHalfColumns, ROW_BLOCK, fetch};
use crate::threads::Disjoint;
use std::cell::RefCell;

/// Weight rows whose products are summed before they are added to the gradient, as f32 and as bf16. Fixed, as they
/// decide the order of sums.
const DEPTH: usize = 256;
const HALF_DEPTH: usize = 2048;
/// Columns that one task takes (a row's sums do not depend on it).
const WIDE: usize = 64;
/// Rows whose sums are held in the nearest cache at a time.
const BLOCK: usize = 96;
/// Rows that one task rounds: a block of [`HalfRows`].
const ROUND: usize = 16;

#[derive(Default)]
struct Scratch {
    floats: Aligned<f32>,
    panels: Aligned<f32>,
    half: Aligned<u16>,
    tile: Aligned<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static ROUNDED: RefCell<Aligned<u16>> = RefCell::default();
}

impl Cpu {
    /// Whether [`Cpu::matmul_backward`] rounds gradients and weights of this format to bf16 before it multiplies them.
    pub fn rounds_gradients(&self, format: Format) -> bool {
        format != Format::F32 && self.kernels.half_columns.is_some()
    }

    /// `dx[r, c] += sum_i sum_o dy[i][r, o] * weights[i][o, c]` for `n` rows: what the loss's gradients at the outputs of
    /// [`Cpu::matmul`] give at its input. `dy[i]` is `[n, weights[i].rows]`, `dx` is `[n, cols]`.
    ///
    /// # Panics
    /// When the sizes do not fit each other.
    pub fn matmul_backward(&self, dy: &[&[f32]], n: usize, weights: &[Matrix<'_>], dx: &mut [f32]) {
        let Some(cols) = weights.first().map(|w| w.cols) else { return };
        assert_eq!(dx.len(), n * cols, "gradient of the input is not [n, cols]");
        assert_eq!(weights.len(), dy.len(), "a gradient for each matrix");
        for (w, dy) in weights.iter().zip(dy) {
            assert_eq!(w.cols, cols, "matrices in one call share their input");
            assert_eq!(dy.len(), n * w.rows, "gradient of an output is not [n, rows]");
        }
        let dx = Disjoint::new(dx);
        for (w, dy) in weights.iter().zip(dy) {
            match (self.kernels.half, self.kernels.half_columns) {
                (Some(half), Some(columns)) if self.rounds_gradients(w.format) => {
                    self.backward_half(&half, columns(w.format), dy, n, w, &dx);
                }
                _ => self.backward_floats(dy, n, w, &dx),
            }
        }
    }

    fn backward_floats(&self, dy: &[f32], n: usize, w: &Matrix<'_>, dx: &Disjoint<'_, f32>) {
        let pack = (self.kernels.columns)(w.format);
        self.split(w.cols, WIDE, &|columns| {
            SCRATCH.with_borrow_mut(|Scratch { panels, tile, .. }| {
                panels.reserve(DEPTH * WIDE);
                tile.reserve(BLOCK * WIDE);
                for first in (0..w.rows).step_by(DEPTH) {
                    let k = DEPTH.min(w.rows - first);
                    let data = &w.data[first * w.row_bytes()..(first + k) * w.row_bytes()];
                    pack(data, w.row_bytes(), k, columns.clone(), k * PANEL, panels);
                    for start in (0..n).step_by(BLOCK) {
                        let (m, n) = (BLOCK.min(n - start), columns.len().next_multiple_of(PANEL));
                        let shape = GemmShape { m, n, k, lda: w.rows, ldb: k * PANEL, ldc: WIDE, add: false };
                        (self.kernels.gemm)(shape, &dy[start * w.rows + first..], panels, tile);
                        for (r, sums) in (start..start + m).zip(tile.chunks_exact(WIDE)) {
                            // SAFETY: a range of columns belongs to one task.
                            let dx = unsafe { dx.slice(r * w.cols + columns.start..r * w.cols + columns.end) };
                            (self.kernels.lanes.add)(&sums[..dx.len()], dx);
                        }
                    }
                }
            });
        });
    }

    fn backward_half(
        &self,
        kernels: &HalfKernels,
        pack: PackHalfColumns,
        dy: &[f32],
        n: usize,
        w: &Matrix<'_>,
        dx: &Disjoint<'_, f32>,
    ) {
        for first in (0..w.rows).step_by(HALF_DEPTH) {
            let used = HALF_DEPTH.min(w.rows - first);
            let depth = used.next_multiple_of(32);
            let data = &w.data[first * w.row_bytes()..(first + used) * w.row_bytes()];
            ROUNDED.with_borrow_mut(|rounded| {
                self.round_part(kernels, dy, n, w.rows, first..first + used, rounded);
                let dy = HalfRows { all: rounded, cols: depth, padded: n.next_multiple_of(ROW_BLOCK) };
                self.split(w.cols, WIDE, &|columns| {
                    SCRATCH.with_borrow_mut(|Scratch { half, tile, .. }| {
                        half.reserve(depth * WIDE);
                        tile.reserve(BLOCK * 2 * PANEL);
                        pack(data, w.row_bytes(), used, columns.clone(), depth * PANEL, half);
                        for start in (0..n).step_by(BLOCK) {
                            let end = n.min(start + BLOCK);
                            for first in columns.clone().step_by(2 * PANEL) {
                                let last = columns.end.min(first + 2 * PANEL);
                                let (a, b) = half[(first - columns.start) * depth..].split_at(depth * PANEL);
                                let panels = &[a, b][..(last - first).div_ceil(PANEL)];
                                for r in start..end {
                                    // SAFETY: as below.
                                    fetch(unsafe { dx.slice(r * w.cols + first..r * w.cols + last) });
                                }
                                (kernels.mul)(panels, dy, start..end, tile, 2 * PANEL);
                                for (r, sums) in (start..end).zip(tile.chunks_exact(2 * PANEL)) {
                                    // SAFETY: a range of columns belongs to one task.
                                    let dx = unsafe { dx.slice(r * w.cols + first..r * w.cols + last) };
                                    (self.kernels.lanes.add)(&sums[..dx.len()], dx);
                                }
                            }
                        }
                    });
                });
            });
        }
    }

    /// Rounds columns `part` of the `n` rows of `dy` to bf16, with zeros behind them up to a multiple of 32.
    fn round_part(
        &self,
        kernels: &HalfKernels,
        dy: &[f32],
        n: usize,
        width: usize,
        part: std::ops::Range<usize>,
        out: &mut Aligned<u16>,
    ) {
        let cols = part.len().next_multiple_of(32);
        out.reserve(n.next_multiple_of(ROW_BLOCK) * cols);
        let out = Disjoint::new(out);
        self.split(n, ROUND, &|rows| {
            SCRATCH.with_borrow_mut(|Scratch { floats, .. }| {
                floats.reserve(ROUND * cols);
                for (r, to) in rows.clone().zip(floats.chunks_exact_mut(cols)) {
                    to[..part.len()].copy_from_slice(&dy[r * width..][part.clone()]);
                    to[part.len()..].fill(0.0);
                }
                // SAFETY: a block of rows belongs to one task.
                let block = unsafe { out.slice(rows.start * cols..(rows.start + ROUND) * cols) };
                (kernels.round)(&floats[..rows.len() * cols], cols, block);
            });
        });
    }
}

impl Matrix<'_> {
    /// The weights `columns` of row `row` as f32. Columns begin and end with blocks.
    ///
    /// # Panics
    /// When they do not, or when `out` is not as long.
    pub fn decode(&self, row: usize, columns: std::ops::Range<usize>, out: &mut [f32]) {
        let (len, bytes) = (self.format.block_len(), self.format.block_bytes());
        assert!(columns.start.is_multiple_of(len) && columns.end.is_multiple_of(len), "columns cut a block");
        let data = &self.data[row * self.row_bytes()..][..self.row_bytes()];
        self.format.decode(&data[columns.start / len * bytes..columns.end / len * bytes], out);
    }
}
