//! The product with a frozen weight, backward: `dy . W`, straight from the packed blocks.
//!
//! A task unpacks some columns of the weight, as many rows of it as stay in cache, and uses them for every row of the
//! gradient: the sums run over weight rows. Where the processor multiplies bf16 faster than f32, gradients and weights
//! are rounded to it; only f32 weights, which are exact in training's checks, stay f32 throughout.

use super::Matrix;
use super::low_rank::{Back, CHUNK, SHARES};
use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::formats::Format;
use crate::kernels::{GemmShape, HalfKernels, HalfRows, PANEL, ROW_BLOCK, fetch};
use crate::threads::Disjoint;
use std::cell::RefCell;
use std::ops::Range;

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
                (Some(_), Some(_)) if self.rounds_gradients(w.format) => {
                    self.backward_half(dy, n, w, Some(&dx), None);
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

    /// Through a matrix, to `dx` where it is wanted, and through the adapter beside it.
    ///
    /// # Panics
    /// When the processor has no products of bf16.
    pub(super) fn backward_half(
        &self,
        dy: &[f32],
        n: usize,
        w: &Matrix<'_>,
        dx: Option<&Disjoint<'_, f32>>,
        mut back: Option<Back<'_>>,
    ) {
        let kernels = &self.kernels.half.expect("products of bf16");
        let pack = (self.kernels.half_columns.expect("products of bf16"))(w.format);
        let mut narrow = vec![0f32; back.as_ref().map_or(0, |back| n * back.rank)];
        let wide = back.as_ref().filter(|_| dx.is_some()).map_or_else(Vec::new, Back::terms);
        for first in (0..w.rows).step_by(HALF_DEPTH) {
            let used = HALF_DEPTH.min(w.rows - first);
            let depth = used.next_multiple_of(32);
            // The adapter's terms are known once all of its outputs' are.
            let last = first + used == w.rows;
            let tail = back.as_ref().filter(|_| last).map_or(0, Back::width);
            let data = &w.data[first * w.row_bytes()..(first + used) * w.row_bytes()];
            ROUNDED.with_borrow_mut(|rounded| {
                let part = first..first + used;
                match &mut back {
                    Some(back) => self.round_along(kernels, dy, n, w.rows, part, tail, rounded, back, &mut narrow),
                    None => self.round_part(kernels, dy, n, w.rows, part, rounded),
                }
                let padded = n.next_multiple_of(ROW_BLOCK);
                let Some(dx) = dx else { return };
                let dy = HalfRows { all: rounded, cols: depth + tail, padded };
                let len = (depth + tail) * PANEL;
                self.split(w.cols, WIDE, &|columns| {
                    SCRATCH.with_borrow_mut(|Scratch { half, tile, .. }| {
                        half.reserve(len / PANEL * WIDE);
                        tile.reserve(BLOCK * 2 * PANEL);
                        pack(data, w.row_bytes(), used, columns.clone(), len, half);
                        if tail > 0 {
                            let (rows, at) = (wide.len() / w.cols, depth * PANEL);
                            (kernels.pairs)(&wide[columns.start..], w.cols, rows, columns.len(), len, &mut half[at..]);
                        }
                        for start in (0..n).step_by(BLOCK) {
                            let end = n.min(start + BLOCK);
                            for first in columns.clone().step_by(2 * PANEL) {
                                let last = columns.end.min(first + 2 * PANEL);
                                let (a, b) = half[(first - columns.start) / PANEL * len..].split_at(len);
                                let panels = &[a, &b[..len.min(b.len())]][..(last - first).div_ceil(PANEL)];
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
        if let Some(Back { dlow, .. }) = back {
            self.add(dlow, &narrow);
        }
    }

    /// Rounds columns `part` of the `n` rows of `dy` to bf16, with zeros behind them up to a multiple of 32.
    fn round_part(
        &self,
        kernels: &HalfKernels,
        dy: &[f32],
        n: usize,
        width: usize,
        part: Range<usize>,
        out: &mut Aligned<u16>,
    ) {
        let cols = part.len().next_multiple_of(32);
        out.reserve(n.next_multiple_of(ROW_BLOCK) * cols);
        let out = Disjoint::new(out);
        self.split(n, ROUND, &|rows| {
            // SAFETY: a block of rows belongs to one task.
            let block = unsafe { out.slice(rows.start * cols..(rows.start + ROUND) * cols) };
            round_block(kernels, &dy[rows.start * width..rows.end * width], width, part.clone(), 0, block);
        });
    }

    /// The same with a tail, and all that the adapter makes of those rows while they are near.
    fn round_along(
        &self,
        kernels: &HalfKernels,
        dy: &[f32],
        n: usize,
        width: usize,
        part: Range<usize>,
        tail: usize,
        out: &mut Aligned<u16>,
        back: &mut Back<'_>,
        narrow: &mut [f32],
    ) {
        let depth = part.len().next_multiple_of(32);
        let (cols, rank) = (depth + tail, back.rank);
        let len = part.len() * rank;
        out.reserve(n.next_multiple_of(ROW_BLOCK) * cols);
        SHARES.with_borrow_mut(|shares| {
            shares.reserve(n.div_ceil(CHUNK) * len);
            let panels = Cpu::narrow_panels(kernels, back, part.clone(), cols * PANEL);
            let (out, narrow, all) = (Disjoint::new(out), Disjoint::new(narrow), Disjoint::new(shares));
            self.split(n, CHUNK, &|rows| {
                let end = rows.end.next_multiple_of(ROW_BLOCK);
                let at = rows.start / CHUNK * len;
                // SAFETY: these rows, and their share, belong to one task.
                let (out, narrow, share) = unsafe {
                    (
                        out.slice(rows.start * cols..end * cols),
                        narrow.slice(rows.start * rank..rows.end * rank),
                        all.slice(at..at + len),
                    )
                };
                for (block, first) in out.chunks_exact_mut(ROUND * cols).zip((rows.start..end).step_by(ROUND)) {
                    let (first, last) = (first.min(rows.end), rows.end.min(first + ROUND));
                    round_block(kernels, &dy[first * width..last * width], width, part.clone(), tail, block);
                }
                self.back_along(kernels, back, &panels, rows, [depth, tail], out, narrow, share);
            });
            self.add_shares(shares, n, back.scale, &mut back.db[part.start * rank..part.end * rank]);
        });
    }
}

/// Rounds columns `part` of up to 16 rows of `dy` to bf16, with zeros behind them up to a multiple of 32, and `tail` more,
/// and for absent rows.
fn round_block(kernels: &HalfKernels, dy: &[f32], width: usize, part: Range<usize>, tail: usize, block: &mut [u16]) {
    let cols = part.len().next_multiple_of(32);
    let (block, behind) = block.split_at_mut(ROUND * cols);
    behind[..ROUND * tail].fill(0);
    if part.len() == width && cols == width && dy.len() == ROUND * width {
        return (kernels.round)(dy, cols, block);
    }
    SCRATCH.with_borrow_mut(|Scratch { floats, .. }| {
        floats.reserve(ROUND * cols);
        let mut rows = floats.chunks_exact_mut(cols);
        for (dy, to) in dy.chunks_exact(width).zip(&mut rows) {
            to[..part.len()].copy_from_slice(&dy[part.clone()]);
            to[part.len()..].fill(0.0);
        }
        rows.take(ROUND - dy.len() / width).for_each(|row| row.fill(0.0));
        (kernels.round)(&floats[..ROUND * cols], cols, block);
    });
}

impl Matrix<'_> {
    /// The weights `columns` of row `row` as f32. Columns begin and end with blocks.
    ///
    /// # Panics
    /// When they do not, or when `out` is not as long.
    pub fn decode(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let (len, bytes) = (self.format.block_len(), self.format.block_bytes());
        assert!(columns.start.is_multiple_of(len) && columns.end.is_multiple_of(len), "columns cut a block");
        let data = &self.data[row * self.row_bytes()..][..self.row_bytes()];
        self.format.decode(&data[columns.start / len * bytes..columns.end / len * bytes], out);
    }
}
