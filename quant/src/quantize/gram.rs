//! Sums of products of two matrices' columns over many rows of activations: `A^T B`.

use super::hessian::multiply;
use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::kernels::{GemmShape, HalfKernels, HalfRows, PANEL, ROW_BLOCK};
use crate::threads::Disjoint;

/// Columns of a block of products: a whole number of every kernel's tiles.
pub(super) const BLOCK: usize = 96;
/// Rows that are summed before memory is touched, so that rounding stays near 1e-6 over millions of them.
pub(super) const CHUNK: usize = 1024;

/// What the products are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Precision {
    /// The numbers as they are.
    Exact,
    /// Rounded to bf16 (8 significant bits) where the processor multiplies those faster than f32.
    Coarse,
}

/// Two matrices of as many rows.
#[derive(Clone, Copy)]
pub(super) struct Pair<'a> {
    /// `[n, rows]`
    pub a: &'a [f32],
    /// Columns of `a`: rows of the product.
    pub rows: usize,
    /// `[n, cols]`
    pub b: &'a [f32],
    /// Columns of `b`.
    pub cols: usize,
}

/// Gives `add` the products `A^T B`, a stretch of a row at a time: `add(i, j, products)` for row `i` from column `j` on,
/// once for each [`CHUNK`] of the pair's rows. With `half`, blocks right of the diagonal are left out, as symmetric
/// products need no more. No two calls at the same time are for the same place, and each place has its calls in order, so
/// that sums are the same bits for any number of threads.
pub(super) fn products(
    cpu: &Cpu,
    precision: Precision,
    pair: Pair<'_>,
    half: bool,
    add: &(dyn Fn(usize, usize, &[f32]) + Sync),
) {
    let Pair { a, rows, b, cols } = pair;
    if rows == 0 || cols == 0 {
        return;
    }
    let across = cols.div_ceil(BLOCK);
    let blocks = (0..rows.div_ceil(BLOCK) * across).map(|t| (t / across, t % across));
    let tiles: Vec<(usize, usize)> = blocks.filter(|(i, j)| !half || j <= i).collect();
    let kernels = cpu.kernels.half.filter(|_| precision == Precision::Coarse);
    let longest = CHUNK.min(a.len() / rows);
    let mut floats = Floats::default();
    let mut halves = Halves::default();
    match kernels {
        None => floats.reserve(rows, cols, longest),
        Some(_) => halves.reserve(rows, cols, longest),
    }
    for (a, b) in a.chunks(CHUNK * rows).zip(b.chunks(CHUNK * cols)) {
        let part = Pair { a, rows, b, cols };
        match &kernels {
            None => floats.fill(cpu, part),
            Some(kernels) => halves.fill(cpu, kernels, part),
        }
        cpu.team.run(tiles.len(), &|t| {
            let (i, j) = (tiles[t].0 * BLOCK, tiles[t].1 * BLOCK);
            let (m, width) = (BLOCK.min(rows - i), BLOCK.min(cols - j));
            let mut tile = [0f32; BLOCK * BLOCK];
            match &kernels {
                None => floats.multiply(cpu, part, (i, m), (j, width), &mut tile),
                Some(kernels) => halves.multiply(kernels, part, (i, m), (j, width), &mut tile),
            }
            for r in 0..m {
                add(i + r, j, &tile[r * BLOCK..][..width]);
            }
        });
    }
}

/// Both sides in f32.
#[derive(Default)]
struct Floats {
    /// `[rows][n]`
    tall: Aligned<f32>,
    /// Panels `[cols / 16][n][16]`.
    wide: Aligned<f32>,
}

impl Floats {
    fn reserve(&mut self, rows: usize, cols: usize, n: usize) {
        self.tall.reserve(rows * n);
        self.wide.reserve(cols.next_multiple_of(PANEL) * n);
    }

    fn fill(&mut self, cpu: &Cpu, Pair { a, rows, b, cols }: Pair<'_>) {
        let n = a.len() / rows;
        let tall = Disjoint::new(&mut self.tall);
        cpu.split(rows, PANEL, &|part| {
            // SAFETY: these columns belong to one task.
            let tall = unsafe { tall.slice(part.start * n..part.end * n) };
            transpose(a, rows, part, n, tall);
        });
        let wide = Disjoint::new(&mut self.wide);
        cpu.split(cols.div_ceil(PANEL), 1, &|panels| {
            for p in panels {
                let used = PANEL.min(cols - p * PANEL);
                // SAFETY: a panel belongs to one task.
                let wide = unsafe { wide.slice(p * PANEL * n..(p + 1) * PANEL * n) };
                for (wide, b) in wide.as_chunks_mut::<PANEL>().0.iter_mut().zip(b.chunks_exact(cols)) {
                    wide[..used].copy_from_slice(&b[p * PANEL..][..used]);
                }
            }
        });
    }

    fn multiply(&self, cpu: &Cpu, pair: Pair<'_>, (i, m): (usize, usize), (j, width): (usize, usize), out: &mut [f32]) {
        let n = pair.a.len() / pair.rows;
        let shape = GemmShape { m, n: width, k: n, lda: n, ldb: n * PANEL, ldc: BLOCK, add: false };
        multiply(cpu.kernels.gemm, shape, &self.tall[i * n..], &self.wide[j * n..], out);
    }
}

/// Both sides in bf16.
#[derive(Default)]
struct Halves {
    /// Blocks as [`HalfRows`] has them, of rows that are columns of `a`.
    tall: Aligned<u16>,
    /// Panels `[cols / 16][n / 2][16][2]`.
    wide: Aligned<u16>,
}

/// Rows of a block of [`HalfRows`].
const ROWS: usize = 16;

impl Halves {
    fn reserve(&mut self, rows: usize, cols: usize, n: usize) {
        let n = n.next_multiple_of(ROW_BLOCK);
        self.tall.reserve(rows.next_multiple_of(ROW_BLOCK) * n);
        self.wide.reserve(cols.next_multiple_of(PANEL) * n);
    }

    fn fill(&mut self, cpu: &Cpu, kernels: &HalfKernels, Pair { a, rows, b, cols }: Pair<'_>) {
        let n = a.len() / rows;
        let padded = n.next_multiple_of(ROW_BLOCK);
        let tall = Disjoint::new(&mut self.tall);
        cpu.split(rows, ROWS, &|part| {
            let mut columns = vec![0f32; ROWS * padded];
            transpose(a, rows, part.clone(), padded, &mut columns);
            // SAFETY: a block belongs to one task.
            let tall = unsafe { tall.slice(part.start * padded..(part.start + ROWS) * padded) };
            (kernels.round)(&columns, padded, tall);
        });
        let wide = Disjoint::new(&mut self.wide);
        cpu.split(cols.div_ceil(PANEL), 2, &|panels| {
            let (from, to) = (panels.start * PANEL, cols.min(panels.end * PANEL));
            // SAFETY: these panels belong to one task.
            let wide = unsafe { wide.slice(from * padded..panels.end * PANEL * padded) };
            (kernels.pairs)(&b[from..], cols, n, to - from, padded * PANEL, wide);
        });
    }

    fn multiply(
        &self,
        kernels: &HalfKernels,
        pair: Pair<'_>,
        (i, m): (usize, usize),
        (j, width): (usize, usize),
        out: &mut [f32],
    ) {
        let padded = (pair.a.len() / pair.rows).next_multiple_of(ROW_BLOCK);
        let rows = HalfRows { all: &self.tall, cols: padded, padded: pair.rows.next_multiple_of(ROW_BLOCK) };
        for at in (0..width).step_by(2 * PANEL) {
            let panel = |p: usize| &self.wide[(j + at + p * PANEL) * padded..][..PANEL * padded];
            let panels = if width - at > PANEL { &[panel(0), panel(1)][..] } else { &[panel(0)] };
            (kernels.mul)(panels, rows, i..i + m, &mut out[at..], BLOCK);
        }
    }
}

/// Columns `part` of `x` (`[.., cols]`) as rows of `stride` numbers.
fn transpose(x: &[f32], cols: usize, part: std::ops::Range<usize>, stride: usize, out: &mut [f32]) {
    for (r, x) in x.chunks_exact(cols).enumerate() {
        for (c, x) in x[part.clone()].iter().enumerate() {
            out[c * stride + r] = *x;
        }
    }
}
