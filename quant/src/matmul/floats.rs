//! Products with trained matrices, all in f32: forward, backward to the input, backward to the weights. The matrices may
//! be skinny (a low-rank adapter's are `[4..64, cols]` and `[rows, 4..64]`) or as large as a layer's.

use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::kernels::{GemmShape, PANEL};
use crate::threads::Disjoint;
use std::cell::RefCell;
use std::ops::Range;

/// Terms that are summed before they are added to the output. Fixed, as it decides the order of sums.
const DEPTH: usize = 512;
/// Rows and columns of the output that one task computes.
const HIGH: usize = 96;
const WIDE: usize = 64;

#[derive(Default)]
struct Scratch {
    left: Aligned<f32>,
    panels: Aligned<f32>,
    tile: Aligned<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
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
        let (x, w) = (Side { data: x, stride: cols, across: false }, Side { data: w, stride: cols, across: false });
        self.product([n, rows, cols], x, w, scale, out);
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
        let (dy, w) = (Side { data: dy, stride: rows, across: false }, Side { data: w, stride: cols, across: true });
        self.product([n, cols, rows], dy, w, scale, dx);
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
        let (dy, x) = (Side { data: dy, stride: rows, across: true }, Side { data: x, stride: cols, across: true });
        self.product([rows, cols, n], dy, x, scale, dw);
    }

    /// `out[i, j] += scale * sum_k a[i, k] * b[j, k]` with `[i, j, k] < sizes`.
    fn product(&self, sizes: [usize; 3], a: Side<'_>, b: Side<'_>, scale: f32, out: &mut [f32]) {
        let [high, wide, deep] = sizes;
        let out = Disjoint::new(out);
        let across = wide.div_ceil(WIDE);
        self.team.run(high.div_ceil(HIGH) * across, &|t| {
            let rows = t / across * HIGH..high.min((t / across + 1) * HIGH);
            let columns = t % across * WIDE..wide.min((t % across + 1) * WIDE);
            SCRATCH.with_borrow_mut(|scratch| {
                let Scratch { left, panels, tile } = scratch;
                left.reserve(HIGH * DEPTH);
                panels.reserve(WIDE * DEPTH);
                tile.reserve(HIGH * WIDE);
                for first in (0..deep).step_by(DEPTH) {
                    let terms = first..deep.min(first + DEPTH);
                    let (m, k, n) = (rows.len(), terms.len(), columns.len().next_multiple_of(PANEL));
                    b.panels(columns.clone(), terms.clone(), panels);
                    let (a, lda) = match a.across {
                        true => {
                            a.rows(rows.clone(), terms.clone(), left);
                            (&left[..], k)
                        }
                        false => (&a.data[rows.start * a.stride + first..], a.stride),
                    };
                    let shape = GemmShape { m, n, k, lda, ldb: k * PANEL, ldc: WIDE, add: false };
                    (self.kernels.gemm)(shape, a, panels, tile);
                    for (r, sums) in rows.clone().zip(tile.chunks_exact(WIDE)) {
                        // SAFETY: a tile of the output belongs to one task.
                        let out = unsafe { out.slice(r * wide + columns.start..r * wide + columns.end) };
                        (self.kernels.lanes.axpy)(scale, &sums[..columns.len()], out);
                    }
                }
            });
        });
    }
}

fn check(x: &[f32], n: usize, w: &[f32], y: &[f32], rows: usize, cols: usize) {
    assert_eq!(x.len(), n * cols, "inputs are not [n, cols]");
    assert_eq!(w.len(), rows * cols, "weights are not [rows, cols]");
    assert_eq!(y.len(), n * rows, "outputs are not [n, rows]");
}

impl Side<'_> {
    /// `out[i][k]` for the given `i` and terms `k`.
    fn rows(&self, range: Range<usize>, terms: Range<usize>, out: &mut [f32]) {
        for (k, term) in terms.clone().enumerate() {
            for (i, x) in self.data[term * self.stride..][range.clone()].iter().enumerate() {
                out[i * terms.len() + k] = *x;
            }
        }
    }

    /// Panels `[k][16]` of the given `i` and terms `k`; absent ones become zeros.
    fn panels(&self, range: Range<usize>, terms: Range<usize>, out: &mut [f32]) {
        let len = terms.len();
        for (p, first) in range.clone().step_by(PANEL).enumerate() {
            let panel = &mut out[p * len * PANEL..(p + 1) * len * PANEL];
            let used = PANEL.min(range.end - first);
            if used < PANEL {
                panel.fill(0.0);
            }
            if self.across {
                for (term, to) in terms.clone().zip(panel.chunks_exact_mut(PANEL)) {
                    to[..used].copy_from_slice(&self.data[term * self.stride + first..][..used]);
                }
            } else {
                for i in 0..used {
                    let row = &self.data[(first + i) * self.stride..][terms.clone()];
                    for (to, x) in panel.chunks_exact_mut(PANEL).zip(row) {
                        to[i] = *x;
                    }
                }
            }
        }
    }
}
