//! The gradients of norms, rotary positions and gates. Gradients of inputs that others may use too are added to what is
//! there, as are those of parameters; element-wise operations turn the gradient of their output into that of their input.

use super::{Activation, RopeLayout};
use crate::cpu::Cpu;
use crate::threads::Disjoint;

/// Numbers that one task of an element-wise step handles.
const GRAIN: usize = 4096;
/// Columns of a parameter's gradient that one task sums over all rows.
const COLUMNS: usize = 64;

/// Adds to `dx` what row `row` gives, with room for another row, and returns the row's mean and what scaled it.
type NormRow<'a> = dyn Fn(usize, &[f32], &[f32], &mut [f32], &mut [f32]) -> [f32; 2] + Sync + 'a;

impl Cpu {
    /// [`Cpu::rms_norm`] backward: from `dy` (`[rows, width]`, as `x`) adds to `dx` and, where it is given, to `dweight`
    /// (`[width]`).
    ///
    /// # Panics
    /// When the sizes do not fit each other.
    pub fn rms_norm_backward(
        &self,
        x: &[f32],
        weight: &[f32],
        eps: f32,
        offset: f32,
        dy: &[f32],
        dx: &mut [f32],
        dweight: Option<&mut [f32]>,
    ) {
        let (lanes, width) = (&self.kernels.lanes, weight.len());
        let stats = self.norm_rows(width, x, dy, dx, &|_, x, dy, dx, g| {
            let rstd = 1.0 / ((lanes.sum_squares)(x) / width as f32 + eps).sqrt();
            (lanes.scale_by)(dy, 1.0, weight, offset, g);
            let along = (lanes.dot)(g, x) * rstd / width as f32;
            (lanes.axpy)(rstd, g, dx);
            (lanes.axpy)(-along * rstd * rstd, x, dx);
            [0.0, rstd]
        });
        if let Some(dweight) = dweight {
            self.norm_weights(width, x, dy, &stats, dweight);
        }
    }

    /// [`Cpu::layer_norm`] backward: from `dy` (as `x`, rows of `width`) adds to `dx` and, where they are given, to
    /// `dweight` and `dbias`, which may be of several widths, as the weights may.
    ///
    /// # Panics
    /// When the sizes do not fit each other.
    pub fn layer_norm_backward(
        &self,
        x: &[f32],
        width: usize,
        weight: Option<&[f32]>,
        eps: f32,
        dy: &[f32],
        dx: &mut [f32],
        dweight: Option<&mut [f32]>,
        dbias: Option<&mut [f32]>,
    ) {
        let lanes = &self.kernels.lanes;
        let count = width as f32;
        let stats = self.norm_rows(width, x, dy, dx, &|row, x, dy, dx, g| {
            let mean = (lanes.sum)(x) / count;
            g.iter_mut().zip(x).for_each(|(g, x)| *g = x - mean);
            let rstd = 1.0 / ((lanes.sum_squares)(g) / count + eps).sqrt();
            match weight {
                Some(weight) => {
                    let at = row % (weight.len() / width).max(1) * width;
                    (lanes.scale_by)(dy, 1.0, &weight[at..at + width], 0.0, g);
                }
                None => g.copy_from_slice(dy),
            }
            let level = (lanes.sum)(g) / count;
            // sum g (x - mean), as the sum of the latter is zero.
            let along = ((lanes.dot)(g, x) - mean * level * count) * rstd * rstd / count;
            for ((dx, g), x) in dx.iter_mut().zip(&*g).zip(x) {
                *dx += rstd * (g - level - along * (x - mean));
            }
            [mean, rstd]
        });
        if let Some(dweight) = dweight {
            self.norm_weights(width, x, dy, &stats, dweight);
        }
        if let Some(dbias) = dbias {
            self.add_bias_backward(dy, dbias);
        }
    }

    /// Calls `each(row, x, dy, dx, scratch)` for every row and gives what it returns: its mean and what scaled it.
    fn norm_rows(&self, width: usize, x: &[f32], dy: &[f32], dx: &mut [f32], each: &NormRow<'_>) -> Vec<[f32; 2]> {
        assert!(x.len() == dy.len() && x.len() == dx.len(), "gradients differ in size");
        let rows = x.len() / width.max(1);
        assert_eq!(rows * width, x.len(), "not whole rows");
        let mut stats = vec![[0.0; 2]; rows];
        let (shared, out) = (Disjoint::new(&mut stats), Disjoint::new(dx));
        self.split(rows, (GRAIN / width.max(1)).max(1), &|rows| {
            let mut scratch = vec![0.0; width];
            for r in rows {
                let at = r * width..(r + 1) * width;
                // SAFETY: a row belongs to one task.
                let (dx, stat) = unsafe { (out.slice(at.clone()), shared.slice(r..r + 1)) };
                stat[0] = each(r, &x[at.clone()], &dy[at], dx, &mut scratch);
            }
        });
        stats
    }

    /// `dweight[c] += sum_r dy[r, c] * (x[r, c] - mean[r]) * rstd[r]`, over the rows in turn where the weights are of
    /// several widths.
    fn norm_weights(&self, width: usize, x: &[f32], dy: &[f32], stats: &[[f32; 2]], dweight: &mut [f32]) {
        assert!(dweight.len().is_multiple_of(width), "weights are not whole rows");
        let turns = dweight.len() / width;
        let out = Disjoint::new(dweight);
        let blocks = width.div_ceil(COLUMNS);
        self.team.run(turns * blocks, &|t| {
            let (turn, first) = (t / blocks, t % blocks * COLUMNS);
            let len = COLUMNS.min(width - first);
            let mut sums = [0f32; COLUMNS];
            for r in (turn..stats.len()).step_by(turns) {
                let [mean, rstd] = stats[r];
                let (x, dy) = (&x[r * width + first..][..len], &dy[r * width + first..][..len]);
                for ((sum, x), dy) in sums.iter_mut().zip(x).zip(dy) {
                    *sum += dy * ((x - mean) * rstd);
                }
            }
            // SAFETY: a range of columns belongs to one task.
            let out = unsafe { out.slice(turn * width + first..turn * width + first + len) };
            (self.kernels.lanes.add)(&sums[..len], out);
        });
    }

    /// [`Cpu::add_bias`] backward: adds the sum of the rows of `dy` to `dbias`.
    ///
    /// # Panics
    /// When `dy` is not whole rows of `dbias.len()`.
    pub fn add_bias_backward(&self, dy: &[f32], dbias: &mut [f32]) {
        let width = dbias.len();
        assert!(dy.len().is_multiple_of(width.max(1)), "not whole rows");
        let out = Disjoint::new(dbias);
        self.split(width, COLUMNS, &|columns| {
            let mut sums = [0f32; COLUMNS];
            let sums = &mut sums[..columns.len()];
            for row in dy.chunks_exact(width) {
                (self.kernels.lanes.add)(&row[columns.clone()], sums);
            }
            // SAFETY: ranges are disjoint.
            (self.kernels.lanes.add)(sums, unsafe { out.slice(columns) });
        });
    }

    /// [`Cpu::gather_columns`] backward: `dx[r, order[i]] += dy[r, i]`.
    ///
    /// # Panics
    /// When `dy` and `dx` are not as many whole rows, or `order` names a column that is not there.
    pub fn scatter_columns(&self, dy: &[f32], order: &[u32], dx: &mut [f32]) {
        assert_eq!(dy.len(), dx.len(), "gradients differ in size");
        let width = order.len().max(1);
        let out = Disjoint::new(dx);
        self.split(dy.len() / width, (GRAIN / width).max(1), &|rows| {
            for r in rows {
                // SAFETY: a row belongs to one task.
                let dx = unsafe { out.slice(r * width..(r + 1) * width) };
                for (dy, &i) in dy[r * width..(r + 1) * width].iter().zip(order) {
                    dx[i as usize] += dy;
                }
            }
        });
    }

    /// [`Cpu::rope`] backward: turns `dx`, which holds the gradient of the output, back by the same angles.
    ///
    /// # Panics
    /// As [`Cpu::rope`].
    pub fn rope_backward(
        &self,
        dx: &mut [f32],
        row_width: usize,
        head_dim: usize,
        cos: &[f32],
        sin: &[f32],
        first: usize,
        rotary: usize,
        layout: RopeLayout,
    ) {
        let back: Vec<f32> = sin.iter().map(|s| -s).collect();
        self.rope(dx, row_width, head_dim, cos, &back, first, rotary, layout);
    }

    /// [`Cpu::gate`] backward: `gate` and `up`, which hold the inputs, become their gradients.
    ///
    /// # Panics
    /// When the sizes differ.
    pub fn gate_backward(&self, act: Activation, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        assert!(gate.len() == dy.len() && up.len() == dy.len(), "gradients differ in size");
        let (gate, up) = (Disjoint::new(gate), Disjoint::new(up));
        self.split(dy.len(), GRAIN, &|range| {
            // SAFETY: ranges are disjoint.
            let (gate, up) = unsafe { (gate.slice(range.clone()), up.slice(range.clone())) };
            (self.kernels.lanes.gate_backward)(act, gate, up, &dy[range]);
        });
    }

    /// [`Cpu::activate`] backward: `dy` becomes the gradient of the input `x`.
    ///
    /// # Panics
    /// When the sizes differ.
    pub fn activate_backward(&self, act: Activation, x: &[f32], dy: &mut [f32]) {
        self.paired(x, dy, &|x, dy| (self.kernels.lanes.activate_backward)(act, x, dy));
    }

    /// [`Cpu::soft_cap`] backward: `dy` becomes the gradient of the input, `y` being what came out.
    ///
    /// # Panics
    /// When the sizes differ.
    pub fn soft_cap_backward(&self, y: &[f32], cap: f32, dy: &mut [f32]) {
        self.paired(y, dy, &|y, dy| (self.kernels.lanes.soft_cap_backward)(cap, y, dy));
    }

    /// [`Cpu::clamp`] backward: `dy` becomes the gradient of the input `x`.
    ///
    /// # Panics
    /// When the sizes differ.
    pub fn clamp_backward(&self, x: &[f32], limit: f32, dy: &mut [f32]) {
        self.paired(x, dy, &|x, dy| {
            for (x, dy) in x.iter().zip(dy) {
                *dy = if x.abs() > limit { 0.0 } else { *dy };
            }
        });
    }

    /// Each row of `x` (`[by.len(), width]`) times the sigmoid of the row's value in `by`.
    ///
    /// # Panics
    /// When `x` is not `by.len()` whole rows.
    pub fn gate_rows(&self, x: &mut [f32], by: &[f32]) {
        for (row, by) in rows_mut(x, by.len()).zip(by) {
            (self.kernels.lanes.scale)(sigmoid(*by), row);
        }
    }

    /// [`Cpu::gate_rows`] backward: `dy` becomes the gradient of the input `x`, and that of `by` is added to `dby`.
    ///
    /// # Panics
    /// When the sizes do not fit each other.
    pub fn gate_rows_backward(&self, x: &[f32], by: &[f32], dy: &mut [f32], dby: &mut [f32]) {
        assert!(x.len() == dy.len() && by.len() == dby.len(), "gradients differ in size");
        let width = x.len() / by.len().max(1);
        for (r, row) in rows_mut(dy, by.len()).enumerate() {
            let gate = sigmoid(by[r]);
            dby[r] += (self.kernels.lanes.dot)(&x[r * width..(r + 1) * width], row) * gate * (1.0 - gate);
            (self.kernels.lanes.scale)(gate, row);
        }
    }

    fn paired(&self, x: &[f32], dy: &mut [f32], each: &(dyn Fn(&[f32], &mut [f32]) + Sync)) {
        assert_eq!(x.len(), dy.len(), "gradients differ in size");
        let shared = Disjoint::new(dy);
        self.split(x.len(), GRAIN, &|range| {
            // SAFETY: ranges are disjoint.
            each(&x[range.clone()], unsafe { shared.slice(range) });
        });
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + crate::kernels::exp(-x))
}

fn rows_mut(x: &mut [f32], rows: usize) -> std::slice::ChunksExactMut<'_, f32> {
    assert!(x.len().is_multiple_of(rows.max(1)), "not whole rows");
    let width = x.len() / rows.max(1);
    x.chunks_exact_mut(width.max(1))
}
