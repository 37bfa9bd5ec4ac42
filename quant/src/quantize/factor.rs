//! The Cholesky factor that GPTQ propagates errors with.

use super::hessian::Hessian;
use crate::cpu::Cpu;
use crate::kernels::PANEL;
use crate::threads::Disjoint;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltRegularization, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::matmul;
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{Accum, MatMut, MatRef, Par};
use std::ops::Range;

/// `H = R R^T` with `R` upper triangular, for `H` with its columns in the order in which they are to be visited.
///
/// The paper takes the Cholesky factor `U` of the inverse (`H^-1 = U^T U`); `U = R^-1`, and what it does with `U` can be
/// done with `R`, without any inverse. With errors `E = W - Q` the objective is
/// `tr(E H E^T) = |E R|^2 = sum_j (sum_{k<=j} E_k R_kj)^2`, and once the columns before `j` are fixed, term `j` vanishes
/// for `Q_j = W_j + sum_{k<j} E_k R_kj / R_jj`. That is the compensated column, and each unit of rounding error in it
/// costs `R_jj^2`. (The same as the paper's updates in exact arithmetic; as QuIP's LDLQ.)
pub(super) struct Factor {
    cols: usize,
    /// The lower factor of the reversed matrix, `R[i][j] = L[n - 1 - i][n - 1 - j]`, as square tiles: column of tiles by
    /// column, each from the diagonal down, each tile by columns.
    tiles: Vec<f64>,
    diagonal: Vec<f64>,
}

const TILE: usize = 128;
const SQUARE: usize = TILE * TILE;

impl Factor {
    /// Of `hessian` with `damping` added to its diagonal; a column without any activation counts as one with the mean
    /// square `idle`. `None` where that is not positive definite.
    pub fn new(cpu: &Cpu, hessian: &Hessian, order: &[u32], damping: f64, idle: f64) -> Option<Factor> {
        let n = order.len();
        let side = n.div_ceil(TILE);
        let mut tiles = vec![0f64; side * (side + 1) / 2 * SQUARE];
        let extent = |tile: usize| TILE.min(n - tile * TILE);
        for j in 0..side {
            let (done, rest) = tiles.split_at_mut(start(side, j));
            let width = extent(j);
            let column = &mut rest[..(side - j) * SQUARE];
            // Fill each tile of this column and take off the products of the columns already done.
            {
                let column = Disjoint::new(column);
                cpu.team.run(side - j, &|t| {
                    let i = j + t;
                    // SAFETY: a tile belongs to one task.
                    let tile = unsafe { column.slice(t * SQUARE..(t + 1) * SQUARE) };
                    let height = extent(i);
                    for c in 0..width {
                        let a = order[n - 1 - (j * TILE + c)] as usize;
                        for r in 0..height {
                            let b = order[n - 1 - (i * TILE + r)] as usize;
                            let mut value = hessian.get(a, b);
                            if a == b {
                                value = if value > 0.0 { value } else { idle } + damping;
                            }
                            tile[c * TILE + r] = value;
                        }
                    }
                    let mut target = view_mut(tile, height, width);
                    for k in 0..j {
                        let left = view(&done[start(side, k) + (i - k) * SQUARE..], height, TILE);
                        let right = view(&done[start(side, k) + (j - k) * SQUARE..], width, TILE);
                        matmul(target.as_mut(), Accum::Add, left, right.transpose(), -1.0, Par::Seq);
                    }
                });
            }
            let (corner, below) = column.split_at_mut(SQUARE);
            let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(width, Par::Seq, Default::default()));
            cholesky_in_place(
                view_mut(corner, width, width),
                LltRegularization::default(),
                Par::Seq,
                MemStack::new(&mut memory),
                Default::default(),
            )
            .ok()?;
            let corner = view(corner, width, width);
            if (0..width).any(|i| !(corner[(i, i)] > 0.0 && corner[(i, i)].is_finite())) {
                return None;
            }
            let below = Disjoint::new(below);
            cpu.team.run(side - j - 1, &|t| {
                // SAFETY: a tile belongs to one task.
                let tile = unsafe { below.slice(t * SQUARE..(t + 1) * SQUARE) };
                let height = extent(j + 1 + t);
                solve_lower_triangular_in_place(corner, view_mut(tile, height, width).transpose_mut(), Par::Seq);
            });
        }
        let mut factor = Factor { cols: n, tiles, diagonal: Vec::new() };
        factor.diagonal = (0..n).map(|i| factor.tiles[factor.index(i, i)]).collect();
        Some(factor)
    }

    /// The diagonal of `R`, by position in the order of visits.
    pub fn diagonal(&self) -> &[f64] {
        &self.diagonal
    }

    /// Where `R[i][j]` is, for `i <= j`.
    #[inline]
    fn index(&self, i: usize, j: usize) -> usize {
        let (r, c) = (self.cols - 1 - i, self.cols - 1 - j);
        let (ti, tj) = (r / TILE, c / TILE);
        start(self.cols.div_ceil(TILE), tj) + (ti - tj) * SQUARE + (c % TILE) * TILE + r % TILE
    }

    /// Solves `y H = x` for each row `x` of `rows` (`[.., cols]`, columns in their own order), which becomes `y`. `order` is
    /// that of the visits.
    pub fn solve(&self, cpu: &Cpu, order: &[u32], rows: &mut [f32]) {
        /// Rows solved together.
        const ROWS: usize = 64;
        let n = self.cols;
        let side = n.div_ceil(TILE);
        let count = rows.len() / n;
        let extent = |tile: usize| TILE.min(n - tile * TILE);
        let tile =
            |i: usize, j: usize| view(&self.tiles[start(side, j) + (i - j) * SQUARE..][..SQUARE], extent(i), extent(j));
        let rows = Disjoint::new(rows);
        cpu.split(count, ROWS, &|part| {
            // SAFETY: these rows belong to one task.
            let rows = unsafe { rows.slice(part.start * n..part.end * n) };
            let m = part.len();
            // As columns, in reverse order of visits, one tile of them after another.
            let mut z = vec![0f64; side * TILE * m];
            for (r, row) in rows.chunks_exact(n).enumerate() {
                for (i, c) in order.iter().rev().enumerate() {
                    z[i / TILE * TILE * m + r * TILE + i % TILE] = f64::from(row[*c as usize]);
                }
            }
            for j in 0..side {
                let (done, rest) = z.split_at_mut((j + 1) * TILE * m);
                let mut now = view_mut(&mut done[j * TILE * m..], extent(j), m);
                solve_lower_triangular_in_place(tile(j, j), now.as_mut(), Par::Seq);
                for i in j + 1..side {
                    let target = view_mut(&mut rest[(i - j - 1) * TILE * m..], extent(i), m);
                    matmul(target, Accum::Add, tile(i, j), now.as_ref(), -1.0, Par::Seq);
                }
            }
            for j in (0..side).rev() {
                let (before, done) = z.split_at_mut((j + 1) * TILE * m);
                let mut now = view_mut(&mut before[j * TILE * m..], extent(j), m);
                for i in j + 1..side {
                    let known = view(&done[(i - j - 1) * TILE * m..], extent(i), m);
                    matmul(now.as_mut(), Accum::Add, tile(i, j).transpose(), known, -1.0, Par::Seq);
                }
                solve_upper_triangular_in_place(tile(j, j).transpose(), now, Par::Seq);
            }
            for (r, row) in rows.chunks_exact_mut(n).enumerate() {
                for (i, c) in order.iter().rev().enumerate() {
                    row[*c as usize] = z[i / TILE * TILE * m + r * TILE + i % TILE] as f32;
                }
            }
        });
    }

    /// Copies `R_kj / R_jj` for `k < j` of `columns` as panels `[j / 16][k][16]`, `k < columns.end`; zero elsewhere.
    pub fn pack(&self, cpu: &Cpu, columns: Range<usize>, out: &mut [f32]) {
        const GRAIN: usize = 256;
        let (panels, height) = (columns.len().div_ceil(PANEL), columns.end);
        let grains = height.div_ceil(GRAIN);
        let out = Disjoint::new(out);
        cpu.team.run(panels * grains, &|t| {
            let (p, g) = (t / grains, t % grains);
            let first = columns.start + p * PANEL;
            let used = PANEL.min(columns.end - first);
            let part = g * GRAIN..height.min((g + 1) * GRAIN);
            // SAFETY: these rows of the panel belong to one task.
            let out = unsafe { out.slice((p * height + part.start) * PANEL..(p * height + part.end) * PANEL) };
            out.fill(0.0);
            for c in 0..used {
                let j = first + c;
                let by = 1.0 / self.diagonal[j];
                for k in part.start..part.end.min(j) {
                    out[(k - part.start) * PANEL + c] = (self.tiles[self.index(k, j)] * by) as f32;
                }
            }
        });
    }
}

/// Where column `j` of `side` columns of tiles begins.
fn start(side: usize, j: usize) -> usize {
    (j * side - j * j.saturating_sub(1) / 2) * SQUARE
}

fn view(tile: &[f64], rows: usize, cols: usize) -> MatRef<'_, f64> {
    MatRef::from_column_major_slice_with_stride(&tile[..(cols - 1) * TILE + rows], rows, cols, TILE)
}

fn view_mut(tile: &mut [f64], rows: usize, cols: usize) -> MatMut<'_, f64> {
    MatMut::from_column_major_slice_with_stride_mut(&mut tile[..(cols - 1) * TILE + rows], rows, cols, TILE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn the_factor_times_its_transpose_is_the_matrix() {
        for n in [1, 40, 128, 300] {
            let x: Vec<f32> = (0..n * (n + 40)).map(|i| ((i * 7919 % 1013) as f32 / 506.0 - 1.0).powi(3)).collect();
            let cpu = Cpu::new(1, Isa::best());
            let mut hessian = Hessian::new(n);
            hessian.add(&cpu, &x);
            let order: Vec<u32> = (0..n as u32).rev().collect();
            let factor = Factor::new(&cpu, &hessian, &order, 0.01, 1.0).unwrap();
            for a in 0..n {
                for b in a..n {
                    let got: f64 =
                        (b..n).map(|k| factor.tiles[factor.index(a, k)] * factor.tiles[factor.index(b, k)]).sum();
                    let want = hessian.get(n - 1 - a, n - 1 - b) + if a == b { 0.01 } else { 0.0 };
                    assert!((got - want).abs() < 1e-9, "{n}: {a} {b}: {got} {want}");
                }
            }
            let mut solved: Vec<f32> = (0..70 * n).map(|i| (i * 31 % 97) as f32 / 48.0 - 1.0).collect();
            let rows = solved.clone();
            factor.solve(&cpu, &order, &mut solved);
            for (row, solved) in rows.chunks(n).zip(solved.chunks(n)).step_by(23) {
                for a in 0..n {
                    let entry = |b: usize| hessian.get(a, b) + if a == b { 0.01 } else { 0.0 };
                    let got: f64 = (0..n).map(|b| entry(b) * f64::from(solved[b])).sum();
                    assert!((got - f64::from(row[a])).abs() < 1e-3, "{n}: {a}: {got} {}", row[a]);
                }
            }
            let threaded = Factor::new(&Cpu::new(3, Isa::best()), &hessian, &order, 0.01, 1.0).unwrap();
            assert!(factor.tiles == threaded.tiles);
        }
    }

    #[test]
    fn a_matrix_that_is_not_positive_definite_has_none() {
        let cpu = Cpu::new(1, Isa::best());
        let mut hessian = Hessian::new(20);
        hessian.add(&cpu, &[1.0; 20]);
        let order: Vec<u32> = (0..20).collect();
        assert!(Factor::new(&cpu, &hessian, &order, -0.5, 1.0).is_none());
    }
}
