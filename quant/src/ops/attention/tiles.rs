//! Products of tiles: f32, or bf16 where the processor multiplies that faster and the caller allows it.

use crate::buffer::Aligned;
use crate::kernels::{GemmShape, HalfKernels, HalfRows, Kernels, PANEL, ROW_BLOCK};
use std::cell::RefCell;

thread_local! {
    static ROUNDED_ROWS: RefCell<Aligned<f32>> = RefCell::default();
}

/// How tiles are multiplied.
pub(super) struct Tiles<'a> {
    pub kernels: &'a Kernels,
    /// By these; else in f32.
    pub half: Option<HalfKernels>,
}

/// One side of products, for as many tiles as there are.
#[derive(Default)]
pub(super) struct Side {
    floats: Aligned<f32>,
    half: Aligned<u16>,
    /// Numbers of a tile.
    size: usize,
}

/// Rows of terms: f32 where they lie, so many apart, or rounded.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    Floats(&'a [f32], usize),
    Half(HalfRows<'a>),
}

impl Side {
    /// Makes room for `count` tiles of at most `rows` by `columns`.
    pub(super) fn reserve(&mut self, tiles: &Tiles<'_>, count: usize, rows: usize, columns: usize) {
        self.size = rows.next_multiple_of(ROW_BLOCK) * columns.next_multiple_of(ROW_BLOCK);
        match tiles.half {
            Some(half) => {
                self.size *= half.parts;
                self.half.reserve(count * self.size);
            }
            None => self.floats.reserve(count * self.size),
        }
    }
}

impl Tiles<'_> {
    /// `rows` rows of `terms` numbers, `stride` apart, as a left side: as they lie, or rounded into tile `at` of `side`.
    pub(super) fn left<'b>(
        &self,
        x: &'b [f32],
        stride: usize,
        rows: usize,
        terms: usize,
        side: &'b mut Side,
        at: usize,
    ) -> Left<'b> {
        let Some(half) = self.half else { return Left::Floats(x, stride) };
        const BLOCK: usize = 16;
        let (cols, padded) = (terms.next_multiple_of(32), rows.next_multiple_of(ROW_BLOCK));
        let block_len = BLOCK * cols * half.parts;
        let out = &mut side.half[at * side.size..][..padded * cols * half.parts];
        ROUNDED_ROWS.with_borrow_mut(|block| {
            block.reserve(BLOCK * cols);
            for first in (0..rows).step_by(BLOCK) {
                let used = BLOCK.min(rows - first);
                let to = &mut out[first / BLOCK * block_len..][..block_len];
                if stride == cols && terms == cols {
                    (half.round)(&x[first * cols..(first + used) * cols], cols, to);
                    continue;
                }
                for (row, to) in x[first * stride..].chunks(stride).take(used).zip(block.chunks_exact_mut(cols)) {
                    to[..terms].copy_from_slice(&row[..terms]);
                    to[terms..].fill(0.0);
                }
                (half.round)(&block[..used * cols], cols, to);
            }
        });
        Left::Half(HalfRows { all: out, cols, padded })
    }

    /// The left side that [`Tiles::left`] left in tile `at` of `side`, or again what lies in `x`.
    pub(super) fn kept<'b>(
        &self,
        x: &'b [f32],
        stride: usize,
        rows: usize,
        terms: usize,
        side: &'b Side,
        at: usize,
    ) -> Left<'b> {
        let (cols, padded) = (terms.next_multiple_of(32), rows.next_multiple_of(ROW_BLOCK));
        match self.half {
            None => Left::Floats(x, stride),
            Some(_) => Left::Half(HalfRows { all: &side.half[at * side.size..], cols, padded }),
        }
    }

    /// Rows that are the columns of a right side, into tile `at` of `side`.
    pub(super) fn across(&self, x: &[f32], stride: usize, rows: usize, terms: usize, side: &mut Side, at: usize) {
        let place = at * side.size;
        for (p, first) in (0..rows).step_by(PANEL).enumerate() {
            let used = PANEL.min(rows - first);
            match self.half {
                None => {
                    let out = &mut side.floats[place + p * terms * PANEL..];
                    (self.kernels.lanes.across)(&x[first * stride..], stride, used, terms, out);
                }
                Some(half) => {
                    let out = &mut side.half[place + p * terms.next_multiple_of(32) * PANEL * half.parts..];
                    (half.across)(&x[first * stride..], stride, used, terms, out);
                }
            }
        }
    }

    /// Rows that are the terms of a right side, one after another, into tile `at` of `side`.
    pub(super) fn along(&self, x: &[f32], rows: usize, columns: usize, side: &mut Side, at: usize) {
        let place = at * side.size;
        match self.half {
            None => panel_columns(x, rows, columns, &mut side.floats[place..]),
            Some(half) => {
                let ldb = rows.next_multiple_of(32) * PANEL * half.parts;
                (half.pairs)(x, columns, rows, columns, ldb, &mut side.half[place..]);
            }
        }
    }

    /// `c = left . right`, `m` by `n` over `k` terms, where `right` is a tile of a side; with `spare`, as large as `c`, it
    /// is added to what is there.
    pub(super) fn mul(
        &self,
        left: Left<'_>,
        (right, at): (&Side, usize),
        [m, n, k]: [usize; 3],
        c: &mut [f32],
        ldc: usize,
        spare: Option<&mut [f32]>,
    ) {
        let place = at * right.size;
        let (x, half) = match (left, self.half) {
            (Left::Half(x), Some(half)) => (x, half),
            (Left::Floats(a, lda), _) => {
                let shape = GemmShape { m, n, k, lda, ldb: k * PANEL, ldc, add: spare.is_some() };
                (self.kernels.gemm)(shape, a, &right.floats[place..], c);
                return;
            }
            (Left::Half(_), None) => unreachable!("rounded only with kernels for it"),
        };
        let ldb = x.cols * PANEL * half.parts;
        let b = &right.half[place..];
        let into = |out: &mut [f32]| {
            for p in (0..n.div_ceil(PANEL)).step_by(2) {
                let two = [&b[p * ldb..(p + 1) * ldb], &b[(p + 1).min(n.div_ceil(PANEL) - 1) * ldb..][..ldb]];
                (half.mul)(&two[..2.min(n.div_ceil(PANEL) - p)], x, 0..m, &mut out[p * PANEL..], ldc);
            }
        };
        match spare {
            None => into(c),
            Some(spare) => {
                into(spare);
                (self.kernels.lanes.add)(&spare[..m * ldc], &mut c[..m * ldc]);
            }
        }
    }
}

/// `[keys][dim]` to panels `[dim / 16][keys][16]`.
fn panel_columns(rows: &[f32], keys: usize, dim: usize, panels: &mut [f32]) {
    for p in 0..dim.div_ceil(PANEL) {
        let panel = &mut panels[p * keys * PANEL..(p + 1) * keys * PANEL];
        let used = PANEL.min(dim - p * PANEL);
        for (j, to) in panel.chunks_exact_mut(PANEL).enumerate() {
            to[..used].copy_from_slice(&rows[j * dim + p * PANEL..][..used]);
            to[used..].fill(0.0);
        }
    }
}
