//! The product with a frozen weight, backward: `dy . W`, straight from the packed blocks.

use super::Matrix;
use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::formats::Format;
use crate::kernels::{GemmShape, PANEL};
use crate::threads::Disjoint;
use std::cell::RefCell;

/// Weight rows whose products are summed before they are added to the gradient. Fixed, as it decides the order of sums.
const DEPTH: usize = 256;
/// Columns that one task takes (a row's sums do not depend on it).
const WIDE: usize = 64;
/// Rows whose sums are held in the nearest cache at a time.
const BLOCK: usize = 96;

#[derive(Default)]
struct Scratch {
    panels: Aligned<f32>,
    tile: Aligned<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Cpu {
    /// Whether [`Cpu::matmul_backward`] rounds gradients and weights of this format to bf16 before it multiplies them.
    pub fn rounds_gradients(&self, _format: Format) -> bool {
        false
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
            self.split(cols, WIDE, &|columns| {
                SCRATCH.with_borrow_mut(|scratch| {
                    let Scratch { panels, tile } = scratch;
                    let padded = columns.len().next_multiple_of(PANEL);
                    panels.reserve(DEPTH * padded);
                    tile.reserve(BLOCK * padded);
                    for first in (0..w.rows).step_by(DEPTH) {
                        let depth = DEPTH.min(w.rows - first);
                        let data = &w.data[first * w.row_bytes()..(first + depth) * w.row_bytes()];
                        let pack = (self.kernels.columns)(w.format);
                        pack(data, w.row_bytes(), depth, columns.clone(), depth * PANEL, panels);
                        for start in (0..n).step_by(BLOCK) {
                            let m = BLOCK.min(n - start);
                            let (lda, ldb) = (w.rows, depth * PANEL);
                            let shape = GemmShape { m, n: padded, k: depth, lda, ldb, ldc: padded, add: false };
                            (self.kernels.gemm)(shape, &dy[start * lda + first..], panels, tile);
                            for (r, sums) in tile.chunks_exact(padded).take(m).enumerate() {
                                let at = (start + r) * cols;
                                // SAFETY: a range of columns belongs to one task.
                                let dx = unsafe { dx.slice(at + columns.start..at + columns.end) };
                                (self.kernels.lanes.add)(&sums[..columns.len()], dx);
                            }
                        }
                    }
                });
            });
        }
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
