//! Few rows: generated tokens.

use super::Matrix;
use crate::cpu::Cpu;
use crate::kernels::QuantizedRows;
use crate::threads::Disjoint;
use std::collections::HashMap;
use std::ops::Range;

/// Bytes of weights in a task, about: enough that taking it costs nothing, and so few that threads finish together. (A
/// row's sum does not depend on the cut.)
const TASK: usize = 16 << 10;

impl Cpu {
    pub(super) fn few_rows(
        &self,
        x: &[f32],
        quantized: QuantizedRows<'_>,
        n: usize,
        weights: &[Matrix<'_>],
        out: &[Disjoint<'_, f32>],
    ) {
        let cols = quantized.cols;
        self.look_ahead(weights, n);
        self.team.run_in_stretches(tasks(weights, n), &|t| {
            let (i, rows) = place(weights, n, t);
            let w = &weights[i];
            let data = &w.data[rows.start * w.row_bytes()..rows.end * w.row_bytes()];
            if n > 1
                && !w.fine
                && w.format.is_coded()
                && let Some(together) = (self.kernels.dot_batch)(w.format)
            {
                let mut tile = vec![0.0; n * rows.len()];
                together(data, quantized, 0..n, &mut tile);
                for (r, from) in tile.chunks_exact(rows.len()).enumerate() {
                    // SAFETY: a row range of a matrix belongs to one task.
                    unsafe { out[i].slice(r * w.rows + rows.start..r * w.rows + rows.end) }.copy_from_slice(from);
                }
                return;
            }
            // Several rows of activations take turns at a part that stays in the nearest cache.
            let mut rest = vec![0f32; if w.fine { rows.len() } else { 0 }];
            for r in 0..n {
                // SAFETY: a row range of a matrix belongs to one task.
                let out = unsafe { out[i].slice(r * w.rows + rows.start..r * w.rows + rows.end) };
                if !w.format.is_coded() {
                    (self.kernels.dot_floats)(w.format)(data, &x[r * cols..(r + 1) * cols], out);
                } else {
                    (self.kernels.dot_codes)(w.format)(data, quantized.row(r), out);
                }
                if w.fine {
                    (self.kernels.dot_codes)(w.format)(data, quantized.row(n + r), &mut rest);
                    (self.kernels.lanes.add)(&rest, out);
                }
            }
        });
    }

    /// Tells the team which weights usually follow on `weights`, so that no thread waits while memory does nothing.
    fn look_ahead(&self, weights: &[Matrix<'_>], n: usize) {
        let all = tasks(weights, n);
        if self.threads() == 1 || all < self.threads() {
            return;
        }
        let starts = self.team.stretches(all).map(|t| {
            let (i, rows) = place(weights, n, t);
            weights[i].data.as_ptr().addr() + rows.start * weights[i].row_bytes()
        });
        let mut order = self.order.lock().unwrap_or_else(|e| e.into_inner());
        self.team.look_ahead(order.step(starts));
    }
}

/// Rows of a task: more where several rows of activations meet them, since each is then copied to its place.
fn grain(w: &Matrix<'_>, n: usize) -> usize {
    (TASK * n.clamp(1, 8) / w.row_bytes().max(1)).next_multiple_of(8)
}

/// How many tasks the rows of `weights` are cut into where `n` rows of activations meet them.
fn tasks(weights: &[Matrix<'_>], n: usize) -> usize {
    weights.iter().map(|w| w.rows.div_ceil(grain(w, n))).sum()
}

/// Task `t`: which matrix, and which of its rows.
fn place(weights: &[Matrix<'_>], n: usize, mut t: usize) -> (usize, Range<usize>) {
    for (i, w) in weights.iter().enumerate() {
        let (grain, start) = (grain(w, n), t * grain(w, n));
        if start < w.rows {
            return (i, start..w.rows.min(start + grain));
        }
        t -= w.rows.div_ceil(grain);
    }
    unreachable!("a task of these weights")
}

/// Which weights follow on which: a model's are met in the same order for every token. Addresses stand for them, and are
/// never read.
#[derive(Default)]
pub(crate) struct Order {
    last: usize,
    after: HashMap<usize, Next>,
}

struct Next {
    starts: Vec<usize>,
    /// Whether they came twice in a row: experts that tokens choose among hardly do.
    sure: bool,
}

impl Order {
    /// Notes that the weights with these starts, one for each thread, are met now; what follows on them, if that is
    /// known.
    fn step(&mut self, starts: impl Iterator<Item = usize> + Clone) -> &[usize] {
        let key = starts.clone().next().unwrap_or(0);
        if self.after.len() > 1 << 16 {
            self.after.clear();
        }
        match self.after.get_mut(&self.last) {
            Some(next) if starts.clone().eq(next.starts.iter().copied()) => next.sure = true,
            _ => {
                self.after.insert(self.last, Next { starts: starts.collect(), sure: false });
            }
        }
        self.last = key;
        match self.after.get(&key) {
            Some(next) if next.sure => &next.starts,
            _ => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::Format;

    #[test]
    fn tasks_cover_each_row_once() {
        let sizes = [(Format::Q4_0, 3, 64), (Format::F32, 1, 4096), (Format::Q8_0, 700, 256), (Format::Q6_K, 9, 8192)];
        let data: Vec<Vec<u8>> = sizes.iter().map(|&(f, r, c)| vec![0; r * f.row_bytes(c).unwrap()]).collect();
        let weights: Vec<Matrix<'_>> =
            sizes.iter().zip(&data).map(|(&(f, r, c), data)| Matrix::new(f, r, c, data).unwrap()).collect();
        let mut next = (0, 0);
        for t in 0..tasks(&weights, 1) {
            let (i, rows) = place(&weights, 1, t);
            if i != next.0 {
                assert_eq!((i, weights[next.0].rows), (next.0 + 1, next.1), "a matrix ends before the next begins");
                next = (i, 0);
            }
            assert!(rows.start == next.1 && rows.end > rows.start, "task {t} is {i}, {rows:?}");
            next.1 = rows.end;
        }
        assert_eq!(next, (3, 9));
    }

    #[test]
    fn an_order_is_learnt_and_a_broken_one_forgotten() {
        let mut order = Order::default();
        let mut step = |key: usize| order.step([10 * key, 10 * key + 1].into_iter()).to_vec();
        for round in 0..4 {
            for key in 1..=4 {
                let after = key % 4 + 1;
                assert_eq!(
                    step(key),
                    if round > 1 { vec![10 * after, 10 * after + 1] } else { vec![] },
                    "{round} {key}"
                );
            }
        }
        assert_eq!(step(3), [40, 41]);
        assert_eq!(step(2), [30, 31]);
        // 3 does not follow on 2 this time.
        assert_eq!(step(7), [0usize; 0]);
        assert_eq!(step(2), [0usize; 0]);
    }
}
