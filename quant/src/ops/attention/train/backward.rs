//! The gradients of queries, keys, values and sinks.

use super::{AttentionRows, Head, KEYS, SCRATCH, check, strips};
use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::kernels::{GemmShape, PANEL, QUERIES};
use crate::ops::Attention;
use crate::ops::attention::{lanes_exp, panel_columns};
use crate::threads::Disjoint;
use std::cell::RefCell;
use std::ops::Range;

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

#[derive(Default)]
pub(super) struct Scratch {
    /// Queries of all blocks by columns, and the output's gradients across and by columns.
    columns: Aligned<f32>,
    outs: Aligned<f32>,
    out_columns: Aligned<f32>,
    /// A tile's keys with a row for each column.
    keys: Aligned<f32>,
    /// Gradients of a tile's scores.
    slopes: Aligned<f32>,
    capped: Aligned<f32>,
    dk: Aligned<f32>,
    dv: Aligned<f32>,
    lse: Aligned<f32>,
    deltas: Aligned<f32>,
}

thread_local! {
    /// Gradients of keys and values by query head, before heads that share a key head are summed.
    static SHARES: RefCell<[Aligned<f32>; 2]> = RefCell::default();
}

impl Cpu {
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
                    let head = Head { spec, rows: &sequences[t / spec.heads], head: t % spec.heads };
                    // SAFETY: each task has its own.
                    let sink = unsafe { sinks.slice(t..t + 1) };
                    sink[0] = self.backward_head(&head, [q, k, v, out, lse, dout], [&dq, &dk, &dv]);
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
        head: &Head<'_>,
        [q, k, v, out, lse, dout]: [&[f32]; 6],
        [dq, dk, dv]: [&Disjoint<'_, f32>; 3],
    ) -> f32 {
        let (spec, lanes, gemm) = (head.spec, &self.kernels.lanes, self.kernels.gemm);
        let (dim, value_dim) = (spec.head_dim, spec.value_dim);
        let (wide, value_wide) = (dim.next_multiple_of(PANEL), value_dim.next_multiple_of(PANEL));
        let blocks = head.blocks();
        SCRATCH.with_borrow_mut(|all| {
            let super::Scratch { rows, panel, queries, scores, strips: strip, out: turned, backward: own, .. } = all;
            let Scratch { columns, outs, out_columns, keys: key_rows, slopes, capped, dk: dkeys, dv: dvalues, .. } =
                own;
            let (sums, deltas) = (&mut own.lse, &mut own.deltas);
            rows.reserve(QUERIES * dim.max(value_dim));
            queries.reserve(blocks * QUERIES * dim);
            columns.reserve(blocks * QUERIES * wide);
            outs.reserve(blocks * QUERIES * value_dim);
            out_columns.reserve(blocks * QUERIES * value_wide);
            for buffer in [&mut *scores, slopes, capped, strip] {
                buffer.reserve(KEYS * QUERIES);
            }
            key_rows.reserve(wide * KEYS);
            dkeys.reserve(KEYS * wide);
            dvalues.reserve(KEYS * value_wide);
            turned.reserve(blocks * QUERIES * wide);
            turned[..blocks * QUERIES * wide].fill(0.0);
            sums.reserve(blocks * QUERIES);
            deltas.reserve(blocks * QUERIES);
            let mut sink = 0f32;
            for number in 0..blocks {
                let block = head.block(number);
                let (at, h, count) = (number * QUERIES, head.head, block.rows.len());
                gather(q, spec.heads, h, dim, &block.rows, rows);
                (lanes.scale)(spec.scale, &mut rows[..count * dim]);
                panel_columns(rows, count, dim, &mut columns[at * wide..]);
                self.across(q, spec.heads, h, dim, &block.rows, spec.scale, &mut queries[at * dim..]);
                gather(dout, spec.heads, h, value_dim, &block.rows, rows);
                panel_columns(rows, count, value_dim, &mut out_columns[at * value_wide..]);
                self.across(dout, spec.heads, h, value_dim, &block.rows, 1.0, &mut outs[at * value_dim..]);
                sums[at..at + QUERIES].fill(0.0);
                deltas[at..at + QUERIES].fill(0.0);
                for (i, r) in block.rows.enumerate() {
                    let row = r * spec.heads + h;
                    let delta = (lanes.dot)(&rows[i * value_dim..][..value_dim], &out[row * value_dim..][..value_dim]);
                    (sums[at + i], deltas[at + i]) = (lse[row], delta);
                    if let Some(sinks) = spec.sinks {
                        sink -= lanes_exp(sinks[h] - lse[row]) * delta;
                    }
                }
            }
            for tile in (0..head.tiles()).map(|t| head.tile(t)) {
                let keys = tile.len();
                let ((left, lda), (value_left, value_lda)) =
                    (head.left(k, dim, tile.start), head.left(v, value_dim, tile.start));
                self.turn(left, lda, keys, dim, panel, &mut key_rows[..dim * KEYS]);
                dkeys[..keys * wide].fill(0.0);
                dvalues[..keys * value_wide].fill(0.0);
                for number in 0..blocks {
                    let block = head.block(number);
                    if !head.meets(&block, &tile) {
                        continue;
                    }
                    let (at, count) = (number * QUERIES, block.rows.len());
                    let n = count.next_multiple_of(PANEL);
                    let shape = GemmShape { m: keys, n, k: dim, lda, ldb: dim * PANEL, ldc: QUERIES, add: false };
                    gemm(shape, left, &queries[at * dim..], scores);
                    let shape = GemmShape { k: value_dim, lda: value_lda, ldb: value_dim * PANEL, ..shape };
                    gemm(shape, value_left, &outs[at * value_dim..], slopes);
                    let (p, ds) = (&mut scores[..keys * QUERIES], &mut slopes[..keys * QUERIES]);
                    head.finish_scores(&self.kernels, &block, &tile, p, Some(&mut capped[..keys * QUERIES]));
                    let stats = at..at + QUERIES;
                    (lanes.softmax_backward)(&sums[stats.clone()], &deltas[stats], p, ds);
                    if let Some(cap) = spec.softcap {
                        (lanes.soft_cap_backward)(cap, &capped[..keys * QUERIES], ds);
                    }
                    strips(ds, n, strip);
                    let shape = GemmShape {
                        m: keys,
                        n: wide,
                        k: count,
                        lda: QUERIES,
                        ldb: count * PANEL,
                        ldc: wide,
                        add: true,
                    };
                    gemm(shape, slopes, &columns[at * wide..], dkeys);
                    let shape = GemmShape { n: value_wide, ldc: value_wide, ..shape };
                    gemm(shape, scores, &out_columns[at * value_wide..], dvalues);
                    let shape = GemmShape { m: dim, n, k: keys, lda: KEYS, ldb: keys * PANEL, ldc: QUERIES, add: true };
                    gemm(shape, key_rows, strip, &mut turned[at * wide..]);
                }
                for (j, r) in (head.rows.keys.start + tile.start..).take(keys).enumerate() {
                    let at = r * spec.heads + head.head;
                    // SAFETY: a row of a head belongs to one task.
                    let (dk, dv) =
                        unsafe { (dk.slice(at * dim..(at + 1) * dim), dv.slice(at * value_dim..(at + 1) * value_dim)) };
                    dk.copy_from_slice(&dkeys[j * wide..][..dim]);
                    dv.copy_from_slice(&dvalues[j * value_wide..][..value_dim]);
                }
            }
            for number in 0..blocks {
                let part = &mut turned[number * QUERIES * wide..][..dim * QUERIES];
                (lanes.scale)(spec.scale, part);
                self.turn_back(head, &head.block(number), dim, part, panel, dq);
            }
            sink
        })
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

/// Copies the rows `rows` of one head of `x`, `[rows, heads * dim]`, into `out`, one after another.
fn gather(x: &[f32], heads: usize, head: usize, dim: usize, rows: &Range<usize>, out: &mut [f32]) {
    for (r, out) in rows.clone().zip(out.chunks_exact_mut(dim)) {
        out.copy_from_slice(&x[(r * heads + head) * dim..][..dim]);
    }
}
