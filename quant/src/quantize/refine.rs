//! Coordinate descent after GPTQ: each scale, then each code, is set to what is best with all the others as they are.

use super::grid::{Grid, nearest};
use super::hessian::{Hessian, multiply};
use super::kquants::{store, store_scales};
use super::solution::{Problem, Solution, read_params, stored, value};
use crate::buffer::Aligned;
use crate::formats::{Format, f16_to_f32};
use crate::kernels::{GemmShape, PANEL};
use crate::threads::Disjoint;

/// Passes `sweeps` times over all columns. The error `d (H + damping) d^T` of each row never rises.
///
/// With `g = d H` a change `s` of the weights changes that error by `2 g s + s H s`. Columns are taken in batches whose
/// `g` is computed afresh from all errors, and followed exactly inside the batch.
pub(super) fn refine(p: &Problem<'_>, hessian: &Hessian, damping: f64, sweeps: usize, s: &mut Solution) {
    const ROWS: usize = 48;
    let (rows, cols, cpu) = (p.rows, p.cols, p.cpu);
    let batch = match p.span() {
        span @ ..=128 => 128 / span * span,
        span @ ..=256 => span,
        _ => 128,
    };
    let levels = p.levels();
    let bytes = s.packed.len() / rows.max(1);
    // In the units of the Hessian's sums, which is all that matters here.
    let damping = (damping / hessian.scale()) as f32;
    let mut errors = Aligned::<f32>::zeroed(rows * cols);
    s.errors(p, &mut errors);
    let mut panels = Aligned::<f32>::default();
    let units = s.units;
    let group_fit = p.group_fit();
    // Whether each group lies within a batch.
    let neighbours = p.span() <= batch && s.unit_of == Solution::plain_units(p);
    for _ in 0..sweeps {
        for from in (0..cols).step_by(batch) {
            // Panels begin at a multiple of 16; columns before `from` are computed for nothing.
            let to = cols.min(from + batch);
            let first = from / PANEL * PANEL;
            let skip = from - first;
            let width = to - from;
            let stride = (to - first).next_multiple_of(PANEL);
            panels.reserve(cols * stride);
            hessian.pack(cpu, 0..cols, first..to, &mut panels);
            let mut square = vec![0f32; width * width];
            for i in 0..width {
                for j in 0..width {
                    square[i * width + j] = hessian.sum(from + i, from + j);
                }
                square[i * width + i] += damping;
            }
            let all_errors = Disjoint::new(&mut errors);
            let (scales, offsets) = (Disjoint::new(&mut s.scales), Disjoint::new(&mut s.offsets));
            let (codes, packed) = (Disjoint::new(&mut s.codes), Disjoint::new(&mut s.packed));
            let unit_of = &s.unit_of;
            cpu.split(rows, ROWS, &|part| {
                let m = part.len();
                // SAFETY: these rows belong to one task.
                let errors = unsafe { all_errors.slice(part.start * cols..part.end * cols) };
                let mut tile = vec![0f32; m * stride];
                let shape =
                    GemmShape { m, n: to - first, k: cols, lda: cols, ldb: cols * PANEL, ldc: stride, add: false };
                multiply(cpu.kernels.gemm, shape, errors, &panels, &mut tile);
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
                    let w = &p.weights[r * cols + from..r * cols + to];
                    let e = &mut errors[i * cols + from..i * cols + to];
                    let g = &mut tile[i * stride + skip..i * stride + skip + width];
                    for (g, e) in g.iter_mut().zip(e.iter()) {
                        *g += damping * e;
                    }
                    let mut row = Batch { axpy: cpu.kernels.lanes.axpy, square: &square, e, g };
                    if let Some(format) = p.format().filter(|f| *f != Format::MXFP4) {
                        for block in from / format.block_len()..to / format.block_len() {
                            row.scale_block(format, block, from, codes, packed, scales, offsets);
                            row.scale_groups(format, block, from, codes, packed, scales, offsets);
                        }
                    }
                    if let (Some(fit), true) = (group_fit, neighbours) {
                        for at in (0..width).step_by(p.span()) {
                            let u = unit_of[from + at] as usize;
                            let codes = &codes[from + at..to.min(from + at + p.span())];
                            row.scale_group(at, codes, &mut scales[u], offsets[u], fit.half);
                        }
                    }
                    for c in 0..width {
                        let u = unit_of[from + c] as usize;
                        let diagonal = square[c * width + c];
                        if diagonal <= 0.0 {
                            continue;
                        }
                        let target = w[c] + row.e[c] - row.g[c] / diagonal;
                        let (code, _) = nearest(levels, scales[u], offsets[u], target);
                        let code = stored(p.grid, code, offsets[u]);
                        if code != codes[from + c] {
                            codes[from + c] = code;
                            row.change(c, value(p.grid, code, scales[u], offsets[u]) - w[c] - row.e[c]);
                        }
                    }
                }
            });
        }
    }
    s.pack_codes(p);
}

/// A batch of columns of one row.
struct Batch<'a> {
    axpy: fn(f32, &[f32], &mut [f32]),
    /// The Hessian between them.
    square: &'a [f32],
    /// Errors.
    e: &'a mut [f32],
    /// Half the derivative of the objective.
    g: &'a mut [f32],
}

impl Batch<'_> {
    /// Changes weight `c` by `by`.
    fn change(&mut self, c: usize, by: f32) {
        let width = self.g.len();
        self.e[c] += by;
        (self.axpy)(by, &self.square[c * width..(c + 1) * width], self.g);
    }

    /// `a H`, for a change `a` of the weights from column `at`.
    fn image(&self, at: usize, a: &[f32]) -> [f32; MOST] {
        let width = self.g.len();
        let mut image = [0f32; MOST];
        for (i, a) in a.iter().enumerate().filter(|(_, a)| **a != 0.0) {
            (self.axpy)(*a, &self.square[(at + i) * width..(at + i + 1) * width], &mut image[..width]);
        }
        image
    }

    /// Moves the f16 scale, and f16 minimum, of a whole block to where the objective is least.
    fn scale_block(
        &mut self,
        format: Format,
        block: usize,
        from: usize,
        codes: &[u8],
        packed: &mut [u8],
        scales: &mut [f32],
        offsets: &mut [f32],
    ) {
        let len = format.block_len();
        let (d_at, min_at) = places(format);
        let columns = block * len..(block + 1) * len;
        let units = columns.start / 16..columns.end / 16;
        let at = columns.start - from;
        let packed = &mut packed[block * format.block_bytes()..(block + 1) * format.block_bytes()];
        // The block's weights are `a + b`, with `a` proportional to the scale and `b` to the minimum.
        let mut a = [0f32; MOST];
        let mut b = [0f32; MOST];
        for (i, c) in columns.clone().enumerate() {
            a[i] = scales[c / 16] * f32::from(codes[c] as i8);
            b[i] = -offsets[c / 16];
        }
        let (a, b) = (&a[..len], &b[..len]);
        let ah = self.image(at, a);
        let (aa, ga) = (dot(&ah[at..], a), dot(&self.g[at..], a));
        let mut step = if aa > 0.0 { [-ga / aa, 0.0] } else { [0.0; 2] };
        let (mut bh, mut ab, mut bb, mut gb) = ([0f32; MOST], 0.0, 0.0, 0.0);
        if min_at.is_some() {
            bh = self.image(at, b);
            (ab, bb, gb) = (dot(&ah[at..], b), dot(&bh[at..], b), dot(&self.g[at..], b));
            let determinant = aa * bb - ab * ab;
            if determinant > 1e-9 * aa * bb {
                step = [(gb * ab - ga * bb) / determinant, (ga * ab - gb * aa) / determinant];
            }
        }
        let stored = |at: usize| f64::from(f16_to_f32(u16::from_le_bytes([packed[at], packed[at + 1]])));
        let d = half::f16::from_f64(stored(d_at) * (1.0 + step[0]));
        let min = min_at.map(|at| half::f16::from_f64(stored(at) * (1.0 + step[1])));
        if !d.is_finite() || d.to_f32() == 0.0 || stored(d_at) == 0.0 || min.is_some_and(|m| !m.is_finite()) {
            return;
        }
        // What the steps are once rounded.
        let step = d.to_f64() / stored(d_at) - 1.0;
        let min_step = match (min_at.map(stored), min) {
            (Some(old), Some(min)) if old != 0.0 => min.to_f64() / old - 1.0,
            _ => 0.0,
        };
        let change = 2.0 * (step * ga + min_step * gb)
            + step * step * aa
            + 2.0 * step * min_step * ab
            + min_step * min_step * bb;
        if change.is_nan() || change >= 0.0 {
            return;
        }
        packed[d_at..d_at + 2].copy_from_slice(&d.to_le_bytes());
        if let (Some(at), Some(min)) = (min_at, min) {
            packed[at..at + 2].copy_from_slice(&min.to_le_bytes());
        }
        for (i, c) in columns.clone().enumerate() {
            self.e[at + i] -= value(Grid::Blocks(format), codes[c], scales[c / 16], offsets[c / 16]);
        }
        read_params(format, packed, &mut scales[units.clone()], &mut offsets[units]);
        for (i, c) in columns.enumerate() {
            self.e[at + i] += value(Grid::Blocks(format), codes[c], scales[c / 16], offsets[c / 16]);
        }
        let width = self.g.len();
        (self.axpy)(step as f32, &ah[..width], self.g);
        (self.axpy)(min_step as f32, &bh[..width], self.g);
    }

    /// Moves the scale of a group of integer codes, which begins at column `at`, to where the objective is least.
    fn scale_group(&mut self, at: usize, codes: &[u8], scale: &mut f32, zero: f32, half: bool) {
        let mut one = [0f32; MOST];
        let one = &mut one[..codes.len()];
        for (one, code) in one.iter_mut().zip(codes) {
            *one = f32::from(*code) - zero;
        }
        let image = self.image(at, one);
        let (curve, slope) = (dot(&image[at..], one), dot(&self.g[at..], one));
        let best = f64::from(*scale) - slope / curve;
        let new = if half { half::f16::from_f64(best).to_f32() } else { best as f32 };
        let step = f64::from(new) - f64::from(*scale);
        let change = 2.0 * step * slope + step * step * curve;
        if !new.is_finite() || new <= 0.0 || change.is_nan() || change >= 0.0 {
            return;
        }
        for (e, one) in self.e[at..].iter_mut().zip(one.iter()) {
            *e += new * one - *scale * one;
        }
        *scale = new;
        (self.axpy)(step as f32, &image[..self.g.len()], self.g);
    }

    /// Moves the small integers that scale the groups of a block, and those of their minimums.
    fn scale_groups(
        &mut self,
        format: Format,
        block: usize,
        from: usize,
        codes: &[u8],
        packed: &mut [u8],
        scales: &mut [f32],
        offsets: &mut [f32],
    ) {
        let Some(Small { group, low, high }) = Small::of(format) else { return };
        let len = format.block_len();
        let (d_at, min_at) = places(format);
        let packed = &mut packed[block * format.block_bytes()..(block + 1) * format.block_bytes()];
        let half = |at: usize| u16::from_le_bytes([packed[at], packed[at + 1]]);
        let bits = [half(d_at), min_at.map_or(0, half)];
        let [d, min] = bits.map(f16_to_f32);
        if d == 0.0 {
            return;
        }
        let mut small = [(0f32, 0f32); 16];
        let mut changed = false;
        for (j, small) in small[..len / group].iter_mut().enumerate() {
            let first = block * len + j * group;
            let at = first - from;
            let units = first / 16..(first + group) / 16;
            let old = (scales[units.start], offsets[units.start]);
            *small = ((old.0 / d).round(), if min == 0.0 { 0.0 } else { (old.1 / min).round() });
            let before = *small;
            // What one more of the scale, or of the minimum, adds to the group's weights.
            let mut one = [0f32; 32];
            let one = &mut one[..group];
            for (i, one) in one.iter_mut().enumerate() {
                *one = d * f32::from(codes[first + i] as i8);
            }
            small.0 = self.whole_steps(at, one, small.0, low, high);
            if min != 0.0 {
                one.fill(-min);
                small.1 = self.whole_steps(at, one, small.1, low, high);
            }
            if *small == before {
                continue;
            }
            changed = true;
            scales[units.clone()].fill(d * small.0);
            offsets[units].fill(min * small.1);
            for i in 0..group {
                let q = codes[first + i];
                let grid = Grid::Blocks(format);
                self.e[at + i] += value(grid, q, d * small.0, min * small.1) - value(grid, q, old.0, old.1);
            }
        }
        if !changed {
            return;
        }
        let small = &small[..len / group];
        if min_at.is_some() {
            let small: Vec<(u8, u8)> = small.iter().map(|(s, m)| (*s as u8, *m as u8)).collect();
            store(format, packed, bits, &small);
        } else {
            let small: Vec<i8> = small.iter().map(|(s, _)| *s as i8).collect();
            store_scales(format, packed, bits[0], &small);
        }
    }

    /// Adds to the weights from `at` the whole multiple of `one` that lowers the objective most, and gives `now` plus it,
    /// within the bounds.
    fn whole_steps(&mut self, at: usize, one: &[f32], now: f32, low: f32, high: f32) -> f32 {
        let image = self.image(at, one);
        let (curve, slope) = (dot(&image[at..], one), dot(&self.g[at..], one));
        if curve.is_nan() || curve <= 0.0 {
            return now;
        }
        let next = (f64::from(now) - slope / curve).round_ties_even().clamp(f64::from(low), f64::from(high));
        let step = next - f64::from(now);
        let change = 2.0 * step * slope + step * step * curve;
        if change.is_nan() || change >= 0.0 {
            return now;
        }
        (self.axpy)(step as f32, &image[..self.g.len()], self.g);
        next as f32
    }
}

/// The small integers that scale the groups of a block.
struct Small {
    /// Columns of a group.
    group: usize,
    low: f32,
    high: f32,
}

impl Small {
    fn of(format: Format) -> Option<Small> {
        let (group, low, high) = match format {
            Format::Q2_K => (16, 0.0, 15.0),
            Format::Q4_K | Format::Q5_K => (32, 0.0, 63.0),
            Format::Q3_K => (16, -32.0, 31.0),
            Format::IQ4_XS => (32, -32.0, 31.0),
            Format::Q6_K => (16, -128.0, 127.0),
            _ => return None,
        };
        Some(Small { group, low, high })
    }
}

/// Columns of the longest batch.
const MOST: usize = 256;

fn dot(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

/// Where a block holds its f16 scale, and its f16 minimum.
fn places(format: Format) -> (usize, Option<usize>) {
    match format {
        Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => (0, Some(2)),
        Format::Q2_K => (80, Some(82)),
        Format::Q3_K => (108, None),
        Format::Q6_K => (208, None),
        _ => (0, None),
    }
}
