//! Products with trained matrices, all in f32: forward, backward to the input, backward to the weights. The matrices may
//! be skinny (a low-rank adapter's are `[4..64, cols]` and `[rows, 4..64]`) or as large as a layer's.

use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::kernels::{GemmShape, PANEL, fetch};
use crate::threads::Disjoint;
use std::cell::RefCell;
use std::ops::Range;

/// Terms that are summed at a time. Fixed, as it decides the order of sums.
const DEPTH: usize = 512;
/// Rows of the output that one task computes.
const HIGH: usize = 48;
/// Rows that are fetched ahead where a piece of each is read.
const AHEAD: usize = 16;
/// Columns of a weight's gradient (or rows, where it has more of them) that one task computes.
const WIDE: usize = 32;

/// The sides of a product as the kernels read them, for all tasks.
#[derive(Default)]
struct Scratch {
    left: Aligned<f32>,
    panels: Aligned<f32>,
}

/// A task's own.
#[derive(Default)]
struct Tile {
    panels: Aligned<f32>,
    tile: Aligned<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static TILE: RefCell<Tile> = RefCell::default();
}

/// One side of a product: `data[i * stride + k]`, or `data[k * stride + i]` where `across`.
#[derive(Clone, Copy)]
struct Side<'a> {
    data: &'a [f32],
    stride: usize,
    across: bool,
}

impl Cpu {
    /// `out[r, o] += scale * sum_c x[r, c] * w[o, c]`: `x` is `[n, cols]`, `w` `[rows, cols]`, `out` `[n, rows]`.
    ///
    /// # Panics
    /// When the sizes do not fit each other.
    pub fn floats_matmul(&self, x: &[f32], n: usize, w: &[f32], rows: usize, cols: usize, scale: f32, out: &mut [f32]) {
        check(x, n, w, out, rows, cols);
        self.product([n, rows, cols], x, Side { data: w, stride: cols, across: false }, scale, out);
    }

    /// `dx[r, c] += scale * sum_o dy[r, o] * w[o, c]`: `dy` is `[n, rows]`, `w` `[rows, cols]`, `dx` `[n, cols]`.
    ///
    /// # Panics
    /// When the sizes do not fit each other.
    pub fn floats_backward(
        &self,
        dy: &[f32],
        n: usize,
        w: &[f32],
        rows: usize,
        cols: usize,
        scale: f32,
        dx: &mut [f32],
    ) {
        check(dx, n, w, dy, rows, cols);
        self.product([n, cols, rows], dy, Side { data: w, stride: cols, across: true }, scale, dx);
    }

    /// `dw[o, c] += scale * sum_r dy[r, o] * x[r, c]`: `dy` is `[n, rows]`, `x` `[n, cols]`, `dw` `[rows, cols]`.
    ///
    /// # Panics
    /// When the sizes do not fit each other.
    pub fn weight_gradient(
        &self,
        dy: &[f32],
        x: &[f32],
        n: usize,
        rows: usize,
        cols: usize,
        scale: f32,
        dw: &mut [f32],
    ) {
        check(x, n, dw, dy, rows, cols);
        // The longer side makes the panels: they have no use for fewer than 16 columns.
        let turned = rows > cols;
        let (dy, x) = (Side { data: dy, stride: rows, across: true }, Side { data: x, stride: cols, across: true });
        let (a, b, high, wide) = if turned { (x, dy, cols, rows) } else { (dy, x, rows, cols) };
        let out = Disjoint::new(dw);
        SCRATCH.with_borrow_mut(|Scratch { left, .. }| {
            for first in (0..n).step_by(DEPTH) {
                let terms = first..n.min(first + DEPTH);
                let k = terms.len();
                self.pack_left(a, high, terms.clone(), left);
                self.split(wide, WIDE, &|columns| {
                    TILE.with_borrow_mut(|Tile { panels, tile }| {
                        panels.reserve(WIDE * DEPTH);
                        tile.reserve(HIGH * WIDE);
                        for (p, start) in columns.clone().step_by(PANEL).enumerate() {
                            let part = start..columns.end.min(start + PANEL);
                            self.pack_panel(b, part, terms.clone(), 1.0, &mut panels[p * k * PANEL..]);
                        }
                        for start in (0..high).step_by(HIGH) {
                            let (m, n) = (HIGH.min(high - start), columns.len().next_multiple_of(PANEL));
                            let shape = GemmShape { m, n, k, lda: k, ldb: k * PANEL, ldc: WIDE, add: false };
                            (self.kernels.gemm)(shape, &left[start * k..], panels, tile);
                            if turned {
                                for (j, r) in columns.clone().enumerate() {
                                    // SAFETY: a part of the output belongs to one task.
                                    let out = unsafe { out.slice(r * cols + start..r * cols + start + m) };
                                    out.iter_mut().enumerate().for_each(|(i, out)| *out += scale * tile[i * WIDE + j]);
                                }
                            } else {
                                for (r, sums) in (start..start + m).zip(tile.chunks_exact(WIDE)) {
                                    // SAFETY: as above.
                                    let out = unsafe { out.slice(r * cols + columns.start..r * cols + columns.end) };
                                    (self.kernels.lanes.axpy)(scale, &sums[..out.len()], out);
                                }
                            }
                        }
                    });
                });
            }
        });
    }

    /// `out[i, j] += scale * sum_k a[i, k] * b[j, k]` with `[i, j, k] < sizes`.
    fn product(&self, sizes: [usize; 3], a: &[f32], b: Side<'_>, scale: f32, out: &mut [f32]) {
        let [high, wide, deep] = sizes;
        let out = Disjoint::new(out);
        SCRATCH.with_borrow_mut(|Scratch { panels, .. }| {
            for first in (0..deep).step_by(DEPTH) {
                let k = DEPTH.min(deep - first);
                self.pack_panels(b, wide, first..first + k, scale, panels);
                self.split(high, HIGH, &|rows| {
                    let a = &a[rows.start * deep + first..];
                    let shape =
                        GemmShape { m: rows.len(), n: wide, k, lda: deep, ldb: k * PANEL, ldc: wide, add: true };
                    // SAFETY: rows of the output belong to one task.
                    (self.kernels.gemm)(shape, a, panels, unsafe { out.slice(rows.start * wide..rows.end * wide) });
                });
            }
        });
    }

    /// `left[i][k]` for all `i < high` of a side that lies across, and the terms `k`.
    fn pack_left(&self, side: Side<'_>, high: usize, terms: Range<usize>, left: &mut Aligned<f32>) {
        let len = terms.len();
        left.reserve(high * len);
        let left = Disjoint::new(left);
        self.split(high, PANEL, &|range| {
            // SAFETY: rows belong to one task.
            let left = unsafe { left.slice(range.start * len..range.end * len) };
            let mut panel = [0f32; PANEL * PANEL];
            for (c, first) in terms.clone().step_by(PANEL).enumerate() {
                let used = PANEL.min(terms.end - first);
                let from = &side.data[first * side.stride + range.start..];
                (self.kernels.lanes.across)(from, side.stride, used, range.len(), &mut panel);
                for (row, part) in left.chunks_exact_mut(len).zip(panel.chunks_exact(PANEL)) {
                    row[c * PANEL..][..used].copy_from_slice(&part[..used]);
                }
            }
        });
    }

    /// Panels `[k][16]` of all `i < wide` and the terms `k`, times `scale`; absent ones become zeros.
    fn pack_panels(&self, side: Side<'_>, wide: usize, terms: Range<usize>, scale: f32, panels: &mut Aligned<f32>) {
        let len = terms.len();
        panels.reserve(wide.next_multiple_of(PANEL) * len);
        let panels = Disjoint::new(panels);
        self.split(wide, PANEL, &|range| {
            // SAFETY: a panel belongs to one task.
            let panel = unsafe { panels.slice(range.start * len..(range.start + PANEL) * len) };
            self.pack_panel(side, range, terms.clone(), scale, panel);
        });
    }

    /// One of them.
    fn pack_panel(&self, side: Side<'_>, range: Range<usize>, terms: Range<usize>, scale: f32, panel: &mut [f32]) {
        let (len, used) = (terms.len(), range.len());
        let panel = &mut panel[..len * PANEL];
        if side.across {
            for (term, to) in terms.zip(panel.as_chunks_mut::<PANEL>().0) {
                // Of each row only a piece is read, so the processor does not guess the next.
                let ahead = (term + AHEAD) * side.stride + range.start;
                fetch(side.data.get(ahead..ahead + used).unwrap_or(&[]));
                let from = &side.data[term * side.stride + range.start..];
                match from.first_chunk::<PANEL>().filter(|_| used == PANEL) {
                    Some(from) => *to = from.map(|x| scale * x),
                    None => {
                        *to = [0.0; PANEL];
                        (0..used).for_each(|i| to[i] = scale * from[i]);
                    }
                }
            }
        } else {
            let from = &side.data[range.start * side.stride + terms.start..];
            (self.kernels.lanes.across)(from, side.stride, used, len, panel);
            if scale != 1.0 {
                (self.kernels.lanes.scale)(scale, panel);
            }
        }
    }
}

pub(super) fn check(x: &[f32], n: usize, w: &[f32], y: &[f32], rows: usize, cols: usize) {
    assert_eq!(x.len(), n * cols, "inputs are not [n, cols]");
    assert_eq!(w.len(), rows * cols, "weights are not [rows, cols]");
    assert_eq!(y.len(), n * rows, "outputs are not [n, rows]");
}
