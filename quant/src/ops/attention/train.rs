//! Attention for training: whole sequences over rows of f32, forward and backward in tiles (Dao 2023). The backward pass
//! computes the scores again from the sums that the forward pass left: nothing of size context x context exists.
//!
//! One task is one head of one sequence. Scores are held transposed, a row per key: so keys and values are left sides of
//! products as they lie in memory, a softmax runs down the columns, without a sum across a vector, and scores cut in
//! strips of 16 queries are a right side.

mod backward;

use super::tiles::{Side, Tiles};
use super::{Attention, add_slope, lanes_exp};
use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::kernels::{Kernels, PANEL, QUERIES};
use crate::threads::Disjoint;
pub use backward::AttentionGradients;
use std::cell::RefCell;
use std::ops::Range;

/// Keys of a tile. A tile has as many queries: [`QUERIES`].
const KEYS: usize = 64;

/// One sequence of a batch. Its last query stands at its last key: where there are more keys than queries, the first
/// ones are a prefix without queries.
#[derive(Clone, Debug)]
pub struct AttentionRows {
    /// Which rows of the queries (and of the output) are this sequence's.
    pub queries: Range<usize>,
    /// Which rows of the keys and values are; positions count from the first.
    pub keys: Range<usize>,
    /// Positions before this one see each other whatever their order.
    pub context: usize,
}

#[derive(Default)]
struct Scratch {
    /// Rows on the way into another layout.
    rows: Aligned<f32>,
    panel: Aligned<f32>,
    /// Queries as the columns of a right side: of one block (forward) or of all.
    queries: Side,
    /// Left sides: keys, and values with a row for each column.
    keys: Side,
    values: Side,
    turned_values: Aligned<f32>,
    scores: Aligned<f32>,
    /// Scores as a right side.
    strips: Side,
    /// The output, or the queries' gradient, with a row for each column.
    out: Aligned<f32>,
    spare: Aligned<f32>,
    backward: backward::Scratch,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A head of a sequence.
struct Head<'a> {
    spec: &'a Attention<'a>,
    rows: &'a AttentionRows,
    head: usize,
}

/// A block of queries: their rows, and the position of the first.
struct Block {
    rows: Range<usize>,
    position: usize,
}

impl Head<'_> {
    fn kv_head(&self) -> usize {
        self.head / (self.spec.heads / self.spec.kv_heads)
    }

    fn blocks(&self) -> usize {
        self.rows.queries.len().div_ceil(QUERIES)
    }

    fn block(&self, number: usize) -> Block {
        let first = number * QUERIES;
        let rows =
            self.rows.queries.start + first..self.rows.queries.end.min(self.rows.queries.start + first + QUERIES);
        Block { rows, position: self.rows.keys.len() - self.rows.queries.len() + first }
    }

    fn tiles(&self) -> usize {
        self.rows.keys.len().div_ceil(KEYS)
    }

    /// Positions of the keys of a tile.
    fn tile(&self, number: usize) -> Range<usize> {
        number * KEYS..self.rows.keys.len().min((number + 1) * KEYS)
    }

    /// The keys (or values) from position `first` on, as a left side whose rows are a whole row apart.
    fn left<'a>(&self, x: &'a [f32], dim: usize, first: usize) -> (&'a [f32], usize) {
        let width = self.spec.kv_heads * dim;
        (&x[(self.rows.keys.start + first) * width + self.kv_head() * dim..], width)
    }

    /// Which of the block's queries see the key at `key`, counted from the block's first.
    fn seen(&self, block: &Block, key: usize) -> Range<usize> {
        let (position, count) = (block.position, block.rows.len());
        let first = if key < self.rows.context { 0 } else { key.saturating_sub(position).min(count) };
        let end = self.spec.window.map_or(count, |w| (key + w).saturating_sub(position).min(count));
        first..end.max(first)
    }

    /// Whether any of the block's queries sees any key of the tile.
    fn meets(&self, block: &Block, tile: &Range<usize>) -> bool {
        let first = self.spec.window.map_or(0, |w| (block.position + 1).saturating_sub(w));
        let end = block.position + block.rows.len();
        let end = if block.position < self.rows.context { end.max(self.rows.context) } else { end };
        tile.start < end && tile.end > first
    }

    /// What comes between products and softmax: cap, distances, and minus infinity where a key is not seen. `capped`
    /// keeps the scores behind the cap.
    fn finish_scores(
        &self,
        kernels: &Kernels,
        block: &Block,
        tile: &Range<usize>,
        s: &mut [f32],
        capped: Option<&mut [f32]>,
    ) {
        if let Some(cap) = self.spec.softcap {
            (kernels.lanes.soft_cap)(cap, s);
            if let Some(capped) = capped {
                capped.copy_from_slice(s);
            }
        }
        for (key, row) in tile.clone().zip(s.chunks_exact_mut(QUERIES)) {
            if let Some(slopes) = self.spec.slopes {
                for (i, s) in row.iter_mut().enumerate() {
                    let one = std::slice::from_mut(s);
                    add_slope(one, slopes[self.head], self.spec.rounded_slopes, key, block.position + i);
                }
            }
            let seen = self.seen(block, key);
            row[..seen.start].fill(f32::NEG_INFINITY);
            if seen.end < block.rows.len() {
                row[seen.end..].fill(f32::NEG_INFINITY);
            }
        }
    }
}

impl Cpu {
    /// Attention of each sequence's queries over its keys, causal but for its `context`: `q` is
    /// `[rows, heads * head_dim]`, `k` `[key rows, kv_heads * head_dim]`, `v` `[key rows, kv_heads * value_dim]`, `out`
    /// `[rows, heads * value_dim]`. `lse` (`[rows, heads]`) becomes the logarithms of the softmaxes' sums, which
    /// [`Cpu::attention_backward`] needs.
    ///
    /// # Panics
    /// When the sizes do not fit each other.
    pub fn attention_train(
        &self,
        spec: &Attention<'_>,
        sequences: &[AttentionRows],
        q: &[f32],
        k: &[f32],
        v: &[f32],
        out: &mut [f32],
        lse: &mut [f32],
    ) {
        check(spec, sequences, q, k, v);
        assert_eq!(out.len() * spec.head_dim, q.len() * spec.value_dim, "output is not [rows, heads * value_dim]");
        assert_eq!(lse.len() * spec.head_dim, q.len(), "sums are not [rows, heads]");
        let (out, lse) = (Disjoint::new(out), Disjoint::new(lse));
        self.team.run(sequences.len() * spec.heads, &|t| {
            let head = Head { spec, rows: &sequences[t / spec.heads], head: t % spec.heads };
            SCRATCH.with_borrow_mut(|scratch| self.train_head(&head, [q, k, v], scratch, &out, &lse));
        });
    }

    fn train_head(
        &self,
        head: &Head<'_>,
        [q, k, v]: [&[f32]; 3],
        scratch: &mut Scratch,
        out: &Disjoint<'_, f32>,
        lse: &Disjoint<'_, f32>,
    ) {
        let (spec, lanes, tiles) = (head.spec, &self.kernels.lanes, self.tiles());
        let (dim, value_dim) = (spec.head_dim, spec.value_dim);
        let high = value_dim.next_multiple_of(PANEL);
        let Scratch { rows, panel, queries, keys, values, turned_values, scores, strips, out: sums, spare, .. } =
            scratch;
        rows.reserve(QUERIES * dim);
        queries.reserve(&tiles, 1, QUERIES, dim);
        keys.reserve(&tiles, head.tiles(), KEYS, dim);
        values.reserve(&tiles, head.tiles(), value_dim, KEYS);
        turned_values.reserve(head.tiles() * value_dim * KEYS);
        scores.reserve(KEYS * QUERIES);
        strips.reserve(&tiles, 1, KEYS, QUERIES);
        sums.reserve(high * QUERIES);
        spare.reserve(high * QUERIES);
        for number in 0..head.tiles() {
            let tile = head.tile(number);
            let (left, stride) = head.left(v, value_dim, tile.start);
            let to = &mut turned_values[number * value_dim * KEYS..(number + 1) * value_dim * KEYS];
            self.turn(left, stride, tile.len(), value_dim, panel, to);
            tiles.left(to, KEYS, value_dim, tile.len(), values, number);
            let (left, stride) = head.left(k, dim, tile.start);
            tiles.left(left, stride, tile.len(), dim, keys, number);
        }
        for block in (0..head.blocks()).map(|b| head.block(b)) {
            let count = block.rows.len();
            let n = count.next_multiple_of(PANEL);
            gather(q, spec.heads, head.head, dim, &block.rows, rows);
            (lanes.scale)(spec.scale, &mut rows[..count * dim]);
            tiles.across(rows, dim, count, dim, queries, 0);
            sums[..high * QUERIES].fill(0.0);
            let (mut most, mut total) = ([f32::NEG_INFINITY; QUERIES], [0f32; QUERIES]);
            for (number, tile) in (0..head.tiles()).map(|t| (t, head.tile(t))) {
                if !head.meets(&block, &tile) {
                    continue;
                }
                let (left, stride) = head.left(k, dim, tile.start);
                let left = tiles.kept(left, stride, tile.len(), dim, keys, number);
                tiles.mul(left, (queries, 0), [tile.len(), n, dim], scores, QUERIES, None);
                let scores = &mut scores[..tile.len() * QUERIES];
                head.finish_scores(&self.kernels, &block, &tile, scores, None);
                let mut shrink = [0f32; QUERIES];
                (lanes.softmax)(scores, &mut most, &mut total, &mut shrink);
                if shrink[..count].iter().any(|s| *s != 1.0) {
                    (lanes.scale_columns)(&shrink, &mut sums[..value_dim * QUERIES]);
                }
                tiles.along(scores, tile.len(), QUERIES, strips, 0);
                let turned = &turned_values[number * value_dim * KEYS..];
                let left = tiles.kept(turned, KEYS, value_dim, tile.len(), values, number);
                tiles.mul(left, (strips, 0), [value_dim, n, tile.len()], sums, QUERIES, Some(spare));
            }
            // The sum of exponentials, the sink's among them, and what it was measured from.
            let mut by = [0f32; QUERIES];
            for (i, r) in block.rows.clone().enumerate() {
                let sink = spec.sinks.map(|sinks| sinks[head.head]);
                let top = sink.map_or(most[i], |s| most[i].max(s));
                let shrink = lanes_exp(most[i] - top);
                let sum = total[i] * shrink + sink.map_or(0.0, |s| lanes_exp(s - top));
                by[i] = shrink / sum;
                let at = r * spec.heads + head.head;
                // SAFETY: a row of a head belongs to one task.
                let lse = unsafe { lse.slice(at..at + 1) };
                lse[0] = top + sum.ln();
            }
            (lanes.scale_columns)(&by, &mut sums[..value_dim * QUERIES]);
            self.turn_back(head, &block, value_dim, sums, panel, out);
        }
    }

    fn tiles(&self) -> Tiles<'_> {
        Tiles { kernels: &self.kernels, half: self.kernels.half.filter(|_| self.half_attention) }
    }

    /// `rows` rows of `dim` columns, `width` apart, with a row of [`KEYS`] for each column; absent ones become zeros.
    fn turn(&self, x: &[f32], width: usize, rows: usize, dim: usize, panel: &mut Aligned<f32>, out: &mut [f32]) {
        panel.reserve(dim * PANEL);
        for p in 0..KEYS / PANEL {
            let used = PANEL.min(rows.saturating_sub(p * PANEL));
            if used > 0 {
                (self.kernels.lanes.across)(&x[p * PANEL * width..], width, used, dim, panel);
            } else {
                panel[..dim * PANEL].fill(0.0);
            }
            for (row, part) in out.chunks_exact_mut(KEYS).zip(panel.as_chunks::<PANEL>().0) {
                row[p * PANEL..][..PANEL].copy_from_slice(part);
            }
        }
    }

    /// The columns of `turned` (`[dim][QUERIES]`) as rows of the head: the block's.
    fn turn_back(
        &self,
        head: &Head<'_>,
        block: &Block,
        dim: usize,
        turned: &[f32],
        panel: &mut Aligned<f32>,
        out: &Disjoint<'_, f32>,
    ) {
        panel.reserve(QUERIES * PANEL);
        for first in (0..dim).step_by(PANEL) {
            let used = PANEL.min(dim - first);
            (self.kernels.lanes.across)(&turned[first * QUERIES..], QUERIES, used, QUERIES, panel);
            for (r, part) in block.rows.clone().zip(panel.as_chunks::<PANEL>().0) {
                let at = (r * head.spec.heads + head.head) * dim + first;
                // SAFETY: a row of a head belongs to one task.
                unsafe { out.slice(at..at + used) }.copy_from_slice(&part[..used]);
            }
        }
    }
}

/// Copies the rows `rows` of one head of `x`, `[rows, heads * dim]`, into `out`, one after another.
fn gather(x: &[f32], heads: usize, head: usize, dim: usize, rows: &Range<usize>, out: &mut [f32]) {
    for (r, out) in rows.clone().zip(out.chunks_exact_mut(dim)) {
        out.copy_from_slice(&x[(r * heads + head) * dim..][..dim]);
    }
}

fn check(spec: &Attention<'_>, sequences: &[AttentionRows], q: &[f32], k: &[f32], v: &[f32]) {
    assert!(spec.kv_heads > 0 && spec.heads.is_multiple_of(spec.kv_heads), "query heads share key heads evenly");
    let (rows, keys) = (q.len() / (spec.heads * spec.head_dim), k.len() / (spec.kv_heads * spec.head_dim));
    assert_eq!(v.len(), keys * spec.kv_heads * spec.value_dim, "values are not [key rows, kv_heads * value_dim]");
    for s in sequences {
        assert!(s.queries.end <= rows && s.keys.end <= keys, "rows that are not there");
        assert!(s.queries.len() <= s.keys.len() && s.context <= s.keys.len(), "more queries or context than keys");
    }
}
