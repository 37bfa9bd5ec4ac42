//! The second moments of a layer's inputs: what tells an error that matters from one that does not.

use super::gram::{BLOCK, Pair, Precision, products};
use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::kernels::{Gemm, GemmShape, PANEL};
use crate::threads::Disjoint;
use std::io::{Error, ErrorKind, Read, Result, Write};

/// `2 / n * X^T X` over `n` rows of activations: the Hessian of a linear layer's squared output error with respect to
/// any one row of its weights (Frantar et al. 2023, "GPTQ", eq. 1-2).
///
/// Symmetric, so only the blocks on and below the diagonal are kept, as f32 sums: 4 bytes for half of `cols * cols`.
pub struct Hessian {
    cols: usize,
    rows: u64,
    precision: Precision,
    /// Row `i`, columns `0..stride(i)`, one row after another.
    sums: Vec<f32>,
}

const MAGIC: &[u8; 8] = b"rlhess01";

impl Hessian {
    /// No activations yet.
    pub fn new(cols: usize) -> Hessian {
        Hessian { cols, rows: 0, precision: Precision::Exact, sums: vec![0.0; size(cols)] }
    }

    /// The same, of activations that are rounded to bf16 where the processor multiplies those faster than f32.
    pub fn coarse(cols: usize) -> Hessian {
        Hessian { precision: Precision::Coarse, ..Hessian::new(cols) }
    }

    /// Columns of the activations.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows of activations added so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Adds the rows of `x` (`[n, cols]`). The same rows in the same calls give the same bits with any number of
    /// threads.
    ///
    /// # Panics
    /// When `x` is not whole rows.
    pub fn add(&mut self, cpu: &Cpu, x: &[f32]) {
        let cols = self.cols;
        if cols == 0 {
            return;
        }
        assert!(x.len().is_multiple_of(cols), "activations are not [n, cols]");
        self.rows += (x.len() / cols) as u64;
        let sums = Disjoint::new(&mut self.sums);
        let pair = Pair { a: x, rows: cols, b: x, cols };
        products(cpu, self.precision, pair, true, &|i, j, products| {
            let start = offset(cols, i) + j;
            // SAFETY: only one task adds to these places.
            let sums = unsafe { sums.slice(start..start + products.len()) };
            (cpu.kernels.lanes.add)(products, sums);
        });
    }

    /// Adds all rows that `other` has seen.
    ///
    /// # Panics
    /// When the columns differ.
    pub fn merge(&mut self, other: &Hessian) {
        assert_eq!(self.cols, other.cols, "Hessians of different layers");
        self.rows += other.rows;
        for (a, b) in self.sums.iter_mut().zip(&other.sums) {
            *a += b;
        }
    }

    /// The diagonal: twice the mean square of each column.
    pub fn diagonal(&self) -> Vec<f32> {
        (0..self.cols).map(|i| (self.scale() * f64::from(self.sum(i, i))) as f32).collect()
    }

    /// Entry `(i, j)`.
    pub fn get(&self, i: usize, j: usize) -> f64 {
        self.scale() * f64::from(self.sum(i, j))
    }

    /// What a sum is multiplied by.
    pub(super) fn scale(&self) -> f64 {
        if self.rows == 0 { 0.0 } else { 2.0 / self.rows as f64 }
    }

    /// The sum of the products of columns `i` and `j`.
    #[inline]
    pub(super) fn sum(&self, i: usize, j: usize) -> f32 {
        let (i, j) = (i.max(j), i.min(j));
        self.sums[offset(self.cols, i) + j]
    }

    /// Whether every entry is a finite number.
    pub fn is_finite(&self) -> bool {
        self.sums.iter().all(|x| x.is_finite())
    }

    /// Copies sums `[rows][columns]` as panels `[column / 16][row][16]`, which is how [`Gemm`] takes them.
    /// `columns.start` is a multiple of 16.
    pub(super) fn pack(
        &self,
        cpu: &Cpu,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
        out: &mut [f32],
    ) {
        const GRAIN: usize = 512;
        let (panels, height) = (columns.len().div_ceil(PANEL), rows.len());
        let out = Disjoint::new(out);
        let grains = height.div_ceil(GRAIN);
        cpu.team.run(panels * grains, &|t| {
            let (p, g) = (t / grains, t % grains);
            let first = columns.start + p * PANEL;
            let used = PANEL.min(columns.end - first);
            let part = g * GRAIN..height.min((g + 1) * GRAIN);
            // SAFETY: these rows of the panel belong to one task.
            let out = unsafe { out.slice((p * height + part.start) * PANEL..(p * height + part.end) * PANEL) };
            for (k, out) in part.zip(out.as_chunks_mut::<PANEL>().0) {
                let k = rows.start + k;
                out[used..].fill(0.0);
                if first + used <= stride(self.cols, k) {
                    out[..used].copy_from_slice(&self.sums[offset(self.cols, k) + first..][..used]);
                } else {
                    for c in 0..used {
                        out[c] = self.sum(first + c, k);
                    }
                }
            }
        });
    }

    /// The objective of each row of errors `d` (`[rows, cols]`): `d H d^T`, the mean squared output error twice over.
    ///
    /// # Panics
    /// When `d` is not whole rows.
    pub fn objective(&self, cpu: &Cpu, d: &[f32]) -> Vec<f64> {
        const ROWS: usize = 96;
        let cols = self.cols;
        let rows = d.len().checked_div(cols).unwrap_or(0);
        assert_eq!(d.len(), rows * cols, "errors are not [rows, cols]");
        let mut total = vec![0f64; rows];
        let mut panels = Aligned::<f32>::zeroed(cols * BLOCK);
        for from in (0..cols).step_by(BLOCK) {
            let to = cols.min(from + BLOCK);
            let (k, width) = (to, to - from);
            // Everything left of the block counts twice, by symmetry.
            self.pack(cpu, 0..k, from..to, &mut panels);
            let total = Disjoint::new(&mut total);
            cpu.split(rows, ROWS, &|part| {
                let mut tile = [0f32; ROWS * BLOCK];
                let d = &d[part.start * cols..part.end * cols];
                // SAFETY: these rows belong to one task.
                let total = unsafe { total.slice(part) };
                let shape =
                    GemmShape { m: total.len(), n: width, k: from, lda: cols, ldb: k * PANEL, ldc: BLOCK, add: false };
                multiply(cpu.kernels.gemm, shape, d, &panels, &mut tile);
                tile.iter_mut().for_each(|x| *x *= 2.0);
                let shape = GemmShape { k: width, add: true, ..shape };
                multiply(cpu.kernels.gemm, shape, &d[from..], &panels[from * PANEL..], &mut tile);
                for (r, total) in total.iter_mut().enumerate() {
                    let d = &d[r * cols + from..][..width];
                    let tile = &tile[r * BLOCK..][..width];
                    *total += d.iter().zip(tile).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                }
            });
        }
        // Rounding may leave a tiny negative number where the true one is zero.
        total.iter().map(|t| (t * self.scale()).max(0.0)).collect()
    }

    /// The Hessian that `matrix` (`[cols, cols]`) is, as of two rows.
    #[cfg(test)]
    pub(super) fn from_matrix(cols: usize, matrix: &[f64]) -> Hessian {
        let mut hessian = Hessian { rows: 2, ..Hessian::new(cols) };
        for i in 0..cols {
            for j in 0..stride(cols, i) {
                hessian.sums[offset(cols, i) + j] = matrix[i * cols + j] as f32;
            }
        }
        hessian
    }

    /// Writes everything as bytes that [`Hessian::read`] takes back.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn write(&self, to: &mut impl Write) -> Result<()> {
        to.write_all(MAGIC)?;
        to.write_all(&(self.cols as u64).to_le_bytes())?;
        to.write_all(&self.rows.to_le_bytes())?;
        for part in self.sums.chunks(1 << 14) {
            let bytes: Vec<u8> = part.iter().flat_map(|x| x.to_le_bytes()).collect();
            to.write_all(&bytes)?;
        }
        Ok(())
    }

    /// Reads what [`Hessian::write`] wrote for a layer with `cols` inputs.
    ///
    /// # Errors
    /// Those of `from`, also where it ends early; `InvalidData` where it holds something else.
    pub fn read(from: &mut impl Read, cols: usize) -> Result<Hessian> {
        let mut head = [0u8; 24];
        from.read_exact(&mut head)?;
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
        if head[..8] != *MAGIC {
            return Err(Error::new(ErrorKind::InvalidData, "not a saved Hessian"));
        }
        if number(8) != cols as u64 {
            let message = format!("a saved Hessian of {} columns where {cols} were expected", number(8));
            return Err(Error::new(ErrorKind::InvalidData, message));
        }
        let mut hessian = Hessian { rows: number(16), ..Hessian::new(cols) };
        let mut bytes = vec![0u8; 4 << 14];
        for part in hessian.sums.chunks_mut(1 << 14) {
            let bytes = &mut bytes[..4 * part.len()];
            from.read_exact(bytes)?;
            for (x, bytes) in part.iter_mut().zip(bytes.as_chunks().0) {
                *x = f32::from_le_bytes(*bytes);
            }
        }
        Ok(hessian)
    }
}

/// Numbers kept of row `i`.
#[inline]
fn stride(cols: usize, i: usize) -> usize {
    cols.min((i / BLOCK + 1) * BLOCK)
}

/// Where row `i` begins.
#[inline]
fn offset(cols: usize, i: usize) -> usize {
    let block = i / BLOCK;
    BLOCK * BLOCK * (block * (block + 1) / 2) + (i % BLOCK) * stride(cols, i)
}

fn size(cols: usize) -> usize {
    if cols == 0 { 0 } else { offset(cols, cols - 1) + cols }
}

/// `gemm` with long sums cut so that two panels of `b` stay in the nearest cache. (The cuts don't change a bit: each
/// output is one chain of additions.)
pub(super) fn multiply(gemm: Gemm, shape: GemmShape, a: &[f32], b: &[f32], c: &mut [f32]) {
    const DEPTH: usize = 256;
    if shape.k == 0 && !shape.add {
        for r in 0..shape.m {
            c[r * shape.ldc..][..shape.n].fill(0.0);
        }
        return;
    }
    for from in (0..shape.k).step_by(DEPTH) {
        let part = GemmShape { k: DEPTH.min(shape.k - from), add: shape.add || from > 0, ..shape };
        gemm(part, &a[from..], &b[from * PANEL..], c);
    }
}

#[cfg(test)]
mod tests {
    use super::super::gram::CHUNK;
    use super::*;
    use crate::Isa;

    fn random(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).max(1);
        (0..n)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state as f32 / u32::MAX as f32 * 2.0 - 1.0
            })
            .collect()
    }

    #[test]
    fn sums_equal_those_in_f64_for_any_shape_and_number_of_threads() {
        for (cols, n) in [(1, 3), (16, 1), (70, 700), (96, 5), (250, 1030)] {
            let x = random(n * cols, cols as u32);
            let cpu = Cpu::new(1, Isa::best());
            let mut h = Hessian::new(cols);
            h.add(&cpu, &x[..n / 2 * cols]);
            h.add(&cpu, &x[n / 2 * cols..]);
            assert_eq!(h.rows(), n as u64);
            for i in 0..cols {
                for j in 0..cols {
                    let want: f64 =
                        (0..n).map(|r| f64::from(x[r * cols + i]) * f64::from(x[r * cols + j])).sum::<f64>() * 2.0
                            / n as f64;
                    assert!((h.get(i, j) - want).abs() < 1e-6 * (1.0 + want.abs()), "{cols} {n}: {i} {j}");
                }
                assert_eq!(h.diagonal()[i], h.get(i, i) as f32);
            }
            let mut again = Hessian::new(cols);
            let cpu = Cpu::new(3, Isa::best());
            again.add(&cpu, &x[..n / 2 * cols]);
            let mut second = Hessian::new(cols);
            second.add(&cpu, &x[n / 2 * cols..]);
            // Merging adds the same sums in the same order as adding the rows themselves.
            again.merge(&second);
            if n <= CHUNK {
                assert_eq!(h.sums, again.sums);
            }
            assert_eq!(again.rows(), h.rows());
        }
    }

    #[test]
    fn coarse_sums_are_those_of_rounded_numbers() {
        for (cols, n) in [(1, 3), (16, 1), (70, 700), (96, 5), (250, 1130)] {
            let mut x = random(n * cols, cols as u32);
            let cpu = Cpu::new(2, Isa::best());
            let mut coarse = Hessian::coarse(cols);
            coarse.add(&cpu, &x);
            if cpu.kernels.half.is_some() {
                x.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
            }
            let mut exact = Hessian::new(cols);
            exact.add(&cpu, &x);
            for (a, b) in coarse.sums.iter().zip(&exact.sums) {
                assert!((a - b).abs() <= 4e-6 * (n as f32).max(b.abs()), "{cols} {n}: {a} {b}");
            }
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let (cols, n) = (210, 600);
        let x = random(n * cols, 9);
        let sums = [1, 2, 3, 7].map(|threads| {
            let mut h = Hessian::new(cols);
            h.add(&Cpu::new(threads, Isa::best()), &x);
            h.sums
        });
        assert!(sums.iter().all(|s| s == &sums[0]));
    }

    #[test]
    fn the_objective_is_the_squared_output_error() {
        for (cols, rows) in [(5, 2), (100, 130), (200, 3)] {
            let n = 64;
            let (x, d) = (random(n * cols, 3), random(rows * cols, 4));
            let cpu = Cpu::new(2, Isa::best());
            let mut h = Hessian::new(cols);
            h.add(&cpu, &x);
            for (r, got) in h.objective(&cpu, &d).into_iter().enumerate() {
                let want: f64 = (0..n)
                    .map(|i| (0..cols).map(|c| f64::from(x[i * cols + c]) * f64::from(d[r * cols + c])).sum::<f64>())
                    .map(|y| y * y * 2.0 / n as f64)
                    .sum();
                assert!((got - want).abs() < 1e-5 * want, "{cols} {rows} {r}: {got} {want}");
            }
        }
    }

    #[test]
    fn bytes_come_back_and_others_are_refused() {
        let cpu = Cpu::new(1, Isa::best());
        let mut h = Hessian::new(130);
        h.add(&cpu, &random(130 * 7, 5));
        let mut bytes = Vec::new();
        h.write(&mut bytes).unwrap();
        let back = Hessian::read(&mut &bytes[..], 130).unwrap();
        assert_eq!((back.rows, &back.sums), (h.rows, &h.sums));
        for (bytes, cols) in [(&bytes[..bytes.len() - 1], 130), (&bytes[..], 131), (&bytes[1..], 130), (&[][..], 130)] {
            assert!(Hessian::read(&mut &bytes[..], cols).is_err());
        }
    }
}
