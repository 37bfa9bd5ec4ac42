//! What a layer's outputs lack because the layers before it are quantized already, and the weights that make it good.

use super::factor::Factor;
use super::gram::{Pair, Precision, products};
use super::hessian::{Hessian, multiply};
use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::kernels::{GemmShape, PANEL};
use crate::threads::Disjoint;
use std::ops::Range;

/// How what the outputs of a linear layer lack goes along with its inputs.
///
/// With `X` the inputs (`[n, cols]`), `T` what the outputs lack (`[n, rows]`: those wanted less those that the unquantized
/// weights give), `H` the [`Hessian`] of `X` and `D = 2 / n * T^T X`, the squared error `|T - X E^T|^2` of weights that are
/// off by `E` is `E H E^T - 2 E D^T` and a constant. It is least not where weights are unchanged but at `E = D H^-1`: a
/// layer can make good part of what those before it got wrong (Li et al. 2025, "GPTAQ", ask for the same outputs).
///
/// `T` itself is never needed, nor the products with unquantized weights that it is the difference of: `D` follows from
/// sums over what is at hand, and from the weights `W`.
pub struct Drift {
    rows: usize,
    cols: usize,
    precision: Precision,
    samples: u64,
    /// `A^T X`, `[rows, cols]`.
    sums: Vec<f32>,
    of: Of,
}

/// What `A` is.
enum Of {
    /// What the outputs should be, less all that is added to the product, with the sums of their squares: `T = A - X W^T`,
    /// and so `D` is that of `A` less `W H`.
    Outputs(Vec<f64>),
    /// What the inputs should be, less what they are, with its own second moments: `T = A W^T`, and so `D` is `W` times
    /// that of `A`.
    Inputs(Hessian),
}

impl Drift {
    /// Nothing seen yet of a layer of `rows` outputs and `cols` inputs, of which it will be shown what its outputs should
    /// be.
    pub fn of_outputs(rows: usize, cols: usize) -> Drift {
        let sums = vec![0.0; rows * cols];
        Drift { rows, cols, precision: Precision::Exact, samples: 0, sums, of: Of::Outputs(vec![0.0; rows]) }
    }

    /// Nothing seen yet of any layers of `cols` inputs that share these, of which it will be shown what they should be.
    pub fn of_inputs(cols: usize) -> Drift {
        let sums = vec![0.0; cols * cols];
        let of = Of::Inputs(Hessian::new(cols));
        Drift { rows: cols, cols, precision: Precision::Exact, samples: 0, sums, of }
    }

    /// The same, of numbers that are rounded to bf16 where the processor multiplies those faster than f32.
    pub fn coarse(self) -> Drift {
        let of = match self.of {
            Of::Inputs(_) => Of::Inputs(Hessian::coarse(self.cols)),
            of => of,
        };
        Drift { precision: Precision::Coarse, of, ..self }
    }

    /// Adds samples `a` beside the inputs `x` (`[n, cols]`): `[n, rows]` numbers that the outputs should be, less all that
    /// is added to the product; or `[n, cols]` that the inputs should be, less what they are. The same calls give the same
    /// bits with any number of threads.
    ///
    /// # Panics
    /// When the two are not whole rows, as many of one as of the other.
    pub fn add(&mut self, cpu: &Cpu, a: &[f32], x: &[f32]) {
        let (rows, cols) = (self.rows, self.cols);
        if rows == 0 || cols == 0 {
            return;
        }
        let n = x.len() / cols;
        assert!(x.len() == n * cols && a.len() == n * rows, "not [n, rows] beside [n, cols]");
        self.samples += n as u64;
        match &mut self.of {
            Of::Inputs(hessian) => hessian.add(cpu, a),
            Of::Outputs(squares) => {
                let squares = Disjoint::new(squares);
                cpu.split(rows, 64, &|part| {
                    // SAFETY: these outputs belong to one task.
                    let squares = unsafe { squares.slice(part.clone()) };
                    for a in a.chunks_exact(rows) {
                        for (square, a) in squares.iter_mut().zip(&a[part.clone()]) {
                            *square += f64::from(*a) * f64::from(*a);
                        }
                    }
                });
            }
        }
        let sums = Disjoint::new(&mut self.sums);
        products(cpu, self.precision, Pair { a, rows, b: x, cols }, false, &|i, j, products| {
            let start = i * cols + j;
            // SAFETY: only one task adds to these places.
            let sums = unsafe { sums.slice(start..start + products.len()) };
            (cpu.kernels.lanes.add)(products, sums);
        });
    }

    fn scale(&self) -> f64 {
        if self.samples == 0 { 0.0 } else { 2.0 / self.samples as f64 }
    }

    /// Its sums as panels `[column / 16][row][16]`.
    fn pack(&self, columns: Range<usize>, out: &mut [f32]) {
        for (p, first) in columns.clone().step_by(PANEL).enumerate() {
            let used = PANEL.min(columns.end - first);
            let panel = out[p * self.rows * PANEL..].as_chunks_mut::<PANEL>().0;
            for (row, out) in self.sums.chunks_exact(self.cols).zip(panel) {
                out[..used].copy_from_slice(&row[first..first + used]);
            }
        }
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

impl<'a> Seen<'a> {
    /// Whether `rows` rows of weights are within what was seen.
    pub(super) fn fits(&self, rows: usize) -> bool {
        self.drift.is_none_or(|(d, first)| {
            d.cols == self.hessian.cols() && (matches!(d.of, Of::Inputs(_)) || first + rows <= d.rows)
        })
    }

    pub(super) fn is_finite(&self) -> bool {
        let finite = |d: &Drift| d.sums.iter().all(|x| x.is_finite());
        self.hessian.is_finite() && self.drift.is_none_or(|(d, _)| finite(d))
    }

    /// The mean square of what each output lacks, for `weights` (`[rows, cols]`).
    ///
    /// # Panics
    /// When they are another number of columns.
    pub fn lacking(&self, cpu: &Cpu, weights: &[f32]) -> Vec<f64> {
        let rows = weights.len() / self.hessian.cols().max(1);
        let goal = Goal::new(cpu, *self, weights, rows);
        goal.gap.map_or(vec![0.0; rows], |gap| gap.squares.iter().map(|s| s / 2.0).collect())
    }
}

/// What the rows of a matrix are to come close to.
pub(super) struct Goal<'a> {
    hessian: &'a Hessian,
    gap: Option<Gap>,
}

/// What their outputs lack.
struct Gap {
    /// `D`, `[rows, cols]`.
    along: Vec<f32>,
    /// Twice the mean square of what each output lacks.
    squares: Vec<f64>,
}

impl<'a> Goal<'a> {
    pub fn new(cpu: &Cpu, seen: Seen<'a>, weights: &[f32], rows: usize) -> Goal<'a> {
        let hessian = seen.hessian;
        let Some((drift, first)) = seen.drift else { return Goal { hessian, gap: None } };
        let (cols, scale) = (drift.cols, drift.scale());
        let gap = match &drift.of {
            Of::Inputs(moments) => {
                let mut along = product(cpu, weights, cols, &|columns, panels| drift.pack(columns, panels));
                along.iter_mut().for_each(|x| *x *= scale as f32);
                Gap { along, squares: moments.objective(cpu, weights) }
            }
            Of::Outputs(squares) => {
                let mut along = product(cpu, weights, cols, &|columns, panels| {
                    hessian.pack(cpu, 0..cols, columns, panels);
                });
                let (sums, own) = (&drift.sums[first * cols..][..rows * cols], hessian.scale());
                let mut left = squares[first..first + rows].to_vec();
                for (r, along) in along.chunks_exact_mut(cols).enumerate() {
                    let row = r * cols..(r + 1) * cols;
                    // |A - X w|^2 = |A|^2 - w A^T X - w (A - X w)^T X
                    left[r] = scale * (left[r] - dot(&weights[row.clone()], &sums[row.clone()]));
                    for (x, sum) in along.iter_mut().zip(&sums[row.clone()]) {
                        *x = (scale * f64::from(*sum) - own * f64::from(*x)) as f32;
                    }
                    left[r] = (left[r] - dot(&weights[row], along)).max(0.0);
                }
                Gap { along, squares: left }
            }
        };
        Goal { hessian, gap: Some(gap) }
    }

    /// The mean squared error, twice over, of each row of outputs where weights are off by `errors` (`[rows, cols]`).
    pub fn objective(&self, cpu: &Cpu, errors: &[f32]) -> Vec<f64> {
        let mut costs = self.hessian.objective(cpu, errors);
        if let Some(gap) = &self.gap {
            let cols = self.hessian.cols();
            let rows = gap.along.chunks_exact(cols).zip(errors.chunks_exact(cols));
            for ((cost, (along, errors)), squares) in costs.iter_mut().zip(rows).zip(&gap.squares) {
                *cost = (*cost + squares - 2.0 * dot(along, errors)).max(0.0);
            }
        }
        costs
    }

    /// How weights are best changed before they are rounded, `[rows, cols]`: by `D H^-1` with the Hessian that `factor`
    /// is of, less where `judge` says that too much of that is chance. `None` where nothing is gained.
    pub fn correction(&self, cpu: &Cpu, factor: &Factor, order: &[u32], judge: &Goal<'_>) -> Option<Vec<f32>> {
        let mut change = self.gap.as_ref()?.along.clone();
        factor.solve(cpu, order, &mut change);
        let along = dot(&judge.gap.as_ref()?.along, &change);
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

/// `weights` (`[rows, cols]`) times a matrix of as many rows and columns as they have columns, some columns of which
/// `pack` gives as panels.
fn product(cpu: &Cpu, weights: &[f32], cols: usize, pack: &dyn Fn(Range<usize>, &mut [f32])) -> Vec<f32> {
    const ROWS: usize = 48;
    const WIDTH: usize = 256;
    let rows = weights.len() / cols;
    let mut all = vec![0f32; rows * cols];
    let mut panels = Aligned::<f32>::zeroed(cols * WIDTH.min(cols.next_multiple_of(PANEL)));
    for from in (0..cols).step_by(WIDTH) {
        let to = cols.min(from + WIDTH);
        pack(from..to, &mut panels);
        let out = Disjoint::new(&mut all);
        cpu.split(rows, ROWS, &|part| {
            let mut tile = vec![0f32; part.len() * WIDTH];
            let (m, n) = (part.len(), to - from);
            let shape = GemmShape { m, n, k: cols, lda: cols, ldb: cols * PANEL, ldc: WIDTH, add: false };
            multiply(cpu.kernels.gemm, shape, &weights[part.start * cols..part.end * cols], &panels, &mut tile);
            for (r, tile) in part.zip(tile.chunks_exact(WIDTH)) {
                // SAFETY: a row belongs to one task.
                unsafe { out.slice(r * cols + from..r * cols + to) }.copy_from_slice(&tile[..n]);
            }
        });
    }
    all
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
