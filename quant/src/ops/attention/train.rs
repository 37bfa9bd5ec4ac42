//! Attention for training: whole sequences over rows of f32, forward and backward in tiles (Dao 2023): a backward pass
//! computes the scores again from the sums that the forward pass left, and nothing of size context x context exists.
//!
//! One task is one head of one sequence. It lays out its side of every product once, as the many-row kernels read it,
//! and goes over tiles of keys. Scores are held transposed in the backward pass (a row per key), so that they and their
//! gradients are as they come a left side for the gradients of keys and values, and, cut in strips of 16 queries, a
//! right side for that of the queries.

use super::{Attention, TILE, add_slope, finish, lanes_exp, panel_columns, transpose, visible};
use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::kernels::{GemmShape, PANEL};
use crate::threads::Disjoint;
use std::cell::RefCell;
use std::ops::Range;

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

impl AttentionRows {
    /// Position of the first query.
    fn start(&self) -> usize {
        self.keys.len() - self.queries.len()
    }
}

/// Where [`Cpu::attention_backward`] leaves the gradients.
#[derive(Debug)]
pub struct AttentionGradients<'a> {
    /// Of the queries, `[rows, heads * head_dim]`; the sequences' rows are overwritten.
    pub dq: &'a mut [f32],
    /// Of the keys, `[key rows, kv_heads * head_dim]`; the sequences' rows are overwritten.
    pub dk: &'a mut [f32],
    /// Of the values, `[key rows, kv_heads * value_dim]`; the sequences' rows are overwritten.
    pub dv: &'a mut [f32],
    /// Of [`Attention::sinks`], `[heads]`; added to.
    pub dsinks: Option<&'a mut [f32]>,
}

/// Queries of a block: as many as keys of a tile.
const BLOCK: usize = TILE;

#[derive(Default)]
struct Scratch {
    rows: Aligned<f32>,
    /// Keys (forward) or queries (backward) of all blocks as right sides: across, then by columns.
    across: Aligned<f32>,
    columns: Aligned<f32>,
    /// The same of values (forward) or gradients of the output (backward).
    value_across: Aligned<f32>,
    value_columns: Aligned<f32>,
    scores: Aligned<f32>,
    slopes: Aligned<f32>,
    strips: Aligned<f32>,
    out: Aligned<f32>,
    dk: Aligned<f32>,
    dv: Aligned<f32>,
    stats: Aligned<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    /// Gradients of keys and values by query head, before heads that share a key head are summed.
    static SHARES: RefCell<[Aligned<f32>; 2]> = RefCell::default();
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
            let (s, head) = (&sequences[t / spec.heads], t % spec.heads);
            SCRATCH.with_borrow_mut(|scratch| self.train_head(spec, s, head, [q, k, v], scratch, &out, &lse));
        });
    }

    fn train_head(
        &self,
        spec: &Attention<'_>,
        s: &AttentionRows,
        head: usize,
        [q, k, v]: [&[f32]; 3],
        scratch: &mut Scratch,
        out: &Disjoint<'_, f32>,
        lse: &Disjoint<'_, f32>,
    ) {
        let lanes = &self.kernels.lanes;
        let (dim, value_dim) = (spec.head_dim, spec.value_dim);
        let (kv_head, padded) = (head / (spec.heads / spec.kv_heads), value_dim.next_multiple_of(PANEL));
        let (tiles, start) = (s.keys.len().div_ceil(TILE), s.start());
        scratch.rows.reserve(TILE * dim.max(value_dim));
        scratch.across.reserve(tiles * TILE * dim);
        scratch.value_columns.reserve(tiles * TILE * padded);
        scratch.scores.reserve(BLOCK * TILE);
        scratch.out.reserve(BLOCK * padded);
        for tile in 0..tiles {
            let keys = s.keys.start + tile * TILE..s.keys.end.min(s.keys.start + (tile + 1) * TILE);
            gather(k, spec.kv_heads * dim, kv_head * dim, dim, keys.clone(), &mut scratch.rows);
            transpose(&scratch.rows, keys.len(), dim, &mut scratch.across[tile * TILE * dim..]);
            gather(v, spec.kv_heads * value_dim, kv_head * value_dim, value_dim, keys.clone(), &mut scratch.rows);
            panel_columns(&scratch.rows, keys.len(), value_dim, &mut scratch.value_columns[tile * TILE * padded..]);
        }
        for first in (0..s.queries.len()).step_by(BLOCK) {
            let count = BLOCK.min(s.queries.len() - first);
            let rows = s.queries.start + first..s.queries.start + first + count;
            gather(q, spec.heads * dim, head * dim, dim, rows.clone(), &mut scratch.rows);
            (lanes.scale)(spec.scale, &mut scratch.rows[..count * dim]);
            scratch.out[..count * padded].fill(0.0);
            let (mut most, mut total) = ([f32::NEG_INFINITY; BLOCK], [0f32; BLOCK]);
            let end = start + first + count;
            let end = if start + first < s.context { end.max(s.context) } else { end };
            let from = spec.window.map_or(0, |w| (start + first + 1).saturating_sub(w)) / TILE;
            for tile in from..end.div_ceil(TILE) {
                let keys = TILE.min(s.keys.len() - tile * TILE);
                let n = keys.next_multiple_of(PANEL);
                let shape = GemmShape { m: count, n, k: dim, lda: dim, ldb: dim * PANEL, ldc: TILE, add: false };
                (self.kernels.gemm)(shape, &scratch.rows, &scratch.across[tile * TILE * dim..], &mut scratch.scores);
                for i in 0..count {
                    let row = &mut scratch.scores[i * TILE..i * TILE + keys];
                    let position = start + first + i;
                    if let Some(cap) = spec.softcap {
                        (lanes.soft_cap)(cap, row);
                    }
                    if let Some(slopes) = spec.slopes {
                        add_slope(row, slopes[head], spec.rounded_slopes, tile * TILE, position);
                    }
                    let visible = visible(spec.window, s.context, position, tile * TILE, keys);
                    if visible.is_empty() {
                        row.fill(0.0);
                        continue;
                    }
                    row[..visible.start].fill(f32::NEG_INFINITY);
                    row[visible.end..].fill(f32::NEG_INFINITY);
                    let next = (lanes.max)(row).max(most[i]);
                    let shrink = lanes_exp(most[i] - next);
                    total[i] = total[i] * shrink + (lanes.exp_sum)(next, row);
                    if shrink != 1.0 {
                        (lanes.scale)(shrink, &mut scratch.out[i * padded..(i + 1) * padded]);
                    }
                    most[i] = next;
                }
                let values = &scratch.value_columns[tile * TILE * padded..];
                let ldb = keys * PANEL;
                let shape = GemmShape { m: count, n: padded, k: keys, lda: TILE, ldb, ldc: padded, add: true };
                (self.kernels.gemm)(shape, &scratch.scores, values, &mut scratch.out);
            }
            for (i, r) in rows.enumerate() {
                let row = &mut scratch.out[i * padded..i * padded + value_dim];
                let sink = spec.sinks.map(|sinks| sinks[head]);
                finish(lanes.scale, row, most[i], total[i], sink);
                let at = r * spec.heads + head;
                // SAFETY: a row of a head belongs to one task.
                let (out, lse) = unsafe { (out.slice(at * value_dim..(at + 1) * value_dim), lse.slice(at..at + 1)) };
                out.copy_from_slice(row);
                let (top, sink) = sink.map_or((most[i], 0.0), |s| (most[i].max(s), lanes_exp(s - most[i].max(s))));
                lse[0] = top + (total[i] * lanes_exp(most[i] - top) + sink).ln();
            }
        }
    }

    /// [`Cpu::attention_train`] backward: from the gradient `dout` of its output, what it was given (`q`, `k`, `v`) and
    /// what it gave (`out`, `lse`), the gradients of what it was given.
    ///
    /// # Panics
    /// When the sizes do not fit each other.
    pub fn attention_backward(
        &self,
        spec: &Attention<'_>,
        sequences: &[AttentionRows],
        [q, k, v]: [&[f32]; 3],
        out: &[f32],
        lse: &[f32],
        dout: &[f32],
        gradients: AttentionGradients<'_>,
    ) {
        check(spec, sequences, q, k, v);
        assert_eq!(out.len() * spec.head_dim, q.len() * spec.value_dim, "output is not [rows, heads * value_dim]");
        assert_eq!(lse.len() * spec.head_dim, q.len(), "sums are not [rows, heads]");
        assert_eq!(dout.len(), out.len(), "gradients differ in size");
        let AttentionGradients { dq, dk, dv, dsinks } = gradients;
        assert!(dq.len() == q.len() && dk.len() == k.len() && dv.len() == v.len(), "gradients differ in size");
        let group = spec.heads / spec.kv_heads;
        let mut sinks = vec![0f32; sequences.len() * spec.heads];
        SHARES.with_borrow_mut(|[dk_shares, dv_shares]| {
            if group > 1 {
                dk_shares.reserve(dk.len() * group);
                dv_shares.reserve(dv.len() * group);
            }
            {
                let dq = Disjoint::new(dq);
                let dk = Disjoint::new(if group > 1 { &mut dk_shares[..] } else { &mut *dk });
                let dv = Disjoint::new(if group > 1 { &mut dv_shares[..] } else { &mut *dv });
                let sinks = Disjoint::new(&mut sinks);
                self.team.run(sequences.len() * spec.heads, &|t| {
                    let (s, head) = (&sequences[t / spec.heads], t % spec.heads);
                    // SAFETY: each task has its own.
                    let sink = unsafe { sinks.slice(t..t + 1) };
                    SCRATCH.with_borrow_mut(|scratch| {
                        let given = [q, k, v, out, lse, dout];
                        sink[0] = self.backward_head(spec, s, head, given, scratch, [&dq, &dk, &dv]);
                    });
                });
            }
            if group > 1 {
                for s in sequences {
                    self.sum_shares(group, spec.head_dim, s.keys.clone(), spec.kv_heads, dk_shares, dk);
                    self.sum_shares(group, spec.value_dim, s.keys.clone(), spec.kv_heads, dv_shares, dv);
                }
            }
        });
        if let Some(dsinks) = dsinks {
            for sums in sinks.chunks_exact(spec.heads) {
                (self.kernels.lanes.add)(sums, dsinks);
            }
        }
    }

    /// The gradients of one head of one sequence; those of keys and values go where the query head's are. Returns its
    /// sink's.
    fn backward_head(
        &self,
        spec: &Attention<'_>,
        s: &AttentionRows,
        head: usize,
        [q, k, v, out, lse, dout]: [&[f32]; 6],
        scratch: &mut Scratch,
        [dq, dk, dv]: [&Disjoint<'_, f32>; 3],
    ) -> f32 {
        let lanes = &self.kernels.lanes;
        let (dim, value_dim) = (spec.head_dim, spec.value_dim);
        let (wide, value_wide) = (dim.next_multiple_of(PANEL), value_dim.next_multiple_of(PANEL));
        let kv_head = head / (spec.heads / spec.kv_heads);
        let (kv_width, value_width) = (spec.kv_heads * dim, spec.kv_heads * value_dim);
        let (blocks, start) = (s.queries.len().div_ceil(BLOCK), s.start());
        scratch.rows.reserve(TILE * dim.max(value_dim));
        scratch.across.reserve(blocks * BLOCK * dim);
        scratch.columns.reserve(blocks * BLOCK * wide);
        scratch.value_across.reserve(blocks * BLOCK * value_dim);
        scratch.value_columns.reserve(blocks * BLOCK * value_wide);
        scratch.scores.reserve(BLOCK * TILE);
        scratch.slopes.reserve(BLOCK * TILE);
        scratch.strips.reserve(BLOCK * TILE);
        scratch.out.reserve(blocks * BLOCK * dim);
        scratch.dk.reserve(TILE * wide);
        scratch.dv.reserve(TILE * value_wide);
        scratch.stats.reserve(2 * blocks * BLOCK);
        let Scratch { rows, across, columns, value_across, value_columns, scores, slopes, strips, .. } = scratch;
        let (sums, deltas) = scratch.stats.split_at_mut(blocks * BLOCK);
        scratch.out[..blocks * BLOCK * dim].fill(0.0);
        let mut sink = 0f32;
        for block in 0..blocks {
            let at = s.queries.start + block * BLOCK..s.queries.end.min(s.queries.start + (block + 1) * BLOCK);
            gather(q, spec.heads * dim, head * dim, dim, at.clone(), rows);
            (lanes.scale)(spec.scale, &mut rows[..at.len() * dim]);
            transpose(rows, at.len(), dim, &mut across[block * BLOCK * dim..]);
            panel_columns(rows, at.len(), dim, &mut columns[block * BLOCK * wide..]);
            gather(dout, spec.heads * value_dim, head * value_dim, value_dim, at.clone(), rows);
            transpose(rows, at.len(), value_dim, &mut value_across[block * BLOCK * value_dim..]);
            panel_columns(rows, at.len(), value_dim, &mut value_columns[block * BLOCK * value_wide..]);
            for (i, r) in at.enumerate() {
                let row = r * spec.heads + head;
                let delta = (lanes.dot)(&rows[i * value_dim..][..value_dim], &out[row * value_dim..][..value_dim]);
                (sums[block * BLOCK + i], deltas[block * BLOCK + i]) = (lse[row], delta);
                if let Some(sinks) = spec.sinks {
                    sink -= lanes_exp(sinks[head] - lse[row]) * delta;
                }
            }
        }
        for tile in 0..s.keys.len().div_ceil(TILE) {
            let first = tile * TILE;
            let keys = TILE.min(s.keys.len() - first);
            let (key_rows, value_rows) = (
                &k[(s.keys.start + first) * kv_width + kv_head * dim..],
                &v[(s.keys.start + first) * value_width + kv_head * value_dim..],
            );
            // Keys with a row for each column: the left side of the queries' gradient.
            for j in 0..keys {
                for (d, x) in key_rows[j * kv_width..][..dim].iter().enumerate() {
                    rows[d * TILE + j] = *x;
                }
            }
            scratch.dk[..keys * wide].fill(0.0);
            scratch.dv[..keys * value_wide].fill(0.0);
            for block in 0..blocks {
                let count = BLOCK.min(s.queries.len() - block * BLOCK);
                let position = start + block * BLOCK;
                let seen = |key| seen_by(spec.window, s.context, position, count, key);
                if (first..first + keys).all(|key| seen(key).is_empty()) {
                    continue;
                }
                let n = count.next_multiple_of(PANEL);
                let mut shape =
                    GemmShape { m: keys, n, k: dim, lda: kv_width, ldb: dim * PANEL, ldc: BLOCK, add: false };
                (self.kernels.gemm)(shape, key_rows, &across[block * BLOCK * dim..], scores);
                (shape.k, shape.lda, shape.ldb) = (value_dim, value_width, value_dim * PANEL);
                (self.kernels.gemm)(shape, value_rows, &value_across[block * BLOCK * value_dim..], slopes);
                for j in 0..keys {
                    let (p, ds) = (&mut scores[j * BLOCK..j * BLOCK + n], &mut slopes[j * BLOCK..j * BLOCK + n]);
                    let seen = seen(first + j);
                    for row in [&mut *p, &mut *ds] {
                        row[..seen.start].fill(0.0);
                        row[seen.end..].fill(0.0);
                    }
                    let (p, ds) = (&mut p[seen.clone()], &mut ds[seen.clone()]);
                    let at = block * BLOCK + seen.start..block * BLOCK + seen.end;
                    let mut capped = [0f32; BLOCK];
                    if let Some(cap) = spec.softcap {
                        (lanes.soft_cap)(cap, p);
                        capped[..p.len()].copy_from_slice(p);
                    }
                    if let Some(alibi) = spec.slopes {
                        for (i, p) in p.iter_mut().enumerate() {
                            let row = std::slice::from_mut(p);
                            add_slope(row, alibi[head], spec.rounded_slopes, first + j, position + seen.start + i);
                        }
                    }
                    (lanes.softmax_backward)(&sums[at.clone()], &deltas[at], p, ds);
                    if let Some(cap) = spec.softcap {
                        (lanes.soft_cap_backward)(cap, &capped[..p.len()], ds);
                    }
                    let row = &slopes[j * BLOCK..j * BLOCK + n];
                    for (strip, part) in row.as_chunks::<PANEL>().0.iter().enumerate() {
                        strips[(strip * keys + j) * PANEL..][..PANEL].copy_from_slice(part);
                    }
                }
                let mut shape =
                    GemmShape { m: keys, n: wide, k: count, lda: BLOCK, ldb: count * PANEL, ldc: wide, add: true };
                (self.kernels.gemm)(shape, slopes, &columns[block * BLOCK * wide..], &mut scratch.dk);
                (shape.n, shape.ldc) = (value_wide, value_wide);
                (self.kernels.gemm)(shape, scores, &value_columns[block * BLOCK * value_wide..], &mut scratch.dv);
                let shape = GemmShape { m: dim, n, k: keys, lda: TILE, ldb: keys * PANEL, ldc: BLOCK, add: true };
                (self.kernels.gemm)(shape, rows, strips, &mut scratch.out[block * BLOCK * dim..]);
            }
            for j in 0..keys {
                let at = (s.keys.start + first + j) * spec.heads + head;
                // SAFETY: a row of a head belongs to one task.
                unsafe {
                    dk.slice(at * dim..(at + 1) * dim).copy_from_slice(&scratch.dk[j * wide..][..dim]);
                    let dv = dv.slice(at * value_dim..(at + 1) * value_dim);
                    dv.copy_from_slice(&scratch.dv[j * value_wide..][..value_dim]);
                }
            }
        }
        for (i, r) in s.queries.clone().enumerate() {
            let at = (r * spec.heads + head) * dim;
            // SAFETY: a row of a head belongs to one task.
            let row = unsafe { dq.slice(at..at + dim) };
            let sums = &scratch.out[i / BLOCK * BLOCK * dim + i % BLOCK..];
            for (d, x) in row.iter_mut().enumerate() {
                *x = spec.scale * sums[d * BLOCK];
            }
        }
        sink
    }

    /// Sums what `group` query heads give to the key head that they share, for the rows `rows`.
    fn sum_shares(&self, group: usize, dim: usize, rows: Range<usize>, heads: usize, shares: &[f32], out: &mut [f32]) {
        let out = Disjoint::new(out);
        self.split(rows.len(), 16, &|part| {
            for row in (rows.start + part.start) * heads..(rows.start + part.end) * heads {
                // SAFETY: a row belongs to one task.
                let out = unsafe { out.slice(row * dim..(row + 1) * dim) };
                let shares = &shares[row * group * dim..(row + 1) * group * dim];
                out.copy_from_slice(&shares[..dim]);
                for share in shares.chunks_exact(dim).skip(1) {
                    (self.kernels.lanes.add)(share, out);
                }
            }
        });
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

/// Copies columns `from..from + dim` of the given rows of `width` into `out`, one after another.
fn gather(x: &[f32], width: usize, from: usize, dim: usize, rows: Range<usize>, out: &mut [f32]) {
    for (r, out) in rows.zip(out.chunks_exact_mut(dim)) {
        out.copy_from_slice(&x[r * width + from..][..dim]);
    }
}

/// Which of the `count` queries from `position` on see the key at `key`, counted from the first.
fn seen_by(window: Option<usize>, context: usize, position: usize, count: usize, key: usize) -> Range<usize> {
    let first = if key < context { 0 } else { key.saturating_sub(position).min(count) };
    let end = window.map_or(count, |w| (key + w).saturating_sub(position).min(count));
    first..end.max(first)
}
