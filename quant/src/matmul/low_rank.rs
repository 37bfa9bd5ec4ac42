//! Low-rank adapters (Hu et al. 2021) on frozen weights, where these meet activations as bf16: the adapter goes along in
//! the same product.
//!
//! `y = x W^T + scale (x A^T) B^T` is `[x, low] [W, scale B]^T` once `low = x A^T` is there, and `dx = dy W + dlow A`
//! is `[dy, dlow] [W; A]`: a few more terms, instead of products of their own that go through all of `y` and `dx` again.
//! Activations and gradients are rounded to bf16 once for both. What is the adapter's is in two parts of bf16, nearly as
//! exact as f32: of `(u + v) (u' + v')` the three larger products are terms side by side.

use super::{BLOCK, Matrix, Meet, ROUNDED, disjoint};
use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::kernels::{HalfKernels, HalfRows, PANEL, ROW_BLOCK};
use crate::ops::Waiting;
use crate::threads::Disjoint;
use std::cell::RefCell;
use std::ops::Range;

/// The first half of an adapter, which matrices with the same input may share.
pub struct Down<'a> {
    /// `A`, `[rank, cols]`.
    pub a: &'a [f32],
    /// Its rows.
    pub rank: usize,
    /// Where `x A^T` goes, `[n, rank]`.
    pub low: &'a mut [f32],
}

/// The second half.
#[derive(Clone, Copy)]
pub struct Up<'a> {
    /// `B`, `[rows, rank]`.
    pub b: &'a [f32],
    /// Its columns.
    pub rank: usize,
    /// What the product is multiplied by.
    pub scale: f32,
    /// Which of the call's [`Down`]s it belongs to.
    pub down: usize,
}

/// Rows of a block of [`HalfRows`].
const ROWS: usize = 16;
/// Rows that a task takes, all of whose products for the adapter it makes while they are near. Fixed, as it decides the
/// order of sums.
pub(super) const CHUNK: usize = 128;
/// Numbers of a gradient that a task adds up.
const SOME: usize = 4096;

/// The sides of a product, for all tasks.
#[derive(Default)]
struct Scratch {
    floats: Aligned<f32>,
    half: Aligned<u16>,
}

/// A task's own.
#[derive(Default)]
struct Tile {
    floats: Aligned<f32>,
    half: Aligned<u16>,
    narrow: Aligned<u16>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static TILE: RefCell<Tile> = RefCell::default();
    pub(super) static SHARES: RefCell<Aligned<f32>> = RefCell::default();
}

/// The nearest number of bf16 and what that leaves.
fn parts(x: f32) -> [f32; 2] {
    let bits = x.to_bits();
    // What is not a number stays none by what it leaves.
    let upper = f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000);
    [upper, x - upper]
}

/// Terms that stand for `rank` products of numbers in two parts: three of them each.
fn width(rank: usize) -> usize {
    (3 * rank).next_multiple_of(32)
}

/// The left sides of those terms (upper, rest, upper), or the right ones (upper, upper, rest).
fn write_terms(numbers: &[f32], scale: f32, right: bool, out: &mut [f32]) {
    let rank = numbers.len();
    for (i, x) in numbers.iter().enumerate() {
        let [upper, rest] = parts(scale * x);
        out[i] = upper;
        (out[rank + i], out[2 * rank + i]) = if right { (upper, rest) } else { (rest, upper) };
    }
    out[3 * rank..].fill(0.0);
}

/// What rows of a product forward have behind their own terms.
#[derive(Clone, Copy, Default)]
pub(super) struct Tail<'a> {
    /// How many terms.
    pub(super) width: usize,
    /// The matrix's.
    up: Option<Up<'a>>,
}

impl Tail<'_> {
    /// The right sides for a panel: `used` rows of the matrix from `first` on.
    pub(super) fn pack(&self, kernels: &HalfKernels, first: usize, used: usize, out: &mut [u16]) {
        let Some(Up { b, rank, scale, .. }) = self.up else { return out.fill(0) };
        TILE.with_borrow_mut(|Tile { floats, .. }| {
            floats.reserve(PANEL * self.width);
            for (r, to) in floats.chunks_exact_mut(self.width).take(used).enumerate() {
                write_terms(&b[(first + r) * rank..][..rank], scale, true, to);
            }
            (kernels.across)(floats, self.width, used, self.width, out);
        });
    }
}

/// An adapter on the way back through its matrix.
pub struct Back<'a> {
    /// `A`, `[rank, cols]`.
    pub a: &'a [f32],
    /// `B`, `[rows, rank]`.
    pub b: &'a [f32],
    /// Rows of the one, columns of the other.
    pub rank: usize,
    /// What the product is multiplied by.
    pub scale: f32,
    /// `x A^T`, `[n, rank]`.
    pub low: &'a [f32],
    /// Where the loss's gradient at `low` is added.
    pub dlow: &'a mut [f32],
    /// Where the gradient of `B` is added.
    pub db: &'a mut [f32],
}

impl Back<'_> {
    /// Terms that it takes.
    pub(super) fn width(&self) -> usize {
        width(self.rank)
    }

    /// The right sides of the products with `dlow`, `[3 * rank, cols]`.
    pub(super) fn terms(&self) -> Vec<f32> {
        let len = self.a.len();
        let mut terms = vec![0f32; 3 * len];
        for (i, x) in self.a.iter().enumerate() {
            let [upper, rest] = parts(*x);
            (terms[i], terms[len + i], terms[2 * len + i]) = (upper, upper, rest);
        }
        terms
    }
}

impl Cpu {
    /// Whether an adapter on this matrix can go along ([`Cpu::matmul_adapted`], [`Cpu::matmul_backward_adapted`]).
    pub fn takes_adapters_along(&self, w: &Matrix<'_>) -> bool {
        let forward = matches!(self.meet(w), Meet::Half(half) if half.parts == 1);
        forward && self.rounds_gradients(w.format) && w.cols.is_multiple_of(32)
    }

    /// [`Cpu::matmul`] of a prompt with matrices that have low-rank adapters: `low = x a^T` for each of `downs`, and
    /// `out[i] = x weights[i]^T + scale_i low b_i^T`.
    ///
    /// # Panics
    /// When the sizes do not fit each other, or a matrix does not [take adapters along](Cpu::takes_adapters_along).
    pub fn matmul_adapted(
        &self,
        x: &[f32],
        n: usize,
        weights: &[Matrix<'_>],
        ups: &[Option<Up<'_>>],
        downs: &mut [Down<'_>],
        out: &mut [&mut [f32]],
    ) {
        let Some(cols) = weights.first().map(|w| w.cols) else { return };
        assert_eq!(x.len(), n * cols, "activations are not [n, cols]");
        assert!(weights.len() == out.len() && weights.len() == ups.len(), "an output and an adapter for each matrix");
        check(n, cols, weights, ups, downs);
        if n == 0 {
            return;
        }
        assert!(weights.iter().all(|w| self.takes_adapters_along(w)), "a matrix that takes no adapter along");
        let half = self.kernels.half.expect("takes adapters along");
        ROUNDED.with_borrow_mut(|rounded| {
            self.team.look_ahead(&[]);
            let tail = downs.iter().map(|down| width(down.rank)).max().unwrap_or(0);
            rounded.round_half(self, &half, x, n, cols, tail);
            self.lows(&half, &rounded.half, n, [cols, tail], downs);
            let mut written = None;
            for ((w, up), out) in weights.iter().zip(ups).zip(out) {
                assert_eq!(out.len(), n * w.rows, "output is not [n, rows]");
                if let Some(up) = up.filter(|up| written != Some(up.down)) {
                    self.write_tail(&half, downs[up.down].low, up.rank, n, [cols, tail], &mut rounded.half);
                    written = Some(up.down);
                }
                let tail = Tail { width: tail, up: *up };
                self.many_rows(x, rounded, n, &[*w], Meet::Half(half), tail, &disjoint(&mut [&mut out[..]]));
            }
        });
    }

    /// `low = x a^T` for each of `downs`: `x` has `cols` terms and a tail.
    fn lows(&self, half: &HalfKernels, x: &[u16], n: usize, [cols, tail]: [usize; 2], downs: &mut [Down<'_>]) {
        let x = HalfRows { all: x, cols: cols + tail, padded: n.next_multiple_of(ROW_BLOCK) };
        let stacked: usize = downs.iter().map(|down| 2 * down.rank).sum();
        let (count, len) = (stacked.div_ceil(PANEL), x.cols * PANEL);
        SCRATCH.with_borrow_mut(|Scratch { floats, half: panels, .. }| {
            floats.reserve(stacked * cols);
            let mut rest = &mut floats[..stacked * cols];
            for down in downs.iter() {
                let (upper, behind) = rest.split_at_mut(down.a.len());
                let (lower, behind) = behind.split_at_mut(down.a.len());
                rest = behind;
                for ((upper, lower), a) in upper.iter_mut().zip(lower).zip(down.a) {
                    [*upper, *lower] = parts(*a);
                }
            }
            panels.reserve(count * len);
            for (p, panel) in panels.chunks_exact_mut(len).take(count).enumerate() {
                let (own, behind) = panel.split_at_mut(cols * PANEL);
                (half.across)(&floats[p * PANEL * cols..], cols, PANEL.min(stacked - p * PANEL), cols, own);
                behind.fill(0);
            }
            let panels = &panels[..count * len];
            let lows: Vec<_> = downs.iter_mut().map(|down| (Disjoint::new(down.low), down.rank)).collect();
            self.split(n, BLOCK, &|rows| {
                TILE.with_borrow_mut(|Tile { floats: tile, .. }| {
                    multiply(half, panels, len, x, rows.clone(), tile);
                    for (r, sums) in rows.clone().zip(tile.chunks_exact(count * PANEL)) {
                        let mut at = 0;
                        for (low, rank) in &lows {
                            // SAFETY: rows belong to one task.
                            let low = unsafe { low.slice(r * rank..(r + 1) * rank) };
                            sum_parts(&sums[at..at + 2 * rank], |i, sum| low[i] = sum);
                            at += 2 * rank;
                        }
                    }
                });
            });
        });
    }

    /// The left sides of the products with `low`, `[n, rank]`, behind `cols` terms of the rounded rows `out`.
    fn write_tail(
        &self,
        half: &HalfKernels,
        low: &[f32],
        rank: usize,
        n: usize,
        [cols, tail]: [usize; 2],
        out: &mut [u16],
    ) {
        let out = Disjoint::new(out);
        self.split(n, CHUNK, &|rows| {
            let all = cols + tail;
            // SAFETY: blocks of rows belong to one task.
            let out = unsafe { out.slice(rows.start * all..rows.end.next_multiple_of(ROWS) * all) };
            TILE.with_borrow_mut(|tile| {
                tail_of(half, &low[rows.start * rank..rows.end * rank], rank, [cols, tail], out, &mut tile.floats);
            });
        });
    }

    /// [`Cpu::matmul_backward`] through a matrix with an adapter: `dlow += scale dy b`, `db += scale dy^T low`, and
    /// `dx += dy w + scale dy b a`, where it is wanted.
    ///
    /// # Panics
    /// When the sizes do not fit each other, or the matrix does not [take adapters along](Cpu::takes_adapters_along).
    pub fn matmul_backward_adapted(
        &self,
        dy: &[f32],
        n: usize,
        w: &Matrix<'_>,
        adapter: Back<'_>,
        dx: Option<&mut [f32]>,
    ) {
        assert_eq!(dy.len(), n * w.rows, "gradient of an output is not [n, rows]");
        assert!(dx.as_ref().is_none_or(|dx| dx.len() == n * w.cols), "gradient of the input is not [n, cols]");
        let Back { a, b, rank, low, dlow, db, .. } = &adapter;
        assert!(
            a.len() == rank * w.cols && b.len() == w.rows * rank && db.len() == b.len(),
            "an adapter of another size"
        );
        assert!(low.len() == n * rank && dlow.len() == low.len(), "what comes of an adapter's A is not [n, rank]");
        self.backward_half(dy, n, w, dx.map(Disjoint::new).as_ref(), Some(adapter));
    }

    /// Panels of rows `rows` of `B`, times `scale`, for products over as many terms as the rows of `dy` have, `len / 16`.
    pub(super) fn narrow_panels(half: &HalfKernels, back: &Back<'_>, rows: Range<usize>, len: usize) -> Aligned<u16> {
        let Back { b, rank, scale, .. } = *back;
        let count = (2 * rank).div_ceil(PANEL);
        let mut sides = vec![0f32; rows.len() * 2 * rank];
        let b = b[rows.start * rank..rows.end * rank].chunks_exact(rank);
        for (b, to) in b.zip(sides.chunks_exact_mut(2 * rank)) {
            let (upper, lower) = to.split_at_mut(rank);
            for ((upper, lower), b) in upper.iter_mut().zip(lower).zip(b) {
                [*upper, *lower] = parts(scale * b);
            }
        }
        let mut panels = Aligned::zeroed(count * len);
        (half.pairs)(&sides, 2 * rank, rows.len(), 2 * rank, len, &mut panels);
        panels
    }

    /// What a task does for the adapter with the rows of the gradient that it has rounded, `dy` with a tail of `tail` terms:
    /// adds to their part of `dlow`, writes the tail, and gives their share of the gradient of `scale B`.
    pub(super) fn back_along(
        &self,
        half: &HalfKernels,
        back: &Back<'_>,
        panels: &[u16],
        rows: Range<usize>,
        [depth, tail]: [usize; 2],
        dy: &mut [u16],
        narrow: &mut [f32],
        share: &mut [f32],
    ) {
        let (rank, cols, len) = (back.rank, depth + tail, (depth + tail) * PANEL);
        let padded = rows.len().next_multiple_of(ROW_BLOCK);
        TILE.with_borrow_mut(|Tile { floats, half: sides, narrow: left }| {
            multiply(half, panels, len, HalfRows { all: dy, cols, padded }, 0..rows.len(), floats);
            let stride = panels.len() / len * PANEL;
            for (narrow, sums) in narrow.chunks_exact_mut(rank).zip(floats.chunks_exact(stride)) {
                sum_parts(&sums[..2 * rank], |i, sum| narrow[i] += sum);
            }
            if tail > 0 {
                tail_of(half, narrow, rank, [depth, tail], dy, floats);
            }
            let left = narrow_side(half, &back.low[rows.start * rank..rows.end * rank], rank, left, floats);
            sides.reserve(2 * padded * PANEL);
            let x = HalfRows { all: dy, cols, padded };
            for (step, share) in share.chunks_mut(32 * rank).enumerate() {
                (half.turn)(x, step, sides);
                multiply(half, &sides[..2 * padded * PANEL], padded * PANEL, left, 0..2 * rank, floats);
                for (j, share) in share.chunks_exact_mut(rank).enumerate() {
                    for (i, share) in share.iter_mut().enumerate() {
                        *share = floats[i * 32 + j] + floats[(rank + i) * 32 + j];
                    }
                }
            }
        });
    }

    /// `da[k, c] += sum_r dlow[r, k] * x[r, c]` for an adapter that goes along: `dlow` is `[n, rank]`, `x` `[n, cols]` and
    /// rounded to bf16, `da` `[rank, cols]`.
    ///
    /// # Panics
    /// When the sizes do not fit each other, or the processor has no products of bf16.
    pub fn adapter_gradient(&self, dlow: &[f32], x: Waiting<'_>, n: usize, rank: usize, cols: usize, da: &mut [f32]) {
        assert!(dlow.len() == n * rank && da.len() == rank * cols && x.holds(n * cols), "an adapter of another size");
        assert!(cols.is_multiple_of(32), "an adapter that does not go along");
        let half = self.kernels.half.expect("products of bf16");
        SHARES.with_borrow_mut(|shares| {
            shares.reserve(n.div_ceil(CHUNK) * rank * cols);
            let all = Disjoint::new(shares);
            self.split(n, CHUNK, &|rows| {
                let at = rows.start / CHUNK * rank * cols;
                // SAFETY: a share belongs to one task.
                let share = unsafe { all.slice(at..at + rank * cols) };
                let deep = rows.len().next_multiple_of(32);
                TILE.with_borrow_mut(|Tile { floats, half: sides, narrow: left }| {
                    let left = narrow_side(&half, &dlow[rows.start * rank..rows.end * rank], rank, left, floats);
                    sides.reserve(deep * cols);
                    floats.reserve(32 * cols);
                    for first in rows.clone().step_by(32) {
                        let used = 32.min(rows.end - first);
                        let x = x.read(&self.kernels.lanes, first * cols, &mut floats[..used * cols]);
                        let at = (first - rows.start) * PANEL;
                        (half.pairs)(x, cols, used, cols, deep * PANEL, &mut sides[at..]);
                    }
                    for (p, panels) in sides[..deep * cols].chunks_exact(2 * deep * PANEL).enumerate() {
                        multiply(&half, panels, deep * PANEL, left, 0..2 * rank, floats);
                        for (i, share) in share.chunks_exact_mut(cols).enumerate() {
                            let (upper, lower) = (&floats[i * 32..][..32], &floats[(rank + i) * 32..][..32]);
                            let sums = upper.iter().zip(lower).map(|(upper, lower)| upper + lower);
                            share[p * 32..][..32].iter_mut().zip(sums).for_each(|(share, sum)| *share = sum);
                        }
                    }
                });
            });
            self.add_shares(shares, n, 1.0, da);
        });
    }

    /// `out += scale * sum of shares`, each as long as `out`: in order, whichever tasks made them.
    pub(super) fn add_shares(&self, shares: &[f32], n: usize, scale: f32, out: &mut [f32]) {
        let len = out.len();
        self.elements(out, SOME, &|start, out| {
            for share in shares.chunks_exact(len).take(n.div_ceil(CHUNK)) {
                (self.kernels.lanes.axpy)(scale, &share[start..start + out.len()], out);
            }
        });
    }
}

/// The left sides of the products with rows of `low`, behind the `cols` terms of as many rounded rows.
fn tail_of(
    half: &HalfKernels,
    low: &[f32],
    rank: usize,
    [cols, tail]: [usize; 2],
    out: &mut [u16],
    floats: &mut Aligned<f32>,
) {
    floats.reserve(ROWS * tail);
    let blocks = out.chunks_exact_mut(ROWS * (cols + tail));
    for (low, block) in low.chunks(ROWS * rank).zip(blocks) {
        for (low, to) in low.chunks_exact(rank).zip(floats.chunks_exact_mut(tail)) {
            write_terms(low, 1.0, false, to);
        }
        (half.round)(&floats[..low.len() / rank * tail], tail, &mut block[ROWS * cols..]);
    }
}

/// `[terms, rank]` as a left side, `[2 * rank, terms]`: the first parts of all, then the second.
fn narrow_side<'a>(
    half: &HalfKernels,
    low: &[f32],
    rank: usize,
    out: &'a mut Aligned<u16>,
    floats: &mut Aligned<f32>,
) -> HalfRows<'a> {
    let used = low.len() / rank;
    let (cols, padded) = (used.next_multiple_of(32), (2 * rank).next_multiple_of(ROW_BLOCK));
    out.reserve(padded * cols);
    floats.reserve(padded * cols);
    let (upper, lower) = floats[..2 * rank * cols].split_at_mut(rank * cols);
    for (i, (upper, lower)) in upper.chunks_exact_mut(cols).zip(lower.chunks_exact_mut(cols)).enumerate() {
        for (k, from) in low.chunks_exact(rank).enumerate() {
            [upper[k], lower[k]] = parts(from[i]);
        }
        upper[used..].fill(0.0);
        lower[used..].fill(0.0);
    }
    let blocks = out.chunks_exact_mut(ROWS * cols);
    for (floats, to) in floats[..2 * rank * cols].chunks(ROWS * cols).zip(blocks) {
        (half.round)(floats, cols, to);
    }
    HalfRows { all: out, cols, padded }
}

/// All panels, `len` numbers each, times some rows: `tile[row][panel][16]`.
fn multiply(
    half: &HalfKernels,
    panels: &[u16],
    len: usize,
    x: HalfRows<'_>,
    rows: Range<usize>,
    tile: &mut Aligned<f32>,
) {
    let stride = panels.len() / len * PANEL;
    tile.reserve(rows.len() * stride);
    for (p, pair) in panels.chunks(2 * len).enumerate() {
        let out = &mut tile[p * 2 * PANEL..];
        match pair.split_at_checked(len) {
            Some((a, b)) if !b.is_empty() => (half.mul)(&[a, b], x, rows.clone(), out, stride),
            _ => (half.mul)(&[pair], x, rows.clone(), out, stride),
        }
    }
}

/// The sums of both parts of `2 * rank` products.
fn sum_parts(sums: &[f32], mut each: impl FnMut(usize, f32)) {
    let (upper, lower) = sums.split_at(sums.len() / 2);
    upper.iter().zip(lower).enumerate().for_each(|(i, (upper, lower))| each(i, upper + lower));
}

fn check(n: usize, cols: usize, weights: &[Matrix<'_>], ups: &[Option<Up<'_>>], downs: &[Down<'_>]) {
    for down in downs {
        assert_eq!(down.a.len(), down.rank * cols, "an adapter's A is not [rank, cols]");
        assert_eq!(down.low.len(), down.rank * n, "what comes of an adapter's A is not [n, rank]");
    }
    for (w, up) in weights.iter().zip(ups) {
        assert_eq!(w.cols, cols, "matrices in one call share their input");
        if let Some(up) = up {
            assert!(up.rank > 0 && up.rank == downs[up.down].rank, "an adapter's halves differ in rank");
            assert_eq!(up.b.len(), w.rows * up.rank, "an adapter's B is not [rows, rank]");
        }
    }
}
