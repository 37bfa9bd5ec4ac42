use super::{Activation, RopeLayout};
use crate::cpu::Cpu;
use crate::threads::Disjoint;

/// Numbers that one task of an element-wise step handles: less is not worth a hand-out.
const GRAIN: usize = 16384;

/// What is done to each row: its number, what it is, what is made of it.
type EachRow<'a> = dyn Fn(usize, &[f32], &mut [f32]) + Sync + 'a;

impl Cpu {
    /// `out[r, i] = x[r, order[i]]` for rows of `order.len()` columns.
    ///
    /// # Panics
    /// When `x` and `out` are not as many whole rows, or `order` names a column that is not there.
    pub fn gather_columns(&self, x: &[f32], order: &[u32], out: &mut [f32]) {
        self.rows(order.len(), x, out, &|x, out| {
            for (out, &i) in out.iter_mut().zip(order) {
                *out = x[i as usize];
            }
        });
    }

    /// Rows of `weight.len()`: `out = x / sqrt(mean(x^2) + eps) * (weight + offset)` (Zhang and Sennrich 2019; `offset`
    /// is 1 for the families that store the weight less one, else 0).
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, offset: f32, out: &mut [f32]) {
        let lanes = &self.kernels.lanes;
        self.rows(weight.len(), x, out, &|x, out| {
            let mean = (lanes.sum_squares)(x) / x.len() as f32;
            (lanes.scale_by)(x, 1.0 / (mean + eps).sqrt(), weight, offset, out);
        });
    }

    /// Rows of `width`: `out = (x - mean) / sqrt(variance + eps) * weight + bias` (Ba et al. 2016); an absent weight
    /// is 1, an absent bias 0. Weights of several widths serve as many rows in turn: heads with weights of their own.
    pub fn layer_norm(
        &self,
        x: &[f32],
        width: usize,
        weight: Option<&[f32]>,
        bias: Option<&[f32]>,
        eps: f32,
        out: &mut [f32],
    ) {
        let lanes = &self.kernels.lanes;
        let turn = |weights: &'_ [f32], row: usize| {
            let at = row % (weights.len() / width).max(1) * width;
            at..at + width
        };
        self.numbered_rows(width, x, out, &|row, x, out| {
            let mean = (lanes.sum)(x) / x.len() as f32;
            for (o, x) in out.iter_mut().zip(x) {
                *o = x - mean;
            }
            let variance = (lanes.sum_squares)(out) / x.len() as f32;
            (lanes.scale)(1.0 / (variance + eps).sqrt(), out);
            if let Some(weight) = weight {
                for (o, w) in out.iter_mut().zip(&weight[turn(weight, row)]) {
                    *o *= w;
                }
            }
            if let Some(bias) = bias {
                (lanes.add)(&bias[turn(bias, row)], out);
            }
        });
    }

    /// Turns `rotary` columns, from column `first` on, of each head of `head_dim` columns by the row's angles. `x` is
    /// `[rows, row_width]`, `cos` and `sin` are `[rows, rotary / 2]` (Su et al. 2021).
    pub fn rope(
        &self,
        x: &mut [f32],
        row_width: usize,
        head_dim: usize,
        cos: &[f32],
        sin: &[f32],
        first: usize,
        rotary: usize,
        layout: RopeLayout,
    ) {
        let half = rotary / 2;
        assert!(first + rotary <= head_dim && row_width.is_multiple_of(head_dim), "rotary columns outside of the head");
        let rows = x.len() / row_width.max(1);
        let rotate = self.kernels.lanes.rotate;
        let x = Disjoint::new(x);
        self.split(rows, (GRAIN / row_width.max(1)).max(1), &|rows| {
            for r in rows {
                // SAFETY: a row belongs to one task.
                let row = unsafe { x.slice(r * row_width..(r + 1) * row_width) };
                let (cos, sin) = (&cos[r * half..(r + 1) * half], &sin[r * half..(r + 1) * half]);
                for head in row.chunks_exact_mut(head_dim) {
                    let head = &mut head[first..first + rotary];
                    match layout {
                        RopeLayout::Half => {
                            let (a, b) = head.split_at_mut(half);
                            rotate(a, b, cos, sin);
                        }
                        RopeLayout::TwoHalves => {
                            let quarter = half / 2;
                            for (i, part) in head.chunks_exact_mut(half).enumerate() {
                                let (a, b) = part.split_at_mut(quarter);
                                rotate(a, b, &cos[i * quarter..][..quarter], &sin[i * quarter..][..quarter]);
                            }
                        }
                        RopeLayout::Interleaved => {
                            for ((pair, c), s) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                                let [a, b] = *pair;
                                *pair = [a * c - b * s, a * s + b * c];
                            }
                        }
                    }
                }
            }
        });
    }

    /// `gate = act(gate) * up`.
    pub fn gate(&self, act: Activation, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "gate and up differ in size");
        let shared = Disjoint::new(gate);
        self.split(up.len(), GRAIN / 4, &|range| {
            // SAFETY: ranges are disjoint.
            (self.kernels.lanes.gate)(act, unsafe { shared.slice(range.clone()) }, &up[range]);
        });
    }

    /// `x = act(x)`.
    pub fn activate(&self, act: Activation, x: &mut [f32]) {
        self.elements(x, GRAIN / 4, &|_, x| (self.kernels.lanes.activate)(act, x));
    }

    /// `x += y`.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "sum of different sizes");
        self.elements(x, GRAIN, &|start, x| (self.kernels.lanes.add)(&y[start..start + x.len()], x));
    }

    /// `x += by * y`.
    pub fn add_scaled(&self, x: &mut [f32], by: f32, y: &[f32]) {
        assert_eq!(x.len(), y.len(), "sum of different sizes");
        self.elements(x, GRAIN, &|start, x| (self.kernels.lanes.axpy)(by, &y[start..start + x.len()], x));
    }

    /// Adds `bias` to each row of `x`.
    pub fn add_bias(&self, x: &mut [f32], bias: &[f32]) {
        for row in x.chunks_exact_mut(bias.len().max(1)) {
            (self.kernels.lanes.add)(bias, row);
        }
    }

    /// `x *= by`.
    pub fn scale(&self, x: &mut [f32], by: f32) {
        self.elements(x, GRAIN, &|_, x| (self.kernels.lanes.scale)(by, x));
    }

    /// `x = cap * tanh(x / cap)`.
    pub fn soft_cap(&self, x: &mut [f32], cap: f32) {
        self.elements(x, GRAIN / 4, &|_, x| (self.kernels.lanes.soft_cap)(cap, x));
    }

    /// `x` no further than `limit` from 0.
    pub fn clamp(&self, x: &mut [f32], limit: f32) {
        self.elements(x, GRAIN, &|_, x| x.iter_mut().for_each(|x| *x = x.clamp(-limit, limit)));
    }

    /// f32 to f16 bits, round to nearest even.
    pub fn store_f16(&self, src: &[f32], dst: &mut [u16]) {
        (self.kernels.f32_to_f16)(src, dst);
    }

    /// f16 bits to f32.
    pub fn load_f16(&self, src: &[u16], dst: &mut [f32]) {
        (self.kernels.f16_to_f32)(src, dst);
    }

    /// f32 to 8-bit codes with a scale for each 32: `x ~ scale * code`, `scale = max|x| / 127`.
    pub fn store_q8(&self, src: &[f32], codes: &mut [i8], scales: &mut [f32]) {
        for ((src, codes), scale) in src.chunks(32).zip(codes.chunks_mut(32)).zip(scales) {
            let most = (self.kernels.lanes.max)(src).max(src.iter().fold(0.0, |most, x| most.max(-x)));
            *scale = most / 127.0;
            let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
            codes.iter_mut().zip(src).for_each(|(q, x)| *q = (x * inverse).round() as i8);
        }
    }

    /// What [`Cpu::store_q8`] kept.
    pub fn load_q8(&self, codes: &[i8], scales: &[f32], dst: &mut [f32]) {
        (self.kernels.lanes.widen)(codes, scales, dst);
    }

    fn rows(&self, width: usize, x: &[f32], out: &mut [f32], each: &(dyn Fn(&[f32], &mut [f32]) + Sync)) {
        self.numbered_rows(width, x, out, &|_, x, out| each(x, out));
    }

    fn numbered_rows(&self, width: usize, x: &[f32], out: &mut [f32], each: &EachRow<'_>) {
        assert_eq!(x.len(), out.len(), "output differs in size");
        let width = width.max(1);
        let shared = Disjoint::new(out);
        self.split(x.len() / width, (GRAIN / width).max(1), &|rows| {
            for r in rows {
                let range = r * width..(r + 1) * width;
                // SAFETY: a row belongs to one task.
                each(r, &x[range.clone()], unsafe { shared.slice(range) });
            }
        });
    }

    pub(crate) fn elements(&self, x: &mut [f32], grain: usize, each: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let len = x.len();
        let shared = Disjoint::new(x);
        self.split(len, grain, &|range| {
            // SAFETY: ranges are disjoint.
            each(range.start, unsafe { shared.slice(range) });
        });
    }
}
