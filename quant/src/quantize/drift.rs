//! What a layer's outputs lack because the layers before it are quantized already, and the weights that make it good.

use super::factor::Factor;
use super::hessian::{Hessian, multiply};
use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::kernels::{GemmShape, PANEL};
use crate::threads::Disjoint;

/// `2 / n * T^T X` over `n` rows: how what the outputs of a linear layer lack (`T`, `[n, rows]`: the outputs wanted less
/// those that the unquantized weights give) goes along with its inputs (`X`, `[n, cols]`).
///
/// With it, the squared error `|T - E X|^2` of weights that are off by `E` is known: `E H E^T - 2 E D^T` and a constant,
/// with `H` the [`Hessian`] of `X` and `D` this. It is least not where weights are unchanged but at `E = D H^-1`: a layer
/// can make good part of what those before it got wrong (Li et al. 2025, "GPTAQ", ask for the same outputs).
pub struct Drift {
    rows: usize,
    cols: usize,
    samples: u64,
    /// `[rows, cols]`
    sums: Vec<f32>,
    /// Sums of the squares of each output.
    squares: Vec<f64>,
}

const BLOCK: usize = 96;
/// Samples that are summed before memory is touched.
const CHUNK: usize = 512;

impl Drift {
    /// Nothing seen yet of a layer of `rows` outputs and `cols` inputs.
    pub fn new(rows: usize, cols: usize) -> Drift {
        Drift { rows, cols, samples: 0, sums: vec![0.0; rows * cols], squares: vec![0.0; rows] }
    }

    /// Adds samples `t` (`[n, rows]`) beside `x` (`[n, cols]`). The same calls give the same bits with any number of
    /// threads.
    ///
    /// # Panics
    /// When the two are not whole rows, as many of one as of the other.
    pub fn add(&mut self, cpu: &Cpu, t: &[f32], x: &[f32]) {
        let (rows, cols) = (self.rows, self.cols);
        if rows == 0 || cols == 0 {
            return;
        }
        let n = x.len() / cols;
        assert!(x.len() == n * cols && t.len() == n * rows, "not [n, rows] beside [n, cols]");
        self.samples += n as u64;
        let mut tall = Aligned::<f32>::zeroed(rows * CHUNK);
        let mut wide = Aligned::<f32>::zeroed(cols.next_multiple_of(PANEL) * CHUNK);
        let across = cols.div_ceil(BLOCK);
        for (t, x) in t.chunks(CHUNK * rows).zip(x.chunks(CHUNK * cols)) {
            let n = x.len() / cols;
            {
                let (tall, squares) = (Disjoint::new(&mut tall), Disjoint::new(&mut self.squares));
                cpu.split(rows, 64, &|part| {
                    // SAFETY: these outputs belong to one task.
                    let (tall, squares) =
                        unsafe { (tall.slice(part.start * n..part.end * n), squares.slice(part.clone())) };
                    for (i, t) in t.chunks_exact(rows).enumerate() {
                        for (r, t) in t[part.clone()].iter().enumerate() {
                            tall[r * n + i] = *t;
                            squares[r] += f64::from(*t) * f64::from(*t);
                        }
                    }
                });
                let wide = Disjoint::new(&mut wide);
                cpu.split(cols.div_ceil(PANEL), 1, &|panels| {
                    for p in panels {
                        let used = PANEL.min(cols - p * PANEL);
                        // SAFETY: a panel belongs to one task.
                        let wide = unsafe { wide.slice(p * PANEL * n..(p + 1) * PANEL * n) };
                        for (wide, x) in wide.as_chunks_mut::<PANEL>().0.iter_mut().zip(x.chunks_exact(cols)) {
                            wide[..used].copy_from_slice(&x[p * PANEL..][..used]);
                        }
                    }
                });
            }
            let sums = Disjoint::new(&mut self.sums);
            cpu.team.run(rows.div_ceil(BLOCK) * across, &|task| {
                let (i, j) = (task / across * BLOCK, task % across * BLOCK);
                let (m, width) = (BLOCK.min(rows - i), BLOCK.min(cols - j));
                let mut tile = [0f32; BLOCK * BLOCK];
                let shape = GemmShape { m, n: width, k: n, lda: n, ldb: n * PANEL, ldc: BLOCK, add: false };
                multiply(cpu.kernels.gemm, shape, &tall[i * n..], &wide[j * n..], &mut tile);
                for r in 0..m {
                    let start = (i + r) * cols + j;
                    // SAFETY: a tile belongs to one task.
                    let sums = unsafe { sums.slice(start..start + width) };
                    (cpu.kernels.lanes.add)(&tile[r * BLOCK..][..width], sums);
                }
            });
        }
    }

    /// The mean square of what each output lacks.
    pub fn mean_squares(&self) -> Vec<f64> {
        self.squares.iter().map(|s| s * self.scale() / 2.0).collect()
    }

    fn scale(&self) -> f64 {
        if self.samples == 0 { 0.0 } else { 2.0 / self.samples as f64 }
    }
}

/// What a layer was seen to do on some text.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    /// Of what goes into it.
    pub hessian: &'a Hessian,
    /// What its outputs lack, and the first of its rows that matters; `None` where nothing does.
    pub drift: Option<(&'a Drift, usize)>,
}

impl<'a> From<&'a Hessian> for Seen<'a> {
    fn from(hessian: &'a Hessian) -> Self {
        Seen { hessian, drift: None }
    }
}

impl Seen<'_> {
    /// Whether `rows` rows of weights are within what was seen.
    pub(super) fn fits(&self, rows: usize) -> bool {
        self.drift.is_none_or(|(d, first)| d.cols == self.hessian.cols() && first + rows <= d.rows)
    }

    pub(super) fn is_finite(&self) -> bool {
        self.hessian.is_finite() && self.drift.is_none_or(|(d, _)| d.sums.iter().all(|x| x.is_finite()))
    }

    /// The mean squared error, twice over, of each row of outputs where weights are off by `errors` (`[rows, cols]`).
    pub(super) fn objective(&self, cpu: &Cpu, errors: &[f32]) -> Vec<f64> {
        let mut costs = self.hessian.objective(cpu, errors);
        if let Some((drift, first)) = self.drift {
            let (cols, scale) = (drift.cols, drift.scale());
            for (r, cost) in costs.iter_mut().enumerate() {
                let sums = &drift.sums[(first + r) * cols..][..cols];
                let along = dot(sums, &errors[r * cols..][..cols]);
                *cost = (*cost + scale * (drift.squares[first + r] - 2.0 * along)).max(0.0);
            }
        }
        costs
    }

    /// How weights are best changed before they are rounded, `[rows, cols]`: by `D H^-1` with the Hessian that `factor`
    /// is of, less where `held_out` says that too much of that is chance. `None` where nothing is gained.
    pub(super) fn correction(
        &self,
        cpu: &Cpu,
        rows: usize,
        factor: &Factor,
        order: &[u32],
        held_out: Option<Seen<'_>>,
    ) -> Option<Vec<f32>> {
        let (drift, first) = self.drift?;
        let (cols, scale) = (drift.cols, drift.scale() as f32);
        let mut change: Vec<f32> = drift.sums[first * cols..][..rows * cols].iter().map(|x| x * scale).collect();
        factor.solve(cpu, order, &mut change);
        let judge = held_out.unwrap_or(*self);
        let (drift, first) = judge.drift?;
        let along = drift.scale() * dot(&drift.sums[first * cols..][..rows * cols], &change);
        let across: f64 = judge.hessian.objective(cpu, &change).iter().sum();
        // The share of the change at which the held-out error is least.
        let share = (along / across).min(1.0) as f32;
        if share.is_nan() || share <= 0.0 || change.iter().any(|x| !x.is_finite()) {
            return None;
        }
        change.iter_mut().for_each(|x| *x *= share);
        Some(change)
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
