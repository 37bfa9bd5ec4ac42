//! Attention in tiles with the online softmax (Milakov and Gimelshein 2018, Dao et al. 2022): nothing of size
//! context x context is ever stored.

mod tiles;
mod train;

use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::kernels::{Kernels, PANEL};
use crate::matmul::Phase;
use crate::threads::Disjoint;
use std::cell::RefCell;
use std::ops::Range;

use tiles::{Side, Tiles};
pub use train::{AttentionGradients, AttentionRows};

/// Keys of one tile. Tiles begin at multiples of this from the start of the cache, wherever the queries begin, so that
/// a row's sums do not depend on how a prompt was cut.
const TILE: usize = 64;
/// Keys that one task of a generated token looks at: a long context is shared by all threads.
const CHUNK: usize = 256;

/// What all rows of an attention have in common.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Columns of a head of queries and keys.
    pub head_dim: usize,
    /// Columns of a head of values.
    pub value_dim: usize,
    /// What scores are multiplied by (usually `1 / sqrt(head_dim)`).
    pub scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// A query at `i` sees the keys `i - window < j <= i`.
    pub window: Option<usize>,
    /// ALiBi: `slope * (j - i)` is added to the scores of each head (Press et al. 2022).
    pub slopes: Option<&'a [f32]>,
    /// Falcon's form of it: the products `slope * j` are rounded to bf16 and multiplied by this.
    pub rounded_slopes: Option<f32>,
    /// One more score for each head that takes its share of the softmax and is dropped.
    pub sinks: Option<&'a [f32]>,
}

/// Keys or values of one sequence, `[kv_heads, capacity, head_dim]` (`value_dim` for values).
#[derive(Clone, Copy, Debug)]
pub enum Kv<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision, as bits.
    F16(&'a [u16]),
    /// 8-bit codes, and scales for each 32 of a row (the last fewer, where `width` is not a multiple).
    Q8 {
        /// Codes.
        codes: &'a [i8],
        /// `[rows, width / 32 rounded up]`.
        scales: &'a [f32],
        /// Columns of a row: `head_dim` or `value_dim`.
        width: usize,
    },
}

impl Kv<'_> {
    fn len(&self) -> usize {
        match self {
            Kv::F32(x) => x.len(),
            Kv::F16(x) => x.len(),
            Kv::Q8 { codes, .. } => codes.len(),
        }
    }

    /// Copies `range`, which is whole rows, to f32.
    fn read(&self, kernels: &Kernels, range: Range<usize>, out: &mut [f32]) {
        match self {
            Kv::F32(x) => out.copy_from_slice(&x[range]),
            Kv::F16(x) => (kernels.f16_to_f32)(&x[range], out),
            Kv::Q8 { codes, scales, width } => {
                let blocks = width.div_ceil(32);
                let scales = &scales[range.start / width * blocks..];
                let rows = codes[range].chunks_exact(*width).zip(scales.chunks_exact(blocks));
                for ((codes, scales), out) in rows.zip(out.chunks_exact_mut(*width)) {
                    (kernels.lanes.widen)(codes, scales, out);
                }
            }
        }
    }
}

/// One sequence's rows and what it has in the cache (the rows' own keys and values included).
#[derive(Clone, Debug)]
pub struct AttentionSequence<'a> {
    /// Which rows of the queries are this sequence's.
    pub rows: Range<usize>,
    /// Cache position of the first of them.
    pub start: usize,
    /// Keys.
    pub keys: Kv<'a>,
    /// Values.
    pub values: Kv<'a>,
    /// Positions that the cache has room for.
    pub capacity: usize,
    /// Positions before this one see each other whatever their order.
    pub context: usize,
}

#[derive(Default)]
struct Scratch {
    queries: Aligned<f32>,
    keys: Aligned<f32>,
    scores: Aligned<f32>,
    out: Aligned<f32>,
    spare: Aligned<f32>,
    most: Aligned<f32>,
    total: Aligned<f32>,
    /// Left sides of the products of a prompt: queries and shares.
    query_rows: Side,
    share_rows: Side,
    /// Their right sides: a tile of keys, then of values.
    panels: Side,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Cpu {
    /// Causal attention of the rows of `q` (`[rows, heads * head_dim]`) over each sequence's cache, into `out`
    /// (`[rows, heads * value_dim]`).
    ///
    /// # Panics
    /// When the sizes do not fit each other.
    pub fn attention(
        &self,
        phase: Phase,
        spec: &Attention<'_>,
        q: &[f32],
        sequences: &[AttentionSequence<'_>],
        out: &mut [f32],
    ) {
        assert!(spec.kv_heads > 0 && spec.heads.is_multiple_of(spec.kv_heads), "query heads share key heads evenly");
        assert_eq!(q.len() * spec.value_dim, out.len() * spec.head_dim, "output is not [rows, heads * value_dim]");
        for s in sequences {
            assert!(s.start + s.rows.len() <= s.capacity, "rows beyond the cache");
            let size = spec.kv_heads * s.capacity;
            assert_eq!(s.keys.len(), size * spec.head_dim, "keys are not [kv_heads, capacity, head_dim]");
            assert_eq!(s.values.len(), size * spec.value_dim, "values are not [kv_heads, capacity, value_dim]");
        }
        match phase {
            Phase::Prompt => self.attention_prompt(spec, q, sequences, out),
            Phase::Generate => self.attention_generate(spec, q, sequences, out),
        }
    }

    fn attention_prompt(&self, spec: &Attention<'_>, q: &[f32], sequences: &[AttentionSequence<'_>], out: &mut [f32]) {
        let group = spec.heads / spec.kv_heads;
        let block = (96 / group).clamp(8, 96);
        let mut tasks = Vec::new();
        for (i, s) in sequences.iter().enumerate() {
            // The last rows see the most keys: begin with them, so that no thread is left with a long task at the end.
            for start in (s.rows.start..s.rows.end).step_by(block).rev() {
                tasks.extend((0..spec.kv_heads).map(|h| (i, h, start..s.rows.end.min(start + block))));
            }
        }
        let out = Disjoint::new(out);
        self.team.run(tasks.len(), &|t| {
            let (i, head, rows) = &tasks[t];
            SCRATCH.with_borrow_mut(|scratch| {
                self.attention_block(spec, q, &sequences[*i], *head, rows.clone(), scratch, &out);
            });
        });
    }

    /// The rows `rows` of the query heads that share key head `kv_head`.
    fn attention_block(
        &self,
        spec: &Attention<'_>,
        q: &[f32],
        sequence: &AttentionSequence<'_>,
        kv_head: usize,
        rows: Range<usize>,
        scratch: &mut Scratch,
        out: &Disjoint<'_, f32>,
    ) {
        let (kernels, lanes) = (&self.kernels, &self.kernels.lanes);
        let tiles = Tiles { kernels, half: kernels.split };
        let (dim, group) = (spec.head_dim, spec.heads / spec.kv_heads);
        let (value_dim, widest) = (spec.value_dim, dim.max(spec.value_dim));
        let padded = value_dim.next_multiple_of(PANEL);
        let count = rows.len() * group;
        let Scratch { queries, keys: cached, scores, out: sums, spare, most, total, .. } = scratch;
        let (query_rows, share_rows, panels) = (&mut scratch.query_rows, &mut scratch.share_rows, &mut scratch.panels);
        queries.reserve(count * dim);
        cached.reserve(TILE * widest);
        scores.reserve(count * TILE);
        sums.reserve(count * padded);
        spare.reserve(count * padded);
        most.reserve(count);
        total.reserve(count);
        query_rows.reserve(&tiles, 1, count, dim);
        share_rows.reserve(&tiles, 1, count, TILE);
        panels.reserve(&tiles, 1, TILE, widest);
        sums[..count * padded].fill(0.0);
        most[..count].fill(f32::NEG_INFINITY);
        total[..count].fill(0.0);
        let width = spec.heads * dim;
        let head_of = |i: usize| kv_head * group + i % group;
        let position_of = |i: usize| sequence.start + (rows.start - sequence.rows.start) + i / group;
        for i in 0..count {
            let at = (rows.start + i / group) * width + head_of(i) * dim;
            let row = &mut queries[i * dim..(i + 1) * dim];
            row.copy_from_slice(&q[at..at + dim]);
            (lanes.scale)(spec.scale, row);
        }
        let left = tiles.left(&queries[..count * dim], dim, count, dim, query_rows, 0);
        let end = position_of(count - 1) + 1;
        let end = if position_of(0) < sequence.context { end.max(sequence.context) } else { end };
        let first = spec.window.map_or(0, |w| (position_of(0) + 1).saturating_sub(w)) / TILE * TILE;
        for tile in (first..end).step_by(TILE) {
            let keys = TILE.min(end - tile);
            let at = (kv_head * sequence.capacity + tile) * dim;
            sequence.keys.read(kernels, at..at + keys * dim, &mut cached[..keys * dim]);
            tiles.across(cached, dim, keys, dim, panels, 0);
            tiles.mul(left, (panels, 0), [count, keys.next_multiple_of(PANEL), dim], scores, TILE, None);
            for i in 0..count {
                let row = &mut scores[i * TILE..i * TILE + keys];
                let position = position_of(i);
                if let Some(cap) = spec.softcap {
                    (lanes.soft_cap)(cap, row);
                }
                if let Some(slopes) = spec.slopes {
                    add_slope(row, slopes[head_of(i)], spec.rounded_slopes, tile, position);
                }
                let visible = visible(spec.window, sequence.context, position, tile, keys);
                row[..visible.start].fill(f32::NEG_INFINITY);
                row[visible.end..].fill(f32::NEG_INFINITY);
                if visible.is_empty() {
                    // Nothing to add, and no maximum to compare with.
                    row.fill(0.0);
                    continue;
                }
                let largest = (lanes.max)(row).max(most[i]);
                // Seldom does a later tile have the largest score.
                let shrink = if largest == most[i] { 1.0 } else { lanes_exp(most[i] - largest) };
                total[i] = total[i] * shrink + (lanes.exp_sum)(largest, row);
                if shrink != 1.0 {
                    (lanes.scale)(shrink, &mut sums[i * padded..(i + 1) * padded]);
                }
                most[i] = largest;
            }
            let at = (kv_head * sequence.capacity + tile) * value_dim;
            sequence.values.read(kernels, at..at + keys * value_dim, &mut cached[..keys * value_dim]);
            tiles.along(cached, keys, value_dim, panels, 0);
            let shares = tiles.left(&scores[..count * TILE], TILE, count, keys, share_rows, 0);
            tiles.mul(shares, (panels, 0), [count, padded, keys], sums, padded, Some(spare));
        }
        for i in 0..count {
            let row = &mut sums[i * padded..i * padded + value_dim];
            let sink = spec.sinks.map(|sinks| sinks[head_of(i)]);
            finish(lanes.scale, row, most[i], total[i], sink);
            let at = ((rows.start + i / group) * spec.heads + head_of(i)) * value_dim;
            // SAFETY: each task has rows and heads of its own.
            unsafe { out.slice(at..at + value_dim) }.copy_from_slice(row);
        }
    }

    fn attention_generate(
        &self,
        spec: &Attention<'_>,
        q: &[f32],
        sequences: &[AttentionSequence<'_>],
        out: &mut [f32],
    ) {
        let (dim, value_dim, group) = (spec.head_dim, spec.value_dim, spec.heads / spec.kv_heads);
        let width = spec.heads * dim;
        let mut tasks = Vec::new();
        let mut rows = Vec::new();
        for s in sequences {
            for (i, row) in s.rows.clone().enumerate() {
                let position = s.start + i;
                let first = spec.window.map_or(0, |w| (position + 1).saturating_sub(w)) / CHUNK * CHUNK;
                let begin = tasks.len();
                let end = last_seen(s.context, position) + 1;
                for head in 0..spec.kv_heads {
                    for start in (first..end).step_by(CHUNK) {
                        tasks.push((s, row, position, head, start));
                    }
                }
                rows.push((row, begin, (tasks.len() - begin) / spec.kv_heads));
            }
        }
        // A task's part of the answer: for each head of its group the largest score, the sum of exponentials, and the
        // weighted values.
        let part = group * (value_dim + 2);
        PARTS.with_borrow_mut(|parts| {
            parts.reserve(tasks.len() * part);
            let shared = Disjoint::new(parts);
            self.team.run_in_stretches(tasks.len(), &|t| {
                let (s, row, position, head, start) = tasks[t];
                // SAFETY: each task has a part of its own.
                let part = unsafe { shared.slice(t * part..(t + 1) * part) };
                let q = &q[row * width + head * group * dim..][..group * dim];
                SCRATCH
                    .with_borrow_mut(|scratch| self.attention_chunk(spec, q, s, position, head, start, scratch, part));
            });
            for &(row, begin, chunks) in &rows {
                for head in 0..spec.heads {
                    let (kv_head, member) = (head / group, head % group);
                    let out = &mut out[(row * spec.heads + head) * value_dim..][..value_dim];
                    out.fill(0.0);
                    let (mut most, mut total) = (f32::NEG_INFINITY, 0.0);
                    for chunk in 0..chunks {
                        let at = (begin + kv_head * chunks + chunk) * part + member * (value_dim + 2);
                        let part = &parts[at..at + value_dim + 2];
                        if part[0] == f32::NEG_INFINITY {
                            continue;
                        }
                        let next = part[0].max(most);
                        let (old, new) = (lanes_exp(most - next), lanes_exp(part[0] - next));
                        total = total * old + part[1] * new;
                        (self.kernels.lanes.scale)(old, out);
                        (self.kernels.lanes.axpy)(new, &part[2..], out);
                        most = next;
                    }
                    finish(self.kernels.lanes.scale, out, most, total, spec.sinks.map(|s| s[head]));
                }
            }
        });
    }

    /// One row's heads of one group over the keys `start..start + CHUNK`.
    fn attention_chunk(
        &self,
        spec: &Attention<'_>,
        q: &[f32],
        sequence: &AttentionSequence<'_>,
        position: usize,
        kv_head: usize,
        start: usize,
        scratch: &mut Scratch,
        part: &mut [f32],
    ) {
        let (kernels, lanes) = (&self.kernels, &self.kernels.lanes);
        let (dim, value_dim, group) = (spec.head_dim, spec.value_dim, spec.heads / spec.kv_heads);
        let seen = last_seen(sequence.context, position) + 1;
        let visible = visible(spec.window, sequence.context, position, start, CHUNK.min(seen - start));
        let (begin, keys) = (start + visible.start, visible.len());
        part.fill(0.0);
        for member in part.chunks_exact_mut(value_dim + 2) {
            member[0] = f32::NEG_INFINITY;
        }
        if keys == 0 {
            return;
        }
        scratch.queries.reserve(group * dim);
        scratch.keys.reserve(TILE * dim.max(value_dim));
        scratch.scores.reserve(group * CHUNK);
        scratch.queries[..group * dim].copy_from_slice(q);
        (lanes.scale)(spec.scale, &mut scratch.queries[..group * dim]);
        let place = kv_head * sequence.capacity + begin;
        let half = kernels.half_heads.filter(|_| dim.is_multiple_of(16) && value_dim.is_multiple_of(16));
        let half = match (half, sequence.keys, sequence.values) {
            (Some(kernels), Kv::F16(k), Kv::F16(v)) => {
                Some((kernels, &k[place * dim..][..keys * dim], &v[place * value_dim..][..keys * value_dim]))
            }
            _ => None,
        };
        if let Some((kernels, half_keys, _)) = half {
            (kernels.scores)(&scratch.queries[..group * dim], dim, half_keys, &mut scratch.scores, CHUNK);
        }
        for tile in (0..if half.is_none() { keys } else { 0 }).step_by(TILE) {
            let n = TILE.min(keys - tile);
            let at = (place + tile) * dim;
            sequence.keys.read(kernels, at..at + n * dim, &mut scratch.keys[..n * dim]);
            for g in 0..group {
                let scores = &mut scratch.scores[g * CHUNK + tile..][..n];
                (lanes.scores)(&scratch.queries[g * dim..(g + 1) * dim], &scratch.keys[..n * dim], scores);
            }
        }
        for (g, part) in part.chunks_exact_mut(value_dim + 2).enumerate() {
            let row = &mut scratch.scores[g * CHUNK..g * CHUNK + keys];
            if let Some(cap) = spec.softcap {
                (lanes.soft_cap)(cap, row);
            }
            if let Some(slopes) = spec.slopes {
                add_slope(row, slopes[kv_head * group + g], spec.rounded_slopes, begin, position);
            }
            part[0] = (lanes.max)(row);
            part[1] = (lanes.exp_sum)(part[0], row);
        }
        if let Some((kernels, _, half_values)) = half {
            (kernels.mix)(&scratch.scores, CHUNK, group, half_values, value_dim, &mut part[2..], value_dim + 2);
            return;
        }
        for tile in (0..keys).step_by(TILE) {
            let n = TILE.min(keys - tile);
            let at = (place + tile) * value_dim;
            sequence.values.read(kernels, at..at + n * value_dim, &mut scratch.keys[..n * value_dim]);
            for (g, part) in part.chunks_exact_mut(value_dim + 2).enumerate() {
                (lanes.mix)(&scratch.scores[g * CHUNK + tile..][..n], &scratch.keys[..n * value_dim], &mut part[2..]);
            }
        }
    }
}

thread_local! {
    static PARTS: RefCell<Aligned<f32>> = RefCell::default();
}

fn lanes_exp(x: f32) -> f32 {
    crate::kernels::exp(x)
}

/// The last key that the query at `position` sees.
fn last_seen(context: usize, position: usize) -> usize {
    if position < context { context - 1 } else { position }
}

/// Which of the keys `tile..tile + keys` the query at `position` sees, counted from `tile`.
fn visible(window: Option<usize>, context: usize, position: usize, tile: usize, keys: usize) -> Range<usize> {
    let first = window.map_or(0, |w| (position + 1).saturating_sub(w)).saturating_sub(tile).min(keys);
    let end = (last_seen(context, position) + 1).saturating_sub(tile).min(keys);
    first..end.max(first)
}

fn add_slope(row: &mut [f32], slope: f32, rounded: Option<f32>, first: usize, position: usize) {
    for (j, s) in row.iter_mut().enumerate() {
        *s += match rounded {
            None => slope * ((first + j) as f32 - position as f32),
            // Rounding makes distances unequal, so the key's own position must be taken, as the reference does.
            Some(by) => by * half::bf16::from_f32(slope * (first + j) as f32).to_f32(),
        };
    }
}

/// Divides by the sum of exponentials, the sink's among them.
fn finish(scale: fn(f32, &mut [f32]), row: &mut [f32], most: f32, total: f32, sink: Option<f32>) {
    match sink {
        Some(sink) => {
            let next = most.max(sink);
            let shrink = lanes_exp(most - next);
            scale(shrink / (total * shrink + lanes_exp(sink - next)), row);
        }
        None => scale(1.0 / total, row),
    }
}
