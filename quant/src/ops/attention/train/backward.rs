//! The gradients of queries, keys, values and sinks.

use super::Side;
use super::{AttentionRows, Head, KEYS, SCRATCH, check, gather};
use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::kernels::{PANEL, QUERIES};
use crate::ops::Attention;
use crate::ops::attention::lanes_exp;
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
    /// Right sides of all blocks: queries as rows, and the output's gradients as columns and as rows.
    queries: Side,
    outs: Side,
    out_rows: Side,
    /// A tile's keys with a row for each column, also as a left side.
    turned_keys: Aligned<f32>,
    keys: Side,
    /// Gradients of a tile's scores.
    slopes: Aligned<f32>,
    capped: Aligned<f32>,
    /// Scores and their gradients as left sides.
    left: Side,
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
        let (spec, lanes, tiles) = (head.spec, &self.kernels.lanes, self.tiles());
        let (dim, value_dim) = (spec.head_dim, spec.value_dim);
        let (wide, value_wide) = (dim.next_multiple_of(PANEL), value_dim.next_multiple_of(PANEL));
        let blocks = head.blocks();
        SCRATCH.with_borrow_mut(|all| {
            let super::Scratch { rows, panel, queries, keys, values, scores, strips, out: turned, spare, .. } = all;
            let own = &mut all.backward;
            rows.reserve(QUERIES * dim.max(value_dim));
            queries.reserve(&tiles, blocks, QUERIES, dim);
            own.queries.reserve(&tiles, blocks, QUERIES, dim);
            own.outs.reserve(&tiles, blocks, QUERIES, value_dim);
            own.out_rows.reserve(&tiles, blocks, QUERIES, value_dim);
            keys.reserve(&tiles, 1, KEYS, dim);
            values.reserve(&tiles, 1, KEYS, value_dim);
            own.keys.reserve(&tiles, 1, dim, KEYS);
            own.left.reserve(&tiles, 1, KEYS, QUERIES);
            strips.reserve(&tiles, 1, KEYS, QUERIES);
            for buffer in [&mut *scores, &mut own.slopes, &mut own.capped] {
                buffer.reserve(KEYS * QUERIES);
            }
            own.turned_keys.reserve(dim * KEYS);
            own.dk.reserve(KEYS * wide);
            own.dv.reserve(KEYS * value_wide);
            spare.reserve(KEYS * wide.max(value_wide));
            turned.reserve(blocks * QUERIES * wide);
            turned[..blocks * QUERIES * wide].fill(0.0);
            own.lse.reserve(blocks * QUERIES);
            own.deltas.reserve(blocks * QUERIES);
            let mut sink = 0f32;
            for number in 0..blocks {
                let block = head.block(number);
                let (at, h, count) = (number * QUERIES, head.head, block.rows.len());
                gather(q, spec.heads, h, dim, &block.rows, rows);
                (lanes.scale)(spec.scale, &mut rows[..count * dim]);
                tiles.across(rows, dim, count, dim, queries, number);
                tiles.along(rows, count, dim, &mut own.queries, number);
                gather(dout, spec.heads, h, value_dim, &block.rows, rows);
                tiles.across(rows, value_dim, count, value_dim, &mut own.outs, number);
                tiles.along(rows, count, value_dim, &mut own.out_rows, number);
                own.lse[at..at + QUERIES].fill(0.0);
                own.deltas[at..at + QUERIES].fill(0.0);
                for (i, r) in block.rows.enumerate() {
                    let row = r * spec.heads + h;
                    let delta = (lanes.dot)(&rows[i * value_dim..][..value_dim], &out[row * value_dim..][..value_dim]);
                    (own.lse[at + i], own.deltas[at + i]) = (lse[row], delta);
                    if let Some(sinks) = spec.sinks {
                        sink -= lanes_exp(sinks[h] - lse[row]) * delta;
                    }
                }
            }
            for tile in (0..head.tiles()).map(|t| head.tile(t)) {
                let count = tile.len();
                let (key_rows, stride) = head.left(k, dim, tile.start);
                self.turn(key_rows, stride, count, dim, panel, &mut own.turned_keys[..dim * KEYS]);
                let key_rows = tiles.left(key_rows, stride, count, dim, keys, 0);
                let (value_rows, stride) = head.left(v, value_dim, tile.start);
                let value_rows = tiles.left(value_rows, stride, count, value_dim, values, 0);
                let key_columns = tiles.left(&own.turned_keys, KEYS, dim, count, &mut own.keys, 0);
                own.dk[..count * wide].fill(0.0);
                own.dv[..count * value_wide].fill(0.0);
                for number in 0..blocks {
                    let block = head.block(number);
                    if !head.meets(&block, &tile) {
                        continue;
                    }
                    let (at, seen) = (number * QUERIES, block.rows.len());
                    let n = seen.next_multiple_of(PANEL);
                    tiles.mul(key_rows, (queries, number), [count, n, dim], scores, QUERIES, None);
                    tiles.mul(value_rows, (&own.outs, number), [count, n, value_dim], &mut own.slopes, QUERIES, None);
                    let (p, ds) = (&mut scores[..count * QUERIES], &mut own.slopes[..count * QUERIES]);
                    let capped = &mut own.capped[..count * QUERIES];
                    head.finish_scores(&self.kernels, &block, &tile, p, Some(capped));
                    let stats = at..at + QUERIES;
                    (lanes.softmax_backward)(&own.lse[stats.clone()], &own.deltas[stats], p, ds);
                    if let Some(cap) = spec.softcap {
                        (lanes.soft_cap_backward)(cap, capped, ds);
                    }
                    tiles.along(ds, count, QUERIES, strips, 0);
                    let left = tiles.left(ds, QUERIES, count, seen, &mut own.left, 0);
                    tiles.mul(left, (&own.queries, number), [count, wide, seen], &mut own.dk, wide, Some(spare));
                    let left = tiles.left(p, QUERIES, count, seen, &mut own.left, 0);
                    let shape = [count, value_wide, seen];
                    tiles.mul(left, (&own.out_rows, number), shape, &mut own.dv, value_wide, Some(spare));
                    let out = &mut turned[at * wide..][..dim * QUERIES];
                    tiles.mul(key_columns, (strips, 0), [dim, n, count], out, QUERIES, Some(spare));
                }
                for (j, r) in (head.rows.keys.start + tile.start..).take(count).enumerate() {
                    let at = r * spec.heads + head.head;
                    // SAFETY: a row of a head belongs to one task.
                    let (dk, dv) =
                        unsafe { (dk.slice(at * dim..(at + 1) * dim), dv.slice(at * value_dim..(at + 1) * value_dim)) };
                    dk.copy_from_slice(&own.dk[j * wide..][..dim]);
                    dv.copy_from_slice(&own.dv[j * value_wide..][..value_dim]);
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
