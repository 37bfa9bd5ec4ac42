//! GPTQ (Frantar et al. 2023): each column is rounded, and what that got wrong is made good by the columns after it.

use super::encode;
use super::factor::Factor;
use super::grid::nearest;
use super::hessian::multiply;
use super::solution::{Problem, Solution, read_params, stored};
use crate::buffer::Aligned;
use crate::kernels::{GemmShape, PANEL};
use crate::threads::Disjoint;
use std::ops::Range;

/// The order in which columns are visited. A column's error is made good by those after it, so the ones that matter
/// most are better off early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// From the first to the last.
    Natural,
    /// By falling diagonal of the Hessian ("act-order").
    Falling,
    /// Block by block (or group by group) by falling diagonal, and so within each: neighbours stay together, so that
    /// scales can be found on the way.
    FallingBlocks,
}

/// When the scales of a block or group are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Before the first column is visited. Groups are those of neighbouring columns, whatever the order.
    Static,
    /// When its first column is reached, from weights without the errors of the present 128 columns (what the paper's
    /// code and AutoGPTQ do).
    Lazy,
    /// When its first column is reached, from the weights with all errors so far.
    Fresh,
}

/// A way of running GPTQ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Variant {
    /// What is added to the diagonal, as a part of its mean.
    pub damping: f64,
    /// The order of visits.
    pub order: Order,
    /// When scales are found.
    pub fit: Fit,
}

impl Variant {
    /// Whether scales are found beforehand: blocks cannot be fitted on the way when their columns are visited apart.
    pub(super) fn is_static(&self, p: &Problem<'_>) -> bool {
        self.fit == Fit::Static || p.format().is_some() && self.order == Order::Falling
    }
}

/// Who is visited when.
pub(super) struct Plan {
    /// Columns in the order of visits.
    pub order: Vec<u32>,
    /// Visits whose scales are found together, at the first of them; empty for static scales.
    pub segments: Vec<Range<usize>>,
    /// Visits whose errors are passed on together.
    pub chunks: Vec<Range<usize>>,
    /// The group of each column.
    pub unit_of: Vec<u32>,
}

/// Visits whose errors are passed on together (the paper's lazy batches), unless a block is longer.
const LAZY: usize = 128;

impl Plan {
    /// `diagonal` is that of the Hessian.
    pub fn new(p: &Problem<'_>, variant: &Variant, diagonal: &[f64]) -> Plan {
        let (cols, span) = (p.cols, p.span());
        let falling = |columns: &mut [u32]| {
            columns.sort_by(|a, b| diagonal[*b as usize].total_cmp(&diagonal[*a as usize]));
        };
        let mut order: Vec<u32> = (0..cols as u32).collect();
        let mut lengths: Vec<usize> = (0..cols).step_by(span).map(|from| span.min(cols - from)).collect();
        match variant.order {
            Order::Natural => {}
            Order::Falling => falling(&mut order),
            Order::FallingBlocks => {
                let mut blocks: Vec<(f64, Range<usize>)> = (0..cols)
                    .step_by(span)
                    .map(|from| from..cols.min(from + span))
                    .map(|range| (diagonal[range.clone()].iter().sum::<f64>() / range.len() as f64, range))
                    .collect();
                blocks.sort_by(|a, b| b.0.total_cmp(&a.0));
                lengths = blocks.iter().map(|(_, range)| range.len()).collect();
                order = blocks.into_iter().flat_map(|(_, range)| range).map(|c| c as u32).collect();
                let mut rest = &mut order[..];
                for len in &lengths {
                    let (block, after) = rest.split_at_mut(*len);
                    falling(block);
                    rest = after;
                }
            }
        }
        let mut segments = Vec::new();
        let mut unit_of = Solution::plain_units(p);
        if !variant.is_static(p) {
            let mut from = 0;
            for len in lengths {
                segments.push(from..from + len);
                from += len;
            }
            if variant.order == Order::Falling {
                for (u, segment) in segments.iter().enumerate() {
                    for c in &order[segment.clone()] {
                        unit_of[*c as usize] = u as u32;
                    }
                }
            }
        }
        // Whole segments where they fit, so that what is lazily passed on does not depend on where a batch begins.
        let mut chunks: Vec<Range<usize>> = Vec::new();
        let whole = std::slice::from_ref(&(0..cols)).to_vec();
        for segment in if segments.is_empty() { &whole } else { &segments } {
            match chunks.last_mut() {
                Some(last) if last.len() + segment.len() <= LAZY => last.end = segment.end,
                _ if segment.len() <= 2 * LAZY => chunks.push(segment.clone()),
                _ => chunks.extend(segment.clone().step_by(LAZY).map(|from| from..segment.end.min(from + LAZY))),
            }
        }
        Plan { order, segments, chunks, unit_of }
    }
}

/// Runs GPTQ once. With static scales `start` has them.
pub(super) fn run(p: &Problem<'_>, plan: &Plan, factor: &Factor, fit: Fit, start: Option<&Solution>) -> Solution {
    /// Rows of a task: a whole number of every kernel's tiles.
    const ROWS: usize = 48;
    let (rows, cols, cpu) = (p.rows, p.cols, p.cpu);
    let mut s = match start {
        Some(start) => start.clone(),
        None => Solution::empty(p, plan.unit_of.clone()),
    };
    let units = s.units;
    let levels = p.levels();
    let group_fit = p.group_fit();
    // What a unit of squared error costs, by visit and by column.
    let importance: Vec<f32> = factor.diagonal().iter().map(|r| (r * r) as f32).collect();
    let mut by_column = vec![0f32; cols];
    for (c, i) in plan.order.iter().zip(&importance) {
        by_column[*c as usize] = *i;
    }
    let bytes = s.packed.len() / rows.max(1);
    // By position in the order of visits.
    let mut errors = Aligned::<f32>::zeroed(rows * cols);
    let mut panels = Aligned::<f32>::default();
    let mut ahead = Aligned::<f32>::default();
    let mut feedback = Vec::new();
    let axpy = cpu.kernels.lanes.axpy;
    for chunk in &plan.chunks {
        let (from, width) = (chunk.start, chunk.len());
        let stride = width.next_multiple_of(PANEL);
        panels.reserve(chunk.end * stride);
        factor.pack(cpu, chunk.clone(), &mut panels);
        feedback.clear();
        for k in from..chunk.end {
            feedback.extend((0..width).map(|j| panels[(j / PANEL * chunk.end + k) * PANEL + j % PANEL]));
        }
        // Segments that begin here; the last may reach beyond the chunk.
        let first = plan.segments.partition_point(|s| s.start < from);
        let here = &plan.segments[first..plan.segments.partition_point(|s| s.start < chunk.end)];
        let reach = here.last().map_or(0, |s| s.end).max(chunk.end);
        let beyond = reach - chunk.end;
        let beyond_stride = beyond.next_multiple_of(PANEL);
        if beyond > 0 && from > 0 {
            ahead.reserve(reach * beyond_stride);
            factor.pack(cpu, chunk.end..reach, &mut ahead);
        }
        let all_errors = Disjoint::new(&mut errors);
        let (scales, offsets) = (Disjoint::new(&mut s.scales), Disjoint::new(&mut s.offsets));
        let (codes, packed) = (Disjoint::new(&mut s.codes), Disjoint::new(&mut s.packed));
        let unit_of = &s.unit_of;
        let order = &plan.order;
        cpu.split(rows, ROWS, &|part| {
            let m = part.len();
            // SAFETY: these rows belong to one task.
            let errors = unsafe { all_errors.slice(part.start * cols..part.end * cols) };
            let full = stride + beyond_stride;
            let mut tile = vec![0f32; m * full];
            let shape = GemmShape { m, n: width, k: from, lda: cols, ldb: chunk.end * PANEL, ldc: full, add: false };
            multiply(cpu.kernels.gemm, shape, errors, &panels, &mut tile);
            if beyond > 0 && from > 0 {
                let shape = GemmShape { n: beyond, ldb: reach * PANEL, ..shape };
                multiply(cpu.kernels.gemm, shape, errors, &ahead, &mut tile[stride..]);
            }
            let mut settled = vec![0f32; width];
            let (mut segment_weights, mut in_place) = (Vec::new(), Vec::new());
            for (i, r) in part.enumerate() {
                // SAFETY: a row belongs to one task.
                let (scales, offsets, codes, packed) = unsafe {
                    (
                        scales.slice(r * units..(r + 1) * units),
                        offsets.slice(r * units..(r + 1) * units),
                        codes.slice(r * cols..(r + 1) * cols),
                        packed.slice(r * bytes..(r + 1) * bytes),
                    )
                };
                let w = &p.weights[r * cols..(r + 1) * cols];
                let errors = &mut errors[i * cols..(i + 1) * cols];
                let (t, after) = tile[i * full..(i + 1) * full].split_at_mut(stride);
                for (t, c) in t.iter_mut().zip(&order[chunk.clone()]) {
                    *t += w[*c as usize];
                }
                if fit == Fit::Lazy {
                    settle(axpy, &feedback, width, 0..width, t, w, &order[chunk.clone()], &mut settled);
                }
                let mut segments = here.iter().peekable();
                for q in 0..width {
                    if let Some(segment) = segments.next_if(|s| s.start == from + q) {
                        let inside = q..width.min(segment.end - from);
                        if fit != Fit::Lazy {
                            settle(axpy, &feedback, width, inside.clone(), t, w, &order[chunk.clone()], &mut settled);
                        }
                        segment_weights.clear();
                        segment_weights.extend_from_slice(&settled[inside]);
                        if segment.end > chunk.end {
                            settle_beyond(axpy, &ahead, from..reach, after, w, order, &mut segment_weights);
                        }
                        let columns = &order[segment.clone()];
                        if let Some(group_fit) = group_fit {
                            let u = unit_of[columns[0] as usize] as usize;
                            (scales[u], offsets[u]) =
                                group_fit.fit(&segment_weights, Some(&importance[segment.clone()]));
                        } else if let Some(format) = p.format() {
                            // A segment is the columns of one block, in some order.
                            let len = format.block_len();
                            let block = columns[0] as usize / len;
                            in_place.resize(len, 0.0);
                            for (c, w) in columns.iter().zip(&segment_weights) {
                                in_place[*c as usize - block * len] = *w;
                            }
                            let packed = &mut packed[block * format.block_bytes()..(block + 1) * format.block_bytes()];
                            let all = block * len..(block + 1) * len;
                            encode(format, &in_place, len, Some(&by_column[all.clone()]), packed);
                            let units = all.start / 16..all.end / 16;
                            read_params(format, packed, &mut scales[units.clone()], &mut offsets[units]);
                        }
                    }
                    let c = order[from + q] as usize;
                    let u = unit_of[c] as usize;
                    let (code, value) = nearest(levels, scales[u], offsets[u], t[q]);
                    codes[c] = stored(p.grid, code, offsets[u]);
                    let error = w[c] - value;
                    errors[from + q] = error;
                    axpy(error, &feedback[q * width + q + 1..(q + 1) * width], &mut t[q + 1..width]);
                }
            }
        });
    }
    s.pack_codes(p);
    s
}

/// `y += a * x`
type Axpy = fn(f32, &[f32], &mut [f32]);

/// The best real weights for the visits `range` of a chunk, given the errors before them: what the paper's code holds in
/// place of the weights. `t` has the errors of visits already made; each of the weights so found is off by what it makes
/// good, which those after it take into account.
fn settle(
    axpy: Axpy,
    feedback: &[f32],
    width: usize,
    range: Range<usize>,
    t: &[f32],
    w: &[f32],
    order: &[u32],
    out: &mut [f32],
) {
    out[range.clone()].copy_from_slice(&t[range.clone()]);
    for m in range.clone() {
        let error = w[order[m] as usize] - out[m];
        if error != 0.0 {
            axpy(error, &feedback[m * width + m + 1..m * width + range.end], &mut out[m + 1..range.end]);
        }
    }
}

/// The same for the rest of a segment that is longer than a chunk. `weights` has what was found for the chunk, whose
/// first visit is `visits.start`; `after` the errors of visits before it, for those after the chunk.
fn settle_beyond(
    axpy: Axpy,
    panels: &[f32],
    visits: Range<usize>,
    after: &[f32],
    w: &[f32],
    order: &[u32],
    weights: &mut Vec<f32>,
) {
    let inside = weights.len();
    let columns = &order[visits.clone()];
    weights.extend(columns[inside..].iter().map(|c| w[*c as usize]));
    if visits.start == 0 {
        return;
    }
    for (weight, after) in weights[inside..].iter_mut().zip(after) {
        *weight += after;
    }
    for m in 0..weights.len() {
        let error = w[columns[m] as usize] - weights[m];
        // Panels hold zeros where a visit is not after `m`.
        for (p, part) in weights[inside..].chunks_mut(PANEL).enumerate().skip((m.max(inside) - inside) / PANEL) {
            let at = (p * visits.end + visits.start + m) * PANEL;
            axpy(error, &panels[at..at + part.len()], part);
        }
    }
}
